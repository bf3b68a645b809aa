"""script/answers.sh: which steps it starts and keeps, what is timed, and what its table says of the goals."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from evaluation import latency
from evaluation.options import CONFIDENCES
from model import build_splitnet
from record.checkpoint import save_checkpoint, state_sha256
from script import answers_times
from script.answers_table import conditions, main, read_sets
from tests.stub_python import StubPython
from tests.test_evaluation_answers import answers_of
from tests.tuned_run import REQUEST, content_of, fitted_network

# Stands for Python: notes its arguments; fails once where a file says at which word
STUB = """#!{python}
import json, pathlib, sys
words = sys.argv[1:]
if words[0] == "-c":
    sys.exit(0)
with open({log!r}, "a") as file:
    file.write(json.dumps(words) + "\\n")
fails = pathlib.Path({fails!r})
if fails.exists() and fails.read_text() in " ".join(words):
    fails.unlink()
    sys.exit(1)
"""


@pytest.fixture
def answers(tmp_path: Path) -> StubPython:
    """Runs the script with the stub; returns the commands that it started and the finished process."""
    names = ("DATA", "SEEDS", "SETS", "DIGITS_EPOCHS", "EPOCHS", "SMALL_EPOCHS", "IMAGES", "TIMED", "OUT")
    return StubPython.write("answers.sh", tmp_path, names, STUB, fails=str(tmp_path / "fails"))


def programs(commands: list[list[str]]) -> list[str]:
    return [Path(words[1] if words[0] == "-m" else words[0]).name for words in commands]


def after(words: list[str], flag: str) -> str:
    return words[words.index(flag) + 1]


TUNED = ["train_split.py", "train_split.py", "eval.py", "eval.py", "eval.py", "eval.py", "export.py", "export.py"]


def test_a_killed_measurement_goes_on_where_it_was(answers: StubPython, tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    (tmp_path / "fails").write_text("--cascade_confidence entropy")
    flags = (str(data), "7", "--sets", "small", "--out", "out", "--small_epochs", "2", "--", "--lr", "0.3")
    started, done = answers(*flags)
    assert done.returncode != 0
    parts = ["script.small_images"] * 2
    assert programs(started) == [*parts, *TUNED[:5]]
    train, evaluated = started[3], started[4]
    assert (after(train, "--split_factor"), after(train, "--arch"), after(train, "--epochs")) == (
        "4",
        "wide_resnet16_4",
        "2",
    )
    assert train[-2:] == ["--lr", "0.3"]
    assert after(started[0], "--skip") == after(started[1], "--train")  # others than those that are trained on
    assert after(evaluated, "--tune_on") == str(tmp_path / "out" / "data_small_held_out" / "train")
    assert after(evaluated, "--large") == str(tmp_path / "out" / "small-seed7" / "undivided" / "model_best.pth.tar")
    started, done = answers(*flags)
    assert done.returncode == 0, done.stderr
    assert programs(started) == [*parts, "eval.py", *TUNED[4:], "script.answers_times", "script.answers_table"]
    started, _ = answers(*flags)
    assert programs(started) == [*parts, "script.answers_table"]


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--sets", "cifar"], "--sets cifar: which data?"),
        (["--sets", "digit"], "--sets digit: expected digits, cifar or small"),
        (["--seeds", "1,x"], "x: expected a number of 1 or more"),
    ],
)
def test_mistakes(answers: StubPython, words: list[str], named: str) -> None:
    started, done = answers(*words)
    assert (done.returncode, started) == (2, [])
    assert named in done.stderr


# ---- what is timed ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_what_is_timed_beside_the_chosen_cascade(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network = fitted_network()
    values: dict[str, Any] = answers_of().as_dict()
    values |= {"weights_sha256": state_sha256(network.state_dict()), "rule": "mean_logits", "calibration": None}
    curve = [{"thresholds": [t], "acc1": 90.0, "average_macs": 7.0} for t in (0.0, 0.25, 0.4, 2.0)]
    values["cascade"] |= {"order": [2, 1], "thresholds": [0.4], "macs": [5, 5], "held_out": {"curve": curve}}
    for name in ("margin", "undivided"):
        (tmp_path / name).mkdir()
    save_checkpoint(content_of(network, answers=values), tmp_path / "margin" / "model_best.tuned.pth.tar")
    undivided = build_splitnet(replace(REQUEST, split_factor=1), seed=0)
    save_checkpoint(content_of(undivided), tmp_path / "undivided" / "model_best.pth.tar")
    monkeypatch.setattr(latency, "WARMUP_SECONDS", 0)
    monkeypatch.setattr(latency, "LEAST", 1)
    monkeypatch.setattr(answers_times, "BATCH_SIZES", (1, 4))
    found = answers_times.times(tmp_path, 8, seconds=0)
    assert found["images"] == 8
    assert found["onnxruntime"] == []
    rows = [row for row in found["rows"] if row["batch_size"] == 1]
    assert [row["name"] for row in rows] == [
        *("undivided", "network 1", "network 2", "ensemble", "ensemble", "ensemble"),
        *("0.4", "0", "0.25", "2"),
    ]
    assert {row["rounds"] for row in rows} == {8}


# ---- the table -------------------------------------------------------------------------------------------------------


def row_of(kind: str, accuracy: float, macs: float, **more: Any) -> dict[str, Any]:
    return {
        "kind": kind,
        "networks": [],
        "thresholds": [],
        "test_acc1": accuracy,
        "test_macs": macs,
        "macs_share": macs / 40e6,
        "chosen": False,
        "lost": 2,
        "won": 1,
        **more,
    }


def write_seed(folder: Path, ensemble: float = 95.0, cascade: float = 94.9, macs: float = 12e6) -> None:
    """What a finished seed leaves."""
    rows = [
        row_of("network", 90.0, 10e6, networks=[1]),
        row_of("network", 91.0, 10e6, networks=[2]),
        row_of("ensemble", ensemble, 40e6),
        row_of("undivided", 93.0, 40e6),
        row_of("cascade", 91.0, 10e6, thresholds=[0.0]),
        row_of("cascade", ensemble, 40e6, thresholds=[2.0]),
        row_of("cascade", cascade, macs, thresholds=[0.125], chosen=True),
    ]
    networks = [{"acc1": 90.0}, {"acc1": 91.0}]
    tuned = {"networks": networks, "cascade": {"rows": rows, "dominates_undivided": rows[-1]}}
    selective = {
        who: {"max_prob": {"coverage_at_risk": share}} for who, share in (("ensemble", 0.5), ("cascade", 0.495))
    }
    window = {**tuned, "uncertainty": {"selective": selective}}
    files: dict[str, Any] = {f"{name}/results.json": tuned for name in CONFIDENCES}
    files["window/results.json"] = window
    files["distill/eval_student/results.json"] = {"ensemble_acc1": 93.4}
    files["distill/eval_plain/results.json"] = {"ensemble_acc1": 93.0}
    times = {"undivided": 2.0, "network 1": 0.5, "network 2": 0.5, "ensemble": 3.0, "0": 0.6, "2": 3.1, "0.125": 1.2}
    files["times.json"] = {
        "threads": 1,
        "rows": [
            {"name": name, "batch_size": size, "mean_ms": ms, "p50_ms": 10 * ms if size > 1 else ms}
            for name, ms in (*times.items(), ("ensemble", 9.0))
            for size in (1, 128)
        ],
        "onnxruntime": [{"name": "cascade", "mean_ms": 0.5}, {"name": "ensemble", "mean_ms": 1.0}],
    }
    for name, contents in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(contents))


def reached(out: Path) -> dict[tuple[str, str, str], tuple[float | None, str]]:
    found = conditions(read_sets(out))
    return {(one.goal, one.on, one.what): (one.mean, one.reached) for one in found}


def test_goals_by_the_mean_over_seeds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for seed, macs in ((1, 12e6), (2, 12e6), (10, 18e6)):
        write_seed(tmp_path / f"digits-seed{seed}", macs=macs)
    write_seed(tmp_path / "cifar-seed1", cascade=94.5)
    assert [seed.seed for seed in read_sets(tmp_path)["digits"]] == [1, 2, 10]
    found = reached(tmp_path)
    by = {key[:2]: [] for key in found}
    for key, value in found.items():
        by[key[:2]].append((pytest.approx(value[0]) if value[0] is not None else None, value[1]))
    assert by["A1", "digits"] == [(0.1, "stretch"), (0.35, "yes")]
    few = "(1 of 3 seeds)"
    assert by["A2", "cifar"] == [(90.0, f"stretch {few}"), (0.5, f"no {few}"), (0.3, f"stretch {few}")]
    assert by["A3", "digits"] == [(1.0, "stretch")]
    assert by["A4", "digits"] == [(0.6, "stretch"), (0.6, "stretch")]
    assert by["A5", "digits"] == [(0.5, "yes")]
    assert by["A6", "cifar"] == [(0.005, f"stretch {few}"), (0.3, f"stretch {few}")]
    assert by["A7", "digits"] == [(0.4, "yes")]
    assert by["A8", "small"] == [(None, "not measured")] * 4

    assert main([str(tmp_path)]) == 0
    text = (tmp_path / "goals.md").read_text()
    assert text.strip() == capsys.readouterr().out.strip()
    assert "| A1 | digits | MACs / undivided's | 0.350 ± 0.087 | 3 | ≤ 0.4 | ≤ 0.3 | yes |" in text
    assert "| cascade by margin | 94.900 ± 0.000 | 14.000 ± 3.464 | 1.200 ± 0.000 | 6 / 3 |" in text
    assert "| full ensemble | 95.000 ± 0.000 | 40.000 ± 0.000 | 3.000 ± 0.000 |" in text  # the faster of two
    assert (tmp_path / "digits.png").stat().st_size > 10_000
    assert (tmp_path / "cifar.png").exists()
    assert json.loads((tmp_path / "goals.json").read_text())["timed"]["digits"] == {"threads": 1}


def test_a_cascade_for_half_of_the_cost_is_a_row_of_its_own(tmp_path: Path) -> None:
    for seed in (1, 2, 3):
        write_seed(tmp_path / f"small-seed{seed}", macs=24e6)
        results = json.loads((tmp_path / f"small-seed{seed}" / "margin" / "results.json").read_text())
        results["cascade"]["rows"][-1] |= {"test_acc1": 94.7, "test_macs": 19e6}
        half = tmp_path / f"small-seed{seed}" / "half"
        half.mkdir()
        (half / "results.json").write_text(json.dumps(results))
    found = {what: value for (goal, _, what), value in reached(tmp_path).items() if goal == "A8"}
    above, share = "points above the undivided network", "MACs / undivided's"
    assert found[above] == (pytest.approx(1.9), "yes")
    assert found[share] == (pytest.approx(0.6), "no")
    assert found[f"{above}, tuned for half of its MACs"] == (pytest.approx(1.7), "yes")
    assert found[f"{share}, tuned for half of its MACs"] == (pytest.approx(0.475), "yes")
    assert main([str(tmp_path)]) == 0
    line = (
        "| cascade by margin, for half of the undivided network's MACs | 94.700 ± 0.000 | 19.000 ± 0.000 | – | 6 / 3 |"
    )
    assert line in (tmp_path / "goals.md").read_text()


def test_what_is_not_measured_yet_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path)]) == 2
    assert "nothing was tuned there yet" in capsys.readouterr().err
    folder = tmp_path / "digits-seed1"
    write_seed(folder)
    (folder / "times.json").unlink()
    (folder / "distill" / "eval_student" / "results.json").unlink()
    (tmp_path / "digits-seed2").mkdir()
    found = {key[0]: value for key, value in reached(tmp_path).items() if key[1] == "digits"}
    assert found["A4"] == found["A5"] == found["A7"] == (None, "not measured")
    assert main([str(tmp_path)]) == 0

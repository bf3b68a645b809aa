"""A comparison at equal budget: a hand-made set of runs with known figures gives the known table, notes and picture."""

import csv
import json
import math
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from record.equal_budget import COLUMNS, budget_rows, markdown, notes, plot
from record.runs import read_run
from tests.run_folders import write_run
from utils.compare.__main__ import main

REFERENCE = {"params": 1000, "macs": 50_000}


def make_run(
    parent: Path,
    method: str,
    seed: int,
    acc1: list[float],
    ensemble: float,
    *,
    sizes: tuple[int, int] = (1000, 50_000),
    results: dict[str, Any] | None = None,
    evaluation: dict[str, Any] | None = None,
    **settings: Any,
) -> Path:
    """What train_split.py leaves of a run, as far as a comparison reads it."""
    folder = parent / f"{method}_{len(list(parent.iterdir()))}_seed{seed}"
    values: dict[str, Any] = {"method": method, "arch": "resnet20", "seed": seed, "dataset": "digits", "epochs": 3}
    values |= {"batch_size": 64, "split_factor": len(acc1), "stage_widths": []} | settings
    final = {
        "reported_on": "test",
        "params_one": sizes[0] // len(acc1),
        "params_total": sizes[0],
        "macs_total": sizes[1],
        "macs_training": sizes[1],
        "steps": 30,
        "precision": "bf16",
    } | (results or {})
    write_run(folder, values, acc1, ensemble, final)
    figures: dict[str, Any] = {
        "ensemble_nll": 0.5 + seed / 100,
        "ensemble_ece": 0.03,
        "ensemble_brier": 0.2,
        "disagreement": 0.1,
    }
    figures |= {"ensemble_acc1": ensemble, "acc1": acc1}
    record = {"kind": "eval", "epoch": 3, "step": 30, "test": figures | (evaluation or {})}
    lines = [{"kind": "train", "epoch": 1}, {"kind": "eval", "epoch": 1, "test": {"ensemble_nll": 9.0}}, record]
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return folder


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    """Three seeds of the undivided network, of four that are as good, of one that is worse and too dear, and of kd."""
    parent = tmp_path / "runs"
    parent.mkdir()
    found = []
    teachers = {seed: make_run(parent, "independent", seed, [60.0 + seed], 60.0 + seed) for seed in (1, 2, 3)}
    found += teachers.values()
    for seed, gain in ((1, 1.0), (2, 2.0), (3, 3.0)):
        wide = {"stage_widths": [8.0, 16.0, 32.0], "results": {"macs_training": 51_000}}
        accuracies = [50.0 + seed, 52.0 + seed]
        found.append(
            make_run(parent, "co_training", seed, accuracies, 60.0 + seed + gain, sizes=(1018, 49_500), **wide)
        )
    for seed in (1, 2):
        own = {"num_members": 4, "split_factor": 1, "is_ensembled_after_softmax": True}
        sizes = (300, 50_600)
        of_one = {"results": {"params_one": 300}}
        found.append(
            make_run(
                parent, "batch_ensemble", seed, [40.0] * 4, 60.0 + seed + (-1) ** seed, sizes=sizes, **own, **of_one
            )
        )
    for seed in (1, 2, 3):
        teacher = str(teachers[seed] / "checkpoint_3.pth.tar")
        found.append(make_run(parent, "kd", seed, [62.0 + seed], 62.0 + seed, teacher=teacher))
    return found


def table(folder: Path, *flags: str) -> list[dict[str, str]]:
    prefix = folder / "out" / "table"
    assert main([*flags, "--budget", "equal", "--out", str(prefix)]) == 0
    return [*csv.DictReader(prefix.with_suffix(".csv").read_text().splitlines())]


def test_known_figures_give_the_known_table(folders: list[Path], tmp_path: Path) -> None:
    first, divided, student, thin = table(tmp_path, *map(str, folders))
    assert [row["method"] for row in (first, divided, student, thin)] == [
        "independent:1", "co_training:2", "kd:1", "batch_ensemble:4@macs"
    ]  # fmt: skip
    assert [row["equal"] for row in (first, divided, student, thin)] == ["1", "1", "1", "0"]
    assert (divided["members"], divided["networks"]) == ("2", "2 x resnet20 (8 16 32)")
    assert (thin["members"], thin["networks"]) == ("4", "resnet20")
    sizes = ("params", "params_ratio", "macs", "macs_ratio")
    assert [divided[name] for name in sizes] == ["1018", "1.018", "49500", "0.990"]
    assert [thin[name] for name in sizes] == ["300", "0.300", "50600", "1.012"]
    # 62, 64 and 66, best epoch two more; networks 52, 53 and 54, one more
    figures = ("acc1_last", "acc1_best", "member_acc1_last", "member_acc1_best", "nll_last", "seconds")
    means = [float(divided[f"{name}_mean"]) for name in figures]
    assert means == pytest.approx([64, 66, 53, 54, 0.52, 102])
    deviations = [float(divided[f"{name}_std"]) for name in figures]
    assert deviations == pytest.approx([2, 2, 1, 1, 0.01, 1])
    assert (divided["ece_last_mean"], divided["brier_last_mean"]) == ("0.0300", "0.2000")
    assert (first["disagreement_last_mean"], divided["disagreement_last_mean"]) == ("", "0.1000")
    assert (first["training_macs_ratio"], divided["training_macs_ratio"]) == ("1.000", "1.020")
    assert [first[name] for name in ("delta", "delta_std", "delta_pairs", "delta_low", "delta_high")] == [""] * 5
    # 1, 2 and 3 points: mean 2, deviation 1, Student's t of two degrees 4.3027
    assert [divided[name] for name in ("delta", "delta_std", "delta_pairs")] == ["2.0000", "1.0000", "3"]
    half = 4.30265 / math.sqrt(3)
    ends = [float(divided["delta_low"]), float(divided["delta_high"])]
    assert ends == pytest.approx([2 - half, 2 + half], abs=1e-3)
    assert thin["seeds"] == "1 2"
    assert (thin["delta"], thin["delta_pairs"]) == ("0.0000", "2")  # -1 and +1
    assert divided["latency_ms_b1_mean"] == ""


def test_the_page_has_two_blocks_and_says_what_has_to_be_known(folders: list[Path], tmp_path: Path) -> None:
    prefix = tmp_path / "page"
    assert main([*map(str, folders), "--budget", "equal", "--out", str(prefix)]) == 0
    text = prefix.with_suffix(".md").read_text()
    head, equal, line, rest = text.split("\n")[0], text.split("\n")[2:5], text.split("\n")[6], text.split("\n")[10]
    assert head == f"| {' | '.join(COLUMNS)} |"
    assert [row.split(" | ")[0] for row in equal] == ["| independent:1", "| co_training:2", "| kd:1"]
    assert line == "---"
    assert rest.startswith(
        "| batch_ensemble:4@macs | 4 | resnet20 | 300 | 0.300 | 50,600 | 1.012 | no | 61.50 ± 2.12 |"
    )
    assert equal[1].endswith("| 1 2 3 | +2.00 [-0.48, +4.48] |")
    for said in (
        "Fewer than 3 seeds (batch_ensemble:4@macs)",
        "No difference seen to independent:1: co_training:2, batch_ensemble:4@macs.",
        "batch_ensemble:4@macs is not equal: 0.3 times the parameters of the undivided network.",
        "the mean of logits (independent:1, co_training:2, kd:1); the mean of probabilities (batch_ensemble:4@macs)",
        "The best epoch is chosen on the test images that are reported",
        "kd:1: the training of its teacher took 102 ± 1 seconds more.",
    ):
        assert said in text, said
    assert "**" not in text
    latex = prefix.with_suffix(".tex").read_text()
    assert latex.count(r"\hline") == 4
    assert r"batch\_ensemble:4@macs & 4 & resnet20" in latex
    assert r"61.50 $\pm$ 2.12" in latex
    with Image.open(prefix.with_suffix(".png")) as picture:
        assert min(picture.size) > 800


def test_of_one_seed_nothing_is_said_to_be_seen_or_not(folders: list[Path]) -> None:
    rows = budget_rows([run for run in map(read_run, folders) if run.results["seed"] == 1])
    assert all(row.delta is None or row.delta.low is None for row in rows)
    assert "No difference seen" not in " ".join(notes(rows))


def test_names_sizes_and_one_budget_may_be_given(folders: list[Path], tmp_path: Path) -> None:
    names = ["independent:1", "co_training:2@both", "batch_ensemble:4@macs+be_norm=member", "kd"]
    flags = ["--reference", "1020,100000", "--budget_of", "params", "--entries", " ".join(names)]
    rows = table(tmp_path, *flags, *map(str, folders))
    assert [row["method"] for row in rows] == [names[0], names[1], names[3], names[2]]
    assert [row["equal"] for row in rows] == ["1", "1", "1", "0"]
    assert [row["params_ratio"] for row in rows[:2]] == ["0.980", "0.998"]


def test_latency_is_that_of_the_fastest_way_of_the_deployed_form(folders: list[Path], tmp_path: Path) -> None:
    timed = [("undivided", 1, 0.1), ("x", 1, 5.0), ("x", 1, 3.0), ("x", 8, 1.0), ("x", 128, 40.0)]
    rows = [{"name": name, "batch_size": size, "p50_ms": ms} for name, size, ms in timed]
    (folders[3] / "latency").mkdir()
    (folders[3] / "latency" / "results.json").write_text(json.dumps({"latency": rows}))
    divided = table(tmp_path, *map(str, folders))[1]
    assert (divided["latency_ms_b1_mean"], divided["latency_ms_b1_std"]) == ("3.0000", "")
    assert divided["latency_ms_b128_mean"] == "40.0000"


@pytest.mark.parametrize(
    ("change", "flag"),
    [
        ({"dataset": "cifar10"}, "--dataset"),
        ({"data": "elsewhere"}, "--data"),
        ({"epochs": 4}, "--epochs"),
        ({"batch_size": 32}, "--batch_size"),
        ({"results": {"precision": "fp32"}}, "--amp_dtype"),
    ],
)
def test_runs_that_train_otherwise_are_refused_by_the_flag(
    change: dict[str, Any], flag: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [make_run(tmp_path, "independent", 1, [60.0], 60.0, data="here")]
    runs.append(make_run(tmp_path, "dml", 1, [60.0, 62.0], 64.0, **{"data": "here"} | change))
    command = [*map(str, runs), "--out", str(tmp_path / "c")]
    assert main([*command, "--budget", "equal"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"compare: {flag} ")
    assert error.count("\n") == 1
    assert main(command) == 0
    is_length = flag == "--epochs"
    assert main([*command, "--budget", "equal", "--equal_training", "macs"]) == (0 if is_length else 2)


def test_flags_without_a_budget_and_wrong_ones_are_one_line(
    folders: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for flags, said in (
        (["--budget_of", "macs"], "--budget_of is for"),
        (["--equal_training", "macs"], "--equal_training is for"),
        (["--entries", "a"], "--entries is for"),
        (["--budget", "equal", "--entries", "a b"], "--entries names 2 rows, and the runs make 4"),
        (["--budget", "equal", "--reference", "many"], "--reference many"),
    ):
        assert main([*map(str, folders), *flags, "--out", str(tmp_path / "c")]) == 2
        error = capsys.readouterr().err
        assert said in error
        assert error.count("\n") == 1


def test_older_runs_have_empty_cells_and_unfinished_ones_are_named(folders: list[Path], tmp_path: Path) -> None:
    (folders[3] / "metrics.jsonl").unlink()
    results = json.loads((folders[0] / "results.json").read_text())
    del results["macs_training"]
    (folders[0] / "results.json").write_text(json.dumps(results))
    (folders[-1] / "results.json").unlink()
    rows = table(tmp_path, *map(str, folders))
    assert rows[1]["nll_last_mean"] == ""
    assert rows[1]["acc1_last_mean"] != ""
    assert rows[1]["training_macs_ratio"] == ""
    assert rows[2]["seeds"] == "1 2"
    assert (
        f"Left out, because it has not ended: {folders[-1]} (3 of 3 epochs)." in (tmp_path / "out/table.md").read_text()
    )


def test_a_picture_holds_fourteen_rows(folders: list[Path], tmp_path: Path) -> None:
    runs = [read_run(folder) for folder in folders]
    rows = budget_rows(runs)
    many = [*rows, *rows, *rows, *rows[:2]]
    assert plot(many, tmp_path / "many.png").is_file()
    assert markdown(many).count("independent:1 |") == 4
    assert notes(rows)[0].startswith("Equal: parameters and MACs of what is deployed within 2 %")

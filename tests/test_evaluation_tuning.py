"""eval.py --tune as a user runs it: the tuned checkpoint, its evaluation, and what is refused."""

import csv
import functools
import hashlib
import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import eval as program
from dataset import DataSource, ImageSet, held_out_digest
from evaluation import answers as answers_module
from evaluation import contenders, held_out, latency, tuning
from evaluation import run as evaluation_run
from evaluation.cascade import run_stages
from evaluation.held_out import split_test
from evaluation.options import EvalOptions
from evaluation.tuning import Request, tuned_path, uniform_of
from record.checkpoint import PARTIAL, load_checkpoint, save_checkpoint
from tests.kills import at_call
from tests.runs import Run, train
from tests.tuned_run import digits, fitted_network, prepared, write_run
from utils.errors import UserError

ROOT = Path(__file__).parent.parent


def run(*argv: Any) -> int:
    return program.main(["--no_cuda", "--workers", "0", *map(str, argv)])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("run"), fitted_network())


@pytest.fixture(scope="module")
def tuned(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the files of --tune all."""
    folder = tmp_path_factory.mktemp("tuned")
    assert run("--resume", checkpoint, "--tune", "all", "--conformal", "0.1,0.05", "--model_dir", folder) == 0
    return folder


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.mark.slow
def test_everything_is_written(tuned: Path) -> None:
    assert {"model_best.tuned.pth.tar", "answers.json", "cascade.csv", "cascade.md", "cascade.png"} < set(
        os.listdir(tuned)
    )
    results = read(tuned / "results.json")
    answers = read(tuned / "answers.json")
    assert results["answers"] == answers
    assert answers["tuned_on"]["source"] == "val"
    assert answers["tuned_on"]["also_chose_epoch"] is True
    assert answers["tuned_on"]["sha256"] == digits().held_out_sha256
    images = answers["tuned_on"]["images"] + answers["tuned_on"]["conformal_images"]
    assert images == len(digits().val)
    assert [(row["kind"], row["alpha"]) for row in answers["conformal"]] == [
        (kind, alpha) for alpha in (0.1, 0.05) for kind in ("thr", "aps", "raps")
    ]
    chosen = next(row for row in results["cascade"]["rows"] if row["chosen"])
    full = next(row for row in results["cascade"]["rows"] if row["kind"] == "ensemble")
    assert chosen["test_macs"] <= full["test_macs"]
    assert chosen["test_acc1"] == pytest.approx(full["test_acc1"] + 100 * (chosen["won"] - chosen["lost"]) / 359)
    assert full["test_acc1"] == pytest.approx(results["ensemble_acc1"])
    assert full["test_acc1"] > 50  # the least squares have skill
    with (tuned / "cascade.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["chosen"] for row in rows].count("1") == 1
    ends = [row for row in rows if row["kind"] == "cascade" and row["thresholds"] in ("0", "2")]
    assert sorted(float(row["macs_share"]) for row in ends) == pytest.approx([0.5, 1.0])
    with (tuned / "calibration.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    keys = {(row["what"], row["when"], row["split"]) for row in rows}
    whats = ("ensemble", "network 1", "network 2", "cascade")
    assert keys == {
        (what, when, split) for what in whats for when in ("before", "after") for split in ("held_out", "test")
    }


@pytest.mark.slow
def test_the_tuned_checkpoint_holds_networks_and_no_run(tuned: Path, checkpoint: Path) -> None:
    content, before = load_checkpoint(tuned / "model_best.tuned.pth.tar"), load_checkpoint(checkpoint)
    assert before.keys() - content.keys() == {"optimizer", "rng"}
    assert content["answers"] == read(tuned / "answers.json")
    for name, value in before["state_dict"].items():
        assert torch.equal(content["state_dict"][name], value)


@pytest.mark.slow
def test_a_later_evaluation_says_the_same(tuned: Path, checkpoint: Path, tmp_path: Path) -> None:
    assert run("--resume", tuned / "model_best.tuned.pth.tar", "--model_dir", tmp_path / "a") == 0
    first, again = read(tuned / "results.json"), read(tmp_path / "a" / "results.json")
    assert again["cascade"] == first["cascade"]
    assert again["calibration"] == first["calibration"]
    answers = tuned / "answers.json"
    assert run("--resume", checkpoint, "--answers", answers, "--model_dir", tmp_path / "b") == 0
    assert read(tmp_path / "b" / "results.json")["cascade"] == first["cascade"]


@pytest.mark.slow
def test_the_stages_of_a_set_of_images_are_made_once(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []

    def counted(logits_SNK: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        made.append(logits_SNK.shape[1])
        return run_stages(logits_SNK, *arguments, **options)

    monkeypatch.setattr(answers_module, "run_stages", counted)
    monkeypatch.setattr(tuning, "run_stages", counted)
    flags = ("--tune", "calibration,cascade", "--uncertainty", 1, "--model_dir", tmp_path)
    assert run("--resume", checkpoint, *flags) == 0
    assert made == [len(digits().val), len(digits().test)]


@pytest.mark.slow
def test_a_cascade_is_timed_on_reported_images(tuned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quick = functools.partial(latency.measure, batch_sizes=(1, 3), seconds=0)
    asked: list[torch.Tensor] = []

    def measured(candidates: Any, images_BCHW: torch.Tensor, **options: Any) -> Any:
        asked.append(images_BCHW)
        return quick(candidates, images_BCHW, **options)

    monkeypatch.setattr(contenders, "measure", measured)
    monkeypatch.setattr(evaluation_run, "CASCADE_IMAGES", 12)
    argv = ("--resume", tuned / "model_best.tuned.pth.tar", "--model_dir", tmp_path)
    assert run(*argv, "--benchmark") == 0
    results = read(tmp_path / "results.json")
    rows = [row for row in results["latency"] if row["batch_size"] == 1]
    ensemble = [("resnet20, S = 2", name) for name in ("loop", "parallel", "stacked")]
    expected = [("undivided", "one network"), *ensemble, ("first network", "one network"), (ensemble[0][0], "cascade")]
    assert [(row["name"], row["strategy"]) for row in rows] == expected
    assert {row["rounds"] for row in rows} == {12}
    chosen = next(row for row in results["cascade"]["rows"] if row["chosen"])
    order = results["answers"]["cascade"]["order"]
    accuracies = (results["networks"][order[0] - 1]["acc1"], chosen["test_acc1"])
    assert (rows[-2]["accuracy"], rows[-1]["accuracy"]) == accuracies
    assert all(row["p50_ms"] <= row["p95_ms"] <= row["p99_ms"] and row["mean_ms"] > 0 for row in rows)
    assert "it cannot be parallel or stacked" in (tmp_path / "latency.md").read_text()
    every = prepared(digits().test.images)
    for image in asked[0]:
        assert (every == image).flatten(1).all(dim=1).any()
    assert not torch.equal(asked[0], every[:12])


@pytest.mark.slow
def test_no_test_label_touches_a_fit(
    tuned: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = held_out.open_test_split

    def relabelled(*arguments: Any, **options: Any) -> DataSource:
        source = real(*arguments, **options)
        return replace(source, test=replace(source.test, targets=source.test.targets.flip(0)))

    monkeypatch.setattr(held_out, "open_test_split", relabelled)
    assert run("--resume", checkpoint, "--tune", "all", "--conformal", "0.1,0.05", "--model_dir", tmp_path) == 0
    assert (tmp_path / "answers.json").read_bytes() == (tuned / "answers.json").read_bytes()
    assert read(tmp_path / "results.json")["ensemble_acc1"] != read(tuned / "results.json")["ensemble_acc1"]


@pytest.mark.slow
def test_a_part_of_the_test_images_is_not_reported(checkpoint: Path, tmp_path: Path) -> None:
    argv = ("--resume", checkpoint, "--tune", "calibration", "--tune_on", "test:0.4", "--model_dir", tmp_path)
    assert run(*argv) == 0
    source = digits()
    part, rest, sha256 = split_test(source, "test:0.4", 1)
    results = read(tmp_path / "results.json")
    assert results["answers"]["tuned_on"] == {
        "source": "test:0.4",
        "images": len(part),
        "conformal_images": 0,
        "sha256": sha256,
        "also_chose_epoch": False,
    }
    assert results["images"] == len(rest) == 359 - len(part)
    assert "test:0.4" in results["reported_images"]
    both = torch.cat([part.images, rest.images]).flatten(1)
    assert len(both.unique(dim=0)) == len(source.test.images.flatten(1).unique(dim=0))
    assert run("--resume", tmp_path / "model_best.tuned.pth.tar", "--model_dir", tmp_path / "again") == 0
    assert read(tmp_path / "again" / "results.json")["images"] == len(rest)


def error(capsys: pytest.CaptureFixture[str], *argv: Any, code: int = 2) -> str:
    capsys.readouterr()
    assert run(*argv) == code
    printed = capsys.readouterr().err
    assert "Traceback" not in printed
    return printed.strip().splitlines()[-1]


def test_runs_that_held_nothing_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = {"arch": "resnet20", "split_factor": 2, "dataset": "digits", "method": "co_training", "seed": 1}
    path = write_run(tmp_path, fitted_network(images=20), config=content, held_out_sha256="")
    line = error(capsys, "--resume", path, "--tune", "cascade")
    assert "--val_fraction F" in line
    assert "--tune_on DIR" in line
    assert "--tune_on test:F" in line


@pytest.mark.slow
@pytest.mark.parametrize("held", ["0" * 64, None])
def test_other_held_out_images(held: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changed = {} if held is None else {"held_out_sha256": held}
    path = write_run(tmp_path, fitted_network(images=20), **changed)
    if held is not None:
        assert "held_out_sha256 differs" in error(capsys, "--resume", path, "--tune", "cascade")
        assert not (tmp_path / "eval" / "answers.json").exists()
        return
    content = load_checkpoint(path)
    del content["held_out_sha256"]
    save_checkpoint(content, path)
    capsys.readouterr()
    assert run("--resume", path, "--tune", "calibration") == 0
    assert capsys.readouterr().err.count("does not say which images were held out") == 1


BAD = [
    (["--tune", "cascades"], "--tune cascades: 'cascades' is none of calibration, cascade, conformal, all"),
    (["--tune", "conformal"], "--tune conformal: add --conformal ALPHA"),
    (["--tune", "all", "--conformal", "1"], "--conformal 1: expected numbers above 0 and below 1"),
    (["--tune", "all", "--conformal", "0.1,zero"], "--conformal 0.1,zero"),
    (["--tune", "cascade", "--cascade_tolerance", "-1"], "--cascade_tolerance"),
    (["--tune", "cascade", "--cascade_margin", "inf"], "--cascade_margin"),
    (["--tune", "cascade", "--cascade_budget", "0"], "--cascade_budget"),
    (["--tune", "cascade", "--window_width", "0.6"], "--window_width"),
    (["--tune", "cascade", "--window_for", "risk"], "--window_for risk: expected risk:R"),
    (["--tune", "cascade", "--window_for", "risk:1"], "--window_for risk:1"),
    (["--tune", "cascade", "--cascade_kind", "window", "--calibrate", "none"], "--cascade_kind window"),
    (["--tune", "cascade", "--tune_on", "test:1"], "--tune_on test:1: expected test:F"),
    (["--tune", "cascade", "--tune_on", "test:x"], "--tune_on test:x"),
    (["--tune", "cascade", "--tune_on", "test:0.05"], "--tune_on test:0.05: 18 held-out images are too few"),
    (["--tune", "cascade", "--tune_on", "/nowhere"], "--tune_on /nowhere: expected a folder"),
    (["--tune", "cascade", "--answers", "x.json"], "--tune makes answers, and --answers gives them"),
    (["--tune_on", "test:0.5"], "--tune_on is for --tune"),
    (["--answers", "/nowhere.json"], "--answers /nowhere.json: cannot be read"),
    (["--conformal", "0.1"], "--conformal needs quantiles"),
    (["--answer", "cascade"], "--answer cascade needs a tuned cascade"),
]


@pytest.mark.parametrize(("flags", "named"), BAD)
def test_bad_flags_are_one_line(
    flags: list[str], named: str, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert named in error(capsys, "--resume", checkpoint, "--model_dir", tmp_path, *flags)
    assert os.listdir(tmp_path) == []


def test_one_network_has_no_cascade(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_run(tmp_path, fitted_network(1, images=20))
    assert "--tune cascade: there is one network" in error(capsys, "--resume", path, "--tune", "cascade")
    assert "--answer cascade: there is one network" in error(capsys, "--resume", path, "--answer", "cascade")
    assert run("--resume", path, "--tune", "all") == 0
    assert read(tmp_path / "eval" / "answers.json")["cascade"] is None


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"weights_sha256": "0" * 64}, "tuned for other weights"),
        ({"rule": "mean_softmax"}, "tuned for the rule mean_softmax"),
        ({"weights": "ema"}, "tuned for the ema weights"),
        ({"cascade": {"kind": "leave"}}, "cascade.order is damaged"),
        ({"calibration": "warm"}, "calibration. damaged"),
    ],
)
def test_damaged_answers_are_refused(
    change: dict, named: str, tuned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = load_checkpoint(tuned / "model_best.tuned.pth.tar")
    content["answers"] = {**content["answers"], **change}
    path = tmp_path / "damaged.pth.tar"
    save_checkpoint(content, path)
    line = error(capsys, "--resume", path, "--model_dir", tmp_path / "eval")
    assert f"answers of {path}" in line
    assert named in line
    assert not (tmp_path / "eval").exists()


@pytest.mark.slow
def test_another_calibration_is_tuned_again(tuned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tuned / "model_best.tuned.pth.tar"
    line = error(capsys, "--resume", path, "--model_dir", tmp_path, "--calibrate", "networks")
    assert "tuned with --calibrate ensemble: tune again" in line


def save_folder(folder: Path, images: torch.Tensor, labels: torch.Tensor) -> Path:
    for n, (image, label) in enumerate(zip(images, labels.tolist(), strict=True)):
        path = folder / str(label) / f"{n}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(path)
    return folder


@pytest.mark.slow
def test_a_folder_to_tune_on(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    val = digits().val
    folder = save_folder(tmp_path / "own", val.images[:120], val.targets[:120])
    common = ("--resume", checkpoint, "--tune", "cascade", "--tune_on", folder)
    assert run(*common, "--model_dir", tmp_path / "out") == 0
    assert "only 120 held-out images" in capsys.readouterr().err
    assert read(tmp_path / "out" / "answers.json")["tuned_on"]["images"] == 120
    (folder / "eleven").mkdir()
    assert "do not know the class 'eleven'" in error(capsys, *common, "--model_dir", tmp_path / "more")


def test_images_that_cannot_be_read_are_none_to_tune_on(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    val = digits().val
    folder = save_folder(tmp_path / "own", val.images[:101], val.targets[:101])
    for number in (7, 8):
        next(folder.rglob(f"{number}.png")).write_bytes(b"no image")
    flags = ("--tune", "calibration", "--tune_on", folder, "--on_bad_image", "skip", "--model_dir", tmp_path / "out")
    assert f"--tune_on {folder}: 99 held-out images are too few" in error(capsys, "--resume", checkpoint, *flags)
    assert os.listdir(tmp_path / "out") == []


def reporting(monkeypatch: pytest.MonkeyPatch, **changed: Any) -> None:
    """The test split is opened with other fields."""
    real = held_out.open_test_split
    monkeypatch.setattr(
        held_out, "open_test_split", lambda *args, **options: replace(real(*args, **options), **changed)
    )


def test_images_that_are_reported_are_none_to_tune_on(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also by another way to the same file."""
    source = digits()
    folder = save_folder(tmp_path / "own", source.val.images[:101], source.val.targets[:101])
    file = next(folder.rglob("7.png"))
    (tmp_path / "reported").symlink_to(folder)
    reported = ImageSet(targets=source.val.targets[7:8], paths=(tmp_path / "reported" / file.relative_to(folder),))
    reporting(monkeypatch, test=reported)
    line = error(
        capsys, "--resume", checkpoint, "--tune", "cascade", "--tune_on", folder, "--model_dir", tmp_path / "o"
    )
    assert line.endswith("7.png is among the reported images too: give others.")
    assert not list((tmp_path / "o").iterdir())


def test_small_images_that_are_reported_are_none_to_tune_on(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of these memory has no names, and a part of them has another digest."""
    val = digits().val
    data = save_folder(tmp_path / "data" / "test", val.images[:130], val.targets[:130])
    (tmp_path / "own").mkdir()
    for label in range(9):
        (tmp_path / "own" / str(label)).symlink_to(data / str(label))
    flags = ("--dataset", "folder", "--data", tmp_path / "data", "--tune", "calibration", "--tune_on", tmp_path / "own")
    line = error(capsys, "--resume", checkpoint, *flags, "--model_dir", tmp_path / "o")
    assert line.endswith(".png is among the reported images too: give others.")


@pytest.mark.slow
def test_a_split_that_answers_were_fitted_on_is_not_reported(
    tuned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    reporting(monkeypatch, reported_sha256=digits().held_out_sha256)
    line = error(capsys, "--resume", tuned / "model_best.tuned.pth.tar", "--model_dir", tmp_path)
    assert "these are the images that the answers were fitted on" in line
    assert os.listdir(tmp_path) == []


def test_a_class_on_one_side_alone() -> None:
    source = digits()
    targets = source.test.targets
    numbers = torch.cat([(targets != 9).nonzero().flatten(), (targets == 9).nonzero().flatten()[:1]])
    with pytest.raises(UserError, match=r"--tune_on test:0\.4: the class '9' has too few images for both sides"):
        split_test(replace(source, test=source.test.subset(numbers)), "test:0.4", 1)


def test_the_digest_of_what_was_held_out() -> None:
    held = torch.tensor([1, 5])
    assert held_out_digest(7, held) != held_out_digest(8, held) != held_out_digest(8, torch.tensor([1, 6]))
    numbers = b"".join(n.to_bytes(8, "little") for n in (7, 1, 5))
    assert held_out_digest(7, held) == hashlib.sha256(numbers).hexdigest()


def test_names_and_draws() -> None:
    assert tuned_path(Path("a/model_best.pth.tar"), Path("b")) == Path("b/model_best.tuned.pth.tar")
    assert tuned_path(Path("a/net.pth"), Path("b")) == Path("b/net.tuned.pth.tar")
    assert torch.equal(uniform_of(1, 2, 5), uniform_of(1, 2, 9)[:5])
    assert not torch.equal(uniform_of(1, 2, 5), uniform_of(1, 3, 5))
    request = Request.of(EvalOptions(tune="all", window_for="tpr:0.9"), 1, {})
    assert (request.cascade, request.alphas, request.point, request.share) == (False, [], "tpr", 0.9)


def run_in_two_processes(*flags: object) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*launcher, "eval.py", "--no_cuda", "--workers", "0", *map(str, flags)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_two_processes_write_the_same_answers(tuned: Path, checkpoint: Path, tmp_path: Path) -> None:
    flags = ("--tune", "all", "--conformal", "0.1,0.05", "--model_dir", tmp_path)
    run_in_two_processes("--resume", checkpoint, *flags)
    assert (tmp_path / "answers.json").read_bytes() == (tuned / "answers.json").read_bytes()
    assert read(tmp_path / "results.json")["cascade"] == read(tuned / "results.json")["cascade"]


@pytest.mark.slow
def test_two_processes_predict_the_same_by_the_cascade(tuned: Path, tmp_path: Path) -> None:
    """An odd number of images, so that one process has one more; the networks used of each image, and every score."""
    source = digits()
    photos = save_folder(tmp_path / "photos", source.test.images[:41], source.test.targets[:41])
    argv = ("--resume", tuned / "model_best.tuned.pth.tar", "--predict", photos, "--answer", "cascade")
    run_in_two_processes(*argv, "--model_dir", tmp_path / "two")
    assert run(*argv, "--model_dir", tmp_path / "one") == 0
    one, two = (tmp_path / name / "predict_photos" for name in ("one", "two"))
    assert (two / "predictions.csv").read_bytes() == (one / "predictions.csv").read_bytes()
    with np.load(one / "logits.npz") as expected, np.load(two / "logits.npz") as found:
        assert set(found) == set(expected)
        assert set(expected["networks_used"].tolist()) == {1, 2}
        for name in expected:
            np.testing.assert_array_equal(found[name], expected[name])
    summaries = [read(folder / "predictions.json") for folder in (one, two)]
    assert summaries[0]["average_macs"] == summaries[1]["average_macs"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("place", "number", "left"),
    [
        ("batch of an evaluation", 1, set()),  # over the held-out images
        ("batch of an evaluation", 2, {"answers.json", "model_best.tuned.pth.tar"}),  # over the test images
        ("batch of an evaluation", 3, {"answers.json", "model_best.tuned.pth.tar"}),  # over the foreign ones
        ("rename", 2, {"answers.json"}),  # before the tuned checkpoint has its name
    ],
)
def test_a_killed_tuning_leaves_whole_files_and_can_be_started_again(
    place: str, number: int, left: set[str], tuned: Path, checkpoint: Path, tmp_path: Path
) -> None:
    np.save(tmp_path / "foreign.npy", digits().test.images[:9].permute(0, 2, 3, 1).contiguous().numpy())
    folder = tmp_path / "out"
    argv = ["--no_cuda", "--workers", "0", "--resume", checkpoint, "--tune", "all", "--conformal", "0.1,0.05"]
    argv += ["--ood", tmp_path / "foreign.npy", "--eval_batch_size", 1024, "--model_dir", folder]
    killed = Run(argv, tmp_path / "streams", module="eval", before=at_call(place, number)).wait()
    assert killed.code == -signal.SIGKILL
    names = {path.name for path in folder.iterdir() if not path.name.endswith(PARTIAL)}
    assert names == left
    if place != "rename":
        assert set(os.listdir(folder)) == left
    if "answers.json" in left:
        assert (folder / "answers.json").read_bytes() == (tuned / "answers.json").read_bytes()
    if "model_best.tuned.pth.tar" in left:
        assert load_checkpoint(folder / "model_best.tuned.pth.tar")["answers"] == read(tuned / "answers.json")
    assert run(*argv) == 0
    assert (folder / "answers.json").read_bytes() == (tuned / "answers.json").read_bytes()
    assert read(folder / "results.json")["cascade"] == read(tuned / "results.json")["cascade"]
    assert not [path for path in folder.iterdir() if path.name.endswith(PARTIAL)]


@pytest.mark.parametrize(
    ("word", "named"),
    [
        ("nowhere", "nowhere: expected a folder of images, a .npy array"),
        ("empty", "empty: expected a folder of images, a .npy array"),
        ("text.npy", "text.npy: expected a .npy array"),
        ("floats.npy", "floats.npy: expected a .npy array [N, H, W, 3] of uint8, found float32 [2, 4, 4, 3]"),
        ("planes.npy", "planes.npy: expected a .npy array [N, H, W, 3] of uint8, found uint8 [2, 3, 4, 4]"),
        ("none.npy", "none.npy: expected a .npy array [N, H, W, 3] of uint8, found uint8 [0, 4, 4, 3]"),
        ("pickled.npy", "pickled.npy: expected a .npy array [N, H, W, 3] of uint8"),
        ("good.npy,,good.npy", "an entry is empty"),
        ("imagenet:nowhere", "--ood imagenet:"),
        ("folder:empty", "--ood folder:"),
    ],
)
def test_bad_sets_of_foreign_images_are_one_line(
    word: str, named: str, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out = tmp_path / "data", tmp_path / "out"
    (data / "empty").mkdir(parents=True)
    good = np.zeros((2, 4, 4, 3), dtype=np.uint8)
    arrays = {"good": good, "floats": good.astype(np.float32), "planes": good.transpose(0, 3, 1, 2), "none": good[:0]}
    for name, array in arrays.items():
        np.save(data / f"{name}.npy", array)
    (data / "text.npy").write_text("no array")
    np.save(data / "pickled.npy", np.array([Exploding()], dtype=object), allow_pickle=True)
    name, colon, place = word.rpartition(":")
    words = ",".join(f"{name}{colon}{data / part}" if part else "" for part in place.split(","))
    line = error(capsys, "--resume", checkpoint, "--model_dir", out, "--ood", words)
    assert named in line
    assert not list(out.iterdir())


class Exploding:
    """Read as a pickle, it fails the test that reads it."""

    def __reduce__(self) -> tuple[Any, ...]:
        return pytest.fail, ("a pickle was run",)


@pytest.mark.slow
def test_val_of_a_table_is_found_by_the_columns_and_codes_of_the_run(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(2)
    rows = ["photo,species"]
    for i in range(420):
        pixels = torch.randint(0, 128, (16, 16, 3), generator=generator, dtype=torch.uint8) + 120 * (i % 2)
        Image.fromarray(pixels.numpy()).save(tmp_path / f"{i}.png")
        rows.append(f"{i}.png,n{i % 2}")
    (tmp_path / "labels.csv").write_text("\n".join(rows) + "\n")
    (tmp_path / "names.csv").write_text("n0,cat\nn1,dog\n")
    flags = ["--data", tmp_path / "labels.csv", "--image_column", "photo", "--label_column", "species", "--workers", 0]
    flags += ["--class_map", tmp_path / "names.csv", "--val_fraction", 0.4, "--arch", "resnet20", "--split_factor", 2]
    flags += ["--epochs", 1, "--no_cuda", "--seed", 1, "--model_dir", tmp_path / "run"]
    done = train(flags, tmp_path)
    assert done.code == 0, done.stderr
    best = tmp_path / "run" / "model_best.pth.tar"
    assert run("--resume", best, "--tune", "calibration", "--model_dir", tmp_path / "tuned") == 0
    answers = read(tmp_path / "tuned" / "answers.json")
    assert answers["tuned_on"]["images"] >= 100
    assert answers["tuned_on"]["sha256"] == load_checkpoint(best)["held_out_sha256"]

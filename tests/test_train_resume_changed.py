"""Runs that go on with something changed: another batch size, other flags, another place, other data, a new head."""

import csv
import itertools
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from record.checkpoint import BEST
from tests.kills import library_weights_at_hand
from tests.runs import ROOT, TINY, train
from tests.runs import without_times as lines_of

DIGITS = [*TINY, "--split_factor", 2, "--seed", 1, "--val_fraction", 0, "--print_freq", 5]
SMALL = ["--dataset", "folder", "--arch", "resnet20", "--split_factor", 2, "--seed", 1, "--workers", 0, "--no_cuda"]
SMALL += ["--batch_size", 8, "--is_autoaugment", 0, "--amp_dtype", "fp32"]


def images(root: Path, classes: tuple[str, ...], *, train_images: int = 8, side: int = 32) -> Path:
    generator = np.random.default_rng(len(classes))
    for split, count in (("train", train_images), ("val", 4)):
        for name in classes:
            (root / split / name).mkdir(parents=True, exist_ok=True)
            for i in range(count):
                pixels = generator.integers(0, 256, (side, side, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{i}.png")
    return root


def evaluated(folder: Path) -> list[tuple[int, int]]:
    """(epoch, step) of every row of summary.csv."""
    with (folder / "summary.csv").open(newline="") as file:
        return [(int(row["epoch"]), int(row["step"])) for row in csv.DictReader(file)]


def checkpoint(path: Path) -> dict[str, Any]:
    return torch.load(path, weights_only=True)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 14 steps an epoch, stopped after two of its four epochs."""
    folder = tmp_path_factory.mktemp("stopped") / "m"
    argv = [*DIGITS, "--epochs", 4, "--max_steps", 28, "--model_dir", folder]
    assert train(argv, folder.parent).code == 0
    (folder / "results.json").unlink()
    return folder


@pytest.fixture
def run(stopped: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(stopped, tmp_path / "m"))


def go_on(folder: Path, *flags: object, resume: object = "auto", epochs: int = 4) -> Any:
    return train([*DIGITS, "--epochs", epochs, *flags, "--model_dir", folder, "--resume", resume], folder.parent)


@pytest.mark.parametrize(("size", "steps"), [(32, 44), (512, 2)])
def test_another_batch_size_trains_the_epochs_that_are_left(run: Path, size: int, steps: int) -> None:
    result = go_on(run, "--batch_size", size)
    assert result.code == 0, result.stderr
    assert f"changed on resume: batch_size 96 → {size} (flag: the share of training" in result.stderr
    assert evaluated(run) == [(1, 14), (2, 28), (3, 28 + steps), (4, 28 + 2 * steps)]
    rates = [line["learning_rate"] for line in lines_of(run / "metrics.jsonl") if line["kind"] == "train"]
    assert all(after <= before for before, after in itertools.pairwise(rates))  # the schedule does not jump back
    assert result.result["steps"] == 28 + 2 * steps


def test_within_an_epoch_it_goes_on_at_the_same_image_or_not_at_all(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    assert train([*DIGITS, "--epochs", 2, "--max_steps", 4, "--model_dir", folder], tmp_path).code == 0
    refused = go_on(folder, "--batch_size", 100, epochs=2)
    assert refused.code == 2
    assert "stopped within epoch 1, after 384 images, which no whole batches make" in refused.stderr
    result = go_on(folder, "--batch_size", 192, epochs=2)
    assert result.code == 0, result.stderr
    assert evaluated(folder)[-2:] == [(1, 4 + 5), (2, 4 + 5 + 7)]
    assert not list(folder.glob("checkpoint_0_*"))[5:]


@pytest.mark.slow
def test_the_optimiser_takes_the_settings_of_now(run: Path) -> None:
    before = checkpoint(run / "checkpoint_2.pth.tar")
    flags = ["--weight_decay", 0.5, "--momentum", 0.1, "--no_decay", "norm_bias", "--lr", 0.05, "--is_mixup", 1]
    result = go_on(run, *flags, "--max_steps", 29)
    assert result.code == 0, result.stderr
    line = next(line for line in result.stderr.splitlines() if "changed on resume" in line)
    for words in ("weight_decay 0.000303265 → 0.5 (flag)", "momentum 0.9 → 0.1 (flag)", "is_mixup 0 → 1 (flag)"):
        assert words in line
    after = checkpoint(run / "checkpoint_2_29.pth.tar")
    groups = after["optimizer"]["param_groups"]
    assert [(group["weight_decay"], group["momentum"]) for group in groups] == [(0.5, 0.1), (0.0, 0.1)]
    assert [len(group["params"]) for group in groups] != [len(g["params"]) for g in before["optimizer"]["param_groups"]]
    # the momentum of each parameter came along, whatever its group is now: v = 0.1 v + g, and g is small beside v here
    old = dict(zip(before["parameters"], before["optimizer"]["state"].values(), strict=True))
    new = dict(zip(after["parameters"], after["optimizer"]["state"].values(), strict=True))
    assert old.keys() == new.keys()
    assert all(new[name]["momentum_buffer"].shape == old[name]["momentum_buffer"].shape for name in old)
    assert json.loads((run / "hparams_train.json").read_text())["momentum"] == {"value": 0.1, "origin": "flag"}


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (["--arch", "resnet32"], "--arch resnet20, and this one has --arch resnet32"),
        (["--optimizer", "AdamW"], "--optimizer SGD"),
        (["--seed", 2], "--seed 1"),
        (["--split_factor", 4], "--split_factor 2"),
        (["--val_fraction", 0.2], "--val_fraction 0.2: other images would be held out"),
    ],
)
def test_another_run_is_refused_and_loses_nothing(run: Path, flags: list, line: str) -> None:
    before = {path.name: path.stat().st_mtime_ns for path in run.glob("*.pth.tar")}
    result = go_on(run, *flags)
    assert result.code == 2
    assert line in result.stderr
    assert "Traceback" not in result.stderr
    assert {path.name: path.stat().st_mtime_ns for path in run.glob("*.pth.tar")} == before
    assert evaluated(run) == [(1, 14), (2, 28)]


def test_an_average_that_is_switched_on_starts_from_the_weights(run: Path) -> None:
    before = checkpoint(run / "checkpoint_2.pth.tar")["state_dict"]
    result = go_on(run, "--ema_decay", 0.9999, "--max_steps", 29)
    assert result.code == 0, result.stderr
    assert "ema_decay 0 → 0.9999 (flag: a new average starts from the restored weights" in result.stderr
    after = checkpoint(run / "checkpoint_2_29.pth.tar")
    name = next(name for name, value in before.items() if value.dim() == 4)
    expected = torch.lerp(before[name], after["state_dict"][name], 1e-4)
    torch.testing.assert_close(after["ema"][name], expected, rtol=1e-5, atol=1e-7)
    off = go_on(run, "--max_steps", 30)
    assert off.code == 0, off.stderr
    assert "ema" not in checkpoint(run / "checkpoint_2_30.pth.tar")


@pytest.mark.slow
def test_a_finished_run_answers_only_for_itself(run: Path) -> None:
    first = go_on(run, epochs=2, resume="auto")
    assert first.code == 0, first.stderr
    again = go_on(run, epochs=2)
    assert again.result == first.result
    assert "already finished: nothing was trained" in again.stderr
    other = go_on(run, "--arch", "resnet32", epochs=2)
    assert other.code == 2
    assert "--arch resnet20, and this one has --arch resnet32" in other.stderr
    without_effect = go_on(run, "--lr", 0.5, epochs=2)
    assert "nothing was trained; without effect: epochs 4 → 2 (flag), lr 0.1 → 0.5 (flag)" in without_effect.stderr


@pytest.mark.slow
def test_what_lies_after_a_place_gone_back_to_is_put_aside(run: Path) -> None:
    assert go_on(run).code == 0  # four epochs
    back = go_on(run, "--lr", 0.01, "--max_steps", 16, "--max_ckpt_nums", 2, resume=run / "checkpoint_1.pth.tar")
    assert back.code == 0, back.stderr
    assert {path.name for path in (run / "abandoned").iterdir()} >= {f"checkpoint_{n}.pth.tar" for n in (2, 3, 4)}
    assert {path.name for path in run.glob("checkpoint_*")} == {"checkpoint_1.pth.tar", "checkpoint_1_16.pth.tar"}
    assert evaluated(run) == [(1, 14), (1, 16)]
    best = back.result["best_epoch"]
    place = checkpoint(run / "model_best.pth.tar")["sampler"]
    assert (place["epoch"], place["done"]) in {(best, 14), (best, 16)}
    on = go_on(run, "--lr", 0.01, "--max_steps", 18)
    assert on.code == 0
    assert "Going on from" in on.stderr
    assert "checkpoint_1_16.pth.tar" in on.stderr


def test_start_epoch_cuts_the_logs_as_any_going_back(run: Path) -> None:
    result = go_on(run, "--start_epoch", 1, "--max_steps", 15)
    assert result.code == 0, result.stderr
    assert evaluated(run) == [(1, 14), (1, 15)]
    steps = [line["step"] for line in lines_of(run / "metrics.jsonl") if line["kind"] == "train"]
    assert steps == sorted(set(steps))
    assert (run / "abandoned" / "checkpoint_2.pth.tar").exists()


def test_another_folder_gets_the_best_weights_and_never_two_runs(run: Path, tmp_path: Path) -> None:
    new = tmp_path / "new"
    result = go_on(new, "--max_steps", 29, resume=run / "checkpoint_2.pth.tar")
    assert result.code == 0, result.stderr
    best = checkpoint(new / "model_best.pth.tar")
    assert best["epoch"] == result.result["best_epoch"]
    assert evaluated(new)[0] == (2, 29)
    mixed = go_on(new, resume=run / "checkpoint_1.pth.tar")
    assert mixed.code == 2
    assert "holds another run than --resume" in mixed.stderr


def test_a_class_with_another_name_is_refused(tmp_path: Path) -> None:
    data = images(tmp_path / "data", ("ant", "bee"))
    argv = [*SMALL, "--data", data, "--epochs", 2, "--model_dir", tmp_path / "m"]
    assert train([*argv, "--max_steps", 2], tmp_path).code == 0
    for split in ("train", "val"):
        (data / split / "ant").rename(data / split / "cat")
    result = train([*argv, "--resume", "auto"], tmp_path)
    assert result.code == 2
    assert "class 0 is 'bee' in --data and 'ant' in the checkpoint" in result.stderr


def test_a_grown_data_set_goes_on_with_the_next_epoch(tmp_path: Path) -> None:
    data = images(tmp_path / "data", ("ant", "bee"))
    argv = [*SMALL, "--data", data, "--epochs", 3, "--model_dir", tmp_path / "m"]
    assert train([*argv, "--max_steps", 2], tmp_path).code == 0
    images(data, ("ant", "bee"), train_images=12)
    result = train([*argv, "--resume", "auto"], tmp_path)
    assert result.code == 0, result.stderr
    assert "training images 16 → 24" in result.stderr
    assert evaluated(tmp_path / "m") == [(1, 2), (2, 5), (3, 8)]


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.long)])
@pytest.mark.parametrize("start", ["scratch", "pretrained", "new head"])
def test_every_way_to_start_goes_on_as_if_it_had_not_stopped(tmp_path: Path, start: str, processes: int) -> None:
    """Also where the parameter groups of a new head come from a checkpoint that only the first process had."""
    two, three = images(tmp_path / "2", ("ant", "bee")), images(tmp_path / "3", ("ant", "bee", "cat"))
    argv = [*SMALL, "--data", three, "--epochs", 2, "--lr_multiplier", 10]
    if start != "scratch":
        parent = two if start == "new head" else three
        first = [*SMALL, "--data", parent, "--epochs", 1, "--max_steps", 2, "--model_dir", tmp_path / "parent"]
        assert train(first, tmp_path).code == 0
        argv += ["--pretrained", tmp_path / "parent" / "model_best.pth.tar"]
    results = []
    for name, stops in (("whole", ()), ("broken", (3, None))):
        folder = tmp_path / name
        for stop in stops or (None,):
            extra = ["--max_steps", stop] if stop else []
            resume = ["--resume", "auto"] if name == "broken" and stop is None else []
            command = [*argv, "--model_dir", folder, *extra, *resume]
            if processes == 1:
                done = train(command, tmp_path)
                assert done.code == 0, done.stderr
            else:
                launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "train_split.py"]
                finished = subprocess.run(
                    [sys.executable, *launcher, *map(str, command)],
                    cwd=ROOT,
                    capture_output=True,
                    text=True,
                    timeout=200,
                )
                assert finished.returncode == 0, finished.stderr
        results.append(json.loads((folder / "results.json").read_text()))
    assert results[0]["state_sha256"] == results[1]["state_sha256"]
    saved = checkpoint(tmp_path / "broken" / "checkpoint_2.pth.tar")
    assert len(saved["optimizer"]["param_groups"]) == (4 if start == "new head" else 2)
    assert bool(saved["new_heads"]) == (start == "new head")


@pytest.mark.slow
def test_a_run_from_a_librarys_weights_goes_on_as_if_it_had_not_stopped(tmp_path: Path) -> None:
    data = images(tmp_path / "data", ("ant", "bee", "cat"))
    argv = [*SMALL, "--data", data, "--arch", "torchvision/mobilenet_v3_small", "--split_factor", 1, "--epochs", 2]
    argv += ["--lr_multiplier", 10, "--pretrained"]
    whole = train([*argv, "--model_dir", tmp_path / "whole"], tmp_path, before=library_weights_at_hand)
    assert whole.code == 0, whole.stderr
    broken = [*argv, "--model_dir", tmp_path / "broken"]
    assert train([*broken, "--max_steps", 3], tmp_path, before=library_weights_at_hand).code == 0
    resumed = train([*broken, "--resume", "auto"], tmp_path)  # needs nobody's weights
    assert resumed.code == 0, resumed.stderr
    assert resumed.result["state_sha256"] == whole.result["state_sha256"]
    assert checkpoint(tmp_path / "broken" / "checkpoint_2.pth.tar")["new_heads"] == ["network.models.0.classifier.3."]


@pytest.mark.slow
def test_a_finished_run_without_its_best_weights_says_so(run: Path) -> None:
    assert go_on(run, epochs=2).code == 0
    (run / BEST).unlink()
    again = go_on(run, epochs=2)
    assert again.code == 0
    assert f"{BEST} is not there any more" in again.stderr

"""What goes wrong while a run goes on: a full disk, a folder that cannot be written, images that cannot be read."""

import functools
import json
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from record import checkpoint as ckpt
from tests.kills import no_space_from_call, small_files_only
from tests.runs import TINY, Run, train, without_times


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["warn", "stop"])
def test_a_full_disk_keeps_the_checkpoint_before(policy: str, tmp_path: Path) -> None:
    folder = tmp_path / "m"
    argv = [*TINY, "--epochs", 2, "--seed", 1, "--model_dir", folder, "--on_save_error", policy]
    # an epoch writes the best checkpoint and its own: the third write is the second epoch's
    run = train(argv, tmp_path, before=functools.partial(no_space_from_call, 3))
    assert run.code == 1, run.stderr
    assert "No space left on device" in run.stderr
    last = run.stderr.strip().splitlines()[-1]
    assert "checkpoint_1.pth.tar is the newest checkpoint on the disk, model_best.pth.tar is that of epoch 1" in last
    if policy == "warn":  # it ran to its end, where 'stop' does not come to
        assert "trained to the end, but model_best.pth.tar and checkpoint_2.pth.tar could not be written" in last
        results = json.loads((folder / "results.json").read_text())
        assert results == run.result
        assert (results["best_epoch"], results["best_saved_epoch"]) == (2, 1)
    assert "Traceback" not in run.stderr
    assert [path.name for path in ckpt.list_checkpoints(folder)] == ["checkpoint_1.pth.tar"]
    assert ckpt.load_checkpoint(folder / "checkpoint_1.pth.tar")["epoch"] == 1
    assert not list(folder.glob("*.partial"))
    again = train([*argv, "--resume", "auto"], tmp_path)
    assert again.code == 0
    assert (again.result["best_epoch"], again.result["best_saved_epoch"]) == (2, 2)
    whole = train([*TINY, "--epochs", 2, "--seed", 1, "--model_dir", tmp_path / "w"], tmp_path)
    assert again.result["state_sha256"] == whole.result["state_sha256"]


def test_a_model_dir_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    run = train([*TINY, "--model_dir", tmp_path / "file" / "m"], tmp_path)
    assert run.code == 2
    assert "--model_dir" in run.stderr
    assert "Traceback" not in run.stderr


@pytest.fixture
def folder_with_a_bad_image(tmp_path: Path) -> Path:
    data = tmp_path / "data"
    for split in ("train", "val"):
        for name in ("a", "b"):
            (data / split / name).mkdir(parents=True)
            for i in range(8):
                pixels = np.full((70, 70, 3), 40 + 100 * (name == "b"), dtype=np.uint8)
                Image.fromarray(pixels).save(data / split / name / f"{i}.png")
    (data / "train" / "a" / "3.png").write_bytes(b"not a picture")
    return data


# images of 70 pixels are decoded while the run goes on, those of 40 when it starts
@pytest.mark.parametrize(("workers", "side"), [(0, 70), (1, 70), (0, 40)])
def test_bad_images_fail_or_are_listed(folder_with_a_bad_image: Path, workers: int, side: int, tmp_path: Path) -> None:
    for path in folder_with_a_bad_image.rglob("[!3].png"):
        Image.open(path).resize((side, side)).save(path)
    argv: list[Any] = ["--dataset", "folder", "--data", folder_with_a_bad_image, "--arch", "resnet20"]
    argv += ["--crop_size", 32, "--epochs", 1, "--batch_size", 8, "--workers", workers, "--no_cuda"]
    failed = train([*argv, "--model_dir", tmp_path / "f"], tmp_path)
    assert failed.code == 1, failed.stderr
    last = failed.stderr.strip().splitlines()[-1]
    assert "3.png" in last
    assert "--on_bad_image skip" in last
    assert "Traceback" not in failed.stderr
    skipped = train([*argv, "--model_dir", tmp_path / "s", "--on_bad_image", "skip"], tmp_path)
    assert skipped.code == 0, skipped.stderr
    assert "3.png" in (tmp_path / "s" / "bad_images.txt").read_text()


@pytest.mark.slow
def test_a_full_disk_under_every_file(tmp_path: Path) -> None:
    argv = [*TINY, "--epochs", 2, "--save_steps", 5, "--print_freq", 5, "--seed", 1]
    whole = train([*argv, "--model_dir", tmp_path / "w"], tmp_path)
    room = 40_000  # bytes a file may have: enough for all but checkpoints and the picture
    run = train([*argv, "--model_dir", tmp_path / "m"], tmp_path, before=functools.partial(small_files_only, room))
    assert run.code == 1, run.stderr
    assert "no checkpoint is on the disk, model_best.pth.tar is missing." in run.stderr.strip().splitlines()[-1]
    assert run.result["best_saved_epoch"] is None
    assert run.result["state_sha256"] == whole.result["state_sha256"]
    assert "checkpoint_1.pth.tar: could not be written: File too large" in run.stderr
    assert "curves.png: could not be written: File too large" in run.stderr
    assert "Traceback" not in run.stderr
    assert without_times(tmp_path / "m" / "metrics.jsonl") == without_times(tmp_path / "w" / "metrics.jsonl")
    assert not ckpt.list_checkpoints(tmp_path / "m")
    assert not list((tmp_path / "m").glob("*.partial"))

    none = train([*argv, "--model_dir", tmp_path / "n"], tmp_path, before=functools.partial(small_files_only, 1000))
    assert none.code == 1
    assert none.stderr.strip().splitlines()[-1].endswith("hparams_train.json: could not be written: File too large.")
    assert "Traceback" not in none.stderr


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="looks for processes in /proc")
def test_decoding_workers_end_with_a_killed_run(folder_with_a_bad_image: Path, tmp_path: Path) -> None:
    argv: list[Any] = ["--dataset", "folder", "--data", folder_with_a_bad_image, "--arch", "resnet20", "--workers", 2]
    argv += ["--crop_size", 16, "--epochs", 99, "--batch_size", 8, "--on_bad_image", "skip", "--no_cuda"]
    run = Run([*argv, "--model_dir", tmp_path / "m"], tmp_path / "streams")
    while "evaluated" not in run.text():
        time.sleep(0.05)
        assert run.process.is_alive(), run.text()
    assert run.process.pid is not None
    family = descendants(run.process.pid)
    assert len(family) >= 5  # a server and four workers at the least
    run.signal(signal.SIGKILL)
    run.wait()
    killed = time.monotonic()
    while left := [number for number in family if is_running(number)]:
        time.sleep(0.1)
        assert time.monotonic() - killed < 90, f"still there: {left}"


def descendants(number: int) -> list[int]:
    children = [int(child) for child in Path(f"/proc/{number}/task/{number}/children").read_text().split()]
    return children + [other for child in children for other in descendants(child)]


def is_running(number: int) -> bool:
    try:
        return Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False

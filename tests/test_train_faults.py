"""What goes wrong while a run goes on: a full disk, a folder that cannot be written, images that cannot be read."""

import functools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from record import checkpoint as ckpt
from record.run_folder import alone_in, holders
from tests.kills import (
    at_call,
    at_group_call,
    both,
    cpu_out_of_memory,
    do_at_call,
    gpu_out_of_memory,
    no_space_from_call,
    signalled_and_starved,
    small_files_only,
)
from tests.runs import ROOT, TINY, Run, train, without_times
from tests.test_train_distributed import start_together


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
    while "(best " not in run.text():
        time.sleep(0.05)
        assert run.process.is_alive(), run.text()
    assert run.process.pid is not None
    family = descendants(run.process.pid)
    assert len(family) >= 5  # a server and four workers at the least
    assert holders(tmp_path / "m") == [str(run.process.pid)]  # what keeps others out ends with the run
    run.signal(signal.SIGKILL)
    run.wait()
    killed = time.monotonic()
    while left := [number for number in family if is_running(number)]:
        time.sleep(0.1)
        assert time.monotonic() - killed < 90, f"still there: {left}"


def hurry() -> None:
    """Nobody who is at work in a run directory is waited for."""
    from record import run_folder

    run_folder.GRACE = 0.0


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_run_directory_with_a_training_at_work_is_refused_in_one_line(world_size: int, tmp_path: Path) -> None:
    folder = tmp_path / "m"
    folder.mkdir()
    argv = [*TINY, "--max_steps", 1, "--resume", "auto", "--model_dir", folder]
    with alone_in(folder, str):
        runs = start_together(argv, tmp_path / "streams", world_size, before=dict.fromkeys(range(world_size), hurry))
        for run in runs:
            ended = run.wait(60)
            assert ended.code == 2, ended.stderr
            line = f"train_split.py: --model_dir {folder}: another training is at work in it (process {os.getpid()}). "
            assert ended.stderr.splitlines()[-1].startswith(line)
            assert "Traceback" not in ended.stderr
        assert list(folder.iterdir()) == []


def descendants(number: int) -> list[int]:
    children = [int(child) for child in Path(f"/proc/{number}/task/{number}/children").read_text().split()]
    return children + [other for child in children for other in descendants(child)]


def is_running(number: int) -> bool:
    try:
        return Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_signal_on_a_full_disk_does_not_claim_a_checkpoint(tmp_path: Path) -> None:
    argv = [*TINY, "--epochs", 2, "--seed", 1, "--model_dir", tmp_path / "m"]
    full, signalled = functools.partial(no_space_from_call, 3), at_call("training step", 16, signal.SIGTERM)
    run = train(argv, tmp_path, before=both(full, signalled))
    assert run.code == 1
    last = run.stderr.strip().splitlines()[-1]
    assert last.startswith(
        "train_split.py: stopped, but checkpoint_1_16.pth.tar could not be written: checkpoint_1.pth.tar"
    )
    assert "Traceback" not in run.stderr


@pytest.mark.parametrize(("group", "wait", "said"), [(1, 1, "a checkpoint was saved"), (16, 2, "no images came")])
def test_a_signal_is_obeyed_although_no_images_come(
    folder_with_a_bad_image: Path, group: int, wait: int, said: str, tmp_path: Path
) -> None:
    (folder_with_a_bad_image / "train" / "a" / "3.png").unlink()
    argv: list[Any] = ["--dataset", "folder", "--data", folder_with_a_bad_image, "--arch", "resnet20", "--workers", 1]
    argv += ["--crop_size", 16, "--epochs", 1, "--batch_size", 1, "--iters_to_accumulate", group, "--no_cuda"]
    hook = signalled_and_starved(wait, signal.SIGTERM, folder_with_a_bad_image)
    run = Run([*argv, "--model_dir", tmp_path / "m"], tmp_path / "s", before=hook, own_group=True)
    stopped = run.wait(90)
    assert stopped.code == 0, stopped.stderr
    assert said in stopped.stderr.strip().splitlines()[-1]
    assert bool(ckpt.list_checkpoints(tmp_path / "m")) == (group == 1)
    assert "Traceback" not in stopped.stderr


@pytest.mark.parametrize("action", [gpu_out_of_memory, cpu_out_of_memory])
def test_memory_that_does_not_suffice_is_one_line(action: Any, tmp_path: Path) -> None:
    argv = [*TINY, "--epochs", 2, "--seed", 1, "--model_dir", tmp_path / "m"]
    run = train(argv, tmp_path, before=do_at_call("training step", 16, action))
    assert run.code == 1
    last = run.stderr.strip().splitlines()[-1]
    assert last.startswith("train_split.py: out of memory")
    for words in ("GiB more did not fit", "--batch_size", "--iters_to_accumulate", "--execution loop"):
        assert words in last
    assert "Traceback" not in run.stderr
    assert [path.name for path in ckpt.list_checkpoints(tmp_path / "m")] == ["checkpoint_1.pth.tar"]

    best = ["--resume", tmp_path / "m" / "model_best.pth.tar", "--no_cuda"]
    for more in ([], ["--predict", image_folder(tmp_path)]):
        hook = do_at_call("networks", 1, action)
        tested = Run([*best, *more], tmp_path / "eval", module="eval", before=hook).wait()
        assert tested.code == 1
        last = tested.stderr.strip().splitlines()[-1]
        assert last.startswith("eval.py: out of memory")
        assert "--eval_batch_size" in last
        assert "Traceback" not in tested.stderr


def image_folder(folder: Path) -> Path:
    (folder / "photos").mkdir(exist_ok=True)
    for i in range(3):
        Image.linear_gradient("L").convert("RGB").resize((70, 70)).save(folder / "photos" / f"{i}.png")
    return folder / "photos"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_evaluation_that_is_signalled_ends_in_one_line(
    number: int, folder_with_a_bad_image: Path, tmp_path: Path
) -> None:
    data: list[Any] = ["--dataset", "folder", "--data", folder_with_a_bad_image, "--workers", 1, "--no_cuda"]
    argv = [*data, "--arch", "resnet20", "--crop_size", 16, "--max_steps", 1, "--batch_size", 4]
    trained = train([*argv, "--on_bad_image", "skip", "--model_dir", tmp_path / "m"], tmp_path)
    assert trained.code == 0, trained.stderr
    best = ["--resume", tmp_path / "m" / "model_best.pth.tar", *data]
    for more in ([], ["--predict", image_folder(tmp_path)]):
        hook = at_group_call("networks", 1, number)
        run = Run([*best, *more], tmp_path / "eval", module="eval", before=hook, own_group=True)
        tested = run.wait(60)
        assert tested.code == 128 + number, tested.stderr
        last = tested.stderr.strip().splitlines()[-1]
        assert last == f"eval.py: interrupted by {signal.Signals(number).name}; no results were written."
        assert "Traceback" not in tested.stderr
        assert not (tmp_path / "m" / "eval" / "results.json").exists()


def test_a_signal_before_training_is_one_line(tmp_path: Path) -> None:
    argv = [*TINY, "--epochs", 2, "--model_dir", tmp_path / "m"]
    for number, code in ((signal.SIGINT, 130), (signal.SIGTERM, 0)):
        run = train(argv, tmp_path, before=at_group_call("networks", 1, number), own_group=True)
        assert run.code == code
        last = run.stderr.strip().splitlines()[-1]
        assert last == "train_split.py: stopped; training was not under way. Go on with --resume auto."
        assert "Traceback" not in run.stderr


AT_TORCH = """
import os, sys

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            sys.meta_path.remove(self)
            os.kill(os.getpid(), {number})

sys.meta_path.insert(0, Finder())
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 0)])
def test_a_signal_while_the_script_imports_torch_is_one_line(number: int, code: int, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(AT_TORCH.format(number=int(number)))
    argv = [sys.executable, ROOT / "train_split.py", *TINY, "--model_dir", tmp_path / "m"]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    run = subprocess.run([*map(str, argv)], env=environment, capture_output=True, text=True, timeout=100, check=False)
    assert run.stderr == "train_split.py: stopped; training was not under way. Go on with --resume auto.\n"
    assert (run.returncode, run.stdout) == (code, "")
    assert not (tmp_path / "m").exists()


def test_a_small_shared_memory_is_one_line_at_once(folder_with_a_bad_image: Path, tmp_path: Path) -> None:
    mount = "mount -t tmpfs -o size=128k tmpfs /dev/shm"
    if subprocess.run(["unshare", "-m", "sh", "-c", mount], capture_output=True).returncode:
        pytest.skip("mounts are not allowed here")
    argv: list[Any] = ["--dataset", "folder", "--data", folder_with_a_bad_image, "--arch", "resnet20", "--workers", 2]
    argv += [
        "--crop_size",
        64,
        "--batch_size",
        15,
        "--on_bad_image",
        "skip",
        "--no_cuda",
        "--model_dir",
        tmp_path / "m",
    ]
    command = ["unshare", "-m", "sh", "-c", f'{mount}; exec "$@"', "sh", sys.executable, "train_split.py", *argv]
    run = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert run.returncode == 1, run.stderr
    last = run.stderr.strip().splitlines()[-1]
    assert "--workers or a larger /dev/shm" in last
    assert "Traceback" not in run.stderr

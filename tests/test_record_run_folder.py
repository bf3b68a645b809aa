"""When a run directory may be trained into, and what is gone on from."""

import errno
import subprocess
import sys
from pathlib import Path

import pytest

from record import checkpoint as ckpt
from record import run_folder
from record.run_folder import alone_in, checkpoint_of, make_folder, open_run, read_results
from utils.errors import UserError


def test_a_new_folder_starts_afresh(tmp_path: Path) -> None:
    assert open_run(tmp_path / "new", None) is None
    assert open_run(tmp_path / "new", "auto") is None
    make_folder(tmp_path / "a" / "b")
    assert open_run(tmp_path / "a" / "b", "auto") is None


def test_a_folder_with_something_else_in_it_may_be_used(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    assert open_run(tmp_path, None) is None


@pytest.mark.parametrize("name", ["checkpoint_1.pth.tar", "metrics.jsonl"])
def test_a_folder_with_a_run_needs_resume(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("x")
    with pytest.raises(UserError, match=r"already holds a run.*--resume auto"):
        open_run(tmp_path, None)


def test_resume_takes_a_path_or_the_newest(tmp_path: Path) -> None:
    for epoch in (1, 2):
        ckpt.save_checkpoint({"epoch": epoch, "state_dict": {}}, tmp_path / f"checkpoint_{epoch}.pth.tar")
    newest = open_run(tmp_path, "auto")
    assert newest is not None
    assert newest.state["epoch"] == 2
    chosen = open_run(tmp_path / "elsewhere", str(tmp_path / "checkpoint_1.pth.tar"))
    assert chosen is not None
    assert chosen.state["epoch"] == 1


def test_results_that_cannot_be_read_are_none(tmp_path: Path) -> None:
    assert read_results(tmp_path) is None
    (tmp_path / "results.json").write_text('{"steps": 3')
    assert read_results(tmp_path) is None
    (tmp_path / "results.json").write_text('{"steps": 3}')
    assert read_results(tmp_path) == {"steps": 3}


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"--model_dir .*cannot be made"):
        make_folder(tmp_path / "file" / "x")


def test_a_run_directory_means_its_best_checkpoint(tmp_path: Path) -> None:
    for name in ("checkpoint_1.pth.tar", "checkpoint_10.pth.tar", "checkpoint_9.pth.tar"):
        (tmp_path / name).touch()
    assert checkpoint_of(tmp_path, or_newest=True).name == "checkpoint_10.pth.tar"
    with pytest.raises(UserError, match=r"no model_best.pth.tar yet.* such as .*checkpoint_10.pth.tar\.$"):
        checkpoint_of(tmp_path)
    (tmp_path / "model_best.pth.tar").touch()
    assert checkpoint_of(tmp_path).name == checkpoint_of(tmp_path, or_newest=True).name == "model_best.pth.tar"
    assert checkpoint_of("some/file.pth.tar") == Path("some/file.pth.tar")


def test_a_folder_of_the_hubs_layout_is_its_safetensors(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    assert checkpoint_of(tmp_path).name == "model.safetensors"


def test_directories_without_a_best_checkpoint_say_what_they_are(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    for name in ("a", "b"):
        (runs / name).mkdir(parents=True)
        (runs / name / "model_best.pth.tar").touch()
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "hparams_train.json").touch()
    (tmp_path / "empty").mkdir()
    for path, message in (
        (runs, r"runs: holds no run: expected .*; it holds the runs a, b\.$"),
        (tmp_path / "begun", "its run has written no checkpoint yet"),
        (tmp_path / "empty", r"empty: holds no run: expected a directory of train_split.py, or a checkpoint\.$"),
        (tmp_path / "a.onnx", "is an exported file, and commands take the checkpoint"),
    ):
        with pytest.raises(UserError, match=message) as error:
            checkpoint_of(path)
        assert "\n" not in str(error.value)


HOLDING = """
import fcntl, os, sys, time
fcntl.flock(os.open(sys.argv[1], os.O_RDONLY), fcntl.LOCK_EX)
print("held", flush=True)
time.sleep(600)
"""


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="processes are named by /proc")
def test_a_folder_is_held_until_its_holder_is_dead(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "m")
    with subprocess.Popen([sys.executable, "-c", HOLDING, tmp_path / "m"], stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        try:
            assert other.stdout.readline() == b"held\n"
            for folder in (tmp_path / "m", tmp_path / "link"):
                with pytest.raises(UserError, match=rf"^process {other.pid}$"), alone_in(folder, str):
                    pass
        finally:
            other.kill()
    with alone_in(tmp_path / "link", str):
        assert list((tmp_path / "m").iterdir()) == []


def test_what_a_holder_has_started_does_not_hold(tmp_path: Path) -> None:
    with alone_in(tmp_path, str):
        started = subprocess.Popen(["sleep", "600"], close_fds=False)
        with pytest.raises(UserError), alone_in(tmp_path, str):
            pass
    try:
        with alone_in(tmp_path, str):
            assert started.poll() is None
    finally:
        started.kill()
        started.wait()


def test_a_folder_that_cannot_be_locked_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOTSUP, "not here")

    monkeypatch.setattr(run_folder.fcntl, "flock", refuse)
    with alone_in(tmp_path, str), alone_in(tmp_path / "nowhere", str) as descriptor:
        assert descriptor is None
    assert caplog.messages == [
        f"{tmp_path} cannot be locked: not here. Nothing keeps others out.",
        f"{tmp_path / 'nowhere'} cannot be locked: No such file or directory. Nothing keeps others out.",
    ]

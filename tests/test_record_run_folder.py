"""When a run directory may be trained into, and what is gone on from."""

from pathlib import Path

import pytest

from record import checkpoint as ckpt
from record.run_folder import make_folder, open_run, read_results
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

"""Checkpoints: whole or not there, never running code, found again after damage."""

import ast
import os
import pickle
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from model.restore import plain_keys, published_keys
from record import checkpoint as ckpt
from record.logger import LineFile
from tests.runs import in_fork
from tests.system_calls import killed_at_call
from utils.errors import RunError, UserError, WriteError


def a_state(value: float = 1.0) -> dict[str, Any]:
    return {"epoch": 3, "state_dict": {"module.models.0.w": torch.full((4, 5), value)}, "arch": "resnet20"}


def test_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint_3.pth.tar"
    ckpt.save_checkpoint(a_state(), path)
    loaded = ckpt.load_checkpoint(path)
    assert loaded["epoch"] == 3
    assert torch.equal(loaded["state_dict"]["module.models.0.w"], a_state()["state_dict"]["module.models.0.w"])
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_keys_are_published_and_plain_again() -> None:
    state = {"models.0.w": torch.ones(2)}
    assert list(published_keys(state)) == ["module.models.0.w"]
    assert list(plain_keys(published_keys(state))) == ["models.0.w"]
    assert list(plain_keys(state)) == ["models.0.w"]


class Marker:
    """Unpickling this would create a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mknod, (str(self.path),))


@pytest.mark.parametrize("writer", ["torch", "pickle"])
def test_a_checkpoint_never_runs_code(tmp_path: Path, writer: str) -> None:
    path, marker = tmp_path / "evil.pth.tar", tmp_path / "marker"
    content = {"state_dict": {}, "epoch": Marker(marker)}
    if writer == "torch":
        torch.save(content, path)
    else:
        path.write_bytes(pickle.dumps(content))
    with pytest.raises(UserError, match=r"--resume .*evil.pth.tar: "):
        ckpt.load_checkpoint(path)
    assert not marker.exists()


@pytest.mark.parametrize("size", [0, 1, 30, 200, 700])
def test_truncated_files_are_named_in_one_line(tmp_path: Path, size: int) -> None:
    path = tmp_path / "checkpoint_1.pth.tar"
    ckpt.save_checkpoint(a_state(), path)
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(UserError) as caught:
        ckpt.load_checkpoint(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"hello", b"\x89PNG\r\n\x1a\n" + b"x" * 100, b"PK\x03\x04" + b"\0" * 60])
def test_foreign_files(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.raises(UserError, match="file: "):
        ckpt.load_checkpoint(path)


def test_not_a_dict_and_not_there(tmp_path: Path) -> None:
    torch.save(torch.ones(3), tmp_path / "tensor")
    with pytest.raises(UserError, match="expected a dict"):
        ckpt.load_checkpoint(tmp_path / "tensor")
    with pytest.raises(UserError, match=r"--pretrained .*does not exist"):
        ckpt.load_checkpoint(tmp_path / "nothing", "--pretrained")
    with pytest.raises(UserError, match="is a folder"):
        ckpt.load_checkpoint(tmp_path)


def test_newest_is_found_in_time_order(tmp_path: Path) -> None:
    names = ["checkpoint_2.pth.tar", "checkpoint_10.pth.tar", "checkpoint_9_4000.pth.tar", "checkpoint_10_4100.pth.tar"]
    for name in [*names, "model_best.pth.tar", "checkpoint_x.pth.tar"]:
        (tmp_path / name).write_bytes(b"")
    assert [p.name for p in ckpt.list_checkpoints(tmp_path)] == [names[3], names[1], names[2], names[0]]


def test_damaged_newest_falls_back(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for epoch in (1, 2, 3):
        ckpt.save_checkpoint(a_state(epoch), tmp_path / f"checkpoint_{epoch}.pth.tar")
    (tmp_path / "checkpoint_3.pth.tar").write_bytes(b"PK")
    found = ckpt.load_newest(tmp_path)
    assert found is not None
    assert found[1].name == "checkpoint_2.pth.tar"
    assert "checkpoint_3.pth.tar" in caplog.text
    for epoch in (1, 2):
        (tmp_path / f"checkpoint_{epoch}.pth.tar").write_bytes(b"")
    with pytest.raises(UserError, match="none of the 3 checkpoints"):
        ckpt.load_newest(tmp_path)


def test_no_checkpoint_is_no_error(tmp_path: Path) -> None:
    assert ckpt.load_newest(tmp_path) is None


def test_failed_save_keeps_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "checkpoint_1.pth.tar"
    ckpt.save_checkpoint(a_state(1.0), path)

    def no_space(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(WriteError, match=r"checkpoint_1.pth.tar: .*No space left"):
        ckpt.save_checkpoint(a_state(2.0), path)
    monkeypatch.undo()
    assert ckpt.load_checkpoint(path)["state_dict"]["module.models.0.w"][0, 0] == 1.0
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_prune_keeps_the_newest_and_removes_leftovers(tmp_path: Path) -> None:
    for epoch in range(6):
        (tmp_path / f"checkpoint_{epoch}.pth.tar").write_bytes(b"")
    (tmp_path / "model_best.pth.tar").write_bytes(b"")
    (tmp_path / "checkpoint_6.pth.tar.partial").write_bytes(b"half")
    ckpt.prune_checkpoints(tmp_path, 2)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "checkpoint_4.pth.tar",
        "checkpoint_5.pth.tar",
        "model_best.pth.tar",
    ]


def test_hash_sees_names_shapes_types_and_values() -> None:
    base = {"a": torch.arange(6.0), "b": torch.tensor(3)}
    reordered = {"b": torch.tensor(3), "a": torch.arange(6.0)}
    assert ckpt.state_sha256(base) == ckpt.state_sha256(reordered)
    for other in (
        {**base, "a": torch.arange(6.0).view(2, 3)},
        {**base, "a": torch.arange(6.0).double()},
        {**base, "a": torch.arange(6.0) + 1e-6},
        {"c": base["a"], "b": base["b"]},
    ):
        assert ckpt.state_sha256(other) != ckpt.state_sha256(base)
    noncontiguous = {"a": torch.arange(12.0)[::2] / 2, "b": torch.tensor(3)}
    assert ckpt.state_sha256(noncontiguous) == ckpt.state_sha256(base)
    assert len(ckpt.state_sha256({"x": torch.ones(2, dtype=torch.bfloat16)})) == 64


def test_too_little_memory_is_no_damage_and_nothing_older_is_taken(tmp_path, monkeypatch):
    for epoch in (1, 2):
        ckpt.save_checkpoint(a_state(1.0) | {"epoch": epoch}, tmp_path / f"checkpoint_{epoch}.pth.tar")

    def full(*args, **kwargs):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 16 bytes.")

    monkeypatch.setattr(torch, "load", full)
    with pytest.raises(RunError, match=r"checkpoint_2.*out of memory.*more memory"):
        ckpt.load_newest(tmp_path)


LINE = "x" * 20_000  # more than is written at once


def save_an_epoch(folder: Path) -> None:
    """What a run writes at the end of its epoch 2, in small."""
    log = LineFile(folder / "metrics.jsonl")
    log.rewind(1)
    log.write(LINE)
    log.close()
    ckpt.save_checkpoint(a_state(2.0) | {"epoch": 2}, folder / "checkpoint_2.pth.tar")
    ckpt.prune_checkpoints(folder, keep=1)
    ckpt.write_file(folder / "results.json", "new" * 1000)


def found_after_kill(folder: Path) -> list[int]:
    """What a killed `save_an_epoch` left: [lines of the log, epoch of the newest checkpoint, age of the results]."""
    for path in ckpt.list_checkpoints(folder):  # none of them may be damaged, not even one that would be stepped over
        assert ckpt.load_checkpoint(path)["epoch"] == ckpt.run_position(path)[0]  # type: ignore[index]
    content, path = ckpt.load_newest(folder)  # type: ignore[misc]
    assert path == ckpt.list_checkpoints(folder)[0]
    assert content["state_dict"]["module.models.0.w"].eq(content["epoch"]).all()
    results = (folder / "results.json").read_text()
    assert results in ("old", "new" * 1000)
    log = LineFile(folder / "metrics.jsonl")
    log.rewind(2)
    lines = log.lines
    log.rewind(1)
    assert log.path.read_text() == "first\n"
    return [lines, int(content["epoch"]), int(results != "old")]


def killed_everywhere(template: Path, folder: Path) -> list[list[int]]:
    """`found_after_kill` for every system call of `save_an_epoch`, in order; the last one was not killed."""
    found, killed = [], True
    while killed:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(template, folder)
        killed = killed_at_call(lambda: save_an_epoch(folder), len(found) + 1)
        found.append(found_after_kill(folder))
        save_an_epoch(folder)  # the resumed run: it must not trip over what was left
        names = sorted(path.name for path in folder.iterdir())
        assert names == ["checkpoint_2.pth.tar", "metrics.jsonl", "results.json"]
    return found


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="ptrace")
def test_killed_at_any_system_call_the_folder_is_whole(tmp_path: Path) -> None:
    template = tmp_path / "template"
    template.mkdir()
    ckpt.save_checkpoint(a_state(1.0) | {"epoch": 1}, template / "checkpoint_1.pth.tar")
    (template / "metrics.jsonl").write_text("first\n")
    (template / "results.json").write_text("old")
    found = in_fork(killed_everywhere, template, tmp_path / "run")
    assert len(found) > 40
    assert (found[0], found[-1]) == ([1, 1, 0], [2, 2, 1])
    assert found == sorted(found)  # never back, and each thing after the other
    assert [2, 1, 0] in found
    assert [2, 2, 0] in found


def keys_read(path: Path, variable: str) -> set[str]:
    """Keys that a file reads of a mapping: `variable["key"]`, `variable.get("key")`, `_entry(variable, "key", ...)`."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        of, key = None, None
        if isinstance(node, ast.Subscript):
            of, key = node.value, node.slice
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "get":
            of, key = node.func.value, node.args[0]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "_entry":
            of, key = node.args[0], node.args[1]
        if isinstance(of, ast.Name) and of.id == variable and isinstance(key, ast.Constant):
            found.add(key.value)
    return found


@pytest.mark.parametrize(
    ("file", "variable", "others"),
    [("model/restore.py", "content", {"state_dict_ema", "model"}), ("evaluation/session.py", "content", set())],
)
def test_readers_know_no_other_keys_than_the_one_page_lists(file: str, variable: str, others: set[str]) -> None:
    """They read by strings, `model/` because it lies lower; `others` are those of other projects' files."""
    read = keys_read(Path(__file__).parent.parent / file, variable)
    assert read >= {"config"}
    assert read - others <= ckpt.Checkpoint.__annotations__.keys()

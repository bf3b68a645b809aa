"""Checkpoints are written while training goes on, as the run was when they were asked for."""

import logging
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from record import checkpoint as ckpt
from record.saving import Saver, snapshot
from utils.errors import RunError, WriteError


class Disk:
    """A disk that takes nothing until it is told to."""

    def __init__(self) -> None:
        self.free = threading.Event()
        self.full = False
        self.written: list[str] = []

    def save(self, state: Any, path: Path) -> None:
        assert self.free.wait(timeout=20)
        if self.full:
            raise WriteError(f"{path}: could not be written: No space left on device.")
        self.written.append(path.name)
        torch.save(state, path)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[Disk]:
    disk = Disk()
    monkeypatch.setattr(ckpt, "save_checkpoint", disk.save)
    yield disk
    disk.free.set()


def saver_in(folder: Path, *, stops: bool = False) -> Saver:
    return Saver(folder, keep=2, stops=stops)


def test_training_goes_on_while_a_checkpoint_is_written(disk: Disk, tmp_path: Path) -> None:
    saver, weight = saver_in(tmp_path), torch.zeros(3)
    for epoch in (1, 2):
        weight.fill_(epoch)
        saver.checkpoint(f"checkpoint_{epoch}.pth.tar", {"epoch": epoch, "state_dict": {"w": weight}, "more": [weight]})
        saver.check()  # waits for nothing
    weight.fill_(99)
    assert disk.written == []
    disk.free.set()
    saver.wait()
    assert disk.written == ["checkpoint_1.pth.tar", "checkpoint_2.pth.tar"]
    for epoch in (1, 2):
        content = ckpt.load_checkpoint(tmp_path / f"checkpoint_{epoch}.pth.tar")
        assert content["epoch"] == epoch
        assert content["state_dict"]["w"].tolist() == content["more"][0].tolist() == [epoch] * 3
    saver.close()


def test_no_more_than_two_wait_and_the_oldest_go(disk: Disk, tmp_path: Path) -> None:
    saver = saver_in(tmp_path)
    for epoch in (1, 2):
        saver.checkpoint(f"checkpoint_{epoch}.pth.tar", {})
    third = threading.Thread(target=saver.checkpoint, args=("checkpoint_3.pth.tar", {}))
    third.start()
    third.join(timeout=0.2)
    assert third.is_alive()
    disk.free.set()
    third.join()
    saver.wait()
    assert [path.name for path in ckpt.list_checkpoints(tmp_path)] == ["checkpoint_3.pth.tar", "checkpoint_2.pth.tar"]
    saver.close()


def test_a_small_file_is_written_while_old_checkpoints_go(
    disk: Disk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saver, replace = saver_in(tmp_path, stops=True), os.replace

    def late(*names: Any) -> None:
        disk.free.set()
        saver.wait()
        replace(*names)

    saver.checkpoint("checkpoint_1.pth.tar", {})
    monkeypatch.setattr(os, "replace", late)
    saver.file("found.yaml", "whole")
    assert (tmp_path / "found.yaml").read_text() == "whole"
    assert disk.written == ["checkpoint_1.pth.tar"]
    saver.close()


def test_a_full_disk_ends_the_run_at_its_next_look_or_is_a_warning(
    disk: Disk, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    disk.full = True
    saver = saver_in(tmp_path, stops=True)
    saver.checkpoint("checkpoint_1.pth.tar", {})
    saver.check()
    disk.free.set()
    with pytest.raises(RunError, match=r"checkpoint_1.pth.tar: .*No space.*stopped by --on_save_error stop"):
        saver.wait()
    saver.wait()  # said once
    saver.close()

    saver = saver_in(tmp_path)
    saver.checkpoint("checkpoint_1.pth.tar", {})
    saver.wait()
    assert "checkpoint_1.pth.tar: could not be written: No space left on device. What was" in caplog.text
    saver.close()


def test_a_run_that_ends_early_still_writes_its_last_checkpoint(
    disk: Disk, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    saver = saver_in(tmp_path, stops=True)
    saver.checkpoint("checkpoint_1.pth.tar", {})
    threading.Timer(0.1, disk.free.set).start()
    saver.close()
    assert disk.written == ["checkpoint_1.pth.tar"]

    disk.full = True
    saver = saver_in(tmp_path, stops=True)
    saver.checkpoint("checkpoint_2.pth.tar", {})
    with caplog.at_level(logging.WARNING):
        saver.close()
    assert "checkpoint_2.pth.tar: could not be written" in caplog.text


def test_a_snapshot_keeps_form_and_identity_and_nothing_of_the_original() -> None:
    whole = torch.arange(24.0).view(2, 3, 2, 2).to(memory_format=torch.channels_last)
    weight = torch.nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
    state = {"whole": whole, "part": whole[1], "tied": [weight, weight], "plain": (1, "a", None, {"x": 2.5})}
    copied = snapshot(state)
    assert copied["plain"] == (1, "a", None, {"x": 2.5})
    assert copied["tied"][0] is copied["tied"][1]
    assert not copied["tied"][0].requires_grad
    assert copied["tied"][0].dtype == torch.bfloat16
    assert copied["whole"].is_contiguous(memory_format=torch.channels_last)
    assert copied["part"].untyped_storage().nbytes() == 12 * 4
    whole.zero_()
    assert copied["whole"].sum() == 276
    assert copied["part"].sum() == sum(range(12, 24))

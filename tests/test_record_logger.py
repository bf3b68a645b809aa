"""Logs: every line once, also after a resumed run; TensorBoard's files read back."""

import csv
import errno
import io
import json
import logging
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from record.logger import LineFile, RunLog, set_up_text_log
from utils.plain_json import plain_json


def test_plain_json_replaces_what_json_cannot_say() -> None:
    value = {"a": float("nan"), 1: (1.0, float("inf")), "b": {"c": [float("-inf"), 2]}}
    assert json.dumps(plain_json(value)) == '{"a": null, "1": [1.0, null], "b": {"c": [null, 2]}}'


def test_rewind_drops_later_and_half_written_lines(tmp_path: Path) -> None:
    path = tmp_path / "log"
    log = LineFile(path, header="h")
    for i in range(5):
        log.write(f"line {i}")
    log.close()
    with path.open("a") as file:
        file.write("half")
    again = LineFile(path, header="h")
    again.rewind(3)
    again.write("new")
    again.close()
    assert path.read_text() == "h\nline 0\nline 1\nnew\n"
    assert again.lines == 4


def test_rewind_to_nothing_and_of_a_short_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "log"
    path.write_text("a\nb\nc")
    log = LineFile(path)
    log.rewind(9)
    assert (log.lines, path.read_text()) == (2, "a\nb\n")
    assert "has 2 lines and the checkpoint knows of 9" in caplog.text
    log.rewind(0)
    assert path.read_text() == ""


def test_inactive_log_writes_nothing(tmp_path: Path) -> None:
    log = RunLog(tmp_path, 2, active=False)
    log.rewind({}, epoch=0, step=0)
    log.write_metrics({"a": 1})
    log.write_summary({"epoch": 1})
    log.scalars("val", {"avg_acc1": 3.0}, 1)
    log.close()
    assert list(tmp_path.iterdir()) == []


def test_summary_has_one_header_over_resumed_runs(tmp_path: Path) -> None:
    log = RunLog(tmp_path, 2, active=True)
    log.write_summary({"epoch": 1, "ensemble_acc1": 50.0, "acc1_1": 40.0, "acc1_2": 41.123456789})
    positions = log.positions()
    log.write_summary({"epoch": 2, "ensemble_acc1": 51.0})
    log.close()
    resumed = RunLog(tmp_path, 2, active=True)
    resumed.rewind(positions, epoch=1, step=10)
    resumed.write_summary({"epoch": 2, "ensemble_acc1": 52.0})
    resumed.close()
    rows = list(csv.DictReader((tmp_path / "summary.csv").read_text().splitlines()))
    assert [(row["epoch"], row["ensemble_acc1"]) for row in rows] == [("1", "50"), ("2", "52")]
    assert rows[0]["acc1_2"] == "41.1235"


def read_board(folder: Path) -> EventAccumulator:
    board = EventAccumulator(str(folder))
    board.Reload()
    return board


def older(folder: Path) -> Path:
    """The one file of events, with a name from another second: names of the same second have no order."""
    (path,) = folder.glob("events*")
    return path.rename(folder / "events.out.tfevents.1000000000.host.1.0")


def test_tensorboard_reads_back(tmp_path: Path) -> None:
    log = RunLog(tmp_path, 2, active=True)
    log.scalars("val", {"avg_acc1": 70.0, "acc1": [60.0, 61.0], "best_acc1": 70.0}, 1)
    log.views(torch.rand(2, 4, 3, 8, 8), (0.5, 0.5, 0.5), (0.2, 0.2, 0.2), 0)
    log.hparams({"lr": 0.1, "arch": "resnet20"}, {"final/acc1": 70.0})
    log.close()
    board = read_board(tmp_path / "val")
    tags = board.Tags()
    assert {"avg_acc1", "1_acc1", "2_acc1", "best_acc1"} <= set(tags["scalars"])
    assert tags["images"] == ["views"]
    assert board.Scalars("2_acc1")[0].value == 61.0


def test_tensorboard_purges_what_a_killed_run_wrote(tmp_path: Path) -> None:
    log = RunLog(tmp_path, 1, active=True)
    for epoch in (1, 2, 3):
        log.scalars("val", {"avg_acc1": float(epoch)}, epoch)
    log.close()
    older(tmp_path / "val")
    resumed = RunLog(tmp_path, 1, active=True)
    resumed.rewind({}, epoch=2, step=20)
    resumed.scalars("val", {"avg_acc1": 9.0}, 3)
    resumed.close()
    points = [(event.step, event.value) for event in read_board(tmp_path / "val").Scalars("avg_acc1")]
    assert points == [(1, 1.0), (2, 2.0), (3, 9.0)]


class FullDisk(io.FileIO):
    """A file that takes so many bytes and no more."""

    room = 0

    def write(self, content: Any) -> int:
        """As write(2) on a disk that fills up: what fits, then an error."""
        if len(content) and not FullDisk.room:
            raise OSError(errno.ENOSPC, "No space left on device")
        part = bytes(content)[: FullDisk.room]
        FullDisk.room -= len(part)
        return super().write(part)


def test_a_line_that_does_not_fit_is_left_out_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(Path, "open", lambda path, mode, buffering: FullDisk(path, "ab"))
    log = LineFile(tmp_path / "log", header="h")
    for room, line in ((8, "first"), (3, "second"), (0, "third"), (99, "fourth")):
        FullDisk.room = room
        log.write(line)
    monkeypatch.undo()
    log.close()
    assert (tmp_path / "log").read_text() == "h\nfirst\nfourth\n"
    assert log.lines == 3
    assert caplog.text.count("No space left on device") == 2


@pytest.mark.parametrize("cut", [1, 5, 15, 30])
def test_a_half_written_record_of_tensorboard_costs_nothing_else(tmp_path: Path, cut: int) -> None:
    log = RunLog(tmp_path, 1, active=True)
    for epoch in (1, 2):
        log.scalars("val", {"avg_acc1": float(epoch)}, epoch)
    log.close()
    path = older(tmp_path / "val")
    os.truncate(path, path.stat().st_size - cut)
    resumed = RunLog(tmp_path, 1, active=True)
    resumed.rewind({}, epoch=1, step=10)
    for epoch in (2, 3):
        resumed.scalars("val", {"avg_acc1": 10.0 + epoch}, epoch)
    resumed.close()
    points = [(event.step, event.value) for event in read_board(tmp_path / "val").Scalars("avg_acc1")]
    assert points == [(1, 1.0), (2, 12.0), (3, 13.0)]


def test_a_disk_that_does_not_take_the_logs_costs_only_the_logs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    try:
        set_up_text_log(tmp_path, rank=0)
        log = RunLog(tmp_path, 1, active=True)
        log.scalars("val", {"avg_acc1": 1.0}, 1)
        monkeypatch.setattr("record.events.append_whole", full)
        monkeypatch.setattr(logging.FileHandler, "flush", full)
        for epoch in (2, 3):
            log.scalars("val", {"avg_acc1": 2.0}, epoch)
            logging.getLogger("train_split").info("epoch %d", epoch)
        log.close()
    finally:
        for handler in list(root.handlers):
            root.removeHandler(handler)
        for handler in handlers:
            root.addHandler(handler)
        root.setLevel(level)
    lines = capsys.readouterr().err.splitlines()
    assert len([line for line in lines if "No space left on device" in line]) == 2  # one a log, not one a line
    assert [line for line in lines if line.startswith("epoch")] == ["epoch 2", "epoch 3"]
    assert not any("Traceback" in line for line in lines)

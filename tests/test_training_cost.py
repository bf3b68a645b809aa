"""--dry_run: one step and one evaluation batch, what a run would cost, and nothing left behind."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import train_split
from parser_params import parse_config
from record.checkpoint import checkpoint_size, save_checkpoint
from tests.runs import TINY, in_fork
from training.cost import RunCost, nearest_folder, peak_memory
from utils.errors import UserError

COST = RunCost(
    steps=1000,
    evaluations=10,
    step_seconds=0.5,
    evaluation_seconds=10.0,
    memory_bytes=3 * 2**30,
    device="cpu",
    checkpoint_bytes=2**29,
    checkpoints=7,
    free_bytes=2**30,
)


def test_worked_numbers() -> None:
    assert (COST.seconds, COST.disk_bytes) == (600.0, 7 * 2**29)
    time, memory, disk = COST.text().splitlines()
    assert time.startswith("time: about 10 min for 1000 steps of 0.5 s and 10 evaluations of 10 s")
    assert memory.startswith("memory: 3.00 GiB of this process")
    assert disk == "disk: 3.50 GiB at most (7 checkpoints of 0.500 GiB); 1.0 GiB are free: too little"
    assert json.loads(json.dumps(COST.as_dict()))["seconds"] == 600


def test_the_size_of_a_checkpoint_is_that_of_its_file(tmp_path: Path) -> None:
    state = {"a": torch.zeros(1000, 7), "b": {"c": [1, 2], "d": torch.ones(3)}}
    save_checkpoint(state, tmp_path / "c.pth.tar")
    assert checkpoint_size(state) == pytest.approx((tmp_path / "c.pth.tar").stat().st_size, rel=0.01)


def peaks() -> tuple[int, int, int]:
    """(the peak before, the peak while more than that is held, what is held)."""
    before = peak_memory(torch.device("cpu"))
    held = torch.ones(before // 4 + 2**26)
    return before, peak_memory(torch.device("cpu")), len(held)


def test_memory_grows_with_what_is_held() -> None:
    # in a process of its own: the peak of one that has run other tests is gigabytes
    before, after, held = in_fork(peaks)
    assert after > before + 2**26
    assert held


def test_the_folder_whose_disk_counts(tmp_path: Path) -> None:
    assert nearest_folder(tmp_path / "a" / "b") == nearest_folder(tmp_path) == tmp_path.resolve()


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How many steps and evaluation batches were computed."""
    found = {"steps": 0, "batches": 0}
    step, evaluate = train_split.TrainingStep.__call__, train_split.evaluate

    def stepped(self: Any, *args: Any) -> Any:
        found["steps"] += 1
        return step(self, *args)

    def evaluated(network: Any, batches: Any, **options: Any) -> Any:
        batches = list(batches)
        found["batches"] += len(batches)
        return evaluate(network, batches, **options)

    monkeypatch.setattr(train_split.TrainingStep, "__call__", stepped)
    monkeypatch.setattr(train_split, "evaluate", evaluated)
    return found


@pytest.mark.parametrize("flags", [(), ("--iters_to_accumulate", "4", "--ema_decay", "0.9")])
def test_a_dry_run_says_what_a_run_costs_and_leaves_nothing(
    flags: tuple[str, ...], counted: dict[str, int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "runs" / "a"
    argv = [*TINY, *flags, "--model_dir", str(folder), "--epochs", "4", "--eval_per_epoch", "2", "--dry_run"]
    assert train_split.main(argv) == 0
    out = capsys.readouterr().out
    assert not (tmp_path / "runs").exists()
    assert not list(tmp_path.iterdir())
    assert counted == {"steps": 2, "batches": 2}  # one, and one more that is timed
    found = json.loads(out.splitlines()[-1])
    assert (found["steps"], found["evaluations"]) == (4 * 14, 2)
    assert found["seconds"] == pytest.approx(56 * found["step_seconds"] + 2 * found["evaluation_seconds"])
    assert found["step_seconds"] > 0
    assert found["evaluation_seconds"] > 0
    assert found["memory_bytes"] > 2**26
    assert found["checkpoints"] == 6
    if flags:
        return
    # what it says of the disk is so
    assert train_split.main([*argv[:-1], "--max_steps", "1"]) == 0
    assert (folder / "checkpoint_0_1.pth.tar").stat().st_size == pytest.approx(found["checkpoint_bytes"], rel=0.05)


def test_a_run_that_is_there_is_as_it_was(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = [*TINY, "--model_dir", str(tmp_path), "--max_steps", "2"]
    assert train_split.main(argv) == 0
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    capsys.readouterr()
    assert train_split.main([*argv[:-1], "6", "--resume", "auto", "--dry_run"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["steps"] == 4
    assert train_split.main([*argv, "--dry_run"]) == 2  # as the run itself would be refused
    assert "already holds a run" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before


def test_what_a_dry_run_cannot_go_with_is_refused() -> None:
    with pytest.raises(UserError, match="--dry_run"):
        parse_config(["--dataset", "digits", "--dry_run", "--exchange", "x"])

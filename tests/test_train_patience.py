"""--patience: a run that does not get better on held-out images stops, says so, and is finished."""

from pathlib import Path

import pytest

from record.checkpoint import load_checkpoint
from tests.runs import TINY, train
from training.state import has_ended, is_out_of_patience


@pytest.mark.parametrize(
    ("last", "best", "patience", "expected"),
    [
        (5, 3, 2, True),
        (5, 3, 3, False),
        (5, 5, 1, False),
        (5, 3, None, False),
        (None, None, 1, False),
        (5, None, 1, False),
    ],
)
def test_when_patience_ends(last: int | None, best: int | None, patience: int | None, expected: bool) -> None:
    reports = [None if epoch is None else {"epoch": epoch} for epoch in (last, best)]
    assert is_out_of_patience(*reports, patience) is expected
    state = {"epoch": 5, "config": {"epochs": 9}, "report": {"last": reports[0], "best": reports[1]}}
    assert has_ended(state, epochs=None, max_steps=None, default_epochs=1, patience=patience) is expected


@pytest.mark.slow
def test_a_run_that_does_not_get_better_stops_and_is_finished(tmp_path: Path) -> None:
    still = ["--lr", 0, "--slow_start_lr", 0, "--end_lr", 0]  # only the statistics of norms change
    argv = [*TINY, *still, "--val_fraction", 0.2, "--epochs", 12, "--seed", 1, "--model_dir", tmp_path / "m"]
    run = train([*argv, "--patience", 2], tmp_path)
    assert run.code == 0, run.stderr
    best = run.result["best_epoch"]
    assert run.result["epochs"] == best + 2 < 12
    assert f"stopped after epoch {best + 2} of 12: held-out top-1 has not risen since epoch {best}" in (run.stderr)
    assert load_checkpoint(tmp_path / "m" / "model_best.pth.tar")["epoch"] == best

    again = train([*argv, "--patience", 2, "--resume", "auto"], tmp_path)
    assert (again.code, again.result) == (0, run.result)
    assert "already finished: nothing was trained" in again.stderr

    longer = train([*argv, "--patience", 4, "--resume", "auto"], tmp_path)
    whole = train([*argv, "--patience", 4, "--model_dir", tmp_path / "whole"], tmp_path)
    assert longer.code == whole.code == 0, longer.stderr
    assert longer.result["epochs"] == whole.result["epochs"] > best + 2
    assert longer.result["state_sha256"] == whole.result["state_sha256"]


def test_patience_needs_held_out_images(tmp_path: Path) -> None:
    run = train([*TINY, "--patience", 2, "--model_dir", tmp_path / "m"], tmp_path)
    assert run.code == 2
    assert "--patience 2: there are no held-out images to judge by" in run.stderr

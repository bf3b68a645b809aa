"""Signals as a wish: noted once, agreed on by all processes, and obeyed between two batches."""

import os
import signal
from pathlib import Path

import pytest
import torch

from tests.processes import run_processes
from training.interrupt import Stopped, StopRequest


def asked_together(rank: int, world_size: int) -> bool:
    request = StopRequest()
    request.number = 15 if rank == 1 else 0
    return request.agreed(torch.device("cpu"))


def until_stopped(rank: int, world_size: int) -> list[int]:
    """The batches that each process sees when process 1, with fewer of them, is signalled at its first."""
    request, seen = StopRequest(), []
    try:
        for batch in request.until_stopped(range((5, 2, 0)[rank]), rounds=5, device=torch.device("cpu"), every=2):
            seen.append(batch)
            request.number = signal.SIGTERM if rank == 1 else request.number
    except Stopped as stopped:
        seen.append(-stopped.number)
    return seen


def test_all_processes_stop_at_the_same_batch(tmp_path: Path) -> None:
    seen = run_processes(3, until_stopped, tmp_path / "r")
    assert seen == [[0, 1, -signal.SIGTERM], [0, 1, -signal.SIGTERM], [-signal.SIGTERM]]


def test_a_signal_to_one_process_is_known_to_all(tmp_path: Path) -> None:
    assert run_processes(2, asked_together, tmp_path / "r") == [True, True]


def test_a_second_signal_ends_the_process_unless_it_is_an_echo(monkeypatch: pytest.MonkeyPatch) -> None:
    now, raised = [100.0], []
    monkeypatch.setattr("training.interrupt.time.monotonic", lambda: now[0])
    monkeypatch.setattr("training.interrupt.signal.raise_signal", raised.append)
    with StopRequest() as request:
        os.kill(os.getpid(), signal.SIGTERM)
        assert (request.number, raised) == (signal.SIGTERM, [])
        now[0] += 1.0  # a launcher passes on what the terminal has sent already
        os.kill(os.getpid(), signal.SIGINT)
        assert (request.number, raised) == (signal.SIGTERM, [])
        now[0] += 10.0
        os.kill(os.getpid(), signal.SIGINT)
        assert raised == [signal.SIGINT]


def test_without_a_signal_every_batch_comes() -> None:
    request = StopRequest()
    assert list(request.until_stopped(range(5), rounds=3, device=torch.device("cpu"))) == [0, 1, 2, 3, 4]

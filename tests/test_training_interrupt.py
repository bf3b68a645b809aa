"""Signals as a wish: noted once, agreed on by all processes, and obeyed between two batches."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.processes import run_processes
from training import interrupt
from training.interrupt import StopRequest
from utils.errors import Stopped

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def handlers_restored() -> Iterator[None]:
    """A note of a signal outlives its context."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def asked_together(rank: int) -> dict[str, Any]:
    """What each process is told when nobody was signalled, and when two were, each with another signal."""
    quiet, signalled = StopRequest(), StopRequest()
    signalled.number = (0, signal.SIGTERM, signal.SIGINT)[rank]
    return {
        "quiet": [quiet.agreed(CPU), quiet.number],
        "signalled": [signalled.agreed(CPU), signalled.number],
    }


def until_stopped(rank: int) -> list[int]:
    """The batches that each process sees when process 1, with fewer of them, is signalled at its first."""
    request, seen = StopRequest(), []
    try:
        for batch in request.until_stopped(range((5, 2, 0)[rank]), rounds=5, device=CPU):
            seen.append(batch)
            request.number = signal.SIGTERM if rank == 1 else request.number
    except Stopped as stopped:
        seen.append(-stopped.number)
    return seen


def together(rank: int, world_size: int) -> dict[str, Any]:
    quiet = list(StopRequest().until_stopped(range((3, 1, 0)[rank]), rounds=3, device=CPU))
    return {**asked_together(rank), "until_stopped": until_stopped(rank), "to_the_end": quiet}


def test_processes_agree_and_stop_at_the_same_batch(tmp_path: Path) -> None:
    results = run_processes(3, together, tmp_path / "r")
    for result in results:
        assert result["quiet"] == [False, 0]
        assert result["signalled"] == [True, signal.SIGTERM]
    seen = [result["until_stopped"] for result in results]
    assert seen == [[0, -signal.SIGTERM], [0, -signal.SIGTERM], [-signal.SIGTERM]]
    assert [result["to_the_end"] for result in results] == [[0, 1, 2], [0], []]


def paced(rank: int, world_size: int) -> list[int]:
    """The rounds that ask, of processes that take 0.1 and 0.4 s for a round and then 4 s, at a pace of 3 s."""
    now = [0.0]
    interrupt.time = SimpleNamespace(monotonic=lambda: now[0])  # type: ignore[assignment]
    request, asked = StopRequest(pace=3.0), []
    for number in range(40):
        now[0] += 4.0 if number >= 30 else (0.1, 0.4)[rank]
        if request.due():
            asked.append(number)
            request.agreed(CPU)
    return asked


def test_questions_to_other_gpus_come_every_few_seconds_whatever_a_step_takes(tmp_path: Path) -> None:
    first, second = run_processes(2, paced, tmp_path / "r")
    assert first == second
    assert first == [0, 2, 6, 13, 20, 27, 34, 35, 36, 37, 38, 39]


def test_a_signal_that_comes_while_the_processes_ask_each_other_is_heard_at_the_next_question(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Sent to all of a job, it finds most of them there."""
    coming = [signal.SIGTERM]

    def asked_of_two(asked: torch.Tensor, op: object) -> None:
        if coming:
            signal.raise_signal(coming.pop())

    monkeypatch.setattr(interrupt, "is_alone", lambda: False)
    monkeypatch.setattr(interrupt.dist, "all_reduce", asked_of_two)
    with StopRequest() as request:
        assert not request.agreed(CPU)  # all processes get the answer that they have sent
        assert request.agreed(CPU)
        assert request.number == signal.SIGTERM


def test_a_signal_is_obeyed_before_the_next_batch() -> None:
    found: list[int] = []

    def train(request: StopRequest) -> None:
        for batch in request.until_stopped(range(5), rounds=5, device=CPU):
            found.append(batch)
            if batch == 1:
                os.kill(os.getpid(), signal.SIGTERM)

    with StopRequest() as request, pytest.raises(Stopped) as stopped:
        train(request)
    assert stopped.value.number == signal.SIGTERM
    assert found == [0, 1]


def test_the_signals_mean_what_they_meant_once_the_context_ends() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    with StopRequest() as request:
        inside = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
        assert inside == [request._note] * 2
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before


def test_a_second_signal_ends_the_process_unless_it_is_an_echo(monkeypatch: pytest.MonkeyPatch) -> None:
    now, raised = [100.0], []
    monkeypatch.setattr("utils.signals.time.monotonic", lambda: now[0])
    monkeypatch.setattr("utils.signals.signal.raise_signal", raised.append)
    with StopRequest() as request:
        os.kill(os.getpid(), signal.SIGTERM)
        assert (request.number, raised) == (signal.SIGTERM, [])
        now[0] += 1.0  # a launcher passes on what the terminal has sent already
        os.kill(os.getpid(), signal.SIGINT)
        assert (request.number, raised) == (signal.SIGTERM, [])
        now[0] += 10.0
        os.kill(os.getpid(), signal.SIGINT)
        assert raised == [signal.SIGINT]
        assert signal.getsignal(signal.SIGINT) is signal.SIG_DFL


def test_without_a_signal_every_batch_comes() -> None:
    request = StopRequest()
    assert list(request.until_stopped(range(5), rounds=3, device=torch.device("cpu"))) == [0, 1, 2, 3, 4]

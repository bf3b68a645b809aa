"""No wait for a decoding process is endless, and no signal but the trainer's end ends one."""

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils.data import Dataset

from dataset import decoders
from dataset.decoders import Decoders, hand_over
from utils.errors import RunError


class Work(Dataset[Any]):
    """What a worker does with a request: a word for each kind of trouble."""

    def __getitem__(self, request: Any) -> Any:
        if request == "full":
            torch.Tensor.share_memory_ = no_space  # type: ignore[assignment, method-assign]
            hand_over(torch.zeros(3))
        if request == "unsendable":
            return lambda: None  # what the queue's thread cannot send is dropped there
        if request == "asleep":
            time.sleep(300)
        return request


def no_space(tensor: Any) -> None:
    raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)")


@pytest.fixture
def working(monkeypatch: pytest.MonkeyPatch) -> Iterator[Decoders[Any]]:
    monkeypatch.setattr(decoders, "LOOK", 0.2)
    monkeypatch.setattr(decoders, "PATIENCE", 20.0)  # so that a test that fails ends
    started: Decoders[Any] = Decoders(Work(), 1, pinned=False)
    yield started
    started.close()


def workers_of(working: Decoders[Any]) -> list[Any]:
    return working._loader._iterator._workers  # type: ignore[union-attr]


def test_a_full_shared_memory_is_one_line(working: Decoders[Any]) -> None:
    with pytest.raises(RunError, match=r"\A[^\n]*No space left on device \(28\)[^\n]*--workers[^\n]*/dev/shm[^\n]*\Z"):
        list(working.items(["full", "more"]))


def test_a_batch_that_the_queue_loses_ends_its_worker(working: Decoders[Any]) -> None:
    with pytest.raises(RunError, match="decoding process died"):
        list(working.items(["unsendable", "more"]))


def test_a_batch_that_does_not_come_ends_the_wait_and_the_worker(
    working: Decoders[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoders, "PATIENCE", 1.5)
    looks: list[float] = []
    working.look = lambda: looks.append(time.monotonic())
    items = working.items(["first", "asleep"])
    assert next(items) == "first"
    with pytest.raises(RunError, match=r"decoding processes have given no batch for .* disk of --data answer"):
        next(items)
    assert len(looks) >= 3
    (worker,) = workers_of(working)
    began = time.monotonic()
    working.close()
    assert not worker.is_alive()  # asleep and deaf to SIGTERM
    assert time.monotonic() - began < 15


def test_whoever_looks_may_end_the_wait(working: Decoders[Any]) -> None:
    def look() -> None:
        raise KeyError("enough")

    working.look = look
    with pytest.raises(KeyError, match="enough"):
        list(working.items(["asleep"]))


def test_workers_do_not_hear_signals(working: Decoders[Any]) -> None:
    items = working.items(list(range(8)))
    assert next(items) == 0
    (worker,) = workers_of(working)
    for number in (signal.SIGINT, signal.SIGTERM):
        os.kill(worker.pid, number)
        assert next(items) >= 0
    assert list(items) == list(range(3, 8))
    assert worker in multiprocessing.active_children()


def test_processes_that_cannot_be_started_are_one_line(working: Decoders[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Any, *args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("multiprocessing.synchronize.SemLock.__init__", full)
    with pytest.raises(RunError, match=r"cannot be started \(No space left on device\)[^\n]*/dev/shm"):
        next(working.items(["first"]))


class Unpinned:
    """Torch's iterator whose thread for pinned memory ends with an error; it needs a GPU itself."""

    def __init__(self) -> None:
        self._pin_memory_thread = threading.Thread(target=self.take_over)

    def take_over(self) -> None:
        raise OSError(24, "Too many open files")

    def __iter__(self) -> "Unpinned":
        return self

    def __next__(self) -> Any:
        if not self._pin_memory_thread.ident:
            self._pin_memory_thread.start()
        time.sleep(0.05)
        raise RuntimeError("DataLoader timed out after 1.0 seconds")


def test_the_thread_that_pins_memory_is_missed(working: Decoders[Any], capfd: pytest.CaptureFixture[str]) -> None:
    working.__dict__["_loader"] = Unpinned()
    before = threading.excepthook
    with pytest.raises(RunError, match=r"cannot be taken over any more \(Too many open files\)"):
        list(working.items(["first"]))
    assert threading.excepthook is before
    assert "Traceback" not in capfd.readouterr().err

"""A process that dies is named; one that lives or says good-bye is not. The clock is the test's, threads are real."""

import math
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator

import pytest
import torch.distributed as dist

from tests.waits import wait_until
from utils import heartbeat
from utils.heartbeat import FAILED, SILENCE, Heartbeat


class Clock:
    """Stands in for the module `time`."""

    def __init__(self) -> None:
        self.now = 100.0
        self.while_sleeping: Callable[[], None] = lambda: None

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.while_sleeping()


class FailingStore(dist.Store):
    """A store that works until its host is gone."""

    def __init__(self) -> None:
        super().__init__()
        self.values: dict[str, bytes] = {}
        self.gone = False

    def _look(self) -> dict[str, bytes]:
        if self.gone:
            raise RuntimeError("connection reset by peer")
        return self.values

    def set(self, key: str, value: str) -> None:
        self._look()[key] = value if isinstance(value, bytes) else value.encode()

    def get(self, key: str) -> bytes:
        return self._look()[key]

    def check(self, keys: list[str]) -> bool:
        return all(key in self._look() for key in keys)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(heartbeat, "time", clock)
    monkeypatch.setattr(heartbeat, "INTERVAL", 0.01)
    return clock


@pytest.fixture
def start(clock: Clock) -> Iterator[Callable[..., Heartbeat]]:
    """Starts the heartbeats of several processes in this one."""
    started = []

    def begin(store: dist.Store, rank: int, world_size: int = 2, *, silence: float = math.inf) -> Heartbeat:
        started.append(Heartbeat(store, rank, world_size, silence=silence))
        return started[-1]

    yield begin
    for beat in started:
        beat.close()


def heard(beat: Heartbeat) -> list[int]:
    """The others that were heard at any time and have not left."""
    return beat.silent(-1)


def died(store: dist.Store, rank: int) -> None:
    """What a process that died after its seventh beat leaves."""
    dist.PrefixStore("heartbeat", store).set(str(rank), "7")


def test_a_process_that_dies_is_silent_and_the_living_one_is_not(start, clock: Clock) -> None:
    store = dist.HashStore()
    died(store, 2)
    watcher, _ = start(store, 0, 4), start(store, 1, 4)
    wait_until(lambda: heard(watcher) == [1, 2], "both were heard")
    assert watcher.silent(30) == []
    clock.now += 31
    wait_until(lambda: watcher.silent(30) == [2], "only the dead one is silent; number 3 never came, and is waited for")


def test_one_that_leaves_is_not_missed_but_known_to_have_stopped(start, clock: Clock) -> None:
    store = dist.HashStore()
    watcher, other = start(store, 0), start(store, 1)
    wait_until(lambda: heard(watcher) == [1], "it was heard")
    other.close()
    wait_until(lambda: heard(watcher) == [], "it has left")
    clock.now += 1000
    assert watcher.silent(30) == []
    assert watcher.who_is_gone() == "process 1 stopped"


def test_after_a_failed_exchange_the_dead_are_named(start, clock: Clock) -> None:
    store = dist.HashStore()
    for rank in (1, 3):
        died(store, rank)
    watcher = start(store, 0, 4)
    wait_until(lambda: heard(watcher) == [1, 3], "both were heard")
    assert watcher.who_is_gone() == "process 1, 3 died"


def test_after_a_failed_exchange_the_living_are_not_named(start, clock: Clock) -> None:
    store = dist.HashStore()
    watcher, _ = start(store, 0), start(store, 1)
    wait_until(lambda: heard(watcher) == [1], "it was heard")
    clock.while_sleeping = lambda: wait_until(lambda: watcher.silent(0) == [], "it was heard again")
    before = clock.now
    assert watcher.who_is_gone(patience=0.1) == ""
    assert clock.now >= before + 0.1


@pytest.fixture
def exits(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Exit codes of processes that give up; here they only wait for the test's end."""
    codes: list[int] = []
    over = threading.Event()

    def end(code: int) -> None:
        codes.append(code)
        over.wait(60)

    monkeypatch.setattr(heartbeat.os, "_exit", end)
    yield codes
    over.set()


@pytest.mark.parametrize("advice", ["Go on with --resume auto.", "Start it again."])
def test_a_process_gives_up_on_one_that_is_silent_for_too_long(
    advice: str, start, clock: Clock, exits, capfd, monkeypatch
) -> None:
    monkeypatch.setattr(heartbeat.sys, "argv", ["/somewhere/train_split.py"])
    store = dist.HashStore()
    died(store, 1)
    watcher = start(store, 0, silence=SILENCE)
    watcher.advice = advice
    wait_until(lambda: heard(watcher) == [1], "it was heard")
    clock.now += SILENCE - 1
    assert not exits
    clock.now += 2
    wait_until(lambda: exits == [1], "the process ended with code 1")
    error = capfd.readouterr().err
    assert error.startswith("train_split.py: process 1 has not answered for 60 s")
    assert error.endswith(f"; stopping. {advice}\n")
    assert error.count("\n") == 1


def test_a_process_that_fails_ends_the_others_soon_and_is_named(start, clock: Clock, exits, capfd) -> None:
    store = dist.HashStore()
    watcher, other = start(store, 0, silence=SILENCE), start(store, 1, silence=SILENCE)
    wait_until(lambda: heard(watcher) == [1], "it was heard")
    other.fail()
    other.close()  # later, and it does not take the word back
    wait_until(lambda: heard(watcher) == [], "it has failed")
    assert not exits
    clock.now += FAILED + 0.1
    wait_until(lambda: exits == [1], "the process ended with code 1")
    assert "process 1 failed; stopping" in capfd.readouterr().err


def test_one_that_ends_by_itself_is_not_ended_while_it_writes(start, clock: Clock, exits) -> None:
    store = dist.HashStore()
    watcher, other = start(store, 0, silence=SILENCE), start(store, 1, silence=SILENCE)
    wait_until(lambda: heard(watcher) == [1], "it was heard")
    other.fail()
    wait_until(lambda: heard(watcher) == [], "it has failed")
    assert watcher.who_is_gone() == "process 1 failed"
    clock.now += 100 * FAILED
    time.sleep(0.1)
    assert not exits


def test_one_that_only_follows_is_not_the_one_to_name(start, clock: Clock) -> None:
    store = dist.HashStore()
    died(store, 2)
    watcher, other = start(store, 0, 3), start(store, 1, 3)
    wait_until(lambda: heard(watcher) == [1, 2], "both were heard")
    other.fail(follows=True)
    wait_until(lambda: heard(watcher) == [2], "it has left")
    assert watcher.who_is_gone() == "process 2 died"


def test_the_one_that_holds_the_store_waits_until_the_others_have_read_it(start, clock: Clock) -> None:
    first, second = start(dist.HashStore(), 0), start(dist.HashStore(), 1)
    for beat, seconds in ((second, 0.0), (first, 2 * heartbeat.INTERVAL)):
        before = clock.now
        beat.fail()
        assert clock.now - before == pytest.approx(seconds)


@pytest.mark.parametrize("met", [True, False])
def test_the_process_that_holds_the_store_is_named_when_the_store_is_gone(start, clock, exits, capfd, met) -> None:
    store = FailingStore()
    watcher = start(store, 1, silence=SILENCE)
    if met:
        died(store, 0)
        wait_until(lambda: heard(watcher) == [0], "it was heard")
    store.gone = True
    wait_until(lambda: heard(watcher) == [0], "the store is missed")
    clock.now += SILENCE - 1
    assert watcher.silent(SILENCE) == []
    clock.now += 2
    wait_until(lambda: exits == [1], "the process ended with code 1")
    assert "process 0 has not answered" in capfd.readouterr().err


def test_close_ends_the_thread_and_says_good_bye_even_where_the_store_is_gone(start) -> None:
    def threads() -> list[str]:
        return [thread.name for thread in threading.enumerate() if thread.name == "heartbeat"]

    store, broken = dist.HashStore(), FailingStore()
    first, second = start(store, 0), start(broken, 1)
    wait_until(lambda: len(threads()) == 2, "both beat")
    first.close()
    wait_until(lambda: len(threads()) == 1, "the thread ended")
    assert dist.PrefixStore("heartbeat", store).get("0") == b"left"
    broken.gone = True
    second.close()
    wait_until(lambda: not threads(), "the other thread ended")


def test_a_process_that_ends_while_it_beats_is_not_aborted() -> None:
    """A thread that comes back from the store's C++ after Python's end has no Python to come back to."""
    code = (
        "import sys, time\n"
        "import torch.distributed as dist\n"
        "from utils import heartbeat\n"
        "heartbeat.INTERVAL = 0.0\n"
        "store = dist.TCPStore('127.0.0.1', 0, 1, True, wait_for_workers=False)\n"
        "store.set('heartbeat/1', '0')\n"
        "beat = heartbeat.Heartbeat(store, 0, 2)\n"
        "class Slow:\n def __del__(self, sleep=time.sleep): sleep(0.5)\n"
        "sys.modules['slow'] = Slow()\n"  # Python takes its time to end
        "time.sleep(0.2)\n"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stderr) == (0, "")

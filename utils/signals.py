"""SIGTERM and SIGINT: noted once, and what a note does; decoding workers and fork servers never see them."""

import contextlib
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType, TracebackType
from typing import Self

from utils.errors import Interrupted

ECHO = 2.0  # seconds in which a signal may come again: a terminal and a launcher both hand it to every process
NUMBERS = (signal.SIGTERM, signal.SIGINT)


class SignalNote:
    """Context in which SIGTERM and SIGINT are noted; a second signal, ECHO seconds later, ends the process at once.

    Once one is noted, that stays so when the context ends: the echo may come while the program says its last line.

    Attributes:
        number: of the signal that this process has got; 0: none.
    """

    def __init__(self) -> None:
        self.number = 0
        self._noted: float | None = None
        self._before: dict[int, object] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():  # no other thread may
            for number in NUMBERS:
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            if self._noted is None:
                signal.signal(number, handler)  # type: ignore[arg-type]

    def _note(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._noted is not None and now - self._noted > ECHO:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        if self._noted is None:
            self._noted, self.number = now, number
            self.noted()

    def noted(self) -> None:
        """Called once, in the main thread, between any two of its instructions."""

    def seconds(self) -> float:
        """How long ago this process was signalled; 0 where it was not."""
        return 0.0 if self._noted is None else time.monotonic() - self._noted


class Interruption(SignalNote):
    """Context in which the first signal raises `Interrupted`."""

    def release(self) -> None:
        """Let signals through that were `held`; one that is waiting comes now."""
        if self._before and hasattr(signal, "pthread_sigmask"):
            signal.pthread_sigmask(signal.SIG_UNBLOCK, NUMBERS)

    def noted(self) -> None:
        raise Interrupted(self.number)


def hold() -> None:
    """Signals to this process wait until `Interruption.release`."""
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_BLOCK, NUMBERS)


@contextlib.contextmanager
def held() -> Iterator[None]:
    """Processes started in here do not see SIGTERM and SIGINT until they ask for them; this one does afterwards."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    # it is started on the first need, and would let the signals through again
    from multiprocessing import resource_tracker

    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, NUMBERS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)

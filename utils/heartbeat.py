"""Noticing that a process of the job has died or hangs, and saying which one.

Without this, the others wait in their next exchange until its time limit (10 minutes), and then name nobody.
"""

import contextlib
import logging
import os
import sys
import threading
import time

import torch.distributed as dist

logger = logging.getLogger(__name__)

INTERVAL = 1.0  # seconds between beats
SILENCE = 60.0  # seconds without a beat after which the others give up


class Heartbeat:
    """A thread that tells the others that this process lives, and watches that they do.

    Args:
        store: shared by all processes.
        rank, world_size: of this process.
        silence: seconds without a beat from a process after which this one ends, with exit code 1 and one line.
    """

    def __init__(self, store: dist.Store, rank: int, world_size: int, *, silence: float = SILENCE) -> None:
        self._store = dist.PrefixStore("heartbeat", store)
        self._rank, self._world_size, self._silence = rank, world_size, silence
        self._heard: dict[int, tuple[bytes, float]] = {}
        self._left: set[int] = set()
        self._stop = threading.Event()
        self._store.set(str(rank), "0")
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        beat = 0
        while not self._stop.wait(INTERVAL):
            beat += 1
            try:
                self._store.set(str(self._rank), str(beat))
                self._listen()
            except RuntimeError:  # the process that holds the store is gone
                if not self._stop.is_set():
                    self._heard[0] = (b"", self._heard.get(0, (b"", time.monotonic()))[1])
            silent = self.silent(self._silence)
            if silent and not self._stop.is_set():
                self._give_up(silent)

    def _listen(self) -> None:
        now = time.monotonic()
        for rank in range(self._world_size):
            if rank == self._rank or rank in self._left or not self._store.check([str(rank)]):
                continue
            value = self._store.get(str(rank))
            if value == b"left":
                self._left.add(rank)
                self._heard.pop(rank, None)
            elif self._heard.get(rank, (None, 0.0))[0] != value:
                self._heard[rank] = (value, now)

    def silent(self, seconds: float) -> list[int]:
        """Processes that have not been heard for so long, and have not said that they leave."""
        now = time.monotonic()
        return sorted(rank for rank, (_, heard) in list(self._heard.items()) if now - heard > seconds)

    def who_is_gone(self, patience: float = 5.0) -> str:
        """After a failed exchange: which processes do not beat any more, waiting for certainty; "" where all do."""
        deadline = time.monotonic() + patience
        while time.monotonic() < deadline:
            time.sleep(INTERVAL / 2)
            for ranks, what in ((self.silent(3 * INTERVAL), "died"), (sorted(self._left), "stopped")):
                if ranks:
                    return f"process {', '.join(map(str, ranks))} {what}"
        return ""

    def _give_up(self, silent: list[int]) -> None:
        names = ", ".join(map(str, silent))
        program = os.path.basename(sys.argv[0])
        line = f"{program}: process {names} has not answered for {self._silence:.0f} s (it died or hangs); stopping."
        with contextlib.suppress(OSError):
            os.write(2, f"{line} Go on with --resume auto.\n".encode(errors="backslashreplace"))
        os._exit(1)  # the main thread may be stuck in an exchange that never ends

    def close(self) -> None:
        """Say that this process leaves, and stop."""
        self._stop.set()
        with contextlib.suppress(RuntimeError):
            self._store.set(str(self._rank), "left")
        self._thread.join(timeout=2 * INTERVAL)

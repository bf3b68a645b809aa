"""Noticing that a process of the job has died or hangs, and saying which one.

Without this, the others wait in their next exchange until its time limit (10 minutes), and then name nobody.
"""

import atexit
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
GO_ON = "Go on with --resume auto."
PATIENCE = 30.0  # seconds for the beat that is under way when a process ends: machines may be slow, stores may hang
FAILED = 5.0  # seconds after which they give up on one that says that it failed, if no exchange has told them


class Heartbeat:
    """A thread that tells the others that this process lives, and watches that they do.

    Args:
        store: shared by all processes.
        rank, world_size: of this process.
        silence: seconds without a beat from a process after which this one ends, with exit code 1 and one line.

    Attributes:
        advice: the sentence at the end of that line.
    """

    def __init__(self, store: dist.Store, rank: int, world_size: int, *, silence: float = SILENCE) -> None:
        self._store = dist.PrefixStore("heartbeat", store)
        self._rank, self._world_size, self._silence = rank, world_size, silence
        self.advice = GO_ON
        self._heard: dict[int, tuple[bytes, float]] = {}
        self._left: set[int] = set()
        self._failed: dict[int, float] = {}
        self._followed: set[int] = set()
        self._resigned = False
        self._stop = threading.Event()
        self._store.set(str(rank), "0")
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        self._thread.start()
        atexit.register(self._halt)  # without a word: the others are to notice a process that ends unforeseen

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
            if self._stop.is_set() or self._resigned:
                continue
            if silent := self.silent(self._silence):
                self._give_up(silent, f"has not answered for {self._silence:.0f} s (it died or hangs)")
            now = time.monotonic()
            if failed := sorted(rank for rank, heard in self._failed.items() if now - heard > FAILED):
                self._give_up(failed, "failed")

    def _listen(self) -> None:
        now = time.monotonic()
        for rank in range(self._world_size):
            if rank == self._rank or rank in self._left or rank in self._failed or rank in self._followed:
                continue
            if not self._store.check([str(rank)]):
                continue
            value = self._store.get(str(rank))
            if value in (b"left", b"failed", b"followed"):
                self._heard.pop(rank, None)
            if value == b"failed":
                self._failed[rank] = now
            elif value == b"left":
                self._left.add(rank)
            elif value == b"followed":
                self._followed.add(rank)
            elif self._heard.get(rank, (None, 0.0))[0] != value:
                self._heard[rank] = (value, now)

    def silent(self, seconds: float) -> list[int]:
        """Processes that have not been heard for so long, and have not said that they leave."""
        now = time.monotonic()
        return sorted(rank for rank, (_, heard) in list(self._heard.items()) if now - heard > seconds)

    def who_is_gone(self, patience: float = 5.0) -> str:
        """After a failed exchange: which processes do not beat any more, waiting for certainty; "" where all do.

        From now on this process ends by itself, and is not ended while it writes what it still has to write.
        """
        self._resigned = True
        deadline = time.monotonic() + patience
        while time.monotonic() < deadline:
            time.sleep(INTERVAL / 2)
            found = (
                (sorted(self._failed), "failed"),
                (self.silent(3 * INTERVAL), "died"),
                (sorted(self._left), "stopped"),
            )
            for ranks, what in found:
                if ranks:
                    return f"process {', '.join(map(str, ranks))} {what}"
        return f"process {', '.join(map(str, sorted(self._followed)))} stopped" if self._followed else ""

    def _give_up(self, ranks: list[int], what: str) -> None:
        program = os.path.basename(sys.argv[0])
        line = f"{program}: process {', '.join(map(str, ranks))} {what}; stopping. {self.advice}"
        with contextlib.suppress(OSError):
            os.write(2, f"{line}\n".encode(errors="backslashreplace"))
        os._exit(1)  # the main thread may be stuck in an exchange that never ends

    def fail(self, *, follows: bool = False) -> None:
        """Say that this process ends with an error, and stop: the others give up, as soon as they can.

        Args:
            follows: it does so because another one is gone, and is not the one to be named.
        """
        if not self._stop.is_set():
            self._leave("followed" if follows else "failed")
            if self._rank == 0 and not follows:
                time.sleep(2 * INTERVAL)  # the store may end with this process; the others look every INTERVAL

    def close(self) -> None:
        """Say that this process leaves, and stop."""
        if not self._stop.is_set():
            self._leave("left")

    def _halt(self) -> None:
        """End the thread. One that comes back from the store when Python has ended aborts the process."""
        self._stop.set()
        self._thread.join(timeout=PATIENCE)

    def _leave(self, word: str) -> None:
        self._halt()  # first, because its beat would overwrite the word
        with contextlib.suppress(RuntimeError):
            self._store.set(str(self._rank), word)

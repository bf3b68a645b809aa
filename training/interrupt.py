"""SIGTERM and SIGINT as a wish that training looks at between steps."""

import itertools
import signal
import time
from collections.abc import Iterable, Iterator
from types import FrameType, TracebackType
from typing import TypeVar

import torch
import torch.distributed as dist

from utils.errors import Stopped

ECHO = 2.0  # seconds in which a signal may come again: a terminal and a launcher both hand it to every process

_Batch = TypeVar("_Batch")


class StopRequest:
    """Context in which SIGTERM and SIGINT are noted; a second signal, ECHO seconds later, ends the process at once.

    Attributes:
        number: of the signal that this process, or another one of the job, has got; 0: none.
    """

    def __init__(self) -> None:
        self.number = 0
        self._noted: float | None = None
        self._before: dict[int, object] = {}

    def __enter__(self) -> "StopRequest":
        for number in (signal.SIGTERM, signal.SIGINT):
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _note(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._noted is not None and now - self._noted > ECHO:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        if self._noted is None:
            self._noted, self.number = now, number

    def agreed(self, device: torch.device) -> bool:
        """Whether any process was signalled; all processes must ask together, and get the same answer."""
        if dist.is_initialized() and dist.get_world_size() > 1:
            asked = torch.tensor([self.number], device=device)
            dist.all_reduce(asked, op=dist.ReduceOp.MAX)
            self.number = int(asked)
        return self.number != 0

    def until_stopped(
        self, batches: Iterable[_Batch], *, rounds: int, device: torch.device, every: int = 1
    ) -> Iterator[_Batch]:
        """This process's batches, as long as no process is signalled; then all processes stop at the same place.

        Args:
            batches: of this process; processes may have different numbers of them.
            rounds: how many batches the process with the most has.
            device: where the processes ask each other.
            every: how many rounds lie between two questions.

        Raises:
            Stopped: in every process.
        """
        mine = iter(batches)
        for number in range(rounds):
            if number % every == 0 and self.agreed(device):
                raise Stopped(self.number)
            yield from itertools.islice(mine, 1)
        yield from mine

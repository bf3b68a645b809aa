"""SIGTERM and SIGINT as a wish that training looks at between steps."""

import itertools
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

import torch
import torch.distributed as dist

from utils.distributed import is_alone
from utils.errors import Stopped
from utils.signals import SignalNote

PACE = 3.0  # seconds between two questions to other GPUs: their answer is a synchronisation

_Batch = TypeVar("_Batch")


class StopRequest(SignalNote):
    """Context in which SIGTERM and SIGINT are noted; a second signal, ECHO seconds later, ends the process at once.

    Args:
        pace: seconds that shall lie between two questions to the other processes; 0: every round asks.

    Attributes:
        number: of the signal that this process, or another one of the job, has got; 0: none.
    """

    def __init__(self, pace: float = 0.0) -> None:
        super().__init__()
        self._pace = pace
        self.begin()

    def begin(self) -> None:
        """Another kind of round begins, of another length: the next one asks."""
        self._every, self._rounds, self._asked = 1, 0, time.monotonic()

    def due(self) -> bool:
        """Whether this round asks; called once in each, by all processes, which then agree."""
        self._rounds += 1
        return self._rounds >= self._every

    def agreed(self, device: torch.device) -> bool:
        """Whether any process was signalled; all processes must ask together, and get the same answer."""
        agreed = self.number
        if not is_alone():
            now = time.monotonic()
            of_a_round = (now - self._asked) / max(self._rounds, 1)
            asked = torch.tensor([agreed, of_a_round], device=device, dtype=torch.float64)
            dist.all_reduce(asked, op=dist.ReduceOp.MAX)
            number, slowest = asked.tolist()
            agreed = int(number)
            if agreed:  # else a signal may have come while they asked: it stays noted, for the next question
                self.number = agreed
            if self._pace:
                # no more than twice as many, in case that the rounds before were unlike those to come
                self._every = max(1, min(2 * self._every, int(self._pace / max(slowest, 1e-9))))
            self._rounds, self._asked = 0, now
        return agreed != 0

    def until_stopped(self, batches: Iterable[_Batch], *, rounds: int, device: torch.device) -> Iterator[_Batch]:
        """This process's batches, as long as no process is signalled; then all processes stop at the same place.

        Args:
            batches: of this process; processes may have different numbers of them.
            rounds: how many batches the process with the most has.
            device: where the processes ask each other.

        Raises:
            Stopped: in every process.
        """
        self.begin()
        mine = iter(batches)
        for _ in range(rounds):
            if self.due() and self.agreed(device):
                raise Stopped(self.number)
            yield from itertools.islice(mine, 1)
        yield from mine

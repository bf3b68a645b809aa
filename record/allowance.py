"""What is nice to have may take a small share of the time, and no more."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Allowance:
    """Decides whether a piece of work may be done now.

    Args:
        share: of the time since the beginning, that the work may take in all.
        expected: seconds that it is thought to take before it has been done once.
        now: the time in seconds.
    """

    def __init__(self, share: float, expected: float, now: Callable[[], float] = time.monotonic) -> None:
        self._share, self._expected, self._now = share, expected, now
        self._began = now()
        self._spent = 0.0

    def allows(self) -> bool:
        """Whether the work, if it takes as long as the last time, stays within the share."""
        return self._spent + self._expected <= self._share * (self._now() - self._began)

    @contextmanager
    def spending(self) -> Iterator[None]:
        """Do the work."""
        began = self._now()
        yield
        self._expected = self._now() - began
        self._spent += self._expected

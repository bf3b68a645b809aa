"""Differences between two settings over the seeds that both were run with."""

import statistics
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class PairedDifference:
    """A figure minus the same figure of a reference, pair by pair of runs with one seed.

    Attributes:
        mean: of the pairs.
        std: sample standard deviation, None for one pair.
        low, high: 95 % interval of the mean by Student's t with `pairs` - 1 degrees of freedom; None for one pair.
        pairs: how many.
    """

    mean: float
    std: float | None
    low: float | None
    high: float | None
    pairs: int

    @classmethod
    def of(cls, values: Mapping[int, float], reference: Mapping[int, float]) -> "PairedDifference | None":
        """Over the seeds that both have, None where there are none.

        Args:
            values, reference: by seed.
        """
        found = [values[seed] - reference[seed] for seed in sorted(values.keys() & reference.keys())]
        if not found:
            return None
        mean = statistics.fmean(found)
        if len(found) == 1:
            return cls(mean, None, None, None, 1)
        std = statistics.stdev(found)
        half = half_interval(std, len(found))
        return cls(mean, std, mean - half, mean + half, len(found))

    def text(self, digits: int) -> str:
        """`+0.64 [+0.21, +1.07]`; without the interval where there is none."""
        mean = f"{self.mean:+.{digits}f}"
        if self.low is None:
            return mean
        return f"{mean} [{self.low:+.{digits}f}, {self.high:+.{digits}f}]"

    @property
    def is_seen(self) -> bool:
        """Whether the interval leaves 0 out."""
        return self.low is not None and self.high is not None and not self.low <= 0 <= self.high


def half_interval(std: float, count: int) -> float:
    """Half the 95 % interval of a mean of `count` >= 2 values with this sample deviation, by Student's t."""
    from scipy.stats import t

    return float(t.ppf(0.975, count - 1)) * std / count**0.5

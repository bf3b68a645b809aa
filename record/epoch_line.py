"""The one line that an epoch gets: its parts, from the longest form to the shortest."""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

MINUTE, HOUR, DAY = 60.0, 3600.0, 86400.0


def duration(seconds: float) -> str:
    """`12 s`, `58 min`, `3.5 h`, `2.1 d`."""
    if seconds < 1.5 * MINUTE:
        return f"{seconds:.0f} s"
    if seconds < 1.5 * HOUR:
        return f"{seconds / MINUTE:.0f} min"
    if seconds < 2 * DAY:
        return f"{seconds / HOUR:.1f} h"
    return f"{seconds / DAY:.1f} d"


class TimeLeft:
    """How long a run may still take: as long a step as so far, with all that lies between steps.

    Args:
        left: steps that are to be done.

    Attributes:
        left: the same, later on.
    """

    def __init__(self, left: int = 0) -> None:
        self.left = self._left_before = left
        self._began = self._lap = time.monotonic()

    def lap(self) -> float:
        """Seconds since the last call, or since the beginning."""
        before, self._lap = self._lap, time.monotonic()
        return self._lap - before

    def text(self) -> str:
        """`58 min left`; "" at the end, and before anything is known."""
        done = self._left_before - self.left
        if not self.left or done <= 0:
            return ""
        return f"{duration((time.monotonic() - self._began) / done * self.left)} left"


@dataclass(frozen=True, kw_only=True)
class EpochLine:
    """What the line may say.

    Attributes:
        title: `epoch 3/300`.
        loss: in training, per network, in nats; several: it is the mean of several networks.
        rate: learning rate.
        evaluated, best: evaluations of a `record.report.Reporter`, the epoch's own (None: there was none) and the best.
        reported, chosen_on: splits of images.
        seconds, left: time that the epoch took, and that the run may still take; "": none.
    """

    title: str
    loss: float
    several: bool
    rate: float
    evaluated: Mapping[str, Any] | None
    best: Mapping[str, Any] | None
    reported: str
    chosen_on: str
    seconds: str
    left: str

    def forms(self) -> list[str]:
        """The line, the longest form first; each leaves away what can best be missed in the one before."""
        words = ("networks", "per", "lr", "seconds", "nll", "at", "loss")
        return [self._form(words[i:]) for i in range(len(words) + 1)]

    def _form(self, shown: Sequence[str]) -> str:
        parts = [self.title + self._training(shown)]
        if self.evaluated is not None:
            parts.append(self._figures(self.evaluated, shown))
        times = [self.seconds] if "seconds" in shown or not self.left else []
        parts.append(", ".join([*times, *filter(None, [self.left])]))
        return " | ".join(parts)

    def _training(self, shown: Sequence[str]) -> str:
        text = ""
        if "loss" in shown and math.isfinite(self.loss):
            text += f"  loss {nats(self.loss)}" + (" (per network)" if self.several and "per" in shown else "")
        return text + (f"  lr {self.rate:.2g}" if "lr" in shown else "")

    def _figures(self, evaluated: Mapping[str, Any], shown: Sequence[str]) -> str:
        """`test 34.7 % (best 34.7 at 3)  NLL 2.06`; of held-out images too where there are some."""
        beside = []
        if "networks" in shown and len(evaluated["acc1"]) > 1:
            beside.append(f"networks {' '.join(map(percent, evaluated['acc1']))}")
        if "networks" in shown:
            beside += [f"{name} {percent(value)}" for name, value in evaluated["extra"].items()]
        best = ""
        if self.best is not None:
            best = f"best {percent(self.best['criterion'])}" + (
                f" at {max(self.best['epoch'], 1)}" if "at" in shown else ""
            )
        own = f"{self.reported} {percent(evaluated['ensemble_acc1'])} %"
        if self.chosen_on == self.reported:
            text = own + _bracketed([*beside, best])
        else:
            chosen = f"{self.chosen_on} {percent(evaluated['criterion'])} %"
            text = f"{chosen}{_bracketed([best])}  {own}{_bracketed(beside)}"
        if "nll" in shown and "ensemble_nll" in evaluated:
            nll = evaluated["ensemble_nll"]
            text += f"  NLL {'not finite' if nll is None else nats(nll)}"
        return text


def percent(value: float | None) -> str:
    """An accuracy in percent as a line has it."""
    return "–" if value is None else f"{value:.1f}"


def nats(value: float) -> str:
    """A loss as a line has it: `2.12`, `0.034`."""
    return f"{value:.2f}" if value >= 0.095 else f"{value:.2g}"


def _bracketed(parts: list[str]) -> str:
    text = ", ".join(filter(None, parts))
    return f" ({text})" if text else ""

"""The lines that a run writes about its steps: asked for where they are due, written once the device has come there."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from method import Progress
from record.report import Reporter, RunClock
from training.guard import NonfiniteGuard, NonfiniteSteps
from training.meters import MeanMeter, Means, Reading
from utils import distributed
from utils.launch import World


class Mark(NamedTuple):
    """Images trained on, seconds waited for data and seconds of the run, at one moment."""

    images: int
    waiting: float
    seconds: float


@dataclass(kw_only=True)
class Interval:
    """What a line will say of the steps since the one before, once the device has done them.

    Attributes:
        progress: of its last batch.
        done: steps of the run at its end.
        images, waiting: as in `Mark`, at its end.
        means: of the meter.
        nonfinite: what the guard has found.
        seconds: as in `Mark`, when it was seen that the device is done with it.
    """

    progress: Progress
    done: int
    images: int
    waiting: float
    means: Reading
    nonfinite: Callable[[], NonfiniteSteps | None]
    seconds: float | None = None


class Intervals:
    """The intervals between two lines that have ended and are not reported, since a GPU may not be done with them.

    Args:
        meter: means over an interval; emptied at its end.
        guard: knows which steps were non-finite.
        clock: of the run.
        report: writes the lines.
        waited: gives the seconds that the run has waited for data.
        check: looks at what an interval has shown before its line is written, and may end the run.
        world: this process's place among all.
    """

    def __init__(
        self,
        *,
        meter: MeanMeter,
        guard: NonfiniteGuard,
        clock: RunClock,
        report: Reporter,
        waited: Callable[[], float],
        check: Callable[[Interval, Means], None],
        world: World,
    ) -> None:
        self._meter, self._guard, self._clock, self._reporter = meter, guard, clock, report
        self._waited, self._check, self.world = waited, check, world
        self._since = Mark(0, 0.0, 0.0)  # the end of the last interval that was reported
        self._ended: list[Interval] = []

    def begin(self) -> None:
        """Steps begin, after something else."""
        self._since = self._mark()

    def end(self, progress: Progress, done: int) -> None:
        """Begin to read the meters for a line, and begin the next interval.

        Args:
            progress: of the interval's last batch.
            done: steps of the run.
        """
        here, everywhere = self._mark(), distributed.all_reduce_sum
        self._ended.append(
            Interval(
                progress=progress,
                done=done,
                images=here.images,
                waiting=here.waiting,
                means=self._meter.reading(distributed.add_once(self.world)),
                nonfinite=self._guard.reading(everywhere),
            )
        )
        self._meter.reset()

    def report(self, *, all_of_them: bool) -> None:
        """Log the intervals that the device is done with, after a look at each.

        A GPU has the next steps to do meanwhile, and no more than an interval of them, so no line makes it idle.
        Several processes, which must find the same, look at the same step.

        Args:
            all_of_them: wait for what the device is not done with.

        Raises:
            RunError: what `check` raises.
        """
        is_on_cpu = self.world.device.type == "cpu"
        alone = self.world.world_size == 1 or is_on_cpu
        while self._ended:
            interval = self._ended[0]
            is_here = interval.means.is_here()
            if is_here and interval.seconds is None:
                self._clock.count()
                interval.seconds = self._clock.seconds
            if not (all_of_them or len(self._ended) > 1 or (is_here and alone)):
                return
            means = interval.means.get()  # in the steps' time, which on a GPU passes here
            del self._ended[0]
            is_idle = is_on_cpu or (all_of_them and not self._ended)
            # a pause would wait for the next steps too
            with self._clock.paused() if is_idle else self._clock.counted():
                self._report(interval, means)

    def _report(self, interval: Interval, means: Means) -> None:
        ended = self._clock.seconds if interval.seconds is None else interval.seconds
        since, self._since = self._since, Mark(interval.images, interval.waiting, ended)
        seconds = max(ended - since.seconds, 1e-9)
        self._check(interval, means)
        self._reporter.interval(
            epoch=interval.progress.epoch,
            step=interval.done - 1,
            batch=interval.progress.batch,
            rate=interval.progress.learning_rate,
            means=means,
            speed={
                "images_per_second": round((interval.images - since.images) / seconds, 1),
                "data_wait": round((interval.waiting - since.waiting) / seconds, 4),
            },
        )

    def _mark(self) -> Mark:
        return Mark(self._clock.images, self._waited(), self._clock.seconds)

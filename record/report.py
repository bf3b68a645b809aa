"""What a run says about itself while it goes on, and the figures it keeps: last and best evaluation, time, images."""

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm

from record.logger import RunLog, stderr_is_terminal

logger = logging.getLogger(__name__)

Means = Mapping[str, float | list[float]]


class RunClock:
    """Seconds and images of a run, over all its resumed parts.

    Args:
        wait: for what the device was asked to do. Where steps are only handed over to it, their time passes later.
    """

    def __init__(self, wait: Callable[[], None] = lambda: None) -> None:
        self.wait = wait
        self.seconds = 0.0
        self.train_seconds = 0.0
        self.images = 0
        self._began: float | None = None  # of what is not yet counted

    @contextmanager
    def training(self) -> Iterator[None]:
        """Count the time of a block as training, but for what is `paused` in it."""
        self._began = time.perf_counter()
        try:
            yield
        finally:
            self._count()
            self._began = None

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Count the time of a block inside of `training` not at all; the clock is right within it."""
        is_training = self._began is not None
        if is_training:
            self.wait()  # or the block would, and what the steps before it take would be nobody's
        self._count()
        try:
            yield
        finally:
            if is_training:
                self._began = time.perf_counter()

    def _count(self) -> None:
        if self._began is not None:
            passed = time.perf_counter() - self._began
            self.seconds += passed
            self.train_seconds += passed
            self._began += passed

    @contextmanager
    def running(self) -> Iterator[None]:
        """Count the time of a block as the run's, but not as training: an evaluation."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.seconds += time.perf_counter() - began

    def images_per_second(self) -> float:
        """Training images per second of training."""
        return self.images / max(self.train_seconds, 1e-9)

    def state_dict(self) -> dict[str, float]:
        """Plain numbers for a checkpoint."""
        return {"seconds": self.seconds, "train_seconds": self.train_seconds, "images": self.images}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Inverse of `state_dict`."""
        self.seconds, self.train_seconds = float(state["seconds"]), float(state["train_seconds"])
        self.images = int(state["images"])


class Reporter:
    """Lines on the terminal and in the logs, and the last and best evaluation.

    Args:
        log: where figures go.
        epochs, steps_per_epoch: length of the run.
        visible: False in all processes but one.
        reported: the split whose figures are reported, "test" or "val".
    """

    def __init__(
        self, log: RunLog, *, epochs: int, steps_per_epoch: int, visible: bool, reported: str = "test"
    ) -> None:
        self.log = log
        self.epochs = epochs
        self.steps_per_epoch = steps_per_epoch
        self.visible = visible
        self.last: dict[str, Any] | None = None
        self.best: dict[str, Any] | None = None
        self.own_best: dict[str, dict[str, Any]] = {}
        self.reported = self.chosen_on = reported
        self._bar: tqdm[Any] | None = None

    # ---- training ----------------------------------------------------------------------------------------------------

    @contextmanager
    def epoch(self, epoch: int, batch: int) -> Iterator[None]:
        """A progress bar for one epoch, where somebody watches; `epoch` and `batch` count from 0."""
        if self.visible and stderr_is_terminal():
            self._bar = tqdm(
                total=self.steps_per_epoch,
                initial=batch,
                desc=f"epoch {epoch + 1}/{self.epochs}",
                unit="step",
                leave=False,
            )
        try:
            yield
        finally:
            if self._bar is not None:
                self._bar.close()
                self._bar = None

    def step(self) -> None:
        """One batch is done."""
        if self._bar is not None:
            self._bar.update()

    def interval(self, *, epoch: int, step: int, batch: int, rate: float, means: Means, speed: Means) -> None:
        """The means over a print interval.

        Args:
            epoch, step, batch: of the interval's last batch, counted from 0.
            rate: learning rate.
            means: losses and accuracies by name; `acc1` is a list over the networks.
            speed: images_per_second, and data_wait: share of the time spent waiting for data.
        """
        numbers = {"learning_rate": rate, **means, **speed}
        self.log.write_metrics({"kind": "train", "epoch": epoch, "step": step, **numbers})
        self.log.scalars("train", numbers, step)
        losses = " ".join(f"{k} {v:.4f}" for k, v in means.items() if k.startswith("loss") and isinstance(v, float))
        accuracies = means["acc1"]
        assert isinstance(accuracies, list)
        figures = f"{losses} acc1 {' '.join(f'{value:.2f}' for value in accuracies)}"
        if self._bar is not None:
            self._bar.set_postfix_str(figures, refresh=False)
            return
        logger.info(
            "epoch %d/%d step %d/%d %s lr %.5f | %.0f images/s, waiting for data %.0f %%",
            epoch + 1,
            self.epochs,
            batch + 1,
            self.steps_per_epoch,
            figures,
            rate,
            speed["images_per_second"],
            100 * float(speed["data_wait"]),  # type: ignore[arg-type]
        )

    # ---- evaluation --------------------------------------------------------------------------------------------------

    def evaluation(
        self,
        figures: Mapping[str, Mapping[str, Any]],
        *,
        epoch: int,
        step: int,
        rate: float,
        train: Means,
        seconds: float,
    ) -> bool:
        """Log an evaluation; True if it is the best so far.

        Args:
            figures: `Evaluation.figures` by split; the best is chosen on "val" where it is there, else on the reported
                one.
            epoch, step: how many are done.
            rate: learning rate of the last step.
            train: means over the epoch's training batches.
            seconds: of the run so far.
        """
        test = figures[self.reported]
        self.chosen_on = "val" if "val" in figures else self.reported
        self.last = {
            "epoch": epoch,
            "step": step,
            "ensemble_acc1": test["ensemble_acc1"],
            "ensemble_acc5": test["ensemble_acc5"],
            "acc1": test["acc1"],
            "extra": dict(test.get("extra", {})),
            "criterion": figures[self.chosen_on]["ensemble_acc1"],
        }
        tested = _by_classifier(test)
        for name, value in _by_classifier(figures[self.chosen_on]).items():
            if value is not None and value > self.own_best.get(name, {"criterion": -1.0})["criterion"]:
                self.own_best[name] = {"epoch": epoch, "acc1": tested[name], "criterion": value}
        is_best = self.best is None or self.last["criterion"] > self.best["criterion"]
        if is_best or self.best is None:
            self.best = self.last
        best_acc1 = self.best["ensemble_acc1"]
        self.log.write_metrics({"kind": "eval", "epoch": epoch, "step": step, "best_acc1": best_acc1, **figures})
        train_acc1 = train.get("acc1", [])
        assert isinstance(train_acc1, list)
        figures_of_all = {name: value for name, value in test.items() if isinstance(value, float)}
        self.log.write_summary(
            {
                **figures_of_all,
                **self.last,
                "learning_rate": rate,
                **{f"acc1_{i + 1}": value for i, value in enumerate(test["acc1"])},
                "best_acc1": best_acc1,
                "train_loss": train.get("loss", math.nan),
                "train_acc1": sum(train_acc1) / len(train_acc1) if train_acc1 else math.nan,
                "seconds": seconds,
            }
        )
        self.log.scalars(
            "val",
            {
                **figures_of_all,
                "avg_acc1": test["ensemble_acc1"],
                "avg_acc5": test["ensemble_acc5"],
                "acc1": test["acc1"],
                "best_acc1": best_acc1,
                "learning_rate": rate,
                **{f"train_{name}": value for name, value in train.items() if isinstance(value, float)},
            },
            epoch,
        )
        extra = "".join(f", {name} {value:.2f}" for name, value in test.get("extra", {}).items())
        logger.info(
            "epoch %d evaluated: ensemble %.2f %%, networks %s%s; best ensemble %.2f %% (epoch %d)",
            epoch,
            test["ensemble_acc1"],
            " ".join(f"{value:.2f}" for value in test["acc1"]),
            extra,
            best_acc1,
            self.best["epoch"],
        )
        return is_best

    def state_dict(self) -> dict[str, Any]:
        """Plain values for a checkpoint."""
        return {
            "last": self.last,
            "best": self.best,
            "own_best": self.own_best,
            "chosen_on": self.chosen_on,
            "log": self.log.positions(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Inverse of `state_dict`, but for the places in the logs, which are `RunLog.rewind`'s."""
        self.last, self.best, self.chosen_on = state["last"], state["best"], state["chosen_on"]
        self.own_best = dict(state.get("own_best", {}))  # absent in checkpoints of earlier versions

    def forget_best(self) -> None:
        """Count the best epoch anew, because its weights are gone or it lies after a place gone back to."""
        self.best, self.own_best = None, {}

    def results(self) -> dict[str, Any]:
        """Last and best figures for the JSON object that a run ends with; accuracies in percent.

        `best` is the epoch of the best ensemble, for all; `own_best` is each classifier's own best epoch: of network
        "1" ... "S", and by name of the classifiers beside the networks.
        """
        assert self.last is not None
        assert self.best is not None
        return {
            "ensemble_acc1": self.last["ensemble_acc1"],
            "ensemble_acc5": self.last["ensemble_acc5"],
            "acc1": self.last["acc1"],
            "best_ensemble_acc1": self.best["ensemble_acc1"],
            "best_acc1": self.best["acc1"],
            "best_epoch": self.best["epoch"],
            "best_chosen_on": self.chosen_on,
            "reported_on": self.reported,
            "last": self.last,
            "best": self.best,
            "own_best": self.own_best,
        }


def _by_classifier(figures: Mapping[str, Any]) -> dict[str, float | None]:
    """Top-1 of network "1" ... "S", and by name of the classifiers beside them."""
    return {str(i): value for i, value in enumerate(figures["acc1"], 1)} | dict(figures.get("extra", {}))

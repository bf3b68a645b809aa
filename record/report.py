"""What a run says about itself while it goes on, and the figures it keeps: last and best evaluation, time, images."""

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from record.epoch_line import EpochLine, TimeLeft, duration
from record.logger import RunLog
from record.screen import Bar

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
            self.count()
            self._began = None

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Count the time of a block inside of `training` not at all; the clock is right within it."""
        is_training = self._began is not None
        if is_training:
            self.wait()  # or the block would, and what the steps before it take would be nobody's
        self.count()
        try:
            yield
        finally:
            if is_training:
                self._began = time.perf_counter()

    @contextmanager
    def counted(self) -> Iterator[None]:
        """Go on counting in a block; the clock is right at its beginning."""
        self.count()
        yield

    def count(self) -> None:
        """Count what has passed of a block until now; the clock is right then."""
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
        losses: how many networks' losses the training loss is the sum of.
    """

    def __init__(
        self,
        log: RunLog,
        *,
        epochs: int,
        steps_per_epoch: int,
        visible: bool,
        reported: str = "test",
        losses: int = 1,
    ) -> None:
        self.log = log
        self.epochs = epochs
        self.steps_per_epoch = steps_per_epoch
        self.visible = visible
        self.losses = losses
        self.last: dict[str, Any] | None = None
        self.best: dict[str, Any] | None = None
        self.own_best: dict[str, dict[str, Any]] = {}
        self.reported = self.chosen_on = reported
        self._bar = Bar(visible=False)
        self._note = ""
        self._time = TimeLeft()
        self._batch = 0

    # ---- training ----------------------------------------------------------------------------------------------------

    @contextmanager
    def running(self, *, left: int) -> Iterator[None]:
        """A bar for the whole run, where somebody watches; `left`: steps that are still to be done."""
        self._bar = Bar(visible=self.visible)
        self._time = TimeLeft(left)
        try:
            yield
        finally:
            self._bar.close()
            self._bar = Bar(visible=False)

    def step(self, *, epoch: int, batch: int, done: int, left: int) -> None:
        """One batch is done.

        Args:
            epoch: counted from 0.
            batch: batches done of it.
            done, left: batches of the run that are done, and that are to be done.
        """
        self._batch = batch
        self._time.left = left
        if self._bar.is_due():
            note = ", ".join(filter(None, (self._note, self._time.text())))
            self._bar.draw(f"epoch {epoch + 1}/{self.epochs}", done / max(done + left, 1), note)

    def interval(self, *, epoch: int, step: int, batch: int, rate: float, means: Means, speed: Means) -> None:
        """The means over a print interval.

        Args:
            epoch, step, batch: of the interval's last batch, counted from 0.
            rate: learning rate.
            means: losses and accuracies by name; `acc1` is a list over the networks.
            speed: images_per_second, and data_wait: share of the time spent waiting for data.
        """
        numbers = {"learning_rate": rate, **means, "loss_per_network": self._per_network(means), **speed}
        self.log.write_metrics({"kind": "train", "epoch": epoch + self.log.first_epoch, "step": step, **numbers})
        self.log.scalars("train", numbers, step)
        accuracies = means["acc1"]
        assert isinstance(accuracies, list)
        loss, total = f"loss {numbers['loss_per_network']:.4f}", ""
        if self.losses > 1:
            loss, total = f"{loss} (per network)", f"sum {means['loss']:.4f}"
        parts = [f"{k} {v:.4f}" for k, v in means.items() if k.startswith("loss_") and isinstance(v, float)]
        top1 = f"top-1 {' '.join(f'{value:.2f}' for value in accuracies)} %"
        images = f"{speed['images_per_second']:.0f} images/s"
        self._note = f"{loss}, {images}"
        logger.info(
            "epoch %d/%d step %d/%d  %s  %s  lr %.5f | %s, waiting for data %.0f %%",
            epoch + 1,
            self.epochs,
            batch + 1,
            self.steps_per_epoch,
            "  ".join(filter(None, (loss, total, *parts))),
            top1,
            rate,
            images,
            100 * float(speed["data_wait"]),  # type: ignore[arg-type]
            extra={"in_bar": True},
        )

    def _per_network(self, means: Means) -> float:
        """The training loss of one network, their mean; NaN where no batch was trained on."""
        loss = means.get("loss", math.nan)
        assert isinstance(loss, float)
        return loss / self.losses

    def epoch_ended(self, *, epoch: int, rate: float, train: Means, evaluated: bool = False) -> None:
        """The one line of an epoch.

        Args:
            epoch: whole epochs that are done.
            rate: learning rate of the last step.
            train: means over the epoch's training batches.
            evaluated: the last evaluation belongs to it.
        """
        partly = self._batch % self.steps_per_epoch
        title = f"epoch {epoch}/{self.epochs}"
        if partly:
            title = f"epoch {epoch + 1}/{self.epochs} ({partly} of {self.steps_per_epoch} steps)"
        line = EpochLine(
            title=title,
            loss=self._per_network(train),
            several=self.losses > 1,
            rate=rate,
            evaluated=self.last if evaluated else None,
            best=self.best,
            reported=self.reported,
            chosen_on=self.chosen_on,
            seconds=duration(self._time.lap()),
            left=self._time.text(),
        )
        forms = line.forms()
        logger.info("%s", forms[0], extra={"forms": forms})

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
        trained = {"train_loss": train.get("loss", math.nan), "train_loss_per_network": self._per_network(train)}
        evaluated = flat_figures(figures, self.reported)
        self.last = {
            **evaluated,
            **trained,
            "epoch": epoch,
            "step": step,
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
        splits = {name: {**split, **_networks_loss(split)} for name, split in figures.items()}
        record = {"kind": "eval", "epoch": epoch, "step": step, "best_acc1": best_acc1}
        self.log.write_metrics({**record, **trained, **splits})
        train_acc1 = train.get("acc1", [])
        assert isinstance(train_acc1, list)
        self.log.write_summary(
            {
                **self.last,
                "learning_rate": rate,
                **{f"acc1_{i + 1}": value for i, value in enumerate(test["acc1"])},
                "best_acc1": best_acc1,
                "train_acc1": sum(train_acc1) / len(train_acc1) if train_acc1 else math.nan,
                "seconds": seconds,
            }
        )
        self.log.scalars(
            "val",
            {
                **{f"eval/{name}": value for name, value in evaluated.items()},
                # the published tags
                "avg_acc1": test["ensemble_acc1"],
                "avg_acc5": test["ensemble_acc5"],
                "acc1": test["acc1"],
                "best_acc1": best_acc1,
                "learning_rate": rate,
                "train_loss_per_network": trained["train_loss_per_network"],
                **{f"train_{name}": value for name, value in train.items() if isinstance(value, float)},
            },
            epoch,
        )
        self.epoch_ended(epoch=epoch, rate=rate, train=train, evaluated=True)
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
        own = {name: value for name, value in self.last.items() if name not in ("epoch", "step", "extra", "criterion")}
        return {
            **own,
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


def flat_figures(figures: Mapping[str, Mapping[str, Any]], reported: str) -> dict[str, float | None]:
    """The figures of an evaluation by the names that they have everywhere: in results.json, logs and pictures.

    Those of the reported split have the names of `Evaluation.figures`, and `loss`: the networks' mean NLL. Those of the
    ensemble on a second split have its name in front: `val_ensemble_acc1`.
    """
    found = {**_single(figures[reported]), **_networks_loss(figures[reported])}
    for name, split in figures.items():
        if name != reported:
            ensemble = {k: value for k, value in _single(split).items() if k.startswith("ensemble_")}
            found |= {f"{name}_{k}": value for k, value in {**ensemble, **_networks_loss(split)}.items()}
    return found


def _single(split: Mapping[str, Any]) -> dict[str, float | None]:
    """Figures that are one number; None is one that is not finite."""
    return {name: value for name, value in split.items() if value is None or isinstance(value, float)}


def _networks_loss(split: Mapping[str, Any]) -> dict[str, float | None]:
    """`loss`: the mean of the networks' NLL, beside which a training loss per network stands."""
    losses = split.get("nll")
    if not losses:
        return {}
    return {"loss": None if None in losses else math.fsum(losses) / len(losses)}

"""The state of a run: written into a checkpoint, read back, and held against the flags of the run that goes on.

The keys of a checkpoint are `record.checkpoint.Checkpoint`; this module fills them and reads them.
"""

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from dataset import DataSource
from method import Method
from model.registry import request_of
from model.restore import plain_keys, published_keys
from record.checkpoint import FORMAT_VERSION, Checkpoint
from record.report import Reporter, RunClock
from training.guard import NonfiniteGuard
from training.meters import MeanMeter
from training.optim import WeightAverage, in_order
from utils import distributed
from utils.errors import UserError, reason
from utils.launch import World
from utils.precision import Precision

logger = logging.getLogger(__name__)

# flags that a resumed run must have as the run before it
KEPT_FLAGS = ("arch", "split_factor", "divide_by", "method", "dataset", "optimizer")


@dataclass
class Position:
    """Where training stands: the next epoch, the next batch in it, batches done in all. All count from 0."""

    epoch: int = 0
    batch: int = 0
    step: int = 0


@dataclass(frozen=True, kw_only=True)
class RunState:
    """The parts of a run whose state a checkpoint holds.

    Attributes:
        flags: every flag's value, as plain data.
        seed: of the run.
        data: what is trained on.
        position: where training stands.
        method, optimizer, scaler, average, guard: what is trained, and with what; no average without --ema_decay.
        meter, epoch_meter: means over the print interval and over the epoch.
        clock, report: time, and the figures so far.
        precision, world: how and where the run computes.
    """

    flags: Mapping[str, Any]
    seed: int
    data: DataSource
    position: Position
    method: Method[Any]
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    average: WeightAverage | None
    guard: NonfiniteGuard
    meter: MeanMeter
    epoch_meter: MeanMeter
    clock: RunClock
    report: Reporter
    precision: Precision
    world: World

    def environment(self) -> dict[str, Any]:
        """What must stay the same for a resumed run to be the same bit for bit."""
        return {
            "threads": torch.get_num_threads(),
            "execution": self.method.network.execution,
            "world_size": self.world.world_size,
            "precision": self.precision.name,
            "device": self.world.device.type,
        }

    def gather(self) -> Checkpoint | None:
        """All that a resumed run needs to go on bit for bit, and that eval.py needs to load.

        Every process takes part; the one that writes gets the checkpoint, the others None.
        """
        self.method.synchronise()
        meters = distributed.gather_values(
            {"interval": self.meter.state_dict(), "epoch": self.epoch_meter.state_dict()}
        )
        if not self.world.is_main:
            return None
        network, best, position = self.method.network, self.report.best, self.position
        state: Checkpoint = {
            "epoch": position.epoch,
            "arch": self.flags["arch"],
            "widths": list(request_of(network.models[0]).widths or ()),
            "state_dict": published_keys(network.state_dict()),
            "best_acc1": best["ensemble_acc1"] if best else 0.0,
            "optimizer": self.optimizer.state_dict(),
            "method": self.method.training_state(),
            "rng": {"seed": self.seed},
            "sampler": {"epoch": position.epoch, "batch": position.batch, "step": position.step},
            "config": dict(self.flags),
            "classes": list(self.data.classes),
            "mean": list(self.data.mean),
            "std": list(self.data.std),
            "crop_size": self.flags["crop_size"],
            "data_recipe": self.data.recipe,
            "report": self.report.state_dict(),
            "meters": meters,
            "clock": self.clock.state_dict(),
            "guard": self.guard.state_dict(),
            "environment": self.environment(),
            "format_version": FORMAT_VERSION,
        }
        if self.precision.scaler:
            state["scaler"] = self.scaler.state_dict()
        if self.average is not None:
            state["ema"] = published_keys(self.average.state_dict())
        return state

    def restore(self, state: Checkpoint) -> None:
        """Inverse of `gather`.

        Raises:
            UserError: the checkpoint holds no run, or that of other flags.
        """
        try:
            self._check_flags(state["config"])
            self._check_environment(state["environment"])
            network = self.method.network
            network.load_state_dict(plain_keys(state["state_dict"]))
            self.optimizer.load_state_dict(self._in_order_of_today(state))
            self.method.load_training_state(state["method"])
            if self.precision.scaler and "scaler" in state:
                self.scaler.load_state_dict(state["scaler"])
            if self.average is not None and "ema" in state:
                self.average.load_state_dict(plain_keys(state["ema"]))
            position, place = self.position, state["sampler"]
            position.epoch, position.batch, position.step = (int(place[key]) for key in ("epoch", "batch", "step"))
            self._restore_meters(state["meters"])
            self.clock.load_state_dict(state["clock"])
            self.guard.load_state_dict(state["guard"])
            self.report.load_state_dict(state["report"], epoch=position.epoch, step=position.step)
        except UserError:
            raise
        except (KeyError, ValueError, TypeError, AttributeError, RuntimeError) as error:
            raise UserError(
                f"--resume: the checkpoint holds no run of these flags to go on with ({reason(error)[:200]}). "
                "Use --pretrained for its weights alone."
            ) from None

    def _in_order_of_today(self, state: Checkpoint) -> dict[str, Any]:
        """The optimiser's state; a checkpoint's tensors stand in the order that its networks' had."""
        names = {id(parameter): name for name, parameter in self.method.trained_parameters()}
        groups = [[names[id(parameter)] for parameter in group["params"]] for group in self.optimizer.param_groups]
        now = self.method.network.state_dict()
        order = [[f"network.{key}" for key in keys] for keys in (plain_keys(state["state_dict"]), now)]
        return in_order(state["optimizer"], groups, then=order[0], now=order[1])

    def _check_flags(self, before: Mapping[str, Any]) -> None:
        for name in KEPT_FLAGS:
            if before.get(name) != self.flags[name]:
                raise UserError(
                    f"--resume: the checkpoint is of a run with --{name} {before.get(name)}, "
                    f"and this one has --{name} {self.flags[name]}."
                )

    def _check_environment(self, before: Mapping[str, Any]) -> None:
        torch.set_num_threads(min(before["threads"], os.cpu_count() or 1))
        for name, value in self.environment().items():
            if before.get(name, value) != value:
                logger.warning("So far %s was %s, now it is %s: the last bits will differ.", name, before[name], value)

    def _restore_meters(self, meters: list[Any]) -> None:
        """Each process its own; where their number has changed, the main one takes all."""
        if len(meters) == self.world.world_size:
            meters = [meters[self.world.rank]]
        elif not self.world.is_main:
            meters = []
        self.meter.load_state_dict(*(part["interval"] for part in meters))
        self.epoch_meter.load_state_dict(*(part["epoch"] for part in meters))


def execution_before(resumed: Checkpoint) -> str | None:
    """How the networks of the run before were run, where its checkpoint says so."""
    return resumed.get("environment", {}).get("execution")


def seed_before(resumed: Checkpoint) -> int | None:
    """The seed of the run before."""
    return resumed.get("rng", {}).get("seed")


def has_ended(resumed: Checkpoint, *, epochs: int | None, max_steps: int | None, default_epochs: int) -> bool:
    """Whether a checkpoint is the end of a run of this length.

    Args:
        epochs: as the user set it, or None: that of the run before.
        max_steps: as the user set it.
        default_epochs: for a checkpoint that does not say.
    """
    wanted = epochs if epochs is not None else resumed.get("config", {}).get("epochs", default_epochs)
    return resumed.get("epoch", 0) >= wanted or (max_steps is not None and steps_before(resumed) >= max_steps)


def steps_before(resumed: Checkpoint) -> int:
    """How many batches the run before has trained on."""
    return int(resumed.get("sampler", {}).get("step", 0))

"""The learning rate of every iteration, as a pure function of its number."""

import math
from dataclasses import dataclass

from utils.errors import UserError
from utils.registry import nearest_name

ITERATION_MODES = ("cos", "step", "poly", "HTD", "exponential", "linear")
EPOCH_MODES = ("epoch_cos", "epoch_step")
MODES = ITERATION_MODES + EPOCH_MODES


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Linear warm-up, then one of the published curves (arXiv:2011.14660; `linear` is Cream's), never below a floor.

    With t the iteration, W and T the iterations of warm-up and training, x = (t - W) / (T - W):

        t <= W > 0   slow_start_lr + (base_lr - slow_start_lr) · t / W
        cos          base_lr · (1 + cos(πx)) / 2
        poly         base_lr · (1 - x)^0.9
        linear       base_lr · (1 - x)
        HTD          base_lr · (1 - tanh(9x - 6)) / 2
        step         base_lr · step_multiplier^(milestones passed), counted from epoch 0, warm-up included
        exponential  base_lr · decay_factor^((t - W) / (decay_epochs · steps_per_epoch)), exponent rounded down

    The epoch modes are those of Cream's retraining (Peng et al., NeurIPS 2020): constant within an epoch e, decaying
    from epoch 0 on, with a warm-up over e < slow_start_epochs that the floor does not touch:

        epoch_cos    end_lr + (base_lr - end_lr) · (1 + cos(π · min(e / decay_epochs, 1))) / 2
        epoch_step   base_lr · decay_factor^(e / decay_epochs), exponent rounded down

    Attributes:
        mode: one of MODES.
        base_lr: learning rate at the end of the warm-up.
        epochs, steps_per_epoch: length of training; beyond it the rate stays where it ended.
        slow_start_epochs: length of the warm-up in epochs; 0 or less: none.
        slow_start_lr: where the warm-up starts.
        end_lr: floor at every iteration, those of the warm-up included.
        milestones, step_multiplier: epochs and factor of `step`.
        decay_factor, decay_epochs: of `exponential` and `epoch_step`; of `epoch_cos` the length in epochs, after
            which the rate stays at end_lr.
        staircase: without it the exponent of `exponential` is not rounded.

    Raises:
        UserError: unknown mode, or a length or interval that is not positive.
    """

    mode: str
    base_lr: float
    epochs: int
    steps_per_epoch: int
    slow_start_epochs: int = 0
    slow_start_lr: float = 5e-3
    end_lr: float = 0.0
    milestones: tuple[int, ...] = ()
    step_multiplier: float = 0.1
    decay_factor: float = 0.97
    decay_epochs: float = 0.8
    staircase: bool = True

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise UserError(
                f"--lr_mode {self.mode!r} is not a known schedule.{nearest_name(self.mode, MODES)} "
                f"Known: {', '.join(MODES)}."
            )
        if self.epochs < 1 or self.steps_per_epoch < 1:
            raise UserError(
                f"--epochs must be 1 or more and an epoch must have a step, "
                f"got {self.epochs} epochs of {self.steps_per_epoch} steps."
            )
        if self.decay_epochs <= 0:
            raise UserError(f"--decay_epochs must be above 0, got {self.decay_epochs}.")

    def __call__(self, step: int) -> float:
        """Learning rate of iteration `step`, counted from 0 over the whole training."""
        if self.mode in EPOCH_MODES:
            return self._of_epoch(step // self.steps_per_epoch)
        warm_up = max(self.slow_start_epochs, 0) * self.steps_per_epoch
        if step <= warm_up and warm_up > 0:
            rate = self.slow_start_lr + (self.base_lr - self.slow_start_lr) * step / warm_up
        else:
            rate = self.base_lr * self._decay(step, warm_up)
        return max(rate, self.end_lr)

    def _of_epoch(self, epoch: int) -> float:
        """Learning rate of all iterations of an epoch, in the epoch modes."""
        if epoch < self.slow_start_epochs:
            return self.slow_start_lr + epoch * (self.base_lr - self.slow_start_lr) / self.slow_start_epochs
        if self.mode == "epoch_step":
            return max(self.base_lr * self.decay_factor ** math.floor(epoch / self.decay_epochs), self.end_lr)
        x = min(epoch / self.decay_epochs, 1.0)
        return self.end_lr + 0.5 * (self.base_lr - self.end_lr) * (1 + math.cos(math.pi * x))

    def _decay(self, step: int, warm_up: int) -> float:
        """Factor on the base rate after the warm-up."""
        if self.mode == "step":
            epoch = step // self.steps_per_epoch
            return self.step_multiplier ** sum(epoch >= milestone for milestone in self.milestones)
        if self.mode == "exponential":
            passed = (step - warm_up) / (self.decay_epochs * self.steps_per_epoch)
            return self.decay_factor ** (math.floor(passed) if self.staircase else passed)
        x = min((step - warm_up) / max(self.epochs * self.steps_per_epoch - warm_up, 1), 1.0)
        if self.mode == "cos":
            return 0.5 * (1 + math.cos(math.pi * x))
        if self.mode == "poly":
            return (1 - x) ** 0.9
        if self.mode == "linear":
            return 1 - x
        return 0.5 * (1 - math.tanh(9 * x - 6))

"""The learning rate of every iteration, as a pure function of its number."""

import math
from dataclasses import dataclass

from training.options import EPOCH_MODES, OptimizerOptions


@dataclass(frozen=True)
class Schedule:
    """Linear warm-up, then one of the published curves (arXiv:2011.14660; `linear` is Cream's), never below a floor.

    With t the iteration, W and T the iterations of warm-up and training, x = (t - W) / (T - W):

        t <= W > 0   slow_start_lr + (base_lr - slow_start_lr) · t / W
        cos          base_lr · (1 + cos(πx)) / 2
        poly         base_lr · (1 - x)^0.9
        linear       base_lr · (1 - x)
        HTD          base_lr · (1 - tanh(9x - 6)) / 2
        step         base_lr · lr_step_multiplier^(milestones passed), counted from epoch 0, warm-up included
        cycles       base_lr · (1 + cos(π ((t - W) mod C) / C)) / 2, C = ⌈(T - W) / lr_cycles⌉ (arXiv:1704.00109, eq. 2)
        exponential  base_lr · decay_factor^((t - W) / (decay_epochs · steps_per_epoch)), exponent rounded down

    The epoch modes are those of Cream's retraining (Peng et al., NeurIPS 2020): constant within an epoch e, decaying
    from epoch 0 on, with a warm-up over e < slow_start_epochs that the floor does not touch:

        epoch_cos    end_lr + (base_lr - end_lr) · (1 + cos(π · min(e / decay_epochs, 1))) / 2
        epoch_step   base_lr · decay_factor^(e / decay_epochs), exponent rounded down

    base_lr is --lr; the other names are flags too. Beyond the last epoch the rate stays where it ended.

    Attributes:
        options: the flags.
        steps_per_epoch: 1 or more.
        staircase: without it the exponent of `exponential` is not rounded.
    """

    options: OptimizerOptions
    steps_per_epoch: int
    staircase: bool = True

    def __call__(self, step: int) -> float:
        """Learning rate of iteration `step`, counted from 0 over the whole training."""
        options = self.options
        if options.lr_mode in EPOCH_MODES:
            return self._of_epoch(step // self.steps_per_epoch)
        warm_up = max(options.slow_start_epochs, 0) * self.steps_per_epoch
        if step <= warm_up and warm_up > 0:
            rate = options.slow_start_lr + (options.lr - options.slow_start_lr) * step / warm_up
        else:
            rate = options.lr * self._decay(step, warm_up)
        return max(rate, options.end_lr)

    def _of_epoch(self, epoch: int) -> float:
        """Learning rate of all iterations of an epoch, in the epoch modes."""
        options = self.options
        if epoch < options.slow_start_epochs:
            return options.slow_start_lr + epoch * (options.lr - options.slow_start_lr) / options.slow_start_epochs
        if options.lr_mode == "epoch_step":
            return max(options.lr * options.decay_factor ** math.floor(epoch / options.decay_epochs), options.end_lr)
        x = min(epoch / options.decay_epochs, 1.0)
        return options.end_lr + 0.5 * (options.lr - options.end_lr) * (1 + math.cos(math.pi * x))

    def _decay(self, step: int, warm_up: int) -> float:
        """Factor on the base rate after the warm-up."""
        options = self.options
        if options.lr_mode == "step":
            epoch = step // self.steps_per_epoch
            return options.lr_step_multiplier ** sum(epoch >= milestone for milestone in options.lr_milestones)
        if options.lr_mode == "exponential":
            passed = (step - warm_up) / (options.decay_epochs * self.steps_per_epoch)
            return options.decay_factor ** (math.floor(passed) if self.staircase else passed)
        if options.lr_mode == "cycles":
            steps = options.epochs * self.steps_per_epoch
            cycle = math.ceil(max(steps - warm_up, 1) / options.lr_cycles)
            # beyond the last epoch the rate stays where it ended
            return 0.5 * (1 + math.cos(math.pi * ((min(step, steps - 1) - warm_up) % cycle) / cycle))
        x = min((step - warm_up) / max(options.epochs * self.steps_per_epoch - warm_up, 1), 1.0)
        if options.lr_mode == "cos":
            return 0.5 * (1 + math.cos(math.pi * x))
        if options.lr_mode == "poly":
            return (1 - x) ** 0.9
        if options.lr_mode == "linear":
            return 1 - x
        return 0.5 * (1 - math.tanh(9 * x - 6))

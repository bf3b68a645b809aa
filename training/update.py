"""The update of the weights, after the last backward pass of an accumulation group."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from training.guard import NonfiniteGuard
from training.optim import WeightAverage, clip_gradients, guarded_step


@dataclass(frozen=True, kw_only=True)
class WeightUpdate:
    """What follows a backward pass: judge it, clip, step, average. A non-finite step changes nothing, without a sync.

    Attributes:
        network: whose buffers and moving average are kept.
        parameters: all that are trained.
        optimizer: over them, from `build_optimizer`.
        scaler: of fp16 gradients; disabled otherwise.
        guard: notes non-finite steps.
        average: moving average of the network, if any.
        clip_grad: largest global norm of the gradient; None: no limit.
        restores_buffers: a non-finite step leaves the network's buffers as `snapshot` found them.
    """

    network: nn.Module
    parameters: Sequence[nn.Parameter]
    optimizer: Optimizer
    scaler: torch.amp.GradScaler
    guard: NonfiniteGuard
    average: WeightAverage | None
    clip_grad: float | None
    restores_buffers: bool

    def snapshot(self) -> list[Tensor]:
        """Copies of the network's buffers before a forward pass, as far as they may have to be restored."""
        return [buffer.clone() for buffer in self.network.buffers()] if self.restores_buffers else []

    def __call__(self, loss: Tensor, logits_SBK: Tensor, step: Tensor, before: Sequence[Tensor]) -> None:
        """One update from the gradients that lie in the parameters, which it then drops.

        Args:
            loss: scalar.
            logits_SBK: of this step; only used to name the networks of a non-finite one.
            step: int64 scalar, its number.
            before: from `snapshot`.
        """
        scaled = self.scaler.is_enabled()
        if scaled:
            self.scaler.unscale_(self.optimizer)
        norm = clip_gradients(self.parameters, self.clip_grad)
        # fp16 overflows now and then by design, and its scaler skips those steps: there only the loss is judged.
        bad = self.guard.judge(loss.detach() if scaled else norm, logits_SBK, step)
        if scaled:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        else:
            guarded_step(self.optimizer, bad)
        self.optimizer.zero_grad(set_to_none=True)
        if before:
            for buffer, old in zip(self.network.buffers(), before, strict=True):
                buffer.copy_(torch.where(bad > 0, old, buffer))
        if self.average is not None:
            self.average.update(self.network)

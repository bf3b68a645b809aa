"""Shake-Shake and ShakeDrop: random scales of residual branches, drawn anew for the backward pass.

Draws stay on the device: nothing waits for it. They are made in float32 whatever the dtype of the features, so one
seed gives the same draws under autocast.
"""

from typing import Any

import torch
from torch import Tensor

from model.layers.random import RandomLayer


class _ScaleTwice(torch.autograd.Function):
    """features * forward_scale, whose gradient is multiplied by backward_scale instead."""

    generate_vmap_rule = True

    @staticmethod
    def forward(features: Tensor, forward_scale: Tensor, backward_scale: Tensor) -> Tensor:
        return features * forward_scale

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[2])

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor, None, None]:
        (backward_scale,) = ctx.saved_tensors
        return grad_outputs[0] * backward_scale, None, None


def scale_twice(features: Tensor, forward_scale: Tensor, backward_scale: Tensor) -> Tensor:
    """Multiply features by one scale in the forward pass and their gradient by another in the backward pass.

    Args:
        features: any shape and floating dtype; the result has both.
        forward_scale, backward_scale: broadcastable to `features`; no gradient flows into them.
    """
    return _ScaleTwice.apply(features, forward_scale.to(features.dtype), backward_scale.to(features.dtype))


class ShakeShake(RandomLayer):
    """Random convex combination of two branches (Gastaldi, arXiv:1705.07485: "shake-shake-image").

    Training: a * branch1 + (1 - a) * branch2 with a ~ U[0, 1] per image, and an independent draw in the backward
    pass. Evaluation: the mean.
    """

    def forward(self, branch1_BCHW: Tensor, branch2_BCHW: Tensor) -> Tensor:
        """Two maps [B, C, H, W] -> one of that shape."""
        if not self.training:
            return (branch1_BCHW + branch2_BCHW) / 2
        return self.combine(branch1_BCHW, branch2_BCHW, *self.draw(branch1_BCHW))

    def combine(self, *tensors: Tensor) -> Tensor:
        branch1, branch2, forward_scale, backward_scale = tensors
        return scale_twice(branch1, forward_scale, backward_scale) + scale_twice(
            branch2, 1 - forward_scale, 1 - backward_scale
        )

    def draw(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Shares of the first branch in the forward and in the backward pass, float32 [B, 1, 1, 1] each."""
        forward_B111, backward_B111 = self.uniform((2, len(features), 1, 1, 1), features.device)
        return forward_B111, backward_B111


class ShakeDrop(RandomLayer):
    """Random scale of a residual branch (Yamada et al., arXiv:1802.02375; alpha ~ U[-1, 1], beta ~ U[0, 1]).

    Training: with probability 1 - p, one gate for the whole batch, the branch passes unchanged; otherwise it is
    multiplied by alpha per image in the forward pass and by beta per image in the backward pass.
    Evaluation: multiplied by 1 - p, which the released weights expect (the mean of the training gate).

    Args:
        drop_prob: p.
    """

    def __init__(self, drop_prob: float) -> None:
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, features_BCHW: Tensor) -> Tensor:
        """[B, C, H, W] -> the same shape."""
        if not self.training:
            return features_BCHW * (1 - self.drop_prob)
        return self.combine(features_BCHW, *self.draw(features_BCHW))

    def combine(self, *tensors: Tensor) -> Tensor:
        return scale_twice(*tensors)

    def draw(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Scales of the forward and of the backward pass, float32 [B, 1, 1, 1] each."""
        count = len(features)
        numbers = self.uniform((1 + 2 * count,), features.device)
        passes = numbers[0] >= self.drop_prob
        alpha_B111, beta_B111 = numbers[1:].reshape(2, count, 1, 1, 1)
        return (2 * alpha_B111 - 1).masked_fill(passes, 1), beta_B111.masked_fill(passes, 1)

    def extra_repr(self) -> str:
        return f"drop_prob={self.drop_prob:.4g}"

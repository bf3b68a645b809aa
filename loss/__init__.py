"""Losses: pure functions of tensors that give one value per image, in float32 or better and in log space.

Shapes: S networks, B images, K classes. Weights, warm-ups and means over the batch belong to the methods.
"""

import torch
from torch import Tensor


def at_least_float32(values: Tensor) -> Tensor:
    """The same values in float32, or in float64 if they came so: any shape, whatever autocast says."""
    return values.to(torch.promote_types(values.dtype, torch.float32))

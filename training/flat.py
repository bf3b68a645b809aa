"""Tensors of one type side by side in one, so that an operation on all of them is one."""

from collections.abc import Sequence

import torch
from torch import Tensor

ALIGNED = 32  # elements: wherever a part begins, vectors of every processor do


class Flat:
    """Room for tensors like those of a list, of one type and on one device.

    Args:
        like: their shapes, and the order in which their elements lie.
        value: what it is filled with.

    Attributes:
        whole: one-dimensional; between the parts there is room for alignment.
        parts: views of it, in the order of `like`.
    """

    def __init__(self, like: Sequence[Tensor], value: float = 0.0) -> None:
        starts = [0]
        for tensor in like:
            starts.append(starts[-1] + -(-tensor.numel() // ALIGNED) * ALIGNED)
        first = like[0]
        self.whole = torch.full((starts[-1],), value, dtype=first.dtype, device=first.device)
        self.parts = [
            # the strides of a copy: dense, in the order of the tensor's own
            self.whole.as_strided(tensor.shape, tensor.detach().to("meta").stride(), start)
            for tensor, start in zip(like, starts, strict=False)
        ]

    def of(self, places: Sequence[int]) -> list[Tensor]:
        """The parts of these."""
        return [self.parts[i] for i in places]

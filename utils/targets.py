"""What a batch should be classified as."""

from typing import NamedTuple

from torch import Tensor


class Targets(NamedTuple):
    """Labels, and with mixup a second set of them. Without mixup `labels_other_B is labels_B` and `lam` is 1.

    labels_B, labels_other_B: int64 [B]; lam: float32 scalar tensor, the weight of `labels_B`.
    """

    labels_B: Tensor
    labels_other_B: Tensor
    lam: Tensor


def plain_targets(labels_B: Tensor) -> Targets:
    """Targets without mixup."""
    return Targets(labels_B, labels_B, labels_B.new_ones((), dtype=labels_B.dtype).float())

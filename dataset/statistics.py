"""Mean and standard deviation of the pixels of a data set, per channel."""

from collections.abc import Iterable

import numpy as np
from torch import Tensor

from recipe.datasets import Statistic
from utils.errors import UserError


def pixel_statistics(chunks_N3HW: Iterable[Tensor]) -> tuple[Statistic, Statistic]:
    """Mean and population standard deviation on the scale [0, 1] of uint8 images [n, 3, H, W], given in chunks.

    They follow from exact counts of the 256 values. A channel without any contrast gets 1/255 instead of 0, so that
    dividing by it is harmless.

    Raises:
        UserError: there is not one pixel.
    """
    counts = np.zeros((3, 256), dtype=np.int64)
    for chunk_N3HW in chunks_N3HW:
        for channel in range(3):
            counts[channel] += np.bincount(chunk_N3HW[:, channel].numpy().ravel(), minlength=256)
    if not counts.any():
        raise UserError("No training image can be read, so their mean and deviation cannot be measured. Check --data.")
    values = np.arange(256) / 255
    mean_C = counts @ values / counts.sum(axis=1)
    std_C = np.sqrt((counts * (values - mean_C[:, None]) ** 2).sum(axis=1) / counts.sum(axis=1))
    mean, std = mean_C.tolist(), np.maximum(std_C, 1 / 255).tolist()
    return (mean[0], mean[1], mean[2]), (std[0], std[1], std[2])

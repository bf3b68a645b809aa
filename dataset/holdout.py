"""--val_fraction: a class-balanced part of the training set, kept for choosing the best epoch. Ours."""

import numpy as np
import torch
from torch import Tensor

from utils.errors import UserError


def split_indices(targets_N: Tensor, fraction: float, generator: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Indices (int64, ascending) of the images that stay in training and of those held out.

    Of a class with n images round(fraction * n) are held out, but at least one, and never all; a class with a single
    image keeps it.

    Raises:
        UserError: no class has two images.
    """
    targets = targets_N.numpy()
    held = np.zeros(len(targets), dtype=bool)
    for label in np.unique(targets):
        members = np.flatnonzero(targets == label)
        count = min(max(round(fraction * len(members)), 1), len(members) - 1)
        held[generator.permutation(members)[:count]] = True
    if not held.any():
        raise UserError(f"--val_fraction {fraction} needs a class with two training images or more, and there is none.")
    return torch.from_numpy(np.flatnonzero(~held)), torch.from_numpy(np.flatnonzero(held))

"""Parts of images that come without a split: which one an image belongs to is a hash of its name. Ours.

So an image stays in its part when others are added, on every machine, for every seed.
"""

import hashlib
import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from utils.errors import UserError


def hash_of(part: str, name: bytes) -> int:
    """64 bits: the first eight bytes, most significant first, of SHA-256 of the part's name, a zero byte, the name."""
    return int.from_bytes(hashlib.sha256(part.encode() + b"\0" + name).digest()[:8], "big")


def draw_parts(names: Sequence[bytes], targets_N: Tensor, fractions: Mapping[str, float]) -> dict[str, Tensor]:
    """Indices (int64, ascending) of the images of every part, and of "train": those that no part takes.

    The parts are drawn in their order, each from what those before it left. An image is in a part if hash / 2^64 is
    below its fraction. A class that has two images or more left and would give none gives the one of the lowest hash;
    one that would give all keeps the one of the highest.

    Args:
        names: of the N images, relative to their data set, folders separated by "/".
        targets_N: int64 class indices.
        fractions: part -> fraction in (0, 1); one of 0 takes nothing.

    Raises:
        UserError: a part gets no image, as every class has one left at most.
    """
    targets = targets_N.numpy()
    left = np.arange(len(names))
    parts: dict[str, Tensor] = {}
    for part, fraction in fractions.items():
        if not fraction:
            continue
        hashes = np.array([hash_of(part, names[i]) for i in left.tolist()], dtype=np.uint64)
        below = hashes < np.uint64(math.ceil(fraction * 2**64))
        order = np.lexsort((left, hashes, targets[left]))  # by class, then by hash
        _, first, sizes = np.unique(targets[left][order], return_index=True, return_counts=True)
        taken = np.add.reduceat(below[order], first) if len(order) else sizes
        for start, size, count in zip(first.tolist(), sizes.tolist(), taken.tolist(), strict=True):
            if size == 1:
                below[order[start]] = False
            elif count == 0:
                below[order[start]] = True
            elif count == size:
                below[order[start + size - 1]] = False
        if not below.any():
            raise UserError(
                f"No image can be held out for {part}: no class has two images or more. Add images, or a folder "
                f"{part}/ of its own."
            )
        parts[part] = torch.from_numpy(left[below])
        left = left[~below]
    return {"train": torch.from_numpy(left), **parts}

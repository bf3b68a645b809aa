"""The one random seed, and numbers that are pure functions of it.

Nothing random in a run depends on how many workers or processes it has, or on where it was interrupted:
every draw is a function of (seed, what it is for, epoch, position in the epoch's global order, view).
"""

import math
import secrets
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

# What a stream of draws is for. The numbers are part of the results: never renumber.
STREAM_ORDER = 1  # the epoch's order of images
STREAM_VIEW = 2  # augmentation parameters
STREAM_MIXUP = 3  # mixup's lambda and permutation
STREAM_STEP = 4  # random layers (dropout, shake, drop) of one training step
STREAM_INIT = 5  # initial weights
STREAM_SPLIT = 6  # --val_fraction
STREAM_SAMPLER = 7  # class-balanced and other special samplers
STREAM_METHOD = 8  # whatever a method draws for itself
STREAM_DATA = 9  # synthetic images
STREAM_PEERS = 22  # which peers a step learns from
STREAM_SLICE = 30  # which of a parent's channels a divided network takes
STREAM_MIX_KIND = 20  # whether a step is CutMix or mixup
STREAM_CUTMIX = 21  # CutMix's box

# SplitMix64 (Steele, Lea and Flood, OOPSLA 2014): the step of its counter, and the factors of its finaliser.
GOLDEN = 0x9E3779B97F4A7C15
FIRST_FACTOR, SECOND_FACTOR = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
OF_VIEW = 0xD1342543DE82EF95  # ours: what keeps an image's views, and a key's streams, apart
_MASK = 0xFFFFFFFFFFFFFFFF


def draw_seed() -> int:
    """A fresh seed from the operating system, 0 <= seed < 2^31."""
    return secrets.randbelow(2**31)


def _mix(z: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser, elementwise on uint64."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(FIRST_FACTOR)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(SECOND_FACTOR)
    return z ^ (z >> np.uint64(31))


def fold_in(*parts: int) -> int:
    """One 63-bit key out of several integers; changing any part gives an unrelated key."""
    key = np.zeros(1, dtype=np.uint64)
    for part in parts:
        key = _mix((key ^ _mix(np.array([int(part) & _MASK], dtype=np.uint64) + np.uint64(GOLDEN))) + np.uint64(GOLDEN))
    return int(key[0] >> np.uint64(1))


def counter_uniform(key: int, positions_B: np.ndarray, views_S: np.ndarray, num_slots: int) -> np.ndarray:
    """Independent uniform numbers addressed by (key, position, view, slot): float64 [S, B, num_slots] in [0, 1).

    Args:
        key: from `fold_in`.
        positions_B: int64 [B], positions in the epoch's global order.
        views_S: int64 [S], numbers of the views.
        num_slots: how many numbers each (view, position) needs.
    """
    positions = np.asarray(positions_B, dtype=np.int64).astype(np.uint64)[None, :, None]
    views = np.asarray(views_S, dtype=np.int64).astype(np.uint64)[:, None, None]
    slots = np.arange(1, num_slots + 1, dtype=np.uint64)[None, None, :]
    stream = _mix(np.uint64(key) + positions * np.uint64(GOLDEN))
    stream = _mix(stream ^ ((views + np.uint64(1)) * np.uint64(OF_VIEW)))
    bits = _mix(stream + slots * np.uint64(GOLDEN))
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def signed(value: int) -> int:
    """A 64-bit pattern as the signed number that torch takes."""
    return value - 2**64 if value >= 2**63 else value


def mix_on_device(z: Tensor) -> Tensor:
    """SplitMix64's finaliser on int64, which multiplies as uint64 does, and whose shifts copy the sign bit."""
    z = (z ^ ((z >> 30) & (2**34 - 1))) * signed(FIRST_FACTOR)
    z = (z ^ ((z >> 27) & (2**37 - 1))) * signed(SECOND_FACTOR)
    return z ^ ((z >> 31) & (2**33 - 1))


def counter_uniform_on_device(key: int, positions_B: Tensor, num_slots: int) -> Tensor:
    """`counter_uniform` of view 0, bit for bit, on the device of `positions_B` (int64): float64 [B, num_slots]."""
    slots = torch.arange(1, num_slots + 1, device=positions_B.device)
    stream_B = mix_on_device(key + positions_B * signed(GOLDEN))
    stream_B = mix_on_device(stream_B ^ signed(OF_VIEW))
    bits = mix_on_device(stream_B[:, None] + slots * signed(GOLDEN))
    return ((bits >> 11) & (2**53 - 1)).double() * 2.0**-53


def stream_uniform(key: Tensor, stream: int, shape: Sequence[int]) -> Tensor:
    """Uniform numbers, a pure function of (key, stream, place): float32 `shape` in [0, 1), on the key's device.

    The key stays on its device and may change there between two replays of a captured graph. The numbers are the same
    on every device, in eager mode and compiled.

    Args:
        key: int64 scalar.
        stream: number of the stream of draws under this key.
    """
    places = torch.arange(1, math.prod(shape) + 1, device=key.device)
    bits = mix_on_device(places * signed(GOLDEN) + (key + signed(stream * OF_VIEW & _MASK)))
    # 24 bits: what float32 holds
    return (((bits >> 40) & (2**24 - 1)).float() * 2.0**-24).reshape(*shape)


def numpy_generator(*parts: int) -> np.random.Generator:
    """A NumPy generator (Philox) of its own for the given parts, e.g. (seed, STREAM_ORDER, epoch)."""
    return np.random.Generator(np.random.Philox(key=fold_in(*parts)))


def torch_generator(*parts: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A torch generator of its own for the given parts."""
    return torch.Generator(device=device).manual_seed(fold_in(*parts))

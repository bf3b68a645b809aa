"""Which channels of an undivided parent each of S divided networks keeps. Ours."""

from __future__ import annotations

import numpy as np

from utils.seed import STREAM_SLICE, counter_uniform, fold_in

Indices = np.ndarray  # int64 [C'], ascending: which of the parent's channels a network keeps


def permutation(seed: int, number: int, channels: int) -> Indices:
    """Permutation `number` of 0 … `channels` - 1, a function of its arguments alone."""
    key = fold_in(seed, STREAM_SLICE, number, channels)
    uniform = counter_uniform(key, np.arange(channels), np.zeros(1, dtype=np.int64), 1)[0, :, 0]
    return np.argsort(uniform, kind="stable")


def kept_channels(seed: int, network: int, parent: int, child: int) -> Indices:
    """The channels of a dimension of `parent` channels that network number `network` (from 0) keeps, ascending.

    Raises:
        ValueError: the child has more.
    """
    if child > parent:
        raise ValueError(f"{child} channels from {parent}")
    if child == parent:
        return np.arange(parent)
    per_permutation = max(1, parent // child)
    number, part = divmod(network, per_permutation)
    return np.sort(permutation(seed, number, parent)[part * child : (part + 1) * child])


def shared_part(kept: list[Indices]) -> float:
    """Part of a dimension's channels that two networks have in common, the mean over pairs of networks."""
    sets = [set(one.tolist()) for one in kept]
    pairs = [(a, b) for i, a in enumerate(sets) for b in sets[:i]]
    return sum(len(a & b) / len(a) for a, b in pairs) / len(pairs)

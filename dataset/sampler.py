"""Which image comes when, and on which process."""

import logging
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from utils.errors import UserError
from utils.seed import STREAM_ORDER, STREAM_SAMPLER, numpy_generator

logger = logging.getLogger(__name__)


def shard(size: int, rank: int, world_size: int) -> slice:
    """The contiguous part of `size` things that belongs to a process; parts differ by one at most (np.array_split)."""
    base, extra = divmod(size, world_size)
    start = rank * base + min(rank, extra)
    return slice(start, start + base + (rank < extra))


@dataclass(frozen=True)
class Shuffled:
    """The ordinary sampler. (A bound method of the loader would tie the loader to itself, and it would not be freed,
    nor its workers stopped, when it goes out of use.)"""

    size: int
    seed: int

    def __call__(self, epoch: int) -> np.ndarray:
        return numpy_generator(self.seed, STREAM_ORDER, epoch).permutation(self.size)


@dataclass(frozen=True)
class Repeated:
    """Repeated augmentation (Hoffer et al., arXiv:1901.09335): each image of an order so many times in a row, as far as
    the order is long. Each time it has its views of its own. What timm's `RepeatAugSampler` gives all processes
    together, but for the end of an epoch, which that cuts to a multiple of 256 images."""

    order: Callable[[int], np.ndarray]
    times: int

    def __call__(self, epoch: int) -> np.ndarray:
        order_N = self.order(epoch)
        return np.repeat(order_N[: -(-len(order_N) // self.times)], self.times)[: len(order_N)]


class EquallyLikelyClasses:
    """N draws with replacement for N images, each of a class that is as likely as any other, and of an image of it that
    is as likely as any other of the class: drawn from (seed, STREAM_SAMPLER, 1, epoch). Ours; classes without images
    are none."""

    def __init__(self, targets_N: Tensor, seed: int) -> None:
        targets = targets_N.numpy()
        self._members = np.argsort(targets, kind="stable")
        _, self._first, self._sizes = np.unique(targets[self._members], return_index=True, return_counts=True)
        self._seed = seed

    def __call__(self, epoch: int) -> np.ndarray:
        generator = numpy_generator(self._seed, STREAM_SAMPLER, 1, epoch)
        class_N = generator.integers(0, len(self._sizes), len(self._members))
        return self._members[self._first[class_N] + generator.integers(0, self._sizes[class_N])]


class ClassBalancedSampler:
    """`class_balanced_order` of every epoch, drawn from (seed, STREAM_SAMPLER, epoch): a sampler for `TrainLoader`.

    Raises:
        UserError: as `images_per_class`.
    """

    def __init__(self, targets_N: Tensor, *, batch_size: int, seed: int, per_class: int = 2) -> None:
        self._targets_N, self._batch_size, self._seed, self._per_class = targets_N, batch_size, seed, per_class
        used = images_per_class(len(targets_N.unique()), batch_size, per_class)
        if used == batch_size and used != per_class:
            logger.warning(
                "class-balanced batches of %d are of one class, without negatives: give another --batch_size",
                batch_size,
            )
        elif used != per_class:
            logger.info("class-balanced batches of %d hold %d images of a class, not %d", batch_size, used, per_class)

    def __call__(self, epoch: int) -> np.ndarray:
        generator = numpy_generator(self._seed, STREAM_SAMPLER, epoch)
        return class_balanced_order(
            self._targets_N, batch_size=self._batch_size, per_class=self._per_class, generator=generator
        )


def images_per_class(num_classes: int, batch_size: int, per_class: int) -> int:
    """The smallest divisor of the batch, from `per_class` up, with which the classes fill a batch.

    Raises:
        UserError: the batch is smaller than `per_class`.
    """
    if batch_size < per_class:
        raise UserError(f"--batch_size {batch_size} is too small for class-balanced batches: give {per_class} or more.")
    divisors = (m for m in range(per_class, batch_size + 1) if batch_size % m == 0)
    return next(m for m in divisors if m * num_classes >= batch_size)


def class_balanced_order(
    targets_N: Tensor, *, batch_size: int, per_class: int = 2, generator: np.random.Generator
) -> np.ndarray:
    """Indices of floor(N / batch_size) batches, one at the least, of m images of each of batch_size / m random classes.

    m = `images_per_class`; the m images are distinct (with replacement only where a class has fewer than m) and stand
    side by side. Batches are independent of each other. The sampler of L-MCL (arXiv:2207.11518), int64 [batches *
    batch_size].

    Raises:
        UserError: as `images_per_class`.
    """
    targets = targets_N.numpy()
    classes, sizes = np.unique(targets, return_counts=True)
    m = images_per_class(len(classes), batch_size, per_class)
    num_batches = max(1, len(targets) // batch_size)
    every_class = np.tile(np.arange(len(classes)), (num_batches, 1))
    group_G = generator.permuted(every_class, axis=1)[:, : batch_size // m].ravel()

    # Floyd's choice of m out of n without replacement, for all groups at once: draw from a range that grows by one, and
    # take its new last element where the draw is taken already
    size_G = sizes[group_G]
    picks_GM = np.empty((len(group_G), m), dtype=np.int64)
    for j in range(m):
        last_G = size_G - m + j
        draw_G = generator.integers(0, np.maximum(last_G, 0) + 1)
        taken_G = (picks_GM[:, :j] == draw_G[:, None]).any(axis=1)
        picks_GM[:, j] = np.where(taken_G, last_G, draw_G)
    too_few_G = size_G < m
    picks_GM[too_few_G] = generator.integers(0, size_G[too_few_G, None], (int(too_few_G.sum()), m))

    members = np.argsort(targets, kind="stable")
    first = np.cumsum(sizes) - sizes
    return members[first[group_G][:, None] + picks_GM].ravel()

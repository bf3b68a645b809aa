"""Draws are pure functions of their address, and look uniform."""

import numpy as np
import torch

from utils.seed import STREAM_ORDER, STREAM_VIEW, counter_uniform, draw_seed, fold_in, numpy_generator, torch_generator


def test_numbers_depend_on_their_address_only() -> None:
    key = fold_in(7, STREAM_VIEW, 3)
    whole = counter_uniform(key, np.arange(100), np.arange(4), 6)
    part = counter_uniform(key, np.array([42, 17]), np.array([2]), 6)
    assert np.array_equal(part[0], whole[2, [42, 17]])
    assert np.array_equal(counter_uniform(key, np.arange(100), np.arange(4), 3), whole[..., :3])


def test_every_part_of_the_address_matters() -> None:
    base = counter_uniform(fold_in(7, 2, 3), np.arange(50), np.arange(2), 4)
    assert not np.isin(base[0], base[1]).any()
    for other in (fold_in(8, 2, 3), fold_in(7, 1, 3), fold_in(7, 2, 4), fold_in(7, 2)):
        assert not np.isin(base, counter_uniform(other, np.arange(50), np.arange(2), 4)).any()


def test_uniform_in_mean_variance_and_bins() -> None:
    numbers = counter_uniform(fold_in(1), np.arange(5000), np.arange(4), 10).ravel()
    assert ((numbers >= 0) & (numbers < 1)).all()
    assert abs(numbers.mean() - 0.5) < 4 * np.sqrt(1 / 12 / numbers.size)
    counts, _ = np.histogram(numbers, bins=64, range=(0, 1))
    expected = numbers.size / 64
    assert ((counts - expected) ** 2 / expected).sum() < 110  # chi-square, 63 degrees, p about 2e-4
    neighbours = np.corrcoef(numbers[:-1], numbers[1:])[0, 1]
    assert abs(neighbours) < 0.01


def test_fold_in_is_stable() -> None:
    # stored runs depend on these values: a change breaks every --resume
    assert fold_in(0) != fold_in(1)
    assert fold_in(1, 2) != fold_in(2, 1)
    assert 0 <= fold_in(2**62, -1) < 2**63
    assert fold_in(5, STREAM_ORDER, 0) == fold_in(5, STREAM_ORDER, 0)


def test_generators() -> None:
    assert np.array_equal(numpy_generator(1, 2).permutation(20), numpy_generator(1, 2).permutation(20))
    assert torch.equal(torch.rand(5, generator=torch_generator(3)), torch.rand(5, generator=torch_generator(3)))
    assert not torch.equal(torch.rand(5, generator=torch_generator(3)), torch.rand(5, generator=torch_generator(4)))


def test_drawn_seeds_differ() -> None:
    assert len({draw_seed() for _ in range(20)}) == 20

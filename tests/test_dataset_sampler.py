"""Repeated augmentation: which images come how often, as timm's sampler has it, for any number of processes."""

from collections import Counter

import numpy as np
import pytest
import torch

from dataset import DataSource, ImageSet
from dataset.options import DataOptions
from dataset.pipeline import build_train_loader
from dataset.sampler import Repeated, Shuffled
from utils.errors import UserError
from utils.launch import World


def source(images: int) -> DataSource:
    split = ImageSet(
        targets=torch.arange(images) % 4,
        images=torch.arange(images, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 8, 8).contiguous(),
    )
    statistics = {"mean": (0.5, 0.5, 0.5), "std": (1.0, 1.0, 1.0)}
    return DataSource(
        name="folder",
        recipe="cifar10",
        classes=("a", "b", "c", "d"),
        crop_size=8,
        train=split,
        test=split,
        **statistics,
    )


def order_of(epoch: int, *, world_size: int = 1, images: int = 22, sampler: str = "shuffled", **flags: object):
    """Indices of the images in an epoch, all processes' batches one after another."""
    options = DataOptions(batch_size=6, crop_size=8, workers=0, **flags)
    shards = []
    for rank in range(world_size):
        world = World(rank, world_size, rank, world_size, torch.device("cpu"))
        loader = build_train_loader(source(images), options, world, num_views=1, seed=3, sampler=sampler)
        shards.append([batch.indices_B for batch in loader.epoch(epoch)])
    return torch.cat([part for parts in zip(*shards, strict=True) for part in parts]).tolist()


@pytest.mark.parametrize("times", [2, 3, 5])
def test_repeats_are_timms(times: int) -> None:
    samplers = pytest.importorskip("timm.data.distributed_sampler")
    for world_size in (1, 2):
        parts = [
            [
                *samplers.RepeatAugSampler(
                    range(20), world_size, rank, shuffle=False, num_repeats=times, selected_round=0
                )
            ]
            for rank in range(world_size)
        ]
        theirs = [index for group in zip(*parts, strict=True) for index in group]
        assert Repeated(lambda epoch: np.arange(20), times)(0).tolist() == theirs


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_an_epoch_takes_fewer_images_each_several_times(world_size: int) -> None:
    seen = order_of(1, world_size=world_size, repeats=3)
    assert len(seen) == 18
    assert seen == np.repeat(Shuffled(22, 3)(1)[:6], 3).tolist()
    assert seen == order_of(1, repeats=3)
    assert order_of(2, repeats=3) != seen


def test_one_repeat_changes_nothing() -> None:
    assert order_of(0) == Shuffled(22, 3)(0)[:18].tolist() == order_of(0, repeats=1)


def test_repeats_go_with_equally_likely_classes() -> None:
    plain, repeated = order_of(0, sampler="shuffled"), order_of(0, repeats=2)
    assert Counter(Counter(repeated).values()) == {2: 9}
    assert len(plain) == len(repeated)
    balanced = DataOptions(batch_size=6, crop_size=8, workers=0, repeats=2, sampler="balanced")
    world = World(0, 1, 0, 1, torch.device("cpu"))
    loader = build_train_loader(source(22), balanced, world, num_views=1, seed=3)
    order = torch.cat([batch.indices_B for batch in loader.epoch(0)]).tolist()
    assert order[::2] == order[1::2]


def test_repeated_images_have_views_of_their_own() -> None:
    world = World(0, 1, 0, 1, torch.device("cpu"))
    options = DataOptions(batch_size=6, crop_size=8, workers=0, repeats=3)
    loader = build_train_loader(source(22), options, world, num_views=1, seed=3)
    batch = next(iter(loader.epoch(0)))
    assert len(set(batch.positions_B.tolist())) == 6  # what views are drawn by


def test_a_method_that_makes_its_own_batches_takes_no_repeats() -> None:
    with pytest.raises(UserError, match="--repeats 2: this method puts its batches together itself"):
        order_of(0, sampler="class_balanced", repeats=2)

"""Loaders for a data source, by the row of the published recipes that it takes."""

import torch

from dataset import DataSource, ImageSet
from dataset.loader import ClassBalancedSampler, EvalLoader, ResizedCropSpec, TrainLoader
from utils.seed import STREAM_SAMPLER, fold_in

RESIZE_FACTOR = 1.15  # evaluation of large images: the short side is this times the crop, rounded down


def build_train_loader(
    source: DataSource,
    *,
    crop_size: int,
    batch_size: int,
    num_views: int,
    seed: int,
    rank: int,
    world_size: int,
    device: torch.device,
    workers: int,
    sampler: str = "shuffled",
    on_bad_image: str = "fail",
) -> TrainLoader:
    """Training batches: images in memory come whole, files as random resized crops, one per view (area 0.1 to 1).

    Args:
        source: the data set.
        crop_size: side of the network's input in pixels.
        batch_size: images per step over all processes.
        num_views: V.
        sampler: "shuffled", or "class_balanced" (L-MCL).
        seed, rank, world_size, device, workers, on_bad_image: as in `TrainLoader`.

    Raises:
        UserError: too few images for the batch size, the sampler or the number of processes.
    """
    order = None
    if sampler == "class_balanced":
        order = ClassBalancedSampler(source.train.targets, batch_size=batch_size, seed=fold_in(seed, STREAM_SAMPLER))
    return TrainLoader(
        source.train,
        batch_size=batch_size,
        num_views=num_views,
        seed=seed,
        rank=rank,
        world_size=world_size,
        device=device,
        workers=workers,
        crop=ResizedCropSpec(size=crop_size) if source.train.images is None else None,
        sampler=order,
        on_bad_image=on_bad_image,
    )


def build_eval_loader(
    split: ImageSet,
    *,
    crop_size: int,
    batch_size: int,
    rank: int,
    world_size: int,
    device: torch.device,
    workers: int,
    enlarge: bool = True,
    on_bad_image: str = "fail",
) -> EvalLoader:
    """Every image of a split once, un-augmented; files are resized and cut to their central `crop_size` pixels.

    Args:
        split: images in memory, or files.
        crop_size: side of the network's input in pixels.
        batch_size: images per step and process.
        rank, world_size, device, workers, on_bad_image: as in `EvalLoader`.
        enlarge: the short side of a file becomes int(1.15 * crop_size), as on ImageNet; else `crop_size`.
    """
    in_memory = split.images is not None
    return EvalLoader(
        split,
        batch_size=batch_size,
        rank=rank,
        world_size=world_size,
        device=device,
        workers=workers,
        resize=None if in_memory else int(RESIZE_FACTOR * crop_size) if enlarge else crop_size,
        crop=None if in_memory else crop_size,
        on_bad_image=on_bad_image,
    )

"""Loaders for a data source, by the row of the published recipes that it takes."""

import torch

from dataset import DataSource, ImageSet
from dataset.cut import ResizedCropSpec
from dataset.loader import EvalLoader, TrainLoader
from dataset.sampler import ClassBalancedSampler
from utils.errors import UserError
from utils.seed import STREAM_SAMPLER, fold_in

RESIZE_FACTOR = 1.15  # evaluation of large images: the short side is this times the crop, rounded down


def eval_resize(crop_size: int, crop_pct: float | None = None) -> int:
    """Short side, in pixels, to which evaluation resizes a large image before its centre is cut out.

    Args:
        crop_size: side of the cut in pixels.
        crop_pct: side of the cut over the short side; None: 1 / RESIZE_FACTOR.
    """
    return int(RESIZE_FACTOR * crop_size) if crop_pct is None else int(crop_size / crop_pct)


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
    crop_area: tuple[float, ...] = (0.1, 1.0),
    drop_last: bool = True,
) -> TrainLoader:
    """Training batches: images in memory come whole, files as random resized crops, one per view.

    Args:
        source: the data set.
        crop_size: side of the network's input in pixels.
        batch_size: images per step over all processes.
        num_views: V.
        sampler: "shuffled", or "class_balanced" (L-MCL).
        seed, rank, world_size, device, workers, on_bad_image: as in `TrainLoader`.
        crop_area: smallest and largest part of a file that a crop covers.
        drop_last: leave an incomplete last batch out, as in `TrainLoader`.

    Raises:
        UserError: too few images for the batch size, the sampler or the number of processes, or an incomplete batch
            that the sampler does not make.
    """
    order = None
    if sampler == "class_balanced":
        if not drop_last:
            raise UserError("--drop_last 0: class-balanced batches are all complete; leave the flag away.")
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
        crop=ResizedCropSpec(size=crop_size, area=(crop_area[0], crop_area[1]))
        if source.train.images is None
        else None,
        sampler=order,
        drop_last=drop_last,
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
    on_bad_image: str = "fail",
    crop_pct: float | None = None,
) -> EvalLoader:
    """Every image of a split once, un-augmented; files are resized as `eval_resize` says and cut to their centre.

    Args:
        split: images in memory, or files.
        crop_size: side of the network's input in pixels.
        batch_size: images per step and process.
        rank, world_size, device, workers, on_bad_image: as in `EvalLoader`.
        crop_pct: as in `eval_resize`.
    """
    in_memory = split.images is not None
    return EvalLoader(
        split,
        batch_size=batch_size,
        rank=rank,
        world_size=world_size,
        device=device,
        workers=workers,
        resize=None if in_memory else eval_resize(crop_size, crop_pct),
        crop=None if in_memory else crop_size,
        on_bad_image=on_bad_image,
    )

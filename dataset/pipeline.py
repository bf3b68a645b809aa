"""Loaders for a data source, by the row of the published recipes that it takes."""

from collections.abc import Callable

import numpy as np

from dataset import DataSource, ImageSet
from dataset.cut import ResizedCropSpec
from dataset.loader import EvalLoader, TrainLoader
from dataset.options import DataOptions
from dataset.sampler import ClassBalancedSampler, EquallyLikelyClasses, Repeated, Shuffled
from recipe.datasets import ROWS
from recipe.preprocessing import Preprocessing, eval_resize
from utils.errors import UserError
from utils.launch import World
from utils.seed import STREAM_SAMPLER, fold_in


def evaluation_preprocessing(source: DataSource, options: DataOptions) -> Preprocessing:
    """What evaluation and prediction do with an image file, as every checkpoint of a run says it.

    Small images are brought to their size when the data is opened, so nothing is cut off them.
    """
    crop, is_large = options.crop_size, ROWS[source.recipe].is_large
    return Preprocessing(
        resize=eval_resize(crop, options.crop_pct) if is_large else crop,
        interpolation=options.eval_interpolation,
        crop=crop,
        mean=source.mean,
        std=source.std,
    )


def build_train_loader(
    source: DataSource,
    options: DataOptions,
    world: World,
    *,
    num_views: int,
    seed: int,
    sampler: str = "shuffled",
    first_view: int = 0,
) -> TrainLoader:
    """Training batches: images in memory come whole, files as random resized crops, one per view.

    Args:
        source: the data set.
        options: the flags; --batch_size counts the images of a node.
        world: which part of a batch this process takes, and where it goes.
        num_views: V.
        seed: of the order and of the crops.
        sampler: what the method asks for: "shuffled", where --sampler decides, or "class_balanced" (L-MCL).
        first_view: number of the first of these views among all that are made of an image.

    Raises:
        UserError: too few images for the batch size, the sampler or the number of processes, or an incomplete batch
            that the sampler does not make.
    """
    batch_size = options.batch_size * world.num_nodes
    order: Callable[[int], np.ndarray] = Shuffled(len(source.train), seed)
    if sampler == "class_balanced":
        if options.sampler != "shuffled":
            raise UserError(
                f"--sampler {options.sampler}: this method puts its batches together itself, of several images of a "
                "class each. Leave the flag away."
            )
        if options.repeats > 1:
            raise UserError(
                f"--repeats {options.repeats}: this method puts its batches together itself; leave it away."
            )
        if not options.drop_last:
            raise UserError("--drop_last 0: class-balanced batches are all complete; leave the flag away.")
        order = ClassBalancedSampler(source.train.targets, batch_size=batch_size, seed=fold_in(seed, STREAM_SAMPLER))
    elif options.sampler == "balanced":
        order = EquallyLikelyClasses(source.train.targets, seed)
    if options.repeats > 1:
        order = Repeated(order, options.repeats)
    smallest, largest = options.crop_area
    crop = ResizedCropSpec(size=options.crop_size, area=(smallest, largest), interpolation=options.crop_interpolation)
    return TrainLoader(
        source.train,
        batch_size=batch_size,
        num_views=num_views,
        seed=seed,
        rank=world.shard,
        world_size=world.num_shards,
        device=world.device,
        workers=options.workers,
        crop=crop if source.train.images is None else None,
        sampler=order,
        drop_last=options.drop_last,
        on_bad_image=options.on_bad_image,
        first_view=first_view,
    )


def build_eval_loader(
    split: ImageSet,
    options: DataOptions,
    world: World,
    *,
    resize: int | None = None,
    batch_size: int | None = None,
) -> EvalLoader:
    """Every image of a split once, un-augmented; files are resized as `eval_resize` says and cut to their centre.

    Args:
        split: images in memory, or files.
        options: the flags.
        world: which part of the split this process takes, and where it goes.
        resize: short side of files in pixels, in place of what the flags say.
        batch_size: images of a batch, in place of what the flags say.
    """
    in_memory = split.images is not None
    return EvalLoader(
        split,
        batch_size=batch_size or options.eval_batch_size,
        rank=world.shard,
        world_size=world.num_shards,
        device=world.device,
        workers=options.workers,
        resize=None if in_memory else resize or eval_resize(options.crop_size, options.crop_pct),
        crop=None if in_memory else options.crop_size,
        interpolation=options.eval_interpolation,
        on_bad_image=options.on_bad_image,
    )

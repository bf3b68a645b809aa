"""A data set of the user's: DIR/train/<class>/* and DIR/val/<class>/* (or DIR/test). Ours."""

import contextlib
import hashlib
import itertools
import json
import logging
import os
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from dataset import DataSource, ImageSet, SourceRequest, names_hash, sources
from dataset.class_folders import find_folders, iterate_images, list_images
from dataset.decode import BadImage, read_size
from dataset.loader import EvalLoader
from dataset.statistics import Statistic, pixel_statistics
from recipe.datasets import ROWS, open_row
from utils.errors import UserError

logger = logging.getLogger(__name__)

PROBE = 100  # images that decide which it is
SAMPLE = 2000  # files that the statistics of large images are measured on
MANY = 5000  # files that are worth starting workers for
CHUNK = 256  # files read at once
STATISTICS_FILE = "folder_statistics.json"


@sources.register("folder")
def open_folder(request: SourceRequest) -> DataSource:
    """Images of a user's own, small ones in memory, large ones as files.

    Small, by `recipe.datasets.open_row`, is the median of the short sides of the first 100 images, and --crop_size
    where given. Small images are brought to squares of --crop_size, else of that median, by `resize_crop` (which leaves
    images of just that size alone).

    Mean and standard deviation are measured on the training images: all of the small ones, or 2,000 evenly spaced
    large ones, cut as in validation. They are kept in `request.cache_dir` for the same files. Where training images are
    not asked for, the published constants of the recipe stand in.

    Raises:
        UserError: as `find_folders` and `list_images`; no image can be read.
        RunError: an unreadable image, under --on_bad_image fail.
    """
    folders, classes = find_folders(request, evaluation=("val", "test"))
    side = _short_side(folders.values(), classes, request.root)
    recipe = open_row(max(side, request.crop_size or 0))
    row = ROWS[recipe]
    crop_size = request.crop_size or (row.side if row.is_large else side)

    files = {split: list_images(folders[split], classes) for split in request.splits}
    bad_images: dict[Path, str] = {}
    splits = files
    if not row.is_large:
        splits = {s: _decode(f, classes, crop_size, request, bad_images) for s, f in files.items()}
    if "train" in splits:
        key = _fingerprint(files["train"].paths, crop_size)
        mean, std = _cached(request.cache_dir, key, lambda: _measure(splits["train"], crop_size, request))
    else:
        mean, std = row.published_statistics
    return DataSource(
        name="folder",
        recipe=recipe,
        classes=classes,
        mean=mean,
        std=std,
        crop_size=crop_size,
        train=splits.get("train", ImageSet.empty()),
        test=splits.get("test", ImageSet.empty()),
        bad_images=bad_images,
        names=names_hash(files["train"].paths) if "train" in files else "",
    )


def _short_side(folders: Iterable[Path], classes: tuple[str, ...], root: Path) -> int:
    """Lower median of the short sides of the first images, in the first folder that has readable ones."""
    for folder in folders:
        sides: list[int] = []
        for path in itertools.islice((p for name in classes for p in iterate_images(folder / name)), PROBE):
            with contextlib.suppress(BadImage):
                sides.append(min(read_size(path)))
        if sides:
            return statistics.median_low(sides)
    raise UserError(f"--data {root} has no readable image among its first {PROBE}. Check its class folders.")


def _cut(files: ImageSet, resize: int, crop: int, request: SourceRequest) -> EvalLoader:
    """Reads files in order, each cut as in validation; few of them without starting workers."""
    return EvalLoader(
        files,
        batch_size=CHUNK,
        rank=0,
        world_size=1,
        device=torch.device("cpu"),
        workers=request.workers if len(files) > MANY else 0,
        resize=resize,
        crop=crop,
        on_bad_image=request.on_bad_image,
    )


def _decode(
    files: ImageSet, classes: tuple[str, ...], side: int, request: SourceRequest, bad_images: dict[Path, str]
) -> ImageSet:
    """The files as uint8 [N, 3, side, side] in memory, without those that cannot be read: these go to `bad_images`."""
    images = torch.empty((len(files), 3, side, side), dtype=torch.uint8)
    kept: list[int] = []
    loader = _cut(files, side, side, request)
    for batch in loader:
        images[len(kept) : len(kept) + len(batch.images)] = batch.images
        kept += batch.indices_B.tolist()
    targets = files.targets[kept]
    if loader.bad_images:
        bad_images.update(loader.bad_images)
        path, why = next(iter(loader.bad_images.items()))
        logger.warning(
            "--on_bad_image skip left out %d of %d files, first %s: %s", len(loader.bad_images), len(files), path, why
        )
        emptied = sorted(set(range(len(classes))) - set(targets.tolist()))
        if emptied:
            raise UserError(
                f"No image of the class {classes[emptied[0]]!r} can be read, such as {path}. Mend its files."
            )
    return ImageSet(targets=targets, images=images[: len(kept)])


def _measure(train: ImageSet, crop: int, request: SourceRequest) -> tuple[Statistic, Statistic]:
    if train.images is not None:
        return pixel_statistics(train.images.split(CHUNK))
    sample = torch.linspace(0, len(train) - 1, min(len(train), SAMPLE), dtype=torch.float64).round().long()
    loader = _cut(train.subset(sample), int(1.15 * crop), crop, request)
    return pixel_statistics(batch.images for batch in loader)


def _fingerprint(paths: tuple[Path, ...], side: int) -> str:
    """Of the file list: every path, size and time of change, and the side the images are brought to."""
    digest = hashlib.sha256(f"{side}".encode())
    for path in paths:
        digest.update(b"\0" + os.fsencode(path))
        with contextlib.suppress(OSError):  # a dangling link
            stat = path.stat()
            digest.update(f"\0{stat.st_size}\0{stat.st_mtime_ns}".encode())
    return digest.hexdigest()


def _cached(
    folder: Path | None, fingerprint: str, measure: Callable[[], tuple[Statistic, Statistic]]
) -> tuple[Statistic, Statistic]:
    if folder is None:
        return measure()
    path = folder / STATISTICS_FILE
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # none yet, or not one of ours: measure
        known = json.loads(path.read_text())
        if known["fingerprint"] == fingerprint:
            mean, std = ((float(a), float(b), float(c)) for a, b, c in (known["mean"], known["std"]))
            return mean, std
    mean, std = measure()
    with contextlib.suppress(OSError):  # a cache that cannot be written costs time, not the run
        folder.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.{os.getpid()}.part")
        partial.write_text(json.dumps({"fingerprint": fingerprint, "mean": mean, "std": std}) + "\n")
        partial.replace(path)
    return mean, std

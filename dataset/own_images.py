"""Images of a user's own, once they are listed: in parts, small or large, in memory or not, and their statistics."""

import contextlib
import hashlib
import json
import logging
import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from dataset import DataSource, ImageSet, SourceRequest, held_out_names_digest, names_hash
from dataset.decode import BadImage, read_size
from dataset.loader import EvalLoader
from dataset.parts import draw_parts
from dataset.statistics import Statistic, pixel_statistics
from recipe.datasets import ROWS, open_row
from utils.errors import UserError
from utils.text import escaped

logger = logging.getLogger(__name__)

PROBE = 100  # images, alike many of every class, that decide which it is; of more classes, one of each
SAMPLE = 2000  # files that the statistics of large images are measured on
MANY = 5000  # files that are worth starting workers for
CHUNK = 256  # files read at once
STATISTICS_FILE = "folder_statistics.json"
PART_WORDS = {"train": "training", "val": "validation", "test": "test images"}


@dataclass(frozen=True, kw_only=True)
class Listed:
    """Labelled images of a user's own, in whatever form they come: listed, and not read yet.

    Attributes:
        classes: K names.
        splits: "train", "val" and "test", those that the request needs.
        reported: which of them is evaluated and reported, "test" or "val".
        names: of the training images, held out or not, for `dataset.DataSource.names`; "" where none are asked for.
        fractions: part -> fraction, where a hash drew the parts (`dataset.parts`); empty: the split is the data's own.
        membership: part -> names of its images, where a hash drew them.
    """

    classes: tuple[str, ...]
    splits: Mapping[str, ImageSet]
    reported: str
    names: str
    fractions: Mapping[str, float] = field(default_factory=dict)
    membership: Mapping[str, Sequence[str]] = field(default_factory=dict)

    def roles(self, images: Mapping[str, ImageSet]) -> dict[str, ImageSet | None]:
        """Images by split as `dataset.DataSource` has them: train, val (what the best epoch is chosen on) and test."""
        nothing = ImageSet.empty()
        return {
            "train": images.get("train", nothing),
            "val": images.get("val") if self.reported == "test" else None,
            "test": images.get(self.reported, nothing),
        }

    def digest(self, part: str) -> str:
        """Digest of the names of a part's images; "" where the part is not there."""
        if part not in self.splits:
            return ""
        names = self.membership.get(part) or ["/".join(path.parts[-2:]) for path in self.splits[part].paths]
        return held_out_names_digest(names)

    @property
    def held_out_sha256(self) -> str:
        """That of the images that the best epoch is chosen on; "" where these are the reported ones."""
        return self.digest("val") if self.reported == "test" else ""


def draw_splits(images: ImageSet, names: Sequence[bytes], classes: tuple[str, ...], request: SourceRequest) -> Listed:
    """Images that come without a split, in parts by a hash of their names (`dataset.parts.draw_parts`); told in a line.

    Args:
        images: all of them.
        names: of each, relative to the data set.
        classes: K names.

    Raises:
        UserError: no class has two images, or a --split that was not held out.
    """
    fractions = {"test": request.test_fraction or 0.0, "val": request.val_fraction}
    fractions = {part: fraction for part, fraction in fractions.items() if fraction}
    parts = draw_parts(names, images.targets, fractions)
    reported = request.split or "test"
    if reported not in parts:
        raise UserError(f"--split {reported}: the run held none out of --data {request.root} (--val_fraction 0).")
    wanted = ("train", *fractions) if "train" in request.splits else (reported,)
    splits = {part: images.subset(parts[part]) for part in wanted if part == "train" or "test" in request.splits}
    logger.info(
        "--data %s has no split: %s by a hash of the names (%s).",
        escaped(request.root),
        ", ".join(f"{len(parts[part])} {word}" for part, word in PART_WORDS.items() if part in parts),
        ", ".join(f"--{part}_fraction {fraction:g}" for part, fraction in fractions.items()),
    )
    return Listed(
        classes=classes,
        splits=splits,
        reported=reported,
        names=names_hash(images.paths) if "train" in request.splits else "",
        fractions=fractions,
        membership={part: [escaped(os.fsdecode(names[i])) for i in chosen.tolist()] for part, chosen in parts.items()},
    )


def open_listed(listed: Listed, request: SourceRequest) -> DataSource:
    """Images of a user's own, small ones in memory, large ones as files.

    Small, by `recipe.datasets.open_row`, is the median of the short sides of a sample over all classes, and --crop_size
    where given; what was decided is told. Small images are brought to squares of --crop_size, else of that median, by
    `resize_crop` (which leaves images of just that size alone).

    Mean and standard deviation are measured on the training images: all of the small ones, or 2,000 evenly spaced
    large ones, cut as in validation. They are kept in `request.cache_dir` for the same files. Where training images are
    not asked for, the published constants of the recipe stand in.

    Raises:
        UserError: no image can be read.
        RunError: an unreadable image, under --on_bad_image fail.
    """
    classes, files = listed.classes, listed.splits
    side = 0
    if request.recipe is None or (not ROWS[request.recipe].is_large and request.crop_size is None):
        side = _short_side(files, request.root)
    recipe = request.recipe or open_row(max(side, request.crop_size or 0))
    row = ROWS[recipe]
    crop_size = request.crop_size or (row.side if row.is_large else side)
    if request.recipe is None:
        logger.info(
            "--data %s: images of %d pixels (median of the short sides in a sample over all classes): %s, input of %d "
            "pixels.",
            escaped(request.root),
            side,
            "large, read as files" if row.is_large else "small, kept in memory",
            crop_size,
        )

    bad_images: dict[Path, str] = {}
    splits: Mapping[str, ImageSet] = files
    if not row.is_large:
        splits = {s: _decode(f, s, classes, crop_size, request, bad_images) for s, f in files.items()}
    if "train" in splits:
        key = _fingerprint(files["train"], crop_size)
        mean, std = _cached(request.cache_dir, key, lambda: _measure(splits["train"], crop_size, request))
    else:
        mean, std = row.published_statistics
    images = listed.roles(splits)
    return DataSource(
        name=request.dataset,
        recipe=recipe,
        classes=classes,
        mean=mean,
        std=std,
        crop_size=crop_size,
        train=images["train"] or ImageSet.empty(),
        test=images["test"] or ImageSet.empty(),
        val=images["val"],
        reported=listed.reported,
        bad_images=bad_images,
        names=listed.names,
        fractions=listed.fractions,
        membership=listed.membership,
        held_out_sha256=listed.held_out_sha256,
        reported_sha256=listed.digest(listed.reported),
        reported_paths=() if row.is_large or listed.reported not in files else files[listed.reported].paths,
    )


def _short_side(files: Mapping[str, ImageSet], root: Path) -> int:
    """Lower median of the short sides of a sample over all classes, in the first split that has readable images."""
    for split in files.values():
        counts_K = split.targets.bincount()
        each = -(-PROBE // max(int((counts_K > 0).sum()), 1))
        ends_K = counts_K.cumsum(0)
        sides: list[int] = []
        for count, end in zip(counts_K.tolist(), ends_K.tolist(), strict=True):
            for place in range(min(each, count)):  # evenly spaced over the class
                index = end - count + place * count // min(each, count)
                with contextlib.suppress(BadImage, OSError):
                    sides.append(min(read_size(split.paths[index], split.content(index))))
        if sides:
            return statistics.median_low(sides)
    raise UserError(f"--data {root} has no readable image in a sample over all classes. Check its class folders.")


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
    files: ImageSet,
    split: str,
    classes: tuple[str, ...],
    side: int,
    request: SourceRequest,
    bad_images: dict[Path, str],
) -> ImageSet:
    """The files as uint8 [N, 3, side, side] in memory, without those that cannot be read: these go to `bad_images`."""
    decoded = request.once(lambda: _read(files, side, request))
    images, targets = decoded["images"], files.targets[decoded["kept"]]
    bad = {Path(path): why for path, why in decoded["bad"].items()}
    if bad:
        bad_images.update(bad)
        path, why = next(iter(bad.items()))
        logger.warning(
            "--on_bad_image skip left out %d of %d files, first %s: %s", len(bad), len(files), escaped(path), why
        )
        emptied = sorted(set(files.targets.tolist()) - set(targets.tolist()))
        if emptied and (split == "train" or not len(targets)):
            raise UserError(
                f"No image of the class {classes[emptied[0]]!r} can be read, such as {path}. Mend its files."
            )
        if emptied:
            logger.warning(
                "%s: no image of %d classes can be read, such as %s: evaluated on the others.",
                split,
                len(emptied),
                classes[emptied[0]],
            )
    return ImageSet(targets=targets, images=images)


def _read(files: ImageSet, side: int, request: SourceRequest) -> dict[str, Any]:
    """uint8 "images" [M, 3, side, side], int64 "kept" [M], their indices, and "bad", why a file cannot be read by path.

    Plain values and tensors, which a process can hand to others.
    """
    images = torch.empty((len(files), 3, side, side), dtype=torch.uint8)
    kept: list[int] = []
    loader = _cut(files, side, side, request)
    for batch in loader:
        images[len(kept) : len(kept) + len(batch.images)] = batch.images
        kept += batch.indices_B.tolist()
    bad = {os.fspath(path): why for path, why in loader.bad_images.items()}
    return {"images": images[: len(kept)], "kept": torch.tensor(kept, dtype=torch.int64), "bad": bad}


def _measure(train: ImageSet, crop: int, request: SourceRequest) -> tuple[Statistic, Statistic]:
    if train.images is not None:
        return pixel_statistics(train.images.split(CHUNK))
    sample = torch.linspace(0, len(train) - 1, min(len(train), SAMPLE), dtype=torch.float64).round().long()
    loader = _cut(train.subset(sample), int(1.15 * crop), crop, request)
    return pixel_statistics(batch.images for batch in loader)


def _fingerprint(images: ImageSet, side: int) -> str:
    """Of the file list: every path, size and time of change, and the side the images are brought to."""
    digest = hashlib.sha256(f"{side}".encode())
    held_in = () if images.store is None else images.store.files
    for path in (*images.paths, *held_in):
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

"""Data-set registry and what a data set is: two splits of images, class names, statistics."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Self

from recipe.datasets import ROWS, Statistic
from utils.errors import UserError
from utils.registry import Registry

if TYPE_CHECKING:  # the flags are read before torch is imported, and the names of data sets are among them
    from torch import Tensor


class Store(Protocol):
    """Encoded images that are no files of their own, but places in larger ones; travels to the decoding processes."""

    @property
    def files(self) -> Sequence[Path]:
        """The files that hold them."""

    def read(self, place: int) -> bytes:
        """One image file's content. Raises OSError."""


@dataclass(frozen=True, kw_only=True)
class ImageSet:
    """One split, either decoded in memory or as files.

    Attributes:
        targets: int64 [N] class indices.
        images: uint8 [N, 3, H, W], or None for files.
        paths: N image files in a reproducible order, or empty for images in memory. With a store, the names of its
            images, below the files that hold them.
        store: what holds the images, where they are no files of their own.
        places: int64 [N] places in it.
    """

    targets: Tensor
    images: Tensor | None = None
    paths: tuple[Path, ...] = ()
    store: Store | None = None
    places: Tensor | None = None

    def __len__(self) -> int:
        return len(self.targets)

    @classmethod
    def empty(cls) -> Self:
        """A split that was not asked for."""
        import torch

        return cls(targets=torch.empty(0, dtype=torch.int64))

    def subset(self, indices_M: Tensor) -> ImageSet:
        """The images at `indices_M` (int64 [M]), in that order."""
        return ImageSet(
            targets=self.targets[indices_M],
            images=None if self.images is None else self.images[indices_M],
            paths=tuple(self.paths[i] for i in indices_M.tolist()) if self.paths else (),
            store=self.store,
            places=None if self.places is None else self.places[indices_M],
        )

    def content(self, index: int) -> bytes | None:
        """What the store holds for an image; None for a file of its own. Raises OSError."""
        return None if self.store is None or self.places is None else self.store.read(int(self.places[index]))


def names_hash(paths: Iterable[Path]) -> str:
    """Hash of the names of images: class folder and file, wherever the data set lies; "" for none."""
    digest, any_path = hashlib.sha256(), False
    for path in paths:
        digest.update(os.fsencode("/".join(path.parts[-2:])) + b"\0")
        any_path = True
    return digest.hexdigest() if any_path else ""


def held_out_digest(images: int, held_M: Tensor) -> str:
    """SHA-256 of the number of training images and the indices held out of them, int64, least byte first."""
    import numpy as np

    numbers = [images, *held_M.tolist()]
    return hashlib.sha256(np.array(numbers, dtype="<i8").tobytes()).hexdigest()


def held_out_names_digest(names: Iterable[str]) -> str:
    """SHA-256 of names of files, sorted, each with a zero byte behind it."""
    return hashlib.sha256(b"".join(os.fsencode(name) + b"\0" for name in sorted(names))).hexdigest()


@dataclass(frozen=True, kw_only=True)
class DataSource:
    """A data set, opened.

    Attributes:
        name: the value of --dataset.
        recipe: name of the row of `recipe.datasets.ROWS` that it takes.
        classes: K class names, in the order of the targets.
        mean, std: per channel, on the scale [0, 1].
        crop_size: side of the training input in pixels where --crop_size is not given.
        train, test: the two splits; `test` is what is reported. Empty if not asked for.
        val: what the best epoch is chosen on where that is not `test`: the images of val/ beside test/, or those that
            --val_fraction holds out of `train`; else None.
        reported: what the images of `test` are called, "test" or "val".
        bad_images: files that --on_bad_image skip left out while opening, with the reason.
        names: hash of the names of all training images, held out or not; "" where images have none.
        fractions: part -> fraction, where a hash of names drew the parts (`dataset.parts`) of images without a split.
        membership: part -> names of its images, in that case.
        codes: K names of the classes as the data has them, where --class_map gave them others; else empty.
        held_out_sha256: digest of which images `val` has, `held_out_digest` or `held_out_names_digest`; "" without.
        reported_sha256: `held_out_names_digest` of the images of `test`; "" where they have no names.
        reported_paths: of the images of `test` where these are in memory and were files.
    """

    name: str
    recipe: str
    classes: tuple[str, ...]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    crop_size: int
    train: ImageSet
    test: ImageSet
    val: ImageSet | None = None
    reported: str = "test"
    bad_images: Mapping[Path, str] = field(default_factory=dict)
    names: str = ""
    fractions: Mapping[str, float] = field(default_factory=dict)
    membership: Mapping[str, Sequence[str]] = field(default_factory=dict)
    codes: tuple[str, ...] = ()
    held_out_sha256: str = ""
    reported_sha256: str = ""
    reported_paths: tuple[Path, ...] = ()

    def normalised(self, mean: Sequence[float], std: Sequence[float]) -> Self:
        """The same data with another mean and deviation [3]; an empty one leaves the data's own."""
        red, green, blue = mean or self.mean
        red_std, green_std, blue_std = std or self.std
        return dataclasses.replace(self, mean=(red, green, blue), std=(red_std, green_std, blue_std))

    @classmethod
    def of_row(
        cls,
        name: str,
        classes: tuple[str, ...],
        splits: Mapping[str, ImageSet | None],
        *,
        statistics: tuple[Statistic, Statistic] | None = None,
        names: str = "",
        reported: str = "test",
        held_out_sha256: str = "",
        reported_sha256: str = "",
    ) -> Self:
        """A data set that has a row of its own in `recipe.datasets.ROWS`.

        Args:
            classes: K names.
            splits: those that were asked for, "train" and "test", and "val" if there is one.
            statistics: mean and standard deviation, where the row has none.
            names: see the attribute.
            reported: what the images of "test" are called.
            held_out_sha256, reported_sha256: see the attributes.
        """
        row = ROWS[name]
        mean, std = statistics or row.published_statistics
        return cls(
            name=name,
            recipe=name,
            classes=classes,
            mean=mean,
            std=std,
            crop_size=row.side,
            train=splits.get("train") or ImageSet.empty(),
            test=splits.get("test") or ImageSet.empty(),
            val=splits.get("val"),
            reported=reported,
            names=names,
            held_out_sha256=held_out_sha256,
            reported_sha256=reported_sha256,
        )


@dataclass(frozen=True, kw_only=True)
class SourceRequest:
    """What a source file needs to open its data.

    Attributes:
        dataset: registered name.
        root: --data.
        cache_dir: where measured statistics may be kept (--model_dir); None: nowhere.
        num_classes: --num_classes, only synthetic needs it; elsewhere it is checked against the data.
        crop_size: --crop_size if given.
        seed: for synthetic and for the hold-out.
        val_fraction: part of the training set held out, class-balanced, in [0, 1).
        test_fraction: part of images without a split that is tested on; None: such images are no training set, and an
            evaluation takes all of them.
        splits: which splits are needed ("train", "test"); a missing one that is not needed is no error.
        split: what an evaluation takes for the test split: "val" or "test"; None: test where there is one, else val.
        classes: of a checkpoint that is evaluated; a folder may lack some of them.
        recipe: which of `recipe.datasets.OPEN_ROWS` the images of this checkpoint took; None: as their sizes say.
        on_bad_image: "fail" or "skip".
        workers: processes for decoding many files while opening; 0 decodes in this one.
        download: whether missing archives may be fetched.
        image_column, label_column, split_column: of a table; None: guessed.
        once: does a work that all processes of a machine would do alike, `utils.neighbours.once_per_machine`.
    """

    dataset: str
    root: Path
    cache_dir: Path | None = None
    num_classes: int | None = None
    crop_size: int | None = None
    seed: int = 0
    val_fraction: float = 0.0
    test_fraction: float | None = None
    splits: tuple[str, ...] = ("train", "test")
    split: str | None = None
    classes: tuple[str, ...] | None = None
    recipe: str | None = None
    on_bad_image: str = "fail"
    workers: int = 0
    download: bool = True
    image_column: str | None = None
    label_column: str | None = None
    split_column: str | None = None
    once: Callable[[Callable[[], dict[str, Any]]], dict[str, Any]] = field(default=lambda work: work(), compare=False)


SourceBuilder = Callable[[SourceRequest], DataSource]

sources: Registry[SourceBuilder] = Registry(
    "data set",
    "--dataset",
    f"{__name__}.source",
    index={
        "cifar": ("cifar10", "cifar100"),
        "corrupted": (),
        "digits": ("digits",),
        "folder": ("folder",),
        "imagenet": ("imagenet",),
        "parquet": ("parquet",),
        "svhn": ("svhn",),
        "synthetic": ("synthetic",),
        "table": ("csv",),
        "webdataset": ("webdataset",),
    },
)


def open_source(request: SourceRequest) -> DataSource:
    """Open a data set by name, check --num_classes against it and hold out --val_fraction of its training set.

    Raises:
        UserError: unknown name, missing or empty data, class-count mismatch, a --split that is not there, a
            --val_fraction that cannot be held out, or is given beside images to choose the best epoch on.
        RunError: an unreadable image under --on_bad_image fail, where a source decodes while opening.
    """
    source = sources.get(request.dataset)(request)
    if request.num_classes not in (None, len(source.classes)):
        raise UserError(
            f"--num_classes {request.num_classes} does not fit --dataset {request.dataset} --data {request.root}, "
            f"which has {len(source.classes)} classes. Leave the flag out, or give {len(source.classes)}."
        )
    if request.split not in (None, source.reported):
        raise UserError(f"--split {request.split}: --dataset {request.dataset} has {source.reported} images only.")
    if source.fractions:
        return source
    if request.val_fraction and source.val is not None:
        raise UserError(
            f"--val_fraction {request.val_fraction}: --data {request.root} has val/ beside test/, and the best epoch "
            "is chosen on val/. Leave the flag away."
        )
    if request.val_fraction and len(source.train):
        from dataset.holdout import split_indices
        from utils.seed import STREAM_SPLIT, numpy_generator

        generator = numpy_generator(request.seed, STREAM_SPLIT)
        kept, held = split_indices(source.train.targets, request.val_fraction, generator)
        # beside a part of train/ to choose on, a val/ is what is tested on
        source = dataclasses.replace(
            source,
            train=source.train.subset(kept),
            val=source.train.subset(held),
            reported="test",
            held_out_sha256=held_out_digest(len(source.train), held),
        )
    return source

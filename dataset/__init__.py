"""Data-set registry and what a data set is: two splits of images, class names, statistics."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from utils.registry import Registry


@dataclass(frozen=True, kw_only=True)
class ImageSet:
    """One split, either decoded in memory or as files.

    Attributes:
        targets: int64 [N] class indices.
        images: uint8 [N, 3, H, W], or None for files.
        paths: N image files in a reproducible order, or empty for images in memory.
    """

    targets: Tensor
    images: Tensor | None = None
    paths: tuple[Path, ...] = ()

    def __len__(self) -> int:
        return len(self.targets)


@dataclass(frozen=True, kw_only=True)
class DataSource:
    """A data set, opened.

    Attributes:
        name: the value of --dataset.
        recipe: row of the published recipes and augmentations: digits, cifar10, cifar100, svhn, imagenet.
        classes: K class names, in the order of the targets.
        mean, std: per channel, on the scale [0, 1].
        crop_size: side of the training input in pixels where --crop_size is not given.
        train, test: the two splits; `test` is what the published code evaluates on.
        val: held out of `train` by --val_fraction, or None.
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
        splits: which splits are needed ("train", "test"); a missing one that is not needed is no error.
        on_bad_image: "fail" or "skip".
        download: whether missing archives may be fetched.
    """

    dataset: str
    root: Path
    cache_dir: Path | None = None
    num_classes: int | None = None
    crop_size: int | None = None
    seed: int = 0
    val_fraction: float = 0.0
    splits: tuple[str, ...] = ("train", "test")
    on_bad_image: str = "fail"
    download: bool = True


SourceBuilder = Callable[[SourceRequest], DataSource]

sources: Registry[SourceBuilder] = Registry("data set", "--dataset", "dataset.source")


def open_source(request: SourceRequest) -> DataSource:
    """Open a data set by name.

    Raises:
        UserError: unknown name, missing or empty data, class-count mismatch.
    """
    return sources.get(request.dataset)(request)

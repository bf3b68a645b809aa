"""Corrupted copies of labelled images, laid out as CIFAR-C or ImageNet-C (Hendrycks & Dietterich, arXiv:1903.12261)."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from dataset import ImageSet
from dataset.class_folders import labelled_folder
from utils.errors import UserError, reason

CORRUPTIONS = (
    *("gaussian_noise", "shot_noise", "impulse_noise", "defocus_blur", "glass_blur", "motion_blur", "zoom_blur"),
    *("snow", "frost", "fog", "brightness", "contrast", "elastic_transform", "pixelate", "jpeg_compression"),
)
EXTRA = ("speckle_noise", "gaussian_blur", "spatter", "saturate")  # listed, in no mean
SEVERITIES = (1, 2, 3, 4, 5)
LABELS = "labels.npy"


@dataclass(frozen=True, kw_only=True)
class Corrupted:
    """One corruption.

    Attributes:
        name: of it. severities: those that are there.
        source: the file or folder.
    """

    name: str
    severities: tuple[int, ...]
    source: Path

    @property
    def is_averaged(self) -> bool:
        """Whether it is one of the 15 of the benchmark."""
        return self.name in CORRUPTIONS


@dataclass(frozen=True)
class CorruptedSets:
    """All corruptions of --shift DIR, those of the benchmark first, in its order.

    Attributes:
        root: DIR.
        classes: K names of the networks.
        rows: the corruptions.
        size: [H, W] of the images of arrays; None for files.
    """

    root: Path
    classes: Sequence[str]
    rows: tuple[Corrupted, ...]
    size: tuple[int, int] | None

    @property
    def missing(self) -> list[str]:
        """The corruptions of the benchmark that are not there."""
        there = {row.name for row in self.rows}
        return [name for name in CORRUPTIONS if name not in there]

    def images(self, row: Corrupted) -> Iterator[tuple[int, ImageSet]]:
        """(severity, images) of one corruption; arrays are read one block at a time.

        Raises:
            UserError: a file of another shape, labels out of range.
        """
        if self.size is None:
            for severity in row.severities:
                folder = row.source / str(severity)
                yield severity, labelled_folder(folder, self.classes, "--shift")
            return
        labels_N, images = _labels(self.root, len(self.classes)), _array(row.source)
        block = len(images) // len(SEVERITIES)
        if len(labels_N) == block:
            labels_N = np.tile(labels_N, len(SEVERITIES))
        for severity in SEVERITIES:
            part = slice((severity - 1) * block, severity * block)
            pixels = torch.from_numpy(np.array(images[part])).permute(0, 3, 1, 2).contiguous()
            yield severity, ImageSet(targets=torch.from_numpy(labels_N[part].astype(np.int64)), images=pixels)


def open_corrupted(root: Path, classes: Sequence[str]) -> CorruptedSets:
    """What is below DIR: `labels.npy` and `<corruption>.npy`, or folders <corruption>/<1…5>/<class>/*.

    The folders of corruptions may lie one level of group folders deeper (noise/gaussian_noise/…).

    Args:
        classes: K names that the networks know.

    Raises:
        UserError: neither layout, or both; arrays of other shapes; labels out of range; no severity folder; one
            corruption twice.
    """
    if not root.is_dir():
        raise UserError(f"--shift {root}: is not a folder; expected one, laid out as CIFAR-C or ImageNet-C.")
    if (root / LABELS).exists():
        _refuse_folders(root)
        labels = _labels(root, len(classes))
        files = sorted(path for path in root.glob("*.npy") if path.name != LABELS)
        rows = []
        sizes = set()
        for path in files:
            images = _array(path)
            if len(labels) not in (len(images), len(images) // len(SEVERITIES)):
                raise UserError(
                    f"--shift {root / LABELS}: {len(labels)} labels for the {len(images)} images of {path}."
                )
            rows.append(Corrupted(name=path.stem, severities=SEVERITIES, source=path))
            sizes.add(images.shape[1:3])
        if len(sizes) > 1:
            raise UserError(f"--shift {root}: its arrays have images of different sizes: {sorted(sizes)}.")
        if not rows:
            raise UserError(f"--shift {root}: holds {LABELS} and no <corruption>.npy beside it.")
        _refuse_twice(root, rows)
        return CorruptedSets(root, classes, _sorted(rows), sizes.pop())
    rows = [row for folder in _folders(root) for row in _corruptions(folder)]
    if not rows:
        raise UserError(
            f"--shift {root}: expected {LABELS} beside <corruption>.npy, or folders <corruption>/<1 to 5>/<class>/."
        )
    _refuse_twice(root, rows)
    return CorruptedSets(root, classes, _sorted(rows), None)


def _refuse_folders(root: Path) -> None:
    """Folders of corruptions beside arrays: they would count for nothing."""
    for folder in (inner for outer in _folders(root) for inner in (outer, *_folders(outer))):
        if _severities(folder):
            raise UserError(
                f"--shift {root}: holds {LABELS} and a folder of a corruption too, {folder}: give the two layouts "
                "folders of their own."
            )


def _refuse_twice(root: Path, rows: Sequence[Corrupted]) -> None:
    """A name in two groups, or two names of one file or folder, through a link: it would count twice in a mean."""
    names: set[str] = set()
    places: dict[tuple[int, int], str] = {}
    for row in rows:
        if row.name in names:
            raise UserError(f"--shift {root}: the corruption {row.name} is there twice.")
        names.add(row.name)
        status = row.source.stat()
        other = places.setdefault((status.st_dev, status.st_ino), row.name)
        if other != row.name:
            raise UserError(f"--shift {root}: {other} and {row.name} are the same images, through a link: remove one.")


def _sorted(rows: Sequence[Corrupted]) -> tuple[Corrupted, ...]:
    known = [*CORRUPTIONS, *EXTRA]
    return tuple(sorted(rows, key=lambda row: (known.index(row.name) if row.name in known else len(known), row.name)))


def _folders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir())


def _severities(folder: Path) -> tuple[int, ...]:
    return tuple(severity for severity in SEVERITIES if (folder / str(severity)).is_dir())


def _corruptions(folder: Path) -> list[Corrupted]:
    """The corruption that a folder is, or those of the group that it is."""
    if severities := _severities(folder):
        return [Corrupted(name=folder.name, severities=severities, source=folder)]
    found = [
        Corrupted(name=inner.name, severities=severities, source=inner)
        for inner in _folders(folder)
        if (severities := _severities(inner))
    ]
    if not found or folder.name in CORRUPTIONS:
        raise UserError(f"--shift {folder}: has no severity folder 1 to 5.")
    return found


def _array(path: Path) -> np.ndarray:
    wanted = "expected uint8 images [5 n, H, W, 3], severities 1 to 5 in blocks"
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"--shift {path}: {wanted}: {reason(error)}.") from None
    if array.ndim != 4 or array.shape[3] != 3 or array.dtype != np.uint8 or not len(array) or len(array) % 5:
        raise UserError(f"--shift {path}: {wanted}, found {array.dtype} {list(array.shape)}.")
    return array


def _labels(root: Path, num_classes: int) -> np.ndarray:
    path = root / LABELS
    try:
        labels = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"--shift {path}: expected whole numbers [N]: {reason(error)}.") from None
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
        raise UserError(f"--shift {path}: expected whole numbers [N], found {labels.dtype} {list(labels.shape)}.")
    if len(labels) and not 0 <= labels.min() <= labels.max() < num_classes:
        raise UserError(
            f"--shift {path}: labels from {labels.min()} to {labels.max()}, and the networks have {num_classes} "
            "classes."
        )
    return labels

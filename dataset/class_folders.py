"""Image files in one folder per class: DIR/train/<class>/..., DIR/val/<class>/..."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from dataset import ImageSet, SourceRequest
from dataset.decode import EXTENSIONS
from utils.errors import UserError


def find_folders(request: SourceRequest, evaluation: Sequence[str]) -> tuple[dict[str, Path], tuple[str, ...]]:
    """The folders of the splits "train" and "test" as far as they are there, and the class names of the needed ones.

    Args:
        evaluation: names for the folder of the test split, the preferred one first.

    Raises:
        UserError: --data or a folder that `request.splits` asks for is missing, a split has no class folders, or the
            two needed splits have different ones.
    """
    root = request.root
    if not root.is_dir():
        raise UserError(f"--data {root} is not a folder. Give the one that holds train/ and {evaluation[0]}/.")
    candidates = {"train": ("train",), "test": tuple(evaluation)}
    folders = {}
    for split, names in candidates.items():
        present = [root / name for name in names if (root / name).is_dir()]
        if present:
            folders[split] = present[0]
        elif split in request.splits:
            raise UserError(
                f"--data {root} has no folder {' or '.join(f'{name}/' for name in names)}. "
                f"Put the {split} images there, one folder per class."
            )
    classes = {split: _class_names(folder) for split, folder in folders.items() if split in request.splits}
    if len(set(classes.values())) > 1:
        only_train = sorted(set(classes["train"]) - set(classes["test"]))
        only_test = sorted(set(classes["test"]) - set(classes["train"]))
        lone = folders["train"] / only_train[0] if only_train else folders["test"] / only_test[0]
        raise UserError(
            f"{folders['train']} and {folders['test']} have different class folders ({len(only_train)} only in the "
            f"first, {len(only_test)} only in the second, such as {lone}). Give both the same ones."
        )
    return folders, next(iter(classes.values()))


def list_images(folder: Path, classes: Sequence[str]) -> ImageSet:
    """Every image file of the class folders, ordered by class, then by path.

    Raises:
        UserError: a class folder holds no image file.
    """
    paths: list[Path] = []
    targets: list[int] = []
    for label, name in enumerate(classes):
        found = list(iterate_images(folder / name))
        if not found:
            raise UserError(
                f"{folder / name} holds no image file (.jpg, .png, .webp, .bmp, .gif, .tif, .ppm, …). "
                "Put images of the class there, or remove the folder in every split."
            )
        paths += found
        targets += [label] * len(found)
    return ImageSet(targets=torch.tensor(targets, dtype=torch.int64), paths=tuple(paths))


def iterate_images(folder: Path) -> Iterator[Path]:
    """Image files below a folder by their extension (any case): its own in sorted order, then those of its subfolders.

    Hidden files and folders (".…") are left out.
    """
    for parent, subfolders, files in os.walk(folder, followlinks=True):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        for name in sorted(files):
            if not name.startswith(".") and os.path.splitext(name)[1].lower() in EXTENSIONS:
                yield Path(parent, name)


def _class_names(folder: Path) -> tuple[str, ...]:
    names = tuple(
        sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))
    )
    if not names:
        raise UserError(f"{folder} has no class folders. Put the images of each class into a folder of its own.")
    return names

"""Which data set --data is, where no --dataset says it."""

import os
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from dataset.archive import data_folders
from dataset.class_folders import first_image, split_folders
from dataset.source.table import find_table

# published data sets -> what one of their files or folders is called, the first that is there counting
PUBLISHED = {
    "cifar10": ("cifar-10-python.tar.gz", "cifar-10-batches-py"),
    "cifar100": ("cifar-100-python.tar.gz", "cifar-100-python"),
    "svhn": ("train_32x32.mat", "test_32x32.mat"),
}
SUFFIXES = {
    "csv": (".csv", ".tsv", ".txt", ".lst"),
    "parquet": (".parquet", ".pq", ".arrow"),
    "webdataset": (".tar",),
}


def kind_of(data: str, *, is_chosen: bool = True) -> str | None:
    """Name of the data set that a file, a pattern of files or a folder is; None where it is none that can be told.

    Args:
        is_chosen: somebody named it. Otherwise it is only looked at for published data sets.
    """
    root = Path(data)
    for dataset, names in PUBLISHED.items():
        if any((folder / name).exists() for folder in data_folders(root) for name in names):
            return dataset
    if not is_chosen:
        return None
    if root.is_dir():
        return _kind_of_folder(root)
    suffix = root.suffix.lower()
    # also of a file that is not there, so that it is missed by its name
    return next((kind for kind, suffixes in SUFFIXES.items() if suffix in suffixes), None)


def _kind_of_folder(root: Path) -> str | None:
    if any(True for folder in split_folders(root).values() for _ in _classes(folder)):
        return "folder"
    classes = list(islice(_classes(root), 2))
    if len(classes) == 2 and not any(map(split_folders, classes)):  # or it is a folder of data sets
        return "folder"
    if find_table(root) is not None:
        return "csv"
    for kind in ("parquet", "webdataset"):
        if any(next(root.glob(f"{below}*{suffix}"), None) for suffix in SUFFIXES[kind] for below in ("", "*/")):
            return kind
    return None


def _classes(folder: Path) -> Iterator[Path]:
    """Subfolders that hold an image."""
    try:
        names = sorted(os.listdir(folder))
    except OSError:
        return
    for name in names:
        path = folder / name
        if not name.startswith(".") and path.is_dir() and first_image(path) is not None:
            yield path

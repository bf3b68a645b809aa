"""CIFAR-10 and CIFAR-100 (Krizhevsky 2009) from the official Python archives, packed or unpacked."""

import codecs
import io
import pickle
import tarfile
import zlib
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch

from dataset import DataSource, ImageSet, SourceRequest, sources
from dataset.archive import data_folders, find_or_fetch
from recipe.datasets import ROWS
from utils.errors import UserError, reason

URL = "https://www.cs.toronto.edu/~kriz/"


class _Layout(NamedTuple):
    """How one of the two is packed."""

    archive: str
    md5: str
    folder: str
    files: Mapping[str, tuple[str, ...]]  # of each split
    label_key: str
    meta_file: str
    names_key: str


_LAYOUTS = {
    "cifar10": _Layout(
        archive="cifar-10-python.tar.gz",
        md5="c58f30108f718f92721af3b95e74349a",
        folder="cifar-10-batches-py",
        files={"train": tuple(f"data_batch_{i}" for i in range(1, 6)), "test": ("test_batch",)},
        label_key="labels",
        meta_file="batches.meta",
        names_key="label_names",
    ),
    "cifar100": _Layout(
        archive="cifar-100-python.tar.gz",
        md5="eb9058c3a382ffc7106e4002c42a8d85",
        folder="cifar-100-python",
        files={"train": ("train",), "test": ("test",)},
        label_key="fine_labels",
        meta_file="meta",
        names_key="fine_label_names",
    ),
}


@sources.register(*_LAYOUTS)
def open_cifar(request: SourceRequest) -> DataSource:
    """32x32 images in the files' order; the official archives hold 50,000 for training and 10,000 for testing.

    Raises:
        UserError: files missing and not to be fetched, damaged, or holding anything but plain arrays and lists.
    """
    layout = _LAYOUTS[request.dataset]
    wanted = {name for split in request.splits for name in layout.files[split]}
    contents, origin = _read_files(request, layout, wanted)
    loaded = {name: _load(content, origin / name) for name, content in contents.items()}
    num_classes = ROWS[request.dataset].num_classes
    splits = {
        split: _image_set([(origin / name, loaded[name]) for name in layout.files[split]], layout, num_classes)
        for split in request.splits
    }
    names = loaded.get(layout.meta_file, {}).get(layout.names_key, range(num_classes))
    classes = tuple(name.decode() if isinstance(name, bytes) else str(name) for name in names)
    return DataSource.of_row(request.dataset, classes, splits)


def _read_files(request: SourceRequest, layout: _Layout, wanted: set[str]) -> tuple[dict[str, bytes], Path]:
    """The wanted files and, if it is there, the one with the class names; and the folder or archive they are from."""
    names = {*wanted, layout.meta_file}
    for base in data_folders(request.root):
        folder = base / layout.folder
        if all((folder / name).is_file() for name in wanted):
            return {name: (folder / name).read_bytes() for name in names if (folder / name).is_file()}, folder
    url = URL + layout.archive
    archive = find_or_fetch(request, layout.archive, url, layout.md5, instead=f" or the folder {layout.folder}")
    contents = {}
    try:
        with tarfile.open(archive) as tar:
            for member in tar:
                name = PurePosixPath(member.name).name
                file = tar.extractfile(member) if name in names else None
                if file is not None:
                    contents[name] = file.read()
    except (tarfile.TarError, OSError, EOFError, KeyError, zlib.error) as error:
        raise UserError(f"{archive} is damaged ({reason(error)}). Delete it and get it again from {url}.") from None
    lacking = sorted(wanted - contents.keys())
    if lacking:
        raise UserError(f"{archive} lacks {', '.join(lacking)}. Delete it and get it again from {url}.")
    return contents, archive


def _encode(text: str, encoding: str = "latin1") -> bytes:
    """The one use that pickled byte strings make of `_codecs.encode`."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"it encodes text as {encoding}")
    return codecs.latin_1_encode(text)[0]


class _PlainUnpickler(pickle.Unpickler):
    """Builds containers, text, bytes, numbers and NumPy arrays, and nothing that could run code."""

    # by the last part of the module's name: NumPy 1 and 2 call one function numpy.core.x and numpy._core.x
    _NUMPY: ClassVar[Mapping[tuple[str, str], Any]] = {
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
        ("multiarray", "_reconstruct"): np.zeros(1).__reduce__()[0],
        ("multiarray", "scalar"): np.float64().__reduce__()[0],
        ("numeric", "_frombuffer"): np.zeros(1).__reduce_ex__(5)[0],
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("_codecs", "encode"):
            return _encode
        key = (module.removeprefix("numpy.core.").removeprefix("numpy._core."), name)
        if not module.startswith("numpy") or key not in self._NUMPY:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return self._NUMPY[key]


def _load(content: bytes, path: Path) -> Mapping[str, Any]:
    """One pickled dict, its keys as text."""
    try:
        loaded = _PlainUnpickler(io.BytesIO(content), encoding="latin1").load()
        return {key.decode() if isinstance(key, bytes) else key: value for key, value in loaded.items()}
    except Exception as error:  # foreign bytes make the unpickler fail in every way there is
        raise UserError(
            f"{path} is not a CIFAR file ({reason(error)}); nothing in it was run. Get the official archive."
        ) from None


def _image_set(batches: list[tuple[Path, Mapping[str, Any]]], layout: _Layout, num_classes: int) -> ImageSet:
    images, labels = [], []
    for path, batch in batches:
        pixels = batch.get("data")
        try:
            targets = np.array(batch.get(layout.label_key, ()), dtype=np.int64)
        except (TypeError, ValueError, OverflowError):
            targets = np.empty(0, dtype=np.int64)
        if not isinstance(pixels, np.ndarray) or pixels.dtype != np.uint8 or pixels.shape != (targets.size, 3072):
            raise UserError(
                f"{path} does not hold uint8 'data' of N x 3072 and N {layout.label_key!r}. Get the official archive."
            )
        if not targets.size or targets.min() < 0 or targets.max() >= num_classes:
            raise UserError(
                f"{path} holds no images, or labels outside 0..{num_classes - 1}. Get the official archive."
            )
        images.append(pixels.reshape(-1, 3, 32, 32))
        labels.append(targets.ravel())
    return ImageSet(targets=torch.from_numpy(np.concatenate(labels)), images=torch.from_numpy(np.concatenate(images)))

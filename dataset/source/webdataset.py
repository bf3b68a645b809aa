"""Tar shards in WebDataset's form: members KEY.jpg (or .png, .webp, …) with KEY.cls, the number or name of the class.

Shards are indexed once, as they are opened: the place and the label of every image. So order, hold-out, resume and the
split over processes are those of files. The standard library reads them; the package webdataset is not needed. Ours.
"""

import os
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from dataset import DataSource, ImageSet, SourceRequest, sources
from dataset.decode import EXTENSIONS
from dataset.own_images import open_listed
from dataset.rows import Rows, list_rows
from dataset.shards import common_folder, find_shards, splits_of
from utils.errors import UserError, reason
from utils.text import escaped

LABEL_EXTENSIONS = ("cls", "cls.txt")
LONGEST_LABEL = 4096  # bytes


class Member(NamedTuple):
    """An image in a shard: its name there, where its bytes are, and its label."""

    name: str
    offset: int
    size: int
    label: str


class TarStore:
    """Members of uncompressed tar files, read where they lie.

    Args:
        files: the shards.
        shards: int32 [N], which shard each member is in.
        offsets, sizes: int64 [N], in bytes.
    """

    def __init__(self, files: Sequence[Path], shards: np.ndarray, offsets: np.ndarray, sizes: np.ndarray) -> None:
        self.files = tuple(files)
        self._shards, self._offsets, self._sizes = shards, offsets, sizes

    def read(self, place: int) -> bytes:
        """The content of a member. Raises OSError."""
        shard = int(self._shards[place])
        size = int(self._sizes[place])
        with self.files[shard].open("rb", buffering=0) as file:
            content = os.pread(file.fileno(), size, int(self._offsets[place]))
        if len(content) < size:
            raise OSError("the shard is shorter than when it was indexed")
        return content


@sources.register("webdataset")
def open_shards(request: SourceRequest) -> DataSource:
    """The images of tar shards, ordered by class, then by shard and place.

    Shards whose names begin with train, val (valid, validation, dev) or test, or that lie in folders of such names, are
    those splits; others have none.

    Raises:
        UserError: no shards, one that cannot be read, an image without a label or a label without an image; as
            `list_rows` and `open_listed`.
        RunError: an unreadable image, under --on_bad_image fail.
    """
    files = find_shards(request, (".tar",))
    splits = splits_of(files, request)
    indexed = [index_shard(file) for file in files]
    root = common_folder(files)
    names = [
        os.fsencode(f"{file.relative_to(root).as_posix()}/{member.name}")
        for file, members in zip(files, indexed, strict=True)
        for member in members
    ]
    members = [member for of_shard in indexed for member in of_shard]
    counts = [len(of_shard) for of_shard in indexed]
    if not members:
        raise UserError(f"--data {request.root} holds no image. Expected members KEY.jpg and KEY.cls.")
    store = TarStore(
        files,
        shards=np.repeat(np.arange(len(files), dtype=np.int32), counts),
        offsets=np.array([member.offset for member in members]),
        sizes=np.array([member.size for member in members]),
    )
    rows = Rows(
        images=ImageSet(
            targets=torch.zeros(len(members), dtype=torch.int64),
            paths=tuple(root / os.fsdecode(name) for name in names),
            store=store,
            places=torch.arange(len(members)),
        ),
        names=names,
        labels=[member.label for member in members],
        splits=None if splits is None else [splits[i] for i, count in enumerate(counts) for _ in range(count)],
    )
    return open_listed(list_rows(rows, request), request)


def index_shard(file: Path) -> list[Member]:
    """The images of a shard, in its order.

    Raises:
        UserError: not an uncompressed tar file, damaged, or an image or a label alone or twice.
    """
    images: dict[str, tuple[str, int, int]] = {}
    labels: dict[str, str] = {}
    try:
        with tarfile.open(file, "r:", encoding="utf-8", errors="surrogateescape") as tar:
            for member in tar:
                key, extension = _cut(member.name)
                is_label, is_image = extension in LABEL_EXTENSIONS, f".{extension}" in EXTENSIONS
                if not member.isreg() or not (is_label or is_image):
                    continue
                if key in (labels if is_label else images):
                    raise UserError(
                        f"{file}: {escaped(member.name)}: a second {extension} of this key. Give each its own."
                    )
                if is_image:
                    images[key] = (member.name, member.offset_data, member.size)
                else:
                    content = tar.extractfile(member)
                    assert content is not None
                    text = content.read(LONGEST_LABEL).decode("utf-8", "surrogateescape").strip()
                    labels[key] = escaped(text)
    except (tarfile.TarError, OSError, EOFError) as error:
        raise UserError(
            f"{file} is no readable tar file without compression ({reason(error)}). Mend it, or decompress it."
        ) from None
    alone = [*(images.keys() - labels.keys()), *(labels.keys() - images.keys())]
    if alone:
        raise UserError(
            f"{file}: {len(alone)} keys have an image or a label (KEY.cls) only, such as {escaped(min(alone))}."
        )
    return [Member(*images[key], labels[key]) for key in images]


def _cut(name: str) -> tuple[str, str]:
    """(key, extension in lower case) at the first dot of the last part, as WebDataset cuts names."""
    folder, slash, last = name.rpartition("/")
    stem, _, extension = last.partition(".")
    return f"{folder}{slash}{stem}", extension.lower()

"""Images in Parquet files, or in the Arrow files of Hugging Face's `save_to_disk`, with pyarrow. Ours.

A column of bytes, or Hugging Face's structs of bytes and path; a column of labels, whose names its metadata may have.
"""

import logging
import os
from pathlib import Path
from typing import Any

import torch

from dataset import DataSource, ImageSet, SourceRequest, sources
from dataset.columns import Columns, ColumnStore, need_pyarrow
from dataset.own_images import open_listed
from dataset.rows import Rows, guessed_column, list_rows, needed_columns, split_of
from dataset.shards import common_folder, find_shards, splits_of
from utils.errors import UserError
from utils.text import escaped

logger = logging.getLogger(__name__)

SUFFIXES = (".parquet", ".pq", ".arrow")
IMAGE_COLUMNS = ("image", "img", "images", "jpg", "jpeg", "png", "webp", "image_bytes", "picture", "bytes")
LABEL_COLUMNS = ("label", "labels", "class", "cls", "target", "category", "fine_label", "class_name", "y")
LARGE_GROUP = 64 << 20  # bytes of a group of rows that are worth a warning
SPLIT_COLUMNS = ("split", "subset", "partition")


@sources.register("parquet")
def open_parquet(request: SourceRequest) -> DataSource:
    """The images of Parquet files, ordered by class, then by file and row.

    Files whose names begin with train, val (valid, validation, dev) or test, or that lie in folders of such names, are
    those splits; else a column may say them.

    Raises:
        UserError: pyarrow missing, no files, one that cannot be read, columns that are missing or of another kind; as
            `list_rows` and `open_listed`.
        RunError: an unreadable image, under --on_bad_image fail.
    """
    need_pyarrow()
    files = find_shards(request, SUFFIXES)
    opened = [Columns(file) for file in files]
    first = opened[0]
    columns = {name.lower(): name for name in first.schema.names}
    image, label = needed_columns(
        columns, request, images=IMAGE_COLUMNS, labels=LABEL_COLUMNS, table=request.root, header=[*columns.values()]
    )
    for file in opened:
        _check(file, image, label)
    largest = max(opened, key=lambda file: file.largest_group)
    if largest.largest_group > LARGE_GROUP:
        logger.warning(
            "--data %s: a group of %s has %d MB, and reading any of its images reads all of them. If waiting for data "
            "is long, write it anew in groups of about 100 rows.",
            escaped(request.root),
            escaped(largest.path.name),
            largest.largest_group >> 20,
        )
    root = common_folder(files)
    names = [
        os.fsencode(f"{file.path.relative_to(root).as_posix()}/{row}")
        for file in opened
        for row in range(sum(file.sizes))
    ]
    class_names = first.class_names(label)
    labels = [_label(value, class_names, file.path) for file in opened for value in file.whole(label)]
    rows = Rows(
        images=ImageSet(
            targets=torch.zeros(len(names), dtype=torch.int64),
            paths=tuple(root / os.fsdecode(name) for name in names),
            store=ColumnStore(files, image, [file.sizes for file in opened]),
            places=torch.arange(len(names)),
        ),
        names=names,
        labels=labels,
        splits=_splits(opened, columns, request),
        classes=None if class_names is None else tuple(map(escaped, class_names)),
    )
    return open_listed(list_rows(rows, request), request)


def _check(file: Columns, image: str, label: str) -> None:
    """Raises UserError: a column is missing, or is no column of images."""
    import pyarrow as pa

    for column in (image, label):
        if column not in file.schema.names:
            raise UserError(f"{file.path} has no column {escaped(column)}, which other files have.")
    kind = file.schema.field(image).type
    if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        kind = kind.field("bytes").type
    if not (pa.types.is_binary(kind) or pa.types.is_large_binary(kind)):
        raise UserError(
            f"{file.path}: the column {escaped(image)} holds {kind}; expected bytes of image files, or structs with "
            "bytes. Name another by --image_column."
        )


def _label(value: Any, names: tuple[str, ...] | None, path: Path) -> str:
    """A label as text: a class's name, or what stands there."""
    if value is None:
        raise UserError(f"{path}: a row has no label. Mend the file.")
    if names is None:
        return escaped(str(value))
    if not isinstance(value, int) or not 0 <= value < len(names):
        raise UserError(f"{path}: {escaped(str(value))} is none of the {len(names)} classes that its metadata names.")
    return escaped(names[value])


def _splits(opened: list[Columns], columns: dict[str, str], request: SourceRequest) -> list[str] | None:
    """Of every row, by the column that the flag names, else by the files' names, else by a column of a usual name."""
    by_file = None if request.split_column else splits_of([file.path for file in opened], request)
    if by_file is not None:
        return [split for split, file in zip(by_file, opened, strict=True) for _ in range(sum(file.sizes))]
    column = guessed_column(columns, "split_column", request.split_column, SPLIT_COLUMNS)
    if column is None:
        return None
    splits = []
    for file in opened:
        for value in file.whole(column):
            split = split_of(str(value))
            if split is None:
                raise UserError(
                    f"{file.path}: {escaped(str(value))!r} in the column {escaped(column)} is no split; expected "
                    "train, val (valid, validation, dev) or test."
                )
            splits.append(split)
    return splits

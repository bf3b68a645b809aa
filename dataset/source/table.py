"""A table of image files: a .csv or .tsv with columns, or a list of lines "path label". Ours.

Paths are relative to the table's folder, or to one of its subfolders where all of them lie there.
"""

import csv
import dataclasses
import io
import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from dataset import DataSource, ImageSet, SourceRequest, sources
from dataset.decode import EXTENSIONS
from dataset.own_images import open_listed
from dataset.rows import Rows, guessed_column, list_rows, needed_columns, split_of
from utils.errors import UserError, reason
from utils.text import escaped

logger = logging.getLogger(__name__)

NAMED = 10  # missing files that are named
DELIMITERS = (",", "\t", ";")
IMAGE_COLUMNS = (
    *("path", "image", "file", "filename", "file_name", "filepath", "file_path", "image_path", "image_file", "img"),
    *("image_name", "img_path", "image_id", "id", "name"),
)
LABEL_COLUMNS = ("label", "labels", "class", "target", "category", "class_name", "label_name", "class_id", "y")
SPLIT_COLUMNS = ("split", "subset", "partition", "set", "dataset")
TABLE_NAMES = ("labels.csv", "metadata.csv", "labels.tsv", "labels.txt")  # looked for where --data is a folder


@dataclasses.dataclass(frozen=True)
class _Cells:
    """What stands in a table: of every row its line, path, label and split ("" where there is no such column)."""

    lines: list[int]
    paths: list[str]
    labels: list[str]
    splits: list[str]


@sources.register("csv")
def open_table(request: SourceRequest) -> DataSource:
    """The files that a table names, each once, ordered by class, then by path.

    Raises:
        UserError: no such table or columns, files that are missing (ten are named), a file with two labels or splits,
            a split of another name; as `list_rows` and `open_listed`.
        RunError: an unreadable image, under --on_bad_image fail.
    """
    table = _find(request.root)
    request = dataclasses.replace(request, root=table)
    cells = _read(table, request)
    base = _base(table, cells.paths)
    files = [Path(os.path.normpath(base / path)) for path in cells.paths]
    chosen = _each_once(table, cells, files)
    missing = [cells.paths[i] for i in chosen if not files[i].is_file()]
    if missing:
        more = f" and {len(missing) - NAMED} more" if len(missing) > NAMED else ""
        raise UserError(
            f"--data {table}: {len(missing)} of {len(chosen)} files are missing below {base}: "
            f"{', '.join(map(escaped, missing[:NAMED]))}{more}. Mend the table, or put them there."
        )
    relative = [os.fsencode(os.path.relpath(files[i], base)) for i in chosen]
    chosen = [i for _, i in sorted(zip(relative, chosen, strict=True))]
    splits = _splits(table, [cells.lines[i] for i in chosen], [cells.splits[i] for i in chosen])
    rows = Rows(
        images=ImageSet(targets=torch.zeros(len(chosen), dtype=torch.int64), paths=tuple(files[i] for i in chosen)),
        names=sorted(relative),
        labels=[escaped(cells.labels[i]) for i in chosen],
        splits=splits,
    )
    return open_listed(list_rows(rows, request), request)


def find_table(root: Path) -> Path | None:
    """The table that --data names, or the one in its folder; None: there is none, or several of other names."""
    if root.is_file():
        return root
    usual = next((root / name for name in TABLE_NAMES if (root / name).is_file()), None)
    tables = sorted(root.glob("*.csv")) if usual is None else [usual]
    return tables[0] if len(tables) == 1 else None


def _find(root: Path) -> Path:
    table = find_table(root)
    if table is None:
        what = "is no table" if root.exists() else "does not exist"
        raise UserError(f"--data {root} {what}. Give a .csv, .tsv or .txt of images and labels.")
    return table


def _read(table: Path, request: SourceRequest) -> _Cells:
    """The table's cells; bytes that are no UTF-8 as in names of files."""
    try:
        text = table.read_text(encoding="utf-8-sig", errors="surrogateescape")
        records = [(number, cells) for number, cells in _records(text) if any(cells)]
    except (OSError, csv.Error) as error:
        raise UserError(f"--data {table}: cannot be read: {reason(error)}.") from None
    if not records:
        raise UserError(f"--data {table} is empty. Expected a header and rows, or lines of a path and a label.")
    header = [cell.strip() for cell in records[0][1]]
    columns = {name.lower(): name for name in header}
    asked = (request.image_column, request.label_column, request.split_column)
    has_names = any(asked) or not (_is_path(header[0]) and len(header) >= 2)
    if has_names:
        image, label = needed_columns(
            columns, request, images=IMAGE_COLUMNS, labels=LABEL_COLUMNS, table=table, header=header
        )
        split = guessed_column(columns, "split_column", request.split_column, SPLIT_COLUMNS)
        places = [None if name is None else header.index(name) for name in (image, label, split)]
        records = records[1:]
    else:
        places = [0, 1, 2 if len(header) > 2 else None]
    needed = max(place for place in places if place is not None) + 1
    found = _Cells([], [], [], [])
    for number, cells in records:
        if len(cells) < needed:
            raise UserError(f"--data {table}, line {number}: expected {needed} columns, found {len(cells)}.")
        path, label, split = ("" if place is None else cells[place].strip() for place in places)
        if not path or not label:
            raise UserError(f"--data {table}, line {number}: a path or a label is missing.")
        found.lines.append(number)
        found.paths.append(path)
        found.labels.append(label)
        found.splits.append(split)
    if not found.lines:
        raise UserError(f"--data {table} has no rows below its header.")
    return found


def _records(text: str) -> Iterator[tuple[int, list[str]]]:
    """(number of the line, cells): cut by the delimiter in the first line, else as "path label" at the last blank.

    Raises:
        csv.Error: unfinished quotes and the like.
    """
    first = text.lstrip().partition("\n")[0]
    delimiter = next((delimiter for delimiter in DELIMITERS if delimiter in first), None)
    if delimiter is None:
        for number, line in enumerate(text.split("\n"), start=1):
            yield number, line.strip().rsplit(maxsplit=1)
        return
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
    for cells in reader:
        yield reader.line_num, cells


def _is_path(cell: str) -> bool:
    return os.path.splitext(cell)[1].lower() in EXTENSIONS


def _base(table: Path, paths: Sequence[str]) -> Path:
    """The folder that the paths are relative to: the table's, or the one subfolder of it that has all of a sample."""
    sample = paths[:: max(len(paths) // 100, 1)]
    if any((table.parent / path).is_file() for path in sample):
        return table.parent
    folders = sorted(path for path in table.parent.iterdir() if path.is_dir() and not path.name.startswith("."))
    there = [folder for folder in folders if all((folder / path).is_file() for path in sample)]
    if len(there) != 1:
        return table.parent
    logger.info("--data %s: its files lie in %s.", escaped(table), escaped(there[0]))
    return there[0]


def _each_once(table: Path, cells: _Cells, files: Sequence[Path]) -> list[int]:
    """Rows, the first of each file.

    Raises:
        UserError: two rows of a file say different things.
    """
    first: dict[Path, int] = {}
    for i, file in enumerate(files):
        other = first.setdefault(file, i)
        for what, values in (("labels", cells.labels), ("splits", cells.splits)):
            if values[i] != values[other]:
                raise UserError(
                    f"--data {table}: {escaped(cells.paths[i])} has two {what}, {escaped(values[other])!r} in line "
                    f"{cells.lines[other]} and {escaped(values[i])!r} in line {cells.lines[i]}."
                )
    if len(first) < len(files):
        logger.warning("--data %s: %d rows name a file again and count once.", table, len(files) - len(first))
    return list(first.values())


def _splits(table: Path, lines: Sequence[int], values: Sequence[str]) -> list[str] | None:
    """ "train", "val" or "test" of every row; None where the table has no such column."""
    if not any(values):
        return None
    splits = []
    for line, value in zip(lines, values, strict=True):
        split = split_of(value)
        if split is None:
            raise UserError(
                f"--data {table}, line {line}: {escaped(value)!r} is no split; expected train, val (valid, "
                "validation, dev) or test."
            )
        splits.append(split)
    return splits

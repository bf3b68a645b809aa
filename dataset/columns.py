"""Columns of Parquet and Arrow files, read group by group with pyarrow, which is optional."""

import importlib.util
import json
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from utils.errors import UserError, reason

KEPT_BYTES = 128 << 20  # of decoded groups of rows that a process keeps


def need_pyarrow() -> None:
    """Raises UserError where it is missing."""
    if importlib.util.find_spec("pyarrow") is None:
        raise UserError("--dataset parquet needs the package pyarrow: pip install 'pyarrow>=15'.")


def is_arrow(file: Path) -> bool:
    """Whether it is a file of Hugging Face's `save_to_disk`, not Parquet."""
    return file.suffix == ".arrow"


class Columns:
    """One Parquet or Arrow file: groups of rows, of which columns are read.

    Raises:
        UserError: it cannot be read.
    """

    def __init__(self, path: Path) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        self.path = path
        self._parquet, self._batches = None, []
        try:
            if is_arrow(path):
                with pa.memory_map(str(path)) as source:
                    reader = pa.ipc.open_stream(source)
                    self.schema = reader.schema
                    self._batches = list(reader)
                self.sizes = [batch.num_rows for batch in self._batches]
                self.largest_group = 0  # bytes of what is read for one row; of a mapped file none but the row
            else:
                self._parquet = pq.ParquetFile(path, memory_map=True)
                self.schema = self._parquet.schema_arrow
                meta = self._parquet.metadata
                self.sizes = [meta.row_group(i).num_rows for i in range(meta.num_row_groups)]
                groups = (meta.row_group(i).total_byte_size for i in range(meta.num_row_groups))
                self.largest_group = max(groups, default=0)
        except (OSError, pa.ArrowException) as error:
            raise UserError(
                f"{path} is no readable {'Arrow' if is_arrow(path) else 'Parquet'} file ({reason(error)})."
            ) from None

    def group(self, number: int, column: str) -> Any:
        """A column of a group, as a pyarrow array. Raises OSError."""
        if self._parquet is None:
            return self._batches[number].column(column)
        return self._parquet.read_row_group(number, columns=[column]).column(column).combine_chunks()

    def whole(self, column: str) -> list[Any]:
        """A column of all rows, as plain values."""
        return [value for number in range(len(self.sizes)) for value in self.group(number, column).to_pylist()]

    def class_names(self, column: str) -> tuple[str, ...] | None:
        """Names of an integer column's classes, where Hugging Face's metadata has them."""
        metadata = (self.schema.metadata or {}).get(b"huggingface")
        try:
            names = json.loads(metadata)["info"]["features"][column]["names"] if metadata else None
        except (ValueError, KeyError, TypeError):
            return None
        return tuple(map(str, names)) if isinstance(names, list) and names else None


class ColumnStore:
    """Images in a column of bytes, or of structs with a field `bytes`. A copy in another process opens its own files.

    The groups that were read last are kept, up to KEPT_BYTES: what comes in the files' order reads each group once, and
    what comes in any order reads a group for an image.

    Args:
        files: Parquet or Arrow.
        column: name.
        sizes: rows of every group of every file.
    """

    def __init__(self, files: Sequence[Path], column: str, sizes: Sequence[Sequence[int]]) -> None:
        self.files = tuple(files)
        self._column = column
        self._groups = [(file, group) for file, groups in enumerate(sizes) for group in range(len(groups))]
        counts = np.array([size for groups in sizes for size in groups], dtype=np.int64)
        self._ends = counts.cumsum()
        self._open: dict[int, Columns] = {}
        self._kept: OrderedDict[int, Any] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_open": {}, "_kept": OrderedDict()}

    def read(self, place: int) -> bytes:
        """The content of a row. Raises OSError."""
        number = int(np.searchsorted(self._ends, place, side="right"))
        array = self._group(number)
        value = array[place - int(self._ends[number]) + len(array)].as_py()
        if value is None:
            raise OSError("the row holds no image")
        return value

    def _group(self, number: int) -> Any:
        if number not in self._kept:
            file, group = self._groups[number]
            if file not in self._open:
                self._open[file] = Columns(self.files[file])
            array = self._open[file].group(group, self._column)
            self._kept[number] = array.field("bytes") if hasattr(array, "field") else array
            while len(self._kept) > 1 and sum(kept.nbytes for kept in self._kept.values()) > KEPT_BYTES:
                self._kept.popitem(last=False)
        self._kept.move_to_end(number)
        return self._kept[number]

"""What a run writes while it goes on: text log, metrics.jsonl, summary.csv and TensorBoard; only process 0 writes.

Lines are counted, and the counts are stored in checkpoints: a resumed run cuts what a killed one wrote after its last
checkpoint, so no line stands twice and none is missing.
"""

import contextlib
import csv
import functools
import io
import itertools
import json
import logging
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from record.append import append_whole
from record.screen import Screen
from record.sinks import SinkThread
from utils.errors import reason
from utils.plain_json import plain_json
from utils.text import ESCAPE, escaped, fit_streams

logger = logging.getLogger(__name__)


class _TrainLog(logging.FileHandler):
    """train.log; a disk that does not take it any more costs the log, not the run, and no traceback a line."""

    def handleError(self, record: logging.LogRecord) -> None:
        logging.getLogger().removeHandler(self)
        error = sys.exc_info()[1]
        with contextlib.suppress(OSError):
            self.close()
        logger.warning("%s: cannot be written; going on without it: %s", self.baseFilename, error and reason(error))


def set_up_text_log(folder: Path | None, *, rank: int) -> None:
    """Send the project's log records to stderr and, in process 0, to train.log; other processes only warn."""
    fit_streams()
    root = logging.getLogger()
    for handler in list(root.handlers):
        root.removeHandler(handler)
        handler.close()
    screen = Screen(shared=rank > 0)
    screen.setFormatter(logging.Formatter("%(message)s" if rank == 0 else f"[process {rank}] %(message)s"))
    root.addHandler(screen)
    root.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    if folder is not None and rank == 0:
        file = _TrainLog(folder / "train.log", encoding="utf-8", errors=ESCAPE)
        file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        root.addHandler(file)


class LineFile:
    """A text file that only grows, by whole lines; knows how many it has.

    Args:
        path: the file; made at the first line.
        header: first line, written once, also over several resumed runs.
    """

    def __init__(self, path: Path, header: str | None = None) -> None:
        self.path = path
        self.header = header
        self.lines = 0
        self._file: io.FileIO | None = None

    def rewind(self, lines: int) -> None:
        """Keep the first `lines` lines (header included) and drop the rest, half-written ones too."""
        self.close()
        kept: list[bytes] = []
        if self.path.exists():
            with self.path.open("rb") as file:
                for line in file:
                    if len(kept) == lines or not line.endswith(b"\n"):
                        break
                    kept.append(line)
            with self.path.open("r+b") as file:
                file.truncate(sum(map(len, kept)))
        if len(kept) < lines:
            logger.warning("%s has %d lines and the checkpoint knows of %d.", self.path, len(kept), lines)
        self.lines = len(kept)

    def lines_before(self, is_later: Callable[[str], bool]) -> int:
        """How many lines come before the first for which the function is true."""
        if not self.path.exists():
            return 0
        with self.path.open(encoding="utf-8") as file:
            return sum(1 for _ in itertools.takewhile(lambda line: not is_later(line), file))

    def write(self, line: str) -> None:
        """Append one line and hand it to the operating system; a line that does not fit is left out whole."""
        lines = [self.header, line] if self.lines == 0 and self.header is not None else [line]
        content = "".join(f"{text}\n" for text in lines).encode(errors=ESCAPE)
        try:
            if self._file is None:
                self._file = self.path.open("ab", buffering=0)
            append_whole(self._file, content)
            self.lines += len(lines)
        except OSError as error:  # a full disk must not end a run that could still save a checkpoint later
            logger.warning("%s: a line could not be written: %s", self.path, reason(error))

    def close(self) -> None:
        """Close the file; the next line opens it again."""
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.close()
            self._file = None


def _trained_later(epoch: int, first: int, line: str) -> bool:
    """Whether a line of metrics.jsonl lies after so many whole epochs; `first` is the number of the first one."""
    record = json.loads(line)
    return bool(record["epoch"] > epoch if record["kind"] == "eval" else record["epoch"] - first >= epoch)


def _first_epoch(metrics: Path) -> int:
    """By which number metrics.jsonl calls the epoch that trains first: 1; 0 in one of an earlier version.

    Those had no loss per network.
    """
    try:
        with metrics.open(encoding="utf-8") as file:
            records = map(json.loads, file)
            return next((int("loss_per_network" in one) for one in records if one.get("kind") == "train"), 1)
    except (OSError, ValueError):
        return 1


def _reached(metrics: Path) -> dict[str, int]:
    """The last step whose figures are in metrics.jsonl, as "train", and the last epoch that was evaluated, as "val"."""
    found: dict[str, int] = {}
    with contextlib.suppress(OSError, ValueError, KeyError), metrics.open(encoding="utf-8") as file:
        for record in map(json.loads, file):
            kind, place = ("train", "step") if record["kind"] == "train" else ("val", "epoch")
            found[kind] = max(found.get(kind, -1), int(record[place]))
    return found


def _evaluated_later(epoch: int, line: str) -> bool:
    """The same for a row of summary.csv; its header lies before everything."""
    number = line.split(",", 1)[0]
    return number.isdecimal() and int(number) > epoch


class RunLog:
    """metrics.jsonl, summary.csv and TensorBoard of one run directory.

    Args:
        folder: the run directory.
        num_networks: S, for the columns of summary.csv.
        figures: further columns of it, figures of an evaluation by name.
        active: False in all processes but one; then nothing is written.

    Attributes:
        columns: of summary.csv.
        sink: takes the scalars too, where one is open.
        first_epoch: the number of the first epoch in the records of metrics.jsonl that training writes.
        reached: place of the last scalars of each kind in metrics.jsonl before it was rewound.
    """

    def __init__(self, folder: Path, num_networks: int, *, active: bool, figures: Sequence[str] = ()) -> None:
        self.folder = folder
        self.active = active
        self.columns = [
            "epoch",
            "step",
            "learning_rate",
            "ensemble_acc1",
            "ensemble_acc5",
            *(f"acc1_{i + 1}" for i in range(num_networks)),
            "best_acc1",
            "train_loss",
            "train_loss_per_network",
            "train_acc1",
        ]
        self.columns += [name for name in figures if name not in self.columns]
        self.columns.append("seconds")
        self.first_epoch = 1
        self.metrics = LineFile(folder / "metrics.jsonl")
        self.summary = LineFile(folder / "summary.csv", header=",".join(self.columns))
        self._boards: dict[str, Any] = {}
        self._has_boards = active
        self._purge: dict[str, int] = {}
        self.sink: SinkThread | None = None
        self.reached: Mapping[str, int] = {}

    def positions(self) -> dict[str, int]:
        """Lines written so far, for a checkpoint."""
        return {"metrics": self.metrics.lines, "summary": self.summary.lines}

    def rewind(self, positions: Mapping[str, int], *, epoch: int, step: int) -> None:
        """Go back to where a checkpoint was written, after `epoch` whole epochs and `step` steps."""
        if not self.active:
            return
        self.reached = _reached(self.metrics.path)
        self.metrics.rewind(int(positions.get("metrics", 0)))
        self.summary.rewind(int(positions.get("summary", 0)))
        # a run that began with other columns, or with another count, keeps them
        self.first_epoch = _first_epoch(self.metrics.path)
        if self.summary.lines:
            with self.summary.path.open(encoding="utf-8") as file:
                self.columns = file.readline().rstrip("\n").split(",")
        self._purge_boards(epoch, step)

    def cut(self, *, epoch: int, step: int) -> None:
        """Leave out what was logged after `epoch` whole epochs and `step` steps: a run goes back there."""
        if not self.active:
            return
        self.metrics.rewind(self.metrics.lines_before(functools.partial(_trained_later, epoch, self.first_epoch)))
        self.summary.rewind(self.summary.lines_before(functools.partial(_evaluated_later, epoch)))
        self._purge_boards(epoch, step)

    def _purge_boards(self, epoch: int, step: int) -> None:
        # TensorBoard drops what stands at these places and after them; the evaluation of epoch E stands at E
        self._purge = {"val": epoch + 1 if step else 0, "train": step}

    def write_metrics(self, record: Mapping[str, Any]) -> None:
        """One JSON object as a line of metrics.jsonl."""
        if self.active:
            self.metrics.write(json.dumps(plain_json(record), separators=(", ", ": ")))

    def write_summary(self, record: Mapping[str, Any]) -> None:
        """One row of summary.csv; columns that the record lacks stay empty."""
        if self.active:
            row = io.StringIO()
            values = [record.get(name, "") for name in self.columns]
            csv.writer(row, lineterminator="").writerow(
                [f"{value:.6g}" if isinstance(value, float) else value for value in values]
            )
            self.summary.write(row.getvalue())

    def _board(self, name: str, summaries: Iterable[Any], index: int) -> None:
        """Write to TensorBoard's file in a subfolder: `val` counts epochs, `train` counts steps."""
        try:
            if name not in self._boards:
                from record.events import EventFile

                self._boards[name] = EventFile(self.folder / name, self._purge.get(name))
            for summary in summaries:
                self._boards[name].add(summary, index)
        except OSError as error:
            logger.warning("%s: TensorBoard goes on without this run: %s", self.folder / name, reason(error))
            self._has_boards = False

    def scalars(self, name: str, values: Mapping[str, Any], index: int) -> None:
        """Scalars by tag; vectors become `1_<tag>` ... `S_<tag>`, as in the published logs.

        Tags of "train" stand under `train/`, because its axis counts steps and that of "val" epochs.
        """
        if not self._has_boards and self.sink is None:
            return
        group = "train/" if name == "train" else ""
        by_tag: dict[str, float] = {}
        for tag, value in values.items():
            if isinstance(value, list | tuple):
                by_tag |= {f"{group}{i + 1}_{tag}": item for i, item in enumerate(value)}
            elif isinstance(value, int | float):
                by_tag[group + tag] = value
        if self.sink is not None:
            self.sink.log(name, by_tag, index)
        if self._has_boards:
            from torch.utils.tensorboard.summary import scalar

            self._board(name, (scalar(tag, value) for tag, value in by_tag.items()), index)

    def views(self, views_SBCHW: Tensor, mean: Sequence[float], std: Sequence[float], index: int) -> None:
        """A picture of the S views of the first images: one column an image, one row a view."""
        if not self._has_boards:
            return
        images = views_SBCHW[:, :8].float().cpu()
        scale, shift = images.new_tensor(std).view(3, 1, 1), images.new_tensor(mean).view(3, 1, 1)
        pixels = (images * scale + shift).clamp(0, 1)
        from torch.utils.tensorboard.summary import image
        from torchvision.utils import make_grid

        grid = make_grid(pixels.flatten(0, 1), nrow=images.shape[1], padding=2)
        self._board("val", [image("views", grid, dataformats="CHW")], index)

    def picture(self, tag: str, png: bytes, index: int) -> None:
        """A PNG."""
        if not self._has_boards:
            return
        import numpy as np
        from PIL import Image
        from torch.utils.tensorboard.summary import image

        with Image.open(io.BytesIO(png)) as content:
            pixels_HWC = np.asarray(content.convert("RGB"))
        self._board("val", [image(tag, pixels_HWC, dataformats="HWC")], index)

    def hparams(self, flags: Mapping[str, Any], results: Mapping[str, float]) -> None:
        """The run's settings and final figures for TensorBoard's HParams page."""
        if not self._has_boards:
            return
        from torch.utils.tensorboard.summary import hparams, scalar

        plain = {k: v if isinstance(v, bool | int | float) else escaped(str(v)) for k, v in flags.items()}
        figures = (scalar(tag, value) for tag, value in results.items())
        self._board("val", [*hparams(plain, dict(results)), *figures], 0)

    def close(self) -> None:
        """Close all files."""
        self.metrics.close()
        self.summary.close()
        for board in self._boards.values():
            board.close()
        self._boards = {}

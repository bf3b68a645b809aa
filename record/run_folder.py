"""The run directory: whether it may be trained into, which checkpoint to go on from, what it says of the machine."""

import json
import logging
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch

from record import safe_tensors
from record.checkpoint import (
    BEST,
    Checkpoint,
    batches_done,
    list_checkpoints,
    load_checkpoint,
    load_newest,
    run_position,
    write_file,
)
from record.tables import csv_table
from utils.errors import UserError, reason
from utils.launch import World
from utils.plain_json import plain_json

logger = logging.getLogger(__name__)

RESULTS = "results.json"
PREDICTIONS = "predictions.json"  # results of a prediction, in a folder of its own
EXPORTED = (".pt2", ".onnx")  # what script/export.py writes
HPARAMS = "hparams_train.json"
SPLIT = "split.csv"  # which part every image is in, where the run drew the parts
ABANDONED = "abandoned"  # folder for what lies after a place that a run has gone back to


def split_table(membership: Mapping[str, Sequence[str]]) -> str:
    """`split.csv`: the name of every image and its part, in the order of the names.

    Args:
        membership: part -> names.
    """
    rows = sorted((name, part) for part, names in membership.items() for name in names)
    return csv_table(("path", "split"), rows)


class Resumed(NamedTuple):
    """A checkpoint to go on from, and where it lies."""

    state: Checkpoint
    path: Path


def open_run(folder: Path, resume: str | None) -> Resumed | None:
    """The checkpoint to go on from, or None for a fresh run.

    Args:
        folder: --model_dir.
        resume: a path, "auto" for the newest readable checkpoint of the folder, or None.

    Raises:
        UserError: the folder holds a run and `resume` is none of it, or the checkpoint cannot be used.
    """
    if resume == "auto":
        found = load_newest(folder) if folder.is_dir() else None
        if found is None:
            return None
        logger.info("Going on from %s", found[1])
        return Resumed(cast(Checkpoint, found[0]), found[1])
    holds_run = folder.is_dir() and bool(list_checkpoints(folder) or (folder / "metrics.jsonl").exists())
    if resume is not None:
        path = Path(resume)
        content = load_checkpoint(path)
        if holds_run and not is_in(path, folder):
            raise UserError(
                f"--model_dir {folder} holds another run than --resume {path}: choose another --model_dir, or a "
                "checkpoint of the run that is there."
            )
        return Resumed(cast(Checkpoint, content), path)
    if holds_run:
        raise UserError(
            f"--model_dir {folder} already holds a run: go on with --resume auto, or choose another --model_dir."
        )
    return None


def checkpoint_of(path: str | PathLike[str], *, or_newest: bool = False) -> Path:
    """The checkpoint that a path means: itself, or of a run directory the best one, or model.safetensors.

    Args:
        or_newest: take the newest checkpoint of a run that has no best one yet.

    Raises:
        UserError: a directory without it, or an exported file.
    """
    path = Path(path)
    if not path.is_dir():
        if path.suffix in EXPORTED:
            raise UserError(f"{path}: is an exported file, and commands take the checkpoint; cotrain.load reads it.")
        return path
    newest = list_checkpoints(path)
    for one in (path / BEST, *(newest if or_newest else ()), path / safe_tensors.MODEL):
        if one.is_file():
            return one
    if newest:
        raise UserError(
            f"{path}: its run has no {BEST} yet. Go on with train_split.py --resume auto, or name a checkpoint, "
            f"such as {newest[0]}."
        )
    if (path / HPARAMS).exists():
        raise UserError(f"{path}: its run has written no checkpoint yet. Go on with train_split.py --resume auto.")
    runs = sorted(one.parent.name for one in path.glob(f"*/{BEST}"))
    there = f"; it holds the runs {', '.join(runs[:3])}{', …' * (len(runs) > 3)}" if runs else ""
    raise UserError(f"{path}: holds no run: expected a directory of train_split.py, or a checkpoint{there}.")


def is_in(path: Path, folder: Path) -> bool:
    """Whether a checkpoint is one of the run in a folder."""
    return path.resolve().parent == folder.resolve()


def put_aside(folder: Path, *, epoch: int, done: int | None) -> list[str]:
    """Move checkpoints that lie after a place, which a run goes back to, into `abandoned/`; returns their names.

    Args:
        epoch: whole epochs at that place.
        done: batches done in all, where the place is within an epoch.
    """
    place = (epoch, -1.0 if done is None else float(done))
    later = [path for path in list_checkpoints(folder) if (run_position(path) or place) > place]
    for path in later:
        _move_aside(path)
    return [path.name for path in later]


def _move_aside(path: Path) -> None:
    target = path.parent / ABANDONED
    target.mkdir(exist_ok=True)
    number, free = 0, target / path.name
    while free.exists():
        number += 1
        free = target / f"{path.name}.{number}"
    os.replace(path, free)


def keep_best(resumed: Path, folder: Path, best: Mapping[str, Any] | None) -> bool:
    """Have the weights of the best epoch so far in the run directory; False where they are nowhere.

    They may be the best weights beside the checkpoint that a run goes on from, that epoch's own checkpoint, or the one
    gone on from. What stands under the name of the best weights in the directory and is of another epoch, later than a
    place that the run has gone back to, is put aside.

    Args:
        resumed: the checkpoint that the run goes on from.
        folder: the run directory.
        best: `epoch` and `step` of the best evaluation so far; None: there was none.
    """
    here = folder / BEST
    names = [BEST] if best is None else [BEST, f"checkpoint_{best['epoch']}.pth.tar", resumed.name]
    candidates = [path for name in names if (path := resumed.parent / name).is_file()]
    found = next((path for path in candidates if best is not None and _is_of(path, best)), None)
    if found is not None and found.resolve() == here.resolve():
        return True
    if here.is_file():
        _move_aside(here)
    if found is not None:
        write_file(here, found.read_bytes())
    return best is None or found is not None


def _is_of(path: Path, best: Mapping[str, Any]) -> bool:
    """Whether a checkpoint was made at this evaluation."""
    try:
        content = load_checkpoint(path)
    except UserError:
        return False
    return bool(content.get("epoch") == best["epoch"] and batches_done(content) == best["step"])


def make_folder(folder: Path) -> None:
    """Make the run directory.

    Raises:
        UserError: it cannot be made or written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--model_dir {folder}: cannot be made: {reason(error)}.") from None
    if not os.access(folder, os.W_OK):
        raise UserError(f"--model_dir {folder}: cannot be written.")


def read_results(folder: Path, name: str = RESULTS) -> dict[str, Any] | None:
    """results.json of a run that ended, or another file of its kind; None where there is none that can be read."""
    try:
        results = json.loads((folder / name).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return results if isinstance(results, dict) else None


def as_json(value: Mapping[str, Any]) -> str:
    """The contents of a JSON file."""
    return json.dumps(plain_json(value), indent=2) + "\n"


def describe_environment(world: World) -> dict[str, Any]:
    """What a run runs on, for env.json."""
    return {
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "platform": platform.platform(),
        "cpu_count": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else "cpu",
        "world_size": world.world_size,
    }

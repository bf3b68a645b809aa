"""The run directory: whether it may be trained into, which checkpoint to go on from, what it says of the machine."""

import contextlib
import errno
import json
import logging
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
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
from utils import distributed
from utils.errors import UserError, reason
from utils.launch import World
from utils.plain_json import plain_json

try:
    import fcntl
except ImportError:  # where there are no such locks
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)

RESULTS = "results.json"
PREDICTIONS = "predictions.json"  # results of a prediction, in a folder of its own
EXPORTED = (".pt2", ".onnx")  # what script/export.py writes
HPARAMS = "hparams_train.json"
SPLIT = "split.csv"  # which part every image is in, where the run drew the parts
ABANDONED = "abandoned"  # folder for what lies after a place that a run has gone back to
GRACE = 5.0  # seconds that a killed training may take to be gone


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


@contextlib.contextmanager
def alone_in(folder: Path, refusal: Callable[[str], str], *, seconds: float = 0.0) -> Iterator[int | None]:
    """Hold a folder against others who would hold it; yields the descriptor that does so, None where none can.

    It is a lock on the folder itself, which leaves no file: the system lets go of it when the last process that has the
    descriptor is dead, so nothing outlives a kill. Started programs do not inherit it unless they are given it. File
    systems keep such locks to one machine, most of them; where there are none, a line says so and nothing is held.

    Args:
        folder: is there.
        refusal: the error's line, of who holds the folder: "process 7", or where else somebody may be.
        seconds: to wait for somebody who may be about to end.

    Raises:
        UserError: it is held.
    """
    with contextlib.ExitStack() as opened:
        descriptor = None
        try:
            descriptor = os.open(folder, os.O_RDONLY)
            opened.callback(os.close, descriptor)
            _lock(descriptor, seconds)
        except BlockingIOError:
            raise UserError(refusal(_named(holders(folder)))) from None
        except OSError as error:
            logger.warning("%s cannot be locked: %s. Nothing keeps others out.", folder, reason(error))
        yield descriptor


def _lock(descriptor: int, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while fcntl is not None:
        try:
            return fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)
    raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))


def holders(folder: Path) -> list[str]:
    """The numbers of the other processes of this machine that have a folder open."""
    path, found = os.path.realpath(folder), []
    for process in Path("/proc").glob("[1-9]*"):
        with contextlib.suppress(OSError):  # it has ended, or is another user's
            if process.name != str(os.getpid()) and any(
                os.readlink(opened) == path for opened in (process / "fd").iterdir()
            ):
                found.append(process.name)
    return sorted(found, key=int)


def _named(numbers: Sequence[str]) -> str:
    if not numbers:
        return "in another container, of another user or on another machine"
    return f"process{'es' * (len(numbers) > 1)} {', '.join(numbers)}"


class Hold(contextlib.ExitStack):
    """What keeps other trainings of this machine out of a run directory until the context ends.

    Args:
        folder: --model_dir; it need not be there yet.
        world: of which process 0 holds it.
    """

    def __init__(self, folder: Path, world: World) -> None:
        super().__init__()
        self._folder, self._world, self._holds = folder, world, False

    def take(self) -> None:
        """Take hold of the folder, if that is there and not held yet. All processes of the job call it.

        Raises:
            UserError: another training is at work in it.
        """
        line = ""
        if self._world.is_main and not self._holds and self._folder.is_dir():
            try:
                self.enter_context(alone_in(self._folder, partial(_in_training, self._folder), seconds=GRACE))
                self._holds = True
            except UserError as error:
                line = str(error)
        if refused := distributed.gather_values(line)[0]:
            raise UserError(refused)


def _in_training(folder: Path, who: str) -> str:
    return (
        f"--model_dir {folder}: another training is at work in it ({who}). Wait for its end, or end it; or choose "
        "another --model_dir."
    )


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

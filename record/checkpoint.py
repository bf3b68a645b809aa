"""Checkpoints: plain tensors and dicts, written aside and renamed, never unpickling code when read.

What a run's checkpoint holds is `Checkpoint`; `training/state.py` fills it and reads it back.
"""

import contextlib
import hashlib
import logging
import os
import pickle
import re
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any, TypedDict

import torch
from torch import Tensor

from record import safe_tensors
from utils.errors import RunError, UserError, WriteError, reason
from utils.memory import is_more_than_memory, what_did_not_fit
from utils.text import ESCAPE

# Classes of the settings that other projects keep in their checkpoints (Cream's, timm's).
SETTINGS = ("yacs.config.CfgNode", "argparse.Namespace")

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
BEST = "model_best.pth.tar"
PARTIAL = ".partial"
_NAME = re.compile(r"^checkpoint_(\d+)(?:_(\d+))?\.pth\.tar$")


class Checkpoint(TypedDict, total=False):
    """The keys of a run's checkpoint. Those of the published code come first; the others are ours.

    epoch: the next one. arch: value of --arch. state_dict: tensors as `module.models.<i>...`. best_acc1: of the
    ensemble so far, in percent. optimizer, scaler: their states; a scaler with fp16 only.
    ema: moving average of the weights, as `state_dict`, with --ema_decay only.
    form: how members share one network, `model.registry.MemberForm`, or None.
    widths: what the solver found, of the stages, or, where `way` is "arguments", of the constructor's arguments
    `width_names`. library: package and version that they are of. fits_images: whether networks of a list were to be
    fitted to small images. method: training-only state of the method.
    config: every flag's value. classes, mean, std, crop_size, data_recipe: of the data. preprocessing: of an image file
    before a network sees it, `recipe.preprocessing.Preprocessing`; absent in those of earlier versions.
    codes: the classes' names in the data, where --class_map gave them others.
    held_out_sha256: digest of the images held out to choose the best epoch on, "" without. answers: of a tuned
    checkpoint only, see `evaluation.answers`.
    new_heads: prefixes of parameters that --pretrained did not bring. parameters: names in the order of `optimizer`.
    pace: how an epoch was made of batches, `training.resume.Pace`. sampler: where to go on from: `epoch`, `batch`,
    `step` and `done`, `training.resume.Position`. rng: `seed`.
    guard, meters, clock, report: what the run knows of itself; the meters of every process.
    environment: what must stay the same for the last bits to stay.
    format_version: of these keys.
    """

    epoch: int
    arch: str
    state_dict: dict[str, Tensor]
    best_acc1: float
    optimizer: dict[str, Any]
    scaler: dict[str, Any]
    ema: dict[str, Tensor]
    widths: list[float]
    form: dict[str, Any] | None
    way: str
    width_names: list[str]
    library: str
    fits_images: bool
    method: dict[str, Any]
    config: dict[str, Any]
    classes: list[str]
    codes: list[str]
    mean: list[float]
    std: list[float]
    crop_size: int
    data_recipe: str
    preprocessing: dict[str, Any]
    held_out_sha256: str
    answers: dict[str, Any]
    new_heads: list[str]
    parameters: list[str]
    pace: dict[str, Any]
    rng: dict[str, int]
    sampler: dict[str, int]
    guard: dict[str, Tensor]
    meters: list[Any]
    clock: dict[str, float]
    report: dict[str, Any]
    environment: dict[str, Any]
    format_version: int


def state_sha256(state: Mapping[str, Tensor]) -> str:
    """Hash of names, types, shapes and contents, in the order of the sorted names."""
    digest = hashlib.sha256()
    for name in sorted(state):
        value = state[name].detach().cpu().contiguous()
        digest.update(f"{name}|{value.dtype}|{tuple(value.shape)}|".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


class _ReasonKeeper:
    """A file for torch's zip writer, which hides why a write failed behind a position that it did not expect."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.error: OSError | None = None

    def write(self, content: bytes) -> int:
        try:
            return self._file.write(content)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self._file.flush()


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[_ReasonKeeper]:
    """A file to fill that takes the place of `path` at the end: written aside, flushed to the disk and renamed.

    Raises:
        WriteError: in place of any failure to write; `path` holds what it held before.
    """
    partial = path.with_name(path.name + PARTIAL)
    keeper = None
    try:
        with partial.open("wb") as file:
            keeper = _ReasonKeeper(file)
            yield keeper
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except (OSError, RuntimeError) as error:  # torch's zip writer turns a full disk into a RuntimeError
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        cause = keeper.error if keeper is not None and keeper.error is not None else error
        raise WriteError(f"{path}: could not be written: {reason(cause)[:300]}.") from None


def write_file(path: Path, content: bytes | str) -> None:
    """Replace a small file as a whole: a killed process leaves the old one or the new one, never half of one.

    Raises:
        WriteError: the disk is full or the folder cannot be written; `path` still holds what it held before.
    """
    with _replacing(path) as file:
        file.write(content.encode(errors=ESCAPE) if isinstance(content, str) else content)


def save_checkpoint(state: Mapping[str, Any], path: Path) -> None:
    """Write a checkpoint aside, flush it to the disk, and rename it to `path`.

    Args:
        state: what the file will hold.
        path: one named *.safetensors is written as such, and `state` is then what `record.safe_tensors.pack` takes.

    Raises:
        WriteError: the disk is full or the folder cannot be written; `path` still holds what it held before.
    """
    packed = safe_tensors.pack(state) if path.suffix == safe_tensors.SUFFIX else None
    with _replacing(path) as file:
        if packed is None:
            torch.save(dict(state), file)  # type: ignore[arg-type]
        else:
            file.write(packed)
    with contextlib.suppress(OSError):  # the name is on the disk some time later then
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


class _Counter:
    """A file that nothing is kept of."""

    def __init__(self) -> None:
        self.size = 0

    def write(self, content: bytes) -> int:
        self.size += len(content)
        return len(content)

    def flush(self) -> None:
        """There is nothing to flush."""


def checkpoint_size(state: Mapping[str, Any]) -> int:
    """How many bytes a checkpoint takes; writes none."""
    counter = _Counter()
    torch.save(dict(state), counter)  # type: ignore[arg-type]
    return counter.size


def load_checkpoint(path: str | Path, flag: str = "--resume") -> dict[str, Any]:
    """Read a checkpoint without ever running code from it; objects with a run's settings become plain dicts.

    Args:
        path: the file; one named *.safetensors is read as such, see `record.safe_tensors`.
        flag: named in errors.

    Raises:
        UserError: missing, unreadable, truncated, or holding anything but tensors and plain values.
        RunError: memory does not suffice for what it holds.
    """
    path = Path(path)
    if not path.is_file():
        what = "is a folder, not a file" if path.is_dir() else "does not exist"
        raise UserError(f"{flag} {path}: {what}.")
    if path.suffix == safe_tensors.SUFFIX:
        return safe_tensors.read(path, flag)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about foreign pickle protocols: such a file is refused anyway
            with torch.serialization.safe_globals([(OrderedDict, name) for name in SETTINGS]):
                content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise UserError(
            f"{flag} {path}: refused: it is not a checkpoint, or holds objects other than tensors and plain values."
        ) from None
    except (OSError, RuntimeError, ValueError, EOFError, KeyError, IndexError, AttributeError, TypeError) as error:
        if is_more_than_memory(error, path.stat().st_size):
            raise RunError(f"{flag} {path}: {what_did_not_fit(error)}. It needs a machine with more memory.") from None
        reason = "is empty" if path.stat().st_size == 0 else "is truncated, damaged or not a checkpoint"
        logger.debug("%s: %r", path, error)
        raise UserError(f"{flag} {path}: {reason}.") from None
    except (zipfile.BadZipFile, MemoryError, AssertionError, ImportError, OverflowError, RecursionError, SystemError):
        raise UserError(f"{flag} {path}: is truncated, damaged or not a checkpoint.") from None
    if not isinstance(content, dict):
        raise UserError(f"{flag} {path}: expected a dict with a 'state_dict', found {type(content).__name__}.")
    return content


def saved_epoch(path: Path) -> int | None:
    """The epoch that a checkpoint says it is of; None where there is none that can be read. Reads no tensors."""
    try:
        epoch = torch.load(path, map_location="cpu", weights_only=True, mmap=True)["epoch"]
    except Exception:  # a damaged file fails in every way there is, and is none to go on from
        return None
    return epoch if isinstance(epoch, int) else None


def batches_done(state: Mapping[str, Any]) -> int | None:
    """How many batches the run of a checkpoint has trained on; None where it does not say."""
    place = state.get("sampler", {})
    done = place.get("done", place.get("step"))  # "done" is absent in those of earlier versions
    return None if done is None else int(done)


def run_position(path: Path) -> tuple[int, float] | None:
    """(epoch, step) from a checkpoint's name, ordered in time; None for other files.

    `checkpoint_{epoch}.pth.tar` is written after `epoch` whole epochs, `checkpoint_{epoch}_{step}.pth.tar` inside epoch
    number `epoch` (counted from 0), so it is the newer of the two.
    """
    match = _NAME.match(path.name)
    if match is None:
        return None
    return int(match[1]), float(match[2]) if match[2] else -1.0


def list_checkpoints(folder: Path) -> list[Path]:
    """The run's checkpoints, newest first."""
    found = [(position, path) for path in folder.glob("checkpoint_*.pth.tar") if (position := run_position(path))]
    return [path for _, path in sorted(found, reverse=True)]


def load_newest(folder: Path) -> tuple[dict[str, Any], Path] | None:
    """The newest checkpoint of a run directory that can be read, or None where there is none.

    A damaged one is named in a warning, and the one before it is taken.

    Raises:
        UserError: there are checkpoints and none can be read.
    """
    candidates = list_checkpoints(folder)
    for path in candidates:
        try:
            content = load_checkpoint(path)
            if "state_dict" not in content or "epoch" not in content:
                raise UserError(f"--resume {path}: holds no run to continue (no 'state_dict' or 'epoch').")
        except UserError as error:
            logger.warning("%s Falling back to the one before it.", error)
            continue
        return content, path
    if candidates:
        raise UserError(f"--resume auto: none of the {len(candidates)} checkpoints in {folder} can be read.")
    return None


def prune_checkpoints(folder: Path, keep: int) -> None:
    """Delete all but the `keep` newest checkpoints, and the half of one that a killed writer left.

    Other half-written files stay: another thread or process may be writing them now. One that a kill left is replaced
    when its file is written again.
    """
    for path in list_checkpoints(folder)[keep:]:
        path.unlink(missing_ok=True)
    for path in folder.glob(f"*{PARTIAL}"):
        whole = path.with_name(path.name.removesuffix(PARTIAL))
        if whole.name == BEST or run_position(whole) is not None:
            path.unlink(missing_ok=True)

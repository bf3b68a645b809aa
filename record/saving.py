"""What a run writes while it goes on: checkpoints in the background, small files at once, and what failures mean."""

import logging
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from record import checkpoint as ckpt
from utils.errors import RunError, WriteError

logger = logging.getLogger(__name__)

PENDING = 2  # checkpoints that may wait in memory: the best one and the epoch's own


def snapshot(state: Any) -> Any:
    """A copy of nested dicts, lists and tuples whose tensors lie on the CPU and are nobody else's.

    One tensor in two places stays one; a view becomes as small as it looks.
    """
    copies: dict[int, Tensor] = {}

    def copy(value: Any) -> Any:
        if isinstance(value, Tensor):
            if id(value) not in copies:
                copies[id(value)] = torch.empty_like(value, device="cpu").copy_(value.detach())
            return copies[id(value)]
        if isinstance(value, Mapping):
            return {key: copy(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(copy(item) for item in value)
        return value

    return copy(state)


class Saver:
    """Writes the files of one run, from one process.

    Checkpoints are written by a thread of their own, one after another, from copies that are made at once: the disk
    delays no step. A run that is killed meanwhile goes on from the checkpoint before.

    Args:
        folder: the run directory.
        keep: number of checkpoints to leave; the best one comes on top.
        stops: a file that cannot be written ends the run; otherwise it is a warning.
    """

    def __init__(self, folder: Path, *, keep: int, stops: bool) -> None:
        self.folder = folder
        self._keep, self._stops = keep, stops
        self._thread = ThreadPoolExecutor(1, "saver")
        self._pending: list[Future[None]] = []
        self._lost: set[str] = set()

    def checkpoint(self, name: str, state: Mapping[str, Any]) -> None:
        """Begin to write a checkpoint; waits only where PENDING others are still to be written.

        Raises:
            RunError: an earlier one could not be written, and that ends the run.
        """
        self.check(waiting=PENDING - 1)
        self._pending.append(self._thread.submit(self._write_checkpoint, self.folder / name, snapshot(state)))

    def _write_checkpoint(self, path: Path, state: Mapping[str, Any]) -> None:
        try:
            ckpt.save_checkpoint(state, path)
        except WriteError as error:
            self._lost.add(path.name)
            self.failed(error)
        else:
            self._lost.discard(path.name)
            if ckpt.run_position(path) is not None:
                ckpt.prune_checkpoints(self.folder, self._keep)

    def check(self, *, waiting: int = PENDING) -> None:
        """Raise what a checkpoint has failed with, once no more than `waiting` are still to be written.

        Raises:
            RunError: as `checkpoint`.
        """
        while self._pending and (self._pending[0].done() or len(self._pending) > waiting):
            self._pending.pop(0).result()

    def wait(self) -> None:
        """Until every checkpoint is on the disk.

        Raises:
            RunError: as `checkpoint`.
        """
        self.check(waiting=0)

    def close(self) -> None:
        """Write what is still to be written, and end the thread; what fails is a warning now."""
        self._thread.shutdown()
        for error in filter(None, (written.exception() for written in self._pending)):
            logger.warning("%s", error)
        self._pending.clear()

    def file(self, name: str, content: bytes | str) -> None:
        """Write a small file, now.

        Raises:
            RunError: it could not be written, and that ends the run.
        """
        try:
            ckpt.write_file(self.folder / name, content)
            self._lost.discard(name)
        except WriteError as error:
            self._lost.add(name)
            self.failed(error)

    def failed(self, error: WriteError) -> None:
        """What a file that could not be written means.

        Raises:
            RunError: the end of the run.
        """
        if self._stops:
            raise RunError(
                f"{error} What was written before is whole: {self.on_disk()}; stopped by --on_save_error stop."
            ) from None
        logger.warning("%s What was written before is whole; going on.", error)

    def lost(self, *names: str) -> list[str]:
        """Which of these files could not be written the last time that it was tried; once `wait` has returned."""
        return [name for name in names if name in self._lost]

    def on_disk(self) -> str:
        """What a run can be gone on with, as a clause."""
        newest, best = ckpt.list_checkpoints(self.folder), ckpt.saved_epoch(self.folder / ckpt.BEST)
        kept = f"{newest[0].name} is the newest checkpoint on the disk" if newest else "no checkpoint is on the disk"
        return f"{kept}, {ckpt.BEST} is {'missing' if best is None else f'that of epoch {best}'}"

"""Processes that decode for a trainer: they outlive no trainer, no signal ends them, and no wait for them is endless.

A signal to the whole process group (Ctrl-C in a terminal, torchrun, Slurm) is a wish of the trainer's to end soon, and
until then it needs its workers. So they and their fork server never see SIGINT and SIGTERM.
"""

import contextlib
import functools
import multiprocessing
import multiprocessing.connection
import multiprocessing.context
import multiprocessing.queues
import os
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from utils import signals
from utils.errors import RunError, reason

LOOK = 1.0  # seconds between two looks at what else there is to do, and at the workers, while a batch does not come
PATIENCE = 1800.0  # seconds after which a batch that does not come ends the run; a disk may be away for a while

_Item = TypeVar("_Item")


class Undelivered(RuntimeError):
    """A worker cannot hand a batch over; says why."""


class Decoders(Generic[_Item]):
    """Workers that live as long as this, or decoding in this process; each request is one item.

    Args:
        files: request -> item; it travels to the workers.
        workers: how many; 0 decodes in this process.
        pinned: items come in pinned memory.

    Attributes:
        look: called every LOOK seconds while an item of the workers does not come; it may raise.
    """

    def __init__(self, files: Dataset[_Item], workers: int, *, pinned: bool) -> None:
        self._files, self._workers, self._pinned = files, workers, pinned
        self._plan: list[Any] = []
        self.look: Callable[[], None] = _nothing

    def items(self, requests: Sequence[Any]) -> Iterator[_Item]:
        """One item per request.

        Raises:
            RunError: a worker, or what lies between it and this process, has ended or does not answer.
        """
        self._plan[:] = requests
        with warnings.catch_warnings():
            # how many workers there are is the user's choice, and no result depends on it
            warnings.filterwarnings("ignore", message="This DataLoader will create", category=UserWarning)
            try:
                items = iter(self._loader)
            except (OSError, EOFError) as error:  # no room for their queues, no process or file to be had
                raise _lost(f"The decoding processes cannot be started ({reason(error)})") from None
        pinning: threading.Thread | None = getattr(items, "_pin_memory_thread", None)
        with _last_words(pinning) as words:
            for _ in requests:
                yield self._next(items, pinning, words)

    def _next(self, items: Iterator[_Item], pinning: threading.Thread | None, words: list[str]) -> _Item:
        """The next item, as soon as it comes."""
        began = time.monotonic()
        while True:
            try:
                return next(items)
            except Undelivered as error:  # as torch tells it here: the worker's traceback, and the reason at its end
                why = str(error).strip().splitlines()[-1].partition(": ")[2]
                raise _lost(f"A decoding process cannot hand its images over ({why[:200]})") from None
            except (OSError, EOFError) as error:  # where it died while handing a batch over
                raise _lost(f"A decoding process died ({reason(error)})") from None
            except RuntimeError as error:
                text = reason(error)
                if not text.startswith("DataLoader"):
                    raise
                if not text.startswith("DataLoader timed out"):
                    raise _lost(f"A decoding process died ({text})") from None
            if pinning is not None and not pinning.is_alive():
                raise _lost(f"Decoded images cannot be taken over any more ({' '.join(words)[:200] or 'unknown'})")
            self.look()
            if time.monotonic() - began > PATIENCE:
                raise RunError(
                    f"The {self._workers} decoding processes have given no batch for {PATIENCE / 60:.0f} minutes: does "
                    "the disk of --data answer? The last checkpoint is whole."
                )

    @functools.cached_property
    def _loader(self) -> DataLoader[_Item]:
        context = _context() if self._workers else None
        if context is not None:
            # as many as its queues need: torch leaves a traceback where it runs out of them half-way
            probes = [context.Semaphore() for _ in range(4 * (self._workers + 2))]
            del probes
        return DataLoader(
            self._files,
            batch_size=None,
            sampler=self._plan,
            num_workers=self._workers,
            collate_fn=_as_it_is,
            pin_memory=self._pinned,
            timeout=LOOK if self._workers else 0,
            persistent_workers=self._workers > 0,
            multiprocessing_context=context,
            worker_init_fn=_begin,
            generator=torch.Generator(),  # so that the global one is left alone
        )

    def close(self) -> None:
        """End the workers, which takes a moment where one of them is in the middle of a batch."""
        loader: Any = self.__dict__.pop("_loader", None)
        items = getattr(loader, "_iterator", None)
        if items is not None:
            items._shutdown_workers()


def hand_over(images: Tensor) -> None:
    """Move a worker's images to shared memory; nothing in other processes.

    Left to the thread of the worker's queue, a failure would be a batch that never comes.

    Raises:
        Undelivered: /dev/shm is full.
    """
    if get_worker_info() is None:
        return
    try:
        images.share_memory_()
    except (RuntimeError, OSError) as error:
        raise Undelivered(reason(error)) from None


def _nothing() -> None:
    pass


def _as_it_is(item: Any) -> Any:
    return item


def _lost(what: str) -> RunError:
    return RunError(f"{what}. Fewer --workers or a larger /dev/shm may help; what was written before is whole.")


@contextlib.contextmanager
def _last_words(thread: threading.Thread | None) -> Iterator[list[str]]:
    """What a thread of torch's ends with, kept for our line instead of its traceback."""
    words: list[str] = []
    before = threading.excepthook

    def keep(failure: Any) -> None:
        if failure.thread is not thread or failure.exc_value is None:
            before(failure)
        else:
            words.append(reason(failure.exc_value))

    if thread is not None:
        threading.excepthook = keep
    try:
        yield words
    finally:
        if thread is not None:
            threading.excepthook = before


# ---- the processes ---------------------------------------------------------------------------------------------------


def _context() -> multiprocessing.context.BaseContext:
    """How workers are started: a plain fork of a process that has threads or a GPU open may hang."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    from multiprocessing import forkserver

    multiprocessing.set_forkserver_preload([f"{__package__}.loader"])
    with signals.held():
        forkserver.ensure_running()
    return _WorkerContext()


class _Worker(multiprocessing.context.Process):
    """A process of the fork server that is killed where others are sent SIGTERM: it has nothing to clean up."""

    _start_method = "forkserver"

    @staticmethod
    def _Popen(process_obj: Any) -> Any:
        from multiprocessing import popen_forkserver

        class Popen(popen_forkserver.Popen):
            def terminate(self) -> None:
                self.kill()

        return Popen(process_obj)


class _WorkerContext(multiprocessing.context.BaseContext):
    _name = "forkserver"
    Process = _Worker

    def get_start_method(self, allow_none: bool = False) -> str:
        return self._name


def _begin(worker: int) -> None:
    """What a worker does first.

    It ends when the process that it decodes for has been killed. Torch's workers look at their parent. Here that is the
    fork server, which lives as long as its children do: they would wait for each other for ever. It also ends where its
    queue cannot hand a batch over, which would never come then, and the trainer would wait for it for ever.
    """
    for number in signals.NUMBERS:
        signal.signal(number, signal.SIG_IGN)
    multiprocessing.queues.Queue._on_queue_feeder_error = staticmethod(_end)  # type: ignore[attr-defined]
    trainer = multiprocessing.parent_process()
    assert trainer is not None
    sentinel = trainer.sentinel

    def watch() -> None:
        multiprocessing.connection.wait([sentinel])
        os._exit(1)

    threading.Thread(target=watch, name="end with trainer", daemon=True).start()


def _end(error: BaseException, item: Any) -> None:
    os._exit(1)

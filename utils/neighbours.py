"""What one process of a machine has worked out, handed to its neighbours there through a file without a name."""

import contextlib
import itertools
import json
import os
import pickle
import socket
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import torch
import torch.distributed as dist
from torch import Tensor

from utils.distributed import wait_until
from utils.launch import World

IN_MEMORY = "/dev/shm"
BOOT = Path("/proc/sys/kernel/random/boot_id")
SLACK = 2**20  # bytes of a file beside its values' own

Values = dict[str, Any]
Once = Callable[[Callable[[], Values]], Values]


def each_for_itself(work: Callable[[], Values]) -> Values:
    """What `work` gives, in every process that asks for it."""
    return work()


@contextlib.contextmanager
def once_per_machine(world: World, *, what: str) -> Iterator[Once]:
    """Inside, one process of every machine does a work, and its neighbours get the same result without doing it.

    What the context gives is a function of the work, which results in a dict of CPU tensors and plain values (such as
    `torch.load` takes with `weights_only`). All processes call it equally often and in the same order. They wait in no
    exchange, as in `utils.distributed.main_first`.

    The tensors lie in memory once for the whole machine; whoever writes to one gets pages of its own. They are in a
    file of /dev/shm or, where that has no room, of the temporary folder. It never has a name, so nothing of it is left
    however the processes end: neighbours open it through the process that holds it. Every process works for itself,
    as if it were alone, where neither place has room, where they cannot open the file (no /proc, containers of their
    own) and where the work failed in the first one.

    Args:
        what: a process has done with the work, as the end of "another process of this machine has not …".

    Raises:
        RunError: another process is not done after `utils.distributed.PATIENCE`.
    """
    if world.store is None:
        yield each_for_itself
        return
    store = dist.PrefixStore(f"once per machine/{next(world.waits)}", world.store)
    with contextlib.ExitStack() as held:
        machine = _machine() if world.local_size > 1 else None
        neighbours = None if machine is None else _Neighbours(store, machine, held, what)
        try:
            yield each_for_itself if neighbours is None else neighbours.once
        finally:  # one that failed reads no file any more
            store.add("done", 1)
        if neighbours is not None and neighbours.holds_files:
            wait_until(lambda: store.add("done", 0) >= world.world_size, f"another process has not {what}")


class _Neighbours:
    """The processes of one machine, as one of them sees them.

    Attributes:
        holds_files: this one holds files for the others; `held` closes them.
    """

    def __init__(self, store: dist.Store, machine: str, held: contextlib.ExitStack, what: str) -> None:
        self._store, self._machine, self._held, self._what = store, machine, held, what
        self._numbers = itertools.count()
        self.holds_files = False

    def once(self, work: Callable[[], Values]) -> Values:
        """What `work` gives, in this process or in the first of its neighbours to come here."""
        key = f"{self._machine}/{next(self._numbers)}"
        if self._store.add(f"{key}/come", 1) == 1:  # a launcher need not number the processes of a machine from 0
            return self._work_for_all(work, key)
        wait_until(lambda: self._store.check([key]), f"another process of this machine has not {self._what}")
        values = _opened(self._store.get(key))
        return work() if values is None else values

    def _work_for_all(self, work: Callable[[], Values], key: str) -> Values:
        place = ""
        try:
            values = work()
            file = _written(values)
            if file is not None:
                self._held.enter_context(file)
                self.holds_files = True
                place = _place_of(file)
                values = _opened(place) or values  # so that its own copy goes
            return values
        finally:
            self._store.set(key, place)


def _machine() -> str | None:
    """What all processes on this machine have in common, and none elsewhere; None where the system does not tell."""
    try:
        return f"{socket.gethostname()} {BOOT.read_text(encoding='ascii').strip()}"
    except OSError:
        return None


def _written(values: Values) -> IO[bytes] | None:
    """An open file that holds `values` and that only this user can open; None where there is no room for one."""
    plain = {name: value for name, value in values.items() if not isinstance(value, Tensor)}
    tensors = [value for value in values.values() if isinstance(value, Tensor)]
    size = sum(tensor.untyped_storage().nbytes() for tensor in tensors) + len(pickle.dumps(plain)) + SLACK
    for folder in (IN_MEMORY, None):
        with contextlib.ExitStack() as opened, contextlib.suppress(OSError, RuntimeError):  # torch's, of writing
            file = opened.enter_context(tempfile.TemporaryFile(dir=folder))
            os.posix_fallocate(file.fileno(), 0, size)  # no room is found out here, and not while it is written
            torch.save(values, file)
            file.truncate()
            file.flush()
            opened.pop_all()
            return file
    return None


def _place_of(file: IO[bytes]) -> str:
    stat = os.fstat(file.fileno())
    return json.dumps([f"/proc/{os.getpid()}/fd/{file.fileno()}", stat.st_dev, stat.st_ino])


def _opened(place: str | bytes) -> Values | None:
    """The values in a file that another process, or this one, holds; None where it cannot be opened from here."""
    if not place:
        return None
    path, device, inode = json.loads(place)
    with contextlib.suppress(OSError, RuntimeError):  # RuntimeError: torch's, of a mapping that is refused
        stat = os.stat(path)
        if (stat.st_dev, stat.st_ino) == (device, inode):  # else of another process of that number, in a container
            values: Values = torch.load(path, mmap=True, weights_only=True)
            return values
    return None

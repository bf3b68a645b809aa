"""Processes that are started anew over one store never read what the earlier ones left in it."""

import contextlib
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from utils import distributed, launch
from utils.meeting import fresh_store


class Killed(Exception):
    """In place of the end of a process."""


class FailingStore:
    """A store whose user is killed before its `calls`-th call."""

    def __init__(self, store: dist.Store, calls: int) -> None:
        self._store, self._left = store, calls

    def __getattr__(self, name: str) -> Callable:
        self._left -= 1
        if self._left == 0:
            raise Killed
        return getattr(self._store, name)


@pytest.fixture
def clients() -> Callable[[], dist.Store]:
    """Makes connections to one store, as every process of a job has its own."""
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    return lambda: dist.TCPStore("127.0.0.1", server.port, is_master=False, timeout=timedelta(seconds=20))


def start_all(clients: Callable[[], dist.Store], world_size: int, delays: Sequence[float] = ()) -> list[dist.Store]:
    def start(rank: int) -> dist.Store:
        time.sleep(delays[rank] if delays else 0)
        return fresh_store(clients(), rank, world_size, timeout=20)

    with ThreadPoolExecutor(world_size) as pool:
        return list(pool.map(start, range(world_size)))


def test_every_start_has_a_page_of_its_own_that_all_its_processes_share(clients: Callable[[], dist.Store]) -> None:
    for start, delays in enumerate([(0, 0, 0), (0.3, 0, 0.1), (0, 0.3, 0.1), (0.1, 0.3, 0)]):
        stores = start_all(clients, 3, delays)
        assert not any(store.check(["address"]) for store in stores)
        stores[0].set("address", str(start))
        assert [store.get("address") for store in stores] == [str(start).encode()] * 3


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("calls", range(1, 7))
def test_processes_killed_while_they_meet_leave_nothing_that_confuses_the_next(
    rank: int, calls: int, clients: Callable[[], dist.Store], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dist, "PrefixStore", _Prefixed)

    def start(who: int) -> None:
        store = clients()
        store.set_timeout(timedelta(seconds=1))  # the other one is through by then, or waits in vain
        with contextlib.suppress(Killed, RuntimeError):
            fresh_store(FailingStore(store, calls) if who == rank else store, who, 2, timeout=1)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(start, range(2)))
    for _ in range(2):
        stores = start_all(clients, 2)
        assert not stores[0].check(["address"])
        stores[0].set("address", "here")
        assert stores[1].get("address") == b"here"


class _Prefixed:
    """dist.PrefixStore for any object: the original takes only stores of its own library."""

    def __init__(self, prefix: str, store: dist.Store) -> None:
        self._prefix, self._store = prefix, store

    def set(self, key: str, value: str) -> None:
        self._store.set(f"{self._prefix}/{key}", value)

    def get(self, key: str) -> bytes:
        return self._store.get(f"{self._prefix}/{key}")

    def check(self, keys: list[str]) -> bool:
        return self._store.check([f"{self._prefix}/{key}" for key in keys])


def test_a_process_that_does_not_come_is_named(clients: Callable[[], dist.Store]) -> None:
    with pytest.raises(RuntimeError, match=r"process 1, 2 did not come"):
        fresh_store(clients(), 0, 3, timeout=0.1)


def _joined(local_rank: int, port: int, late: int, folder: str) -> None:
    """What torchrun's restarted processes do: join by the agent's store, which is never emptied."""
    os.environ.update(
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        RANK=str(local_rank),
        WORLD_SIZE="2",
        TORCHELASTIC_USE_AGENT_STORE="True",
        TORCHELASTIC_AGENT_MASTER_ADDR="127.0.0.1",
        TORCHELASTIC_AGENT_MASTER_PORT=str(port),
    )
    time.sleep(2.0 if local_rank == late else 0.0)
    launch.join([])
    total = distributed.all_reduce_sum(torch.ones(()))
    (Path(folder) / f"{local_rank}.txt").write_text(str(int(total)))
    dist.barrier()
    os._exit(0)  # as if killed: what this start wrote stays in the store


@pytest.mark.slow
def test_processes_started_anew_find_each_other_whoever_comes_first(tmp_path: Path) -> None:
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    for start, late in enumerate((0, 0, 1)):
        folder = tmp_path / str(start)
        folder.mkdir()
        torch.multiprocessing.spawn(_joined, args=(server.port, late, str(folder)), nprocs=2)
        assert [(folder / f"{rank}.txt").read_text() for rank in range(2)] == ["2", "2"]

"""What processes tell each other: rows and counts of all of them, in the order of their ranks."""

import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.processes import run_processes
from utils import distributed
from utils.errors import RunError
from utils.launch import World


def gathered(rank: int, world_size: int) -> dict[str, Any]:
    rows = torch.full((rank + 1, 2), float(rank))
    return {
        "rows": distributed.all_gather_rows(rows),
        "counts": distributed.gather_counts(rank + 1, torch.device("cpu")),
    }


def test_rows_and_counts_of_uneven_processes(tmp_path: Path) -> None:
    for result in run_processes(3, gathered, tmp_path / "r"):
        assert result["rows"][:, 0].tolist() == [0, 1, 1, 2, 2, 2]
        assert result["counts"] == [1, 2, 3]


def heard(rank: int, world_size: int) -> list[Any]:
    return distributed.said_by_first(lambda: [rank, {"widths": (1.5, 2)}])


def test_what_the_first_process_says_is_heard_by_all(tmp_path: Path) -> None:
    assert run_processes(2, heard, tmp_path / "r") == [[0, {"widths": (1.5, 2)}]] * 2
    assert heard(3, 4) == [3, {"widths": (1.5, 2)}]  # alone, it says it itself


@pytest.fixture
def two(monkeypatch: pytest.MonkeyPatch) -> list[World]:
    """Two processes of one store, which are threads here."""
    monkeypatch.setattr(distributed, "INTERVAL", 0.001)
    monkeypatch.setattr(torch.distributed, "barrier", None)  # an exchange has a time limit
    store = torch.distributed.HashStore()
    return [World(rank, 2, rank, 2, torch.device("cpu"), store=store) for rank in range(2)]


def test_the_others_wait_for_process_0_however_long_it_takes_and_in_no_exchange(two: list[World]) -> None:
    order: list[str] = []
    may_end = [threading.Event(), threading.Event()]

    def follow() -> None:
        for number in range(2):
            distributed.main_first(two[1], lambda number=number: order.append(f"other {number}"), what="worked")

    def work(number: int) -> None:
        may_end[number].wait(10)
        order.append(f"main {number}")

    other = threading.Thread(target=follow)
    other.start()
    for number in range(2):
        assert order == [word for i in range(number) for word in (f"main {i}", f"other {i}")]
        may_end[number].set()
        distributed.main_first(two[0], lambda number=number: work(number), what="worked")
        while len(order) < 2 * number + 2:
            time.sleep(0.001)
    other.join(10)
    assert order == ["main 0", "other 0", "main 1", "other 1"]


def test_nobody_waits_for_ever(two: list[World], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "PATIENCE", 0.0)
    with pytest.raises(RunError, match="process 0 has not opened the data after 0 hours"):
        distributed.main_first(two[1], lambda: None, what="opened the data")


def test_the_others_wait_outside_of_exchanges_until_process_0_has_done_what_is_its_own(two: list[World]) -> None:
    may_end, order = threading.Event(), list[str]()

    def follow() -> None:
        assert distributed.main_alone(two[1], lambda: order.append("never"), what="saved") is None
        order.append("other")

    other = threading.Thread(target=follow)
    other.start()
    main = threading.Thread(
        target=lambda: distributed.main_alone(two[0], lambda: (may_end.wait(10), order.append("main")), what="saved")
    )
    main.start()
    time.sleep(0.05)
    assert order == []
    may_end.set()
    main.join(10)
    other.join(10)
    assert order == ["main", "other"]


def test_buffers_are_sent_by_type_and_not_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    network = nn.Sequential(nn.Conv2d(1, 3, 1), nn.BatchNorm2d(3), nn.BatchNorm2d(3))
    network.register_buffer("grid", torch.ones(1, 3, 2, 2).to(memory_format=torch.channels_last))
    sent: list[torch.dtype] = []

    def from_process_0(flat: Tensor, group: object, group_src: int) -> None:
        sent.append(flat.dtype)
        flat += 1

    expected = {name: value + 1 for name, value in network.named_buffers()}
    monkeypatch.setattr(distributed, "is_alone", lambda group: False)
    monkeypatch.setattr(torch.distributed, "broadcast", from_process_0)
    distributed.broadcast_buffers(network)
    assert sorted(map(str, sent)) == ["torch.float32", "torch.int64"]
    for name, value in network.named_buffers():
        assert torch.equal(value, expected[name])


def test_a_process_alone_waits_for_nobody() -> None:
    assert distributed.main_first(World(0, 1, 0, 1, torch.device("cpu")), lambda: 3, what="counted") == 3


def test_networks_on_streams_of_their_own_are_no_mistake_to_warn_of(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[bool] = []
    monkeypatch.setattr(torch.autograd.graph, "set_warn_on_accumulate_grad_stream_mismatch", said.append, raising=False)
    monkeypatch.setattr(distributed, "DistributedDataParallel", lambda module, forward_sync_buffers=None, **_: module)
    module = torch.nn.Linear(1, 1)
    assert distributed.wrap(module, World(0, 2, 0, 2, torch.device("cpu"))) is module  # type: ignore[comparison-overlap]
    assert said == [False]
    monkeypatch.delattr(torch.autograd.graph, "set_warn_on_accumulate_grad_stream_mismatch")  # torch before 2.10
    distributed.wrap(module, World(0, 2, 0, 2, torch.device("cpu")))

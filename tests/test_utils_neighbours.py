"""Processes of a machine decode small images once, hold them in memory once, and get what each would decode itself."""

import contextlib
import errno
import os
import re
import tempfile
import threading
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image

from dataset import SourceRequest, own_images
from dataset.loader import TrainLoader
from dataset.shared import open_shared
from opening.data import open_shared_source
from parser_params import Config
from tests.processes import run_processes
from utils import distributed, neighbours
from utils.errors import RunError, UserError
from utils.launch import World
from utils.neighbours import Values, once_per_machine

CPU = torch.device("cpu")
NAMELESS = re.compile(r"/(#\d+|tmp\w{8}) \(deleted\)$")  # by the file system
pytestmark = pytest.mark.skipif(not neighbours.BOOT.exists(), reason="files are opened through /proc")


def pictures(folder: Path) -> Path:
    draw = np.random.default_rng(0)
    for split, count in {"train": 7, "val": 3}.items():
        for name in ("a", "b"):
            (folder / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = draw.integers(0, 256, (12, 12, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / split / name / f"{number}.png")
    (folder / "train" / "b" / "3.png").write_bytes(b"no image")
    return folder


def mapped() -> list[str]:
    """Files without a name that this process has in its memory: "device inode path" of each."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    return sorted({" ".join(line.split()[3:6]) for line in lines if NAMELESS.search(line)})


def open_files() -> list[str]:
    """Files without a name that this process holds open beside its output, which a test's may be."""
    places = [Path(f"/proc/self/fd/{number}") for number in os.listdir("/proc/self/fd") if int(number) > 2]
    links = [os.readlink(place) for place in places if place.is_symlink()]
    return sorted(link for link in links if NAMELESS.search(link))


@pytest.fixture
def nothing_held() -> Iterator[None]:
    """Afterwards no file without a name is open that was not so before."""
    before = open_files()
    yield
    assert open_files() == before


def no_room(*_: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


ROOMS: dict[str, dict[str, Any]] = {
    "alone": {"_machine": lambda: None},
    "memory": {},
    "temporary folder": {"IN_MEMORY": "/nowhere"},
    "none": {"_written": neighbours._written},  # with no_room
}


def opened(rank: int, world_size: int, data: str, store: str) -> dict[str, Any]:
    """What a process has after it opened the data, with room for the images in several places and in none."""
    real_read, real_room = own_images._read, os.posix_fallocate
    kept = {name: getattr(neighbours, name) for change in ROOMS.values() for name in change}
    config = Config(dataset="folder", data=data, model_dir=f"{store}.m", on_bad_image="skip", workers=0)
    world = World(rank, world_size, rank, world_size, CPU, store=dist.FileStore(store, world_size))
    found = {}
    for room, changes in ROOMS.items():
        decoded: list[int] = []
        before = open_files()

        def counted(files: Any, *rest: Any, decoded: list[int] = decoded) -> Values:
            decoded.append(len(files))
            return real_read(files, *rest)

        own_images._read = counted
        os.posix_fallocate = no_room if room == "none" else real_room
        for name, value in (kept | changes).items():
            setattr(neighbours, name, value)
        source = open_shared_source(config, world)
        loader = TrainLoader(
            source.train, batch_size=4, num_views=1, seed=3, rank=rank, world_size=2, device=CPU, workers=0, crop=None
        )
        found[room] = {
            "decoded": decoded,
            "mapped": mapped(),
            "held": [file for file in open_files() if file not in before],
            "bad": [str(path) for path in source.bad_images],
            "statistics": [*source.mean, *source.std],
            "test": [source.test.subset(torch.arange(6)).images, source.test.targets],
            "batches": [[batch.images, batch.labels_B, batch.indices_B] for batch in loader.epoch(0)],
        }
        assert source.train.images is not None
        source.train.images.zero_()  # pages of its own
        distributed.barrier()
        del source, loader
    return found


def test_two_processes_decode_once_and_get_what_each_decodes_for_itself(tmp_path: Path) -> None:
    data = pictures(tmp_path / "data")
    both = run_processes(2, opened, tmp_path / "r", str(data), str(tmp_path / "store"))
    decoded = {room: [process[room]["decoded"] for process in both] for room in ROOMS}
    for room in ("alone", "none"):
        assert decoded[room] == [[14, 6], [14, 6]]
        assert all(process[room]["mapped"] == [] for process in both)
    for room, folder in {"memory": neighbours.IN_MEMORY, "temporary folder": tempfile.gettempdir()}.items():
        assert decoded[room] == [[14, 6], []]
        assert both[0][room]["mapped"] == both[1][room]["mapped"]  # once for both
        assert len(both[0][room]["mapped"]) == 2
        assert all(line.split()[2].startswith(folder) for line in both[0][room]["mapped"])
    for process in both:
        for room in ROOMS:
            assert process[room]["held"] == []
            assert process[room]["bad"] == [str(data / "train" / "b" / "3.png")]
            assert len(process[room]["batches"]) == 3
            torch.testing.assert_close(
                [process[room][what] for what in ("statistics", "test", "batches")],
                [process["alone"][what] for what in ("statistics", "test", "batches")],
                rtol=0,
                atol=0,
            )


Neighbour = Callable[[World], Any]


@pytest.fixture
def together(monkeypatch: pytest.MonkeyPatch, nothing_held: None) -> Callable[..., list[Any]]:
    """Runs a function of its world in several threads, which stand for processes; what each gave or raised."""
    monkeypatch.setattr(distributed, "INTERVAL", 0.001)
    store = dist.HashStore()

    def run(function: Neighbour, *worlds: dict[str, int]) -> list[Any]:
        results: list[Any] = [None] * len(worlds)

        def one(number: int, places: dict[str, int]) -> None:
            world = World(number, len(worlds), device=CPU, store=store, **places)
            try:
                results[number] = function(world)
            except Exception as error:
                results[number] = error

        threads = [threading.Thread(target=one, args=item, daemon=True) for item in enumerate(worlds)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
        return results

    return run


THREE = tuple({"local_rank": rank, "local_size": 3} for rank in range(3))


def test_one_of_a_machine_works_whatever_its_number_and_the_others_read(together: Callable[..., list[Any]]) -> None:
    works: list[int] = []

    def work(world: World) -> list[Any]:
        with once_per_machine(world, what="worked") as once:
            found = [
                once(lambda n=n: works.append(n) or {"n": torch.full((3,), n), "of": world.rank}) for n in range(2)
            ]
        return [next(world.waits), *((int(values["n"].sum()), values["of"]) for values in found)]

    # no launcher's number is 0
    results = together(work, *({"local_rank": rank + 4, "local_size": 3} for rank in range(3)))
    assert sorted(works) == [0, 1]
    assert all(one == other for one, other in pairwise(results))
    assert [entry if isinstance(entry, int) else entry[0] for entry in results[0]] == [1, 0, 3]


def test_machines_with_one_process_and_with_several_end_together(together: Callable[..., list[Any]]) -> None:
    works: list[int] = []

    def work(world: World) -> int:
        with once_per_machine(world, what="worked") as once:
            once(lambda: works.append(world.local_size) or {"a": torch.zeros(2)})
        return next(world.waits)

    sizes = ({"local_rank": rank, "local_size": size} for rank, size in ((0, 2), (1, 2), (0, 1)))
    assert together(work, *sizes) == [1, 1, 1]
    assert sorted(works) == [1, 2]


@pytest.mark.parametrize("kind", [UserError, RunError, MemoryError])
def test_what_fails_in_one_fails_in_all_with_its_own_words(
    kind: type[Exception], together: Callable[..., list[Any]]
) -> None:
    def work(world: World) -> None:
        def fail() -> Values:
            raise kind("a.png: no image")

        with once_per_machine(world, what="worked") as once:
            once(lambda: {"a": torch.zeros(2)})
            once(fail)

    for error in together(work, *THREE):
        assert type(error) is kind
        assert str(error) == "a.png: no image"


def test_nobody_waits_for_one_that_failed_and_goes_on(
    together: Callable[..., list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distributed, "PATIENCE", 5.0)

    def work(world: World) -> int:
        with contextlib.suppress(UserError), once_per_machine(world, what="worked") as once:
            if world.local_size == 1:
                raise UserError("no data on this machine")
            once(lambda: {"a": torch.zeros(2)})
        return next(world.waits)

    sizes = ({"local_rank": rank, "local_size": size} for rank, size in ((0, 2), (1, 2), (0, 1)))
    assert together(work, *sizes) == [1, 1, 1]


def test_nobody_waits_for_data_that_are_missing_and_may_be(
    together: Callable[..., list[Any]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(distributed, "PATIENCE", 5.0)

    def opens(world: World) -> None:
        open_shared(SourceRequest(dataset="folder", root=tmp_path / "nowhere", download=False), world)

    for error in together(opens, *THREE):
        assert isinstance(error, UserError)


def test_where_a_neighbours_file_cannot_be_opened_each_works(
    together: Callable[..., list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = neighbours._place_of
    # in another container the number of the process is that of a stranger
    monkeypatch.setattr(neighbours, "_place_of", lambda file: real(file).replace("]", "0]"))
    works: list[int] = []

    def work(world: World) -> int:
        with once_per_machine(world, what="worked") as once:
            return int(once(lambda: works.append(world.rank) or {"a": torch.ones(2)})["a"].sum())

    assert together(work, *THREE) == [2, 2, 2]
    assert sorted(works) == [0, 1, 2]


def test_nobody_waits_for_ever(together: Callable[..., list[Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "PATIENCE", 0.0)
    never = threading.Event()
    waiting: list[Any] = []

    def work(world: World) -> None:
        with once_per_machine(world, what="worked") as once:
            try:
                once(lambda: never.wait(10) and {"a": torch.zeros(1)})  # type: ignore[arg-type]
            except RunError as error:
                waiting.append(str(error))
                never.set()
                raise

    together(work, *THREE[:2])
    assert waiting == ["another process of this machine has not worked after 0 hours."]


def test_without_a_store_each_works() -> None:
    with once_per_machine(World(0, 1, 0, 1, CPU), what="worked") as once:
        assert once(lambda: {"a": 1}) == {"a": 1}
    assert mapped() == []

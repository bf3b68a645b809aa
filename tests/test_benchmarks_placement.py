"""The benchmark of placements: what it counts, which rows carry goals, and the link between its hosts."""

import argparse
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from benchmarks import own, placement
from benchmarks.counts import count_waits
from benchmarks.gpu import committed_rows, goals_of
from benchmarks.placement_process import CollectiveBytes, link_bytes
from tests.processes import run_processes
from utils.distributed import wrap
from utils.errors import RunError
from utils.launch import World
from utils.mesh import build_mesh

CPU = torch.device("cpu")


def counted(rank: int, world_size: int) -> dict:
    module = wrap(torch.nn.Linear(10, 5), World(rank, world_size, rank, world_size, CPU))
    before = link_bytes("lo")
    with CollectiveBytes() as found:
        module(torch.ones(1, 10)).sum().backward()
        parts = [torch.empty(7) for _ in range(world_size)]
        dist.all_gather(parts, torch.ones(7))
    assert link_bytes("lo") > before
    return found.found


def test_bytes_of_every_collective_are_counted_those_of_ddp_too(tmp_path: Path) -> None:
    for found in run_processes(2, counted, tmp_path / "r"):
        assert found["allreduce"] == 4 * (10 * 5 + 5)
        assert found["allgather"] == 4 * 7


def reports(data: list, networks: list, key: str) -> list:
    return [{name: {key: value, "calls": {"allreduce": 1}} for name, value in (("data", data), ("networks", networks))}]


def test_a_ratio_is_the_median_of_rounds_and_meets_its_goal_or_not() -> None:
    found = reports([2.0, 4.0, 9.0], [1.0, 1.0, 1.0], "seconds")
    row = placement._row("G14", "subject", "seconds a step", found, lambda one: one["seconds"], slowest=True)
    assert (row["ratio"], row["ratio_min"], row["ratio_max"], row["met"], row["commit"]) == (4.0, 2.0, 9.0, True, 2.0)
    missed = placement._row("G13", "subject", "bytes", reports([999.0], [1.0], "wire"), lambda one: one["wire"])
    assert not missed["met"]
    assert placement._row(None, "subject", "bytes", found, lambda one: one["seconds"]).get("met") is None
    text = placement.markdown([row, missed])
    assert "| G14 | subject | seconds a step | 4 | 1 | 4.00 (2.00 – 9.00) | ≥ 2.0: met |" in text
    assert "≥ 1,000.0: missed" in text


@pytest.mark.parametrize(("arch", "carries"), [("wide_resnet16_8", True), ("resnet20", False)])
def test_only_the_networks_that_a_goal_names_carry_it(arch: str, carries: bool) -> None:
    options, batch = argparse.Namespace(arch=arch, split_factor=2), 16
    assert placement.is_meant(options, batch, 16) == carries
    assert not placement.is_meant(options, batch, 128)


def test_two_hosts_are_joined_by_a_link_and_nothing_is_left_of_them() -> None:
    why = placement.cannot_link()
    if why:
        pytest.skip(why)
    with placement.linked_hosts("100mbit") as places:
        assert [place.meeting for place in places] == [placement.ADDRESSES[0]] * 2
        shown = subprocess.run([*places[1].prefix, "tc", "qdisc", "show"], capture_output=True, text=True, check=True)
        assert "tbf" in shown.stdout
        assert "100Mbit" in shown.stdout
    left = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
    assert places[0].prefix[-1] not in left


def test_a_place_without_namespaces_is_named_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*words: str) -> None:
        raise RunError("ip netns add: Operation not permitted (needs root).")

    monkeypatch.setattr(placement, "_ip", refuse)
    monkeypatch.setattr(placement.shutil, "which", lambda name: f"/usr/sbin/{name}")
    assert placement.cannot_link() == "ip netns add: Operation not permitted (needs root)."
    monkeypatch.setattr(placement.shutil, "which", lambda name: None)
    assert "not installed" in placement.cannot_link()


def test_parts_without_a_link_ask_for_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placement, "cannot_link", None)
    monkeypatch.setattr(placement, "_memory_rows", lambda options: iter([{"goal": "G15"}]))
    options = argparse.Namespace(arch="resnet20", split_factor=2, parts="memory")
    assert list(placement.run(options, CPU)) == [{"goal": "G15"}]


@pytest.mark.parametrize(("program", "line"), [("exit('one\\nanother')", "another"), ("exit(3)", "exit code 3")])
def test_what_a_process_said_last_is_why_it_failed(program: str, line: str) -> None:
    options = argparse.Namespace(threads=1, arch="resnet20", seconds=1, limit=60)
    place = placement.Place((sys.executable, "-c", program))  # what stands in the place of the benchmark's process
    with pytest.raises(RunError, match=f"^placement: a process failed: {line}$"):
        placement._measured([place], options, split_factor=1, batch_size=1, rounds=1, warmup=0)


def test_committed_rows_settle_the_goals_of_placement() -> None:
    found = goals_of(committed_rows())
    assert {"G13", "G14", "G15"} <= found.keys()


def audited(rank: int, world_size: int, folder: str) -> list:
    """What a whole step under both placements waits for, and what it sends."""
    world = World(rank, world_size, rank, world_size, CPU)
    found: list = []
    for name, here in (("data", world), ("networks", replace(world, mesh=build_mesh(2, CPU)))):
        flags = [
            "--arch",
            "resnet20",
            "--split_factor",
            "2",
            "--batch_size",
            "8",
            "--workers",
            "0",
            "--placement",
            name,
        ]
        flags += ["--clip_grad", "1.0", "--is_mixup", "1", "--on_nonfinite", "skip"]
        trainer = own.open_trainer(flags, Path(folder, f"{name}{rank}"), CPU, world=here)
        waits = count_waits(own.training_step(trainer), CPU)
        with CollectiveBytes() as counted:
            own.training_step(trainer)()
        found.append([waits, counted.found])
    return found


def test_a_step_waits_for_nothing_and_sends_logits_and_one_number(tmp_path: Path) -> None:
    for data, networks in run_processes(2, audited, tmp_path / "r", str(tmp_path)):
        assert data[0] == networks[0] == []
        assert networks[1] == {"allgather": 1 * 8 * 10 * 4, "allreduce": 8}
        assert data[1]["allreduce"] > 1e6

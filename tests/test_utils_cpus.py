"""CPUs that a process may use: affinity, quotas of both versions of cgroups, and who decides about threads."""

import os
from pathlib import Path

import pytest
import torch

from utils import cpus
from utils.cpus import allowed_cpus, settle_threads


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Function of (affinity, cgroups of the process, files of cgroups): a machine of 64 CPUs that is so divided."""

    def build(affinity: int, groups: str = "", **files: str) -> None:
        (tmp_path / "self").write_text(groups)
        for name, content in files.items():
            path = tmp_path / "fs" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content)
        monkeypatch.setattr(cpus, "CGROUPS", tmp_path / "fs")
        monkeypatch.setattr(cpus, "OF_PROCESS", tmp_path / "self")
        monkeypatch.setattr(os, "cpu_count", lambda: 64)
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(affinity)))

    return build


V1 = "9:memory:/job\n4:cpu,cpuacct:/job\n0::/\n"


@pytest.mark.parametrize(
    ("affinity", "groups", "files", "allowed"),
    [
        (64, "", {}, 64),
        (8, "", {}, 8),
        (64, "0::/\n", {"cpu.max": "400000 100000\n"}, 4),  # in a container its group is the root
        (64, "0::/\n", {"cpu.max": "max 100000\n"}, 64),
        (3, "0::/\n", {"cpu.max": "400000 100000\n"}, 3),
        (64, "0::/\n", {"cpu.max": "50000 100000\n"}, 1),
        (64, "0::/\n", {"cpu.max": "250000 100000\n"}, 2),  # a third thread would be held back
        (64, "0::/a/b\n", {"a/b/cpu.max": "max 100000\n", "a/cpu.max": "600000 100000\n"}, 6),  # of a group above
        (64, "0::/host/path\n", {"cpu.max": "500000 100000\n"}, 5),  # a path that is not seen from within
        (64, V1, {"cpu/job/cpu.cfs_quota_us": "300000\n", "cpu/job/cpu.cfs_period_us": "100000\n"}, 3),
        (64, V1, {"cpu/job/cpu.cfs_quota_us": "-1\n", "cpu/job/cpu.cfs_period_us": "100000\n"}, 64),
        (64, V1, {"job/cpu.cfs_quota_us": "100000\n", "job/cpu.cfs_period_us": "100000\n"}, 64),  # of no CPU
        (64, "0::/\n", {"cpu.max": "nonsense\n"}, 64),
    ],
)
def test_the_least_of_affinity_and_quotas(machine, affinity, groups, files, allowed):
    machine(affinity, groups, **files)
    assert allowed_cpus() == allowed


def test_a_system_without_any_of_it_has_all_its_cpus(machine, monkeypatch, tmp_path):
    machine(8)
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(cpus, "OF_PROCESS", tmp_path / "nowhere")
    assert allowed_cpus() == 64


SLOW = ": they wait for each other, and all is many times slower"


@pytest.mark.parametrize(
    ("asked", "variable", "processes", "torchs", "threads", "why"),
    [
        (4, "3", 1, 3, 4, "--threads"),
        (7, "3", 1, 3, 7, f"--threads; more than the 4 that may be used{SLOW}"),
        (None, "3", 2, 3, 3, f"OMP_NUM_THREADS; more than the 4 that may be used by 2 processes{SLOW}"),
        (None, "3", 1, 3, 3, "OMP_NUM_THREADS"),
        (None, None, 1, 32, 4, "of 4 that may be used"),
        (None, None, 2, 32, 2, "of 4 that may be used by 2 processes"),
        (None, None, 8, 32, 1, "of 4 that may be used by 8 processes"),
        (None, None, 1, 2, 2, "of 4 that may be used"),  # never more than torch takes: second threads bring nothing
    ],
)
def test_a_flag_wins_over_the_environment_and_that_over_what_is_allowed(
    machine, monkeypatch, asked, variable, processes, torchs, threads, why
):
    machine(64, "0::/\n", **{"cpu.max": "400000 100000"})
    number = [torchs]
    monkeypatch.setattr(torch, "get_num_threads", lambda: number[0])
    monkeypatch.setattr(torch, "set_num_threads", lambda count: number.__setitem__(0, count))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if variable is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", variable)
    assert settle_threads(asked, processes=processes) == f"{threads} thread(s) of the CPU ({why})"
    assert number == [threads]

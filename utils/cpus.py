"""How many CPUs this process may use, and how many threads torch uses of them.

A container is given a part of its machine's time (a cgroup's quota) or some of its CPUs (affinity); libraries count the
machine's and start as many threads, which then wait for each other.
"""

import os
from pathlib import Path

import torch

CGROUPS = Path("/sys/fs/cgroup")
OF_PROCESS = Path("/proc/self/cgroup")


def allowed_cpus() -> int:
    """CPUs that this process may use: the least of affinity and of every quota above it, at least 1."""
    present = os.cpu_count() or 1
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else present
    return max(1, min([affinity, *(int(quota) for quota in _quotas())]))


def _quotas() -> list[float]:
    """CPUs' worth of time that the cgroups of this process are given; those without a limit are left out."""
    try:
        lines = OF_PROCESS.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        _, controllers, place = line.split(":", 2)
        root = CGROUPS / "cpu" if "cpu" in controllers.split(",") else CGROUPS
        if controllers and root == CGROUPS:
            continue  # of another resource
        here = root / place.lstrip("/")
        # within a container its own group is the root, whatever the path says
        for folder in (here, *here.parents):
            if folder.is_relative_to(root):
                found.append(_quota(folder))
    return [quota for quota in found if quota is not None]


def _quota(folder: Path) -> float | None:
    """Of one cgroup: in version 2 "QUOTA PERIOD" or "max PERIOD" in one file, in version 1 two files and -1."""
    try:
        if (folder / "cpu.max").exists():
            quota, period = (folder / "cpu.max").read_text(encoding="utf-8").split()
        else:
            names = ("cpu.cfs_quota_us", "cpu.cfs_period_us")
            quota, period = ((folder / name).read_text(encoding="utf-8").strip() for name in names)
        return float(quota) / float(period) if quota not in ("max", "-1") else None
    except (OSError, ValueError, ZeroDivisionError):
        return None


def settle_threads(asked: int | None, *, processes: int = 1) -> str:
    """Set torch's threads of this process: `asked`, else OMP_NUM_THREADS, else what this process may use.

    Torch's own number is never exceeded: it leaves out the second threads of a core, which bring nothing.

    Args:
        asked: by a flag.
        processes: that share what is allowed.

    Returns:
        how many, and why, for the log.
    """
    allowed = f"{allowed_cpus()} that may be used" + (f" by {processes} processes" if processes > 1 else "")
    if asked is None and not os.environ.get("OMP_NUM_THREADS"):
        torch.set_num_threads(max(1, min(torch.get_num_threads(), allowed_cpus() // processes)))
        return f"{torch.get_num_threads()} thread(s) of the CPU (of {allowed})"
    why = "OMP_NUM_THREADS"
    if asked is not None:
        torch.set_num_threads(asked)
        why = "--threads"
    if torch.get_num_threads() * processes > allowed_cpus():
        why += f"; more than the {allowed}: they wait for each other, and all is many times slower"
    return f"{torch.get_num_threads()} thread(s) of the CPU ({why})"

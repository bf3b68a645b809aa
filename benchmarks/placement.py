"""All networks in every process (`--placement data`) beside own networks alone (`networks`): bytes, time, memory.

Two processes on the CPU take the same steps in turns under both placements: where this machine is (G15 and what the
processes hand to each collective), and, as root on Linux, as two hosts: in two network namespaces joined by a link of
1 Gbit/s and of 100 Mbit/s (G13, G14), whose own counters tell the bytes. Nothing outside of the namespaces is touched,
and they are removed at the end.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.report import shown_number
from record.tables import markdown_table
from utils.command_line import at_least
from utils.cpus import allowed_cpus
from utils.errors import RunError, UserError
from utils.launch import free_port

ROOT = Path(__file__).resolve().parent.parent
MEANT = ("wide_resnet16_8", 2)  # what G13 and G14 are of
RATES = {"1gbit": "1 Gbit/s", "100mbit": "100 Mbit/s"}
PARTS = ("memory", "bytes", *RATES)
COMMITS = {"G13": 1000.0, "G14": 2.0, "G15": 1 / 0.30}
ADDRESSES = ("10.77.0.1", "10.77.0.2")  # within the namespaces alone


@dataclass(frozen=True)
class Place:
    """Where a process runs: words before its command, its network interface, and the address of process 0."""

    prefix: tuple[str, ...] = ()
    interface: str = "lo"
    meeting: str = "127.0.0.1"


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of this benchmark beside the common ones."""
    parser.set_defaults(split_factor=2)
    parser.add_argument("--arch", default="wide_resnet16_8", help="backbone (default wide_resnet16_8)")
    parser.add_argument("--batch_size", type=at_least(2), default=16, help="images of a timed step (default 16)")
    parser.add_argument(
        "--wire_batch", type=at_least(2), default=128, help="images of the step whose bytes are counted (default 128)"
    )
    parser.add_argument("--parts", default=",".join(PARTS), help="comma list of what is measured")
    parser.add_argument("--limit", type=float, default=600, help="seconds that one part may take (default 600)")


def run(options: argparse.Namespace, device: torch.device) -> Iterator[dict[str, Any]]:
    """Measure the parts in turn; those that need namespaces are left out, with a line, where they are not allowed.

    Raises:
        UserError: a part that does not exist.
        RunError: a process failed, or a part took longer than --limit.
    """
    parts = options.parts.split(",")
    if unknown := [part for part in parts if part not in PARTS]:
        raise UserError(f"--parts {unknown[0]}: expected {', '.join(PARTS)}.")
    subject = f"{options.arch} S={options.split_factor}, two processes"
    if "memory" in parts:
        yield from _memory_rows(options)
    linked = [part for part in parts if part != "memory"]
    if linked and (why := cannot_link()):
        print(f"benchmarks: left out {','.join(linked)}: {why}", file=sys.stderr)
        return
    if "bytes" in parts:
        found = _on_a_link("1gbit", options, batch_size=options.wire_batch, rounds=min(3, options.rounds), warmup=0)
        goal = "G13" if is_meant(options, options.wire_batch, 128) else None
        yield from _byte_rows(found, f"{subject}, batch {options.wire_batch}", goal)
    for rate in (part for part in parts if part in RATES):
        found = _on_a_link(rate, options, batch_size=options.batch_size, rounds=options.rounds, warmup=1)
        goal = "G14" if rate == "100mbit" and is_meant(options, options.batch_size, 16) else None
        what = f"{subject}, batch {options.batch_size}, hosts joined by {RATES[rate]}"
        yield _row(goal, what, "seconds a step", found, lambda one: one["seconds"], slowest=True)
        yield from _byte_rows(found, what, None)


def is_meant(options: argparse.Namespace, batch_size: int, meant: int) -> bool:
    """Whether the networks and the batch are those that the goals name."""
    return (options.arch, options.split_factor) == MEANT and batch_size == meant


def _byte_rows(found: Sequence[Any], subject: str, goal: str | None) -> Iterator[dict[str, Any]]:
    yield _row(goal, subject, "bytes a step on the link, both ways", found, lambda one: one["wire"])
    yield _row(
        None,
        subject,
        "bytes a step that a process hands to collectives",
        found,
        lambda one: [sum(one["calls"].values())],
    )


def _memory_rows(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    count = 4
    found = _measured([Place()] * count, options, split_factor=count, batch_size=count, rounds=1, warmup=0)
    subject = f"{options.arch} S={count}, {count} processes"
    what = "bytes of weights, gradients, momentum and average in a process"
    yield _row("G15" if options.arch == MEANT[0] else None, subject, what, found, lambda one: [one["memory"]])


def _row(
    goal: str | None, subject: str, quantity: str, found: Sequence[Any], values: Any, *, slowest: bool = False
) -> dict[str, Any]:
    """One result: `ratio` is the median over the rounds of data / networks, so that more than 1 is less.

    Args:
        found: what every process reports, by placement.
        values: of a process's report, one for each round.
        slowest: the largest of the processes counts; else their mean.
    """
    join = max if slowest else statistics.fmean
    sides = {
        name: [join(of_round) for of_round in zip(*(values(one[name]) for one in found), strict=True)]
        for name in ("data", "networks")
    }
    pairs = [data / own for data, own in zip(sides["data"], sides["networks"], strict=True)]
    calls = {name: found[0][name]["calls"] for name in sides}
    ratio = statistics.median(pairs)
    result: dict[str, Any] = {
        "goal": goal,
        "subject": subject,
        "case": "networks",
        "baseline": "data",
        "dtype": "float32",
        "quantity": quantity,
        "value": statistics.median(sides["networks"]),
        "baseline_value": statistics.median(sides["data"]),
        "rounds": len(pairs),
        "ratio": ratio,
        "ratio_min": min(pairs),
        "ratio_max": max(pairs),
        "collectives": calls,
    }
    if goal is not None:
        result |= {"commit": COMMITS[goal], "met": ratio >= COMMITS[goal]}
    return result


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as a Markdown table."""
    titles = ("goal", "subject", "quantity", "data", "networks", "data / networks (min – max)", "promised")
    cells = []
    for one in rows:
        promised = "–" if one.get("commit") is None else f"≥ {one['commit']:,.1f}: {'met' if one['met'] else 'missed'}"
        shown = [shown_number(one[side]) for side in ("baseline_value", "value")]
        ratio = f"{one['ratio']:,.2f} ({one['ratio_min']:,.2f} – {one['ratio_max']:,.2f})"
        cells.append((one["goal"] or "–", one["subject"], one["quantity"], *shown, ratio, promised))
    sent = [
        (one["subject"], placement, name, f"{count:,}")
        for one in rows
        for placement, of_one in one["collectives"].items()
        for name, count in of_one.items()
    ]
    collectives = ("subject", "placement", "collective", "bytes")
    return "\n\n".join(
        (
            markdown_table(titles, (False, False, False, True, True, True, True), [cells]),
            "Bytes that process 0 hands to the collectives of one step:",
            markdown_table(collectives, (False, False, False, True), [[*dict.fromkeys(sent)]]),
        )
    )


# ---- processes and the link between them -----------------------------------------------------------------------------


def _measured(
    places: Sequence[Place],
    options: argparse.Namespace,
    *,
    split_factor: int,
    batch_size: int,
    rounds: int,
    warmup: int,
) -> list[Any]:
    """What every process reports, by placement.

    Raises:
        RunError: one failed, or all took longer than --limit.
    """
    count, port = len(places), str(free_port())
    threads = options.threads or max(1, allowed_cpus() // count)
    flags = ["--arch", options.arch, "--split_factor", split_factor, "--batch_size", batch_size]
    flags += ["--rounds", rounds, "--seconds", options.seconds, "--warmup", warmup]
    with tempfile.TemporaryDirectory() as folder:
        processes = []
        for rank, place in enumerate(places):
            environment = {
                **os.environ,
                "MASTER_ADDR": place.meeting,
                "MASTER_PORT": port,
                "RANK": str(rank),
                "WORLD_SIZE": str(count),
                "LOCAL_RANK": str(rank),
                "LOCAL_WORLD_SIZE": str(count),
                "GLOO_SOCKET_IFNAME": place.interface,
                "OMP_NUM_THREADS": str(threads),
            }
            command = [*place.prefix, sys.executable, "-m", "benchmarks.placement_process", *map(str, flags)]
            command += ["--interface", place.interface, "--out", f"{folder}/{rank}.json"]
            processes.append(subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True))
        try:
            errors = [process.communicate(timeout=options.limit)[1] for process in processes]
        except subprocess.TimeoutExpired:
            raise RunError(f"placement: {count} processes took longer than --limit {options.limit:g} s.") from None
        finally:
            for process in processes:
                process.kill()
        for process, text in zip(processes, errors, strict=True):
            if process.returncode:
                said = text.strip().splitlines() or [f"exit code {process.returncode}"]
                raise RunError(f"placement: a process failed: {said[-1]}")
        return [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(count)]


def _on_a_link(rate: str, options: argparse.Namespace, *, batch_size: int, rounds: int, warmup: int) -> list[Any]:
    with linked_hosts(rate) as places:
        return _measured(
            places,
            options,
            split_factor=options.split_factor,
            batch_size=batch_size,
            rounds=rounds,
            warmup=warmup,
        )


def cannot_link() -> str:
    """Why two namespaces cannot be joined by a link here, in a line; "" where they can."""
    if not (shutil.which("ip") and shutil.which("tc")):
        return "ip and tc (iproute2) are not installed."
    try:
        with linked_hosts("1gbit"):
            return ""
    except RunError as error:
        return str(error)


@contextmanager
def linked_hosts(rate: str) -> Iterator[list[Place]]:
    """Two network namespaces joined by a link that sends `rate` each way (a token bucket); gone afterwards.

    Raises:
        RunError: not allowed here.
    """
    names = [f"placement{os.getpid()}{end}" for end in "ab"]
    links = [f"pl{os.getpid()}{end}" for end in "ab"]
    bucket = ["rate", rate, "burst", "128kb", "latency", "50ms"]
    try:
        for name in names:
            _ip("netns", "add", name)
        _ip("link", "add", links[0], "netns", names[0], "type", "veth", "peer", "name", links[1], "netns", names[1])
        for name, link, address in zip(names, links, ADDRESSES, strict=True):
            _ip("-n", name, "addr", "add", f"{address}/24", "dev", link)
            for one in ("lo", link):
                _ip("-n", name, "link", "set", one, "up")
            _ip("netns", "exec", name, "tc", "qdisc", "add", "dev", link, "root", "tbf", *bucket)
        yield [
            Place(("ip", "netns", "exec", name), link, ADDRESSES[0]) for name, link in zip(names, links, strict=True)
        ]
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


def _ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RunError(f"ip {' '.join(words)}: {done.stderr.strip()[:200] or done.returncode} (needs root).")

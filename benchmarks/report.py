"""What every benchmark shares: timing in turns, rows with both sides of a ratio, hardware, versions, tables."""

import argparse
import gc
import json
import math
import os
import platform
import statistics
import textwrap
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from record.checkpoint import write_file
from utils.cpus import allowed_cpus
from utils.device import wait_for
from utils.errors import reason
from utils.plain_json import plain_json
from utils.precision import has_fast_bf16

Clock = Callable[[], float]

H200_GOALS = ("G1", "G2", "G3", "G4", "G6", "G7", "G12")
PACKAGES = ("torch", "torchvision", "numpy", "pillow", "timm", "triton")


def hardware(device: torch.device) -> dict[str, Any]:
    """The machine that measures: processor, cores, threads, load, GPU."""
    facts: dict[str, Any] = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name(),
        "cores": allowed_cpus(),
        "threads": torch.get_num_threads(),
        "fast_bf16": has_fast_bf16(device),
        "load_1_min": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None,
    }
    if device.type == "cuda":
        facts["device_memory_gib"] = round(torch.cuda.get_device_properties(device).total_memory / 2**30, 1)
        facts["cudnn"] = torch.backends.cudnn.version()
    return facts


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    """Python's, CUDA's, and those of the packages that are installed out of PACKAGES."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
    return found


# ---- timing ----------------------------------------------------------------------------------------------------------


def seconds_of(
    call: Callable[[], object], device: torch.device, clock: Clock = time.perf_counter, *, calls: int = 1
) -> float:
    """Seconds that one call takes on its device: CUDA events there, the clock on a CPU.

    Args:
        calls: made one after the other without waiting in between; a call's seconds are their mean. With one, a GPU
            idles until the host has issued it, which in a loop of steps happens while the step before is computed.
    """
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(calls):
            call()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1000 / calls
    started = clock()
    for _ in range(calls):
        call()
    return (clock() - started) / calls


def interleave(
    cases: Mapping[str, Callable[[], object]],
    device: torch.device,
    *,
    warmup: int = 3,
    rounds: int = 20,
    seconds: float = math.inf,
    clock: Clock = time.perf_counter,
    calls: int = 1,
) -> dict[str, list[float]]:
    """Time all cases in turns, so that whatever else the machine does hits all alike.

    Every round times each case once, and begins with another one than the round before.

    Args:
        cases: name -> what is timed.
        warmup: untimed calls of each case before.
        rounds: timed samples of each case, at most.
        seconds: no new round begins after so long, but there are at least three.
        clock: tells the time in seconds.
        calls: see `seconds_of`.

    Returns:
        name -> seconds of each round; the i-th entries of all cases were measured one after the other.
    """
    for call in cases.values():
        for _ in range(warmup):
            call()
    names, times = list(cases), {name: list[float]() for name in cases}
    started = clock()
    for number in range(max(rounds, 1)):
        if number >= 3 and clock() - started > seconds:
            break
        first = number % len(names)
        for name in names[first:] + names[:first]:
            times[name].append(seconds_of(cases[name], device, clock, calls=calls))
    return times


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What `measure` found.

    Attributes:
        seconds: of each round, by name of the cases that could be built.
        memory_mib: what a case took on a GPU beside the others, at most; None on a CPU.
        errors: why a case could not be built or warmed up, by its name.
    """

    seconds: dict[str, list[float]]
    memory_mib: dict[str, float | None]
    errors: dict[str, str]


def measure(
    builders: Mapping[str, Callable[[], Callable[[], object]]],
    device: torch.device,
    *,
    warmup: int = 3,
    rounds: int = 20,
    seconds: float = math.inf,
    clock: Clock = time.perf_counter,
    calls: int = 1,
) -> Measured:
    """Build every case, call it `warmup` times, and `interleave` those that can be; the others are named.

    Args:
        builders: name -> a function that makes what is timed.
    """
    built: dict[str, Callable[[], object]] = {}
    memory: dict[str, float | None] = {}
    errors: dict[str, str] = {}
    for name, build in builders.items():
        try:
            built[name], memory[name] = _warmed_up(build, warmup, device)
        except RuntimeError as error:
            errors[name] = reason(error)[:300]
        if name in errors:  # not before the exception is gone, which holds what was half built
            release(device)
    times: dict[str, list[float]] = {}
    if built:
        times = interleave(built, device, warmup=0, rounds=rounds, seconds=seconds, clock=clock, calls=calls)
    return Measured(seconds=times, memory_mib=memory, errors=errors)


def measure_as_asked(
    builders: Mapping[str, Callable[[], Callable[[], object]]],
    options: argparse.Namespace,
    device: torch.device,
    *,
    warmup: int,
    parts: int = 1,
    calls: int | None = None,
) -> Measured:
    """`measure` by the flags that all subjects have.

    Args:
        parts: of a subject, each of which gets as much of the time.
        calls: in place of the flag, where a call is long enough by itself.
    """
    return measure(
        builders,
        device,
        warmup=warmup,
        rounds=options.rounds,
        seconds=options.seconds / parts,
        clock=options.clock,
        calls=options.calls if calls is None else calls,
    )


def warm_up_calls(device: torch.device) -> int:
    """Training steps after which a device has chosen its kernels and recorded its graphs."""
    return 20 if device.type == "cuda" else 1


def _warmed_up(
    build: Callable[[], Callable[[], object]], warmup: int, device: torch.device
) -> tuple[Callable[[], object], float | None]:
    """A case after its first calls, and the MiB that it took for them on a GPU.

    What others hold is not counted. A replayed graph allocates nothing: what it holds is seen while it is recorded.
    """
    is_gpu = device.type == "cuda"
    if is_gpu:
        wait_for(device)
        torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device) if is_gpu else 0
    call = build()
    for _ in range(warmup):
        call()
    if not is_gpu:
        return call, None  # all cases share one heap
    wait_for(device)
    return call, round((torch.cuda.max_memory_allocated(device) - before) / 2**20, 1)


def as_it_is(call: Callable[[], object]) -> Callable[[], object]:
    """What a builder of `measure` gives that has nothing to build."""
    return call


def release(device: torch.device) -> None:
    """Give back the memory of cases that nobody refers to any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def quantile(values: Sequence[float], part: float) -> float:
    """Linearly interpolated quantile, 0 <= part <= 1."""
    ordered = sorted(values)
    place = part * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


# ---- rows ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Side:
    """One side of a ratio: what ran, in which type and layout, and how long each round took.

    Attributes:
        name: as the table shows it.
        dtype, layout: of the arithmetic and of the images ("NCHW", "NHWC").
        seconds: of each round.
        memory_mib: peak, or None where it was not measured.
    """

    name: str
    dtype: str
    layout: str
    seconds: Sequence[float]
    memory_mib: float | None = None


def row(
    goal: str | None,
    subject: str,
    case: Side,
    baseline: Side | None,
    *,
    work: float = 1.0,
    baseline_work: float | None = None,
    commit: float | None = None,
    **facts: Any,
) -> dict[str, Any]:
    """One result. `ratio` is the median over the rounds of baseline / case per unit of work: more than 1 is faster.

    Args:
        goal: "G1" to "G12", or None for a row that decides nothing.
        subject: what is timed, as "resnet110 S=4, batch 128".
        work, baseline_work: units (images, views, steps) in one call of either side; by default the same.
        commit: the ratio that the goal promises; `met` says whether it was reached.
        facts: further columns of the JSON.
    """
    middle = statistics.median(case.seconds)
    result: dict[str, Any] = {
        "goal": goal,
        "subject": subject,
        "case": case.name,
        "dtype": case.dtype,
        "layout": case.layout,
        "seconds": middle,
        "seconds_p10": quantile(case.seconds, 0.1),
        "seconds_p90": quantile(case.seconds, 0.9),
        "per_second": work / middle,
        "memory_mib": case.memory_mib,
        "rounds": len(case.seconds),
        "baseline": baseline and baseline.name,
        "baseline_dtype": baseline and baseline.dtype,
        "baseline_layout": baseline and baseline.layout,
        "ratio": None,
    }
    if baseline is not None:
        unit = work / (baseline_work or work)
        pairs = [unit * base / own for base, own in zip(baseline.seconds, case.seconds, strict=True)]
        result |= {
            "baseline_seconds": statistics.median(baseline.seconds),
            "baseline_memory_mib": baseline.memory_mib,
            "ratio": statistics.median(pairs),
            "ratio_min": min(pairs),
            "ratio_max": max(pairs),
        }
    if commit is not None:
        result |= {"commit": commit, "met": result["ratio"] is not None and result["ratio"] >= commit}
    return result | facts


def failure(goal: str | None, subject: str, case: str, dtype: str, error: str) -> dict[str, Any]:
    """The row of a case that could not be measured; its goal is neither met nor missed."""
    return {"goal": goal, "subject": subject, "case": case, "dtype": dtype, "error": error, "ratio": None, "met": None}


def judged(one: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """The row with its device's name; a promise for an H200 is neither met nor missed on anything else."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    elsewhere = one["goal"] in H200_GOALS and "H200" not in name
    return {**one, "device": name} | ({"met": None} if elsewhere and "met" in one else {})


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as a Markdown table; times in ms."""
    lines = [
        "| goal | subject | case | baseline | ratio (min – max) | promised | ms (p10 – p90) | per second | peak MiB |",
        "| --- | --- | --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for one in rows:
        if "error" in one:
            cells = [one["goal"] or "–", one["subject"], f"{one['case']}, {one['dtype']}", f"failed: {one['error']}"]
            lines.append(f"| {' | '.join(cells + 5 * ['–'])} |")
            continue
        ratio = base = promised = "–"
        if one.get("ratio") is not None:
            ratio = f"{one['ratio']:.2f} ({one['ratio_min']:.2f} – {one['ratio_max']:.2f})"
            base = f"{one['baseline']}, {one['baseline_dtype']} {one['baseline_layout']}"
        if one.get("commit") is not None:
            verdict = {True: "met", False: "missed", None: "for an H200"}[one["met"]]
            promised = f"≥ {one['commit']:g}: {verdict}"
        times = " – ".join(shown_number(1000 * one[name]) for name in ("seconds_p10", "seconds_p90"))
        cells = [
            one["goal"] or "–",
            one["subject"],
            f"{one['case']}, {one['dtype']} {one['layout']}".rstrip(),
            base,
            ratio,
            promised,
            f"{shown_number(1000 * one['seconds'])} ({times})",
            shown_number(one["per_second"]),
            "–" if one.get("memory_mib") is None else f"{one['memory_mib']:,.0f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def shown_number(value: float) -> str:
    """As the tables have it: whole from a thousand on, else three digits."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def write(path: Path, rows: Sequence[Mapping[str, Any]], *, device: torch.device, command: str) -> None:
    """Write the rows as a JSON list, each with hardware, versions, command and date.

    Raises:
        OSError: the file cannot be written.
    """
    common = {
        "hardware": hardware(device),
        "versions": versions(),
        "command": command,
        "date": date.today().isoformat(),
    }
    write_file(path, json.dumps([plain_json({**one, **common}) for one in rows], indent=2) + "\n")


def describe(device: torch.device, command: str) -> str:
    """Command, date, hardware and versions in lines of Markdown, to stand above a table."""
    facts = hardware(device)
    packages = ", ".join(f"{name} {number}" for name, number in versions().items())
    machine = (
        f"{facts['device']}, {facts['cores']} cores, {facts['threads']} thread(s), "
        f"1-minute load {facts['load_1_min']}; {packages}"
    )
    return f"`{command}`,\n{date.today().isoformat()}\n\n{textwrap.fill(machine, 120, break_on_hyphens=False)}"

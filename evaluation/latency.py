"""How long networks take to answer: latency and throughput by batch size, and the picture of accuracy against latency.

Nothing here expects a winner: what was measured is what is returned and drawn.
"""

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from utils.precision import autocast

BATCH_SIZES = (1, 8, 32, 128)
WARMUP_SECONDS = 0.3
SECONDS = 3.0  # of timed rounds, for each batch size and candidate
LEAST, MOST = 10, 1000  # timed rounds
CASCADE = "cascade"  # the strategy that takes another time for every image


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """Something that answers.

    Attributes:
        name: of the network or ensemble.
        strategy: how it runs.
        forward: prepared images [B, 3, H, W] -> logits.
        accuracy: top-1 in percent, or None where it is not known.
    """

    name: str
    strategy: str
    forward: Callable[[Tensor], Tensor]
    accuracy: float | None = None


@dataclass(frozen=True, kw_only=True)
class Latency:
    """One candidate at one batch size: milliseconds of a batch, images per second at the median."""

    name: str
    strategy: str
    batch_size: int
    p50_ms: float
    p95_ms: float
    p99_ms: float
    mean_ms: float
    images_per_second: float
    rounds: int
    accuracy: float | None

    @classmethod
    def of(cls, candidate: Candidate, batch_size: int, seconds: Sequence[float]) -> Self:
        """What the times of all rounds come to."""
        ordered = sorted(seconds)
        middle = ordered[len(ordered) // 2]

        def reached_by(share: float) -> float:
            return 1000 * ordered[math.ceil(share * len(ordered)) - 1]

        return cls(
            name=candidate.name,
            strategy=candidate.strategy,
            batch_size=batch_size,
            p50_ms=1000 * middle,
            p95_ms=reached_by(0.95),
            p99_ms=reached_by(0.99),
            mean_ms=1000 * statistics.fmean(ordered),
            images_per_second=batch_size / middle,
            rounds=len(ordered),
            accuracy=candidate.accuracy,
        )


@torch.inference_mode()
def measure(
    candidates: Sequence[Candidate],
    images_BCHW: Tensor,
    *,
    autocast_dtype: torch.dtype | None = None,
    batch_sizes: Sequence[int] = BATCH_SIZES,
    seconds: float = SECONDS,
    each_image: bool = False,
) -> list[Latency]:
    """Time all candidates in turns at every batch size; each round waits for its answer on the device.

    Args:
        images_BCHW: prepared images on the device, at least one; repeated to fill a batch.
        autocast_dtype: type of matrix products and convolutions, or None for that of the weights.
        seconds: of timed rounds for each candidate and batch size, as far as the least number of rounds allows.
        each_image: every round takes the next images, so that each is timed as often as the others, at least once; else
            all rounds take the first ones.
    """
    device = images_BCHW.device
    found = []
    with autocast(device, autocast_dtype):
        for size in batch_sizes:
            batches = _batches(images_BCHW, size, each_image)
            for candidate in candidates:
                _warm_up(candidate, batches[0])
            times: list[list[float]] = [[] for _ in candidates]
            started = time.perf_counter()
            for number in range(max(MOST, len(batches))):
                turns_are_whole = number >= LEAST and number % len(batches) == 0
                if turns_are_whole and time.perf_counter() - started > seconds * len(candidates):
                    break
                for i in range(len(candidates)):
                    at = (i + number) % len(candidates)  # so that none always comes after the same other
                    times[at].append(_seconds(candidates[at], batches[number % len(batches)]))
            found += [Latency.of(candidate, size, own) for candidate, own in zip(candidates, times, strict=True)]
    return found


def _batches(images_BCHW: Tensor, size: int, each_image: bool) -> Sequence[Tensor]:
    """Whole batches of the images, repeated to fill one; without `each_image` the first alone."""
    like = torch.channels_last if _is_channels_last(images_BCHW) else torch.contiguous_format
    repeats = -(-size // len(images_BCHW))
    many_BCHW = images_BCHW.repeat(repeats, 1, 1, 1) if repeats > 1 else images_BCHW
    count = len(many_BCHW) // size if each_image else 1
    return [many_BCHW[i * size : (i + 1) * size].contiguous(memory_format=like) for i in range(count)]


def _is_channels_last(images_BCHW: Tensor) -> bool:
    return images_BCHW.is_contiguous(memory_format=torch.channels_last) and not images_BCHW.is_contiguous()


def _warm_up(candidate: Candidate, batch_BCHW: Tensor) -> None:
    started = time.perf_counter()
    for number in range(MOST):
        _seconds(candidate, batch_BCHW)
        if number >= 2 and time.perf_counter() - started > WARMUP_SECONDS:
            return


def _seconds(candidate: Candidate, batch_BCHW: Tensor) -> float:
    """Seconds from the question to the answer, which networks on several GPUs give on the first of these."""
    device = batch_BCHW.device
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    answer = candidate.forward(batch_BCHW)
    if device.type == "cuda":
        torch.cuda.synchronize(answer.device)
    return time.perf_counter() - started


def format_latencies(rows: Sequence[Latency]) -> str:
    """All rows as a Markdown table, by batch size; the fastest median of each size is in bold."""
    lines = [
        "| batch | network | strategy | p50 ms | p95 ms | p99 ms | mean ms | images/s |",
        "|---:|---|---|---:|---:|---:|---:|---:|",
    ]
    best = {
        size: min(row.p50_ms for row in rows if row.batch_size == size) for size in {row.batch_size for row in rows}
    }
    for row in rows:
        median = f"{row.p50_ms:.2f}"
        shown = f"**{median}**" if row.p50_ms == best[row.batch_size] else median
        speed = f"{row.images_per_second:,.0f}"
        others = " | ".join(f"{value:.2f}" for value in (row.p95_ms, row.p99_ms, row.mean_ms))
        lines.append(f"| {row.batch_size} | {row.name} | {row.strategy} | {shown} | {others} | {speed} |")
    if any(row.strategy == CASCADE for row in rows):
        lines += [
            "",
            "Of test images, each timed as often as the others. A cascade runs its networks one after another, on the "
            "images that go on: it cannot be parallel or stacked, and its p99 pays for all of them.",
        ]
    return "\n".join(lines)


def as_plain(rows: Sequence[Latency]) -> list[dict[str, Any]]:
    """The rows as plain data for a JSON file."""
    return [asdict(row) for row in rows]


def plot_accuracy_latency(rows: Sequence[Latency], path: Path) -> Path:
    """Accuracy against median latency, one panel for each batch size; returns `path`.

    What has no known accuracy is a vertical line at its latency.
    """
    from matplotlib.figure import Figure

    from record.plots import COLOURS

    sizes = sorted({row.batch_size for row in rows})
    names = list(dict.fromkeys((row.name, row.strategy) for row in rows))
    look: Mapping[tuple[str, str], tuple[str, str]] = {
        key: (COLOURS[i % len(COLOURS)], "osD^vP*X"[i % 8]) for i, key in enumerate(names)
    }
    figure = Figure(figsize=(3.4 * len(sizes), 4.4), layout="constrained")
    panels = figure.subplots(1, len(sizes), sharey=True, squeeze=False)[0]
    for axes, size in zip(panels, sizes, strict=True):
        for row in (row for row in rows if row.batch_size == size):
            colour, marker = look[row.name, row.strategy]
            label = f"{row.name}, {row.strategy}"
            if row.accuracy is None:
                axes.axvline(row.p50_ms, color=colour, linestyle="--", label=f"{label} (accuracy unknown)")
            else:
                axes.plot([row.p50_ms], [row.accuracy], marker, color=colour, markersize=9, linestyle="", label=label)
        axes.set(title=f"batch {size}", xlabel="median ms of a batch")
        axes.set_xlim(left=0, right=1.15 * max(row.p50_ms for row in rows if row.batch_size == size))
        axes.grid(color="#dddddd", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("top-1 in %")
    handles, labels = panels[0].get_legend_handles_labels()
    legend = figure.legend(handles, labels, loc="outside lower center", ncols=min(3, len(labels)), frameon=False)
    for text in legend.get_texts():
        text.set_parse_math(False)
    figure.savefig(path, dpi=120)
    return path

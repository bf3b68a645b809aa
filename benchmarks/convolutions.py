"""3x3 convolutions of S narrow networks: one after another, side by side, or as one with groups; all three passes.

The wide convolution that they were divided from stands beside them. `stacked` is worth its place only where groups win.
"""

import argparse
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.report import Side, interleave, row
from utils.command_line import several_at_least

FORMATS = {"NCHW": torch.contiguous_format, "NHWC": torch.channels_last}
PASSES = ("forward", "input gradient", "weight gradient")


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of this benchmark beside the common ones."""
    widths, sides, batches = "8,16,32,64,128,160,320", "32,16,8", "128,512"
    if not torch.cuda.is_available():
        widths, sides, batches = "16,64", "16", "32"
    parser.add_argument(
        "--widths", type=several_at_least(1), default=widths, help=f"channels of one small network (default {widths})"
    )
    parser.add_argument("--sides", type=several_at_least(1), default=sides, help=f"pixels of the map (default {sides})")
    parser.add_argument("--batches", type=several_at_least(1), default=batches, help=f"images (default {batches})")


def run(options: argparse.Namespace, device: torch.device) -> Iterator[dict[str, Any]]:
    """Time every shape; seconds are shared among them."""
    shapes = [(width, side, batch) for width in options.widths for side in options.sides for batch in options.batches]
    share = options.seconds / len(shapes)
    for shape in shapes:
        yield from _shape_rows(*shape, options, device, share)


def _shape_rows(
    width: int, side: int, batch: int, options: argparse.Namespace, device: torch.device, seconds: float
) -> list[dict[str, Any]]:
    count = options.split_factor
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    wide = 8 * max(1, round(width * math.sqrt(count) / 8))
    cases: dict[str, Callable[[], object]] = {}
    for layout in FORMATS:
        cases |= {
            f"{name}|{layout}|{part}": call
            for name, calls in {
                "in sequence": _passes(width, side, batch, [1] * count, layout, dtype, device),
                "groups": _passes(count * width, side, batch, [count], layout, dtype, device),
                "undivided": _passes(wide, side, batch, [1], layout, dtype, device),
            }.items()
            for part, call in zip(PASSES, calls, strict=True)
        }
    if device.type == "cuda":
        calls = _passes(width, side, batch, [1] * count, "NHWC", dtype, device, in_streams=True)
        cases |= {f"streams in a graph|NHWC|{part}": call for part, call in zip(PASSES, calls, strict=True)}
    rounds = min(options.rounds, 20)
    times = interleave(
        cases, device, warmup=2, rounds=rounds, seconds=seconds, clock=options.clock, calls=options.calls
    )
    rows = []
    name_of_type = str(dtype).removeprefix("torch.")
    for key, measured in times.items():
        name, layout, part = key.split("|")
        if name == "in sequence" and layout == "NHWC":
            continue
        base = Side(name="in sequence", dtype=name_of_type, layout="NHWC", seconds=times[f"in sequence|NHWC|{part}"])
        one = Side(name=name, dtype=name_of_type, layout=layout, seconds=measured)
        subject = f"3x3 convolution, {count} x {width} channels, {side} px, batch {batch}, {part}"
        rows.append(row(None, subject, one, base, work=batch, unit="images"))
    return rows


def _passes(
    channels: int,
    side: int,
    batch: int,
    groups: list[int],
    layout: str,
    dtype: torch.dtype,
    device: torch.device,
    *,
    in_streams: bool = False,
) -> list[Callable[[], object]]:
    """Forward, input-gradient and weight-gradient pass of len(groups) convolutions of equal width.

    in_streams: each on a CUDA stream of its own, replayed as one graph.
    """
    generator = torch.Generator().manual_seed(0)

    def tensor(*shape: int) -> Tensor:
        made = torch.randn(*shape, generator=generator).to(device, dtype)
        return made.contiguous(memory_format=FORMATS[layout])

    inputs = [tensor(batch, channels, side, side) for _ in groups]
    weights = [tensor(channels, channels // group, 3, 3) for group in groups]
    gradients = [tensor(batch, channels, side, side) for _ in groups]

    def backward(i: int, mask: list[bool]) -> object:
        ones = [1, 1]
        return torch.ops.aten.convolution_backward(
            gradients[i], inputs[i], weights[i], None, ones, ones, ones, False, [0, 0], groups[i], mask
        )

    works: list[Callable[[int], object]] = [
        lambda i: torch.nn.functional.conv2d(inputs[i], weights[i], padding=1, groups=groups[i]),
        lambda i: backward(i, [True, False, False]),
        lambda i: backward(i, [False, True, False]),
    ]
    if in_streams:
        return [_graph(work, len(groups), device) for work in works]

    def each(work: Callable[[int], object]) -> Callable[[], object]:
        return lambda: [work(i) for i in range(len(groups))]

    return [each(work) for work in works]


def _graph(work: Callable[[int], object], count: int, device: torch.device) -> Callable[[], None]:
    """work(0) … work(count - 1) on a stream each, captured into one CUDA graph."""
    streams = [torch.cuda.Stream(device) for _ in range(count)]
    side_stream = torch.cuda.Stream(device)
    side_stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side_stream):
        side_by_side(work, streams)  # workspaces and algorithms are chosen before the capture
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        side_by_side(work, streams)
    return graph.replay


def side_by_side(work: Callable[[int], object], streams: Sequence[torch.cuda.Stream]) -> None:
    """work(0), work(1), … on a stream each: all begin where the current stream is, which then waits for all."""
    here = torch.cuda.current_stream(streams[0].device)
    begin = here.record_event()
    for i, stream in enumerate(streams):
        stream.wait_event(begin)
        with torch.cuda.stream(stream):
            work(i)
    for stream in streams:  # not before: a stream that is joined is in the past of all that follows
        here.wait_stream(stream)

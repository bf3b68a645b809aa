"""What the device can do at most: matrix products, copies, launches. Utilisation is measured against these."""

import argparse
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.report import Side, interleave, row
from utils.command_line import at_least

LAUNCHES = 1000


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of this benchmark beside the common ones."""
    parser.add_argument(
        "--side", type=at_least(1), help="of the square matrices (default 8192 on a GPU, 1024 on a CPU)"
    )
    parser.add_argument("--copy_mib", type=at_least(1), help="copied at once (default 8192 on a GPU, 256 on a CPU)")


def matrix_side(device: torch.device) -> int:
    """Rows of matrices that are large enough to be multiplied at full speed."""
    return 8192 if device.type == "cuda" else 1024


def matrix_product(side: int, dtype: torch.dtype, device: torch.device) -> Callable[[], object]:
    """A function that multiplies two random matrices [side, side]."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(side, side, generator=generator).to(device, dtype) for _ in range(2))
    return lambda: a @ b


def run(options: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    """Products in float32 and bfloat16, a copy, and small operations issued one by one and as one CUDA graph."""
    is_gpu = device.type == "cuda"
    side = options.side or matrix_side(device)
    copied = options.copy_mib or (8192 if is_gpu else 256)
    cases: dict[str, Callable[[], object]] = {}
    work: dict[str, tuple[float, str, str]] = {}  # how much, its unit, the type
    for dtype in (torch.float32, torch.bfloat16):
        name = f"product of two {side} x {side} matrices, {str(dtype).removeprefix('torch.')}"
        cases[name] = matrix_product(side, dtype, device)
        work[name] = (2 * side**3, "FLOP", str(dtype).removeprefix("torch."))
    source = torch.zeros(copied << 20, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy_name = f"copy of {copied:,} MiB, read and written"
    cases[copy_name] = lambda: target.copy_(source)
    work[copy_name] = (2.0 * (copied << 20), "bytes", "uint8")
    small = torch.zeros(8, device=device)

    def launch() -> None:
        for _ in range(LAUNCHES):
            small.add_(1)

    cases[f"{LAUNCHES} small operations, eager"] = launch
    work[f"{LAUNCHES} small operations, eager"] = (LAUNCHES, "launches", "float32")
    if is_gpu:
        launch()
        torch.cuda.synchronize(device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            launch()
        cases[f"{LAUNCHES} small operations, one CUDA graph"] = graph.replay
        work[f"{LAUNCHES} small operations, one CUDA graph"] = (LAUNCHES, "launches", "float32")
    times = interleave(
        cases,
        device,
        warmup=5,
        rounds=options.rounds,
        seconds=options.seconds,
        clock=options.clock,
        calls=options.calls,
    )
    rows = []
    for name, seconds in times.items():
        amount, unit, dtype_name = work[name]
        side_of = Side(name=name, dtype=dtype_name, layout="", seconds=seconds)
        rows.append(row(None, f"ceiling, {unit}", side_of, None, work=amount, unit=unit))
    return rows

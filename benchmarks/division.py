"""A training step of S networks beside the step of the one that they divide, both ours (G4), and how much of what the
device can multiply either of them uses (G3).

Utilisation counts 6 FLOP for a multiply-add of the forward pass (2, and twice as many in the backward pass), against a
product of two large matrices of the same type in the same run.
"""

import argparse
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import own
from benchmarks.ceilings import matrix_product, matrix_side
from benchmarks.report import Side, measure_as_asked, row, warm_up_calls
from utils.command_line import at_least
from utils.errors import RunError

GOALS = {"one": 0.50, "divided": 0.35}  # G3 on a GPU: least part of the matrix product
MOST = 1.40  # G4: step time of S = 4 over S = 1
STEP_FLOP_PER_MAC = 6


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of this benchmark beside the common ones."""
    parser.add_argument("--arch", default="wide_resnet28_10", help="backbone (default wide_resnet28_10)")
    parser.add_argument("--batch_size", type=at_least(1), default=128, help="images (default 128)")
    parser.add_argument("--case", help="such as bf16+parallel+graph (default: the fastest precision, in a loop)")
    parser.add_argument(
        "--side", type=at_least(1), help="of the square matrices (default 8192 on a GPU, 1024 on a CPU)"
    )


def run(options: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    """Time the two steps and the product in turns.

    Raises:
        UserError: a case or an architecture that does not exist.
        RunError: one of them cannot be run.
    """
    case = options.case or own.default_cases(device)[-1].split("+")[0] + "+loop"
    dtype_name = own.case_dtype(case)
    dtype = getattr(torch, dtype_name) if dtype_name != "auto" else torch.float32
    factors = {"one": 1, "divided": options.split_factor}
    side = options.side or matrix_side(device)
    layouts: dict[str, str] = {}
    macs: dict[str, int] = {}

    def step_of(name: str, folder: Path) -> Callable[[], object]:
        flags = ["--arch", options.arch, "--split_factor", str(factors[name]), "--batch_size", str(options.batch_size)]
        trainer = own.open_trainer([*flags, "--workers", "0", *own.case_flags(case)], folder, device)
        layouts[name], macs[name] = own.layout(trainer), trainer.macs_total
        return own.training_step(trainer)

    with tempfile.TemporaryDirectory() as folder:
        builders: dict[str, Callable[[], Callable[[], object]]] = {
            "product": partial(matrix_product, side, dtype, device)
        }
        builders |= {name: partial(step_of, name, Path(folder) / name) for name in factors}
        found = measure_as_asked(
            builders,
            options,
            device,
            warmup=warm_up_calls(device),
        )
    for name, error in found.errors.items():
        raise RunError(f"{name}: {error}")  # every row is a ratio of two of them
    sides = {
        name: Side(
            name=f"S={factors[name]}, {case}",
            dtype=dtype_name,
            layout=layouts[name],
            seconds=found.seconds[name],
            memory_mib=found.memory_mib[name],
        )
        for name in factors
    }
    subject = f"training step of {options.arch}, batch {options.batch_size}"
    promised = device.type == "cuda" and options.arch == "wide_resnet28_10" and options.split_factor == 4
    rows = [
        row(
            "G4" if promised else None,
            f"{subject}, S={options.split_factor} beside S=1",
            sides["divided"],
            sides["one"],
            work=options.batch_size,
            commit=1 / MOST if promised else None,
            unit="images",
        )
    ]
    product = Side(
        name=f"product of two {side} x {side} matrices", dtype=dtype_name, layout="", seconds=found.seconds["product"]
    )
    for name in factors:
        rows.append(
            row(
                "G3" if promised else None,
                f"{subject}, part of the matrix product's FLOP/s",
                sides[name],
                product,
                work=STEP_FLOP_PER_MAC * macs[name] * options.batch_size,
                baseline_work=2 * side**3,
                commit=GOALS[name] if promised else None,
                unit="FLOP",
            )
        )
    return rows

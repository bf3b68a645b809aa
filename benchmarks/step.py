"""One training step of S networks on ready views: ours in every case beside the published step (G1, G2, G10).

Both sides train the same architecture on the same images: mixup, forward, cross-entropy and co-training loss, backward,
update, meters.
"""

import argparse
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import baseline, own
from benchmarks.report import Side, failure, measure_as_asked, release, row, warm_up_calls
from model import BackboneRequest, build_splitnet
from utils.command_line import at_least

GPU_GOALS = {("resnet110", 4): ("G1", 5.0), ("wide_resnet28_10", 4): ("G2", 1.6)}
CPU_FLOAT32 = {"wide_resnet16_8": 1.15, "resnet110": 1.4}  # G10 by architecture; with bf16 1.9 for both
CPU_BF16 = 1.9


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of this benchmark beside the common ones."""
    parser.add_argument("--arch", default="resnet110", help="backbone (default resnet110)")
    parser.add_argument("--batch_size", type=at_least(1), default=128, help="images (default 128)")
    parser.add_argument("--cases", help="comma list such as bf16+stacked (default: every execution and precision)")


def run(options: argparse.Namespace, device: torch.device) -> Iterator[dict[str, Any]]:
    """Time the published step and a few cases at a time in turns.

    Raises:
        UserError: a case or an architecture that does not exist.
    """
    names = own.chosen_cases(options.cases, device)
    for some in own.grouped(names):
        yield from _rows(some, options, device)
        release(device)


def _rows(names: Sequence[str], options: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    flags = ["--arch", options.arch, "--split_factor", str(options.split_factor)]
    flags += ["--batch_size", str(options.batch_size), "--workers", "0"]
    layouts: dict[str, str] = {}

    def step_of(name: str, folder: Path) -> Callable[[], object]:
        trainer = own.open_trainer([*flags, *own.case_flags(name)], folder, device)
        layouts[name] = own.layout(trainer)
        return own.training_step(trainer)

    with tempfile.TemporaryDirectory() as folder:
        builders: dict[str, Callable[[], Callable[[], object]]] = {
            "published": partial(published_step, options, device)
        }
        builders |= {name: partial(step_of, name, Path(folder) / str(i)) for i, name in enumerate(names)}
        found = measure_as_asked(
            builders,
            options,
            device,
            warmup=warm_up_calls(device),
        )
    base = None
    if "published" in found.seconds:
        base = Side(
            name="published step",
            dtype=baseline.precision_name(device),
            layout="NCHW",
            seconds=found.seconds["published"],
            memory_mib=found.memory_mib["published"],
        )
    subject = f"training step of {options.arch} S={options.split_factor}, batch {options.batch_size}"
    rows = []
    for name in names:
        goal, commit = _goal(options, device, name)
        if name in found.errors:
            rows.append(failure(goal, subject, name, own.case_dtype(name), found.errors[name]))
            continue
        side = Side(
            name=name,
            dtype=own.case_dtype(name),
            layout=layouts[name],
            seconds=found.seconds[name],
            memory_mib=found.memory_mib[name],
        )
        rows.append(row(goal, subject, side, base, work=options.batch_size, commit=commit, unit="images"))
    if base is None:
        rows.append(failure(None, subject, "published step", "", found.errors["published"]))
    return rows


def _goal(options: argparse.Namespace, device: torch.device, case: str) -> tuple[str | None, float | None]:
    if options.batch_size != 128:
        return None, None
    if device.type == "cuda":
        is_meant = case.startswith("bf16")  # the promise is of what the hardware is made for
        return GPU_GOALS.get((options.arch, options.split_factor), (None, None)) if is_meant else (None, None)
    if options.split_factor != 4 or options.arch not in CPU_FLOAT32:
        return None, None
    return "G10", CPU_BF16 if case.startswith("bf16") else CPU_FLOAT32[options.arch]


def published_step(options: argparse.Namespace, device: torch.device) -> Callable[[], None]:
    """The published step on four sets of random views in turn."""
    request = BackboneRequest(arch=options.arch, split_factor=options.split_factor)
    network = baseline.plain_network(build_splitnet(request, seed=1), device)
    step = baseline.BaselineStep(network, device)
    generator = torch.Generator().manual_seed(0)
    shape = (options.split_factor, options.batch_size, 3, 32, 32)
    sets = [torch.randn(shape, generator=generator).to(device) for _ in range(4)]
    labels_B = torch.randint(request.num_classes, (options.batch_size,), generator=generator).to(device)
    turn = iter(range(1 << 40))

    def call() -> None:
        step(sets[next(turn) % len(sets)], labels_B)

    return call

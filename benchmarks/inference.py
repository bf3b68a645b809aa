"""Latency of S networks beside the one large network: the published eager one, and our own folded one (G9).

The total work is equal, so nothing is promised: what is measured is printed, also where the large network wins. Memory
is that of a pass, beside the weights. For a checkpoint with its accuracy see `eval.py --benchmark`.
"""

import argparse
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor

from benchmarks import baseline, own
from benchmarks.report import Side, failure, measure_as_asked, row
from evaluation.contenders import Contender, candidates_of, undivided
from evaluation.latency import Candidate
from model import BackboneRequest, build_splitnet
from model.options import EXECUTIONS
from utils.command_line import several_at_least
from utils.precision import autocast, choose_precision

OWN_LARGE = 0.85  # G9, beside our own large network


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of this benchmark beside the common ones."""
    parser.set_defaults(split_factor=2)
    parser.add_argument("--arch", default="wide_resnet28_10", help="backbone (default wide_resnet28_10)")
    parser.add_argument(
        "--batch_sizes", type=several_at_least(1), default="1,8,32,128", help="images of a batch (default 1,8,32,128)"
    )
    parser.add_argument("--precision", default="auto", choices=("auto", "bf16", "fp16", "fp32"), help="(default auto)")


def run(options: argparse.Namespace, device: torch.device) -> Iterator[dict[str, Any]]:
    """Time the published large network, ours, and S networks in every way of running them, in turns.

    Raises:
        UserError: an architecture or a precision that cannot be.
    """
    precision = choose_precision(device, is_amp=True, amp_dtype=options.precision)
    request = BackboneRequest(arch=options.arch, split_factor=options.split_factor)
    published = baseline.plain_network(undivided(request), device).eval().models[0]
    sizes = options.batch_sizes
    images = torch.randn(max(2, *sizes), 3, 32, 32, generator=torch.Generator().manual_seed(0)).to(device)
    like = precision.memory_format
    ready = images.to(precision.autocast or precision.weights, memory_format=like)
    found: list[Candidate] = []
    for name, network in (("large", undivided(request)), ("ensemble", build_splitnet(request, seed=0).eval())):
        found += candidates_of(Contender(name, network, None), ready, precision, EXECUTIONS)
    layout = "NHWC" if like is torch.channels_last else "NCHW"
    for size in sizes:
        batch, batch_like = images[:size], ready[:size].contiguous(memory_format=like)
        builders: dict[str, Callable[[], Callable[[], object]]] = {
            "published": partial(_published, published, batch, device)
        }
        builders |= {_name(one): partial(_ours, one, batch_like, precision.autocast, device) for one in found}
        measured = measure_as_asked(
            builders,
            options,
            device,
            warmup=5,
            parts=len(sizes),
        )
        goal = _goal(options, device)
        subject = f"inference of {options.arch} S={options.split_factor}, batch {size}"
        for name, error in measured.errors.items():
            yield failure(goal, subject, name, options.precision, error)
        sides = {
            name: Side(
                name=name,
                dtype=own.TYPES[precision.name],
                layout=layout,
                seconds=seconds,
                memory_mib=measured.memory_mib[name],
            )
            for name, seconds in measured.seconds.items()
        }
        if "published" not in sides:
            continue
        base = replace(sides["published"], name="published large network", dtype=baseline.precision_name(device))
        base = replace(base, layout="NCHW")
        # the fastest way of ours to run the large network
        own_large = [sides[_name(one)] for one in found if one.name == "large" and _name(one) in sides]
        large = min(own_large, key=lambda side: median(side.seconds), default=None)
        commit = 5.0 if size <= 8 else 1.8 if size <= 32 else 1.3
        for one in found:
            if _name(one) not in sides:
                continue
            side = sides[_name(one)]
            is_ensemble = one.name == "ensemble"
            promised = goal if is_ensemble else None
            yield row(promised, subject, side, base, work=size, commit=commit if promised else None)
            if is_ensemble and large is not None:
                yield row(goal, subject, side, large, work=size, commit=OWN_LARGE if goal else None)


def _goal(options: argparse.Namespace, device: torch.device) -> str | None:
    promised = options.arch == "wide_resnet28_10" and options.split_factor == 2
    return "G9" if device.type == "cuda" and promised else None


def _name(candidate: Candidate) -> str:
    return f"{candidate.name}, {candidate.strategy}"


def _published(network: torch.nn.Module, batch: Tensor, device: torch.device) -> Callable[[], object]:
    @torch.no_grad()
    def call() -> object:
        with torch.autocast(device.type, torch.float16, enabled=device.type == "cuda"):
            return network(batch)

    return call


def _ours(candidate: Candidate, batch: Tensor, dtype: torch.dtype | None, device: torch.device) -> Callable[[], object]:
    @torch.inference_mode()
    def call() -> object:
        with autocast(device, dtype):
            return candidate.forward(batch)

    return call

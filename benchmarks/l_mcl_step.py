"""A step of layer-wise mutual contrastive learning in its parts: forward-backward, contrast, meta round.

All parts run on the same networks with their exits, on ready images, in the recipe's float32; memory is beside them.
The meta round is timed whole, and counted in the last row as the recipe makes it: once in --meta_freq steps.
"""

import argparse
import statistics
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch

from benchmarks.report import Side, as_it_is, measure_as_asked, row
from method import Progress
from method.l_mcl import LMCL, LMCLOptions
from model import BackboneRequest, build_splitnet
from utils.command_line import at_least
from utils.errors import RunError
from utils.targets import plain_targets

MOST = 1.3  # the contrast should cost at most so many times the plain forward-backward, both together
LEARNING_RATE, WEIGHT_DECAY = 0.1, 5e-4  # of the published recipe


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of this benchmark beside the common ones."""
    parser.set_defaults(split_factor=2)
    parser.add_argument("--arch", default="resnet32_cifar", help="backbone of all networks (default resnet32_cifar)")
    parser.add_argument("--batch_size", type=at_least(1), default=128, help="images (default 128)")
    parser.add_argument("--meta_freq", type=at_least(1), default=50, help="steps for each meta round (default 50)")


def run(options: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    """Time the parts in turns.

    Raises:
        UserError: an architecture that does not exist or has no stages.
        RunError: a part cannot be run.
    """
    request = BackboneRequest(arch=options.arch, num_classes=100, dataset="cifar100", crop_size=32)
    network = build_splitnet(request, seed=1, archs=[options.arch] * options.split_factor)
    torch.manual_seed(1)
    method = LMCL(network, LMCLOptions(meta_freq=options.meta_freq)).to(device).train()
    generator = torch.Generator().manual_seed(0)
    view_BCHW = torch.randn(options.batch_size, 3, 32, 32, generator=generator).to(device)
    labels_B = (torch.arange(options.batch_size) // 2 % 100).to(device)  # pairs of a class, as the sampler gives them
    targets = plain_targets(labels_B)
    indices_B = torch.arange(options.batch_size, device=device)
    progress = Progress(0, 0, 0, 390, 300, LEARNING_RATE, indices_B, WEIGHT_DECAY)
    output = method(view_BCHW[None], targets, progress)
    parameters = [p for _, p in method.trained_parameters()]

    def plain() -> None:
        loss_ce, loss_kd = method.supervised_losses(method.outputs(view_BCHW), targets)
        (loss_ce + loss_kd).backward()
        _clear(parameters)

    def contrast() -> None:
        method(view_BCHW[None], targets, progress).loss.backward()
        _clear(parameters)

    def meta_round() -> None:
        method.before_step(view_BCHW[None], targets, progress)
        method.after_step(view_BCHW[None], targets, output, progress)

    cases = {"forward-backward": plain, "with contrast": contrast, "meta round": meta_round}
    found = measure_as_asked(
        {name: partial(as_it_is, call) for name, call in cases.items()},
        options,
        device,
        warmup=1,
    )
    for name, error in found.errors.items():
        raise RunError(f"{name}: {error}")
    times = found.seconds
    whole = "whole step"
    rounds = zip(times["with contrast"], times["meta round"], strict=True)
    times[whole] = [step + meta / options.meta_freq for step, meta in rounds]
    memory = found.memory_mib | {whole: None}
    sides = {
        name: Side(name=name, dtype="float32", layout="NCHW", seconds=seconds, memory_mib=memory[name])
        for name, seconds in times.items()
    }
    subject = f"L-MCL step of {options.split_factor} x {options.arch}, batch {options.batch_size}"
    return [
        row(
            None,
            subject,
            side,
            sides["forward-backward"],
            work=options.batch_size,
            commit=1 / MOST if name == "with contrast" else None,
            unit="images",
            meta_freq=options.meta_freq,
        )
        for name, side in sides.items()
    ]


def _clear(parameters: Sequence[torch.nn.Parameter]) -> None:
    for parameter in parameters:
        parameter.grad = None


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """The parts as a Markdown table; cost in multiples of the forward-backward of networks, exits and gates."""
    lines = [
        rows[0]["subject"],
        "",
        "| part | ms (p10 – p90) | × forward-backward | aim |",
        "| --- | ---: | ---: | --- |",
    ]
    for one in rows:
        name = one["case"]
        if name == "whole step":
            name += f", one meta round in {one['meta_freq']} steps"
        aim = f"≤ {MOST}: {'met' if one['met'] else 'missed'}" if "met" in one else ""
        seconds, low, high = (1000 * one[key] for key in ("seconds", "seconds_p10", "seconds_p90"))
        lines.append(f"| {name} | {seconds:.0f} ({low:.0f} – {high:.0f}) | {1 / one['ratio']:.2f} | {aim} |")
    contrast = (
        statistics.median([one["seconds"] for one in rows if one["case"] == "with contrast"]) - rows[0]["seconds"]
    )
    meta = next(one["seconds"] for one in rows if one["case"] == "meta round") / rows[0]["meta_freq"]
    lines += [
        "",
        f"Of a step: forward-backward {1000 * rows[0]['seconds']:.0f} ms, contrast {1000 * contrast:.0f} ms, ",
    ]
    lines[-1] += f"meta rounds {1000 * meta:.0f} ms."
    return "\n".join(lines)


if __name__ == "__main__":
    from benchmarks.__main__ import main

    raise SystemExit(main(["l_mcl_step", *sys.argv[1:]]))

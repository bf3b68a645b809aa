"""What a division makes of a network: widths, parameters and multiply-adds beside those of the undivided one."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from model import LARGE, BackboneRequest, backbones, build_network, check_request, image_shape
from model.backbone.base import StagedBackbone
from utils.command_line import OneLineParser
from utils.errors import UserError
from utils.macs import count_macs, count_params

DIVIDE_BY = ("params", "macs")


@dataclass(frozen=True, kw_only=True)
class DivisionPlan:
    """One of S copies beside the undivided network.

    Attributes:
        arch, split_factor: what is divided, by S.
        divide_by: what the solver matched, "params" or "macs"; "table" where the family's own rule decides.
        stages: name of each width.
        widths_full, widths: of the undivided network and of one copy.
        params_full, params_one, macs_full, macs_one: parameters, and multiply-adds for one image.
    """

    arch: str
    split_factor: int
    divide_by: str
    stages: tuple[str, ...]
    widths_full: tuple[float, ...]
    widths: tuple[float, ...]
    params_full: int
    params_one: int
    macs_full: int
    macs_one: int

    @property
    def params_difference(self) -> float:
        """Parameters of the S copies together over those of the undivided network, minus 1."""
        return self.split_factor * self.params_one / self.params_full - 1

    @property
    def macs_difference(self) -> float:
        """Multiply-adds of the S copies together over those of the undivided network, minus 1."""
        return self.split_factor * self.macs_one / self.macs_full - 1

    def summary(self) -> str:
        """One line: how near the copies come to the undivided network."""
        return (
            f"{self.arch} divided by {self.split_factor} ({self.divide_by}): "
            f"{self.split_factor} x {self.params_one / 1e6:.3f} M parameters ({self.params_difference:+.2%} of "
            f"{self.params_full / 1e6:.3f} M), {self.split_factor} x {self.macs_one / 1e6:.2f} M MACs "
            f"({self.macs_difference:+.2%} of {self.macs_full / 1e6:.2f} M)"
        )

    def table(self) -> str:
        """The width of every stage before and after, and `summary`."""
        rows = [("stage", "S = 1", f"S = {self.split_factor}")]
        rows += [
            (name, f"{before:g}", f"{after:g}")
            for name, before, after in zip(self.stages, self.widths_full, self.widths, strict=True)
        ]
        sizes = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [f"{a.ljust(sizes[0])}  {b.rjust(sizes[1])}  {c.rjust(sizes[2])}" for a, b, c in rows]
        return "\n".join([*lines, self.summary()])

    def as_dict(self) -> dict[str, Any]:
        """Everything as plain data."""
        return {
            **asdict(self),
            "params_difference": self.params_difference,
            "macs_difference": self.macs_difference,
        }


def division_plan(request: BackboneRequest) -> DivisionPlan:
    """The plan of a request, by the solver or by the family's table; nothing is computed.

    Raises:
        UserError: as `model.check_request`, or a network that cannot be divided by S.
    """
    entry = check_request(request)
    if entry.plan is not None:
        return entry.plan(request)
    full, one = (_measure(replace(request, split_factor=s)) for s in (1, request.split_factor))
    return DivisionPlan(
        arch=request.arch,
        split_factor=request.split_factor,
        divide_by="table",
        stages=tuple(f"stage {i + 1}" for i in range(len(full[0]))),
        widths_full=full[0],
        widths=one[0],
        params_full=full[1],
        params_one=one[1],
        macs_full=full[2],
        macs_one=one[2],
    )


def solver_plan(request: BackboneRequest) -> DivisionPlan | None:
    """The plan of a request that the solver decides; None where a table does, or nothing is divided."""
    return division_plan(request) if request.split_factor > 1 and check_request(request).plan is not None else None


def _measure(request: BackboneRequest) -> tuple[tuple[int, ...], int, int]:
    """(channels that each stage gives, parameters, multiply-adds) of one network."""
    image = (3, request.crop_size, request.crop_size)
    with torch.device("meta"):
        network = build_network(request)
        assert isinstance(network, StagedBackbone)
        with torch.no_grad():
            taps, _ = network.eval().forward_features(torch.empty(1, *image))
    return tuple(tap.shape[1] for tap in taps), count_params(network), count_macs(network, image)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line of `python -m model.division`; returns the exit code."""
    parser = OneLineParser(
        prog="python -m model.division", description="Print what one of S copies of a network looks like."
    )
    parser.add_argument("arch", help="backbone: a name of ours, torchvision/NAME, timm/NAME or FILE.py:FACTORY")
    parser.add_argument("--split_factor", type=int, default=2, metavar="S", help="number of copies [default: 2]")
    parser.add_argument("--divide_by", choices=DIVIDE_BY, help="what the copies together match [default: params]")
    parser.add_argument("--num_classes", type=int, default=1000, metavar="K", help="[default: 1000]")
    parser.add_argument("--crop_size", type=int, metavar="PIXELS", help="[default: the network's own, else 224 or 32]")
    given = parser.parse_args(argv)
    try:
        if given.split_factor < 1 or given.num_classes < 1:
            raise UserError("--split_factor and --num_classes must be 1 or more.")
        if given.crop_size is not None and given.crop_size < 1:
            raise UserError(f"--crop_size must be 1 or more, got {given.crop_size}.")
        entry = backbones.get(given.arch)
        crop = given.crop_size or entry.crop_size or (224 if LARGE in entry.split_factors else 32)
        shape = image_shape("folder", crop)
        plan = division_plan(
            BackboneRequest(
                arch=given.arch,
                split_factor=given.split_factor,
                num_classes=given.num_classes,
                shape=shape,
                dataset="imagenet" if shape == LARGE else "cifar100",
                crop_size=crop,
                divide_by=given.divide_by,
            )
        )
    except UserError as error:
        sys.stderr.write(f"model.division: {error}\n")
        return error.exit_code
    sys.stdout.write(plan.table() + "\n")
    return 0

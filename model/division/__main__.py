"""`python -m model.division ARCH --split_factor S`: what becomes of a network."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from model.division.coverage import LISTS, coverage
from model.division.plan import division_plan, usual_request
from model.division.resizing import plan_by_channels
from model.registry import DIVIDE_BY
from utils.command_line import OneLineParser
from utils.errors import UserError
from utils.program import show
from utils.text import fit_streams

ALL = "all"  # lists of networks


def main(argv: Sequence[str] | None = None) -> int:
    """The command line of `python -m model.division`; returns the exit code."""
    fit_streams()
    parser = OneLineParser(
        prog=f"python -m {__package__}", description="Print what one of S copies of a network looks like."
    )
    parser.add_argument(
        "arch", nargs="?", help="backbone: a name of ours, torchvision/NAME, timm/NAME or FILE.py:FACTORY"
    )
    parser.add_argument("--split_factor", type=int, default=2, metavar="S", help="number of copies [default: 2]")
    parser.add_argument(
        "--divide_by",
        choices=("both", *DIVIDE_BY),
        help="what the copies together match; both needs --by_channels [default: params, with --by_channels both]",
    )
    parser.add_argument(
        "--by_channels",
        action="store_true",
        help="solve the widths also of a network of ours, in place of its family's table: what --stage_widths takes",
    )
    parser.add_argument("--num_classes", type=int, default=1000, metavar="K", help="[default: 1000]")
    parser.add_argument("--crop_size", type=int, metavar="PIXELS", help="[default: the network's own, else 224 or 32]")
    parser.add_argument(
        "--coverage",
        nargs="?",
        const=ALL,
        choices=(*LISTS, ALL),
        help="print which networks of a list divide by 2 and 4, as a table; bare: of all lists, which takes minutes",
    )
    given = parser.parse_args(argv)
    if given.coverage is not None:
        for name in LISTS if given.coverage == ALL else (given.coverage,):
            if given.coverage == ALL:
                show(f"\n## {name}\n")
            for line in coverage(LISTS[name]):
                show(line)
        return 0
    try:
        if given.arch is None:
            raise UserError("expected arch, the name of a backbone, or --coverage.")
        if given.split_factor < 1 or given.num_classes < 1:
            raise UserError("--split_factor and --num_classes must be 1 or more.")
        if given.crop_size is not None and given.crop_size < 1:
            raise UserError(f"--crop_size must be 1 or more, got {given.crop_size}.")
        request = usual_request(
            given.arch,
            given.split_factor,
            num_classes=given.num_classes,
            crop_size=given.crop_size,
            divide_by=None if given.by_channels else given.divide_by,
        )
        if given.divide_by == "both" and not given.by_channels:
            raise UserError("--divide_by both needs --by_channels.")
        plan = plan_by_channels(request, given.divide_by or "both") if given.by_channels else division_plan(request)
    except UserError as error:
        sys.stderr.write(f"{__package__}: {error}\n")
        return error.exit_code
    show(plan.table())
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

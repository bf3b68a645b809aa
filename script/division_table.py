"""What the solver makes of the families that it divides, as a table: `python -m script.division_table [ARCH ...]`."""

import sys

from model import LARGE, BackboneRequest, backbones
from model.division.plan import division_plan
from model.registry import DIVIDE_BY
from utils.command_line import OneLineParser
from utils.errors import UserError
from utils.text import fit_streams

ARCHS = (
    *(f"torchvision/{name}" for name in ("resnet18", "resnet50", "resnext50_32x4d", "wide_resnet50_2")),
    *(f"torchvision/{name}" for name in ("regnet_y_400mf", "mobilenet_v2", "mobilenet_v3_small", "efficientnet_b0")),
    *(f"torchvision/{name}" for name in ("convnext_tiny", "densenet121")),
    *(f"timm/{name}" for name in ("seresnet50", "mobilenetv4_conv_small", "convnextv2_atto")),
)


def rows(archs: list[str], split_factors: list[int], divide_by: str) -> list[tuple[str, ...]]:
    """(arch, widths, parameters and MACs of the undivided network, then S widths and both differences)."""
    found: list[tuple[str, ...]] = []
    for arch in archs:
        crop = backbones.get(arch).crop_size or 224
        for split_factor in split_factors:
            plan = division_plan(
                BackboneRequest(
                    arch=arch,
                    split_factor=split_factor,
                    num_classes=1000,
                    shape=LARGE,
                    dataset="imagenet",
                    crop_size=crop,
                    divide_by=divide_by,
                )
            )
            found.append(
                (
                    arch,
                    f"{plan.params_full / 1e6:.2f}",
                    f"{plan.macs_full / 1e9:.3f}",
                    str(split_factor),
                    " ".join(f"{width:g}" for width in plan.widths),
                    f"{plan.params_difference:+.2%}",
                    f"{plan.macs_difference:+.2%}",
                )
            )
    return found


def main() -> int:
    """The command line; returns the exit code."""
    fit_streams()
    parser = OneLineParser(description=__doc__)
    parser.add_argument(
        "archs", nargs="*", help="torchvision/NAME, timm/NAME or FILE.py:FACTORY [default: a selection]"
    )
    parser.add_argument("--split_factors", type=int, nargs="+", default=[2, 4, 8], metavar="S")
    parser.add_argument("--divide_by", choices=DIVIDE_BY, default="params")
    given = parser.parse_args()
    try:
        table = rows(given.archs or list(ARCHS), given.split_factors, given.divide_by)
    except UserError as error:
        print(f"division_table.py: {error}", file=sys.stderr)
        return error.exit_code
    titles = ("arch", "M parameters", "G MACs", "S", "widths of the stages", "parameters", "MACs")
    for line in (titles, ("---", "---:", "---:", "---:", "---", "---:", "---:"), *table):
        print("| " + " | ".join(line) + " |")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

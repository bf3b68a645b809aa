"""Parameters and MACs of every registered backbone and division: `python -m script.summarise_zoo [ARCH ...]`."""

import argparse
import sys

from model import LARGE, SMALL, BackboneRequest, backbones
from model.summary import network_sizes
from utils.errors import UserError

# the data set that stands for a form of the networks: name, K, crop
SHAPES = {SMALL: ("cifar100", 100, 32), LARGE: ("imagenet", 1000, 224)}


def zoo_rows(archs: list[str], split_factors: list[int]) -> list[tuple[str, ...]]:
    """One row per backbone, form and legal S among `split_factors`."""
    rows = []
    for arch in archs:
        entry = backbones.get(arch)
        for shape, legal in entry.split_factors.items():
            dataset, num_classes, crop = SHAPES[shape]
            if shape == LARGE and entry.crop_size is not None:
                crop = entry.crop_size
            for split_factor in (s for s in split_factors if s in legal):
                request = BackboneRequest(
                    arch=arch,
                    split_factor=split_factor,
                    num_classes=num_classes,
                    shape=shape,
                    dataset=dataset,
                    crop_size=crop,
                )
                sizes = network_sizes([request] * split_factor, with_thop=False)
                figures = (sizes["params_one"], sizes["params_total"], sizes["macs_one"], sizes["macs_total"])
                rows.append(
                    (arch, dataset, str(split_factor), str(crop), *(f"{(value or 0) / 1e6:,.3f}" for value in figures))
                )
    return rows


def main() -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("archs", nargs="*", help="backbones [default: all]")
    parser.add_argument("--split_factors", type=int, nargs="+", default=[1, 2, 4, 8, 16], metavar="S")
    arguments = parser.parse_args()
    try:
        rows = zoo_rows(arguments.archs or backbones.names(), arguments.split_factors)
    except UserError as error:
        print(f"summarise_zoo.py: {error}", file=sys.stderr)
        return error.exit_code
    titles = ("arch", "data set", "S", "crop", "params one M", "params all M", "MACs one M", "MACs all M")
    for line in (titles, ("---", "---", *["---:"] * 6), *rows):
        print("| " + " | ".join(line) + " |")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

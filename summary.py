"""Parameters and MACs of the networks that flags stand for, without data and without computing anything.

`python summary.py --arch wide_resnet28_10 --dataset cifar100 --split_factor 4`, or `train_split.py --is_summary 1`.
The last line of stdout is one JSON object.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from method import methods
from model import BackboneRequest, backbone_request, build_network
from model.splitnet import SplitNet
from parser_params import Config, parse_config, resolve_config
from utils.errors import UserError
from utils.macs import count_macs, count_params, thop_macs

# K of the data sets whose classes are fixed; needed here because a summary opens no data
NUM_CLASSES = {"digits": 10, "cifar10": 10, "cifar100": 100, "svhn": 10, "imagenet": 1000}


def network_sizes(requests: Sequence[BackboneRequest], *, with_thop: bool = True) -> dict[str, int | None]:
    """Parameters and multiply-adds for one image, of the first network and of all.

    Args:
        requests: one per network; equal ones are counted once.
        with_thop: count with the package thop too, which doubles the time.

    Returns:
        params_one, params_total, macs_one, macs_total, and thop_macs_total: what the package thop counts for all, with
        batch norm and pooling, None where it is not installed.
    """
    image = (3, requests[0].crop_size, requests[0].crop_size)
    counted: list[tuple[BackboneRequest, tuple[int, int, int | None]]] = []
    sizes = []
    for request in requests:
        known = [size for other, size in counted if other == request]
        if not known:
            with torch.device("meta"):
                network = SplitNet([build_network(request)])
            thop_one = thop_macs(network, image) if with_thop else None
            known = [(count_params(network), count_macs(network, image), thop_one)]
            counted.append((request, known[0]))
        sizes.append(known[0])
    params, macs, thop = zip(*sizes, strict=True)
    return {
        "params_one": params[0],
        "params_total": sum(params),
        "macs_one": macs[0],
        "macs_total": sum(macs),
        "thop_macs_total": None if None in thop else sum(thop),
    }


def summarise(config: Config) -> dict[str, Any]:
    """Count what `config` stands for and print it as a table.

    Raises:
        UserError: a network that cannot be built, or a data set whose number of classes only --num_classes can say.
    """
    num_classes = NUM_CLASSES.get(config.dataset, config.num_classes)
    if num_classes is None:
        raise UserError(
            f"--is_summary opens no data, and --dataset {config.dataset} has any number of classes: add --num_classes."
        )
    if config.num_classes not in (None, num_classes):
        raise UserError(f"--num_classes {config.num_classes}: --dataset {config.dataset} has {num_classes} classes.")
    open_recipe = "cifar10" if config.crop_size <= 64 else "imagenet"
    recipe = config.dataset if config.dataset in NUM_CLASSES else open_recipe
    config = resolve_config(config, data_recipe=recipe, crop_size=config.crop_size)
    request = backbone_request(config, num_classes=num_classes)
    names = methods.get(config.method).backbone_names(config.arch, config.method_options)
    if len(names) > 1:
        requests = [replace(request, arch=name, split_factor=1) for name in names]
    else:
        requests = [replace(request, arch=names[0])] * (1 if config.is_train_sep else config.split_factor)
    result = {
        "arch": config.arch,
        "dataset": config.dataset,
        "split_factor": config.split_factor if len(names) == 1 else len(names),
        "num_classes": num_classes,
        "crop": config.crop_size,
        **network_sizes(requests),
    }
    print(format_table([result]), flush=True)
    return result


def format_table(rows: Sequence[dict[str, Any]]) -> str:
    """Results of `summarise` as a table: parameters in millions, multiply-adds in millions."""
    titles = ("arch", "dataset", "S", "crop", "params one M", "params all M", "MACs one M", "MACs all M", "thop all M")
    lines = [titles]
    for row in rows:
        thop = row["thop_macs_total"]
        lines.append(
            (
                row["arch"],
                row["dataset"],
                str(row["split_factor"]),
                str(row["crop"]),
                *(f"{row[name] / 1e6:.3f}" for name in ("params_one", "params_total")),
                *(f"{row[name] / 1e6:.2f}" for name in ("macs_one", "macs_total")),
                "-" if thop is None else f"{thop / 1e6:.2f}",
            )
        )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    # names to the left, numbers to the right
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i < 2 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code: 0, or 2 for the user's mistake."""
    try:
        result = summarise(parse_config(argv, program="summary.py"))
    except UserError as error:
        print(f"summary.py: {error}", file=sys.stderr)
        return error.exit_code
    print(json.dumps(result), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

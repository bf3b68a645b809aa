"""Parameters and MACs of the networks that flags stand for, without data and without computing anything."""

from collections.abc import Sequence
from typing import Any

import torch

from model.build import BUILDERS
from model.registry import BackboneRequest, build_network
from model.splitnet import SplitNet
from utils.macs import count_macs, count_params, thop_macs


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
                network = (
                    SplitNet([build_network(request)])
                    if request.form is None
                    else BUILDERS[request.form.kind](request, seed=0)
                )
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


def format_table(rows: Sequence[dict[str, Any]]) -> str:
    """Sizes as a table, parameters and multiply-adds in millions.

    Args:
        rows: `network_sizes` of each, with its arch, dataset, split_factor and crop.
    """
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

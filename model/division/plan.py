"""What a division makes of a network: widths, parameters and multiply-adds beside those of the undivided one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch

from model.division.arguments import leaf_kind
from model.registry import (
    LARGE,
    BackboneRequest,
    DivisionPlan,
    backbones,
    build_network,
    check_request,
    image_shape,
)
from model.staged import StagedBackbone
from utils.errors import UserError
from utils.macs import count_macs, count_params

MOST = 4  # a plan's number is at most so many times the undivided network's


def division_plan(request: BackboneRequest) -> DivisionPlan:
    """The plan of a request, by the solver or by the family's table; nothing is computed.

    Raises:
        UserError: as `model.registry.check_request`, or a network that cannot be divided by S.
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


def usual_request(
    arch: str, split_factor: int, *, num_classes: int, crop_size: int | None = None, divide_by: str | None = None
) -> BackboneRequest:
    """A request where no data set says more: the network's own size of images, else 224 or 32 pixels.

    Raises:
        UserError: unknown name.
    """
    entry = backbones.get(arch)
    crop = crop_size or entry.crop_size or (224 if LARGE in entry.split_factors else 32)
    shape = image_shape("folder", crop)
    return BackboneRequest(
        arch=arch,
        split_factor=split_factor,
        num_classes=num_classes,
        shape=shape,
        dataset="imagenet" if shape == LARGE else "cifar100",
        crop_size=crop,
        divide_by=divide_by,
    )


def solver_plan(request: BackboneRequest) -> DivisionPlan | None:
    """The plan of a request that the solver decides; None where a table does, or nothing is divided."""
    return division_plan(request) if request.split_factor > 1 and check_request(request).plan is not None else None


def checked_arguments(
    request: BackboneRequest, leaves: Mapping[str, int | float], version: str
) -> dict[str, int | float]:
    """The numbers of a request's plan by the names of constructor arguments.

    Args:
        request: with `width_names` and `widths`.
        leaves: the numbers among the arguments of the undivided network.
        version: of the library that is installed.

    Raises:
        UserError: a name that the class does not have, or a value that is none of its.
    """
    names, widths = request.width_names, request.widths or ()
    if len(names) != len(widths):
        raise UserError(f"--arch {request.arch}: the plan has {len(names)} names and {len(widths)} widths.")
    unknown = next((name for name in names if name not in leaves), None)
    if unknown is not None:
        if request.library == version:
            raise UserError(
                f"--arch {request.arch}: the plan was made with {version}, which has no argument {unknown[:60]} there: "
                "the file is damaged."
            )
        raise UserError(
            f"--arch {request.arch}: the plan was made with {request.library or 'another version'}, and {version} has "
            f"no argument {unknown[:60]} there. Install that version."
        )
    found: dict[str, int | float] = {}
    for name, value in zip(names, widths, strict=True):
        before = leaves[name]
        may_be_fraction = isinstance(before, float) or leaf_kind(name) == "ratio"
        if not (0 < value <= MOST * before and (may_be_fraction or value == int(value))):  # NaN is neither
            raise UserError(
                f"--arch {request.arch}: the plan's {name} of {value:g} cannot be ({before:g} undivided): "
                "the file is damaged."
            )
        found[name] = value if isinstance(before, float) or value != int(value) else int(value)
    return found


def _measure(request: BackboneRequest) -> tuple[tuple[int, ...], int, int]:
    """(channels that each stage gives, parameters, multiply-adds) of one network."""
    image = (3, request.crop_size, request.crop_size)
    with torch.device("meta"):
        network = build_network(request)
        assert isinstance(network, StagedBackbone)
        with torch.no_grad():
            taps, _ = network.eval().forward_features(torch.empty(1, *image))
    return tuple(tap.shape[1] for tap in taps), count_params(network), count_macs(network, image)

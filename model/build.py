"""From flags or a request to the S networks of a division."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch

from model.members import FORMS, build_members
from model.options import ModelOptions
from model.packed import build_packed
from model.registry import (
    ARGUMENTS,
    ASKED,
    BackboneRequest,
    build_network,
    check_request,
    image_shape,
    solved_request,
)
from model.splitnet import SplitNet
from utils.errors import UserError
from utils.seed import STREAM_INIT, fold_in

# kinds of forms -> what builds the members of a request with one
BUILDERS: Mapping[str, Callable[..., SplitNet]] = {"packed": build_packed, **dict.fromkeys(FORMS, build_members)}


def network_requests(
    request: BackboneRequest, *, train_separately: bool = False, archs: Sequence[str] | None = None
) -> list[BackboneRequest]:
    """What each of the S networks of a division is, or each of several full networks; arguments as `build_splitnet`.

    Raises:
        UserError: as `check_request`, or an S or an option that cannot go with `archs`.
    """
    if archs is None:
        check_request(request)
        return [request] * (1 if train_separately else request.split_factor)
    if request.split_factor not in (1, len(archs)):
        raise UserError(
            f"--split_factor {request.split_factor} cannot go with the {len(archs)} full networks of --arch "
            f"({','.join(archs)}): leave it away."
        )
    if train_separately:
        raise UserError("--is_train_sep needs one divided network: give --arch one name, with a --split_factor.")
    one = replace(request, split_factor=1)
    if len(set(archs)) > 1 and request.way == ARGUMENTS:
        # in a checkpoint, what fits the first of them to small images: every other is fitted for itself
        one = replace(one, widths=None, way="", width_names=())
    if len(set(archs)) > 1 and one.widths is not None:
        raise UserError(f"--stage_widths are those of one backbone, and --arch names {','.join(archs)}.")
    return [replace(one, arch=arch) for arch in archs]


def build_splitnet(
    request: BackboneRequest,
    *,
    seed: int,
    identical_init: bool = False,
    train_separately: bool = False,
    archs: Sequence[str] | None = None,
    number: int | None = None,
    held: range | None = None,
) -> SplitNet:
    """The S networks of a division, or several full networks, on the CPU; initial weights depend on `seed` only.

    The global random state is left as it was.

    Args:
        request: structure of the networks.
        seed: network i is initialised from (seed, i).
        identical_init: initialise every network as network 0.
        train_separately: only one network, with the structure of one of S.
        archs: names of full (S = 1) networks for mutual learning, in place of `request.arch` and its S.
        number: only this one of the S networks, counted from 0, with the weights that it has among all.
        held: numbers of the networks that get weights; the others have structure alone, on the meta device. None: all.
            Not for members that share one network.

    Raises:
        UserError: as `check_request`, or an option that cannot go with `archs`.
    """
    if request.form is not None:
        return BUILDERS[request.form.kind](request, seed=seed)
    if identical_init and archs is not None and len(set(archs)) > 1:
        raise UserError(f"--is_identical_init needs equal networks, not --arch {','.join(archs)}: give one name.")
    requests = [
        solved_request(one) for one in network_requests(request, train_separately=train_separately, archs=archs)
    ]
    networks = []
    for i, one in enumerate(requests):
        if number not in (None, i):
            continue
        is_held = held is None or i in held
        # manual_seed of the CPU's generator alone: torch.manual_seed would also reseed every GPU
        with torch.random.fork_rng(devices=[]), nullcontext() if is_held else torch.device("meta"):
            torch.default_generator.manual_seed(fold_in(seed, STREAM_INIT, 0 if identical_init else i))
            networks.append(build_network(one))
    return SplitNet(networks, first=number or 0)


def backbone_request(
    options: ModelOptions, *, dataset: str, crop_size: int, num_classes: int, of_families: Mapping[str, Any]
) -> BackboneRequest:
    """What the flags ask for.

    Args:
        options: flags of the networks.
        dataset: value of --dataset.
        crop_size: side of the input in pixels.
        num_classes: K.
        of_families: flags that belong to single families of backbones, by name.
    """
    return BackboneRequest(
        arch=options.arch,
        split_factor=options.split_factor,
        num_classes=num_classes,
        shape=image_shape(dataset, crop_size),
        dataset=dataset,
        crop_size=crop_size,
        options={**of_families, "output_stride": options.output_stride},
        divide_by=options.divide_by,
        widths=options.stage_widths or None,
        way=ASKED if options.stage_widths else "",
    )

"""Networks of ours with other channels than their family's table gives: read off, solved, and built anew. Ours."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from model.division import divided_rate
from model.division.plan import MOST
from model.division.rechannel import ChannelGraph, Sizes, trace
from model.division.recording import BUILD_ERRORS
from model.division.solver import solve_both, solve_widths
from model.registry import CHANNELS, BackboneRequest, DivisionPlan, build_network, ways
from utils.errors import UserError, reason

_LOCK = threading.Lock()


def undivided_request(request: BackboneRequest) -> BackboneRequest:
    """The request of the undivided network."""
    return replace(
        request, split_factor=1, form=None, widths=None, way="", width_names=(), divide_by=None, fits_images=False
    )


def followed(request: BackboneRequest) -> tuple[nn.Module, ChannelGraph]:
    """The undivided network of a request without storage, and its channels.

    Raises:
        UserError: a network whose channels cannot be followed.
    """
    with torch.device("meta"):
        network = build_network(undivided_request(request))
    return network, channels_of(network, request.crop_size, request.arch)


def channels_of(network: nn.Module, crop_size: int, arch: str) -> ChannelGraph:
    """The channels of a network without storage.

    Args:
        arch: named in errors.

    Raises:
        UserError: as `trace`; also where a network of others does something that it knows nothing of.
    """
    try:
        return trace(network, (3, crop_size, crop_size), arch)
    except UserError:
        raise
    except BUILD_ERRORS as error:
        kind = type(error).__name__
        raise UserError(
            f"--arch {arch} cannot be divided: its channels cannot be followed ({kind}: {reason(error)[:80]})."
        ) from None


def times(count: int, sizes: tuple[int, int]) -> tuple[int, int]:
    """(parameters, multiply-adds) of so many copies."""
    return count * sizes[0], count * sizes[1]


def check_widths(arch: str, graph: ChannelGraph, widths: Sequence[float]) -> None:
    """Refuse widths that are not those of a network's stages.

    Raises:
        UserError: another number of them, or one out of all proportion.
    """
    if len(widths) != len(graph.widths):
        raise UserError(
            f"--arch {arch} has {len(graph.widths)} stage widths ({', '.join(graph.stages)}), and --stage_widths or "
            f"the checkpoint names {len(widths)}: see python -m model.division {arch} --by_channels."
        )
    if any(not 0 < width <= MOST * full for width, full in zip(widths, graph.widths, strict=True)):
        raise UserError(
            f"--arch {arch}: widths of {' '.join(f'{width:g}' for width in widths)[:60]} cannot be (undivided "
            f"{' '.join(map(str, graph.widths))}): the file is damaged, or --stage_widths is."
        )


def plan_by_channels(request: BackboneRequest, of: str) -> DivisionPlan:
    """One of S copies whose stage widths are solved, also for a network whose family has a table of its own.

    The best that is found is returned, also where it misses the budget.

    Args:
        of: what the copies together match: "params", "macs", or "both" of them.

    Raises:
        UserError: a network whose channels cannot be followed.
    """
    _, graph = followed(request)
    count, full = request.split_factor, graph.count(graph.widths)
    if of == "both" and count > 1:
        widths = solve_both(graph.widths, graph.units, lambda w: times(count, graph.count(w)), full)
    else:
        widths = solve_widths(graph.widths, graph.units, lambda w: graph.count(w)[of == "macs"], count)
    one = graph.count(widths)
    return DivisionPlan(
        arch=request.arch,
        split_factor=count,
        divide_by=of,
        stages=graph.stages,
        widths_full=graph.widths,
        widths=widths,
        params_full=full[0],
        params_one=one[0],
        macs_full=full[1],
        macs_one=one[1],
    )


@ways.register(CHANNELS)
def build_by_channels(request: BackboneRequest) -> nn.Module:
    """A network of ours with the stage widths of a request, in place of what its family's table says.

    All but the channels is as in the undivided network, with dropout-like rates over sqrt(S), as for networks of
    libraries.

    Raises:
        UserError: widths that are not those of its stages, or a network that does not run with them.
    """
    assert request.widths is not None
    _, graph = followed(request)
    check_widths(request.arch, graph, request.widths)
    channels = graph.channels([max(1, round(width)) for width in request.widths])
    sizes = {layer.name: graph.sizes(layer, channels) for layer in graph.layers}
    network = build_resized(undivided_request(request), sizes, f"--stage_widths: --arch {request.arch}")
    if request.split_factor > 1:
        _divide_rates(network, request.split_factor)
    return network


def _divide_rates(network: nn.Module, split_factor: int) -> None:
    """Dropout-like rates over sqrt(S)."""
    for module in network.modules():
        for name in ("p", "drop_prob"):
            rate = getattr(module, name, None)
            if isinstance(rate, float):
                setattr(module, name, divided_rate(rate, split_factor))


def build_resized(request: BackboneRequest, sizes: Mapping[str, Sizes], what: str) -> nn.Module:
    """The network of a request with other channels in its layers, initialised by its own code.

    It is built twice: once without storage, to see which layer is made when, and once more with other numbers handed to
    the constructors of the layers. So everything that its code computes after that, initial values above all, is right.

    Args:
        request: of the network as it is.
        sizes: channels and groups of layers by name; others stay.
        what: how an error calls the network.

    Raises:
        UserError: its code computes with channels that it does not read off its layers.
    """
    with torch.device("meta"), _LOCK, _constructing(lambda number, given: given) as order:
        network = build_network(request)
    names = {id(module): name for name, module in network.named_modules()}
    wanted = {number: sizes[names[key]] for number, key in enumerate(order) if names.get(key) in sizes}

    def change(number: int, given: dict[str, Any]) -> dict[str, Any]:
        return _resized(given, wanted[number]) if number in wanted else given

    with _LOCK, _constructing(change):
        resized = build_network(request)
    found = {name: resized.get_submodule(name) for name in sizes}
    wrong = [name for name, module in found.items() if not _has_sizes(module, sizes[name])]
    try:
        if wrong:
            raise ValueError(f"its layer {wrong[0]} is made in another way")
        with torch.no_grad():
            probe = torch.empty(1, 3, request.crop_size, request.crop_size, device="meta")
            state = {n: v.to("meta") for n, v in (*resized.named_parameters(), *resized.named_buffers())}
            torch.func.functional_call(resized.eval(), state, probe)
            resized.train()
    except (RuntimeError, ValueError, TypeError) as error:
        raise UserError(
            f"{what} does not run with other channels: {reason(error)[:150]}. Pick another --arch."
        ) from None
    return resized


_KINDS: tuple[type[nn.Module], ...] = (nn.Conv2d, nn.Linear, nn.BatchNorm2d, nn.LayerNorm)
_NUMBERS = {
    nn.Conv2d: ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups"),
    nn.Linear: ("in_features", "out_features"),
    nn.BatchNorm2d: ("num_features",),
    nn.LayerNorm: ("normalized_shape",),
}


@contextmanager
def _constructing(change: Callable[[int, dict[str, Any]], dict[str, Any]]) -> Iterator[list[int]]:
    """For the time of a block, layers are made with changed numbers; yields their ids in the order of construction."""
    order: list[int] = []
    kept: list[nn.Module] = []  # so that no id is used twice
    originals = {kind: kind.__init__ for kind in _KINDS}

    def wrapped(kind: type[nn.Module]) -> Callable[..., None]:
        def construct(self: nn.Module, *args: Any, **kwargs: Any) -> None:
            given = {**dict(zip(_NUMBERS[kind], args, strict=False)), **kwargs}
            rest = args[len(_NUMBERS[kind]) :]
            number = len(order)
            order.append(id(self))
            kept.append(self)
            changed = change(number, given)
            originals[kind](self, *(changed.pop(name) for name in _NUMBERS[kind][: len(args)]), *rest, **changed)

        return construct

    try:
        for kind in _KINDS:
            kind.__init__ = wrapped(kind)  # type: ignore[method-assign]
        yield order
    finally:
        for kind, original in originals.items():
            kind.__init__ = original  # type: ignore[method-assign]


def _resized(given: dict[str, Any], sizes: Sizes) -> dict[str, Any]:
    """The constructor's arguments with other channels."""
    if "in_channels" in given:
        return {**given, "in_channels": sizes.inputs, "out_channels": sizes.outputs} | (
            {"groups": sizes.groups} if sizes.groups != given.get("groups", 1) else {}
        )
    if "in_features" in given:
        return {**given, "in_features": sizes.inputs, "out_features": sizes.outputs}
    return {**given, next(name for name in ("num_features", "normalized_shape") if name in given): sizes.outputs}


def _has_sizes(module: nn.Module, sizes: Sizes) -> bool:
    if isinstance(module, nn.Conv2d):
        return (module.in_channels, module.out_channels, module.groups) == (sizes.inputs, sizes.outputs, sizes.groups)
    if isinstance(module, nn.Linear):
        return (module.in_features, module.out_features) == (sizes.inputs, sizes.outputs)
    return True

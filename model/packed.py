"""Packed-Ensembles (Laurent et al., arXiv:2210.09184): M thin networks, each of a part of the base network's channels.

With γ = 1 a packed network is M independent networks of width α / M on one view, so it is a SplitNet of them, and
`--execution stacked` runs it as the one network of groups that the paper draws. γ splits each member's convolutions
once more.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from model.division.rechannel import ChannelClass, ChannelGraph, Layer, Sizes, count_layers
from model.division.resizing import build_resized, check_widths, followed, undivided_request
from model.division.solver import TOLERANCE, solve_widths
from model.options import AUTO
from model.registry import BackboneRequest, note_request, request_of
from model.serial import SerialParts
from model.splitnet import SplitNet
from model.staged import staged_parts
from utils.errors import UserError
from utils.seed import STREAM_INIT, fold_in


def member_channels(channels: int, factor: float, groups: int) -> int:
    """Channels of one member: the nearest multiple of the groups to `channels` times `factor` (α / M), at least one."""
    return max(groups, int(channels * factor / groups + 0.5) * groups)


def further_groups(inputs: int, outputs: int, groups: int, gamma: int, min_channels: int) -> int:
    """γ': into how many groups more a member's convolution is split, at most γ.

    The largest number that divides the channels of every group, and leaves a group `min_channels` inputs; at least 1.
    """
    for split in range(gamma, 1, -1):
        whole = split * groups
        if inputs % whole == 0 and outputs % whole == 0 and inputs // whole >= min_channels:
            return split
    return 1


@dataclass(frozen=True)
class PackedPlan:
    """How the layers of one member are made from those of the base network.

    Attributes:
        graph: channels of the base network.
        kept: names of the convolutions that γ leaves alone.
        gamma, min_channels: γ, and the least inputs of a group that it makes.
    """

    graph: ChannelGraph
    kept: frozenset[str]
    gamma: int
    min_channels: int

    def channels(self, widths: Sequence[float]) -> dict[ChannelClass, int]:
        """Channels of every class where the stages have these widths."""
        units: dict[ChannelClass, int] = {}
        for layer in self.graph.layers:
            if layer.groups > 1 and not layer.depthwise:
                for of in {*layer.sources, *((layer.out,) if layer.out else ())}:
                    leader = self.graph.follows.get(of, of)
                    units[leader] = math.lcm(units.get(leader, 1), layer.groups)
        found = {}
        for of in self.graph.classes:
            leader = self.graph.follows.get(of, of)
            stage, before = leader
            found[of] = member_channels(before, widths[stage] / self.graph.widths[stage], units.get(leader, 1))
        return found

    def sizes(self, layer: Layer, channels: Mapping[ChannelClass, int]) -> Sizes:
        """Channels and groups of a member's layer."""
        inputs = layer.repeats * sum(map(channels.__getitem__, layer.sources)) if layer.sources else layer.fixed_in
        if layer.kind == "norm" or layer.depthwise:
            return Sizes(inputs, inputs, inputs)
        outputs = layer.fixed_out if layer.out is None else channels[layer.out]
        if layer.kind != "conv" or layer.name in self.kept:
            return Sizes(inputs, outputs, layer.groups)
        more = further_groups(inputs, outputs, layer.groups, self.gamma, self.min_channels)
        return Sizes(inputs, outputs, layer.groups * more)

    def count(self, widths: Sequence[float]) -> tuple[int, int]:
        """(parameters, multiply-adds for one image) of one member."""
        channels = self.channels(widths)
        return count_layers((layer, self.sizes(layer, channels)) for layer in self.graph.layers)


def packed_plan(request: BackboneRequest, gamma: int, min_channels: int) -> PackedPlan:
    """The plan of the network that a request without form and widths stands for.

    Raises:
        UserError: a network whose channels cannot be followed.
    """
    network, graph = followed(request)
    if graph.loose:
        raise UserError(
            f"--method packed: the parameter {next(iter(graph.loose))} of --arch {request.arch} belongs to no layer, "
            "and only layers can be made narrower. Pick another --arch."
        )
    return PackedPlan(graph, frozenset(_left_alone(network, graph)), gamma, min_channels)


def _left_alone(network: nn.Module, graph: ChannelGraph) -> Iterator[str]:
    """Names of the convolutions before the first stage, and of the first of every block, or stage without blocks."""
    inside: set[int] = set()
    first: set[int] = set()
    parts = staged_parts(network)
    if isinstance(parts, SerialParts):
        parts = None  # the rules of this method were made where these were not found
    for stage in [*network.children()] if parts is None else parts.stages:
        of_stage = [part for part in stage.modules() if isinstance(part, nn.Conv2d)]
        inside |= {id(part) for part in of_stage}
        blocks = [child for child in stage.children() if not isinstance(child, nn.Conv2d)]
        for block in blocks if any(_has_convolution(child) for child in blocks) else [stage]:
            first |= {id(part) for part in [m for m in block.modules() if isinstance(m, nn.Conv2d)][:1]}
    for layer in graph.layers:
        module = network.get_submodule(layer.name)
        if isinstance(module, nn.Conv2d) and (id(module) not in inside or id(module) in first):
            yield layer.name


def _has_convolution(module: nn.Module) -> bool:
    return any(isinstance(part, nn.Conv2d) for part in module.modules())


def packed_widths(
    request: BackboneRequest, *, members: int, alpha: str, gamma: int, min_channels: int
) -> tuple[float, ...]:
    """Stage widths of one member.

    Args:
        request: of the base network; `divide_by` says what `alpha` "auto" matches.
        members: M.
        alpha: α as text: every width times α / M; or "auto": M members have the parameters (or MACs) of the base.
        gamma, min_channels: as `PackedPlan`.

    Raises:
        UserError: as `packed_plan`, or no widths come within 2 %.
    """
    plan = packed_plan(request, gamma, min_channels)
    full = plan.graph.widths
    if alpha != AUTO:
        if request.divide_by is not None:
            raise UserError(f"--divide_by {request.divide_by} is for --packed_alpha auto: leave it away.")
        return tuple(width * float(alpha) / members for width in full)
    which = 0 if (request.divide_by or "params") == "params" else 1
    budget = replace(plan, gamma=1).count(full)[which]

    def cost(widths: Sequence[int]) -> int:
        # the undivided network itself has no further groups
        return budget if tuple(widths) == full else plan.count(widths)[which]

    widths = solve_widths(full, plan.graph.units, cost, members)
    difference = members * cost(widths) / budget - 1
    if abs(difference) > TOLERANCE:
        raise UserError(
            f"--method packed --num_members {members}: no widths of {request.arch} give the budget of the undivided "
            f"network; the nearest differ by {difference:+.1%}. Take another --num_members, or a --packed_alpha."
        )
    return widths


def build_packed(request: BackboneRequest, *, seed: int) -> SplitNet:
    """M members of a request with the form "packed"; member m is initialised from (seed, m).

    Widths that the request does not say are those of the form's `alpha`.

    Raises:
        UserError: a network whose channels cannot be followed, or that does not run with fewer.
    """
    form = request.form
    assert form is not None
    gamma, min_channels = int(form.numbers["gamma"]), int(form.numbers["min_channels"])
    widths = request.widths or packed_widths(
        request, members=form.members, alpha=str(form.numbers["alpha"]), gamma=gamma, min_channels=min_channels
    )
    plan = packed_plan(request, gamma, min_channels)
    check_widths(request.arch, plan.graph, widths)
    channels = plan.channels(widths)
    sizes = {layer.name: plan.sizes(layer, channels) for layer in plan.graph.layers}
    networks = []
    for member in range(form.members):
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(fold_in(seed, STREAM_INIT, member))
            network = build_resized(undivided_request(request), sizes, f"--method packed: --arch {request.arch}")
        note_request(network, replace(request_of(network), form=form, widths=tuple(map(float, widths))))
        networks.append(network)
    return SplitNet(networks)

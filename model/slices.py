"""Networks of a division that start from slices of an undivided parent's weights.

A channel dimension of C channels becomes one of C' <= C. R = max(1, floor(C / C')) networks share one permutation of
the parent's channels and take disjoint parts of it; the next R take the next permutation. A permutation is a function
of the seed, its number and C alone, so every tensor that has these channels is cut alike and residual sums stay
aligned. Which dimension of which tensor holds which channels is read off one forward pass of the parent
(`model.division.rechannel`). Ours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NoReturn

import numpy as np
import torch
from torch import Tensor, nn

from model.argument_slices import ArgumentCutter
from model.division.rechannel import ChannelClass, ChannelGraph, Layer
from model.division.resizing import channels_of
from model.kept_channels import Indices, kept_channels, shared_part
from model.registry import ARGUMENTS, BackboneRequest, build_network, check_request
from model.staged import classifier_names
from utils.errors import UserError


@dataclass(frozen=True)
class Slices:
    """What the S networks take from their parent.

    Attributes:
        states: of every network, its state dict by name; without the classifier where the classes are others.
        shared: part of a divided dimension's channels that two networks have in common, the mean over pairs of
            networks and dimensions of the parent, weighted by their channels.
    """

    states: tuple[dict[str, Tensor], ...]
    shared: float


def cut(parent: Mapping[str, Tensor], request: BackboneRequest, *, networks: int, seed: int, source: str) -> Slices:
    """The weights of `networks` divided networks, cut from those of the undivided one.

    Running statistics are cut too, and no longer fit: have them made anew before anything relies on them.

    Args:
        parent: state dict of one undivided network of the same backbone.
        request: structure of the divided networks, with the widths that a solver found.
        networks: how many, S.
        seed: of the run.
        source: how errors call the parent ("--pretrained PATH").

    Raises:
        UserError: the parent is not the undivided network of this backbone, or its channels cannot be followed.
    """
    whole_request = replace(request, split_factor=1, widths=None, way="", width_names=())
    with torch.device("meta"):
        whole, part = build_network(whole_request), build_network(request)
    heads = classifier_names(whole)
    if not heads:
        raise UserError(f"{source}: --arch {request.arch} has no classifier that could be told from its other layers.")
    names = [name for name in part.state_dict() if not _is_new_head(name, heads, parent, part)]
    _check(parent, whole, names, source)
    cutter = _cutter(request, whole, part, networks, seed, source)
    shapes = {name: tuple(value.shape) for name, value in part.state_dict().items()}
    weights = {f"{head}.weight" for head in heads}
    states = tuple(
        {name: cutter.cut(name, parent[name], shapes[name], i, is_head=name in weights) for name in names}
        for i in range(networks)
    )
    return Slices(states, cutter.shared(networks))


def _cutter(
    request: BackboneRequest, whole: nn.Module, part: nn.Module, networks: int, seed: int, source: str
) -> _Cutter | ArgumentCutter:
    """What cuts, by the way in which the networks are divided."""
    plan = check_request(request).plan
    if request.way == ARGUMENTS and request.split_factor > 1 and plan is not None:
        undecided = replace(request, widths=None, way="", width_names=())
        return ArgumentCutter(request, plan(undecided), networks, seed, source)
    try:
        graph, theirs = (channels_of(network, request.crop_size, request.arch) for network in (whole, part))
    except UserError as error:
        raise UserError(f"{source}: no slices of a parent: {error}") from None
    return _Cutter(graph, {layer.name: layer for layer in theirs.layers}, request.arch, seed, source)


def _is_new_head(name: str, heads: Sequence[str], parent: Mapping[str, Tensor], part: nn.Module) -> bool:
    """Whether a tensor is of a classifier for other classes than the parent's."""
    if not name.startswith(tuple(f"{head}." for head in heads)) or name not in parent:
        return False
    return parent[name].shape[:1] != part.state_dict()[name].shape[:1]


def _check(parent: Mapping[str, Tensor], whole: nn.Module, names: Sequence[str], source: str) -> None:
    expected = {name: tuple(value.shape) for name, value in whole.state_dict().items()}
    for name in names:
        if name not in parent:
            raise UserError(f"{source}: is no parent of these networks: it has no tensor {name}.")
        if tuple(parent[name].shape) != expected[name]:
            raise UserError(
                f"{source}: is no parent of these networks: {name} has shape {tuple(parent[name].shape)}, that of the "
                f"undivided network {expected[name]}."
            )


class _Cutter:
    """Which channels of each dimension a network takes."""

    def __init__(self, graph: ChannelGraph, theirs: Mapping[str, Layer], arch: str, seed: int, source: str) -> None:
        self.graph = graph
        self.layers = {layer.name: layer for layer in graph.layers}
        self.theirs = theirs
        self.arch, self.seed, self.source = arch, seed, source
        self.after: dict[ChannelClass, int] = {}  # class -> channels of the divided network
        self.groups: dict[ChannelClass, tuple[int, int]] = {}  # class -> groups before and after
        for layer in graph.layers:
            other = theirs.get(layer.name)
            if other is None:
                self._refuse(layer.name, "is not in the divided network")
            if layer.out is None:
                continue
            of = self._leader(layer.out)
            if self.after.setdefault(of, other.fixed_out) != other.fixed_out:
                self._refuse(layer.name, f"keeps {other.fixed_out} of {of[1]} channels, another layer {self.after[of]}")
            if other.fixed_out > of[1]:
                self._refuse(
                    layer.name, f"has {other.fixed_out} channels in the divided network, {of[1]} in the parent"
                )
            if layer.kind == "conv" and layer.groups > 1:
                self.groups[of] = (layer.groups, other.groups)

    def cut(self, name: str, value: Tensor, shape: tuple[int, ...], network: int, *, is_head: bool) -> Tensor:
        """One tensor of the parent -> that of network number `network`, of shape `shape`."""
        owner, _, kind = name.rpartition(".")
        layer = self.layers.get(owner)
        if not value.dim():
            return value.clone()
        if layer is None:
            stage, _ = self.graph.loose.get(name) or self._refuse(name, "follows no layer")
            dimensions = [self._of_class((stage, size), network) if size > 1 else np.arange(1) for size in value.shape]
        else:
            dimensions = self._of_layer(layer, value, kind, network)
        for dimension, kept in enumerate(dimensions):
            value = value.index_select(dimension, torch.from_numpy(kept).to(value.device))
        if tuple(value.shape) != shape:
            self._refuse(name, f"gives {tuple(value.shape)}, the divided network's tensor is {shape}")
        if is_head:  # as many channels as before add up to the same logits
            assert layer is not None
            value = value * (layer.fixed_in / value.shape[1])
        return value.clone()

    def _of_layer(self, layer: Layer, value: Tensor, kind: str, network: int) -> list[Indices]:
        inputs = self._inputs(layer, network)
        outputs = np.arange(layer.fixed_out) if layer.out is None else self._of_class(layer.out, network)
        if layer.kind == "norm" or layer.depthwise:
            outputs = inputs
        if kind != "weight" or layer.kind == "norm":
            return [outputs]
        if layer.depthwise:
            inputs = np.arange(1)
        elif layer.groups > 1:
            inputs = self._within_group(layer, network)
        return [outputs, inputs, *(np.arange(size) for size in value.shape[2:])]

    def _inputs(self, layer: Layer, network: int) -> Indices:
        """Channels that a layer takes: those of its sources in their order, each repeated where a map is flat."""
        if not layer.sources:
            return np.arange(layer.fixed_in)
        parts, start = [], 0
        for of in layer.sources:
            kept = start + self._of_class(of, network)
            parts.append((kept[:, None] * layer.repeats + np.arange(layer.repeats)).ravel())
            start += of[1]
        return np.concatenate(parts)

    def _within_group(self, layer: Layer, network: int) -> Indices:
        """Inputs of one group of a grouped convolution, which takes what it gives."""
        other = self.theirs[layer.name]
        return kept_channels(self.seed, network, layer.fixed_in // layer.groups, other.fixed_in // other.groups)

    def _of_class(self, of: ChannelClass, network: int) -> Indices:
        """Groups of a grouped convolution are kept whole where their width stays; else all are narrowed alike."""
        of = self._leader(of)
        if of not in self.after:
            self._refuse(f"of {of[1]} channels", "comes from no layer")
        before, after = of[1], self.after[of]
        groups_before, groups_after = self.groups.get(of, (1, 1))
        width, width_after = before // groups_before, after // groups_after
        groups = kept_channels(self.seed, network, groups_before, groups_after)
        within = kept_channels(self.seed, network, width, width_after)
        return (groups[:, None] * width + within).ravel()

    def _leader(self, of: ChannelClass) -> ChannelClass:
        return self.graph.follows.get(of, of)

    def shared(self, networks: int) -> float:
        """See `Slices`."""
        total, common = 0, 0.0
        for of, after in self.after.items():
            if after == of[1] or networks < 2:
                continue
            common += of[1] * shared_part([self._of_class(of, i) for i in range(networks)])
            total += of[1]
        return common / total if total else 1.0

    def _refuse(self, name: str, what: str) -> NoReturn:
        raise UserError(f"{self.source}: --arch {self.arch} cannot take slices of a parent: {name} {what}.")

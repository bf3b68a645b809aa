"""Channel widths of a network that is not ours: read them off one forward pass, and give it others.

One pass without storage records which layer feeds which, so that a network can be rebuilt with other channel counts
however its author wrote it: residual sums, squeeze-and-excitation, depthwise and grouped convolutions, concatenation.
The rule that keeps everything consistent: two tensors of one stage that had the same number of channels keep the same
number, and so do two of different stages that meet in a sum or a product. Ours.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from model.division.solver import channel_unit, scaled_width
from utils.errors import UserError

Label = tuple[str, int]  # (unit of the network, channels before division): what is scaled alike
ChannelClass = tuple[int, int]  # (stage, channels before division)


@dataclass(frozen=True)
class Layer:
    """A layer with weights, as one forward pass used it.

    Attributes:
        name: of the module.
        kind: "conv", "linear" or "norm".
        sources: where its input channels come from, in order; () where they are the image's.
        repeats: input values for each source channel; more than 1 behind a flattened feature map.
        out: what its output is, None where the number of outputs is fixed (the classifier), or the input's (norms,
            depthwise convolutions).
        fixed_in, fixed_out: channels before division.
        depthwise: one group per channel.
        groups: groups of the convolution before division.
        kernel: weights per input and output channel.
        positions: outputs per output channel for one image.
        per_channel: parameters per output channel besides the kernel (biases, scales).
    """

    name: str
    kind: str
    sources: tuple[ChannelClass, ...]
    repeats: int
    out: ChannelClass | None
    fixed_in: int
    fixed_out: int
    depthwise: bool
    groups: int
    kernel: int
    positions: int
    per_channel: int


@dataclass(frozen=True)
class Sizes:
    """Channels of a layer after division."""

    inputs: int
    outputs: int
    groups: int


def count_layers(layers: Iterable[tuple[Layer, Sizes]]) -> tuple[int, int]:
    """(parameters, multiply-adds for one image) of layers with these channels."""
    params = macs = 0
    for layer, sizes in layers:
        if layer.kind != "norm":
            weights = sizes.inputs // sizes.groups * sizes.outputs * layer.kernel
            params += weights
            macs += weights * layer.positions
        params += sizes.outputs * layer.per_channel
    return params, macs


@dataclass(frozen=True)
class ChannelGraph:
    """What may be scaled in a network, and what it costs.

    Attributes:
        stages: name of each stage, from the image to the logits.
        widths: width of each stage before division: the channels that its last layer gives.
        units: width of each stage is a multiple of this.
        classes: what is scaled.
        layers: every layer with weights, in the order of the forward pass.
        loose: parameters of no layer (layer scale) -> the stage whose classes their dimensions follow, and their shape.
        group_widths: class -> channels come in multiples of this, because a grouped convolution takes them.
        groups_kept: classes whose convolution keeps its number of groups; the others keep the width of a group.
        follows: class -> class of another stage whose channels it has, because the two meet in a sum or a product.
    """

    stages: tuple[str, ...]
    widths: tuple[int, ...]
    units: tuple[int, ...]
    classes: frozenset[ChannelClass]
    layers: tuple[Layer, ...]
    loose: Mapping[str, tuple[int, tuple[int, ...]]]
    group_widths: Mapping[ChannelClass, int]
    groups_kept: Mapping[ChannelClass, bool]
    follows: Mapping[ChannelClass, ChannelClass]

    def channels(self, widths: Sequence[int]) -> dict[ChannelClass, int]:
        """Channels of every class where the stages have these widths."""
        scaled = {}
        for of in self.classes:
            leader = self.follows.get(of, of)
            stage, before = leader
            unit = self.group_widths.get(leader) or channel_unit(before)
            same = widths[stage] == self.widths[stage]
            scaled[of] = before if same else scaled_width(before, widths[stage] / self.widths[stage], unit)
        return scaled

    def sizes(self, layer: Layer, channels: Mapping[ChannelClass, int]) -> Sizes:
        """Channels and groups of a layer where the classes have so many channels."""
        inputs = layer.fixed_in
        if layer.sources:
            inputs = layer.repeats * sum(map(channels.__getitem__, layer.sources))
        if layer.kind == "norm" or layer.depthwise:
            return Sizes(inputs, inputs, inputs)
        outputs = layer.fixed_out if layer.out is None else channels[layer.out]
        groups = layer.groups
        if groups > 1 and not self.groups_kept[layer.sources[0]]:
            groups = inputs // self.group_widths[layer.sources[0]]
        return Sizes(inputs, outputs, groups)

    def count(self, widths: Sequence[int]) -> tuple[int, int]:
        """(parameters, multiply-adds for one image) where the stages have these widths."""
        channels = self.channels(widths)
        params, macs = count_layers((layer, self.sizes(layer, channels)) for layer in self.layers)
        for stage, shape in self.loose.values():
            params += math.prod(_loose_shape(stage, shape, channels))
        return params, macs

    def resize(self, network: nn.Module, widths: Sequence[int]) -> None:
        """Give a network of the graph's structure these widths; its parameters are new and without values."""
        channels = self.channels(widths)
        for layer in self.layers:
            module, sizes = network.get_submodule(layer.name), self.sizes(layer, channels)
            shapes: dict[str, tuple[int, ...]] = {"bias": (sizes.outputs,), "weight": (sizes.outputs,)}
            if isinstance(module, nn.Conv2d):
                module.in_channels, module.out_channels, module.groups = sizes.inputs, sizes.outputs, sizes.groups
                shapes["weight"] = (sizes.outputs, sizes.inputs // sizes.groups, *module.kernel_size)
            elif isinstance(module, nn.Linear):
                module.in_features, module.out_features = sizes.inputs, sizes.outputs
                shapes["weight"] = (sizes.outputs, sizes.inputs)
            elif isinstance(module, nn.LayerNorm):
                module.normalized_shape = (sizes.outputs,)
            elif isinstance(module, nn.BatchNorm2d):
                module.num_features = sizes.outputs
                for name in ("running_mean", "running_var"):
                    buffer = getattr(module, name)
                    setattr(module, name, buffer.new_empty(sizes.outputs))
            for name, size in shapes.items():
                parameter = getattr(module, name)
                if parameter is not None:
                    setattr(module, name, nn.Parameter(parameter.new_empty(size)))
        for path, (stage, shape) in self.loose.items():
            owner, _, name = path.rpartition(".")
            holder = network.get_submodule(owner)
            resized = getattr(holder, name).new_empty(_loose_shape(stage, shape, channels))
            setattr(holder, name, nn.Parameter(resized))


def _loose_shape(stage: int, shape: tuple[int, ...], channels: Mapping[ChannelClass, int]) -> tuple[int, ...]:
    return tuple(size if size == 1 else channels[stage, size] for size in shape)


@dataclass
class _Use:
    """A layer as the pass met it: labels in place of classes."""

    module: nn.Module
    unit: str
    sources: tuple[Label, ...]
    inputs: int
    outputs: int
    positions: int
    carried: bool = False  # the output is the input's, channel by channel


@dataclass
class _Recorder:
    """What one forward pass collects."""

    owners: Mapping[int, tuple[str, nn.Module]]  # id of a weight -> its layer
    uses: dict[str, _Use] = field(default_factory=dict)
    unit: str = ""
    order: dict[str, int] = field(default_factory=dict)  # unit -> channels that it gives
    ties: dict[tuple[Label, Label], None] = field(default_factory=dict)  # channels that met in a sum or a product


class _Follow(TorchFunctionMode):
    """Hands the origin of every channel on from tensor to tensor, and notes each layer's use of it."""

    def __init__(self, recorder: _Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.batch_norm:  # takes most of the time of a pass without storage, and keeps the shape
            result = args[0].view_as(args[0])
            weight = kwargs.get("weight", args[3] if len(args) > 3 else None)
        else:
            result = func(*args, **kwargs)
            weight = args[1] if func in (F.conv2d, F.linear) else None
            if func is F.layer_norm:
                weight = kwargs.get("weight", args[2] if len(args) > 2 else None)
        if not isinstance(result, Tensor):
            return result
        if func in (torch.cat, torch.concat):
            labels: tuple[Label, ...] = tuple(label for part in args[0] for label in _labels(part))
        else:
            everything = (*args, *kwargs.values())
            known = [_labels(arg) for arg in everything if isinstance(arg, Tensor) and _labels(arg)]
            labels = known[0] if known else ()
            for other in known[1:]:
                pairs = zip(labels, other, strict=False)
                self.recorder.ties |= {(a, b): None for a, b in pairs if a != b and a[1] == b[1]}
        owner = self.recorder.owners.get(id(weight))
        if owner is not None:
            labels = self._note(*owner, labels, result)
        result._channel_labels = labels  # type: ignore[attr-defined]
        return result

    def _note(self, name: str, module: nn.Module, labels: tuple[Label, ...], result: Tensor) -> tuple[Label, ...]:
        """File the use of a layer; returns the labels of its output."""
        inputs, outputs = _channels(module)
        layer = isinstance(module, nn.Conv2d | nn.Linear)
        depthwise = isinstance(module, nn.Conv2d) and module.groups == inputs == outputs and inputs > 1
        use = _Use(
            module, self.recorder.unit, labels, inputs, outputs, result.numel() // outputs, depthwise or not layer
        )
        self.recorder.uses[name] = use
        return labels if use.carried else ((self.recorder.unit, outputs),)


def _labels(tensor: Tensor) -> tuple[Label, ...]:
    labels: tuple[Label, ...] = getattr(tensor, "_channel_labels", ())
    return labels


def _channels(module: nn.Module) -> tuple[int, int]:
    """(inputs, outputs) of a layer."""
    if isinstance(module, nn.Conv2d):
        return module.in_channels, module.out_channels
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    if isinstance(module, nn.BatchNorm2d):
        return module.num_features, module.num_features
    assert isinstance(module, nn.LayerNorm)
    count = math.prod(module.normalized_shape)
    return count, count


def _units(network: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The parts that a network runs one after another: its children, and those of plain sequences among them."""
    for name, child in network.named_children():
        if isinstance(child, nn.Sequential) and len(child):
            yield from _units(child, f"{prefix}{name}.")
        else:
            yield prefix + name, child


def trace(network: nn.Module, image: Sequence[int], arch: str) -> ChannelGraph:
    """The channel graph of a classifier on the meta device.

    Args:
        network: its forward pass must not depend on values.
        image: [C, H, W] of one image.
        arch: named in errors.

    Raises:
        UserError: the image is too small for the network, or the network has a layer that cannot be followed.
    """
    layers = {
        name: module
        for name, module in network.named_modules()
        if isinstance(module, nn.Conv2d | nn.Linear | nn.BatchNorm2d | nn.LayerNorm)
    }
    owners = {id(module.weight): (name, module) for name, module in layers.items() if module.weight is not None}
    recorder = _Recorder(owners)
    handles = []
    for name, unit in _units(network):

        def enter(module: nn.Module, inputs: Any, name: str = name) -> None:
            recorder.unit = name

        def leave(module: nn.Module, inputs: Any, output: Any, name: str = name) -> None:
            given = output[-1] if isinstance(output, list) and output else output  # of parallel branches the last
            if isinstance(given, Tensor) and given.dim() > 1:
                recorder.order[name] = given.shape[1]

        handles += [unit.register_forward_pre_hook(enter), unit.register_forward_hook(leave)]
    try:
        with torch.no_grad(), _Follow(recorder):
            network.eval()(torch.empty(1, *image, device="meta"))
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"--arch {arch} cannot take images of {image[-1]} pixels: give a larger --crop_size "
            f"({' '.join(str(error).split())[:120]})."
        ) from None
    finally:
        for handle in handles:
            handle.remove()
    network.train()
    return _graph(network, recorder, arch)


def _graph(network: nn.Module, recorder: _Recorder, arch: str) -> ChannelGraph:
    """Labels -> classes: units that follow one another and give the same number of channels are one stage."""
    uses = recorder.uses
    # whatever gives the logits, a convolution in some
    classifier = [name for name, use in uses.items() if not use.carried][-1:]
    stage_of: dict[str, int] = {}
    number, before = -1, None
    for unit, channels in recorder.order.items():
        number, before = (number, channels) if channels == before else (number + 1, channels)
        stage_of[unit] = number
    scaling = [name for name, use in uses.items() if not use.carried and name not in classifier]
    used = sorted({stage_of[uses[name].unit] for name in scaling})
    renumbered = {stage: i for i, stage in enumerate(used)}

    def class_of(label: Label) -> ChannelClass:
        return renumbered[stage_of[label[0]]], label[1]

    own_widths = {renumbered[stage_of[uses[name].unit]]: uses[name].outputs for name in scaling}
    follows = _follows([(class_of(a), class_of(b)) for a, b in recorder.ties], own_widths)
    group_widths: dict[ChannelClass, int] = {}
    groups_kept: dict[ChannelClass, bool] = {}
    layers = []
    for name, use in uses.items():
        module = use.module
        sources = tuple(map(class_of, use.sources))
        given = sum(channels for _, channels in sources)
        if (sources and use.inputs % given) or not (sources or name == next(iter(uses))):
            raise UserError(f"--arch {arch} cannot be divided: the channels that its layer {name} takes are unknown.")
        conv = isinstance(module, nn.Conv2d)
        groups = module.groups if isinstance(module, nn.Conv2d) else 1
        out = None if use.carried or name in classifier else (renumbered[stage_of[use.unit]], use.outputs)
        if conv and groups > 1 and not use.carried:
            if out is None or sources != (out,):
                raise UserError(f"--arch {arch} cannot be divided: the groups of its layer {name} cannot be kept.")
            width = use.inputs // groups
            # whichever leaves the finer choice of widths: whole groups fall away, or every group gets narrower
            groups_kept[out] = width > groups
            group_widths[out] = groups if width > groups else width
        weight = module.weight
        assert isinstance(weight, Tensor)
        kind = "conv" if conv else "linear" if isinstance(module, nn.Linear) else "norm"
        layers.append(
            Layer(
                name=name,
                kind=kind,
                sources=sources,
                repeats=use.inputs // given if sources else 1,
                out=out,
                fixed_in=use.inputs,
                fixed_out=use.outputs,
                depthwise=conv and use.carried,
                groups=groups,
                kernel=math.prod(weight.shape[2:]),
                positions=use.positions,
                per_channel=(kind == "norm") + (module.bias is not None),
            )
        )
    for follower, leader in follows.items():
        if follower in group_widths:
            group_widths[leader] = math.lcm(group_widths[follower], group_widths.get(leader, 1))
    names: dict[int, list[str]] = {}
    for name in scaling:
        names.setdefault(renumbered[stage_of[uses[name].unit]], []).append(uses[name].unit)
    known = {(renumbered[stage_of[uses[n].unit]], uses[n].outputs) for n in scaling}
    loose = _loose_parameters(network, uses, stage_of, renumbered, known, arch)
    return ChannelGraph(
        stages=_stage_names([names[i] for i in range(len(used))]),
        widths=tuple(own_widths[i] for i in range(len(used))),
        units=tuple(group_widths.get((i, own_widths[i])) or channel_unit(own_widths[i]) for i in range(len(used))),
        classes=frozenset(known),
        layers=tuple(layers),
        loose=loose,
        group_widths=group_widths,
        groups_kept=groups_kept,
        follows=follows,
    )


def _follows(
    ties: Sequence[tuple[ChannelClass, ChannelClass]], own_widths: Mapping[int, int]
) -> dict[ChannelClass, ChannelClass]:
    """Every class that met one of another stage -> the class that all of them take their channels from.

    That is one that is its stage's width, the first of them, because a stage's width is what the solver sets.
    """
    sets: list[set[ChannelClass]] = []
    for tie in ties:
        joined = set(tie).union(*(one for one in sets if not one.isdisjoint(tie)))
        sets = [one for one in sets if one.isdisjoint(tie)] + [joined]
    leaders = [(min(one, key=lambda of: (of[1] != own_widths[of[0]], of)), one) for one in sets]
    return {of: leader for leader, one in leaders for of in one if of != leader}


def _loose_parameters(
    network: nn.Module,
    uses: Mapping[str, _Use],
    stage_of: Mapping[str, int],
    renumbered: Mapping[int, int],
    known: set[ChannelClass],
    arch: str,
) -> dict[str, tuple[int, tuple[int, ...]]]:
    """Parameters of no layer, by name: (stage, shape)."""
    loose = {}
    for name, parameter in network.named_parameters():
        if name.rpartition(".")[0] in uses:
            continue
        unit = next((unit for unit in stage_of if name.startswith(f"{unit}.")), None)
        stage = None if unit is None else renumbered.get(stage_of[unit])
        if stage is None or any(size > 1 and (stage, size) not in known for size in parameter.shape):
            raise UserError(f"--arch {arch} cannot be divided: its parameter {name} follows no layer.")
        loose[name] = (stage, tuple(parameter.shape))
    return loose


def _stage_names(units: Sequence[Sequence[str]]) -> tuple[str, ...]:
    """What the units of each stage have in common; where that says nothing, the place of one of them."""
    names = []
    for stage in units:
        levels = zip(*(unit.split(".") for unit in stage), strict=False)
        common = itertools.takewhile(lambda parts: len(set(parts)) == 1, levels)
        names.append(".".join(parts[0] for parts in common) or stage[-1].rpartition(".")[0] or stage[-1])
    return tuple(name if names.count(name) == 1 else stage[0] for name, stage in zip(names, units, strict=True))

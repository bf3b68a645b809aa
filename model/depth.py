"""How deep the parameters of a network lie: what --freeze holds fast, and the layers of --layer_decay."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from model.heads import is_sequence, stem_parameters
from model.options import check_freeze
from model.registry import backbones, request_of
from model.splitnet import SplitNet
from model.staged import Staged, beside_names, classifier_names, staged_parts
from utils.errors import UserError


@dataclass(frozen=True)
class Layer:
    """Parameters that train at one rate under --layer_decay, by their names in the network; label: for people."""

    label: str
    names: tuple[str, ...]


def freeze(network: SplitNet, what: str) -> int:
    """Hold the lower parts of every network fast: no gradients, and evaluation mode whatever `train()` says.

    Norms there keep their statistics, and random layers do nothing. Branches and gates beside a network are trained, as
    those of a method are.

    Args:
        network: S networks.
        what: as --freeze.

    Returns:
        how many parameters are frozen, in all networks together.

    Raises:
        UserError: as `check_freeze`, a network without stages or without a classifier, or with too few stages.
    """
    check_freeze(what)
    asleep = []
    for i, one in network.numbered():
        frozen = _frozen_parameters(one, what)
        for parameter in one.parameters():
            if id(parameter) in frozen:
                parameter.requires_grad_(False)
        trained = {module for module in one.modules() if any(id(p) not in frozen for p in module.parameters())}
        stages = _stages(one, what)
        for name, module in one.named_modules():
            # what has no parameters and no place within a frozen stage, as a dropout before the classifier, stays awake
            if module not in trained and (any(True for _ in module.parameters()) or module in stages):
                asleep.append(f"models.{i}.{name}")
    network.asleep = tuple(asleep)
    return sum(parameter.numel() for parameter in network.parameters() if not parameter.requires_grad)


def _frozen_parameters(network: nn.Module, what: str) -> set[int]:
    """The ids of the parameters of one network that are not trained."""
    if what == "backbone":
        heads = classifier_names(network)
        if not heads:
            raise UserError(f"--freeze backbone: {_arch(network)} has no classifier that could be trained alone.")
        trained = *(f"{head}." for head in heads), *beside_names(network)
        return {id(parameter) for name, parameter in network.named_parameters() if not name.startswith(trained)}
    staged = _require_stages(network, f"--freeze {what}")
    if _depth(what) > len(staged.stages):
        raise UserError(f"--freeze {what}: {_arch(network)} has {len(staged.stages)} stages.")
    of_stages = {id(parameter) for stage in staged.stages[: _depth(what)] for parameter in stage.parameters()}
    return stem_parameters(staged) | of_stages


def _stages(network: nn.Module, what: str) -> set[nn.Module]:
    """All modules of the frozen stages, where the network has stages."""
    staged = staged_parts(network)
    if staged is None:
        return set()
    stages = staged.stages if what == "backbone" else staged.stages[: _depth(what)]
    return {module for stage in stages for module in stage.modules()}


def _depth(what: str) -> int:
    """How many stages a --freeze of stem or stages:N names."""
    return int(what.partition(":")[2] or 0)


def layers(network: nn.Module) -> list[Layer]:
    """A network's parameters from the image to the classifier: stem, blocks one by one, classifier.

    As timm numbers its own networks (`group_matcher`, by which its `param_groups_layer_decay` goes). Elsewhere a layer
    is a block of a stage, where that runs its blocks one after another, else the whole stage; a norm alone, and what
    lies between the last stage and the classifier, belongs to the layer before it.

    Raises:
        UserError: a network without stages.
    """
    numbered = _numbers(network)
    if numbered is not None:
        count = max(numbered.values()) + 1
        groups = [[name for name, number in numbered.items() if number == i] for i in range(count)]
        return _labelled(groups)
    staged = _require_stages(network, "--layer_decay")
    of_stem, head = stem_parameters(staged), f"{staged.classifier_name}."
    number: dict[int, int] = dict.fromkeys(of_stem, 0)
    last = 0
    for stage in staged.stages:
        for block in _blocks(stage):
            own = [parameter for parameter in block.parameters() if id(parameter) not in number]
            last += bool(own) and not all(parameter.dim() <= 1 for parameter in own)
            number |= {id(parameter): last for parameter in own}
    groups = [[] for _ in range(last + 2)]
    for name, parameter in network.named_parameters():
        groups[-1 if name.startswith(head) else number.get(id(parameter), last)].append(name)
    return _labelled(groups)


def layer_factors(network: SplitNet, decay: float) -> dict[str, float]:
    """The factor of every parameter's learning rate, by its name in `network`.

    It is `decay` to the number of layers above the parameter's own; the classifier's is 1.

    Raises:
        UserError: as `layers`.
    """
    return {
        f"models.{i}.{name}": factor
        for i, one in network.numbered()
        for layer, factor in _with_factors(one, decay)
        for name in layer.names
    }


def layer_rates(network: SplitNet, decay: float, rate: float) -> list[str]:
    """The learning rate of every layer under a rate of the classifier's, in a line for each structure among the S."""
    lines = [
        f"{_arch(one)}: "
        + ", ".join(f"{layer.label} {rate * factor:.3g}" for layer, factor in _with_factors(one, decay))
        for one in network.models
    ]
    return [*dict.fromkeys(lines)]


def _with_factors(network: nn.Module, decay: float) -> list[tuple[Layer, float]]:
    found = layers(network)
    return [(layer, decay ** (len(found) - 1 - depth)) for depth, layer in enumerate(found)]


def _numbers(network: nn.Module) -> Mapping[str, int] | None:
    """Layer of every parameter, as the network's library numbers them; None where it does not."""
    number = backbones.get(request_of(network).arch).layer_numbers
    return None if number is None else number(network)


def _require_stages(network: nn.Module, flag: str) -> Staged:
    staged = staged_parts(network)
    if staged is None:
        raise UserError(
            f"{flag}: {_arch(network)} has no stages that run one after another. --freeze backbone works for every "
            "network; or pick another --arch."
        )
    return staged


def _arch(network: nn.Module) -> str:
    return request_of(network).arch


def _blocks(stage: nn.Module) -> list[nn.Module]:
    """What a stage runs one after another: its blocks, those of sequences of blocks within it too."""
    if not is_sequence(stage):
        return [stage]
    children = [*stage.children()]
    if not any(True for child in children for _ in child.children()):
        return [stage]  # a sequence of single layers is itself a block
    return [block for child in children for block in _blocks(child)]


def _labelled(groups: Sequence[Sequence[str]]) -> list[Layer]:
    """The layers with these parameters, each called by what their names have in common."""
    labels = ["stem", *map(_common, groups[1:-1]), "classifier"]
    for i, names in enumerate(groups[1:-1], start=1):
        others = (name for other in groups if other is not names for name in other)
        if not labels[i] or any(name.startswith(f"{labels[i]}.") for name in others):
            labels[i] = names[0].rpartition(".")[0]  # what they have in common is not theirs alone
    return [Layer(label, tuple(names)) for label, names in zip(labels, groups, strict=True)]


def _common(names: Sequence[str]) -> str:
    """The module that holds all these parameters."""
    words = zip(*(name.split(".")[:-1] for name in names), strict=False)
    return ".".join(here[0] for here in itertools.takewhile(lambda here: len({*here}) == 1, words))

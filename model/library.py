"""Networks that other libraries define, as backbones: undivided they are the library's own, divided the solver's."""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from model.division import ANY_SPLIT, divided_rate
from model.division.rechannel import ChannelGraph, trace
from model.division.solver import TOLERANCE, solve_widths
from model.registry import LARGE, SMALL, Backbone, BackboneRequest, DivisionPlan
from model.staged import StagedBackbone
from recipe.preprocessing import Preprocessing
from utils.errors import UserError, reason
from utils.macs import count_macs, count_params

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, eq=False)
class Family:
    """What a class of a library's networks does not say in a form that serves all of them.

    Attributes:
        kind: the class.
        trunk: network -> its parts from the image to the last feature map, in order.
        stem, tail: how many of those lie before the first stage, and behind the last.
        embed: (network, last feature map) -> pooled embedding [B, D].
        classify: (network, embedding [B, D]) -> logits [B, K].
        classifier: name of the linear layer.
        initialise: gives a network whose modules have torch's initial values those of the library.
    """

    kind: type
    trunk: Callable[[Any], list[nn.Module]]
    stem: int
    tail: int = 0
    embed: Callable[[Any, Tensor], Tensor]
    classify: Callable[[Any, Tensor], Tensor]
    classifier: str
    initialise: Callable[[nn.Module], None]

    def __deepcopy__(self, memo: Any) -> Family:
        return self


class LibraryBackbone(StagedBackbone):
    """A library's network with the names that ours have for its parts.

    Its submodules and parameters are the network's own, so state-dict keys and values are the library's.

    Args:
        network: the library's; it must not be used beside this.
        family: of the network.
    """

    _network: nn.Module

    def __init__(self, network: nn.Module, family: Family) -> None:
        super().__init__()
        # beside the registered submodules, because it holds the same ones: whoever replaces one replaces it in both
        self.__dict__["_network"] = network
        self.family = family
        self._modules = network._modules
        self._parameters = network._parameters
        self._buffers = network._buffers
        self._starts = self._stage_starts()

    def _stage_starts(self) -> list[int]:
        """Where in the trunk each stage begins: behind the stem, and wherever the map gets smaller."""
        trunk = self.family.trunk(self._network)
        inside = range(self.family.stem + 1, len(trunk) - self.family.tail)
        return [self.family.stem, *(i for i in inside if any(map(_shrinks, trunk[i].modules())))]

    @property
    def stages(self) -> list[nn.Module]:
        trunk = self.family.trunk(self._network)
        bounds = [*self._starts, len(trunk) - self.family.tail]
        parts = [trunk[begin:end] for begin, end in itertools.pairwise(bounds)]
        return [part[0] if len(part) == 1 else nn.Sequential(*part) for part in parts]

    def stem(self, images_BCHW: Tensor) -> Tensor:
        for part in self.family.trunk(self._network)[: self.family.stem]:
            images_BCHW = part(images_BCHW)
        return images_BCHW

    def tail(self, features_BCHW: Tensor) -> Tensor:
        trunk = self.family.trunk(self._network)
        for part in trunk[len(trunk) - self.family.tail :]:
            features_BCHW = part(features_BCHW)
        return self.family.embed(self._network, features_BCHW)

    def classify(self, embedding_BD: Tensor) -> Tensor:
        return self.family.classify(self._network, embedding_BD)

    @property
    def classifier_name(self) -> str:
        return self.family.classifier

    def halved_depth(self) -> int:
        parts = [*self.stages[-1].children()]
        if any(isinstance(part, nn.Sequential) for part in parts):
            return len(parts)  # these are a downsampling layer and sequences of blocks, so half of them is not half
        return super().halved_depth()

    def forward(self, images_BCHW: Tensor) -> Tensor:
        logits_BK: Tensor = self._network(images_BCHW)
        return logits_BK

    def train(self, mode: bool = True) -> LibraryBackbone:
        super().train(mode)
        self._network.training = mode
        return self


def _shrinks(module: nn.Module) -> bool:
    return getattr(module, "stride", 1) in (2, (2, 2))


@dataclass(frozen=True, kw_only=True, eq=False)
class Library:
    """A package of networks.

    Attributes:
        prefix: of its names on the command line, "torchvision/".
        create: (name without prefix, K) -> the library's network.
        families: those that can be divided.
        examples: names of such ones, for error messages.
        layer_numbers, released_name: as in `model.registry.Backbone`.
    """

    prefix: str
    create: Callable[[str, int], nn.Module]
    families: Sequence[Family] = field(default_factory=tuple)
    examples: str
    layer_numbers: Callable[[nn.Module], Mapping[str, int]] | None = None
    released_name: Callable[[str], str] | None = None

    def backbone(
        self,
        name: str,
        *,
        crop_size: int | None,
        pretrained: Callable[[], Mapping[str, Tensor]],
        preprocessing: Callable[[str], Preprocessing] | None,
    ) -> Backbone:
        """The registry entry of a network that exists."""
        return Backbone(
            build=self.build,
            family=self.prefix.rstrip("/"),
            split_factors={SMALL: ANY_SPLIT, LARGE: ANY_SPLIT},
            crop_size=crop_size,
            plan=self.plan,
            pretrained=pretrained,
            layer_numbers=self.layer_numbers,
            preprocessing=preprocessing,
            released_name=self.released_name,
        )

    def _family(self, network: nn.Module) -> Family | None:
        return next((family for family in self.families if type(network) is family.kind), None)

    def _on_meta(self, arch: str, num_classes: int) -> nn.Module:
        """The undivided network without storage, whatever its library computes while it builds it."""
        with torch.device("cpu"), _WeightsOn(torch.device("meta")):
            return self.create(arch.removeprefix(self.prefix), num_classes)

    def build(self, request: BackboneRequest) -> nn.Module:
        """One network of a request, divided as `request.widths` say, with the library's initial values.

        Raises:
            UserError: the network cannot take the image size, or cannot be divided.
        """
        device = torch.get_default_device()
        if request.split_factor == 1 and request.widths is None:
            self._measure(request.arch, request.num_classes, request.crop_size, None)
            with torch.device("cpu"), _WeightsOn(device):
                network = self.create(request.arch.removeprefix(self.prefix), request.num_classes)
            family = self._family(network)
            return network if family is None else LibraryBackbone(network, family)
        widths = tuple(map(int, request.widths or self.plan(request).widths))
        network, family = self._divided(request.arch, request.num_classes, request.crop_size, widths)
        for module in network.modules():
            divide_rates(module, request.split_factor)
        if device.type != "meta":
            fill(network, family, device)
        return LibraryBackbone(network, family)

    def _divided(
        self, arch: str, num_classes: int, crop_size: int, widths: tuple[int, ...]
    ) -> tuple[nn.Module, Family]:
        graph = self.graph(arch, num_classes, crop_size)
        if len(widths) != len(graph.widths):
            raise UserError(
                f"--arch {arch} has {len(graph.widths)} stage widths, and the checkpoint or --stage_widths names "
                f"{len(widths)}: see python -m model.division {arch}."
            )
        network = self._on_meta(arch, num_classes)
        graph.resize(network, widths)
        family = self._family(network)
        assert family is not None
        return network, family

    @lru_cache(maxsize=64)  # noqa: B019  one Library per package, for the life of the process
    def graph(self, arch: str, num_classes: int, crop_size: int) -> ChannelGraph:
        """The channels of the undivided network.

        Raises:
            UserError: the network cannot be divided.
        """
        network = self._on_meta(arch, num_classes)
        if self._family(network) is None:
            raise UserError(
                f"--arch {arch} can be used as it is only (--split_factor 1): the solver divides networks like "
                f"{self.examples}."
            )
        try:
            return trace(network, (3, crop_size, crop_size), arch)
        except UserError as error:
            raise UserError(f"{error} Others that can be divided: {self.examples}.") from None

    @lru_cache(maxsize=64)  # noqa: B019
    def _measure(self, arch: str, num_classes: int, crop_size: int, widths: tuple[int, ...] | None) -> tuple[int, int]:
        """(parameters, multiply-adds) of a network that is really built and run, without storage."""
        if widths is None:
            network = self._on_meta(arch, num_classes)
        else:
            network, _ = self._divided(arch, num_classes, crop_size, widths)
        try:
            return count_params(network), count_macs(network, (3, crop_size, crop_size))
        except (RuntimeError, ValueError, AssertionError) as error:
            raise UserError(f"--arch {arch} --crop_size {crop_size}: does not run: {reason(error)[:150]}.") from None

    def plan(self, request: BackboneRequest) -> DivisionPlan:
        """What the solver makes of a request.

        Raises:
            UserError: as `graph`, or no widths of S copies come within 2 % of the undivided network.
        """
        return self._plan(
            request.arch, request.split_factor, request.num_classes, request.crop_size, request.divide_by or "params"
        )

    @lru_cache(maxsize=64)  # noqa: B019
    def _plan(self, arch: str, split_factor: int, num_classes: int, crop_size: int, divide_by: str) -> DivisionPlan:
        stages: tuple[str, ...] = ()
        full: tuple[int, ...] = ()
        widths: tuple[int, ...] = ()
        try:
            graph = self.graph(arch, num_classes, crop_size)
        except UserError:
            if split_factor > 1:
                raise  # as it is, a network need not be one that can be divided
        else:
            which = 0 if divide_by == "params" else 1
            stages, full = graph.stages, graph.widths
            widths = solve_widths(full, graph.units, lambda w: graph.count(w)[which], split_factor)
        params_full, macs_full = self._measure(arch, num_classes, crop_size, None)
        params_one, macs_one = self._measure(arch, num_classes, crop_size, widths if split_factor > 1 else None)
        plan = DivisionPlan(
            arch=arch,
            split_factor=split_factor,
            divide_by=divide_by,
            stages=stages,
            widths_full=full,
            widths=widths,
            params_full=params_full,
            params_one=params_one,
            macs_full=macs_full,
            macs_one=macs_one,
        )
        refuse_a_miss(plan)
        logger.info("%s", plan.summary())
        return plan


def refuse_a_miss(plan: DivisionPlan) -> None:
    """Raise a UserError where the copies do not cost what the undivided network costs, within 2 %."""
    difference = plan.params_difference if plan.divide_by == "params" else plan.macs_difference
    if abs(difference) > TOLERANCE:
        raise UserError(
            f"--split_factor {plan.split_factor}: no widths of {plan.arch} give {plan.split_factor} copies with the "
            f"{plan.divide_by} of the undivided network; the nearest differ by {difference:+.1%}. "
            "Take another --split_factor or --divide_by; a FACTORY may round its widths more finely."
        )


def divide_rates(module: nn.Module, split_factor: int) -> None:
    """Divide a module's dropout-like rates by sqrt(S), as the paper does with its own networks."""
    name = type(module).__name__
    for attribute in ("drop_prob", "drop_rate", *(("p",) if "Dropout" in name or name == "StochasticDepth" else ())):
        rate = getattr(module, attribute, None)
        if isinstance(rate, float | int) and not isinstance(rate, bool):
            setattr(module, attribute, divided_rate(float(rate), split_factor))


def fill(network: nn.Module, family: Family, device: torch.device) -> None:
    """Give a network without storage its initial values, drawn from the default generator."""
    network.to_empty(device=device)
    for module in network.modules():
        reset = getattr(module, "reset_parameters", None)
        if callable(reset):
            reset()
    with torch.no_grad():
        family.initialise(network)


class _WeightsOn(TorchFunctionMode):
    """Puts what layers allocate on a device, and leaves alone what their constructors compute with tensors."""

    ALLOCATE = (torch.empty, torch.zeros, torch.ones, torch.full)

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func in self.ALLOCATE and kwargs.get("device") is None:
            kwargs["device"] = self.device
        return func(*args, **kwargs)


# ---- initial values --------------------------------------------------------------------------------------------------


def layers_of(network: nn.Module) -> Iterable[nn.Conv2d | nn.Linear]:
    """Convolutions and linear layers, in order."""
    return (module for module in network.modules() if isinstance(module, nn.Conv2d | nn.Linear))


def zero_bias(module: nn.Module) -> None:
    """Set a layer's bias to 0 where it has one."""
    if isinstance(module.bias, Tensor):
        nn.init.zeros_(module.bias)


def normal_by_outputs(module: nn.Conv2d) -> None:
    """Normal weights with variance 2 / (k k outputs), groups not counted."""
    size = math.prod(module.kernel_size) * module.out_channels
    nn.init.normal_(module.weight, 0.0, math.sqrt(2.0 / size))

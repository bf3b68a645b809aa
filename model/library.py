"""Networks that other libraries define, as backbones: undivided they are the library's own, divided the solver's."""

from __future__ import annotations

import inspect
import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from itertools import chain, pairwise
from typing import Any

import torch
from torch import Tensor, nn

from model.division import ANY_SPLIT, divided_rate
from model.division.arguments import DROP_PATHS, Arguments, divide, last_name, leaf_kind
from model.division.fitting import fitted_arguments, image_arguments, sizes_around
from model.division.plan import checked_arguments
from model.division.rechannel import ChannelGraph
from model.division.recording import BUILD_ERRORS, NotRecorded, Recording, build_on_meta
from model.division.resizing import channels_of, check_widths
from model.division.solver import TOLERANCE, solve_widths
from model.mixing import mixes_tokens
from model.options import LibraryOptions
from model.registry import (
    ARGUMENTS,
    CHANNELS,
    LARGE,
    SMALL,
    Backbone,
    BackboneRequest,
    DivisionPlan,
    family_options,
    planned,
)
from model.serial import Layout, SerialParts, serial_layout
from model.staged import Staged, classifier_name, half_of_blocks
from recipe.preprocessing import Preprocessing
from recipe.transformers import TokenMixer
from utils.errors import UserError, reason
from utils.macs import count_macs, count_params

logger = logging.getLogger(__name__)

RESET = "reset_parameters"  # how layers of torch call what gives them initial values


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


class LibraryParts(Staged):
    """The parts of a library's network; no module, and nothing of it is an attribute of the network.

    Args:
        network: the library's.
        family: of the network.
        request: what it was built from.
    """

    def __init__(self, network: nn.Module, family: Family, request: BackboneRequest) -> None:
        self._network = network
        self.family = family
        self.request = request
        self._starts = self._stage_starts()

    def _stage_starts(self) -> list[int]:
        """Where in the trunk each stage begins: behind the stem, and wherever the map gets smaller."""
        trunk = self.family.trunk(self._network)
        inside = range(self.family.stem + 1, len(trunk) - self.family.tail)
        return [self.family.stem, *(i for i in inside if any(map(_shrinks, trunk[i].modules())))]

    @property
    def network(self) -> nn.Module:
        return self._network

    @property
    def stages(self) -> list[nn.Module]:
        trunk = self.family.trunk(self._network)
        bounds = [*self._starts, len(trunk) - self.family.tail]
        parts = [trunk[begin:end] for begin, end in pairwise(bounds)]
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
        return half_of_blocks(self.stages[-1])


def _shrinks(module: nn.Module) -> bool:
    return getattr(module, "stride", 1) in (2, (2, 2))


@dataclass(frozen=True, kw_only=True, eq=False)
class Library:
    """A package of networks.

    Attributes:
        prefix: of its names on the command line, "torchvision/".
        create: (name without prefix, K) -> the library's network.
        families: classes whose stages and initial values are known here; they go by channels.
        layouts: where the parts of more classes are, as functions of a network; timm's are found (`model.serial`).
        by_channels: names of more classes whose authors wrote widths into the code, so that they go by channels too.
        version: of the package.
        examples: names of networks that can be divided, for error messages.
        layer_numbers, released_name: as in `model.registry.Backbone`.
    """

    prefix: str
    create: Callable[[str, int], nn.Module]
    families: Sequence[Family] = field(default_factory=tuple)
    layouts: Mapping[type, Callable[[Any], Layout]] = field(default_factory=dict)
    by_channels: frozenset[str] = frozenset()
    version: str = ""
    examples: str
    layer_numbers: Callable[[nn.Module], Mapping[str, int] | None] | None = None
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
            options=LibraryOptions,
            crop_size=crop_size,
            plan=self.plan,
            fit=self.fit,
            pretrained=pretrained,
            layer_numbers=self.layer_numbers,
            preprocessing=preprocessing,
            released_name=self.released_name,
            parts=self.parts,
            token_mixer=self.token_mixer,
            takes_size=self.takes_size,
        )

    def parts(self, network: nn.Module, request: BackboneRequest) -> Staged | None:
        """The parts of a network of this library; None where none are known that run one after another."""
        family = self._family(network)
        if family is not None:
            return LibraryParts(network, family, request)
        layout = self._layout(request.arch, request.num_classes, request.crop_size, request.fits_images)
        return None if layout is None else SerialParts(network, layout, request)

    @lru_cache(maxsize=64)  # noqa: B019
    def _layout(self, arch: str, num_classes: int, crop_size: int, fits_images: bool) -> Layout | None:
        """Where the parts of a network are, undivided or not."""
        fitted = self._fitted(arch, num_classes, crop_size) if fits_images else {}
        try:
            network = self._built(arch, num_classes, crop_size, fitted, torch.device("meta")).eval()
            known = self.layouts.get(type(network))
            if known is not None:
                return known(network)
            with torch.no_grad():
                return serial_layout(network, torch.empty(1, 3, crop_size, crop_size, device="meta"))
        except BUILD_ERRORS:
            return None

    def token_mixer(self, request: BackboneRequest) -> TokenMixer | None:
        """What the recipe of transformers wants to know of a network; None where it is not for this one."""
        network = self._on_meta(request.arch, request.num_classes)
        if self._family(network) is not None or not mixes_tokens(network):
            return None
        recording = self._recording(request.arch, request.num_classes)
        rates = [] if recording is None else [recording.leaves[name] for name in _drop_path_names(recording)]
        return TokenMixer(
            windows="swin" in type(network).__name__.lower(),
            params=count_params(network),
            drop_path=float(rates[0]) if rates else None,
        )

    def takes_size(self, arch: str) -> bool:
        """Whether the side of images is among the constructor's arguments."""
        recording = self._recording(arch, 1000)
        return recording is not None and any(leaf_kind(name) == "image" for name in recording.leaves)

    def _family(self, network: nn.Module) -> Family | None:
        return next((family for family in self.families if type(network) is family.kind), None)

    def _create(self, arch: str, num_classes: int) -> nn.Module:
        return self.create(arch.removeprefix(self.prefix), num_classes)

    def _on_meta(self, arch: str, num_classes: int) -> nn.Module:
        """The undivided network without storage, as the library makes it.

        Raises:
            UserError: its library does not make it.
        """
        try:
            return build_on_meta(partial(self._create, arch, num_classes))
        except BUILD_ERRORS as error:
            raise self._unbuilt(arch, error) from None

    def _unbuilt(self, arch: str, error: Exception) -> UserError:
        return UserError(f"--arch {arch} cannot be built: {reason(error)[:150]}. Others: {self.examples}.")

    # ---- one network -------------------------------------------------------------------------------------------------

    def fit(self, request: BackboneRequest) -> BackboneRequest:
        """An undivided network's request with what its class takes otherwise for small images."""
        fitted = self._fitted(request.arch, request.num_classes, request.crop_size) if request.fits_images else {}
        if not fitted:
            return request
        _say_fitted(request.arch, request.crop_size, tuple(fitted.items()))
        return replace(
            request, way=ARGUMENTS, width_names=tuple(fitted), widths=tuple(fitted.values()), library=self.version
        )

    def build(self, request: BackboneRequest) -> nn.Module:
        """One network of a request, divided as its plan says, with the library's initial values.

        Raises:
            UserError: the network cannot take the image size, cannot be divided, or the plan is not one of its class.
        """
        device = torch.get_default_device()
        if request.split_factor > 1 and request.widths is None:
            request = planned(request, self.plan(request))
        if request.widths is not None and request.way in ("", CHANNELS):
            return self._build_by_channels(request, device)
        changes = self._arguments_of(request)
        self._measured(request.arch, request.num_classes, request.crop_size, tuple(changes.items()))
        drop_path = self._drop_path(request)
        with torch.device("cpu") if device.type != "meta" else nullcontext():
            network = self._built(
                request.arch, request.num_classes, request.crop_size, {**changes, **drop_path}, device
            )
        if request.split_factor > 1:
            rates = self._rates(request.arch, request.num_classes, request.crop_size, tuple(drop_path.items()))
            divide_rates(network, request.split_factor, rates)
        return network

    def _drop_path(self, request: BackboneRequest) -> dict[str, float]:
        """--drop_path as constructor arguments.

        Raises:
            UserError: the network has none for it.
        """
        rate = family_options(LibraryOptions, request).drop_path
        if rate is None:
            return {}
        recording = self._recording(request.arch, request.num_classes)
        names = [] if recording is None else _drop_path_names(recording)
        if not names:
            raise UserError(
                f"--drop_path {rate:g}: --arch {request.arch} has no argument for stochastic depth. Leave the flag "
                "away."
            )
        return dict.fromkeys(names, rate)

    def _build_by_channels(self, request: BackboneRequest, device: torch.device) -> nn.Module:
        assert request.widths is not None
        if family_options(LibraryOptions, request).drop_path is not None:
            raise UserError(
                f"--drop_path: --arch {request.arch} is divided by its channels and keeps the library's own rates. "
                "Leave the flag away."
            )
        widths = tuple(map(int, request.widths))
        network, family = self._divided(request.arch, request.num_classes, request.crop_size, widths)
        divide_rates(network, request.split_factor, rates_of(network))
        if device.type != "meta":
            create = partial(self._built, request.arch, request.num_classes, request.crop_size, {}, torch.device("cpu"))
            fill(network, family, device, create)
        return network

    def _built(
        self, arch: str, num_classes: int, crop_size: int, changes: Mapping[str, int | float], device: torch.device
    ) -> nn.Module:
        """A network with other numbers among its arguments, at a size of images."""
        create = partial(self._create, arch, num_classes)
        recording = self._recording(arch, num_classes)
        changes = {**({} if recording is None else image_arguments(recording.leaves, crop_size)), **changes}
        if device.type == "meta":
            return self._on_meta(arch, num_classes) if recording is None or not changes else recording.build(changes)
        network = create() if recording is None or not changes else recording.build(changes, meta=False)
        return network.to(device)

    def _arguments_of(self, request: BackboneRequest) -> dict[str, int | float]:
        """The numbers of a stored plan, by the names of leaves.

        Raises:
            UserError: a name that is no leaf, or a value that cannot be one of it.
        """
        if not request.width_names:
            return {}
        recording = self._recording(request.arch, request.num_classes)
        known = {} if recording is None else recording.leaves
        return checked_arguments(request, known, self.version)

    @lru_cache(maxsize=64)  # noqa: B019  one Library per package, for the life of the process
    def _recording(self, arch: str, num_classes: int) -> Recording | None:
        """The arguments of a network, None where they cannot be seen.

        Raises:
            UserError: its library does not make it.
        """
        try:
            return Recording(partial(self._create, arch, num_classes))
        except NotRecorded:
            return None
        except BUILD_ERRORS as error:
            raise self._unbuilt(arch, error) from None

    @lru_cache(maxsize=64)  # noqa: B019
    def _fitted(self, arch: str, num_classes: int, crop_size: int) -> dict[str, int | float]:
        recording = self._recording(arch, num_classes)
        if recording is None or any(recording.kind is family.kind for family in self.families):
            return {}
        return fitted_arguments(recording.leaves, crop_size)

    @lru_cache(maxsize=64)  # noqa: B019
    def _rates(
        self, arch: str, num_classes: int, crop_size: int, changes: tuple[tuple[str, float], ...] = ()
    ) -> Mapping[tuple[str, str], float]:
        """Dropout-like rates of the undivided network, with other numbers among its arguments."""
        return rates_of(self._built(arch, num_classes, crop_size, dict(changes), torch.device("meta")))

    @lru_cache(maxsize=64)  # noqa: B019
    def _measured(
        self, arch: str, num_classes: int, crop_size: int, changes: tuple[tuple[str, int | float], ...]
    ) -> tuple[int, int]:
        """(parameters, multiply-adds) of a network that is really built and run, without storage.

        Raises:
            UserError: it does not build, or gives no logits, with images of this size.
        """
        try:
            network = self._built(arch, num_classes, crop_size, dict(changes), torch.device("meta"))
            sizes = measure(network, crop_size, num_classes)
        except BUILD_ERRORS as error:
            raise UserError(self._complaint(arch, num_classes, crop_size, dict(changes), error)) from None
        return sizes

    def _complaint(
        self, arch: str, num_classes: int, crop_size: int, changes: Mapping[str, int | float], error: Exception
    ) -> str:
        """What is wrong with an image size, and the next ones that are right."""
        complaint = f"--arch {arch} --crop_size {crop_size}: does not run: {reason(error)[:150]}"
        recording = self._recording(arch, num_classes)
        found = []
        for sizes in () if recording is None else sizes_around(recording.leaves, crop_size):
            for size in sizes:
                try:
                    measure(self._built(arch, num_classes, size, changes, torch.device("meta")), size, num_classes)
                except BUILD_ERRORS:
                    continue
                found.append(str(size))
                break
        return f"{complaint.rstrip('.')}. Sizes that it takes: {', '.join(found)}." if found else f"{complaint}."

    # ---- channels ----------------------------------------------------------------------------------------------------

    def _divided(
        self, arch: str, num_classes: int, crop_size: int, widths: tuple[int, ...]
    ) -> tuple[nn.Module, Family | None]:
        graph = self.graph(arch, num_classes, crop_size)
        check_widths(arch, graph, widths)
        network = self._on_meta(arch, num_classes)
        graph.resize(network, widths)
        return network, self._family(network)

    @lru_cache(maxsize=64)  # noqa: B019
    def graph(self, arch: str, num_classes: int, crop_size: int) -> ChannelGraph:
        """The channels of the undivided network.

        Raises:
            UserError: the network cannot be divided.
        """
        return channels_of(self._on_meta(arch, num_classes), crop_size, arch)

    @lru_cache(maxsize=64)  # noqa: B019
    def _measured_channels(
        self, arch: str, num_classes: int, crop_size: int, widths: tuple[int, ...]
    ) -> tuple[int, int]:
        """As `_measured`, of a network whose channels were followed."""
        network, _ = self._divided(arch, num_classes, crop_size, widths)
        try:
            return measure(network, crop_size, num_classes)
        except BUILD_ERRORS as error:
            raise UserError(f"--arch {arch} cannot be divided by its channels: {reason(error)[:150]}.") from None

    # ---- plans -------------------------------------------------------------------------------------------------------

    def plan(self, request: BackboneRequest) -> DivisionPlan:
        """What the solver makes of a request.

        Raises:
            UserError: no way of dividing the network comes within 2 % of the undivided one, or reaches all of it.
        """
        fitted = self._fitted(request.arch, request.num_classes, request.crop_size) if request.fits_images else {}
        return self._plan(
            request.arch,
            request.split_factor,
            request.num_classes,
            request.crop_size,
            request.divide_by or "params",
            tuple(fitted.items()),
        )

    @lru_cache(maxsize=64)  # noqa: B019
    def _plan(
        self,
        arch: str,
        split_factor: int,
        num_classes: int,
        crop_size: int,
        divide_by: str,
        fitted: tuple[tuple[str, int | float], ...],
    ) -> DivisionPlan:
        full = self._measured(arch, num_classes, crop_size, fitted)
        common = {
            "arch": arch,
            "split_factor": split_factor,
            "divide_by": divide_by,
            "library": self.version,
            "params_full": full[0],
            "macs_full": full[1],
        }
        if split_factor == 1:
            return self._undivided_plan(arch, num_classes, crop_size, common)
        kind = self._kind(arch, num_classes)
        ways = {CHANNELS: self._plan_by_channels, ARGUMENTS: self._plan_by_arguments}
        first = CHANNELS if self._goes_by_channels(kind) else ARGUMENTS
        troubles = []
        for way in sorted(ways, key=lambda way: way != first):
            try:
                plan = ways[way](arch, num_classes, crop_size, dict(fitted), common)
            except UserError as error:
                troubles.append(str(error))
                continue
            _say_fitted(arch, crop_size, fitted)
            logger.info("%s", plan.summary())
            return plan
        raise UserError(f"{troubles[0].rstrip('.')}. Others that can be divided: {self.examples}.")

    @lru_cache(maxsize=64)  # noqa: B019
    def _kind(self, arch: str, num_classes: int) -> type:
        return type(self._on_meta(arch, num_classes))

    def _goes_by_channels(self, kind: type) -> bool:
        return kind.__name__ in self.by_channels or any(kind is family.kind for family in self.families)

    def _undivided_plan(self, arch: str, num_classes: int, crop_size: int, common: Mapping[str, Any]) -> DivisionPlan:
        stages: tuple[str, ...] = ()
        widths: tuple[int, ...] = ()
        if any(self._kind(arch, num_classes) is family.kind for family in self.families):
            try:
                graph = self.graph(arch, num_classes, crop_size)
            except UserError:
                pass  # as it is, a network need not be one that can be divided
            else:
                stages, widths = graph.stages, graph.widths
        return DivisionPlan(
            **common,
            stages=stages,
            widths_full=widths,
            widths=widths,
            params_one=common["params_full"],
            macs_one=common["macs_full"],
        )

    def _plan_by_channels(
        self,
        arch: str,
        num_classes: int,
        crop_size: int,
        fitted: Mapping[str, int | float],
        common: Mapping[str, Any],
    ) -> DivisionPlan:
        if fitted:
            raise UserError(f"--arch {arch} --crop_size {crop_size}: fitted to the size, it has no channels to follow.")
        graph = self.graph(arch, num_classes, crop_size)
        which = 0 if common["divide_by"] == "params" else 1
        split_factor = common["split_factor"]
        widths = solve_widths(graph.widths, graph.units, lambda w: graph.count(w)[which], split_factor)
        params_one, macs_one = self._measured_channels(arch, num_classes, crop_size, widths)
        plan = DivisionPlan(
            **common,
            way=CHANNELS,
            stages=graph.stages,
            widths_full=graph.widths,
            widths=widths,
            params_one=params_one,
            macs_one=macs_one,
        )
        refuse_a_miss(plan)
        return plan

    def _plan_by_arguments(
        self,
        arch: str,
        num_classes: int,
        crop_size: int,
        fitted: Mapping[str, int | float],
        common: Mapping[str, Any],
    ) -> DivisionPlan:
        recording = self._recording(arch, num_classes)
        if recording is None:
            raise UserError(f"--arch {arch} cannot be divided: its constructor's arguments cannot be seen.")
        by_params = common["divide_by"] == "params"

        def cost(network: nn.Module) -> int:
            return count_params(network) if by_params else count_macs(network, (3, crop_size, crop_size))

        def runs(network: nn.Module) -> bool:
            try:
                measure(network, crop_size, num_classes)
            except BUILD_ERRORS:
                return False
            return True

        fixed = {**image_arguments(recording.leaves, crop_size), **fitted}
        arguments = Arguments(recording, fixed, cost, runs, common["split_factor"])
        found = divide(arguments, classifier_name(recording.build(fixed)))
        if found is None:
            known = bool(arguments.widths or arguments.factors)
            why = "takes no others for those that are widths" if known else "has no argument that is a width"
            raise UserError(f"--arch {arch} cannot be divided: {recording.kind.__name__} {why}.")
        if found.trouble:
            raise UserError(
                f"--arch {arch} cannot be divided by --split_factor {common['split_factor']}: the nearest plan "
                f"{found.trouble}."
            )
        changes = {**fitted, **found.changes}
        params_one, macs_one = self._measured(arch, num_classes, crop_size, tuple(changes.items()))
        return DivisionPlan(
            **common,
            way=ARGUMENTS,
            stages=tuple(changes),
            widths_full=tuple(recording.leaves[name] for name in changes),
            widths=tuple(changes.values()),
            params_one=params_one,
            macs_one=macs_one,
        )


def _drop_path_names(recording: Recording) -> list[str]:
    """The leaves that hold the rate of stochastic depth."""
    return [name for name in recording.leaves if last_name(name) in DROP_PATHS]


def measure(network: nn.Module, crop_size: int, num_classes: int) -> tuple[int, int]:
    """(parameters, multiply-adds) of a network without storage.

    Raises:
        ValueError: two images give no logits [2, K].
    """
    sizes = count_params(network), count_macs(network, (3, crop_size, crop_size))
    training = network.training
    with torch.no_grad():
        logits_BK = network.eval()(torch.empty(2, 3, crop_size, crop_size, device="meta"))
    network.train(training)
    shape = list(getattr(logits_BK, "shape", ()))
    if shape != [2, num_classes]:
        raise ValueError(f"two images give {shape or 'no tensor'}, expected logits [2, {num_classes}]")
    return sizes


def refuse_a_miss(plan: DivisionPlan) -> None:
    """Raise a UserError where the copies do not cost what the undivided network costs, within 2 %."""
    difference = plan.params_difference if plan.divide_by == "params" else plan.macs_difference
    if abs(difference) > TOLERANCE:
        raise UserError(
            f"--split_factor {plan.split_factor}: no widths of {plan.arch} give {plan.split_factor} copies with the "
            f"{plan.divide_by} of the undivided network; the nearest differ by {difference:+.1%}. "
            "Take another --split_factor or --divide_by; a FACTORY may round its widths more finely."
        )


def rates_of(network: nn.Module) -> dict[tuple[str, str], float]:
    """Dropout-like rates by the names of the layer and of its attribute."""
    found = {}
    for name, module in network.named_modules():
        kind = type(module).__name__
        attributes = ["drop_prob", "drop_rate"]
        if "Dropout" in kind or kind == "StochasticDepth":
            attributes.append("p")
        if isinstance(module, nn.MultiheadAttention):
            attributes.append("dropout")
        for attribute in attributes:
            rate = getattr(module, attribute, None)
            if isinstance(rate, float | int) and not isinstance(rate, bool):
                found[name, attribute] = float(rate)
    return found


def divide_rates(network: nn.Module, split_factor: int, rates: Mapping[tuple[str, str], float]) -> None:
    """Give a copy the undivided network's dropout-like rates over sqrt(S), as the paper does with its own networks."""
    for name, attribute in rates_of(network):
        if (name, attribute) in rates:
            rate = divided_rate(rates[name, attribute], split_factor)
            setattr(network.get_submodule(name), attribute, rate)


def fill(
    network: nn.Module,
    family: Family | None,
    device: torch.device,
    undivided: Callable[[], nn.Module] | None = None,
) -> None:
    """Give a network without storage its initial values, drawn from the default generator.

    Args:
        network: on the meta device.
        family: its initial values; None: what its class says by `init_weights`, else torch's of each layer.
        device: where it goes.
        undivided: makes the undivided network, of which it takes what no layer resets where the class is not known.
    """
    network.to_empty(device=device)
    reset_parameters(network)
    with torch.no_grad():
        if family is None and undivided is not None:
            _fill_loose(network, undivided)
        if family is not None:
            family.initialise(network)
        else:
            _initialise_as_the_class_says(network)


def _fill_loose(network: nn.Module, undivided: Callable[[], nn.Module]) -> None:
    """Give the tensors of modules without `reset_parameters` the values that the undivided network has there.

    Where the size is another, a constant stays that, and other values are drawn with their mean and deviation.
    """
    owners = [(name, part) for name, part in network.named_modules() if not callable(getattr(part, RESET, None))]
    loose = {
        f"{name}.{own}".lstrip("."): tensor
        for name, part in owners
        for own, tensor in chain(part.named_parameters(recurse=False), part.named_buffers(recurse=False))
    }
    if not loose:
        return
    with torch.random.fork_rng(devices=[]):
        whole = undivided()
    theirs = dict(chain(whole.named_parameters(), whole.named_buffers()))
    for name, tensor in loose.items():
        value = theirs[name].detach()
        if value.shape == tensor.shape:
            tensor.copy_(value)
        elif bool((value == value.flatten()[0]).all()):
            tensor.fill_(float(value.flatten()[0]))
        else:
            nn.init.normal_(tensor, float(value.mean()), float(value.std()))


def reset_parameters(network: nn.Module) -> None:
    """Give every module that can do so the initial values that torch gives it."""
    for module in network.modules():
        reset = getattr(module, RESET, None)
        if callable(reset):
            reset()


def _initialise_as_the_class_says(network: nn.Module) -> None:
    for name in ("init_weights", "_init_weights"):
        method = getattr(network, name, None)
        if not callable(method):
            continue
        needed = [p for p in inspect.signature(method).parameters.values() if p.default is p.empty]
        if not needed:
            method()
        elif len(needed) == 1:
            network.apply(method)
        return


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


@lru_cache(maxsize=64)
def _say_fitted(arch: str, crop_size: int, fitted: tuple[tuple[str, int | float], ...]) -> None:
    """Log which patches and windows are not the library's own; once, because a start from slices asks twice."""
    if fitted:
        shown = ", ".join(f"{name} {value:g}" for name, value in fitted)
        logger.info("%s at %d pixels: %s.", arch, crop_size, shown)

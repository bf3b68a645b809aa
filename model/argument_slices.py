"""Slices of a parent for networks that are divided by their constructor arguments. Ours.

What a dimension of a tensor is made of is seen by building the parent again, without storage, with one kind of number
changed. So three kinds of dimension are told from one another:

* Widths. One of d = H * D channels is cut by whole heads, in all tensors alike; of each head the first D' channels are
  taken. One of n * d (fused queries, keys and values, the stages of a pyramid that doubles) is n such blocks.
* Head counts (tables of positions, scales of attention): those of the heads that are kept.
* Interiors of MLPs: a permutation of their own.

Whether all of this fits together is tried on values before anything is cut: a part, and the parent without the channels
that this part dropped, give the same logits. What does not is refused.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from model.division.arguments import MLP_WIDTHS, container, last_name, leaf_kind
from model.kept_channels import Indices, kept_channels, shared_part
from model.registry import ARGUMENTS, BackboneRequest, DivisionPlan, build_network, solved_request
from model.staged import classifier_names
from utils.errors import UserError

Changes = dict[str, int | float]
Shapes = Mapping[str, tuple[int, ...]]
Place = tuple[str, int]  # a tensor and one of its dimensions
TOLERANCE = 1e-3  # of the largest logit; a channel at a wrong place changes logits by their own size


@dataclass(frozen=True)
class Width:
    """Channels that are cut alike.

    Attributes:
        heads, heads_after: of the parent and of a part; without attention, channels are heads of size 1.
        size, size_after: channels of a head.
    """

    heads: int
    heads_after: int
    size: int = 1
    size_after: int = 1

    @property
    def channels(self) -> int:
        """Of the parent."""
        return self.heads * self.size

    @property
    def channels_after(self) -> int:
        """Of a part."""
        return self.heads_after * self.size_after

    def kept(self, seed: int, network: int, blocks: int = 1) -> Indices:
        """What a network keeps of a dimension of so many blocks of these channels."""
        heads = kept_channels(seed, network, self.heads, self.heads_after)
        one = (heads[:, None] * self.size + np.arange(self.size_after)).ravel()
        return (np.arange(blocks)[:, None] * self.channels + one).ravel()


@dataclass(frozen=True)
class Dimension:
    """One that gets smaller: so many blocks of a width."""

    width: Width
    blocks: int = 1


@dataclass(frozen=True)
class Stage:
    """Arguments that move together: a width and, where it is of attention, its head counts.

    Attributes:
        widths: names of the arguments that are the width.
        heads: of those that count its heads; several where the class doubles the width from stage to stage.
    """

    widths: tuple[str, ...]
    heads: tuple[str, ...]

    def width(self, before: Mapping[str, float], after: Mapping[str, float]) -> Width:
        """The width with the heads of its first stage; by single channels where heads and width do not go together."""
        full, divided = int(before[self.widths[0]]), int(after[self.widths[0]])
        if not self.heads:
            return Width(full, divided)
        heads, heads_after = int(before[self.heads[0]]), int(after[self.heads[0]])
        if full % heads or divided % heads_after:
            return Width(full, divided)
        return Width(heads, heads_after, full // heads, divided // heads_after)


class ArgumentCutter:
    """What each dimension of each tensor keeps.

    Args:
        request: of a part, with its plan.
        plan: the same plan with the undivided network's numbers.
        networks: S.
        seed: of the run.
        source: how errors call the parent.

    Raises:
        UserError: a part has more somewhere than the parent, or parent and part do not fit together.
    """

    def __init__(self, request: BackboneRequest, plan: DivisionPlan, networks: int, seed: int, source: str) -> None:
        self._request, self._networks, self._seed, self._source = request, networks, seed, source
        whole = solved_request(replace(request, split_factor=1, widths=None, way="", width_names=()))
        self._base: Changes = dict(zip(whole.width_names, whole.widths or (), strict=True))  # fitted to small images
        self._before: Changes = {**dict(zip(plan.stages, plan.widths_full, strict=True)), **self._base}
        self._after: Changes = dict(zip(request.width_names, request.widths or (), strict=True))
        for name in self._after.keys() - self._before.keys():
            self._refuse(f"the argument {name}", "is not one of today's plan")
        self._mlps = [name for name in self._after if leaf_kind(name) == "ratio" or last_name(name) in MLP_WIDTHS]
        self._stages = self._find_stages()
        self._shapes = _shapes_of(self._built({}))
        self._interiors = self._moved({name: 2 * self._before[name] for name in self._mlps})
        self._owners: dict[Place, list[Stage]] = {}
        for stage in self._stages:
            for place in self._moved({name: self._after[name] for name in (*stage.widths, *stage.heads)}):
                self._owners.setdefault(place, []).append(stage)
        self._try()
        self._dimensions = self._find(self._after)

    # ---- what the dimensions are -------------------------------------------------------------------------------------

    def _find_stages(self) -> list[Stage]:
        heads = [name for name in self._after if leaf_kind(name) == "heads"]
        groups: dict[tuple[float, float], list[str]] = {}
        for name, value in self._after.items():
            if name not in heads and name not in self._mlps and value != self._before[name]:
                groups.setdefault((self._before[name], value), []).append(name)
        return [
            Stage(tuple(names), tuple(head for head in heads if any(_belong(head, name) for name in names)))
            for names in groups.values()
        ]

    def _built(self, changes: Changes, *, meta: bool = True) -> nn.Module:
        """The undivided network with other numbers."""
        changed = {**self._base, **changes}
        request = replace(
            self._request,
            split_factor=1,
            way=ARGUMENTS if changed else "",
            width_names=tuple(changed),
            widths=tuple(changed.values()) if changed else None,
        )
        with torch.device("meta" if meta else "cpu"):
            return build_network(request)

    def _moved(self, changes: Changes) -> set[Place]:
        """The dimensions that such changes move; none where the class does not take them alone."""
        try:
            shapes = _shapes_of(self._built(changes))
        except UserError:
            return set()
        return {
            (name, i)
            for name, shape in self._shapes.items()
            if len(shapes.get(name, ())) == len(shape)
            for i, size in enumerate(shape)
            if shapes[name][i] != size
        }

    def _find(self, changes: Changes) -> dict[Place, Dimension]:
        """What every dimension that such changes make smaller is made of."""
        after = {**self._before, **changes}
        shapes = _shapes_of(self._built(changes))
        smaller: dict[Place, tuple[int, int]] = {}
        for name, shape in self._shapes.items():
            if len(shapes.get(name, ())) != len(shape):
                self._refuse(name, "is not in the divided network" if name not in shapes else "has another form there")
            for i, (full, divided) in enumerate(zip(shape, shapes[name], strict=True)):
                if divided > full:
                    self._refuse(name, f"has {divided} channels in the divided network, {full} in the parent")
                if divided < full:
                    smaller[name, i] = full, divided
        inputs: dict[str, set[tuple[int, int]]] = {}  # of the interiors, by the module that they lie in
        for name, i in self._interiors & smaller.keys():
            if i == 1:
                inputs.setdefault(_module_of(name), set()).add(smaller[name, i])
        found = {}
        for place, sizes in smaller.items():
            if place in self._interiors:
                known = [Width(*pair) for pair in inputs.get(_module_of(place[0]), ())]
                found[place] = _in_blocks(sizes, known) or Dimension(Width(*sizes))
            else:
                found[place] = self._of_stage(sizes, self._owners.get(place) or self._stages, after)
        return found

    def _of_stage(self, sizes: tuple[int, int], stages: list[Stage], after: Mapping[str, float]) -> Dimension:
        """A dimension that one of these stages moves; channels of its own where it is no multiple of any."""
        widths = [stage.width(self._before, after) for stage in stages]
        found = _in_blocks(sizes, widths)
        if found is not None:
            return found
        for stage, width in zip(stages, widths, strict=True):
            count, remainder = divmod(sizes[0], width.heads)
            if stage.heads and not remainder and sizes[1] == count * width.heads_after:
                if len(stage.heads) > 1:  # stages of 1, 2, 4, … times the first one's heads
                    return Dimension(Width(width.heads, width.heads_after), count)
                return Dimension(Width(width.heads, width.heads_after, count, count))
        return Dimension(Width(*sizes))

    # ---- whether they fit together -----------------------------------------------------------------------------------

    def _try(self) -> None:
        """Compare a part with the parent without the channels that the part dropped, both with values of no meaning.

        Narrower heads would scale attention otherwise, so here heads have their full size.
        """
        changes = dict(self._after)
        for stage in self._stages:
            width = stage.width(self._before, self._after)
            if width.size_after < width.size:  # and MLPs as wide as they were, in proportion
                changes |= dict.fromkeys(stage.widths, width.heads_after * width.size)
                changes |= {name: self._before[name] for name in self._mlps}
        self._dimensions = self._find(changes)
        with torch.random.fork_rng(devices=[]):
            parent, part = self._built({}, meta=False).eval(), self._built(changes, meta=False).eval()
        generator = torch.Generator().manual_seed(0)
        own, statistics = dict(parent.named_parameters()), ("running_mean", "running_var")
        state = {
            name: _drawn(name, value, generator) if name in own or name.endswith(statistics) else value
            for name, value in parent.state_dict().items()
        }
        heads = {f"{head}.weight" for head in classifier_names(parent)}
        shapes = _shapes_of(part)
        try:
            part.load_state_dict(
                {n: self.cut(n, value, shapes[n], 0, is_head=n in heads) for n, value in state.items()}
            )
            parent.load_state_dict({name: self._emptied(name, value, name in heads) for name, value in state.items()})
            side = self._request.crop_size
            images = torch.randn(1, 3, side, side, generator=generator)
            with torch.no_grad(), _NoNorms():
                expected, found = parent(images), part(images)
        except (RuntimeError, ValueError) as error:
            self._refuse("the divided network", f"does not take them ({str(error).splitlines()[0][:80]})")
        if not float((found - expected).abs().max()) <= TOLERANCE * float(expected.abs().max()):
            self._refuse("the divided network", "does not give the parent's answers with the channels that it kept")

    def _emptied(self, name: str, value: Tensor, is_head: bool) -> Tensor:
        """A tensor of the parent with nothing at what the first network drops."""
        kept = [self._kept(name, i, size, 0) for i, size in enumerate(value.shape)]
        factor = value.shape[1] / len(kept[1]) if is_head else 1.0
        if all(len(one) == size for one, size in zip(kept, value.shape, strict=True)):
            return value * factor if is_head else value
        emptied = torch.full_like(value, float(name.endswith("running_var")))
        places = np.ix_(*kept)
        emptied[places] = value[places] * factor
        return emptied

    # ---- cutting -----------------------------------------------------------------------------------------------------

    def cut(self, name: str, value: Tensor, shape: tuple[int, ...], network: int, *, is_head: bool) -> Tensor:
        """One tensor of the parent -> that of network number `network`, of shape `shape`."""
        before = value.shape
        for i, size in enumerate(before):
            if (name, i) in self._dimensions:
                kept = torch.from_numpy(self._kept(name, i, size, network))
                value = value.index_select(i, kept.to(value.device))
        if tuple(value.shape) != shape:
            self._refuse(name, f"gives {tuple(value.shape)}, the divided network's tensor is {shape}")
        return value * (before[1] / shape[1]) if is_head else value.clone()

    def _kept(self, name: str, i: int, size: int, network: int) -> Indices:
        found = self._dimensions.get((name, i))
        return np.arange(size) if found is None else found.width.kept(self._seed, network, found.blocks)

    def shared(self, networks: int) -> float:
        """Part of a divided width's channels that two networks have in common, weighted by channels."""
        widths = {dimension.width for dimension in self._dimensions.values()}
        if networks < 2 or not widths:
            return 1.0
        parts = [shared_part([width.kept(self._seed, i) for i in range(networks)]) for width in widths]
        channels = [width.channels for width in widths]
        return sum(part * count for part, count in zip(parts, channels, strict=True)) / sum(channels)

    def _refuse(self, name: str, what: str) -> NoReturn:
        raise UserError(f"{self._source}: --arch {self._request.arch} cannot take slices of a parent: {name} {what}.")


def _belong(head: str, width: str) -> bool:
    """Whether a head count is of a width: of the same place, or of all places where one of them has none."""
    if container(head) != container(width):
        return False
    one, other = head.rpartition(".")[2], width.rpartition(".")[2]
    return one == other or not (one.isdigit() and other.isdigit())


def _module_of(name: str) -> str:
    """The module that the layer of a tensor lies in."""
    return name.rpartition(".")[0].rpartition(".")[0]


def _in_blocks(sizes: tuple[int, int], widths: list[Width]) -> Dimension | None:
    """A dimension as the fewest blocks of one of these widths; None where it is of none."""
    fitting = [
        Dimension(width, sizes[0] // width.channels)
        for width in widths
        if sizes[0] % width.channels == 0 and sizes[1] == sizes[0] // width.channels * width.channels_after
    ]
    return min(fitting, key=lambda dimension: dimension.blocks, default=None)


def _shapes_of(network: nn.Module) -> Shapes:
    return {name: tuple(value.shape) for name, value in network.state_dict().items()}


def _drawn(name: str, value: Tensor, generator: torch.Generator) -> Tensor:
    """Values that hide nothing, as zeros and equal scales would."""
    if not value.is_floating_point() or not value.dim():
        return value
    if value.dim() > 1:
        return torch.randn(value.shape, generator=generator) / math.sqrt(value[0].numel())
    if name.endswith(("weight", "running_var")):
        return 0.5 + torch.rand(value.shape, generator=generator)
    return 0.2 * torch.randn(value.shape, generator=generator)


class _NoNorms(TorchFunctionMode):
    """Norms as functions of each value alone, which keep 0: those over channels change with the channels dropped."""

    # where each has its scale and its shift, and which dimension of the features these are along
    PLACES: Mapping[Callable[..., Any], tuple[int, int | None, int]] = {
        F.layer_norm: (2, 3, -1),
        F.rms_norm: (2, None, -1),
        F.group_norm: (2, 3, 1),
        F.batch_norm: (3, 4, 1),
    }

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func not in self.PLACES:
            return func(*args, **(kwargs or {}))
        scale, shift, along = self.PLACES[func]
        features = torch.tanh(args[0])
        for name, place, combine in (("weight", scale, torch.mul), ("bias", shift, torch.add)):
            value = (kwargs or {}).get(name, args[place] if place is not None and place < len(args) else None)
            if value is not None:
                shape = value.shape if along == -1 else (-1, *(1,) * (features.dim() - 2))
                features = combine(features, value.reshape(shape))
        return features

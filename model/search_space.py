"""What a Cream search chooses from, as data, and what every choice costs. Arithmetic only, no modules.

Source: Peng et al., "Cream of the Crop: Distilling Prioritized Paths For One-Shot Neural Architecture Search",
NeurIPS 2020, and its published code's behaviour. The small space, spaces from YAML and the division are ours.

An arch is a list of lists of operator indices: one inner list per stage, one index per block; the first and last
stages are fixed and always [0]. A searchable block with index -1 is skipped.
"""

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import yaml

from model.division import solve_widths
from utils.errors import UserError
from utils.registry import nearest_name

Arch = Sequence[Sequence[int]]
SKIP = -1


def div8(value: float) -> int:
    """The multiple of 8 nearest to `value`, at least 8 and never below 90 % of it."""
    rounded = max(8, 8 * int((value + 4) // 8))
    return rounded + 8 if rounded < 0.9 * value else rounded


def strided(side: int, stride: int) -> int:
    """Side of the map after a convolution with an odd kernel, padding kernel // 2 and this stride."""
    return (side - 1) // stride + 1


# ---- costs -----------------------------------------------------------------------------------------------------------


class Cost(NamedTuple):
    """Exact counts for one image.

    Attributes:
        macs: multiply-adds of convolutions and linear layers.
        ref_flops: the published count: MACs, and 1 per bias output, 2 per batch-norm input, 1 per ReLU element,
            1 per input element of an average pool; Swish, hard sigmoid, gate and shortcut are free.
        params: parameters.
    """

    macs: int = 0
    ref_flops: int = 0
    params: int = 0


def total(costs: Iterable[Cost]) -> Cost:
    """The sum of costs, count by count."""
    return Cost(*(sum(counts) for counts in zip(Cost(), *costs, strict=True)))


def _conv(in_channels: int, out_channels: int, kernel: int, side: int, *, groups: int = 1, bias: bool = False) -> Cost:
    """A convolution (or, at side 1 and kernel 1, a linear layer) whose output is side x side."""
    weights = kernel**2 * (in_channels // groups) * out_channels
    extra = out_channels if bias else 0
    return Cost(weights * side**2, (weights + extra) * side**2, weights + extra)


def _batch_norm(channels: int, side: int) -> Cost:
    return Cost(0, 2 * channels * side**2, 2 * channels)


def _pool(channels: int, side: int) -> Cost:
    return Cost(0, channels * side**2, 0)


def reduced_channels(channels: int) -> int:
    """Width of the bottleneck inside squeeze-and-excitation on `channels` (expanded) channels."""
    return div8(channels / 4)


def _squeeze_excite(channels: int, side: int) -> Cost:
    reduced = reduced_channels(channels)
    return total(
        [
            _pool(channels, side),
            _conv(channels, reduced, 1, 1, bias=True),
            Cost(0, reduced, 0),
            _conv(reduced, channels, 1, 1, bias=True),
        ]
    )


# ---- structure -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Operator:
    """What a searchable block may be: an inverted residual with this depthwise kernel and expansion."""

    kernel: int
    expansion: int


@dataclass(frozen=True)
class BlockPlan:
    """One inverted residual: channels in and out, the operator's numbers, and the stride of its depthwise part."""

    in_channels: int
    out_channels: int
    kernel: int
    expansion: int
    stride: int

    @property
    def mid_channels(self) -> int:
        """Width between the two 1x1 convolutions."""
        return div8(self.in_channels * self.expansion)

    @property
    def has_shortcut(self) -> bool:
        """Whether the input is added to the output."""
        return self.stride == 1 and self.in_channels == self.out_channels

    def cost(self, side: int) -> Cost:
        """Counts for an input of side x side pixels."""
        mid, out_side = self.mid_channels, strided(side, self.stride)
        return total(
            [
                _conv(self.in_channels, mid, 1, side),
                _batch_norm(mid, side),
                _conv(mid, mid, self.kernel, out_side, groups=mid),
                _batch_norm(mid, out_side),
                _squeeze_excite(mid, out_side),
                _conv(mid, self.out_channels, 1, out_side),
                _batch_norm(self.out_channels, out_side),
            ]
        )


@dataclass(frozen=True)
class FramePlan:
    """The parts that no search changes: stem, stage 0, last stage, head.

    Attributes:
        stem_channels, stem_stride: the 3x3 convolution on the image.
        base_channels: output of stage 0, a depthwise-separable block with squeeze-and-excitation.
        in_channels: what the last stage gets.
        tail_channels: output of the last stage, a 1x1 convolution.
        head_channels: embedding dimension D, from a 1x1 convolution behind the pool.
    """

    stem_channels: int
    stem_stride: int
    base_channels: int
    in_channels: int
    tail_channels: int
    head_channels: int

    def stem_cost(self, side: int) -> Cost:
        """The stem's convolution, without its batch norm, for an image of side x side."""
        return _conv(3, self.stem_channels, 3, strided(side, self.stem_stride))

    def stem_norm_cost(self, side: int) -> Cost:
        """The stem's batch norm, for an image of side x side."""
        return _batch_norm(self.stem_channels, strided(side, self.stem_stride))

    def base_cost(self, side: int) -> Cost:
        """Stage 0 on a map of side x side."""
        channels = self.stem_channels
        return total(
            [
                _conv(channels, channels, 3, side, groups=channels),
                _batch_norm(channels, side),
                _squeeze_excite(channels, side),
                _conv(channels, self.base_channels, 1, side),
                _batch_norm(self.base_channels, side),
            ]
        )

    def tail_cost(self, side: int) -> Cost:
        """The last stage on a map of side x side."""
        return total([_conv(self.in_channels, self.tail_channels, 1, side), _batch_norm(self.tail_channels, side)])

    def head_cost(self, side: int) -> Cost:
        """Global pool and head convolution on a map of side x side."""
        return total([_pool(self.tail_channels, side), _conv(self.tail_channels, self.head_channels, 1, 1, bias=True)])


@dataclass(frozen=True)
class NetworkPlan:
    """A stand-alone network: the frame, the blocks of every searchable stage, K classes."""

    frame: FramePlan
    stages: tuple[tuple[BlockPlan, ...], ...]
    num_classes: int

    def cost(self, resolution: int) -> Cost:
        """Counts for an image of resolution x resolution pixels."""
        frame = self.frame
        costs = [frame.stem_cost(resolution), frame.stem_norm_cost(resolution)]
        side = strided(resolution, frame.stem_stride)
        costs.append(frame.base_cost(side))
        for block in (block for stage in self.stages for block in stage):
            costs.append(block.cost(side))
            side = strided(side, block.stride)
        classifier = _conv(frame.head_channels, self.num_classes, 1, 1, bias=True)
        return total([*costs, frame.tail_cost(side), frame.head_cost(side), classifier])


class Planned(Protocol):
    """A network that knows its plan."""

    @property
    def plan(self) -> NetworkPlan: ...


def macs(network: Planned, resolution: int) -> int:
    """Multiply-adds of a network's convolutions and linear layers for one image of resolution x resolution pixels."""
    return network.plan.cost(resolution).macs


def ref_flops(network: Planned, resolution: int) -> int:
    """The operation count that the published model names are made of (see `Cost`), for one image."""
    return network.plan.cost(resolution).ref_flops


# ---- the space -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stage:
    """One searchable stage.

    Attributes:
        channels: output of each of its blocks.
        stride: of its first block.
        template: what the one block of a single-block stage is in the published networks, whatever its index
            says (see `SearchSpace.plan`); None: what its index says.
    """

    channels: int
    stride: int
    template: Operator | None = None


@dataclass(frozen=True)
class SearchSpace:
    """Operators, stages, channels and depth limits.

    Attributes:
        operators: what index 0, 1, ... of a block stands for.
        stages: the searchable stages.
        deepening: (stage counted from 1, depth limit) pairs in the order in which `size_supernet` adds blocks.
        resolution: side of the image, in pixels, at which paths are compared.
        stem_channels, stem_stride, base_channels, tail_channels, head_channels: see `FramePlan`.
    """

    operators: tuple[Operator, ...]
    stages: tuple[Stage, ...]
    deepening: tuple[tuple[int, int], ...]
    resolution: int
    stem_channels: int
    stem_stride: int
    base_channels: int
    tail_channels: int
    head_channels: int

    @property
    def total_stride(self) -> int:
        """Side of the image over the side of the last map."""
        product = self.stem_stride
        for stage in self.stages:
            product *= stage.stride
        return product

    @property
    def frame(self) -> FramePlan:
        """The parts around the searchable stages."""
        return FramePlan(
            self.stem_channels,
            self.stem_stride,
            self.base_channels,
            self.stages[-1].channels,
            self.tail_channels,
            self.head_channels,
        )

    def block(self, stage: int, position: int, operator: Operator) -> BlockPlan:
        """The block at `position` of searchable stage `stage` (both from 0), made of `operator`."""
        here = self.stages[stage]
        if position > 0:
            return BlockPlan(here.channels, here.channels, operator.kernel, operator.expansion, 1)
        in_channels = self.stages[stage - 1].channels if stage else self.base_channels
        return BlockPlan(in_channels, here.channels, operator.kernel, operator.expansion, here.stride)

    def plan(self, arch: Arch, num_classes: int, *, honour_single_block: bool = False) -> NetworkPlan:
        """The stand-alone network of an arch.

        In the published networks a stage of exactly one block ignores its index and is the stage's template; the
        released weights and the models' names rest on it. `honour_single_block` turns that off.

        Raises:
            UserError: as `check_arch`.
        """
        self.check_arch(arch)
        stages = []
        for number, indices in enumerate(arch[1:-1]):
            operators = [self.operators[index] for index in indices]
            template = self.stages[number].template
            if len(operators) == 1 and template is not None and not honour_single_block:
                operators = [template]
            stages.append(tuple(self.block(number, position, op) for position, op in enumerate(operators)))
        return NetworkPlan(self.frame, tuple(stages), num_classes)

    def check_arch(self, arch: Arch, *, skips: bool = False) -> None:
        """Refuse a list that is no arch of this space; with `skips`, -1 may stand for any block but a stage's first.

        Raises:
            UserError: a wrong number of stages, an empty stage, or an index that is no operator.
        """
        count, last = len(self.stages) + 2, len(self.operators) - 1
        if len(arch) != count:
            fault = f"expected {count} inner lists, one per stage with [0] at both ends, got {len(arch)}"
        elif list(arch[0]) != [0] or list(arch[-1]) != [0]:
            fault = "the first and last stages are fixed, so both must be [0]"
        else:
            for number, indices in enumerate(arch[1:-1], start=1):
                if not len(indices):
                    fault = f"stage {number} is empty; every stage needs at least one block"
                    break
                if bad := [
                    index
                    for position, index in enumerate(indices)
                    if not (0 <= index <= last or (skips and position > 0 and index == SKIP))
                ]:
                    fault = f"{bad[0]} in stage {number} is not an index from 0 to {last}"
                    break
            else:
                return
        raise UserError(f"--arch_list {json.dumps([list(stage) for stage in arch])}: {fault}.")

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of the stem, of every searchable stage, of the last stage and of the head."""
        channels = (stage.channels for stage in self.stages)
        return (self.stem_channels, *channels, self.tail_channels, self.head_channels)

    def with_widths(self, widths: Sequence[int]) -> "SearchSpace":
        """The space with other `widths`; stage 0 keeps its proportion to the stem."""
        stem, *channels, tail, head = widths
        return dataclasses.replace(
            self,
            stages=tuple(dataclasses.replace(s, channels=c) for s, c in zip(self.stages, channels, strict=True)),
            stem_channels=stem,
            base_channels=div8(self.base_channels * stem / self.stem_channels),
            tail_channels=tail,
            head_channels=head,
        )


PUBLISHED = SearchSpace(
    operators=tuple(Operator(kernel, expansion) for kernel in (3, 5, 7) for expansion in (4, 6)),
    stages=(
        Stage(24, 2, Operator(3, 4)),
        Stage(40, 2, Operator(5, 4)),
        Stage(80, 2, Operator(3, 6)),
        Stage(96, 1, Operator(3, 6)),
        Stage(192, 2, Operator(5, 6)),
    ),
    deepening=((3, 3), (4, 3), (5, 3), (2, 2), (1, 2), (3, 4), (4, 4), (5, 4), (2, 4), (1, 4)),
    resolution=224,
    stem_channels=16,
    stem_stride=2,
    base_channels=16,
    tail_channels=320,
    head_channels=1280,
)

# Ours: the same space for 32x32 images. Stem and stage 1 keep the size, so the last map has 4x4 pixels, not 1x1.
PUBLISHED_SMALL = dataclasses.replace(
    PUBLISHED,
    stages=(dataclasses.replace(PUBLISHED.stages[0], stride=1), *PUBLISHED.stages[1:]),
    resolution=32,
    stem_stride=1,
)


@cache
def divided(
    space: SearchSpace,
    arch: tuple[tuple[int, ...], ...],
    split_factor: int,
    num_classes: int,
    *,
    honour_single_block: bool = False,
) -> SearchSpace:
    """The space in which S networks of an arch have as many parameters as one has in `space`. Ours.

    Widths are multiples of 8, as in the published networks; the space itself for S = 1.
    """
    if split_factor == 1:
        return space

    def params(widths: Sequence[int]) -> int:
        plan = space.with_widths(widths).plan(arch, num_classes, honour_single_block=honour_single_block)
        return plan.cost(space.resolution).params

    return space.with_widths(solve_widths(space.widths, [8] * len(space.widths), params, split_factor))


# ---- estimates -------------------------------------------------------------------------------------------------------


class CostTable(NamedTuple):
    """Costs of the parts of any path of a space, at the space's resolution.

    fixed: stem convolution, global pool and head. base, tail: the fixed stages.
    first, later: [stage][operator], of a stage's first block and of every other one.
    """

    fixed: Cost
    base: Cost
    tail: Cost
    first: tuple[tuple[Cost, ...], ...]
    later: tuple[tuple[Cost, ...], ...]


@cache
def cost_table(space: SearchSpace = PUBLISHED) -> CostTable:
    """The table that every estimate adds up from."""
    frame = space.frame
    side = strided(space.resolution, space.stem_stride)
    base = frame.base_cost(side)
    first, later = [], []
    for number, stage in enumerate(space.stages):
        first.append(tuple(space.block(number, 0, operator).cost(side) for operator in space.operators))
        side = strided(side, stage.stride)
        later.append(tuple(space.block(number, 1, operator).cost(side) for operator in space.operators))
    fixed = total([frame.stem_cost(space.resolution), frame.head_cost(side)])
    return CostTable(fixed, base, frame.tail_cost(side), tuple(first), tuple(later))


def _estimate(arch: Arch, space: SearchSpace) -> Cost:
    space.check_arch(arch, skips=True)
    table = cost_table(space)
    blocks = [
        (table.later if position else table.first)[number][index]
        for number, indices in enumerate(arch[1:-1])
        for position, index in enumerate(indices)
        if index != SKIP
    ]
    return total([table.fixed, table.base, table.tail, *blocks])


def est_flops(arch: Arch, space: SearchSpace = PUBLISHED) -> int:
    """Search-time estimate of a path's operations (as `Cost.ref_flops`) at the space's resolution.

    It leaves out the stem's batch norm and the classifier, as published, and takes every index at its word.

    Raises:
        UserError: as `SearchSpace.check_arch`.
    """
    return _estimate(arch, space).ref_flops


def est_params(arch: Arch, space: SearchSpace = PUBLISHED) -> int:
    """Search-time estimate of a path's parameters, without the stem's batch norm and the classifier.

    Raises:
        UserError: as `SearchSpace.check_arch`.
    """
    return _estimate(arch, space).params


class SupernetSize(NamedTuple):
    """depths: blocks of every searchable stage. resolution: side of the training image in pixels."""

    depths: tuple[int, ...]
    resolution: int


def size_supernet(minimum: float, maximum: float, space: SearchSpace = PUBLISHED) -> SupernetSize:
    """Depths and resolution of the supernet for an interval of operations.

    The published rule: the interval sizes the supernet, it does not filter paths, and where one block per stage is
    already too dear the resolution falls in steps of the total stride.

    Args:
        minimum, maximum: the interval, in millions of operations (`est_flops`, stem and head left aside).
        space: what to size.

    Raises:
        UserError: no supernet of the space fits the interval.
    """
    invalid = UserError(
        f"--flops_minimum {minimum:g} --flops_maximum {maximum:g}: no supernet of this search space reaches that "
        "interval (millions of operations); widen it, or give the depths as --sta_num."
    )
    if not minimum <= maximum:  # nor is NaN an interval
        raise invalid
    table = cost_table(space)
    depths = [1] * len(space.stages)
    lowest = sum(min(cost.ref_flops for cost in costs) for costs in table.first)
    highest = sum(max(cost.ref_flops for cost in costs) for costs in table.first)
    dearest = [max(cost.ref_flops for cost in costs) for costs in table.later]
    full = space.resolution // space.total_stride
    steps = full
    if lowest / 1e6 > maximum:
        while lowest / 1e6 > maximum and steps >= 2:
            steps -= 1
            maximum *= full / steps  # the factors compound, as published
        if steps < 2:
            raise invalid
    elif highest / 1e6 < minimum:
        for stage, cap in space.deepening:
            while depths[stage - 1] < cap and highest / 1e6 < minimum:
                highest += dearest[stage - 1]
                depths[stage - 1] += 1
        if highest / 1e6 < minimum:
            raise invalid
    # a resolution that was not lowered need not be a multiple of the stride
    resolution = space.resolution if steps == full else space.total_stride * steps
    for stage, cap in space.deepening:
        while depths[stage - 1] < cap:
            highest += dearest[stage - 1]
            if highest / 1e6 > maximum:
                return SupernetSize(tuple(depths), resolution)
            depths[stage - 1] += 1
    return SupernetSize(tuple(depths), resolution)


# ---- reading ---------------------------------------------------------------------------------------------------------


def parse_arch_list(text: str | Arch, space: SearchSpace = PUBLISHED) -> tuple[tuple[int, ...], ...]:
    """An arch from text such as "[[0],[3],[3,3],[3,1,3],[3,3,3,3],[3,3,3],[0]]", or from nested lists.

    Raises:
        UserError: not a list of lists of whole numbers, or no arch of the space.
    """
    try:
        value = json.loads(text) if isinstance(text, str) else text
        if not all(type(index) is int for stage in value for index in stage):
            raise TypeError
    except (TypeError, ValueError, RecursionError):
        raise UserError(
            f"--arch_list {text!r}: expected a list of lists of whole numbers, as [[0],[3,3],[0]]."
        ) from None
    arch = tuple(tuple(stage) for stage in value)
    space.check_arch(arch)
    return arch


def _whole(value: Any) -> int:
    if type(value) is not int or value < 1:
        raise ValueError(f"{value!r}: every number must be whole and at least 1")
    return value


def space_from_mapping(mapping: Mapping[str, Any], where: str) -> SearchSpace:
    """A space from the keys of `SearchSpace`: operators [kernel, expansion], stages {channels, stride, template}.

    Args:
        mapping: parsed YAML.
        where: the flag and file, for messages.

    Raises:
        UserError: an unknown, missing or unusable key.
    """
    fields = [field.name for field in dataclasses.fields(SearchSpace)]
    for key in mapping:
        if key not in fields:
            raise UserError(f"{where}: {key!r} is not a key of a search space.{nearest_name(str(key), fields)}")
    lost = [name for name in fields if name not in mapping]
    if lost:
        raise UserError(f"{where}: the search space lacks {', '.join(lost)}.")
    try:
        operators = tuple(Operator(_whole(kernel), _whole(expansion)) for kernel, expansion in mapping["operators"])
        stages = tuple(
            Stage(**{**stage, "template": Operator(*stage["template"]) if stage.get("template") else None})
            for stage in mapping["stages"]
        )
        deepening = tuple((_whole(stage), _whole(cap)) for stage, cap in mapping["deepening"])
        numbers = {name: _whole(mapping[name]) for name in fields[3:]}
        templates = [stage.template for stage in stages if stage.template]
        for number in (n for stage in stages for n in (stage.channels, stage.stride)):
            _whole(number)
        for number in (n for op in templates for n in (op.kernel, op.expansion)):
            _whole(number)
        if not operators or not stages:
            raise ValueError("operators and stages are needed")
        if any(op.kernel % 2 == 0 for op in (*operators, *templates)):
            raise ValueError("kernels must be odd")
        if any(stage > len(stages) for stage, _ in deepening):
            raise ValueError(f"deepening names a stage beyond the {len(stages)} there are")
    except (TypeError, ValueError, KeyError) as error:
        raise UserError(f"{where}: {error}; see model/search_space.py for the form of a search space.") from None
    return SearchSpace(operators, stages, deepening, **numbers)


def space_to_text(space: SearchSpace) -> str:
    """The space as one line that `read_space` takes."""
    return json.dumps(
        {
            **dataclasses.asdict(space),
            "operators": [[op.kernel, op.expansion] for op in space.operators],
            "stages": [
                {"channels": stage.channels, "stride": stage.stride}
                | ({"template": [stage.template.kernel, stage.template.expansion]} if stage.template else {})
                for stage in space.stages
            ],
        }
    )


def read_space(text: str) -> SearchSpace:
    """A space from the value of --search_space: the path of a YAML file, or the YAML itself.

    Raises:
        UserError: unreadable, or as `space_from_mapping`.
    """
    where = "--search_space"
    inline = "\n" in text.strip() or text.lstrip().startswith("{")
    try:
        if not inline:
            where = f"--search_space {text}"
            text = Path(text).read_text(encoding="utf-8")
        content = yaml.safe_load(text)
    except OSError as error:
        raise UserError(f"{where}: cannot be read: {error.strerror or error}.") from None
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"{where}: is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise UserError(f"{where}: expected the keys of a search space, found {type(content).__name__}.")
    return space_from_mapping(content, where)

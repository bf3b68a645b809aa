"""What a Cream search chooses from, as data, and what every choice costs. Arithmetic only, no modules.

Source: Peng et al., "Cream of the Crop: Distilling Prioritized Paths For One-Shot Neural Architecture Search",
NeurIPS 2020, and its published code's behaviour. The small space, spaces from YAML and the division are ours.

An arch is a list of lists of operator indices: one inner list per stage, one index per block; the first and last
stages are fixed and always [0]. A searchable block with index -1 is skipped.
"""

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from model.division.solver import solve_widths
from model.search.costs import BlockPlan, FramePlan, NetworkPlan, Operator, div8
from utils.errors import UserError

Arch = Sequence[Sequence[int]]
SKIP = -1


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


# ---- reading ---------------------------------------------------------------------------------------------------------

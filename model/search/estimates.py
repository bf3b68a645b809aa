"""The operations of a path as the search estimates them, and the supernet that reaches an interval of them."""

from functools import cache
from typing import NamedTuple

from model.search.costs import Cost, strided, total
from model.search.space import PUBLISHED, SKIP, Arch, SearchSpace
from utils.errors import UserError


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


def estimate(arch: Arch, space: SearchSpace) -> Cost:
    """Search-time estimate of a path at the space's resolution, without the stem's batch norm and the classifier.

    Raises:
        UserError: as `SearchSpace.check_arch`.
    """
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
    return estimate(arch, space).ref_flops


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

"""The widths of one of S copies of any network, by the budget. Ours."""

from collections.abc import Callable, Sequence
from functools import cache

# Ours: the copies may differ from the undivided network by this part of its budget, and the search ends within AIM.
TOLERANCE = 0.02


AIM = 0.005


def channel_unit(channels: int) -> int:
    """Divided widths are multiples of this: 8 where there are 128 channels or more, less where that would be coarse."""
    return next(unit for unit in (8, 4, 2, 1) if channels >= 16 * unit or unit == 1)


def scaled_width(width: int, factor: float, unit: int) -> int:
    """`width` times `factor`, to the nearest multiple of `unit`, at least one."""
    return max(unit, int(width * factor / unit + 0.5) * unit)


def bisected_widths(
    widths: Sequence[int], units: Sequence[int], cost: Callable[[Sequence[int]], int], budget: float
) -> tuple[int, ...]:
    """All widths times the one factor that comes nearest to a budget; arguments else as `solve_widths`."""

    def at(factor: float) -> tuple[int, ...]:
        return tuple(scaled_width(width, factor, unit) for width, unit in zip(widths, units, strict=True))

    low, high = 0.0, 1.0
    for _ in range(16):
        middle = (low + high) / 2
        low, high = (low, middle) if cost(at(middle)) > budget else (middle, high)
    return min(at(low), at(high), key=lambda candidate: abs(cost(candidate) - budget))


def solve_widths(
    widths: Sequence[int],
    units: Sequence[int],
    cost: Callable[[Sequence[int]], int],
    split_factor: int,
) -> tuple[int, ...]:
    """Stage widths of one of S copies that cost together what the undivided network costs. Ours.

    First all widths shrink by one factor, then they move as `nearest_widths` says. The result may miss the budget by
    more than TOLERANCE where no choice of widths meets it.

    Args:
        widths: of the undivided network.
        units: the width of each stage stays a multiple of this, or what it was.
        cost: widths -> cost of one network, growing with every width.
        split_factor: S.
    """
    if split_factor == 1:
        return tuple(widths)
    budget = cost(widths) / split_factor

    def miss(candidate: Sequence[int]) -> float:
        return abs(cost(candidate) - budget) / budget

    return nearest_widths(widths, units, miss, bisected_widths(widths, units, cost, budget))


def solve_both(
    widths: Sequence[int],
    units: Sequence[int],
    costs: Callable[[Sequence[int]], tuple[int, int]],
    budgets: tuple[int, int],
) -> tuple[int, ...]:
    """Stage widths at which two costs are near their budgets at once: the larger deviation is made small. Ours.

    Args:
        widths, units: as `solve_widths`.
        costs: widths -> (parameters, multiply-adds) of what is deployed, growing with every width.
        budgets: of both. The search starts where one factor for all widths meets the first.
    """

    def miss(candidate: Sequence[int]) -> float:
        return max(abs(cost / budget - 1) for cost, budget in zip(costs(candidate), budgets, strict=True))

    start = bisected_widths(widths, units, lambda candidate: costs(candidate)[0], budgets[0])
    return nearest_widths(widths, units, miss, start)


def nearest_widths(
    widths: Sequence[int], units: Sequence[int], miss: Callable[[tuple[int, ...]], float], start: tuple[int, ...]
) -> tuple[int, ...]:
    """From `start`, single stages move by one unit as long as that misses less; two at once where no single one helps.

    The search ends within AIM; of moves that arrive there, or of those that help, the one is made that keeps the shape
    of the network best.

    Args:
        widths, units: as `solve_widths`.
        miss: widths -> by which part the budget is missed.
    """

    def stretch(candidate: Sequence[int]) -> float:
        """How far the stages' factors lie apart."""
        factors = [now / before for now, before in zip(candidate, widths, strict=True)]
        return max(factors) / min(factors)

    def steps(start: tuple[int, ...]) -> list[tuple[int, ...]]:
        """`start` with one stage moved by one unit."""
        return [
            (*start[:i], start[i] + step, *start[i + 1 :])
            for i, unit in enumerate(units)
            for step in (-unit, unit)
            if unit <= start[i] + step <= widths[i]
        ]

    miss = cache(miss)  # one candidate is reached on several ways
    best = start
    while miss(best) > AIM:
        better = [candidate for candidate in steps(best) if miss(candidate) < miss(best)]
        if not better and miss(best) > TOLERANCE:
            # every single step overshoots, but two that go against each other need not
            pairs = (candidate for one in steps(best) for candidate in steps(one))
            better = [candidate for candidate in pairs if miss(candidate) < miss(best)]
        if not better:
            break
        # the one that keeps the shape of the network best, of those that arrive if any does
        arrived = [candidate for candidate in better if miss(candidate) <= AIM]
        best = min(arrived or better, key=stretch)
    return best


def solve_factor(cost: Callable[[float], int], split_factor: int) -> float:
    """Width factor of one of S copies of a network with a single width argument; see `solve_widths`.

    Args:
        cost: width factor in (0, 1] -> cost of one network, growing with the factor.
        split_factor: S.
    """
    if split_factor == 1:
        return 1.0
    budget = cost(1.0) / split_factor
    low, high = 0.0, 1.0
    tried: dict[float, int] = {}
    for _ in range(16):
        middle = (low + high) / 2
        tried[middle] = cost(middle)
        low, high = (low, middle) if tried[middle] > budget else (middle, high)
    return min(tried, key=lambda factor: abs(tried[factor] - budget))

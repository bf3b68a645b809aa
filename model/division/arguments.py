"""Dividing a network by building its class again with smaller constructor arguments. Ours.

All code that computes with widths, heads, tables and masks is the library's own, so nothing can go out of step. What a
number among the arguments is says its name, else a few builds without storage.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

from torch import nn

from model.division.recording import Recording
from model.division.solver import AIM, TOLERANCE, bisected_widths, channel_unit, nearest_widths, scaled_width

Changes = dict[str, int | float]
Cost = Callable[[nn.Module], int]

HEADS = frozenset(["num_heads", "heads", "num_head", "n_heads", "nheads"])
HEAD_SIZES = frozenset(["head_dim", "key_dim", "dim_head", "head_dims", "attn_head_dim", "head_size", "dim_per_head"])
GROUP_COUNTS = frozenset(("groups", "cardinality"))
GROUP_SIZES = frozenset(("group_size", "gs"))
RATIOS = frozenset(["mlp_ratio", "mlp_ratios", "ffn_ratio", "expand_ratio", "exp_ratio", "mlp_expand"])
MLP_WIDTHS = frozenset(["mlp_dim", "ffn_dim"])  # a ratio times the width that attention has
FACTORS = frozenset(["width_mult", "channel_multiplier", "width", "width_factor", "multiplier"])
DROP_PATHS = frozenset(("drop_path_rate", "stochastic_depth_prob"))
RATES = DROP_PATHS | frozenset(
    [
        "drop_rate",
        "proj_drop_rate",
        "pos_drop_rate",
        "patch_drop_rate",
        "attn_drop_rate",
        "dropout",
        "attention_dropout",
    ]
)
IMAGE = frozenset(["img_size", "image_size", "input_size"])
PATCH, WINDOW = "patch_size", "window_size"
KEPT = frozenset(
    [
        "num_classes",
        "in_chans",
        "patch_size",
        "window_size",
        "window_sizes",
        "base_width",
        "reduction",
        "rd_ratio",
        "se_ratio",
        "output_stride",
        "reg_tokens",
        "ch_div",
        "depth",
        "depths",
        "stride",
        "strides",
        "kernel_size",
        "kernel_sizes",
        "dilation",
        "dilations",
        "sr_ratio",
        "sr_ratios",
    ]
)


@dataclass(frozen=True)
class Row:
    """The leaves that are widths of a class in which they cannot be told one by one.

    Attributes:
        widths: their patterns.
        kept: names of leaves among these that stay.
        tied: leaves of one value move together wherever they stand: the class lists what each of its layers takes.
    """

    widths: frozenset[str]
    kept: frozenset[str] = frozenset()
    tied: bool = False


ROWS: Mapping[str, Row] = {
    # a width that differs from its neighbour's adds a projection
    "MaxxVit": Row(frozenset(("cfg.embed_dim.*", "cfg.stem_width", "cfg.stem_width.*"))),
    # the stem's 32 channels stand in the code
    "SelecSls": Row(
        frozenset(("cfg.features.*.*", "cfg.head.*.*", "cfg.num_features")), frozenset(("cfg.features.0.0",)), tied=True
    ),
}
NARROWEST = 8  # a smaller number is no width
FLOORS = (8, 16, 32)  # units that are tried in turn where finer widths do not build
LEFT_BEHIND, SHARE_LEFT = 1.2, 0.05
MOST_BUILDS = 400  # of one search


def leaf_kind(name: str) -> str:
    """What the last name on a leaf's path says: "heads", "rate", …, "kept", or "" where it says nothing."""
    last = last_name(name)
    tables = {
        "heads": HEADS,
        "head size": HEAD_SIZES,
        "group count": GROUP_COUNTS,
        "group size": GROUP_SIZES,
        "ratio": RATIOS,
        "factor": FACTORS,
        "rate": RATES,
        "image": IMAGE,
        "kept": KEPT,
    }
    return next((kind for kind, names in tables.items() if last in names), "")


def last_name(name: str) -> str:
    """The last name on a leaf's path that is no place in a sequence, in lower case."""
    return next((part for part in reversed(name.lower().split(".")) if not part.isdigit()), "")


def container(name: str) -> str:
    """A leaf's path without its last name and what follows."""
    parts = name.split(".")
    while len(parts) > 1 and parts[-1].isdigit():
        parts.pop()
    return ".".join(parts[:-1])


def pattern(name: str) -> str:
    """A leaf's path without its places in sequences."""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


@dataclass(frozen=True)
class Structure:
    """What probing compares: shapes of the state dict, kernels of convolutions, weights of layers."""

    shapes: Mapping[str, tuple[int, ...]]
    kernels: Mapping[str, tuple[int, ...]]
    weights: frozenset[str]

    @classmethod
    def of(cls, network: nn.Module) -> Structure:
        """The structure of a network."""
        kernels, weights = {}, set()
        for name, module in network.named_modules():
            if isinstance(module, nn.modules.conv._ConvNd):
                kernels[name] = tuple(module.kernel_size)
            if isinstance(module, nn.modules.conv._ConvNd | nn.Linear):
                weights.add(f"{name}.weight")
        shapes = {name: tuple(value.shape) for name, value in network.state_dict().items()}
        return cls(shapes, kernels, frozenset(weights))

    def is_width_of(self, other: Structure) -> bool:
        """Whether `other`, built with another number, differs as by a width: in sizes of layers and in nothing else."""
        ranks = {name: len(shape) for name, shape in self.shapes.items()}
        if ranks != {name: len(shape) for name, shape in other.shapes.items()} or self.kernels != other.kernels:
            return False
        return any(self.shapes[name] != other.shapes[name] for name in self.weights & self.shapes.keys())


@dataclass(frozen=True)
class Group:
    """Leaves that hold the same number and move together."""

    names: tuple[str, ...]
    value: int | float

    def to(self, value: float) -> Changes:
        """The leaves at another value, each of the type that it had."""
        kind = type(self.value)
        return {name: kind(value) for name in self.names}


@dataclass(frozen=True)
class Attention:
    """Widths of attention, stage by stage, and the leaves that say how many heads they have.

    Attributes:
        heads: groups of the stages' head counts.
        widths: groups of the stages' widths; one for all stages where the class doubles it from stage to stage.
    """

    heads: tuple[Group, ...]
    widths: tuple[Group, ...]

    @property
    def sizes(self) -> tuple[int, ...]:
        """D of each stage."""
        return tuple(int(width.value // heads.value) for heads, width in zip(self.heads, self.widths, strict=False))


@dataclass
class Arguments:
    """What the leaves of one class are, and what its network costs with others.

    Args:
        recording: of the class.
        fixed: values that every build has (image size, fitted patches).
        cost: network without storage -> what is budgeted.
        runs: whether a network without storage gives logits.
        budget_of: S.
    """

    recording: Recording
    fixed: Changes
    cost: Cost
    runs: Callable[[nn.Module], bool]
    split_factor: int
    builds: int = 0
    _costs: dict[tuple[tuple[str, int | float], ...], int | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        network = self.recording.build(self.fixed)
        self.structure = Structure.of(network)
        self.full = self.cost(network)
        self.parameters = {name: value.numel() for name, value in network.named_parameters() if value.dim() > 1}
        self.total = sum(value.numel() for value in network.parameters())
        self.budget = self.full / self.split_factor
        self.factor = self.split_factor**-0.5
        leaves = self.recording.leaves
        self.kinds = {name: leaf_kind(name) for name in leaves}
        self.widths = self._widths()
        self.ratios = self.of_kind("ratio", least=0)
        self.factors = [
            group
            for group in self.of_kind("factor", least=0)
            if group.value < NARROWEST and (self.priced(group.to(group.value / 2)) or self.full) < self.full
        ]

    # ---- what the leaves are -----------------------------------------------------------------------------------------

    def of_kind(self, kind: str, *, least: float) -> list[Group]:
        """Groups of the leaves of a kind whose values are `least` or more."""
        return grouped(
            (name, value) for name, value in self.recording.leaves.items() if self.kinds[name] == kind and value > least
        )

    def build(self, changes: Changes) -> nn.Module | None:
        """The network with other numbers, without storage; None where its class refuses them."""
        self.builds += 1
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of widths that are none
                return self.recording.build({**self.fixed, **changes})
        except Exception:  # the constructors of libraries raise anything
            return None

    def priced(self, changes: Changes) -> int | None:
        """What the network costs with other numbers; None where it does not build or run."""
        key = tuple(sorted(changes.items()))
        if key not in self._costs:
            network = self.build(changes)
            try:
                self._costs[key] = None if network is None else self.cost(network)
            except (RuntimeError, ValueError, AssertionError, TypeError, IndexError):
                self._costs[key] = None
        return self._costs[key]

    def _is_width(self, changes: Callable[[int], Changes]) -> bool | None:
        """Whether leaves are widths, None where no single change of them builds."""
        built = False
        for number in range(4):
            network = self.build(changes(number))
            built = built or network is not None
            # one is enough: another may change the kernel of a channel attention, or add a projection
            if network is not None and self.structure.is_width_of(Structure.of(network)):
                return True
        return False if built else None

    def _widths(self) -> list[Group]:
        """The leaves that are widths, by name and probing; those that do not build alone are taken with the others."""
        candidates = {
            name: value
            for name, value in self.recording.leaves.items()
            if self.kinds[name] == "" and value >= NARROWEST and value == int(value) and name not in self.fixed
        }
        row = ROWS.get(self.recording.kind.__name__)
        if row is not None:
            named = {n: v for n, v in candidates.items() if pattern(n) in row.widths and n not in row.kept}
            return grouped(named.items(), tied=row.tied)
        by_pattern: dict[str, list[str]] = {}
        for name in candidates:
            by_pattern.setdefault(pattern(name), []).append(name)
        found: list[str] = []
        for names in by_pattern.values():
            if self._is_width(lambda number, names=names: _moved(candidates, names, number)):  # type: ignore[misc]
                found += names
                continue
            for group in grouped((name, candidates[name]) for name in names):
                if self._is_width(lambda number, group=group: _moved(candidates, group.names, number)) is not False:  # type: ignore[misc]
                    found += group.names
        order = list(self.recording.leaves)
        return grouped((name, candidates[name]) for name in sorted(found, key=order.index))

    def attention(self) -> Attention | None:
        """The head counts and the widths that they belong to, where these can be told."""
        heads = self._by_place(name for name, kind in self.kinds.items() if kind == "heads")
        if not heads or any(group.value < 1 for group in heads):
            return None
        above = {container(name) for group in heads for name in group.names}
        named = [group for group in self.widths if last_name(group.names[0]) not in MLP_WIDTHS]
        places = self._by_place(name for group in named for name in group.names)
        for widths in _by_pattern(places):
            if container(widths[0].names[0]) not in above:
                continue
            if len(widths) == len(heads) and all(w.value % h.value == 0 for w, h in zip(widths, heads, strict=True)):
                return Attention(tuple(heads), tuple(widths))
            doubling = all(h.value == heads[0].value * 2**i for i, h in enumerate(heads))
            if len(widths) == 1 and doubling and widths[0].value % heads[0].value == 0:
                return Attention(tuple(heads), tuple(widths))
        return None

    def _by_place(self, names: Iterable[str]) -> list[Group]:
        """Every leaf as a group of its own."""
        return [Group((name,), self.recording.leaves[name]) for name in names]

    # ---- what a division must be -------------------------------------------------------------------------------------

    def left_behind(self, network: nn.Module, classifier: str | None) -> tuple[float, str]:
        """(share of P in layers that the division did not reach, the largest of them).

        The first layer and the classifier do not count.
        """
        first = next(iter(self.parameters), "")
        left = {}
        for name, value in network.named_parameters():
            full = self.parameters.get(name)
            if full is None or name == first or name.rpartition(".")[0] == classifier:
                continue
            if value.numel() > LEFT_BEHIND * self.factor * full:
                left[name] = value.numel()
        largest = max(left, key=left.__getitem__, default="")
        return sum(left.values()) / self.total, largest

    def miss(self, changes: Changes) -> float:
        """How far the copy's cost lies from the budget, as a part of it; infinite where it does not build."""
        cost = self.priced(changes)
        return math.inf if cost is None else abs(cost - self.budget) / self.budget


def _moved(values: Mapping[str, int | float], names: Iterable[str], number: int) -> Changes:
    """Leaves at twice their value, half of it, 8 more, or three times it."""
    move: tuple[Callable[[float], float], ...] = (lambda v: 2 * v, lambda v: v // 2, lambda v: v + 8, lambda v: 3 * v)
    return {name: type(values[name])(move[number](values[name])) for name in names}


def grouped(leaves: Iterable[tuple[str, int | float]], *, tied: bool = False) -> list[Group]:
    """Leaves of one value together: those of one pattern, or all where they are tied."""
    groups: dict[tuple[str, int | float], list[str]] = {}
    for name, value in leaves:
        groups.setdefault(("" if tied else pattern(name), value), []).append(name)
    return [Group(tuple(names), value) for (_, value), names in groups.items()]


def _by_pattern(groups: Iterable[Group]) -> list[list[Group]]:
    found: dict[str, list[Group]] = {}
    for group in groups:
        found.setdefault(pattern(group.names[0]), []).append(group)
    return list(found.values())


# ---- the search ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Found:
    """One of the plans that the search came by.

    Attributes:
        changes: the leaves of one copy that are not the undivided network's.
        miss: of the budget.
        trouble: why it is no division, "" where it is one.
    """

    changes: Changes
    miss: float
    trouble: str


def divide(arguments: Arguments, classifier: str | None) -> Found | None:
    """The arguments of one of S copies; the nearest that is none, with its trouble, where there is none; None: no leaf.

    Args:
        arguments: what the leaves are.
        classifier: name of the layer that gives the logits.
    """
    nearest: Found | None = None
    for changes in _candidates(arguments):
        found = _judged(arguments, changes, classifier)
        if not found.trouble:
            return found
        if nearest is None or found.miss < nearest.miss:
            nearest = found
    return nearest


def _judged(arguments: Arguments, changes: Changes, classifier: str | None) -> Found:
    miss = arguments.miss(changes)
    if miss > TOLERANCE:
        return Found(changes, miss, f"misses by {miss:.1%}" if math.isfinite(miss) else "does not build")
    network = arguments.build(changes)
    if network is None or not arguments.runs(network):
        return Found(changes, miss, "does not run")
    share, largest = arguments.left_behind(network, classifier)
    if share > SHARE_LEFT:
        return Found(changes, miss, f"leaves {share:.0%} of the parameters behind, most in {largest}")
    for name, value in changes.items():
        before = arguments.recording.leaves[name]
        kind = arguments.kinds[name]
        # a width of 64 or less may have to be rounded further
        bounded = kind == "factor" or (kind == "" and before > 64)
        if bounded and not arguments.factor / 2 <= value / before <= 2 * arguments.factor:
            return Found(changes, miss, f"takes {name} from {before:g} to {value:g}")
    return Found(changes, miss, "")


def _candidates(arguments: Arguments) -> Iterable[Changes]:
    """Plans that are worth a look, in the order in which they are preferred."""
    attention = arguments.attention()
    if attention is not None and (arguments.ratios or _mlp_widths(arguments)):
        yield from by_heads(arguments, attention)
    if arguments.factors:
        yield from _by_factor(arguments)
    rules: list[str] = ["whole", "narrow"] if attention is not None else ["none"]
    for rule in rules:
        for floor in _floors(arguments):
            yield from _by_widths(arguments, attention, rule, floor)
    for floor in _sizes(arguments, ("head size",)):
        yield from _by_widths(arguments, attention, rules[-1], floor, narrowest=floor)
    if arguments.of_kind("group size", least=NARROWEST - 1):
        for floor in (1, NARROWEST):
            yield from _by_widths(arguments, attention, rules[-1], floor, thinner_groups=True)


def _floors(arguments: Arguments) -> list[int]:
    sizes = _sizes(arguments, ("head size", "group size"))
    return [1, *sizes, *(floor for floor in FLOORS if floor not in sizes)]


def _sizes(arguments: Arguments, kinds: Iterable[str]) -> list[int]:
    """Whole numbers above 1 among the leaves of some kinds."""
    groups = (group for kind in kinds for group in arguments.of_kind(kind, least=1))
    return sorted({int(group.value) for group in groups if group.value == int(group.value)})


def _mlp_widths(arguments: Arguments) -> list[Group]:
    return [group for group in arguments.widths if last_name(group.names[0]) in MLP_WIDTHS]


def _by_factor(arguments: Arguments) -> Iterable[Changes]:
    """The whole-network factor alone, then with the ratios."""

    def at(factor: float) -> Changes:
        return {name: value for group in arguments.factors for name, value in group.to(group.value * factor).items()}

    groups = [group for group in arguments.factors if isinstance(group.value, float)]
    if len(groups) < len(arguments.factors):
        return
    low, high = 0.0, 1.0
    tried: dict[float, float] = {}
    for _ in range(16):
        middle = (low + high) / 2
        cost = arguments.priced(at(middle))
        if cost is None:
            low = middle  # too narrow for its own rounding
            continue
        tried[middle] = abs(cost - arguments.budget)
        low, high = (low, middle) if cost > arguments.budget else (middle, high)
    if not tried:
        return
    best = at(min(tried, key=tried.__getitem__))
    yield best if arguments.miss(best) <= AIM else with_ratio(arguments, best) or best


def _by_widths(
    arguments: Arguments,
    attention: Attention | None,
    rule: str,
    floor: int,
    *,
    narrowest: int | None = None,
    thinner_groups: bool = False,
) -> Iterable[Changes]:
    """All widths by one factor, then the ratios, then single groups by one unit; nothing where it does not build.

    Args:
        arguments: what the leaves are.
        attention: its heads, or None.
        rule: "whole" heads follow widths, "narrow" ones keep their number, "none": there are none.
        floor: units are multiples of this.
        narrowest: of widths of this and more; None: of those that have two or more.
        thinner_groups: sizes of groups are divided too, for widths of which one copy has less than a group.
    """
    groups = arguments.widths
    heads_of: dict[str, list[tuple[Group, int]]] = {}
    units = []
    if attention is not None:
        sizes = attention.sizes
        for i, heads in enumerate(attention.heads):
            width = attention.widths[min(i, len(attention.widths) - 1)]
            size = sizes[min(i, len(sizes) - 1)]
            for name in width.names:
                heads_of.setdefault(name, []).append((heads, size))
    for group in groups:
        unit = channel_unit(int(group.value))
        if floor > 1 and group.value >= (narrowest or 2 * floor):
            unit = math.lcm(unit, floor) if floor < unit else floor
        if group.names[0] in heads_of:
            heads, size = heads_of[group.names[0]][0]
            unit = size if rule == "whole" else int(heads.value) * max(1, round(unit / heads.value))
        units.append(unit)

    def at(widths: Sequence[int]) -> Changes:
        changes: Changes = {}
        for group, width in zip(groups, widths, strict=True):
            changes |= group.to(width)
            for heads, size in heads_of.get(group.names[0], ()) if rule == "whole" else ():
                first = heads_of[group.names[0]][0][0].value
                changes |= heads.to(max(1, width // size) * heads.value / first)
        for group in arguments.of_kind("group count", least=1):
            changes |= group.to(max(1, round(group.value * arguments.factor)))
        for group in arguments.of_kind("group size", least=NARROWEST - 1) if thinner_groups else ():
            unit = max(floor, channel_unit(int(group.value)))
            changes |= group.to(scaled_width(int(group.value), arguments.factor, unit))
        return changes

    if not groups:
        return
    full = [int(group.value) for group in groups]
    start = [scaled_width(width, arguments.factor, unit) for width, unit in zip(full, units, strict=True)]
    if arguments.priced(at(start)) is None:
        return
    begun = arguments.builds

    def cost(widths: Sequence[int], unbuilt: int = 10 * arguments.full) -> int:
        if list(widths) == full:
            return arguments.full
        spent = arguments.builds - begun > MOST_BUILDS
        priced = None if spent else arguments.priced(at(widths))
        return unbuilt if priced is None else priced

    # widths of which a copy has less than a group do not build: too narrow
    bisected_cost = partial(cost, unbuilt=0) if thinner_groups else cost
    budget = arguments.full / arguments.split_factor
    nearest = bisected_widths(full, units, bisected_cost, budget)
    near = at(nearest)
    if arguments.miss(near) <= AIM:
        yield near
    tuned = with_ratio(arguments, near)
    if tuned is not None and arguments.miss(tuned) <= TOLERANCE:
        yield tuned  # a class may split what a ratio gives, and an odd number cannot be
    yield at(nearest_widths(full, units, lambda widths: abs(cost(widths) - budget) / budget, nearest))


def with_ratio(arguments: Arguments, changes: Changes, widths: Mapping[str, float] | None = None) -> Changes | None:
    """`changes` with the ratios times the common factor in [1/2, 2] that meets the budget; None where none does.

    Args:
        arguments: what the leaves are.
        changes: the other leaves of a copy.
        widths: MLP widths that follow a ratio, at the copy's width and the undivided network's ratio.
    """
    follow = widths or {}
    if not (arguments.ratios or follow):
        return None

    def at(factor: float) -> Changes:
        ratios = {name: group.value * factor for group in arguments.ratios for name in group.names}
        return {**changes, **ratios, **{name: max(1, round(value * factor)) for name, value in follow.items()}}

    def cost(factor: float) -> float | None:
        return arguments.priced(at(factor))

    low, high = 0.5, 2.0
    below, above = cost(low), cost(high)
    if below is None or above is None or not below < above:
        return None
    if not below * (1 - TOLERANCE) <= arguments.budget <= above * (1 + TOLERANCE):
        return None
    best = low if abs(below - arguments.budget) < abs(above - arguments.budget) else high
    for _ in range(8):  # cost is nearly linear in the factor
        factor = low + (high - low) * (arguments.budget - below) / (above - below)
        factor = min(max(factor, 0.5), 2.0)
        found = cost(factor)
        if found is None:
            break
        if arguments.miss(at(factor)) < arguments.miss(at(best)):
            best = factor
        if arguments.miss(at(best)) <= AIM / 5 or low == factor or high == factor:
            break
        if found > arguments.budget:
            high, above = factor, found
        else:
            low, below = factor, found
        if below >= above:
            break
    return at(best)


# ---- whole heads first -----------------------------------------------------------------------------------------------


def by_heads(arguments: Arguments, attention: Attention) -> Iterable[Changes]:
    """Plans of a network with attention and an MLP ratio, the one that keeps its shape best first.

    They minimise J = 2 max over stages |ln(d' sqrt(S) / d)| + ln(D / D') + |ln(r' / r)| over head counts
    max(1, round(φ H)), head sizes D' of one half or more, and the ratio r' in [r/2, 2r] that meets the budget; of equal
    J the larger heads, then the larger widths come first.
    """
    root = arguments.split_factor**0.5
    attended = {name for group in attention.widths for name in group.names}
    mlps = _mlp_widths(arguments)
    others = [group for group in arguments.widths if group not in mlps and not attended & {*group.names}]
    shapes = []
    for counts in _head_counts(attention, arguments.factor):
        for sizes in _head_sizes(attention.sizes):
            widths = [count * size for count, size in zip(counts, sizes, strict=False)]
            stretch = [abs(math.log(w * root / g.value)) for w, g in zip(widths, attention.widths, strict=False)]
            fixed_part = 2 * max(stretch) + math.log(max(attention.sizes) / max(sizes))
            shapes.append((fixed_part, -max(sizes), [-width for width in widths], counts, widths))
    shapes.sort()
    plans: list[tuple[float, int, list[int], Changes]] = []
    for fixed_part, size, larger, counts, widths in shapes:
        if plans and fixed_part > min(plan[0] for plan in plans):
            break
        changes: Changes = {}
        for heads, count in zip(attention.heads, counts, strict=True):
            changes |= heads.to(count)
        for group, width in zip(attention.widths, widths, strict=False):
            changes |= group.to(width)
        mean = sum(w / g.value for w, g in zip(widths, attention.widths, strict=False)) / len(attention.widths)
        for group in others:
            changes |= group.to(scaled_width(int(group.value), mean, channel_unit(int(group.value))))
        follow = {name: group.value * mean for group in mlps for name in group.names}
        tuned = with_ratio(arguments, changes, follow)
        if tuned is not None and arguments.miss(tuned) <= TOLERANCE:
            before = {name: group.value for group in arguments.ratios for name in group.names} or follow
            ratio = next(tuned[name] / value for name, value in before.items())
            plans.append((fixed_part + abs(math.log(ratio)), size, larger, tuned))
    for *_, tuned in sorted(plans, key=lambda plan: plan[:3]):
        yield tuned


def _head_counts(attention: Attention, factor: float) -> list[tuple[int, ...]]:
    """Every vector of max(1, round(φ H)) for φ in [0.6 f, 1.4 f]."""
    found: dict[tuple[int, ...], None] = {}
    doubles = len(attention.widths) == 1 < len(attention.heads)
    for step in range(401):
        scale = factor * (0.6 + 0.8 * step / 400)
        counts = [max(1, math.floor(scale * heads.value + 0.5)) for heads in attention.heads]
        if doubles:
            counts = [counts[0] * 2**i for i in range(len(counts))]
        found[tuple(counts)] = None
    return list(found)


def _head_sizes(sizes: Sequence[int]) -> list[tuple[int, ...]]:
    """D' of every stage: the largest is D, D - 8, D - 16, …, one half or more (steps of 4 where D < 32)."""
    largest = max(sizes)
    step = 8 if largest >= 32 else 4
    least = max(8, largest / 2)
    options = [largest - step * i for i in range(largest // step + 1) if largest - step * i >= least]
    return [tuple(max(4, round(size * option / largest / 4) * 4) for size in sizes) for option in options]

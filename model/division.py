"""What "one of S" means: the width tables and rules of the paper, and a solver for every other network.

Arithmetic only, no modules. Source of every table: Zhao et al., arXiv:2011.14660, and its published code's behaviour.
`python -m model.division ARCH --split_factor S` prints what becomes of a network: see `model.plan`.
"""

from collections.abc import Callable, Mapping, Sequence

from model import LARGE, SMALL

# ---- ResNet, wide ResNet, ResNeXt ------------------------------------------------------------------------------------

# Base width c of the stem and stage 1: roughly 64 / sqrt(S) and 16 / sqrt(S), at the paper's convenient values.
RESNET_WIDTHS: Mapping[str, Mapping[int, int]] = {
    LARGE: {1: 64, 2: 44, 4: 32, 8: 24},
    SMALL: {1: 16, 2: 12, 4: 8, 8: 6, 16: 4},
}

# Legal S of the ImageNet wide ResNets, and the two cases with their own (c, b): each half of wide_resnet50_2 is a
# resnet50, each half of wide_resnet50_3 an undivided wide_resnet50_2.
WIDE_RESNET_LARGE_SPLITS = (1, 2, 4)
_WIDE_RESNET_HALVES = {"wide_resnet50_2": (64, 64), "wide_resnet50_3": (64, 128)}


def wide_resnet_factor(widen_factor: int, split_factor: int) -> int:
    """Widening factor k_S of a CIFAR wide ResNet: k / sqrt(S), rounded up from a fraction of 0.6 on, at least 1."""
    return int(max(widen_factor / split_factor**0.5 + 0.4, 1.0))


def wide_resnet_large_widths(arch: str, base_width: int, split_factor: int) -> tuple[int, int]:
    """(c, b) of an ImageNet wide ResNet: stem width, and base width b of the bottlenecks (undivided: `base_width`)."""
    if split_factor == 2 and arch in _WIDE_RESNET_HALVES:
        return _WIDE_RESNET_HALVES[arch]
    return RESNET_WIDTHS[LARGE][split_factor], base_width


def divided_groups(groups: int, split_factor: int) -> int:
    """Groups of a divided ResNeXt-like network: int(G / S), which S need not divide; S > G is not legal."""
    return int(groups / split_factor)


def group_splits(groups: int) -> tuple[int, ...]:
    """Legal S of a network with G groups: 1 ... G."""
    return tuple(range(1, groups + 1))


def bottleneck_width(planes: int, base_width: int, groups: int) -> int:
    """Channels of a bottleneck's 3x3 convolution, int(planes * b / 64) * G."""
    return int(planes * base_width / 64) * groups


def resnet_dropout(rate: float, split_factor: int) -> float:
    """Classifier dropout of one of S (wide) ResNets: rate / S, not rate / sqrt(S) as in the SE families."""
    return rate / split_factor


# ---- SE-ResNet, SE-ResNeXt, SENet, ResNeXSt --------------------------------------------------------------------------

# Base width c of the networks without groups; on small images the table ends at S = 4.
SE_RESNET_WIDTHS: Mapping[str, Mapping[int, int]] = {
    LARGE: RESNET_WIDTHS[LARGE],
    SMALL: {split: RESNET_WIDTHS[SMALL][split] for split in (1, 2, 4)},
}


def divided_rate(rate: float, split_factor: int) -> float:
    """A dropout-like rate of one of S networks: rate / sqrt(S) (SE families, ResNeXSt, ShakeDrop, EfficientNet)."""
    return rate / split_factor**0.5


def senet_widths(planes: int, groups: int) -> tuple[int, int]:
    """Output channels of the first 1x1 and of the grouped 3x3 convolution of a SENet-154/113 bottleneck.

    Args:
        planes: p of the stage, not divided.
        groups: group count after division, out of 64.
    """
    return int(2 * (groups / 64) * planes), int(4 * (groups / 64) * planes)


# ---- Shake-Shake, PyramidNet, DenseNet -------------------------------------------------------------------------------

# Width of stage 1 of Shake-Shake 26 2x96d, roughly 96 / sqrt(S); its 16-channel stem is not divided.
SHAKE_RESNET_WIDTHS: Mapping[int, int] = {1: 96, 2: 64, 4: 48, 8: 32, 16: 24}

# Families whose division is a closed formula take any S; the list has to end somewhere.
ANY_SPLIT = tuple(range(1, 65))


def pyramid_planes(num_blocks: int, widening: int, split_factor: int) -> list[int]:
    """Planes of the N blocks of a PyramidNet: 16 plus k steps of widening / (N sqrt(S)), rounded half to even.

    The steps are summed one by one, in double precision, because ties do occur.
    """
    step = widening / (num_blocks * split_factor**0.5)
    width = 16.0
    planes = []
    for _ in range(num_blocks):
        width += step
        planes.append(round(width))
    return planes


def pyramid_shake_drop_rates(num_blocks: int, split_factor: int) -> list[float]:
    """ShakeDrop rates of the N blocks of a PyramidNet: linear in the depth up to 0.5 / sqrt(S)."""
    last = divided_rate(0.5, split_factor)
    return [last * k / num_blocks for k in range(1, num_blocks + 1)]


def densenet_growth(split_factor: int) -> int:
    """Growth rate q of DenseNet-BC-190, roughly 40 / sqrt(S)."""
    return int(40 / split_factor**0.5 * 2) // 2


def densenet_shake_drop_rates(
    rate: float, num_blocks: int, layers_per_block: int, split_factor: int
) -> list[list[float]]:
    """ShakeDrop rate of every layer of every dense block: linear in the depth up to rate / sqrt(S)."""
    last = divided_rate(rate, split_factor)
    num_layers = num_blocks * layers_per_block
    return [
        [last * m / num_blocks + last * i / num_layers for i in range(1, layers_per_block + 1)]
        for m in range(num_blocks)
    ]


# ---- EfficientNet ----------------------------------------------------------------------------------------------------

# Channels at width coefficient 1: stem, seven stages, head. Coefficients and depth are not divided; the table is.
EFFICIENTNET_CHANNELS: Mapping[int, tuple[int, ...]] = {
    1: (32, 16, 24, 40, 80, 112, 192, 320, 1280),
    2: (24, 12, 16, 24, 56, 80, 136, 224, 920),
    4: (16, 12, 16, 20, 40, 56, 96, 160, 640),
}


def efficientnet_channels(width: float, split_factor: int) -> tuple[int, ...]:
    """Channels of the stem, the seven stages and the head at a width coefficient.

    Rounded to a multiple of 8 (S = 1) or 4, but never more than 10 % down (Tan & Le, arXiv:1905.11946).
    """
    divisor = 8 if split_factor == 1 else 4
    channels = []
    for base in EFFICIENTNET_CHANNELS[split_factor]:
        target = base * width
        rounded = max(divisor, int(target + divisor / 2) // divisor * divisor)
        channels.append(rounded + divisor if rounded < 0.9 * target else rounded)
    return tuple(channels)


# ---- any network: the budget solver ----------------------------------------------------------------------------------

# Ours: the copies may differ from the undivided network by this part of its budget, and the search ends within AIM.
TOLERANCE = 0.02
AIM = 0.005


def channel_unit(channels: int) -> int:
    """Divided widths are multiples of this: 8 where there are 128 channels or more, less where that would be coarse."""
    return next(unit for unit in (8, 4, 2, 1) if channels >= 16 * unit or unit == 1)


def scaled_width(width: int, factor: float, unit: int) -> int:
    """`width` times `factor`, to the nearest multiple of `unit`, at least one."""
    return max(unit, int(width * factor / unit + 0.5) * unit)


def solve_widths(
    widths: Sequence[int],
    units: Sequence[int],
    cost: Callable[[Sequence[int]], int],
    split_factor: int,
) -> tuple[int, ...]:
    """Stage widths of one of S copies that cost together what the undivided network costs. Ours.

    First all widths shrink by one factor, then single stages move by one unit, whichever comes nearest to the budget;
    two at once where no single one helps.
    The result may miss the budget by more than TOLERANCE where no choice of widths meets it.

    Args:
        widths: of the undivided network.
        units: the width of each stage stays a multiple of this, or what it was.
        cost: widths -> cost of one network, growing with every width.
        split_factor: S.
    """
    if split_factor == 1:
        return tuple(widths)
    budget = cost(widths) / split_factor

    def at(factor: float) -> tuple[int, ...]:
        return tuple(scaled_width(width, factor, unit) for width, unit in zip(widths, units, strict=True))

    low, high = 0.0, 1.0
    for _ in range(16):
        middle = (low + high) / 2
        low, high = (low, middle) if cost(at(middle)) > budget else (middle, high)

    def miss(candidate: Sequence[int]) -> float:
        return abs(cost(candidate) - budget) / budget

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

    best = min(at(low), at(high), key=miss)
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


if __name__ == "__main__":
    from model.plan import main

    raise SystemExit(main())

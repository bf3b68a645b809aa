"""What "one of S" means: the width tables and rules of the paper; `solver` has the widths of every other network.

Arithmetic only, no modules. Source of every table: Zhao et al., arXiv:2011.14660, and its published code's behaviour.
`python -m model.division ARCH --split_factor S` prints what becomes of a network.
"""

from collections.abc import Mapping

from model.registry import LARGE, SMALL

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

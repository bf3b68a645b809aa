"""ResNeXSt: ResNeXt widths with split attention, divided by groups (Zhao et al., arXiv:2011.14660)."""

from dataclasses import dataclass
from functools import partial

from torch import nn

from model.division import bottleneck_width, divided_groups, divided_rate, group_splits
from model.layers.resnet_parts import ResNetSkeleton, deep_stem, init_resnet, make_stage, projection_shortcut
from model.layers.split_attention import SplitAttentionBottleneck
from model.registry import LARGE, Backbone, BackboneRequest, backbones


@dataclass(frozen=True, kw_only=True)
class _Arch:
    """Blocks per stage, groups G before division, base width b, classifier dropout before division."""

    blocks: tuple[int, ...]
    groups: int
    base_width: int
    dropout: float = 0.0


_ARCHS = {
    "resnexst50_4x16d": _Arch(blocks=(3, 4, 6, 3), groups=4, base_width=16),
    "resnexst50_8x16d": _Arch(blocks=(3, 4, 6, 3), groups=8, base_width=16),
    "resnexst50_4x32d": _Arch(blocks=(3, 4, 6, 3), groups=4, base_width=32),
    "resnexst101_8x32d": _Arch(blocks=(3, 4, 23, 3), groups=8, base_width=32, dropout=0.1),
}


def _block(
    planes: int, width: int, groups: int, pools: bool, in_channels: int, stride: int
) -> SplitAttentionBottleneck:
    """One bottleneck. Every block of stages 2 to 4 `pools`, where ResNeSt pools only in the first of a stage."""
    pool = nn.AvgPool2d(3, stride, padding=1) if pools else nn.Identity()
    shortcut = projection_shortcut(in_channels, 4 * planes, stride)
    return SplitAttentionBottleneck(in_channels, planes, width, groups, pool, shortcut)


def build(request: BackboneRequest) -> nn.Module:
    """One of the S networks of a ResNeXSt."""
    arch = _ARCHS[request.arch]
    groups = divided_groups(arch.groups, request.split_factor)
    channels = 128
    stem = nn.Sequential(deep_stem(64, channels, nn.MaxPool2d(3, 2, ceil_mode=True)))
    stages = []
    for i, depth in enumerate(arch.blocks):
        planes = 64 * 2**i
        width = bottleneck_width(planes, arch.base_width, groups)
        block = partial(_block, planes, width, groups, i > 0)
        stages.append(make_stage(block, channels, 4 * planes, depth, 1 if i == 0 else 2))
        channels = 4 * planes
    network = ResNetSkeleton(
        stem,
        stages,
        num_features=channels,
        num_classes=request.num_classes,
        dropout=divided_rate(arch.dropout, request.split_factor),
        classifier_name="last_linear",
    )
    init_resnet(network)
    return network


for _name, _arch in _ARCHS.items():
    backbones.add(_name, Backbone(build=build, family="resnexst", split_factors={LARGE: group_splits(_arch.groups)}))

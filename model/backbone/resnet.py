"""ResNet (He et al., arXiv:1512.03385) as divided by Zhao et al., arXiv:2011.14660; the class serves three families."""

from collections.abc import Callable, Sequence
from functools import partial

from torch import nn

from model.division import RESNET_WIDTHS, bottleneck_width, resnet_dropout
from model.layers.resnet_parts import (
    BasicBlock,
    Bottleneck,
    ResNetSkeleton,
    cifar_stem,
    deep_stem,
    init_resnet,
    make_stage,
)
from model.registry import LARGE, SMALL, Backbone, BackboneRequest, backbones


def stage_strides(request: BackboneRequest) -> tuple[int, ...]:
    """Strides of the four large or three small stages; the option `output_stride` = 2 keeps small maps large."""
    if request.shape == LARGE:
        return (1, 2, 2, 2)
    return (1, 1, 2) if request.options.get("output_stride") == 2 else (1, 2, 2)


class ResNet(ResNetSkeleton):
    """A post-activation residual network of basic or bottleneck blocks.

    Args:
        request: gives shape, number of classes K and the option `output_stride`.
        depths: blocks per stage; the small shape uses the first three.
        stem_width: c, channels of the first convolution.
        planes: planes of stage 1, doubled from stage to stage; c but in the CIFAR wide ResNets.
        bottleneck: whether blocks are bottlenecks (expansion 4) or basic ones (expansion 1).
        base_width: b of `bottleneck_width`.
        groups: G of `bottleneck_width`.
        dropout: classifier dropout rate, already divided.
    """

    def __init__(
        self,
        request: BackboneRequest,
        depths: Sequence[int],
        stem_width: int,
        planes: int,
        *,
        bottleneck: bool = True,
        base_width: int = 64,
        groups: int = 1,
        dropout: float = 0.0,
    ) -> None:
        if request.shape == LARGE:
            channels = 2 * stem_width
            stem = deep_stem(stem_width, channels, pool=nn.MaxPool2d(3, stride=2, padding=1))
        else:
            channels = stem_width
            stem = cifar_stem(stem_width)
        stages = []
        for depth, stride in zip(depths, stage_strides(request), strict=False):
            block: Callable[..., nn.Module]
            if bottleneck:
                out_channels = 4 * planes
                width = bottleneck_width(planes, base_width, groups)
                block = partial(Bottleneck, width=width, out_channels=out_channels, groups=groups)
            else:
                out_channels = planes
                block = partial(BasicBlock, out_channels=out_channels)
            stages.append(make_stage(block, channels, out_channels, depth, stride))
            channels = out_channels
            planes *= 2
        super().__init__(
            nn.Sequential(*stem.values()),
            stages,
            num_features=channels,
            num_classes=request.num_classes,
            dropout=dropout,
        )
        init_resnet(self)
        for module in self.modules():
            if isinstance(module, BasicBlock | Bottleneck):
                nn.init.zeros_(module.last_bn.weight)


def _build(depths: Sequence[int], bottleneck: bool, large_dropout: float, request: BackboneRequest) -> ResNet:
    width = RESNET_WIDTHS[request.shape][request.split_factor]
    dropout = resnet_dropout(large_dropout, request.split_factor) if request.shape == LARGE else 0.0
    return ResNet(request, depths, width, width, bottleneck=bottleneck, dropout=dropout)


SPLITS = {shape: tuple(widths) for shape, widths in RESNET_WIDTHS.items()}

# name: blocks per stage, bottleneck, classifier dropout on large images. The first three are ours.
for _name, _depths, _bottleneck, _dropout in (
    ("resnet20", (3, 3, 3), False, 0.0),
    ("resnet32", (5, 5, 5), False, 0.0),
    ("resnet56", (9, 9, 9), False, 0.0),
    ("resnet110", (12, 12, 12), True, 0.0),
    ("resnet164", (18, 18, 18), True, 0.0),
    ("resnet50", (3, 4, 6, 3), True, 0.0),
    ("resnet101", (3, 4, 23, 3), True, 0.1),
    ("resnet152", (3, 8, 36, 3), True, 0.0),
    ("resnet200", (3, 24, 36, 3), True, 0.0),
):
    backbones.add(
        _name,
        Backbone(
            build=partial(_build, _depths, _bottleneck, _dropout),
            family="resnet",
            split_factors=SPLITS if len(_depths) == 4 else {SMALL: SPLITS[SMALL]},
        ),
    )

"""Wide ResNets with the blocks of ResNet (not pre-activation), after Zagoruyko and Komodakis, arXiv:1605.07146."""

from collections.abc import Sequence
from functools import partial

from model.backbone.resnet import ResNet
from model.division import (
    RESNET_WIDTHS,
    WIDE_RESNET_LARGE_SPLITS,
    resnet_dropout,
    wide_resnet_factor,
    wide_resnet_large_widths,
)
from model.registry import LARGE, SMALL, Backbone, BackboneRequest, backbones

STEM_WIDTH = 16  # of the CIFAR networks; never divided


def _build_small(depth: int, widen_factor: int, dropout: float, request: BackboneRequest) -> ResNet:
    planes = 16 * wide_resnet_factor(widen_factor, request.split_factor)
    rate = 0.0 if request.dataset == "svhn" else resnet_dropout(dropout, request.split_factor)
    return ResNet(request, (depth,) * 3, STEM_WIDTH, planes, bottleneck=False, dropout=rate)


def _build_large(depths: Sequence[int], base_width: int, request: BackboneRequest) -> ResNet:
    stem_width, base_width = wide_resnet_large_widths(request.arch, base_width, request.split_factor)
    return ResNet(request, depths, stem_width, stem_width, base_width=base_width)


# name: blocks per stage, widening factor k, classifier dropout (none on svhn).
for _name, _depth, _widen_factor, _dropout in (
    ("wide_resnet16_2", 2, 2, 0.0),
    ("wide_resnet16_4", 2, 4, 0.0),
    ("wide_resnet16_8", 2, 8, 0.0),
    ("wide_resnet16_12", 2, 12, 0.0),
    ("wide_resnet28_10", 4, 10, 0.0),
    ("wide_resnet40_10", 6, 10, 0.1),
    ("wide_resnet52_8", 8, 8, 0.0),
):
    backbones.add(
        _name,
        Backbone(
            build=partial(_build_small, _depth, _widen_factor, _dropout),
            family="wide_resnet",
            split_factors={SMALL: tuple(RESNET_WIDTHS[SMALL])},
        ),
    )

# name: blocks per stage, base width b.
for _name, _depths, _base_width in (
    ("wide_resnet50_2", (3, 4, 6, 3), 128),
    ("wide_resnet50_3", (3, 4, 6, 3), 192),
    ("wide_resnet101_2", (3, 4, 23, 3), 128),
):
    backbones.add(
        _name,
        Backbone(
            build=partial(_build_large, _depths, _base_width),
            family="wide_resnet",
            split_factors={LARGE: WIDE_RESNET_LARGE_SPLITS},
        ),
    )

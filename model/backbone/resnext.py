"""ResNeXt (Xie et al., arXiv:1611.05431); divided by its number of groups, everything else stays."""

from collections.abc import Sequence
from functools import partial

from model.backbone.resnet import ResNet
from model.division import divided_groups, group_splits
from model.registry import LARGE, SMALL, Backbone, BackboneRequest, backbones

WIDTH = 64  # of the stem and stage 1, both shapes; never divided


def _build(depths: Sequence[int], groups: int, base_width: int, request: BackboneRequest) -> ResNet:
    groups = divided_groups(groups, request.split_factor)
    return ResNet(request, depths, WIDTH, WIDTH, base_width=base_width, groups=groups)


# name: blocks per stage, groups G, base width b.
for _name, _depths, _groups, _base_width in (
    ("resnext29_8x64d", (3, 3, 3), 8, 64),
    ("resnext29_16x64d", (3, 3, 3), 16, 64),
    ("resnext50_32x4d", (3, 4, 6, 3), 32, 4),
    ("resnext101_32x4d", (3, 4, 23, 3), 32, 4),
    ("resnext101_64x4d", (3, 4, 23, 3), 64, 4),
):
    _shapes = (SMALL, LARGE) if len(_depths) == 4 else (SMALL,)
    backbones.add(
        _name,
        Backbone(
            build=partial(_build, _depths, _groups, _base_width),
            family="resnext",
            split_factors={shape: group_splits(_groups) for shape in _shapes},
        ),
    )

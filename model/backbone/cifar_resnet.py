"""The CIFAR ResNets that layer-wise mutual contrastive learning (arXiv:2207.11518) trains. Undivided.

They differ from `resnet32` and `resnet110` of the division tables in shortcut (strided, no pooling) and initialisation.
"""

from collections.abc import Sequence
from functools import partial

from torch import nn

from model.backbone.imagenet_resnet import PlainResNet
from model.layers.resnet_parts import cifar_stem
from model.registry import SMALL, Backbone, BackboneRequest, backbones

_PLANES = (16, 32, 64)


class CifarResNet(PlainResNet):
    """Three stages behind a 3x3 convolution."""

    def __init__(self, planes: Sequence[int], depths: Sequence[int], *, bottleneck: bool, num_classes: int) -> None:
        super().__init__(cifar_stem(planes[0]), planes, depths, bottleneck=bottleneck, num_classes=num_classes)

    def become_auxiliary(self) -> None:
        nn.init.zeros_(self.fc.bias)


def _build(depth: int, bottleneck: bool, last_width: int, request: BackboneRequest) -> CifarResNet:
    planes = (*_PLANES[:-1], last_width * _PLANES[-1])
    return CifarResNet(planes, (depth,) * 3, bottleneck=bottleneck, num_classes=request.num_classes)


# name: blocks per stage, bottleneck; resnet20_cifar is ours, for first tries
for _name, _depth, _bottleneck in (
    ("resnet20_cifar", 3, False),
    ("resnet32_cifar", 5, False),
    ("resnet56_cifar", 9, False),
    ("resnet110_cifar", 12, True),
):
    backbones.add(
        _name,
        Backbone(
            build=partial(_build, _depth, _bottleneck, 1),
            build_wide=partial(_build, _depth, _bottleneck, 2),
            family="cifar_resnet",
            split_factors={SMALL: (1,)},
        ),
    )

"""ShuffleNetV2 (Ma et al., arXiv:1807.11164) with torchvision's names, and its CIFAR form. Undivided.

A baseline of layer-wise mutual contrastive learning (arXiv:2207.11518). torchvision's weights load into
`ShuffleNetV2_1x_imagenet`.
"""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from model.layers.resnet_parts import conv_bn
from model.registry import LARGE, SMALL, Backbone, BackboneRequest, backbones
from model.staged import StagedBackbone

_DEPTHS = (4, 8, 4)
_STEM_WIDTH = 24
_TAIL_WIDTH = 1024


def channel_shuffle(features_BCHW: Tensor) -> Tensor:
    """Interleave the two halves of the channels."""
    B, C, H, W = features_BCHW.shape
    return features_BCHW.view(B, 2, C // 2, H, W).transpose(1, 2).reshape(B, C, H, W)


class ShuffleUnit(nn.Module):
    """A unit of two paths, concatenated and shuffled.

    A down unit (stride 2) runs both paths on the whole input; a basic unit (stride 1) leaves the first half of the
    channels as it is and runs one path on the second.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        mid = out_channels // 2
        self.stride = stride
        if stride == 2:
            self.branch1 = nn.Sequential(
                *conv_bn(in_channels, in_channels, 3, 2, groups=in_channels),
                *conv_bn(in_channels, mid, 1),
                nn.ReLU(inplace=True),
            )
        self.branch2 = nn.Sequential(
            *conv_bn(in_channels if stride == 2 else mid, mid, 1),
            nn.ReLU(inplace=True),
            *conv_bn(mid, mid, 3, stride, groups=mid),
            *conv_bn(mid, mid, 1),
            nn.ReLU(inplace=True),
        )

    def forward(self, features_BCHW: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C', ~H/stride, ~W/stride]."""
        if self.stride == 2:
            paths = self.branch1(features_BCHW), self.branch2(features_BCHW)
        else:
            kept, changed = features_BCHW.chunk(2, dim=1)
            paths = kept, self.branch2(changed)
        return channel_shuffle(torch.cat(paths, dim=1))


class ShuffleNetV2(StagedBackbone):
    """conv3x3 stem -> three stages of units -> conv1x1 to 1024 -> global average pool -> linear layer.

    Args:
        widths: of the three stages.
        num_classes: K.
        large: stem of stride 2 and max-pool (ImageNet), or stride 1 without (CIFAR).
    """

    def __init__(self, widths: Sequence[int], num_classes: int, *, large: bool) -> None:
        super().__init__()
        self.large = large
        self.conv1 = nn.Sequential(*conv_bn(3, _STEM_WIDTH, 3, 2 if large else 1), nn.ReLU(inplace=True))
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1) if large else nn.Identity()
        channels = _STEM_WIDTH
        for i, (width, depth) in enumerate(zip(widths, _DEPTHS, strict=True), start=2):
            units = (ShuffleUnit(width, width, 1) for _ in range(depth - 1))
            self.add_module(f"stage{i}", nn.Sequential(ShuffleUnit(channels, width, 2), *units))
            channels = width
        self.conv5 = nn.Sequential(*conv_bn(channels, _TAIL_WIDTH, 1), nn.ReLU(inplace=True))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(_TAIL_WIDTH, num_classes)

    @property
    def stages(self) -> list[nn.Module]:
        return [self.get_submodule(f"stage{i}") for i in (2, 3, 4)]

    @property
    def classifier_name(self) -> str:
        return "fc"

    @property
    def exit_plan(self) -> tuple[tuple[int, int | None], ...]:
        return ((0, 2), (1, None), (2, None)) if self.large else ((1, None), (2, None))

    def stem(self, images_BCHW: Tensor) -> Tensor:
        return self.maxpool(self.conv1(images_BCHW))

    def tail(self, features_BCHW: Tensor) -> Tensor:
        return self.avgpool(self.conv5(features_BCHW)).flatten(1)

    def classify(self, embedding_BD: Tensor) -> Tensor:
        return self.fc(embedding_BD)


def _build(widths: Sequence[int], last_width: int, request: BackboneRequest) -> ShuffleNetV2:
    stages = (*widths[:-1], last_width * widths[-1])
    return ShuffleNetV2(stages, request.num_classes, large=request.shape == LARGE)


for _name, _shape, _widths in (
    ("ShuffleNetV2_05x_cifar", SMALL, (48, 96, 192)),
    ("ShuffleNetV2_1x_cifar", SMALL, (116, 232, 464)),
    ("ShuffleNetV2_1x_imagenet", LARGE, (116, 232, 464)),
):
    backbones.add(
        _name,
        Backbone(
            build=partial(_build, _widths, 1),
            build_wide=partial(_build, _widths, 2),
            family="shufflenetv2",
            split_factors={_shape: (1,)},
        ),
    )

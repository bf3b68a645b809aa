"""HCGNet for CIFAR: hybrid connections with gates (Yang et al., arXiv:1908.09699). Undivided.

A baseline of layer-wise mutual contrastive learning (arXiv:2207.11518), whose implementation this follows: the update
term of a gated unit is a pooled vector spread over the map, not a feature map.
"""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from model.registry import SMALL, Backbone, BackboneRequest, backbones
from model.staged import StagedBackbone

_UNITS_PER_BLOCK = 8


def pre_conv(in_channels: int, out_channels: int, kernel_size: int, **conv: int) -> nn.Sequential:
    """BN -> ReLU -> bias-free convolution that keeps the size at stride 1."""
    padding = conv.get("dilation", 1) * (kernel_size // 2)
    return nn.Sequential(
        nn.BatchNorm2d(in_channels),
        nn.ReLU(inplace=True),
        nn.Conv2d(in_channels, out_channels, kernel_size, padding=padding, bias=False, **conv),  # type: ignore[arg-type]
    )


class AttentionPool(nn.Module):
    """Mean over the positions, weighted by the softmax of a learnt score: [B, C, H, W] -> [B, C, 1, 1]."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.score = nn.Conv2d(channels, 1, 1)

    def forward(self, features_BCHW: Tensor) -> Tensor:
        weights = self.score(features_BCHW).flatten(2).softmax(dim=-1).view_as(features_BCHW[:, :1])
        return (features_BCHW * weights).sum(dim=(2, 3), keepdim=True)


class GatedUnit(nn.Module):
    """Forgets channels of its input and adds an update from two receptive fields; the shape stays.

    Args:
        channels: C.
        reduction: of the update's hidden vector, from 2C.
        forget_reduction: of the forget gate's hidden vector, from C.
    """

    def __init__(self, channels: int, reduction: int, forget_reduction: int) -> None:
        super().__init__()
        self.near = pre_conv(channels, channels, 3, groups=channels)
        self.far = pre_conv(channels, channels, 3, groups=channels, dilation=2)
        self.pool_input = AttentionPool(channels)
        self.pool_near = AttentionPool(channels)
        self.pool_far = AttentionPool(channels)
        hidden = 2 * channels // reduction
        self.update = nn.Sequential(nn.Conv2d(2 * channels, hidden, 1), nn.BatchNorm2d(hidden), nn.Tanh())
        self.score_near = nn.Conv2d(hidden, channels, 1)
        self.score_far = nn.Conv2d(hidden, channels, 1)
        hidden = channels // forget_reduction
        self.forget = nn.Sequential(
            nn.Conv2d(channels, hidden, 1),
            nn.BatchNorm2d(hidden),
            nn.Tanh(),
            nn.Conv2d(hidden, channels, 1),
            nn.Sigmoid(),
        )

    def forward(self, features_BCHW: Tensor) -> Tensor:
        near = self.pool_near(self.near(features_BCHW))
        far = self.pool_far(self.far(features_BCHW))
        hidden = self.update(torch.cat([near, far], dim=1))
        # softmax over two scores
        share = torch.sigmoid(self.score_near(hidden) - self.score_far(hidden))
        update = share * near + (1 - share) * far
        return features_BCHW * self.forget(self.pool_input(features_BCHW)) + update


class HybridUnit(nn.Module):
    """Concatenates `growth` new channels, made by a bottleneck and a gated unit, to its input."""

    def __init__(self, in_channels: int, growth: int) -> None:
        super().__init__()
        self.reduce = pre_conv(in_channels, 4 * growth, 1)
        self.grow = pre_conv(4 * growth, growth, 3, groups=4)
        self.gate = GatedUnit(growth, reduction=2, forget_reduction=2)

    def forward(self, features_BCHW: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C + growth, H, W]."""
        return torch.cat([features_BCHW, self.gate(self.grow(self.reduce(features_BCHW)))], dim=1)


class Transition(nn.Module):
    """Halves channels and size: [B, C, H, W] -> [B, C // 2, ~H/2, ~W/2]."""

    def __init__(self, in_channels: int) -> None:
        super().__init__()
        out_channels = in_channels // 2
        mid = in_channels - (in_channels - out_channels) // 2
        self.reduce = pre_conv(in_channels, mid, 1)
        self.shrink = pre_conv(mid, out_channels, 3, stride=2)
        self.gate = GatedUnit(out_channels, reduction=4, forget_reduction=4)

    def forward(self, features_BCHW: Tensor) -> Tensor:
        return self.gate(self.shrink(self.reduce(features_BCHW)))


class HCGNet(StagedBackbone):
    """conv3x3 without BN -> three hybrid blocks with transitions between -> BN-ReLU -> average pool -> linear layer.

    A stage is a hybrid block and the transition behind it; the last one has none.

    Args:
        growths: channels that a unit adds, of the three blocks.
        num_classes: K.
    """

    def __init__(self, growths: Sequence[int], num_classes: int) -> None:
        super().__init__()
        channels = 2 * growths[0]
        self.conv1 = nn.Conv2d(3, channels, 3, padding=1, bias=False)
        for i, growth in enumerate(growths, start=1):
            units: list[nn.Module] = [HybridUnit(channels + k * growth, growth) for k in range(_UNITS_PER_BLOCK)]
            channels += _UNITS_PER_BLOCK * growth
            if i < len(growths):
                units.append(Transition(channels))
                channels //= 2
            self.add_module(f"stage{i}", nn.Sequential(*units))
        self.bn = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, num_classes)

    @property
    def stages(self) -> list[nn.Module]:
        return [self.get_submodule(f"stage{i}") for i in (1, 2, 3)]

    @property
    def classifier_name(self) -> str:
        return "fc"

    def stem(self, images_BCHW: Tensor) -> Tensor:
        return self.conv1(images_BCHW)

    def tail(self, features_BCHW: Tensor) -> Tensor:
        return self.avgpool(self.relu(self.bn(features_BCHW))).flatten(1)

    def classify(self, embedding_BD: Tensor) -> Tensor:
        return self.fc(embedding_BD)


def _build(growths: Sequence[int], request: BackboneRequest) -> HCGNet:
    return HCGNet(growths, request.num_classes)


for _name, _growths in (("hcgnet_A1_cifar", (12, 24, 36)), ("hcgnet_A2_cifar", (24, 36, 64))):
    backbones.add(_name, Backbone(build=partial(_build, _growths), family="hcgnet", split_factors={SMALL: (1,)}))

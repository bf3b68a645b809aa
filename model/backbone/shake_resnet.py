"""Shake-Shake ResNet-26 2x96d (Gastaldi, arXiv:1705.07485), divided as in Zhao et al., arXiv:2011.14660."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.division import SHAKE_RESNET_WIDTHS
from model.layers.resnet_parts import conv_bn
from model.layers.shake import ShakeShake
from model.registry import SMALL, Backbone, BackboneRequest, backbones
from model.staged import StagedBackbone


class ShiftedShortcut(nn.Module):
    """ReLU, two 1x1 convolutions of the map and of the map shifted by one pixel, both subsampled; concatenated; BN.

    Args:
        in_channels, out_channels: of the map; half of the output comes from each path.
        stride: every how manieth pixel is taken.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.conv1 = nn.Conv2d(in_channels, out_channels // 2, 1, bias=False)
        self.conv2 = nn.Conv2d(in_channels, out_channels // 2, 1, bias=False)
        self.bn = nn.BatchNorm2d(out_channels)

    def forward(self, features_BCHW: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, out, ~H/stride, ~W/stride]."""
        features = features_BCHW.relu()
        # one pixel up and left: the last row and column become zero
        shifted = F.pad(features, (-1, 1, -1, 1))
        step = self.stride
        halves = (self.conv1(features[..., ::step, ::step]), self.conv2(shifted[..., ::step, ::step]))
        return self.bn(torch.cat(halves, dim=1))


class ShakeBlock(nn.Module):
    """Two pre-activated branches mixed at random, plus the shortcut; no activation after the sum.

    Where the number of channels stays, the shortcut is the identity and the `shortcut` module is never run: released
    checkpoints hold its weights, so it exists, frozen.

    Args:
        in_channels, out_channels: of the map.
        stride: of the first convolution of each branch.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.has_identity = in_channels == out_channels
        self.shortcut = ShiftedShortcut(in_channels, out_channels, stride)
        if self.has_identity:
            self.shortcut.requires_grad_(False)
        self.branch1 = _branch(in_channels, out_channels, stride)
        self.branch2 = _branch(in_channels, out_channels, stride)
        self.mix = ShakeShake()

    def forward(self, features_BCHW: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, out, ~H/stride, ~W/stride]."""
        shortcut = features_BCHW if self.has_identity else self.shortcut(features_BCHW)
        return self.mix(self.branch1(features_BCHW), self.branch2(features_BCHW)) + shortcut


def _branch(in_channels: int, out_channels: int, stride: int) -> nn.Sequential:
    """ReLU, conv3x3 (stride), BN, ReLU, conv3x3, BN. The first ReLU keeps its input, which the block needs again."""
    first = conv_bn(in_channels, out_channels, 3, stride)
    return nn.Sequential(nn.ReLU(), *first, nn.ReLU(inplace=True), *conv_bn(out_channels, out_channels, 3))


class ShakeResNet(StagedBackbone):
    """Stem of 16 channels, three stages of Shake-Shake blocks of widths W, 2W and 4W, pool, linear layer.

    Args:
        blocks_per_stage: 4 for ResNet-26.
        width: W.
        num_classes: K.
    """

    def __init__(self, blocks_per_stage: int, width: int, num_classes: int) -> None:
        super().__init__()
        self.conv_1 = nn.Conv2d(3, 16, 3, padding=1)
        self.bn_1 = nn.BatchNorm2d(16)
        self.stage_1 = _stage(blocks_per_stage, 16, width, 1)
        self.stage_2 = _stage(blocks_per_stage, width, 2 * width, 2)
        self.stage_3 = _stage(blocks_per_stage, 2 * width, 4 * width, 2)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc_out = nn.Linear(4 * width, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        nn.init.normal_(self.fc_out.weight, std=1e-3)
        nn.init.zeros_(self.fc_out.bias)

    @property
    def stages(self) -> list[nn.Module]:
        return [self.stage_1, self.stage_2, self.stage_3]

    @property
    def classifier_name(self) -> str:
        return "fc_out"

    def stem(self, images_BCHW: Tensor) -> Tensor:
        return self.bn_1(self.conv_1(images_BCHW))

    def tail(self, features_BCHW: Tensor) -> Tensor:
        return self.avgpool(features_BCHW.relu()).flatten(1)

    def classify(self, embedding_BD: Tensor) -> Tensor:
        return self.fc_out(embedding_BD)

    def unused_parameter_names(self) -> set[str]:
        return {
            f"{block_name}.shortcut.{name}"
            for block_name, block in self.named_modules()
            if isinstance(block, ShakeBlock) and block.has_identity
            for name, _ in block.shortcut.named_parameters()
        }


def _stage(num_blocks: int, in_channels: int, out_channels: int, stride: int) -> nn.Sequential:
    """Stage of blocks, the first with the stride: [B, in, H, W] -> [B, out, ~H/stride, ~W/stride]."""
    rest = (ShakeBlock(out_channels, out_channels, 1) for _ in range(num_blocks - 1))
    return nn.Sequential(ShakeBlock(in_channels, out_channels, stride), *rest)


def build(request: BackboneRequest) -> nn.Module:
    """One of the S networks of a Shake-Shake ResNet-26 2x96d."""
    return ShakeResNet(4, SHAKE_RESNET_WIDTHS[request.split_factor], request.num_classes)


backbones.add(
    "shake_resnet26_2x96d",
    Backbone(build=build, family="shake_resnet", split_factors={SMALL: tuple(SHAKE_RESNET_WIDTHS)}),
)

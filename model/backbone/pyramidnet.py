"""PyramidNet with ShakeDrop (Han et al., arXiv:1610.02915; Yamada et al., arXiv:1802.02375).

Divided as in Zhao et al., arXiv:2011.14660: the widening step and the last ShakeDrop rate shrink by sqrt(S).
"""

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from model.division import ANY_SPLIT, pyramid_planes, pyramid_shake_drop_rates
from model.layers.resnet_parts import conv_bn
from model.layers.shake import ShakeDrop
from model.registry import SMALL, Backbone, BackboneRequest, backbones
from model.staged import StagedBackbone

# arch -> (bottlenecks per stage (depth - 2) / 9, total widening alpha)
_ARCHS = {"pyramidnet164": (18, 270), "pyramidnet272": (30, 200)}


class PyramidBottleneck(nn.Module):
    """BN, conv1x1, BN, ReLU, conv3x3 (stride), BN, ReLU, conv1x1 to 4 planes, BN, ShakeDrop; plus the shortcut.

    The shortcut has no weights: a 2x2 average pool where the stride is 2, and zeros for the channels it lacks.

    Args:
        in_channels: channels of the input map.
        planes: a quarter of the output's channels.
        stride: of the 3x3 convolution.
        drop_prob: ShakeDrop rate.
    """

    def __init__(self, in_channels: int, planes: int, stride: int, drop_prob: float) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1, self.bn2 = conv_bn(in_channels, planes, 1)
        self.conv2, self.bn3 = conv_bn(planes, planes, 3, stride)
        self.conv3, self.bn4 = conv_bn(planes, 4 * planes, 1)
        self.relu = nn.ReLU(inplace=True)
        self.shake_drop = ShakeDrop(drop_prob)
        self.pool = nn.AvgPool2d(2, 2, ceil_mode=True) if stride == 2 else nn.Identity()
        self.new_channels = 4 * planes - in_channels

    def forward(self, features_BCHW: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, 4 planes, ~H/stride, ~W/stride]."""
        branch = self.conv1(self.bn1(features_BCHW))
        branch = self.conv2(self.relu(self.bn2(branch)))
        branch = self.bn4(self.conv3(self.relu(self.bn3(branch))))
        shortcut = F.pad(self.pool(features_BCHW), (0, 0, 0, 0, 0, self.new_channels))
        return self.shake_drop(branch) + shortcut


class PyramidNet(StagedBackbone):
    """Stem of 16 channels, three stages of bottlenecks that widen block by block, pool, linear layer.

    Args:
        planes: of all blocks, the three stages one after another, equally long.
        drop_probs: ShakeDrop rate of each block.
        num_classes: K.
    """

    def __init__(self, planes: Sequence[int], drop_probs: Sequence[float], num_classes: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv_bn(3, 16, 3)
        in_channels = (16, *(4 * p for p in planes))
        blocks_per_stage = len(planes) // 3
        blocks = [
            PyramidBottleneck(in_channels[k], planes[k], 2 if k in (blocks_per_stage, 2 * blocks_per_stage) else 1, p)
            for k, p in enumerate(drop_probs)
        ]
        self.layer1 = nn.Sequential(*blocks[:blocks_per_stage])
        self.layer2 = nn.Sequential(*blocks[blocks_per_stage : 2 * blocks_per_stage])
        self.layer3 = nn.Sequential(*blocks[2 * blocks_per_stage :])
        self.bn_final = nn.BatchNorm2d(in_channels[-1])
        self.relu = nn.ReLU(inplace=True)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(in_channels[-1], num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    @property
    def stages(self) -> list[nn.Module]:
        return [self.layer1, self.layer2, self.layer3]

    @property
    def classifier_name(self) -> str:
        return "fc"

    def halved_depth(self) -> int:
        """All of it: every block is wider than the one before, and the tail takes the last one's width."""
        return len(self.layer3)

    def stem(self, images_BCHW: Tensor) -> Tensor:
        return self.bn1(self.conv1(images_BCHW))

    def tail(self, features_BCHW: Tensor) -> Tensor:
        return self.avgpool(self.relu(self.bn_final(features_BCHW))).flatten(1)

    def classify(self, embedding_BD: Tensor) -> Tensor:
        return self.fc(embedding_BD)


def build(request: BackboneRequest) -> nn.Module:
    """One of the S networks of a PyramidNet."""
    blocks_per_stage, widening = _ARCHS[request.arch]
    num_blocks = 3 * blocks_per_stage
    return PyramidNet(
        pyramid_planes(num_blocks, widening, request.split_factor),
        pyramid_shake_drop_rates(num_blocks, request.split_factor),
        request.num_classes,
    )


for _name in _ARCHS:
    backbones.add(_name, Backbone(build=build, family="pyramidnet", split_factors={SMALL: ANY_SPLIT}))

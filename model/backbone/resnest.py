"""ResNeSt (Zhang et al., arXiv:2004.08955), undivided: the teacher-sized yardstick of arXiv:2011.14660."""

from collections.abc import Sequence

from torch import Tensor, nn

from model.layers.resnet_parts import conv_bn, deep_stem
from model.layers.split_attention import SplitAttentionBottleneck
from model.registry import LARGE, Backbone, BackboneRequest, backbones
from model.staged import StagedBackbone

_BLOCKS = {"resnest101": (3, 4, 23, 3), "resnest200": (3, 24, 36, 3), "resnest269": (3, 30, 48, 8)}


class ResNeSt(StagedBackbone):
    """Deep stem, four stages of split-attention bottlenecks of cardinality 1, global average pool, linear layer.

    Args:
        blocks: per stage.
        num_classes: K.
    """

    def __init__(self, blocks: Sequence[int], num_classes: int) -> None:
        super().__init__()
        channels = 128
        *convs, bn, relu, pool = deep_stem(64, channels, nn.MaxPool2d(3, 2, padding=1)).values()
        self.conv1 = nn.Sequential(*convs)
        self.bn1 = bn
        self.relu = relu
        self.maxpool = pool
        stages = []
        for i, num_blocks in enumerate(blocks):
            stages.append(_stage(channels, 64 * 2**i, num_blocks, 1 if i == 0 else 2))
            channels = 4 * 64 * 2**i
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    @property
    def stages(self) -> list[nn.Module]:
        return [self.layer1, self.layer2, self.layer3, self.layer4]

    @property
    def classifier_name(self) -> str:
        return "fc"

    def stem(self, images_BCHW: Tensor) -> Tensor:
        return self.maxpool(self.relu(self.bn1(self.conv1(images_BCHW))))

    def tail(self, features_BCHW: Tensor) -> Tensor:
        return self.avgpool(features_BCHW).flatten(1)

    def classify(self, embedding_BD: Tensor) -> Tensor:
        return self.fc(embedding_BD)


def _stage(in_channels: int, planes: int, num_blocks: int, stride: int) -> nn.Sequential:
    """Stage of bottlenecks; the first pools by the stride and projects its shortcut: [B, in, H, W] -> [B, 4p, ...]."""
    # the pool of the first stage does nothing, but shifts the names of the shortcut by one
    pooled = nn.AvgPool2d(stride, stride, ceil_mode=True, count_include_pad=False)
    shortcut = nn.Sequential(pooled, *conv_bn(in_channels, 4 * planes, 1))
    pool = nn.AvgPool2d(3, stride, padding=1) if stride > 1 else nn.Identity()
    stage = nn.Sequential(SplitAttentionBottleneck(in_channels, planes, planes, 1, pool, shortcut))
    for _ in range(num_blocks - 1):
        stage.append(SplitAttentionBottleneck(4 * planes, planes, planes, 1, nn.Identity(), nn.Identity()))
    return stage


def build(request: BackboneRequest) -> nn.Module:
    """A ResNeSt."""
    return ResNeSt(_BLOCKS[request.arch], request.num_classes)


for _name in _BLOCKS:
    backbones.add(_name, Backbone(build=build, family="resnest", split_factors={LARGE: (1,)}))

"""Split attention and its bottleneck, shared by ResNeSt and ResNeXSt (Zhang et al., arXiv:2004.08955)."""

from torch import Tensor, nn
from torch.nn import functional as F

from model.layers.resnet_parts import conv_bn

RADIX = 2  # R, number of slabs among which every channel chooses
REDUCTION = 4


class SplitAttentionConv(nn.Module):
    """3x3 convolution to R slabs of w channels, and their sum weighted by attention over the slabs.

    Args:
        channels: w, of input and output.
        groups: cardinality g; divides w.
    """

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.groups = groups
        hidden = max(channels * RADIX // REDUCTION, 32)
        self.conv, self.bn0 = conv_bn(channels, RADIX * channels, 3, groups=groups * RADIX)
        self.fc1 = nn.Conv2d(channels, hidden, 1, groups=groups)
        self.bn1 = nn.BatchNorm2d(hidden)
        self.fc2 = nn.Conv2d(hidden, RADIX * channels, 1, groups=groups)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, features_BCHW: Tensor) -> Tensor:
        """[B, w, H, W] -> the same shape."""
        slabs_BRCHW = self.relu(self.bn0(self.conv(features_BCHW))).unflatten(1, (RADIX, -1))
        pooled = F.adaptive_avg_pool2d(slabs_BRCHW.sum(dim=1), 1)
        scores = self.fc2(self.relu(self.bn1(self.fc1(pooled))))
        # fc2 orders its output (group, slab, channel of the group); the slabs are (slab, channel)
        scores_BRGC = scores.flatten(1).unflatten(1, (self.groups, RADIX, -1)).transpose(1, 2)
        weights_BRC11 = scores_BRGC.softmax(dim=1).flatten(2)[..., None, None]
        return (slabs_BRCHW * weights_BRC11.to(slabs_BRCHW.dtype)).sum(dim=1)


class SplitAttentionBottleneck(nn.Module):
    """conv1x1, split-attention 3x3, pool, conv1x1 to 4 planes, plus the shortcut; post-activation.

    Args:
        in_channels: channels of the input map.
        planes: p of the stage; the output has 4p channels.
        width: w, channels of the split-attention convolution.
        groups: its cardinality.
        pool: what follows it: the block's stride, or the identity.
        shortcut: maps the input to the output's shape.
    """

    def __init__(
        self, in_channels: int, planes: int, width: int, groups: int, pool: nn.Module, shortcut: nn.Module
    ) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv_bn(in_channels, width, 1)
        self.conv2 = SplitAttentionConv(width, groups)
        self.pool = pool
        self.conv3, self.bn3 = conv_bn(width, 4 * planes, 1)
        self.downsample = shortcut
        self.relu = nn.ReLU(inplace=True)

    def forward(self, features_BCHW: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, 4p, ~H/stride, ~W/stride]."""
        branch = self.relu(self.bn1(self.conv1(features_BCHW)))
        branch = self.bn3(self.conv3(self.pool(self.conv2(branch))))
        return self.relu(branch + self.downsample(features_BCHW))

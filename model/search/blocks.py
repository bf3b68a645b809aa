"""The blocks of Cream's networks (Peng et al., NeurIPS 2020), shared by the supernet and the stand-alone network."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from model.search.costs import BlockPlan, FramePlan, reduced_channels
from model.staged import StagedBackbone


def _conv(in_channels: int, out_channels: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, kernel, stride, kernel // 2, groups=groups, bias=False)


class SqueezeExcite(nn.Module):
    """Channel gate: [B, C, H, W] -> [B, C, H, W] times relu6(z + 3) / 6 in [0, 1], z from the spatial mean."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        reduced = reduced_channels(channels)
        self.conv_reduce = nn.Conv2d(channels, reduced, 1)
        self.conv_expand = nn.Conv2d(reduced, channels, 1)

    def forward(self, features_BCHW: Tensor) -> Tensor:
        gate = self.conv_expand(F.relu(self.conv_reduce(features_BCHW.mean((2, 3), keepdim=True))))
        return features_BCHW * F.hardsigmoid(gate)


class InvertedResidual(nn.Module):
    """1x1 -> BN -> Swish -> depthwise -> BN -> Swish -> gate -> 1x1 -> BN, plus the input where shapes allow."""

    def __init__(self, plan: BlockPlan) -> None:
        super().__init__()
        mid = plan.mid_channels
        self.has_shortcut = plan.has_shortcut
        self.conv_pw, self.bn1 = _conv(plan.in_channels, mid, 1), nn.BatchNorm2d(mid)
        self.conv_dw, self.bn2 = _conv(mid, mid, plan.kernel, plan.stride, groups=mid), nn.BatchNorm2d(mid)
        self.se = SqueezeExcite(mid)
        self.conv_pwl, self.bn3 = _conv(mid, plan.out_channels, 1), nn.BatchNorm2d(plan.out_channels)

    def forward(self, features_BCHW: Tensor) -> Tensor:
        branch = F.silu(self.bn1(self.conv_pw(features_BCHW)))
        branch = self.se(F.silu(self.bn2(self.conv_dw(branch))))
        branch = self.bn3(self.conv_pwl(branch))
        return branch + features_BCHW if self.has_shortcut else branch


class DepthwiseSeparable(nn.Module):
    """Stage 0: depthwise 3x3 -> BN -> Swish -> gate -> 1x1 -> BN, plus the input where the width stays."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.has_shortcut = in_channels == out_channels
        self.conv_dw, self.bn1 = _conv(in_channels, in_channels, 3, groups=in_channels), nn.BatchNorm2d(in_channels)
        self.se = SqueezeExcite(in_channels)
        self.conv_pw, self.bn2 = _conv(in_channels, out_channels, 1), nn.BatchNorm2d(out_channels)

    def forward(self, features_BCHW: Tensor) -> Tensor:
        branch = self.se(F.silu(self.bn1(self.conv_dw(features_BCHW))))
        branch = self.bn2(self.conv_pw(branch))
        return branch + features_BCHW if self.has_shortcut else branch


class ConvBnSwish(nn.Module):
    """Last stage: 1x1 -> BN -> Swish."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv, self.bn1 = _conv(in_channels, out_channels, 1), nn.BatchNorm2d(out_channels)

    def forward(self, features_BCHW: Tensor) -> Tensor:
        return F.silu(self.bn1(self.conv(features_BCHW)))


def _average(features_BCHW: Tensor) -> Tensor:
    return features_BCHW.mean((2, 3), keepdim=True)


def _largest(features_BCHW: Tensor) -> Tensor:
    return features_BCHW.amax((2, 3), keepdim=True)


POOLS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "avg": _average,
    "max": _largest,
    "avgmax": lambda features_BCHW: 0.5 * (_average(features_BCHW) + _largest(features_BCHW)),
}


class CreamFrame(StagedBackbone):
    """What the supernet and the stand-alone network have in common: stem, head and classifier.

    Parts are registered in the order of the released files: stem, `blocks`, head, classifier.

    Args:
        plan: widths and stem stride.
        num_classes: K.
        blocks: what lies between stem and head.
        dropout: rate before the classifier.
        global_pool: a key of `POOLS`; avgmax is the mean of both.
    """

    classifier_name = "classifier"

    blocks: Any

    def __init__(
        self, plan: FramePlan, num_classes: int, *, blocks: nn.ModuleList, dropout: float, global_pool: str
    ) -> None:
        super().__init__()
        self.global_pool = global_pool
        self.conv_stem = _conv(3, plan.stem_channels, 3, plan.stem_stride)
        self.bn1 = nn.BatchNorm2d(plan.stem_channels)
        self.blocks = blocks
        self.conv_head = nn.Conv2d(plan.tail_channels, plan.head_channels, 1)
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(plan.head_channels, num_classes)

    def stem(self, images_BCHW: Tensor) -> Tensor:
        """Images [B, 3, H, W] -> the map that stage 0 takes."""
        return F.silu(self.bn1(self.conv_stem(images_BCHW)))

    def tail(self, features_BCHW: Tensor) -> Tensor:
        """The last stage's map -> embedding [B, D]; the head convolution comes after the pool."""
        return F.silu(self.conv_head(POOLS[self.global_pool](features_BCHW))).flatten(1)

    def classify(self, embedding_BD: Tensor) -> Tensor:
        """Embedding [B, D] -> logits [B, K]."""
        return self.classifier(self.dropout(embedding_BD))


def init_cream(network: nn.Module) -> None:
    """The published initialisation: convolutions N(0, 2 / (k k out / groups)), linear layers U(+-1/sqrt(out)).

    The uniform range depends on the OUTPUT features; biases are 0, batch norms 1 and 0.
    """
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels // module.groups
            nn.init.normal_(module.weight, 0.0, math.sqrt(2.0 / fan_out))
        elif isinstance(module, nn.Linear):
            bound = 1.0 / math.sqrt(module.out_features)
            nn.init.uniform_(module.weight, -bound, bound)
        else:
            continue
        if module.bias is not None:
            nn.init.zeros_(module.bias)

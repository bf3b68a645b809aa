"""The pre-activation wide residual network for CIFAR (Zagoruyko and Komodakis, arXiv:1605.07146). Undivided.

One network with two initialisations: `wrn_D_K` as trained for deeply-supervised synergy (arXiv:1906.00675) and
`wrn_D_K_cifar` as for layer-wise mutual contrastive learning (arXiv:2207.11518). The `wide_resnet*` family of the
division tables is post-activation.
"""

from functools import partial

from torch import Tensor, nn

from model.layers.resnet_parts import make_stage
from model.options import WrnOptions
from model.registry import SMALL, Backbone, BackboneRequest, backbones, family_options
from model.staged import StagedBackbone


class PreActivationBlock(nn.Module):
    """BN-ReLU-conv3x3 (stride)-BN-ReLU-[dropout]-conv3x3, plus shortcut.

    The shortcut is the raw input, or a strided conv1x1 of the first BN-ReLU's output where the width changes.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1, *, dropout: float = 0.0) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.dropout = nn.Dropout(dropout) if dropout > 0 else nn.Identity()
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut = None
        if in_channels != out_channels:
            self.shortcut = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)

    def forward(self, features_BCHW: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C', ~H/stride, ~W/stride]."""
        activated = self.relu(self.bn1(features_BCHW))
        shortcut = features_BCHW if self.shortcut is None else self.shortcut(activated)
        branch = self.relu(self.bn2(self.conv1(activated)))
        return self.conv2(self.dropout(branch)) + shortcut


class WideResNet(StagedBackbone):
    """conv3x3 without BN -> three groups of pre-activation blocks -> BN-ReLU -> global average pool -> linear layer.

    Args:
        depth: 6n + 4, with n blocks per group.
        widen_factor: k; the groups have 16k, 32k and 64k channels.
        num_classes: K.
        last_width: factor on the last group's width (2 in a branch of DKS).
        dropout: rate inside the blocks.
    """

    def __init__(
        self, depth: int, widen_factor: int, num_classes: int, *, last_width: int = 1, dropout: float = 0.0
    ) -> None:
        super().__init__()
        if depth < 10 or (depth - 4) % 6:
            raise ValueError(f"a WRN's depth is 6n + 4 with n >= 1 (10, 16, 22, 28, ...), got {depth}")
        blocks = (depth - 4) // 6
        block = partial(PreActivationBlock, dropout=dropout)
        widths = (16 * widen_factor, 32 * widen_factor, last_width * 64 * widen_factor)
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.layer1 = make_stage(partial(block, out_channels=widths[0]), 16, widths[0], blocks, 1)
        self.layer2 = make_stage(partial(block, out_channels=widths[1]), widths[0], widths[1], blocks, 2)
        self.layer3 = make_stage(partial(block, out_channels=widths[2]), widths[1], widths[2], blocks, 2)
        self.bn = nn.BatchNorm2d(widths[2])
        self.relu = nn.ReLU(inplace=True)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(widths[2], num_classes)

    @property
    def stages(self) -> list[nn.Module]:
        return [self.layer1, self.layer2, self.layer3]

    @property
    def classifier_name(self) -> str:
        return "fc"

    def stem(self, images_BCHW: Tensor) -> Tensor:
        return self.conv1(images_BCHW)

    def tail(self, features_BCHW: Tensor) -> Tensor:
        return self.avgpool(self.relu(self.bn(features_BCHW))).flatten(1)

    def classify(self, embedding_BD: Tensor) -> Tensor:
        return self.fc(embedding_BD)

    def halved_depth(self) -> int:
        if len(self.layer3) < 2:
            raise ValueError("it has one block per group, and a WRN of depth 16 or more has two")
        return super().halved_depth()


def _build(depth: int, widen_factor: int, last_width: int, fan_in: bool, request: BackboneRequest) -> WideResNet:
    options = family_options(WrnOptions, request)
    network = WideResNet(depth, widen_factor, request.num_classes, last_width=last_width, dropout=options.wrn_dropout)
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_in" if fan_in else "fan_out", nonlinearity="relu")
    if fan_in:
        nn.init.kaiming_normal_(network.fc.weight, mode="fan_in", nonlinearity="relu")
    nn.init.zeros_(network.fc.bias)
    return network


def _register(name: str, depth: int, widen_factor: int, fan_in: bool) -> None:
    backbones.add(
        name,
        Backbone(
            build=partial(_build, depth, widen_factor, 1, fan_in),
            build_wide=partial(_build, depth, widen_factor, 2, fan_in),
            family="wrn",
            split_factors={SMALL: (1,)},
            options=WrnOptions,
        ),
    )


for _depth in (10, 16, 22, 28, 40):
    for _widen_factor in (1, 2, 4, 8, 10):
        _register(f"wrn_{_depth}_{_widen_factor}", _depth, _widen_factor, fan_in=True)
for _depth, _widen_factor in ((16, 2), (40, 2), (28, 4)):
    _register(f"wrn_{_depth}_{_widen_factor}_cifar", _depth, _widen_factor, fan_in=False)

"""SE-ResNet, SE-ResNeXt and SENet (Hu et al., arXiv:1709.01507), divided as in Zhao et al., arXiv:2011.14660."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from torch import Tensor, nn
from torch.nn import functional as F

from model.division import (
    SE_RESNET_WIDTHS,
    bottleneck_width,
    divided_groups,
    divided_rate,
    group_splits,
    senet_widths,
)
from model.layers.random import RandomScale
from model.layers.resnet_parts import (
    ResNetSkeleton,
    cifar_stem,
    conv_bn,
    deep_stem,
    init_resnet,
    make_stage,
    projection_shortcut,
)
from model.layers.squeeze_excitation import SqueezeExcitation
from model.registry import LARGE, SMALL, Backbone, BackboneRequest, backbones


def dropblock_gamma(drop_prob: float, block_size: int, height: int, width: int) -> float:
    """Probability that an activation is the seed of a dropped block: p H W / bs^2 / ((W - bs + 1)(H - bs + 1)).

    Args:
        drop_prob: p, share of the activations to drop (up to overlaps).
        block_size: bs, side of a block, at most the smaller side of the map.
        height, width: H and W of the map.
    """
    return drop_prob * height * width / block_size**2 / ((width - block_size + 1) * (height - block_size + 1))


class DropBlock(RandomScale):
    """Zeroes blocks of each channel of each image in training, and rescales the rest by (all / kept) over the batch.

    Ghiasi et al., arXiv:1810.12890. As in the published networks, seeds fall anywhere on the map (blocks are cut off
    at its border) and p is not scheduled. A block larger than the map is shrunk to it. Evaluation: identity.

    Args:
        drop_prob: p.
        block_size: side of a block in cells of the map, odd or even.
    """

    def __init__(self, drop_prob: float, block_size: int) -> None:
        super().__init__()
        self.drop_prob = drop_prob
        self.block_size = block_size

    @property
    def is_random(self) -> bool:
        return self.training and self.drop_prob > 0

    def draw(self, features: Tensor) -> tuple[Tensor, ...]:
        """Factor of each activation, float32 [B, C, H, W]: 0 where it is dropped, elsewhere all / kept."""
        kept = self.keep(features)
        # float32 counts: bfloat16 cannot sum a mask
        return (kept * (kept.numel() / kept.sum().clamp(min=1)),)

    def keep(self, features: Tensor) -> Tensor:
        """Mask of the kept activations, float32 [B, C, H, W]: 1 kept, 0 dropped."""
        height, width = features.shape[-2:]
        size = min(self.block_size, height, width)
        gamma = dropblock_gamma(self.drop_prob, size, height, width)
        seeds = (self.uniform(features.shape, features.device) < gamma).float()
        # an even block gives one row and one column too many
        dropped = F.max_pool2d(seeds, size, stride=1, padding=size // 2)[..., :height, :width]
        return 1 - dropped

    def extra_repr(self) -> str:
        return f"drop_prob={self.drop_prob:.4g}, block_size={self.block_size}"


@dataclass(frozen=True, kw_only=True)
class _Arch:
    """One row of the family's table.

    Attributes:
        blocks: per stage.
        shape: SMALL or LARGE.
        groups: G before division.
        base_width: b of a ResNeXt bottleneck.
        is_senet: SENet's two inner widths instead of one.
        wide_stem: the third stem convolution doubles the channels.
        conv_shortcut: stride-2 shortcuts are one 3x3 convolution instead of pool and 1x1.
        drop_block: DropBlock in stages 3 and 4.
    """

    blocks: tuple[int, ...]
    shape: str = LARGE
    groups: int = 1
    base_width: int = 64
    is_senet: bool = False
    wide_stem: bool = False
    conv_shortcut: bool = False
    drop_block: bool = False


_ARCHS = {
    "se_resnet50": _Arch(blocks=(3, 4, 6, 3)),
    "se_resnet50_B": _Arch(blocks=(3, 4, 6, 3), drop_block=True),
    "se_resnet101": _Arch(blocks=(3, 4, 23, 3)),
    "se_resnet152": _Arch(blocks=(3, 8, 36, 3)),
    "se_resnet110": _Arch(blocks=(12, 12, 12), shape=SMALL),
    "se_resnet164": _Arch(blocks=(18, 18, 18), shape=SMALL),
    "se_resnext101_64x4d": _Arch(blocks=(3, 4, 23, 3), groups=64, base_width=4),
    # the published options of its block drop switch nothing on: only the stem differs
    "se_resnext101_64x4d_B": _Arch(blocks=(3, 4, 23, 3), groups=64, base_width=4, wide_stem=True),
    "senet154": _Arch(blocks=(3, 8, 36, 3), groups=64, is_senet=True, wide_stem=True, conv_shortcut=True),
    "senet113": _Arch(blocks=(3, 8, 23, 3), groups=64, is_senet=True, wide_stem=True),
}


class SEBottleneck(nn.Module):
    """conv1x1, conv3x3 (stride, groups), conv1x1 to 4 planes, squeeze-and-excitation, plus the shortcut.

    Args:
        in_channels: channels of the input map.
        stride: of the 3x3 convolution.
        planes: p of the stage; the output has 4p channels.
        widths: output channels of the first two convolutions.
        groups: of the 3x3 convolution.
        reduction: r of the squeeze-and-excitation unit.
        conv_shortcut: a stride-2 shortcut is one 3x3 convolution.
        make_drop: makes what is applied after each batch norm.
    """

    def __init__(
        self,
        in_channels: int,
        stride: int,
        *,
        planes: int,
        widths: tuple[int, int],
        groups: int,
        reduction: int,
        conv_shortcut: bool,
        make_drop: Callable[[], nn.Module],
    ) -> None:
        super().__init__()
        out_channels = 4 * planes
        self.conv1, self.bn1 = conv_bn(in_channels, widths[0], 1)
        self.conv2, self.bn2 = conv_bn(widths[0], widths[1], 3, stride, groups)
        self.conv3, self.bn3 = conv_bn(widths[1], out_channels, 1)
        self.se_module = SqueezeExcitation(out_channels, out_channels // reduction)
        if conv_shortcut and stride == 2:
            self.downsample: nn.Module = nn.Sequential(*conv_bn(in_channels, out_channels, 3, stride))
        else:
            self.downsample = projection_shortcut(in_channels, out_channels, stride)
        # one each: a layer draws the same numbers whenever it is met under one key
        self.drop1, self.drop2, self.drop3 = make_drop(), make_drop(), make_drop()
        self.relu = nn.ReLU(inplace=True)

    def forward(self, features_BCHW: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, 4p, ~H/stride, ~W/stride]."""
        branch = self.relu(self.drop1(self.bn1(self.conv1(features_BCHW))))
        branch = self.relu(self.drop2(self.bn2(self.conv2(branch))))
        branch = self.se_module(self.drop3(self.bn3(self.conv3(branch))))
        return self.relu(branch + self.downsample(features_BCHW))


def build(request: BackboneRequest) -> nn.Module:
    """One of the S networks of an SE-ResNet, SE-ResNeXt or SENet."""
    arch, split_factor = _ARCHS[request.arch], request.split_factor
    if arch.groups == 1:
        groups, width = 1, SE_RESNET_WIDTHS[arch.shape][split_factor]
    else:
        groups, width = divided_groups(arch.groups, split_factor), 64
    if arch.shape == SMALL:
        channels = width
        stem = nn.Sequential(cifar_stem(width))
    else:
        channels = 2 * width if arch.wide_stem else width
        stem = nn.Sequential(deep_stem(width, channels, nn.MaxPool2d(3, 2, ceil_mode=True)))

    stages = []
    for i, depth in enumerate(arch.blocks):
        planes = width * 2**i
        if arch.is_senet:
            widths = senet_widths(planes, groups)
        else:
            widths = (bottleneck_width(planes, arch.base_width, groups),) * 2
        block = partial(
            SEBottleneck,
            planes=planes,
            widths=widths,
            groups=groups,
            reduction=4 if arch.shape == SMALL else 16,
            conv_shortcut=arch.conv_shortcut,
            make_drop=partial(_drop_block, request) if arch.drop_block and i >= 2 else nn.Identity,
        )
        stages.append(make_stage(block, channels, 4 * planes, depth, 1 if i == 0 else 2))
        channels = 4 * planes
    network = ResNetSkeleton(
        stem,
        stages,
        num_features=channels,
        num_classes=request.num_classes,
        dropout=divided_rate(0.2, split_factor) if arch.shape == LARGE else 0.0,
        classifier_name="last_linear",
    )
    init_resnet(network)
    return network


def _drop_block(request: BackboneRequest) -> DropBlock:
    """DropBlock of se_resnet50_B; blocks of 3 cells at 224 pixels, in proportion elsewhere, never none."""
    return DropBlock(divided_rate(0.1, request.split_factor), max(1, int(3 * request.crop_size / 224)))


for _name, _arch in _ARCHS.items():
    _splits = tuple(SE_RESNET_WIDTHS[_arch.shape]) if _arch.groups == 1 else group_splits(_arch.groups)
    backbones.add(_name, Backbone(build=build, family="senet", split_factors={_arch.shape: _splits}))

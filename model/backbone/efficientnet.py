"""EfficientNet (Tan & Le, arXiv:1905.11946), divided as in Zhao et al., arXiv:2011.14660.

Two published implementations: "LightNet++" (the default; small images too) pads symmetrically and drops channels of
the residual branches, "lukemelas" (the released ImageNet weights) pads like TensorFlow and does not.
"""

import math
from collections import OrderedDict
from collections.abc import Collection
from functools import partial
from typing import NamedTuple

from torch import Tensor, nn
from torch.nn import functional as F

from model.division import EFFICIENTNET_CHANNELS, divided_rate, efficientnet_channels
from model.layers.squeeze_excitation import squeeze_excite
from model.options import EfficientNetOptions
from model.registry import LARGE, SMALL, Backbone, BackboneRequest, backbones, family_options
from model.staged import StagedBackbone
from utils.errors import UserError


class Coefficients(NamedTuple):
    """Compound scaling: width, depth, image side in pixels, classifier dropout before division."""

    width: float
    depth: float
    image_size: int
    dropout: float


COEFFICIENTS = {
    "efficientnetb0": Coefficients(1.0, 1.0, 224, 0.2),
    "efficientnetb1": Coefficients(1.0, 1.1, 240, 0.2),
    "efficientnetb2": Coefficients(1.1, 1.2, 260, 0.3),
    "efficientnetb3": Coefficients(1.2, 1.4, 300, 0.3),
    "efficientnetb4": Coefficients(1.4, 1.8, 380, 0.4),
    "efficientnetb5": Coefficients(1.6, 2.2, 456, 0.4),
    "efficientnetb6": Coefficients(1.8, 2.6, 528, 0.5),
    "efficientnetb7": Coefficients(2.0, 3.1, 600, 0.5),
    "efficientnetb8": Coefficients(2.2, 3.6, 672, 0.5),
    "efficientnetl2": Coefficients(4.3, 5.3, 800, 0.5),
}
_LARGE_ONLY = ("efficientnetb8", "efficientnetl2")

# Of the seven stages, at depth coefficient 1.
_EXPANSIONS = (1, 6, 6, 6, 6, 6, 6)
_KERNEL_SIZES = (3, 3, 5, 3, 5, 5, 3)
_REPEATS = (1, 2, 2, 3, 3, 4, 1)
_STRIDES = {LARGE: (1, 2, 2, 2, 1, 2, 1), SMALL: (1, 2, 1, 2, 1, 1, 1)}
_STEM_STRIDE = {LARGE: 2, SMALL: 1}


class BlockSpec(NamedTuple):
    """One MBConv block: channels in and out, expansion ratio, kernel size and stride of the depthwise convolution."""

    in_channels: int
    out_channels: int
    expansion: int
    kernel_size: int
    stride: int

    @property
    def is_residual(self) -> bool:
        """Whether the block's input is added to its output."""
        return self.stride == 1 and self.in_channels == self.out_channels

    @property
    def squeezed(self) -> int:
        """Width of the squeeze-and-excitation bottleneck: a quarter of the block's input, not of its expansion."""
        return max(1, self.in_channels // 4)


class Structure(NamedTuple):
    """What both implementations build: channels of stem and head, stride of the stem, blocks of the seven stages."""

    stem: int
    stem_stride: int
    stages: list[list[BlockSpec]]
    head: int


def efficientnet_structure(width: float, depth: float, split_factor: int, shape: str) -> Structure:
    """Structure of one of S networks; depth is not divided, repeats are ceil(depth * repeats)."""
    stem, *widths, head = efficientnet_channels(width, split_factor)
    stages = []
    in_channels = stem
    for j, out_channels in enumerate(widths):
        stage = []
        for i in range(math.ceil(depth * _REPEATS[j])):
            stride = _STRIDES[shape][j] if i == 0 else 1
            stage.append(BlockSpec(in_channels, out_channels, _EXPANSIONS[j], _KERNEL_SIZES[j], stride))
            in_channels = out_channels
        stages.append(stage)
    return Structure(stem, _STEM_STRIDE[shape], stages, head)


class Swish(nn.Module):
    """x * sigmoid(x) by its definition; autograd keeps x and the sigmoid, where nn.SiLU keeps x."""

    def forward(self, features: Tensor) -> Tensor:
        """Any shape -> the same shape."""
        return features * features.sigmoid()


_norm = partial(nn.BatchNorm2d, eps=1e-3, momentum=0.01)


def _conv_norm(
    in_channels: int, out_channels: int, kernel_size: int, stride: int = 1, groups: int = 1
) -> "OrderedDict[str, nn.Module]":
    """Bias-free convolution with symmetric padding, and batch norm; LightNet++ calls them conv and norm."""
    padding = (kernel_size - 1) // 2
    conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, groups=groups, bias=False)
    return OrderedDict(conv=conv, norm=_norm(out_channels))


# ---- LightNet++ ------------------------------------------------------------------------------------------------------


class ConvNormSwish(nn.Module):
    """Convolution, batch norm, swish: [B, C, H, W] -> [B, out, ~H/stride, ~W/stride]; arguments of `_conv_norm`."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int, swish: nn.Module, stride: int = 1, groups: int = 1
    ) -> None:
        super().__init__()
        parts = _conv_norm(in_channels, out_channels, kernel_size, stride, groups)
        self.conv_block = nn.Sequential(OrderedDict(**parts, swish=swish))

    def forward(self, features_BCHW: Tensor) -> Tensor:
        return self.conv_block(features_BCHW)


class ChannelSE(nn.Module):
    """Squeeze-and-excitation of LightNet++: [B, C, H, W] -> the same shape."""

    def __init__(self, channels: int, hidden: int, swish: nn.Module) -> None:
        super().__init__()
        self.linear1 = nn.Conv2d(channels, hidden, 1)
        self.linear2 = nn.Conv2d(hidden, channels, 1)
        self.swish = swish

    def forward(self, features_BCHW: Tensor) -> Tensor:
        return squeeze_excite(features_BCHW, self.linear1, self.swish, self.linear2)


class LightNetBlock(nn.Module):
    """MBConv of LightNet++; a residual block drops whole channels of its branch in training.

    Args:
        spec: structure of the block.
        swish: activation.
        dropout: rate of the channel dropout.
    """

    def __init__(self, spec: BlockSpec, swish: nn.Module, dropout: float) -> None:
        super().__init__()
        channels = spec.in_channels * spec.expansion
        self.expansion = ConvNormSwish(spec.in_channels, channels, 1, swish) if spec.expansion > 1 else nn.Identity()
        self.depth_wise = ConvNormSwish(channels, channels, spec.kernel_size, swish, spec.stride, groups=channels)
        self.se_block = nn.Sequential(OrderedDict(channel_se=ChannelSE(channels, spec.squeezed, swish)))
        self.point_wise = nn.Sequential(_conv_norm(channels, spec.out_channels, 1))
        self.is_residual = spec.is_residual
        self.dropout = nn.Dropout2d(dropout)

    def forward(self, features_BCHW: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, out, ~H/stride, ~W/stride]."""
        branch = self.depth_wise(self.expansion(features_BCHW))
        branch = self.point_wise(self.se_block(branch))
        return features_BCHW + self.dropout(branch) if self.is_residual else branch


class LightNetEfficientNet(StagedBackbone):
    """EfficientNet as in LightNet++: `mod1` (stem), `mod2` ... `mod8` (stages), `last_feat`, `classifier`.

    Args:
        structure: from `efficientnet_structure`.
        num_classes: K.
        dropout: R, of the classifier; the channel dropout of stage j of n is R j / n.
        swish: activation.
    """

    def __init__(self, structure: Structure, num_classes: int, dropout: float, swish: nn.Module) -> None:
        super().__init__()
        self.mod1 = ConvNormSwish(3, structure.stem, 3, swish, structure.stem_stride)
        num_stages = len(structure.stages)
        self._stage_names = [f"mod{j + 1}" for j in range(1, num_stages + 1)]
        for j, (name, stage) in enumerate(zip(self._stage_names, structure.stages, strict=True), start=1):
            blocks = [LightNetBlock(spec, swish, dropout * j / num_stages) for spec in stage]
            self.add_module(name, nn.Sequential(OrderedDict((f"block{i}", b) for i, b in enumerate(blocks, start=1))))
        self.last_feat = ConvNormSwish(structure.stages[-1][-1].out_channels, structure.head, 1, swish)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(structure.head, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, nn.Linear):
                nn.init.uniform_(module.weight, -(num_classes**-0.5), num_classes**-0.5)
            else:
                continue
            if module.bias is not None:
                nn.init.zeros_(module.bias)

    @property
    def stages(self) -> list[nn.Module]:
        return [self.get_submodule(name) for name in self._stage_names]

    @property
    def classifier_name(self) -> str:
        return "classifier"

    def stem(self, images_BCHW: Tensor) -> Tensor:
        return self.mod1(images_BCHW)

    def tail(self, features_BCHW: Tensor) -> Tensor:
        return self.avgpool(self.last_feat(features_BCHW)).flatten(1)

    def classify(self, embedding_BD: Tensor) -> Tensor:
        return self.classifier(self.dropout(embedding_BD))


# ---- lukemelas -------------------------------------------------------------------------------------------------------


class SamePadConv2d(nn.Conv2d):
    """Bias-free convolution with TensorFlow's "SAME" padding for one nominal input size, whatever comes in.

    Args:
        in_channels, out_channels, kernel_size, stride, groups: as in nn.Conv2d.
        nominal_size: side of the square map that the padding is made for.
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int, stride: int, nominal_size: int, groups: int = 1
    ) -> None:
        out_size = math.ceil(nominal_size / stride)
        total = max((out_size - 1) * stride + kernel_size - nominal_size, 0)
        before, after = total // 2, total - total // 2
        padding = before if before == after else 0
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, groups=groups, bias=False)
        self.uneven_padding = None if before == after else (before, after, before, after)

    def forward(self, features_BCHW: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, out, ~H/stride, ~W/stride]."""
        if self.uneven_padding is not None:
            features_BCHW = F.pad(features_BCHW, self.uneven_padding)
        return super().forward(features_BCHW)


class LukemelasBlock(nn.Module):
    """MBConv of the lukemelas implementation; its drop-connect is off in the published networks and left out.

    Args:
        spec: structure of the block.
        swish: activation.
        nominal_size: side of the map that the depthwise convolution is padded for.
    """

    def __init__(self, spec: BlockSpec, swish: nn.Module, nominal_size: int) -> None:
        super().__init__()
        channels = spec.in_channels * spec.expansion
        self.has_expansion = spec.expansion > 1
        if self.has_expansion:
            self._expand_conv = nn.Conv2d(spec.in_channels, channels, 1, bias=False)
            self._bn0 = _norm(channels)
        self._depthwise_conv = SamePadConv2d(
            channels, channels, spec.kernel_size, spec.stride, nominal_size, groups=channels
        )
        self._bn1 = _norm(channels)
        self._se_reduce = nn.Conv2d(channels, spec.squeezed, 1)
        self._se_expand = nn.Conv2d(spec.squeezed, channels, 1)
        self._project_conv = nn.Conv2d(channels, spec.out_channels, 1, bias=False)
        self._bn2 = _norm(spec.out_channels)
        self.swish = swish
        self.is_residual = spec.is_residual

    def forward(self, features_BCHW: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, out, ~H/stride, ~W/stride]."""
        branch = features_BCHW
        if self.has_expansion:
            branch = self.swish(self._bn0(self._expand_conv(branch)))
        branch = self.swish(self._bn1(self._depthwise_conv(branch)))
        branch = squeeze_excite(branch, self._se_reduce, self.swish, self._se_expand)
        branch = self._bn2(self._project_conv(branch))
        return features_BCHW + branch if self.is_residual else branch


class LukemelasEfficientNet(StagedBackbone):
    """EfficientNet as in the lukemelas package: all blocks in one flat `_blocks`; default initialisation.

    Args:
        structure: from `efficientnet_structure`.
        num_classes: K.
        dropout: of the classifier.
        swish: activation.
        nominal_size: side of the input that the paddings are made for.
    """

    def __init__(
        self, structure: Structure, num_classes: int, dropout: float, swish: nn.Module, nominal_size: int
    ) -> None:
        super().__init__()
        self._conv_stem = SamePadConv2d(3, structure.stem, 3, structure.stem_stride, nominal_size)
        self._bn0 = _norm(structure.stem)
        size = math.ceil(nominal_size / structure.stem_stride)
        self._stages: list[nn.Module] = []  # in a list, because `_blocks` registers the blocks
        for specs in structure.stages:
            stage = nn.Sequential()
            for spec in specs:
                stage.append(LukemelasBlock(spec, swish, size))
                size = math.ceil(size / spec.stride)
            self._stages.append(stage)
        self._blocks = nn.ModuleList(block for stage in self._stages for block in stage.children())
        self._conv_head = nn.Conv2d(structure.stages[-1][-1].out_channels, structure.head, 1, bias=False)
        self._bn1 = _norm(structure.head)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.dropout = nn.Dropout(dropout)
        self._fc = nn.Linear(structure.head, num_classes)
        self.swish = swish

    @property
    def stages(self) -> list[nn.Module]:
        return self._stages

    @property
    def classifier_name(self) -> str:
        return "_fc"

    def stem(self, images_BCHW: Tensor) -> Tensor:
        return self.swish(self._bn0(self._conv_stem(images_BCHW)))

    def tail(self, features_BCHW: Tensor) -> Tensor:
        return self.avgpool(self.swish(self._bn1(self._conv_head(features_BCHW)))).flatten(1)

    def classify(self, embedding_BD: Tensor) -> Tensor:
        return self._fc(self.dropout(embedding_BD))


def build(request: BackboneRequest) -> nn.Module:
    """One of the S networks of an EfficientNet.

    Raises:
        UserError: the lukemelas implementation was asked for and the images are small.
    """
    options = family_options(EfficientNetOptions, request)
    width, depth, image_size, dropout = COEFFICIENTS[request.arch]
    structure = efficientnet_structure(width, depth, request.split_factor, request.shape)
    dropout = divided_rate(dropout, request.split_factor)
    swish = nn.SiLU() if options.is_memory_efficient_swish else Swish()
    if not options.is_lukemelas_efficientnet:
        return LightNetEfficientNet(structure, request.num_classes, dropout, swish)
    if request.shape != LARGE:
        raise UserError(
            f"--is_lukemelas_efficientnet 1 exists for large images only, and --dataset {request.dataset} "
            f"(--crop_size {request.crop_size}) has small ones. Pass --is_lukemelas_efficientnet 0."
        )
    nominal_size = request.crop_size if options.is_efficientnet_user_crop else image_size
    return LukemelasEfficientNet(structure, request.num_classes, dropout, swish, nominal_size)


def options_in(names: Collection[str]) -> dict[str, bool]:
    """Which implementation has tensors of these names."""
    return {"is_lukemelas_efficientnet": "_conv_stem.weight" in names}


_splits = tuple(EFFICIENTNET_CHANNELS)
for _name, _coefficients in COEFFICIENTS.items():
    backbones.add(
        _name,
        Backbone(
            build=build,
            family="efficientnet",
            split_factors={LARGE: _splits} if _name in _LARGE_ONLY else {LARGE: _splits, SMALL: _splits},
            options=EfficientNetOptions,
            options_in=options_in,
            crop_size=_coefficients.image_size,
        ),
    )

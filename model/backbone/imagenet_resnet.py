"""The plain ResNet with torchvision's structure and names (He et al., arXiv:1512.03385, stride on the 3x3: "v1.5").

Undivided: it is the baseline of deeply-supervised synergy (arXiv:1906.00675) and of layer-wise mutual contrastive
learning (arXiv:2207.11518) on ImageNet. torchvision's weights load.
"""

from collections.abc import Callable, Sequence
from functools import partial

from torch import Tensor, nn

from model.layers.resnet_parts import BasicBlock, Bottleneck, conv_bn, make_stage
from model.registry import LARGE, Backbone, BackboneRequest, backbones
from model.staged import StagedBackbone

_PLANES = (64, 128, 256, 512)


def strided_shortcut(in_channels: int, out_channels: int, stride: int) -> nn.Module:
    """Identity where the shape stays, else conv1x1 (stride) -> BN."""
    if stride == 1 and in_channels == out_channels:
        return nn.Identity()
    return nn.Sequential(*conv_bn(in_channels, out_channels, 1, stride))


class PlainBasicBlock(BasicBlock):
    """The basic block with a strided shortcut."""

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1) -> None:
        super().__init__(in_channels, out_channels, stride)
        self.downsample = strided_shortcut(in_channels, out_channels, stride)


class PlainBottleneck(Bottleneck):
    """The bottleneck (expansion 4) with a strided shortcut."""

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1) -> None:
        super().__init__(in_channels, out_channels // 4, out_channels, stride)
        self.downsample = strided_shortcut(in_channels, out_channels, stride)


class PlainResNet(StagedBackbone):
    """Stem -> `layer1` ... `layerN` -> global average pool -> linear layer. Convolutions Kaiming normal (fan-out).

    Args:
        stem: its modules by name, images [B, 3, H, W] -> feature map of `planes[0]` channels.
        planes: of each stage; only the first stage keeps the size of the map.
        depths: blocks per stage.
        bottleneck: whether blocks are bottlenecks (4 x planes channels out) or basic ones.
        num_classes: K.
    """

    def __init__(
        self,
        stem: dict[str, nn.Module],
        planes: Sequence[int],
        depths: Sequence[int],
        *,
        bottleneck: bool,
        num_classes: int,
    ) -> None:
        super().__init__()
        self._stem_names = list(stem)
        for name, module in stem.items():
            self.add_module(name, module)
        self._stage_names = [f"layer{i}" for i in range(1, len(depths) + 1)]
        channels = planes[0]
        for i, (name, width, depth) in enumerate(zip(self._stage_names, planes, depths, strict=True)):
            out_channels = 4 * width if bottleneck else width
            block: Callable[..., nn.Module] = PlainBottleneck if bottleneck else PlainBasicBlock
            stage = make_stage(
                partial(block, out_channels=out_channels), channels, out_channels, depth, 1 if i == 0 else 2
            )
            self.add_module(name, stage)
            channels = out_channels
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    @property
    def stages(self) -> list[nn.Module]:
        return [self.get_submodule(name) for name in self._stage_names]

    @property
    def classifier_name(self) -> str:
        return "fc"

    def stem(self, images_BCHW: Tensor) -> Tensor:
        features = images_BCHW
        for name in self._stem_names:
            features = self.get_submodule(name)(features)
        return features

    def tail(self, features_BCHW: Tensor) -> Tensor:
        return self.avgpool(features_BCHW).flatten(1)

    def classify(self, embedding_BD: Tensor) -> Tensor:
        return self.fc(embedding_BD)


class ImageNetResNet(PlainResNet):
    """Four stages behind a 7x7 stride-2 convolution and a max-pool."""

    def __init__(self, planes: Sequence[int], depths: Sequence[int], *, bottleneck: bool, num_classes: int) -> None:
        stem = {
            "conv1": nn.Conv2d(3, planes[0], 7, stride=2, padding=3, bias=False),
            "bn1": nn.BatchNorm2d(planes[0]),
            "relu": nn.ReLU(inplace=True),
            "maxpool": nn.MaxPool2d(3, stride=2, padding=1),
        }
        super().__init__(stem, planes, depths, bottleneck=bottleneck, num_classes=num_classes)

    @property
    def exit_plan(self) -> tuple[tuple[int, int | None], ...]:
        return ((1, 1), (2, 1), (3, 1))


def _build(depths: Sequence[int], bottleneck: bool, last_width: int, request: BackboneRequest) -> ImageNetResNet:
    planes = (*_PLANES[:-1], last_width * _PLANES[-1])
    return ImageNetResNet(planes, depths, bottleneck=bottleneck, num_classes=request.num_classes)


for _depth, _depths, _bottleneck in (
    (18, (2, 2, 2, 2), False),
    (34, (3, 4, 6, 3), False),
    (50, (3, 4, 6, 3), True),
    (101, (3, 4, 23, 3), True),
    (152, (3, 8, 36, 3), True),
):
    backbones.add(
        f"resnet{_depth}_imagenet",
        Backbone(
            build=partial(_build, _depths, _bottleneck, 1),
            build_wide=partial(_build, _depths, _bottleneck, 2),
            family="imagenet_resnet",
            split_factors={LARGE: (1,)},
        ),
    )

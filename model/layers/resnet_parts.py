"""The skeleton that ResNet, SE-ResNet, SENet and ResNeXSt share: stems, projection shortcut, head, initialisation.

Structure: Zhao et al., arXiv:2011.14660, section 3.2 (deep stem and pooled shortcut after He et al., arXiv:1812.01187).
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence

from torch import Tensor, nn

from model.staged import StagedBackbone


def conv_bn(
    in_channels: int, out_channels: int, kernel_size: int, stride: int = 1, groups: int = 1
) -> tuple[nn.Conv2d, nn.BatchNorm2d]:
    """A bias-free convolution that keeps the size at stride 1 (odd kernels), and its batch norm."""
    conv = nn.Conv2d(
        in_channels, out_channels, kernel_size, stride, padding=(kernel_size - 1) // 2, groups=groups, bias=False
    )
    return conv, nn.BatchNorm2d(out_channels)


def deep_stem(width: int, out_width: int, pool: nn.Module) -> OrderedDict[str, nn.Module]:
    """ImageNet stem, three 3x3 convolutions and a stride-2 pool: [B, 3, H, W] -> [B, out_width, ~H/4, ~W/4].

    The parts are named conv1, bn1, relu1, ... relu3, pool, in order, for `nn.Sequential` to take with or without names.
    """
    parts: OrderedDict[str, nn.Module] = OrderedDict()
    channels = (3, width, width, out_width)
    for i, stride in enumerate((2, 1, 1)):
        parts[f"conv{i + 1}"], parts[f"bn{i + 1}"] = conv_bn(channels[i], channels[i + 1], 3, stride)
        parts[f"relu{i + 1}"] = nn.ReLU(inplace=True)
    parts["pool"] = pool
    return parts


def cifar_stem(width: int) -> OrderedDict[str, nn.Module]:
    """CIFAR stem, one 3x3 convolution: [B, 3, H, W] -> [B, width, H, W]; parts conv1, bn1, relu1."""
    conv, bn = conv_bn(3, width, 3)
    return OrderedDict(conv1=conv, bn1=bn, relu1=nn.ReLU(inplace=True))


def projection_shortcut(in_channels: int, out_channels: int, stride: int) -> nn.Module:
    """Shortcut of a residual block: identity where the shape stays, else (2x2 average pool ->) conv1x1 -> BN.

    State-dict names are 0 (conv) and 1 (BN) at stride 1, and 1 and 2 after the pool at stride 2.
    """
    if stride == 1 and in_channels == out_channels:
        return nn.Identity()
    conv, bn = conv_bn(in_channels, out_channels, 1)
    if stride == 1:
        return nn.Sequential(conv, bn)
    pool = nn.AvgPool2d(stride, stride, ceil_mode=True, count_include_pad=False)
    return nn.Sequential(pool, conv, bn)


class BasicBlock(nn.Module):
    """conv3x3 (stride) -> BN -> ReLU -> conv3x3 -> BN, plus shortcut, ReLU."""

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv_bn(in_channels, out_channels, 3, stride)
        self.conv2, self.bn2 = conv_bn(out_channels, out_channels, 3)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = projection_shortcut(in_channels, out_channels, stride)

    @property
    def last_bn(self) -> nn.BatchNorm2d:
        """The batch norm at the end of the residual branch."""
        return self.bn2

    def forward(self, features_BCHW: Tensor) -> Tensor:
        branch = self.relu(self.bn1(self.conv1(features_BCHW)))
        branch = self.bn2(self.conv2(branch))
        return self.relu(branch + self.downsample(features_BCHW))


class Bottleneck(nn.Module):
    """conv1x1 -> BN -> ReLU -> conv3x3 (stride, groups) -> BN -> ReLU -> conv1x1 -> BN, plus shortcut, ReLU."""

    def __init__(self, in_channels: int, width: int, out_channels: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv_bn(in_channels, width, 1)
        self.conv2, self.bn2 = conv_bn(width, width, 3, stride, groups)
        self.conv3, self.bn3 = conv_bn(width, out_channels, 1)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = projection_shortcut(in_channels, out_channels, stride)

    @property
    def last_bn(self) -> nn.BatchNorm2d:
        """The batch norm at the end of the residual branch."""
        return self.bn3

    def forward(self, features_BCHW: Tensor) -> Tensor:
        branch = self.relu(self.bn1(self.conv1(features_BCHW)))
        branch = self.relu(self.bn2(self.conv2(branch)))
        branch = self.bn3(self.conv3(branch))
        return self.relu(branch + self.downsample(features_BCHW))


def make_stage(
    make_block: Callable[..., nn.Module], in_channels: int, out_channels: int, depth: int, stride: int
) -> nn.Sequential:
    """`depth` blocks, each `make_block(in_channels, stride=...)`; only the first has a stride and new channels."""
    head = make_block(in_channels, stride=stride)
    return nn.Sequential(head, *(make_block(out_channels, stride=1) for _ in range(depth - 1)))


class ResNetSkeleton(StagedBackbone):
    """`layer0` (stem) -> `layer1` ... `layerN` (stages) -> global average pool -> dropout -> linear layer.

    Args:
        stem: images [B, 3, H, W] -> feature map.
        stages: N modules.
        num_features: channels of the last stage's map.
        num_classes: K.
        dropout: classifier dropout rate; 0 leaves it out.
        classifier_name: attribute and state-dict name of the linear layer.
    """

    def __init__(
        self,
        stem: nn.Module,
        stages: Sequence[nn.Module],
        *,
        num_features: int,
        num_classes: int,
        dropout: float = 0.0,
        classifier_name: str = "fc",
    ) -> None:
        super().__init__()
        self.layer0 = stem
        self._stage_names = [f"layer{i}" for i in range(1, len(stages) + 1)]
        for name, stage in zip(self._stage_names, stages, strict=True):
            self.add_module(name, stage)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.dropout = nn.Dropout(dropout) if dropout > 0 else nn.Identity()
        self._classifier_name = classifier_name
        self.add_module(classifier_name, nn.Linear(num_features, num_classes))

    @property
    def stages(self) -> list[nn.Module]:
        return [self.get_submodule(name) for name in self._stage_names]

    @property
    def classifier_name(self) -> str:
        return self._classifier_name

    def stem(self, images_BCHW: Tensor) -> Tensor:
        return self.layer0(images_BCHW)

    def tail(self, features_BCHW: Tensor) -> Tensor:
        return self.avgpool(features_BCHW).flatten(1)

    def classify(self, embedding_BD: Tensor) -> Tensor:
        return self.get_submodule(self._classifier_name)(self.dropout(embedding_BD))


def init_resnet(network: nn.Module) -> None:
    """Initialise in place: conv Kaiming normal (fan-out, ReLU gain), BN 1/0, linear normal std 1e-3, biases 0."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=1e-3)
        else:
            continue
        if module.bias is not None:
            nn.init.zeros_(module.bias)

"""DenseNet-BC-190 (Huang et al., arXiv:1608.06993), divided by its growth rate (Zhao et al., arXiv:2011.14660).

Two published implementations of one structure: "official" (the default) starts with BN and ReLU after the stem and
can apply ShakeDrop to the new features of each layer; "densenet3" has neither. Their state-dict names differ.
"""

from collections import OrderedDict
from collections.abc import Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from model.division import ANY_SPLIT, densenet_growth, densenet_shake_drop_rates
from model.layers.resnet_parts import conv_bn
from model.layers.shake import ShakeDrop
from model.options import DenseNetOptions
from model.registry import SMALL, Backbone, BackboneRequest, backbones, family_options
from model.staged import StagedBackbone

NUM_BLOCKS = 3
LAYERS_PER_BLOCK = 31


class DenseLayer(nn.Module):
    """BN, ReLU, conv1x1 to 4 q, BN, ReLU, conv3x3 to q, maybe ShakeDrop: the new features of all the old ones.

    Args:
        in_channels: channels of all earlier maps of the block together.
        growth: q.
        norm_name: name of the batch norms without their number, "norm" or "bn".
        drop_prob: ShakeDrop rate; 0 leaves it out.
        recompute: do not keep what BN, ReLU and conv1x1 need for the backward pass, compute it again there.
    """

    def __init__(self, in_channels: int, growth: int, norm_name: str, drop_prob: float, recompute: bool) -> None:
        super().__init__()
        self._norm_names = (f"{norm_name}1", f"{norm_name}2")
        self.add_module(self._norm_names[0], nn.BatchNorm2d(in_channels))
        self.conv1, norm2 = conv_bn(in_channels, 4 * growth, 1)
        self.add_module(self._norm_names[1], norm2)
        self.conv2 = nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False)
        self.relu = nn.ReLU(inplace=True)
        self.shake_drop = ShakeDrop(drop_prob) if drop_prob > 0 else nn.Identity()
        self.recompute = recompute

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Maps [B, C_i, H, W] of one size -> the new features [B, q, H, W]."""
        if self.recompute and torch.is_grad_enabled():
            # a compiled graph does not repeat side effects when it recomputes, and takes no contexts
            contexts: dict[str, Any] = {} if torch.compiler.is_compiling() else {"context_fn": self._contexts}
            features = checkpoint(self._bottleneck, *maps, use_reentrant=False, preserve_rng_state=False, **contexts)
        else:
            features = self._bottleneck(*maps)
        norm2 = self.get_submodule(self._norm_names[1])
        return self.shake_drop(self.conv2(self.relu(norm2(features))))

    def _bottleneck(self, *maps: Tensor) -> Tensor:
        norm1 = self.get_submodule(self._norm_names[0])
        return self.conv1(self.relu(norm1(torch.cat(maps, dim=1))))

    def _contexts(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """Contexts of the first computation and of the second, which must not count the batch's statistics again."""
        return nullcontext(), self._running_statistics_set_aside()

    @contextmanager
    def _running_statistics_set_aside(self) -> Iterator[None]:
        norm1 = self.get_submodule(self._norm_names[0])
        buffers = dict(norm1.named_buffers())
        for name, buffer in buffers.items():
            setattr(norm1, name, buffer.clone())
        try:
            yield
        finally:
            for name, buffer in buffers.items():
                setattr(norm1, name, buffer)


class DenseBlock(nn.Sequential):
    """Dense layers, each of which sees the block's input and the features of all layers before it."""

    def forward(self, features_BCHW: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C + layers * q, H, W], old features first."""
        maps = [features_BCHW]
        for layer in self:
            maps.append(layer(maps))
        return torch.cat(maps, dim=1)


class DenseNet(StagedBackbone):
    """Stem, dense blocks with transitions between them, BN, ReLU, pool, linear layer.

    A stage is a dense block with the transition before it, so that stages differ in resolution as in a ResNet.

    Args:
        growth: q.
        drop_probs: ShakeDrop rate of each layer of each block; their lengths are the depth.
        num_classes: K.
        official: which of the two implementations.
        recompute: see `DenseLayer`.
    """

    def __init__(
        self, growth: int, drop_probs: Sequence[Sequence[float]], num_classes: int, *, official: bool, recompute: bool
    ) -> None:
        super().__init__()
        norm = "norm" if official else "bn"
        channels = 2 * growth
        stem = nn.Conv2d(3, channels, 3, padding=1, bias=False)
        parts: OrderedDict[str, nn.Module] = OrderedDict()
        if official:
            parts.update(conv0=stem, norm0=nn.BatchNorm2d(channels), relu0=nn.ReLU(inplace=True))
        else:
            parts["conv1"] = stem
        # by name, because whoever replaces a norm replaces it where it is registered
        self._stem_names = [f"features.{name}" if official else name for name in parts]
        self._stages: list[nn.Module] = []  # in a list, because `features` or this module registers the parts
        for number, rates in enumerate(drop_probs, start=1):
            stage = nn.Sequential()
            if number > 1:
                transition = _transition(channels, official)
                parts[f"{'transition' if official else 'trans'}{number - 1}"] = transition
                stage.append(transition)
                channels //= 2
            layers: OrderedDict[str, nn.Module] = OrderedDict()
            for i, rate in enumerate(rates):
                layers[f"denselayer{i + 1}" if official else f"{i}"] = DenseLayer(
                    channels, growth, norm, rate, recompute
                )
                channels += growth
            block = DenseBlock(layers)
            if official:
                parts[f"denseblock{number}"] = block
            else:
                parts[f"block{number}"] = nn.Sequential(OrderedDict(layer=block))
            self._stages.append(stage.append(block))
        parts["norm_final" if official else "bn1"] = nn.BatchNorm2d(channels)
        if official:
            self.features = nn.Sequential(parts)
        else:
            for name, part in parts.items():
                self.add_module(name, part)
        self._final_norm_name = "features.norm_final" if official else "bn1"
        self.relu = nn.ReLU(inplace=True)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self._classifier_name = "classifier" if official else "fc"
        self.add_module(self._classifier_name, nn.Linear(channels, num_classes))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_in" if official else "fan_out", nonlinearity="relu")
            elif isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)

    @property
    def stages(self) -> list[nn.Module]:
        return self._stages

    @property
    def classifier_name(self) -> str:
        return self._classifier_name

    def halved_depth(self) -> int:
        """All of it: the tail's width is that of the whole last block."""
        return len(list(self.stages[-1].children()))

    def stem(self, images_BCHW: Tensor) -> Tensor:
        features = images_BCHW
        for name in self._stem_names:
            features = self.get_submodule(name)(features)
        return features

    def tail(self, features_BCHW: Tensor) -> Tensor:
        final_norm = self.get_submodule(self._final_norm_name)
        return self.avgpool(self.relu(final_norm(features_BCHW))).flatten(1)

    def classify(self, embedding_BD: Tensor) -> Tensor:
        return self.get_submodule(self._classifier_name)(embedding_BD)


def _transition(channels: int, official: bool) -> nn.Sequential:
    """BN, ReLU, conv1x1 to half the channels, 2x2 average pool: [B, C, H, W] -> [B, C // 2, H // 2, W // 2]."""
    names = ("norm", "conv") if official else ("bn1", "conv1")
    return nn.Sequential(
        OrderedDict(
            [
                (names[0], nn.BatchNorm2d(channels)),
                ("relu", nn.ReLU(inplace=True)),
                (names[1], nn.Conv2d(channels, channels // 2, 1, bias=False)),
                ("pool", nn.AvgPool2d(2)),
            ]
        )
    )


def build(request: BackboneRequest) -> nn.Module:
    """One of the S networks of DenseNet-BC-190."""
    options = family_options(DenseNetOptions, request)
    split_factor = request.split_factor
    return DenseNet(
        densenet_growth(split_factor),
        densenet_shake_drop_rates(options.densenet_p_shakedrop, NUM_BLOCKS, LAYERS_PER_BLOCK, split_factor),
        request.num_classes,
        official=options.is_official_densenet,
        recompute=options.is_efficient_densenet,
    )


def options_in(names: Collection[str]) -> dict[str, bool]:
    """Which implementation has tensors of these names."""
    return {"is_official_densenet": "conv1.weight" not in names}


backbones.add(
    "densenet190",
    Backbone(
        build=build,
        family="densenet",
        split_factors={SMALL: ANY_SPLIT},
        options=DenseNetOptions,
        options_in=options_in,
    ),
)

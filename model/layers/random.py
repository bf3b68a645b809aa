"""Random layers whose draws depend on (step, network, layer) and not on the order in which networks run.

Alone, a layer draws from the default generator of its features' device. In a SplitNet, it draws from the stream that
`follow` gave it: a hash of the step's key, the network and the layer, computed on the device. So S networks drop the
same units whether they run one after another, at the same time or stacked, and nothing waits for the device.
"""

from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from utils.seed import stream_uniform


class RandomLayer(nn.Module):
    """A layer that draws in training: one call of `uniform` per forward pass.

    Attributes:
        key: int64 scalar on the features' device that decides the draws; None: the default generator does.
        number: of the layer in its network.
    """

    key: Tensor | None = None
    number: int = 0

    def uniform(self, shape: Sequence[int], device: torch.device) -> Tensor:
        """Uniform numbers in [0, 1), float32 `shape` on `device`."""
        if self.key is None:
            return torch.rand(*shape, device=device)
        return stream_uniform(self.key, self.number, shape)

    @abstractmethod
    def draw(self, features: Tensor) -> tuple[Tensor, ...]:
        """What it draws for features [B, C, ...], of which it reads shape and device; broadcasts to them."""

    @abstractmethod
    def combine(self, *tensors: Tensor) -> Tensor:
        """The layer's output in training: its inputs, followed by what was drawn for them. Broadcasts."""

    @property
    def is_random(self) -> bool:
        """Whether the next forward pass draws."""
        return self.training


class RandomScale(RandomLayer):
    """A layer that multiplies its features by what it draws, and passes them on where it draws nothing."""

    def forward(self, features: Tensor) -> Tensor:
        """Any shape [B, C, ...] -> the same."""
        return self.combine(features, *self.draw(features)) if self.is_random else features

    def combine(self, *tensors: Tensor) -> Tensor:
        features, scale = tensors
        return features * scale.to(features.dtype)


class _Dropout(RandomScale):
    p: float

    @property
    def is_random(self) -> bool:
        return self.training and self.p > 0

    def _scale(self, shape: Sequence[int], device: torch.device) -> Tensor:
        """1 / (1 - p) with probability 1 - p, else 0."""
        kept = self.uniform(shape, device) >= self.p
        return kept / (1 - self.p) if self.p < 1 else kept.float()


class Dropout(_Dropout, nn.Dropout):
    """nn.Dropout: zeroes each number with probability p and rescales the rest by 1 / (1 - p)."""

    def draw(self, features: Tensor) -> tuple[Tensor, ...]:
        return (self._scale(features.shape, features.device),)


class ChannelDropout(_Dropout, nn.Dropout2d):
    """nn.Dropout2d: zeroes whole channels of single images."""

    def draw(self, features: Tensor) -> tuple[Tensor, ...]:
        shape = [*features.shape[:2], *(1 for _ in features.shape[2:])]
        return (self._scale(shape, features.device),)


_OURS: dict[type[nn.Module], type[_Dropout]] = {nn.Dropout: Dropout, nn.Dropout2d: ChannelDropout}


def replace_dropout(network: nn.Module) -> None:
    """Put our layers in the places of torch's dropouts, in the network itself; nothing changes but the draws."""
    for module in [*network.modules()]:
        for name, child in module.named_children():
            if type(child) in _OURS:
                ours = _OURS[type(child)](child.p)
                ours.train(child.training)
                setattr(module, name, ours)


def follow(network: nn.Module, key: Tensor) -> None:
    """Make every random layer of a network draw by `key` (int64 scalar on its device), each from its own stream."""
    layers = (module for module in network.modules() if isinstance(module, RandomLayer))
    for number, layer in enumerate(layers):
        layer.key, layer.number = key, number

"""Squeeze-and-excitation: channel weights from the map's global average (Hu et al., arXiv:1709.01507)."""

from torch import Tensor, nn
from torch.nn import functional as F


def squeeze_excite(features_BCHW: Tensor, reduce: nn.Module, activation: nn.Module, expand: nn.Module) -> Tensor:
    """Features [B, C, H, W] times sigmoid(expand(activation(reduce(global average)))), [B, C, 1, 1]."""
    weights = expand(activation(reduce(F.adaptive_avg_pool2d(features_BCHW, 1))))
    return features_BCHW * weights.sigmoid()


class SqueezeExcitation(nn.Module):
    """The unit of the SE-ResNet families: conv1x1 (C -> hidden), ReLU, conv1x1 back, both with bias.

    Args:
        channels: C.
        hidden: width of the bottleneck.
    """

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(channels, hidden, 1)
        self.relu = nn.ReLU(inplace=True)
        self.fc2 = nn.Conv2d(hidden, channels, 1)

    def forward(self, features_BCHW: Tensor) -> Tensor:
        """[B, C, H, W] -> the same shape."""
        return squeeze_excite(features_BCHW, self.fc1, self.relu, self.fc2)

"""Test-time augmentation: the networks' answer to an image is the mean over versions of it."""

import torch
from torch import Tensor, nn


class FlipAveraged(nn.Module):
    """Networks that see an image and its mirror image: the mean of their logits for the two, as timm takes it.

    Args:
        network: normalised images [B, 3, H, W] -> logits [S, B, K].
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Normalised images [B, 3, H, W] -> logits [S, B, K], in float32 or better."""
        both = [self.network(images) for images in (images_BCHW, images_BCHW.flip(-1))]
        exact = torch.promote_types(both[0].dtype, torch.float32)
        mean_SBK: Tensor = (both[0].to(exact) + both[1].to(exact)) / 2
        return mean_SBK

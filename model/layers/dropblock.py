"""DropBlock: dropout of square patches of a feature map."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def dropblock_gamma(drop_prob: float, block_size: int, height: int, width: int) -> float:
    """Probability that an activation is the seed of a dropped block: p H W / bs^2 / ((W - bs + 1)(H - bs + 1)).

    Args:
        drop_prob: p, share of the activations to drop (up to overlaps).
        block_size: bs, side of a block, at most the smaller side of the map.
        height, width: H and W of the map.
    """
    return drop_prob * height * width / block_size**2 / ((width - block_size + 1) * (height - block_size + 1))


class DropBlock(nn.Module):
    """Zeroes blocks of each channel of each image in training, and rescales the rest by (all / kept) over the batch.

    Ghiasi et al., arXiv:1810.12890. As in the published networks, seeds fall anywhere on the map (blocks are cut off
    at its border) and p is not scheduled. A block larger than the map is shrunk to it. Draws come from the default
    generator of the features' device. Evaluation: identity.

    Args:
        drop_prob: p.
        block_size: side of a block in cells of the map, odd or even.
    """

    def __init__(self, drop_prob: float, block_size: int) -> None:
        super().__init__()
        self.drop_prob = drop_prob
        self.block_size = block_size

    def forward(self, features_BCHW: Tensor) -> Tensor:
        """[B, C, H, W] -> the same shape."""
        if not self.training or self.drop_prob == 0:
            return features_BCHW
        kept = self.draw(features_BCHW)
        # float32 counts: bfloat16 cannot sum a mask
        scale = kept.numel() / kept.sum().clamp(min=1)
        return features_BCHW * (kept * scale).to(features_BCHW.dtype)

    def draw(self, features_BCHW: Tensor) -> Tensor:
        """Mask of the kept activations, float32 [B, C, H, W]: 1 kept, 0 dropped."""
        height, width = features_BCHW.shape[-2:]
        size = min(self.block_size, height, width)
        gamma = dropblock_gamma(self.drop_prob, size, height, width)
        seeds = (torch.rand_like(features_BCHW, dtype=torch.float32) < gamma).float()
        # an even block gives one row and one column too many
        dropped = F.max_pool2d(seeds, size, stride=1, padding=size // 2)[..., :height, :width]
        return 1 - dropped

    def extra_repr(self) -> str:
        return f"drop_prob={self.drop_prob:.4g}, block_size={self.block_size}"

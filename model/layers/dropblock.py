"""DropBlock: dropout of square patches of a feature map."""

from torch import Tensor
from torch.nn import functional as F

from model.layers.random import RandomLayer


def dropblock_gamma(drop_prob: float, block_size: int, height: int, width: int) -> float:
    """Probability that an activation is the seed of a dropped block: p H W / bs^2 / ((W - bs + 1)(H - bs + 1)).

    Args:
        drop_prob: p, share of the activations to drop (up to overlaps).
        block_size: bs, side of a block, at most the smaller side of the map.
        height, width: H and W of the map.
    """
    return drop_prob * height * width / block_size**2 / ((width - block_size + 1) * (height - block_size + 1))


class DropBlock(RandomLayer):
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

    def forward(self, features_BCHW: Tensor) -> Tensor:
        """[B, C, H, W] -> the same shape."""
        return self.combine(features_BCHW, *self.draw(features_BCHW)) if self.is_random else features_BCHW

    def combine(self, *tensors: Tensor) -> Tensor:
        features, scale = tensors
        return features * scale.to(features.dtype)

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

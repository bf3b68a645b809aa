"""Random erasing (Zhong et al., arXiv:1708.04896) of normalised images: drawing rectangles, and filling them.

V views, B images.
"""

import functools

import numpy as np
import torch
from torch import Tensor

from utils.seed import GOLDEN, mix_on_device, signed

TRIES = 10
PLACE_SLOTS = 3  # whether, top, left; then an area and a ratio for each try


def draw_erasing(
    uniforms_VBU: np.ndarray,
    height: int,
    width: int,
    *,
    probability: float,
    area: tuple[float, float],
    ratio: tuple[float, float],
) -> tuple[np.ndarray, np.ndarray]:
    """Rectangles with the distribution of torchvision's RandomErasing.

    Args:
        uniforms_VBU: float64 [V, B, PLACE_SLOTS + 2 * tries] in [0, 1).
        height, width: of the views in pixels.
        probability: that an image is erased.
        area: smallest and largest part of the image.
        ratio: smallest and largest height / width; log-uniform.

    Returns:
        int64 [V, B, 4] of (top, left, height, width), all 0 where nothing is erased;
        bool [V, B], where an image should be erased but no try fitted into it.
    """
    areas = height * width * (area[0] + (area[1] - area[0]) * uniforms_VBU[..., PLACE_SLOTS::2])
    log_low, log_high = np.log(ratio)
    ratios = np.exp(log_low + (log_high - log_low) * uniforms_VBU[..., PLACE_SLOTS + 1 :: 2])
    heights = np.rint(np.sqrt(areas * ratios)).astype(np.int64)
    widths = np.rint(np.sqrt(areas / ratios)).astype(np.int64)
    fits = (heights < height) & (widths < width)
    first = fits.argmax(axis=-1)[..., None]
    box_heights = np.take_along_axis(heights, first, axis=-1)[..., 0]
    box_widths = np.take_along_axis(widths, first, axis=-1)[..., 0]
    tops = (uniforms_VBU[..., 1] * (height - box_heights + 1)).astype(np.int64)
    lefts = (uniforms_VBU[..., 2] * (width - box_widths + 1)).astype(np.int64)
    wanted, found = uniforms_VBU[..., 0] < probability, fits.any(axis=-1)
    boxes = np.stack([tops, lefts, box_heights, box_widths], axis=-1) * (wanted & found)[..., None]
    return boxes, wanted & ~found


def inside_boxes(boxes_K4: Tensor, height: int, width: int, dtype: torch.dtype) -> Tensor:
    """1 inside each image's box and 0 outside: [K, 1, height, width]."""
    top, left, box_height, box_width = boxes_K4.view(-1, 4, 1, 1).unbind(1)
    y = torch.arange(height, device=boxes_K4.device).view(1, height, 1)
    x = torch.arange(width, device=boxes_K4.device).view(1, 1, width)
    rows = ((y >= top) & (y < top + box_height)).to(dtype)
    columns = ((x >= left) & (x < left + box_width)).to(dtype)
    return (rows * columns).unsqueeze(1)


@functools.cache
def _normal_quantiles(device: torch.device) -> Tensor:
    """65,536 equally likely values of the standard normal distribution: float32 [65536]."""
    probabilities = (torch.arange(1 << 16, dtype=torch.float64) + 0.5) / (1 << 16)
    return torch.special.ndtri(probabilities).float().to(device)


def counter_normal(keys_K: Tensor, size: int) -> Tensor:
    """Independent standard normal numbers, each a pure function of its image's key and its position.

    The same on every device: SplitMix64 in wrapping int64 arithmetic, then a table, four numbers for each 64 bits.

    Args:
        keys_K: int64 [K].
        size: numbers for each image.

    Returns:
        float32 [K, size].
    """
    counters = torch.arange(1, (size + 3) // 4 + 1, device=keys_K.device)
    bits = mix_on_device(keys_K.unsqueeze(1) + counters * signed(GOLDEN))
    index = bits.view(torch.int16).int() + (1 << 15)
    return _normal_quantiles(keys_K.device).index_select(0, index.view(-1)).view(len(keys_K), -1)[:, :size]

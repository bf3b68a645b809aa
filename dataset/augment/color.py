"""Ops that change pixel values: 256-entry tables where a value alone decides the new one, and PIL's other enhancers.

All give what PIL's ImageOps and ImageEnhance give, bit for bit, on any device. Selection by a boolean mask is avoided
on whole images: on CPUs it is an order of magnitude slower than the arithmetic that replaces it.

K images uint8 [K, 3, H, W]; C channels; values float64 [K] mean what `dataset.augment.policy.Op` says.
"""

import numpy as np
import torch
from torch import Tensor

from dataset.augment.policy import Op


def apply_tables(images_KCHW: Tensor, tables_KC256: Tensor) -> Tensor:
    """Replace every value by the entry in its image's and channel's table, uint8 [K, C, 256]."""
    return tables_KC256.reshape(-1).index_select(0, _bins(images_KCHW)).view(images_KCHW.shape)


def _bins(images_KCHW: Tensor) -> Tensor:
    """Every value's position in a flattened [K, C, 256]: int32 [K C H W]."""
    count, channels = images_KCHW.shape[:2]
    starts = torch.arange(0, count * channels * 256, 256, dtype=torch.int32, device=images_KCHW.device)
    return images_KCHW.int().add_(starts.view(count, channels, 1, 1)).view(-1)


def histograms(images_KCHW: Tensor) -> Tensor:
    """How often each value occurs: integers [K, C, 256]."""
    count, channels = images_KCHW.shape[:2]
    bins, size = _bins(images_KCHW), count * channels * 256
    counts = torch.bincount(bins, minlength=size) if bins.is_cpu else count_without_waiting(bins, minlength=size)
    return counts.view(count, channels, 256)


def count_without_waiting(bins: Tensor, *, minlength: int) -> Tensor:
    """torch.bincount for GPUs, where that would read its largest value back to the host: int32 [minlength]."""
    ones = torch.ones(1, dtype=torch.int32, device=bins.device).expand_as(bins)
    return torch.zeros(minlength, dtype=torch.int32, device=bins.device).scatter_add_(0, bins.long(), ones)


def grey(images_KCHW: Tensor) -> Tensor:
    """PIL's luminance (ITU-R 601-2 in 1/65536), rounded: int32 [K, H, W]."""
    red, green, blue = images_KCHW.unbind(1)
    total = red.int().mul_(19595).add_(green.int().mul_(38470)).add_(blue.int().mul_(7471))
    return total.add_(1 << 15).bitwise_right_shift_(16)


def blend(base: Tensor, images: Tensor, factors: Tensor) -> Tensor:
    """PIL's Image.blend of float32 whole numbers, uint8: `base` at factor 0, `images` at 1, beyond for others."""
    mixed = (images - base).mul_(factors).add_(base).clamp_(0, 255)
    return mixed.int().to(torch.uint8)  # on CPUs float to uint8 in one go is several times slower


def enhance_color(images_KCHW: Tensor, factors_K: Tensor) -> Tensor:
    """PIL's ImageEnhance.Color: towards or away from grey."""
    return blend(grey(images_KCHW).unsqueeze(1).float(), images_KCHW.float(), factors_K.float().view(-1, 1, 1, 1))


def enhance_sharpness(images_KCHW: Tensor, factors_K: Tensor) -> Tensor:
    """PIL's ImageEnhance.Sharpness: towards or away from a 3x3 smoothing that leaves the outermost pixels alone."""
    pixels = images_KCHW.float()
    centre = pixels[..., 1:-1, 1:-1]
    rows = pixels[..., :-2, :] + pixels[..., 1:-1, :] + pixels[..., 2:, :]
    total = rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:] + 4 * centre
    smooth = total.add_(6.5).mul_(1 / 13).floor_()  # total / 13 to the nearest whole number: never a tie
    sharpened = images_KCHW.clone()
    sharpened[..., 1:-1, 1:-1] = blend(smooth, centre, factors_K.float().view(-1, 1, 1, 1))
    return sharpened


def value_tables(op: Op, values_K: np.ndarray) -> np.ndarray:
    """Tables of the ops that need not see the image: uint8 [K, 256], made on the host."""
    levels, values_K1 = np.arange(256), values_K[:, None]
    if op is Op.INVERT:
        tables = np.broadcast_to(255 - levels, (len(values_K), 256))
    elif op is Op.POSTERIZE:
        dropped_K1 = 8 - values_K1.astype(np.int64)
        tables = levels >> dropped_K1 << dropped_K1
    elif op is Op.SOLARIZE:
        tables = np.where(levels < values_K1, levels, 255 - levels)
    elif op is Op.SOLARIZE_ADD:
        tables = np.where(levels < 128, np.minimum(levels + values_K1, 255), levels)
    else:  # brightness: Image.blend with black
        tables = np.clip(values_K1.astype(np.float32) * levels.astype(np.float32), 0, 255)
    return tables.astype(np.uint8)


def contrast_tables(images_KCHW: Tensor, factors_K: Tensor) -> Tensor:
    """ImageEnhance.Contrast, towards or away from the mean luminance, rounded half up: uint8 [K, 1, 256]."""
    grey_KP = grey(images_KCHW).flatten(1)
    pixels = grey_KP.shape[1]
    means_K = (grey_KP.sum(1) * 2 + pixels) // (2 * pixels)
    levels = torch.arange(256, device=images_KCHW.device).float()
    return blend(means_K.float().view(-1, 1, 1), levels, factors_K.float().view(-1, 1, 1))


def autocontrast_tables(images_KCHW: Tensor) -> Tensor:
    """ImageOps.autocontrast without cutoff: uint8 [K, C, 256]."""
    low_KC1 = images_KCHW.flatten(2).amin(-1, keepdim=True).double()
    high_KC1 = images_KCHW.flatten(2).amax(-1, keepdim=True).double()
    constant = high_KC1 == low_KC1  # left as it is
    # a tensor over a tensor: with a number on either side torch may multiply by a reciprocal, which rounds twice
    scale_KC1 = torch.where(constant, 1.0, torch.full_like(low_KC1, 255).div_(high_KC1 - low_KC1))
    offset_KC1 = torch.where(constant, 0.0, -low_KC1 * scale_KC1)
    levels = torch.arange(256, device=images_KCHW.device).double()
    return (levels * scale_KC1).add_(offset_KC1).clamp_(0, 255).int().to(torch.uint8)


def equalize_tables(images_KCHW: Tensor) -> Tensor:
    """ImageOps.equalize: uint8 [K, C, 256]."""
    counts = histograms(images_KCHW)
    highest = images_KCHW.flatten(2).amax(-1, keepdim=True).long()
    step = (images_KCHW[0, 0].numel() - counts.gather(-1, highest)) // 255
    below = counts.cumsum(-1).sub_(counts)
    # too few pixels besides the brightest: left as it is
    unchanged = (step == 0).long()
    levels = torch.arange(256, device=images_KCHW.device)
    numerator = below.add_(step // 2).mul_(1 - unchanged).add_(levels * unchanged)
    return numerator.double().div_(step + unchanged).clamp_(max=255).int().to(torch.uint8)

"""Ops that move pixels: padding, cutting windows (crop, flip, whole-pixel shift), and affine maps as PIL makes them.

Coordinates are found in the same arithmetic and order as PIL's, so results are equal bit for bit, on any device.

K images, each with parameters of its own; C channels; a matrix is PIL's (a, b, c, d, e, f): output (x, y) reads
(a x + b y + c, d x + e y + f).
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dataset.augment.policy import Op, Resample

_REACH = 2  # the furthest neighbour that cubic interpolation reads, in pixels
FIXED_BITS = 16  # PIL's nearest-neighbour affine counts in 1/65536 of a pixel
# Where an op's value stands in its matrix; a rotation fills the whole of it.
_MATRIX_PLACE = np.zeros(len(Op), dtype=np.int64)
_MATRIX_PLACE[[Op.SHEAR_X, Op.TRANSLATE_X, Op.SHEAR_Y, Op.TRANSLATE_Y]] = [1, 2, 3, 5]


def pad_images(images_NCHW: Tensor, padding: int, mode: str) -> Tensor:
    """Pad all four sides: uint8 [N, C, H, W] -> [N, C, H + 2 padding, W + 2 padding].

    Args:
        padding: pixels.
        mode: "zero" (black) or "reflect" (mirrored without repeating the edge; padding < H and W).
    """
    if padding == 0:
        return images_NCHW
    if mode == "zero":
        return F.pad(images_NCHW, (padding,) * 4)
    rows, columns = (
        (size - 1) - ((size - 1) - torch.arange(-padding, size + padding, device=images_NCHW.device).abs()).abs()
        for size in images_NCHW.shape[-2:]
    )
    return images_NCHW.index_select(-2, rows).index_select(-1, columns)


def cut_windows(images_NCHW: Tensor, starts_K: Tensor, height: int, width: int) -> Tensor:
    """Copy K windows out of N images: [N, C, H, W] -> [K, C, height, width].

    Args:
        images_NCHW: contiguous.
        starts_K: int64 [K], flat position of each window's first element: (n C H + top) W + left.
    """
    channels, rows, columns = images_NCHW.shape[1:]
    extent = ((channels - 1) * rows + height - 1) * columns + width
    windows = images_NCHW.as_strided(
        (images_NCHW.numel() - extent + 1, channels, height, width), (1, rows * columns, columns, 1)
    )
    return windows.index_select(0, starts_K)


def fill_border(images_KCHW: Tensor, margin_y: int, margin_x: int, fill_C: Tensor) -> Tensor:
    """Surround images by a colour: [K, C, H, W] -> [K, C, H + 2 margin_y, W + 2 margin_x]."""
    count, channels, height, width = images_KCHW.shape
    shape = (count, channels, height + 2 * margin_y, width + 2 * margin_x)
    bordered = fill_C.to(images_KCHW.dtype).view(1, channels, 1, 1).expand(shape).contiguous()
    bordered[:, :, margin_y : margin_y + height, margin_x : margin_x + width] = images_KCHW
    return bordered


def mirror(images_KCHW: Tensor) -> Tensor:
    """Left becomes right."""
    return images_KCHW.flip(-1)


def affine_matrices(ops_K: np.ndarray, values_K: np.ndarray, height: int, width: int) -> np.ndarray:
    """PIL's matrices of geometric ops: float64 [K, 6]. Values as `dataset.augment.policy.Op` says."""
    matrices_K6 = np.zeros((len(ops_K), 6))
    matrices_K6[:, [0, 4]] = 1
    scales = np.where(ops_K == Op.TRANSLATE_X, width, np.where(ops_K == Op.TRANSLATE_Y, height, 1))
    matrices_K6[np.arange(len(ops_K)), _MATRIX_PLACE[ops_K]] = values_K * scales
    for k in np.flatnonzero(ops_K == Op.ROTATE):
        matrices_K6[k] = _rotation(float(values_K[k]), height, width)
    return matrices_K6


def _rotation(degrees: float, height: int, width: int) -> tuple[float, ...]:
    """Matrix of PIL's Image.rotate; its rounding to 15 decimals decides ties."""
    angle = -math.radians(degrees % 360.0)
    a, b = round(math.cos(angle), 15), round(math.sin(angle), 15)
    d, e = round(-math.sin(angle), 15), round(math.cos(angle), 15)
    x, y = width / 2, height / 2
    return a, b, a * -x + b * -y + 0.0 + x, d, e, d * -x + e * -y + 0.0 + y


def whole_shifts(matrices_K6: np.ndarray, height: int, width: int) -> np.ndarray:
    """By how many pixels nearest-neighbour translations read further down and to the right: int64 [K, 2]."""
    return np.clip(np.floor(matrices_K6[:, [5, 2]] + 0.5).astype(np.int64), [-height, -width], [height, width])


def shift_starts(matrices_K6: np.ndarray, height: int, width: int, channels: int) -> tuple[np.ndarray, int, int]:
    """How `fill_border` and `cut_windows` make nearest-neighbour translations.

    Returns:
        starts int64 [K], margin_y, margin_x.
    """
    shifts_y, shifts_x = whole_shifts(matrices_K6, height, width).T
    margin_y, margin_x = int(np.abs(shifts_y).max()), int(np.abs(shifts_x).max())
    rows, columns = height + 2 * margin_y, width + 2 * margin_x
    numbers = np.arange(len(matrices_K6))
    return (numbers * channels * rows + margin_y + shifts_y) * columns + margin_x + shifts_x, margin_y, margin_x


def translate(images_KCHW: Tensor, starts_K: Tensor, fill_C: Tensor, *, margin_y: int, margin_x: int) -> Tensor:
    """Shift by whole pixels; arguments from `shift_starts`. [K, C, H, W] -> the same shape."""
    height, width = images_KCHW.shape[-2:]
    return cut_windows(fill_border(images_KCHW, margin_y, margin_x, fill_C), starts_K, height, width)


def fixed_point(matrices_K6: np.ndarray) -> np.ndarray:
    """Matrices in PIL's fixed point, offsets taken at the centre of the first pixel: int64 [K, 6]."""
    a, b, c, d, e, f = matrices_K6.T
    centred = np.stack([a, b, c + a * 0.5 + b * 0.5, d, e, f + d * 0.5 + e * 0.5], axis=1)
    return np.floor(centred * (1 << FIXED_BITS) + 0.5).astype(np.int64)


def affine_nearest(images_KCHW: Tensor, fixed_K6: Tensor, fill_C: Tensor) -> Tensor:
    """Affine map that reads the nearest pixel; `fixed_K6` from `fixed_point`. [K, C, H, W] -> the same shape."""
    count, channels, height, width = images_KCHW.shape
    a, b, c, d, e, f = fixed_K6.view(count, 6, 1, 1).unbind(1)
    y = torch.arange(height, device=images_KCHW.device).view(1, height, 1)
    x = torch.arange(width, device=images_KCHW.device).view(1, 1, width)
    source_x = (a * x + (b * y + c)) >> FIXED_BITS
    source_y = (d * x + (e * y + f)) >> FIXED_BITS
    inside = (source_x >= 0) & (source_x < width) & (source_y >= 0) & (source_y < height)
    # one more "pixel" behind the last holds the fill colour
    index_K1P = torch.where(inside, source_y * width + source_x, height * width).view(count, 1, -1)
    filled = torch.cat([images_KCHW.flatten(2), fill_C.to(images_KCHW.dtype).view(1, -1, 1).expand(count, -1, 1)], 2)
    return filled.gather(2, index_K1P.expand(-1, channels, -1)).view_as(images_KCHW)


def affine_interpolated(
    images_KCHW: Tensor, matrices_U6: Tensor, which_K: Tensor, fill_C: Tensor, *, resample: Resample, one_axis: bool
) -> Tensor:
    """Affine map that interpolates. uint8 [K, C, H, W] -> the same shape.

    Args:
        matrices_U6: float64 [U, 6], the different matrices.
        which_K: int64 [K], number of each image's matrix.
        fill_C: [C], colour where the source lies outside.
        resample: BILINEAR or BICUBIC (PIL's: a = -1, and truncation to an integer).
        one_axis: every matrix changes only x or only y (shears, translations). Along the other axis PIL's
            interpolation gives back the pixel itself, so leaving it out changes nothing.
    """
    channels, height, width = images_KCHW.shape[1:]
    a, b, c, d, e, f = matrices_U6.view(-1, 6, 1, 1).unbind(1)
    y = torch.arange(height, device=images_KCHW.device).double().view(1, height, 1) + 0.5
    x = torch.arange(width, device=images_KCHW.device).double().view(1, 1, width) + 0.5
    source_x, source_y = a * x + b * y + c, d * x + e * y + f
    inside = (source_x >= 0) & (source_x < width) & (source_y >= 0) & (source_y < height)
    source_x, source_y = source_x.sub_(0.5), source_y.sub_(0.5)
    first_x, first_y = source_x.floor(), source_y.floor()
    fraction_x, fraction_y = source_x.sub_(first_x), source_y.sub_(first_y)

    planes_KCP, columns = _bordered_planes(images_KCHW, fill_C)
    fill_position = (height + 2 * _REACH + 1) * columns + 1
    position = torch.where(inside, (first_y + _REACH) * columns + first_x + _REACH, fill_position).long()
    index_K1P = position.flatten(1).index_select(0, which_K).unsqueeze(1)

    def read(offset: Tensor | int) -> Tensor:
        return planes_KCP.gather(2, (index_K1P + offset).expand(-1, channels, -1)).to(torch.int16)

    def of_image(fraction_UHW: Tensor) -> Tensor:
        return fraction_UHW.flatten(1).index_select(0, which_K).unsqueeze(1)

    taps = range(2) if resample is Resample.BILINEAR else range(-1, 3)
    if one_axis:
        vertical = (d != 0) | (f != 0)
        step_K11 = torch.where(vertical, columns, 1).flatten(1).index_select(0, which_K).unsqueeze(1)
        values = _interpolate(
            [read(tap * step_K11) for tap in taps], of_image(torch.where(vertical, fraction_y, fraction_x))
        )
    else:
        fraction_x = of_image(fraction_x)
        rows = [_interpolate([read(row * columns + tap) for tap in taps], fraction_x) for row in taps]
        values = _interpolate(rows, of_image(fraction_y))
    return values.clamp_(0, 255).int().to(torch.uint8).view_as(images_KCHW)


def _bordered_planes(images_KCHW: Tensor, fill_C: Tensor) -> tuple[Tensor, int]:
    """Flat images with every edge pixel repeated _REACH times outwards, and rows of the fill colour below.

    Returns:
        uint8 [K, C, (H + 4 _REACH) columns], columns.
    """
    count, channels, height, width = images_KCHW.shape
    bordered = images_KCHW.new_empty(count, channels, height + 4 * _REACH, width + 2 * _REACH)
    middle = bordered[:, :, _REACH : height + _REACH]
    middle[..., _REACH : width + _REACH] = images_KCHW
    middle[..., :_REACH] = images_KCHW[..., :1]
    middle[..., width + _REACH :] = images_KCHW[..., -1:]
    bordered[:, :, :_REACH] = middle[:, :, :1]
    bordered[:, :, height + _REACH : height + 2 * _REACH] = middle[:, :, -1:]
    bordered[:, :, height + 2 * _REACH :] = fill_C.view(1, channels, 1, 1)
    return bordered.flatten(2), width + 2 * _REACH


def _interpolate(values: Sequence[Tensor], fraction: Tensor) -> Tensor:
    """PIL's linear or cubic interpolation between 2 or 4 neighbours, in PIL's order of operations: float64."""
    if len(values) == 2:
        return (values[1] - values[0]).double().mul_(fraction).add_(values[0].double())
    v1, v2, v3, v4 = values
    linear, square, cube = v3 - v1, 2 * (v1 - v2) + v3 - v4, v2 - v1 - v3 + v4
    return (
        cube.double()
        .mul_(fraction)
        .add_(square.double())
        .mul_(fraction)
        .add_(linear.double())
        .mul_(fraction)
        .add_(v2.double())
    )

"""Crop, flip, policy, normalising and erasing of small images in one Triton kernel: one program makes one view.

The arithmetic is that of `geometry`, `color` and `views`, whose results it gives bit for bit; what depends on an op's
value alone (tables, matrices) is made there, on the host. An image stays in registers, its three channels packed into
one integer per pixel, from the read of its window to the write of its normalised values.

K = V x B views; P = size * size pixels of a view, a power of two.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call"
# (the arguments of a kernel's functions are of Triton's own types, which it works out itself)

from collections.abc import Sequence
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from dataset.augment import color, geometry
from dataset.augment.plan import Upload
from dataset.augment.policy import Op, Resample

_NOTHING = tl.constexpr(0)
_AUTOCONTRAST = tl.constexpr(1)
_EQUALIZE = tl.constexpr(2)
_CONTRAST = tl.constexpr(3)
_TABLE = tl.constexpr(4)
_COLOR = tl.constexpr(5)
_SHARPNESS = tl.constexpr(6)
_NEAREST = tl.constexpr(7)
_BILINEAR = tl.constexpr(8)
_BICUBIC = tl.constexpr(9)
_BILINEAR_2D = tl.constexpr(10)
_BICUBIC_2D = tl.constexpr(11)

_OF_OP = {
    Op.AUTOCONTRAST: _AUTOCONTRAST,
    Op.EQUALIZE: _EQUALIZE,
    Op.CONTRAST: _CONTRAST,
    Op.COLOR: _COLOR,
    Op.SHARPNESS: _SHARPNESS,
}


def _kind(op: Op, resample: Resample) -> int:
    """What the kernel does for an op."""
    if op >= Op.SHEAR_X:
        if resample is Resample.NEAREST:
            return _NEAREST.value
        first = _BILINEAR_2D if op is Op.ROTATE else _BILINEAR
        return first.value + (resample is Resample.BICUBIC)
    return _OF_OP.get(op, _TABLE if op else _NOTHING).value


_KINDS = np.zeros((len(Op), max(Resample) + 1), dtype=np.int64)
for _op in Op:
    for _resample in Resample:
        _KINDS[_op, _resample] = _kind(_op, _resample)

COMPILER_OPTIONS = {"enable_fp_fusion": False}  # a fused multiply-add rounds once where PIL rounds twice
# By the side of a view. With fewer, what a thread holds of a view does not fit into its registers: of 64 pixels, 8 KiB.
WARPS = MappingProxyType({8: 2, 16: 4, 32: 8, 64: 16})
# What changes within a run, as the last batch of an epoch does: the kernel is not built anew for other numbers.
NOT_SPECIALISED = ["num_steps", "batch", "rows", "columns", "padding", "stride_v", "stride_b"]
NOT_ALIGNED = ["windows", "records", "tables", "scale"]  # parts of one upload begin anywhere in it


def make_views(
    views_VBCHW: Tensor,
    images_BCHW: Tensor,
    *,
    windows_K3: np.ndarray,
    boxes_K4: np.ndarray,
    steps: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray, Sequence[int]]],
    scale_3C: np.ndarray,
    padding: int,
    reflect: bool,
) -> None:
    """Fill float32 [V, B, 3, size, size], of any strides, from uint8 [B, 3, H, W]; nothing waits for the device.

    Args:
        windows_K3: int64, top and left of the crop in the padded image, and whether it is mirrored.
        boxes_K4: int64, erased rectangle (top, left, height, width).
        steps: for each op in sequence: ops, values, resamples [K] as in `policy.Steps`, and the fill colour.
        scale_3C: float64, largest pixel value, mean and std.
        padding: pixels on every side; zeros, or the image mirrored where `reflect`.
    """
    size, count = views_VBCHW.shape[-1], len(windows_K3)
    upload = Upload()
    windows_K8 = np.concatenate([windows_K3, boxes_K4, np.zeros((count, 1), np.int64)], axis=1)
    for array in (windows_K8, *records_of(steps, count, size), scale_3C):
        upload.add(array)
    drawn = Drawn(*upload.send(images_BCHW.device))
    make_drawn_views(views_VBCHW, images_BCHW, drawn, len(steps), padding=padding, reflect=reflect)


class Drawn(NamedTuple):
    """What the kernel reads about K views in N steps, on its device.

    windows_K8: int64, top and left of the crop in the padded image, whether it is mirrored, the erased rectangle (top,
        left, height, width), and nothing.
    records_NK9, tables_U256: see `records_of`.
    scale_3C: float64, largest pixel value, mean and std.
    """

    windows_K8: Tensor
    records_NK9: Tensor
    tables_U256: Tensor
    scale_3C: Tensor


def make_drawn_views(
    views_VBCHW: Tensor, images_BCHW: Tensor, drawn: Drawn, num_steps: int, *, padding: int, reflect: bool
) -> None:
    """`make_views` from what lies on the device already."""
    size = views_VBCHW.shape[-1]
    with torch.cuda.device_of(views_VBCHW):  # Triton launches on the current device, whatever its arguments say
        _make_view[(len(drawn.windows_K8),)](
            views_VBCHW,
            images_BCHW.contiguous(),
            *drawn,
            num_steps,
            len(images_BCHW),
            *images_BCHW.shape[-2:],
            padding,
            *views_VBCHW.stride(),
            reflect=reflect,
            size=size,
            num_warps=WARPS[size],
            **COMPILER_OPTIONS,
        )


def records_of(
    steps: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray, Sequence[int]]], count: int, size: int
) -> tuple[np.ndarray, np.ndarray]:
    """What the kernel reads about each op: int64 [N, K, 9] and uint8 [U, 256] tables.

    A record is kind, value (the bits of a float64; of a table its number), fill colour, and a matrix of six numbers:
    in PIL's fixed point for nearest-neighbour ops, else the bits of float64.
    """
    records_NK9 = np.zeros((len(steps), count, 9), dtype=np.int64)
    tables = [np.zeros((1, 256), dtype=np.uint8)]
    for record_K9, (ops_K, values_K, resamples_K, fill) in zip(records_NK9, steps, strict=True):
        kinds_K = _KINDS[ops_K, resamples_K]
        record_K9[:, 0] = kinds_K
        record_K9[:, 1] = values_K.astype(np.float64).view(np.int64)
        record_K9[:, 2] = fill[0] | fill[1] << 8 | fill[2] << 16
        by_table = np.flatnonzero(kinds_K == _TABLE.value)
        for op in np.unique(ops_K[by_table]):
            rows = by_table[ops_K[by_table] == op]
            values_U, which = np.unique(values_K[rows], return_inverse=True)
            record_K9[rows, 1] = which + sum(map(len, tables))
            tables.append(color.value_tables(Op(int(op)), values_U))
        moved = np.flatnonzero(ops_K >= Op.SHEAR_X)
        matrices_M6 = geometry.affine_matrices(ops_K[moved], values_K[moved], size, size)
        record_K9[moved, 3:] = np.where(
            (resamples_K[moved] == Resample.NEAREST)[:, None],
            _nearest_matrices(ops_K[moved], matrices_M6, size),
            matrices_M6.view(np.int64),
        )
    return records_NK9, np.concatenate(tables)


def _nearest_matrices(ops_M: np.ndarray, matrices_M6: np.ndarray, size: int) -> np.ndarray:
    """Fixed-point matrices, those of translations by a whole number of pixels: int64 [M, 6]."""
    fixed_M6 = geometry.fixed_point(matrices_M6)
    shifts = (ops_M == Op.TRANSLATE_X) | (ops_M == Op.TRANSLATE_Y)
    whole_M2 = geometry.whole_shifts(matrices_M6[shifts], size, size)
    fixed_M6[shifts] = geometry.fixed_point(np.array([[1.0, 0, -0.5, 0, 1, -0.5]]))
    fixed_M6[np.flatnonzero(shifts)[:, None], [5, 2]] = whole_M2 << geometry.FIXED_BITS
    return fixed_M6


# ---- the kernel ------------------------------------------------------------------------------------------------------


@triton.jit
def _channel(packed, number: tl.constexpr):
    return (packed >> (8 * number)) & 255


@triton.jit
def _pack(red, green, blue):
    return red | (green << 8) | (blue << 16)


@triton.jit
def _byte(values):
    """Clamped to 0 ... 255 and cut off."""
    return tl.minimum(tl.maximum(values, 0.0), 255.0).to(tl.int32)


@triton.jit
def _grey(packed):
    weighted = _channel(packed, 0) * 19595 + _channel(packed, 1) * 38470 + _channel(packed, 2) * 7471
    return (weighted + 32768) >> 16


@triton.jit
def _blend(base, image, factor):
    base = base.to(tl.float32)
    return _byte((image.to(tl.float32) - base) * factor + base)


@triton.jit
def _blend_all(base, packed, factor):
    """Every channel away from one base."""
    red = _blend(base, _channel(packed, 0), factor)
    green = _blend(base, _channel(packed, 1), factor)
    return _pack(red, green, _blend(base, _channel(packed, 2), factor))


@triton.jit
def _autocontrast(values):
    low = tl.min(values, 0).to(tl.float64)
    span = tl.max(values, 0).to(tl.float64) - low
    flat = span == 0.0  # left as it is
    scale = tl.where(flat, 1.0, 255.0 / tl.where(flat, 1.0, span))
    offset = tl.where(flat, 0.0, -low * scale)
    return _byte(values.to(tl.float64) * scale + offset)


@triton.jit
def _equalize(values, count: tl.constexpr):
    levels = tl.arange(0, 256)
    counts = tl.histogram(values, 256)
    brightest = tl.sum(tl.where(levels == tl.max(values, 0), counts, 0), 0)
    step = (count - brightest) // 255
    below = tl.cumsum(counts, 0) - counts
    # too few pixels besides the brightest: left as it is
    table = tl.where(step == 0, levels, (below + step // 2) // tl.maximum(step, 1))
    return tl.gather(tl.minimum(table, 255), values, 0)


@triton.jit
def _contrast(packed, factor, count: tl.constexpr):
    mean = (tl.sum(_grey(packed), 0) * 2 + count) // (2 * count)
    return _blend_all(mean, packed, factor)


@triton.jit
def _sharpness(packed, factor, size: tl.constexpr):
    pixel = tl.arange(0, size * size)
    y, x = pixel // size, pixel % size
    inner = (y > 0) & (y < size - 1) & (x > 0) & (x < size - 1)
    red, green, blue = 4 * _channel(packed, 0), 4 * _channel(packed, 1), 4 * _channel(packed, 2)
    for dy in tl.static_range(-1, 2):
        for dx in tl.static_range(-1, 2):
            near = tl.gather(packed, tl.where(inner, pixel + (dy * size + dx), pixel), 0)
            red += _channel(near, 0)
            green += _channel(near, 1)
            blue += _channel(near, 2)
    red = _blend(_smooth(red), _channel(packed, 0), factor)
    green = _blend(_smooth(green), _channel(packed, 1), factor)
    blue = _blend(_smooth(blue), _channel(packed, 2), factor)
    return tl.where(inner, _pack(red, green, blue), packed)


@triton.jit
def _smooth(total):
    return tl.floor((total.to(tl.float32) + 6.5) * (1 / 13))


@triton.jit
def _affine_nearest(packed, fill, matrix, size: tl.constexpr):
    pixel = tl.arange(0, size * size)
    y, x = (pixel // size).to(tl.int64), (pixel % size).to(tl.int64)
    a, b, c = tl.load(matrix), tl.load(matrix + 1), tl.load(matrix + 2)
    d, e, f = tl.load(matrix + 3), tl.load(matrix + 4), tl.load(matrix + 5)
    source_x = (a * x + (b * y + c)) >> 16
    source_y = (d * x + (e * y + f)) >> 16
    inside = (source_x >= 0) & (source_x < size) & (source_y >= 0) & (source_y < size)
    index = tl.where(inside, source_y * size + source_x, 0).to(tl.int32)
    return tl.where(inside, tl.gather(packed, index, 0), fill)


@triton.jit
def _float64(pointer):
    return tl.load(pointer).to(tl.float64, bitcast=True)


@triton.jit
def _read(packed, y, x, size: tl.constexpr):
    """Pixels at whole coordinates; beyond the edge those of the edge."""
    y, x = tl.minimum(tl.maximum(y, 0), size - 1), tl.minimum(tl.maximum(x, 0), size - 1)
    return tl.gather(packed, y * size + x, 0)


@triton.jit
def _linear(v1, v2, part):
    return (v2 - v1).to(tl.float64) * part + v1.to(tl.float64)


@triton.jit
def _cubic(v1, v2, v3, v4, part):
    linear, square, cube = v3 - v1, 2 * (v1 - v2) + v3 - v4, v2 - v1 - v3 + v4
    values = cube.to(tl.float64) * part + square.to(tl.float64)
    return (values * part + linear.to(tl.float64)) * part + v2.to(tl.float64)


@triton.jit
def _between(packed, y, x, dy, dx, part, bicubic: tl.constexpr, size: tl.constexpr):
    """The three channels at a point between neighbours along one direction: float64."""
    v2, v3 = _read(packed, y, x, size), _read(packed, y + dy, x + dx, size)
    if bicubic:
        v1, v4 = _read(packed, y - dy, x - dx, size), _read(packed, y + 2 * dy, x + 2 * dx, size)
        red = _cubic(_channel(v1, 0), _channel(v2, 0), _channel(v3, 0), _channel(v4, 0), part)
        green = _cubic(_channel(v1, 1), _channel(v2, 1), _channel(v3, 1), _channel(v4, 1), part)
        blue = _cubic(_channel(v1, 2), _channel(v2, 2), _channel(v3, 2), _channel(v4, 2), part)
    else:
        red = _linear(_channel(v2, 0), _channel(v3, 0), part)
        green = _linear(_channel(v2, 1), _channel(v3, 1), part)
        blue = _linear(_channel(v2, 2), _channel(v3, 2), part)
    return red, green, blue


@triton.jit
def _between_2d(packed, y, x, part_y, part_x, bicubic: tl.constexpr, size: tl.constexpr):
    """The three channels at a point between neighbours along x, then y: float64."""
    red2, green2, blue2 = _between(packed, y, x, 0, 1, part_x, bicubic, size)
    red3, green3, blue3 = _between(packed, y + 1, x, 0, 1, part_x, bicubic, size)
    if bicubic:
        red1, green1, blue1 = _between(packed, y - 1, x, 0, 1, part_x, bicubic, size)
        red4, green4, blue4 = _between(packed, y + 2, x, 0, 1, part_x, bicubic, size)
        red = _cubic(red1, red2, red3, red4, part_y)
        green = _cubic(green1, green2, green3, green4, part_y)
        blue = _cubic(blue1, blue2, blue3, blue4, part_y)
    else:
        red, green, blue = _linear(red2, red3, part_y), _linear(green2, green3, part_y), _linear(blue2, blue3, part_y)
    return red, green, blue


@triton.jit
def _affine_interpolated(packed, fill, matrix, bicubic: tl.constexpr, both_axes: tl.constexpr, size: tl.constexpr):
    pixel = tl.arange(0, size * size)
    y, x = (pixel // size).to(tl.float64) + 0.5, (pixel % size).to(tl.float64) + 0.5
    d, f = _float64(matrix + 3), _float64(matrix + 5)
    source_x = _float64(matrix) * x + _float64(matrix + 1) * y + _float64(matrix + 2)
    source_y = d * x + _float64(matrix + 4) * y + f
    inside = (source_x >= 0.0) & (source_x < size) & (source_y >= 0.0) & (source_y < size)
    source_x, source_y = tl.where(inside, source_x - 0.5, 0.0), tl.where(inside, source_y - 0.5, 0.0)
    floor_x, floor_y = tl.floor(source_x), tl.floor(source_y)
    part_x, part_y = source_x - floor_x, source_y - floor_y
    first_x, first_y = floor_x.to(tl.int32), floor_y.to(tl.int32)
    if both_axes:
        red, green, blue = _between_2d(packed, first_y, first_x, part_y, part_x, bicubic, size)
    else:
        vertical = (d != 0.0) | (f != 0.0)
        dy, dx = tl.where(vertical, 1, 0), tl.where(vertical, 0, 1)
        part = tl.where(vertical, part_y, part_x)
        red, green, blue = _between(packed, first_y, first_x, dy, dx, part, bicubic, size)
    return tl.where(inside, _pack(_byte(red), _byte(green), _byte(blue)), fill)


@triton.jit
def _window(image, window, rows, columns, padding, reflect: tl.constexpr, size: tl.constexpr):
    """The cropped and mirrored part of a padded image, packed."""
    pixel = tl.arange(0, size * size)
    y, x = pixel // size, pixel % size
    top, left, mirrored = tl.load(window), tl.load(window + 1), tl.load(window + 2)
    y = y + top.to(tl.int32) - padding
    x = tl.where(mirrored != 0, size - 1 - x, x) + left.to(tl.int32) - padding
    if reflect:
        y = (rows - 1) - tl.abs((rows - 1) - tl.abs(y))
        x = (columns - 1) - tl.abs((columns - 1) - tl.abs(x))
    inside = (y >= 0) & (y < rows) & (x >= 0) & (x < columns)
    place = image + y * columns + x
    plane = rows * columns
    red = tl.load(place, mask=inside, other=0).to(tl.int32)
    green = tl.load(place + plane, mask=inside, other=0).to(tl.int32)
    return _pack(red, green, tl.load(place + 2 * plane, mask=inside, other=0).to(tl.int32))


@triton.jit(do_not_specialize=NOT_SPECIALISED, do_not_specialize_on_alignment=NOT_ALIGNED)
def _make_view(
    views,
    images,
    windows,
    records,
    tables,
    scale,
    num_steps,
    batch,
    rows,
    columns,
    padding,
    stride_v,
    stride_b,
    stride_c,
    stride_y,
    stride_x,
    reflect: tl.constexpr,
    size: tl.constexpr,
):
    count: tl.constexpr = size * size
    number = tl.program_id(0)
    window = windows + number * 8
    image = images + (number % batch).to(tl.int64) * (3 * rows * columns)
    packed = _window(image, window, rows, columns, padding, reflect, size)

    for step in range(num_steps):
        record = records + (step * tl.num_programs(0) + number) * 9
        kind = tl.load(record)
        factor = _float64(record + 1).to(tl.float32)
        fill = tl.load(record + 2).to(tl.int32)
        matrix = record + 3
        if kind == _AUTOCONTRAST:
            red, green = _autocontrast(_channel(packed, 0)), _autocontrast(_channel(packed, 1))
            packed = _pack(red, green, _autocontrast(_channel(packed, 2)))
        if kind == _EQUALIZE:
            red, green = _equalize(_channel(packed, 0), count), _equalize(_channel(packed, 1), count)
            packed = _pack(red, green, _equalize(_channel(packed, 2), count))
        if kind == _CONTRAST:
            packed = _contrast(packed, factor, count)
        if kind == _TABLE:
            table = tables + tl.load(record + 1) * 256
            red = tl.load(table + _channel(packed, 0)).to(tl.int32)
            green = tl.load(table + _channel(packed, 1)).to(tl.int32)
            packed = _pack(red, green, tl.load(table + _channel(packed, 2)).to(tl.int32))
        if kind == _COLOR:
            packed = _blend_all(_grey(packed), packed, factor)
        if kind == _SHARPNESS:
            packed = _sharpness(packed, factor, size)
        if kind == _NEAREST:
            packed = _affine_nearest(packed, fill, matrix, size)
        if kind == _BILINEAR:
            packed = _affine_interpolated(packed, fill, matrix, False, False, size)
        if kind == _BICUBIC:
            packed = _affine_interpolated(packed, fill, matrix, True, False, size)
        if kind == _BILINEAR_2D:
            packed = _affine_interpolated(packed, fill, matrix, False, True, size)
        if kind == _BICUBIC_2D:
            packed = _affine_interpolated(packed, fill, matrix, True, True, size)

    pixel = tl.arange(0, count)
    y, x = pixel // size, pixel % size
    top, left = tl.load(window + 3), tl.load(window + 4)
    height, width = tl.load(window + 5), tl.load(window + 6)
    erased = (y >= top) & (y < top + height) & (x >= left) & (x < left + width)
    keep = tl.where(erased, 0.0, 1.0)
    place = views + (number // batch).to(tl.int64) * stride_v + (number % batch).to(tl.int64) * stride_b
    place = place + y * stride_y + x * stride_x
    for channel in tl.static_range(3):
        value = tl.div_rn(_channel(packed, channel).to(tl.float32), tl.load(scale + channel).to(tl.float32))
        value = tl.div_rn(
            value - tl.load(scale + 3 + channel).to(tl.float32), tl.load(scale + 6 + channel).to(tl.float32)
        )
        tl.store(place + channel * stride_c, value * keep)

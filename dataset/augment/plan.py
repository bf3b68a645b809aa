"""Running one step of a policy on a batch: images are brought into an order in which every op has one contiguous slice.

The order and all that an op needs is worked out on the host, so that a device only computes and is never waited for.

K images, each with its own op.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import partial
from itertools import pairwise, product

import numpy as np
import torch
from torch import Tensor

from dataset.augment import color, geometry
from dataset.augment.policy import Op, Resample

_TORCH_TYPES = {
    np.dtype(np.int64): torch.int64,
    np.dtype(np.float64): torch.float64,
    np.dtype(np.uint8): torch.uint8,
}


class Upload:
    """Moves many host arrays to a device in one copy that nothing waits for."""

    def __init__(self) -> None:
        self._arrays: list[np.ndarray] = []

    def add(self, array: np.ndarray) -> int:
        """Put an array (int64, float64, or uint8 in eights) in line; returns its place in what `send` gives."""
        self._arrays.append(np.ascontiguousarray(array))
        return len(self._arrays) - 1

    def send(self, device: torch.device) -> list[Tensor]:
        """All arrays as tensors on the device, in the order of `add`."""
        host = torch.from_numpy(np.concatenate([array.view(np.int64).ravel() for array in self._arrays]))
        if device.type == "cuda":
            host = host.pin_memory()
        parts = host.to(device, non_blocking=True).split([array.nbytes // 8 for array in self._arrays])
        return [
            part.view(_TORCH_TYPES[array.dtype]).view(array.shape)
            for part, array in zip(parts, self._arrays, strict=True)
        ]


@dataclass(frozen=True)
class Call:
    """One function for one contiguous slice of images; `inputs` are places in an `Upload`."""

    start: int
    stop: int
    function: Callable[..., Tensor]
    inputs: tuple[int, ...]


@dataclass(frozen=True)
class StepPlan:
    """The calls of one step, for images brought into `order` first (positions in the order before)."""

    order: np.ndarray
    calls: tuple[Call, ...]

    def run(self, images_KCHW: Tensor, uploaded: Sequence[Tensor]) -> None:
        """Change the images, already in `order`, in place."""
        for call in self.calls:
            images = images_KCHW[call.start : call.stop]
            images.copy_(call.function(images, *(uploaded[place] for place in call.inputs)))


def plan_mirror(mirrored_K: np.ndarray) -> StepPlan:
    """Mirror the images marked in bool [K]."""
    order = np.argsort(mirrored_K, kind="stable")
    start = len(order) - int(mirrored_K.sum())
    return StepPlan(order, (Call(start, len(order), geometry.mirror, ()),))


class _Kind(IntEnum):
    """What all images of a kind go through together, whatever their ops."""

    NOTHING = 0
    TABLES = 1
    COLOR = 2
    SHARPNESS = 3
    NEAREST = 4
    SHIFT = 5
    ONE_AXIS_BILINEAR = 6
    ONE_AXIS_BICUBIC = 7
    TWO_AXES_BILINEAR = 8
    TWO_AXES_BICUBIC = 9


def _kind(op: Op, resample: Resample) -> _Kind:
    if op < Op.COLOR:
        return _Kind.TABLES if op else _Kind.NOTHING
    if op < Op.SHEAR_X:
        return _Kind.COLOR if op is Op.COLOR else _Kind.SHARPNESS
    if resample is Resample.NEAREST:
        return _Kind.SHIFT if op in (Op.TRANSLATE_X, Op.TRANSLATE_Y) else _Kind.NEAREST
    first = _Kind.TWO_AXES_BILINEAR if op is Op.ROTATE else _Kind.ONE_AXIS_BILINEAR
    return _Kind(first + (resample is Resample.BICUBIC))


_KINDS = np.zeros((len(Op), max(Resample) + 1), dtype=np.int16)  # by op and interpolation
for _op, _resample in product(Op, Resample):
    _KINDS[_op, _resample] = _kind(_op, _resample)


def plan_step(
    ops_K: np.ndarray,
    values_K: np.ndarray,
    resamples_K: np.ndarray,
    *,
    height: int,
    width: int,
    fill_place: int,
    upload: Upload,
) -> StepPlan:
    """Sort images by kind of computation, and prepare one call for each kind.

    Args:
        ops_K, values_K, resamples_K: as in `dataset.augment.policy.Steps`.
        height, width: of the images in pixels.
        fill_place: where the fill colour, float64 [C], is in the upload.
        upload: takes what the calls need.
    """
    kinds_K = _KINDS[ops_K, resamples_K]
    order = np.argsort(kinds_K * len(Op) + ops_K.astype(np.int16), kind="stable")  # NumPy sorts 16 bits fast
    kinds_K, ops_K, values_K = kinds_K[order], ops_K[order], values_K[order]
    calls = []
    for start, stop in _runs(kinds_K):
        kind, ops, values = _Kind(int(kinds_K[start])), ops_K[start:stop], values_K[start:stop]
        if kind is _Kind.NOTHING:
            continue
        function, arrays = _prepare(kind, ops, values, height, width)
        inputs = tuple(upload.add(array) for array in arrays)
        calls.append(Call(start, stop, function, inputs if kind < _Kind.NEAREST else (*inputs, fill_place)))
    return StepPlan(order, tuple(calls))


def _runs(sorted_K: np.ndarray) -> list[tuple[int, int]]:
    """(start, stop) of every run of equal numbers."""
    edges = [0, *(np.flatnonzero(np.diff(sorted_K)) + 1).tolist(), len(sorted_K)]
    return list(pairwise(edges))


def _prepare(
    kind: _Kind, ops_K: np.ndarray, values_K: np.ndarray, height: int, width: int
) -> tuple[Callable[..., Tensor], tuple[np.ndarray, ...]]:
    """A function of (images, arrays) or, if geometric, (images, arrays, fill colour); and those arrays."""
    if kind is _Kind.TABLES:
        runs = [(Op(int(ops_K[start])), start, stop) for start, stop in _runs(ops_K)]
        fixed = [color.value_tables(op, values_K[start:stop]) for op, start, stop in runs if op >= Op.INVERT]
        seen = tuple(run for run in runs if run[0] < Op.INVERT)
        return partial(_table_ops, seen=seen), (values_K, np.concatenate([np.empty((0, 256), np.uint8), *fixed]))
    if kind is _Kind.COLOR:
        return color.enhance_color, (values_K,)
    if kind is _Kind.SHARPNESS:
        return color.enhance_sharpness, (values_K,)
    matrices_K6 = geometry.affine_matrices(ops_K, values_K, height, width)
    if kind is _Kind.NEAREST:
        return geometry.affine_nearest, (geometry.fixed_point(matrices_K6),)
    if kind is _Kind.SHIFT:
        starts_K, margin_y, margin_x = geometry.shift_starts(matrices_K6, height, width, channels=3)
        return partial(geometry.translate, margin_y=margin_y, margin_x=margin_x), (starts_K,)
    # policies with fixed levels have few different matrices; complex numbers are pairs that NumPy sorts fast
    _, first_U, which_K = np.unique(ops_K + 1j * values_K, return_index=True, return_inverse=True)
    bicubic = kind in (_Kind.ONE_AXIS_BICUBIC, _Kind.TWO_AXES_BICUBIC)
    function = partial(
        geometry.affine_interpolated,
        resample=Resample.BICUBIC if bicubic else Resample.BILINEAR,
        one_axis=kind < _Kind.TWO_AXES_BILINEAR,
    )
    return function, (matrices_K6[first_U], which_K)


def _table_ops(
    images_KCHW: Tensor, values_K: Tensor, fixed_tables: Tensor, *, seen: Sequence[tuple[Op, int, int]]
) -> Tensor:
    """Ops made by tables.

    Args:
        images_KCHW, values_K: first the images whose tables depend on them.
        fixed_tables: uint8 [., 256], tables of the others.
        seen: (op, first image, one behind its last) of the former.
    """
    channels = images_KCHW.shape[1]
    tables = []
    for op, start, stop in seen:
        images = images_KCHW[start:stop]
        if op is Op.AUTOCONTRAST:
            tables.append(color.autocontrast_tables(images))
        elif op is Op.EQUALIZE:
            tables.append(color.equalize_tables(images))
        else:
            tables.append(color.contrast_tables(images, values_K[start:stop]).expand(-1, channels, -1))
    tables.append(fixed_tables.unsqueeze(1).expand(-1, channels, -1))
    return color.apply_tables(images_KCHW, torch.cat(tables))

"""Running one step of a policy on a batch: images are brought into an order in which every op has one contiguous slice.

The order and all that an op needs is worked out on the host, so that a device only computes and is never waited for.

K images, each with its own op.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from dataset.augment import color, geometry
from dataset.augment.policy import Op, Resample


class Upload:
    """Moves many host arrays to a device in one copy that nothing waits for."""

    def __init__(self) -> None:
        self._arrays: list[np.ndarray] = []

    def add(self, array: np.ndarray) -> int:
        """Put an int64 or float64 array in line; returns its place in what `send` gives."""
        self._arrays.append(np.ascontiguousarray(array))
        return len(self._arrays) - 1

    def send(self, device: torch.device) -> list[Tensor]:
        """All arrays as tensors on the device, in the order of `add`."""
        host = torch.from_numpy(np.concatenate([array.view(np.int64).ravel() for array in self._arrays]))
        if device.type == "cuda":
            host = host.pin_memory()
        parts = host.to(device, non_blocking=True).split([array.size for array in self._arrays])
        return [
            (part.view(torch.float64) if array.dtype == np.float64 else part).view(array.shape)
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
    """Sort images by op and interpolation, and prepare one call for each; ops made by tables share a call.

    Args:
        ops_K, values_K, resamples_K: as in `dataset.augment.policy.Steps`.
        height, width: of the images in pixels.
        fill_place: where the fill colour, float64 [C], is in the upload.
        upload: takes what the calls need.
    """
    keys_K = (ops_K * 4 + resamples_K).astype(np.int16)  # NumPy sorts 16 bits much faster
    order = np.argsort(keys_K, kind="stable")
    keys_K, ops_K, values_K = keys_K[order], ops_K[order], values_K[order]
    edges = [0, *(np.flatnonzero(np.diff(keys_K)) + 1).tolist(), len(keys_K)]
    runs = [(Op(int(ops_K[start])), start, stop) for start, stop in pairwise(edges)]
    calls = []
    spans = [run for run in runs if run[0] in color.TABLES]
    if spans:
        start, stop = spans[0][1], spans[-1][2]
        shifted = [(op, first - start, last - start) for op, first, last in spans]
        calls.append(Call(start, stop, partial(_table_ops, spans=shifted), (upload.add(values_K[start:stop]),)))
    for op, start, stop in runs:
        values = values_K[start:stop]
        if op is Op.COLOR:
            calls.append(Call(start, stop, color.enhance_color, (upload.add(values),)))
        elif op is Op.SHARPNESS:
            calls.append(Call(start, stop, color.enhance_sharpness, (upload.add(values),)))
        elif op >= Op.SHEAR_X:
            matrices = geometry.affine_matrices(ops_K[start:stop], values, height, width)
            resample = Resample(int(keys_K[start]) % 4)
            function, array = _geometric(op, resample, matrices, height, width)
            calls.append(Call(start, stop, function, (upload.add(array), fill_place)))
    return StepPlan(order, tuple(calls))


def _table_ops(images_KCHW: Tensor, values_K: Tensor, *, spans: Sequence[tuple[Op, int, int]]) -> Tensor:
    """Ops made by tables; spans: (op, first image, one behind its last)."""
    channels = images_KCHW.shape[1]
    tables = [
        color.TABLES[op](images_KCHW[start:stop], values_K[start:stop]).expand(-1, channels, -1)
        for op, start, stop in spans
    ]
    return color.apply_tables(images_KCHW, torch.cat(tables))


def _geometric(
    op: Op, resample: Resample, matrices_K6: np.ndarray, height: int, width: int
) -> tuple[Callable[..., Tensor], np.ndarray]:
    """A function of (images, array, fill colour), and that array."""
    if resample is not Resample.NEAREST:
        axes = {Op.SHEAR_X: "x", Op.TRANSLATE_X: "x", Op.SHEAR_Y: "y", Op.TRANSLATE_Y: "y", Op.ROTATE: "xy"}[op]
        return partial(geometry.affine_interpolated, resample=resample, axes=axes), matrices_K6
    if op in (Op.TRANSLATE_X, Op.TRANSLATE_Y):
        starts_K, margin_y, margin_x = geometry.shift_starts(matrices_K6, height, width, channels=3)
        return partial(geometry.translate, margin_y=margin_y, margin_x=margin_x), starts_K
    return geometry.affine_nearest, geometry.fixed_point(matrices_K6)

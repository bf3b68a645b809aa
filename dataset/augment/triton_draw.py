"""Drawing the parameters of views on a GPU, in one Triton kernel: what `ViewMaker.draw` draws, without the host.

One lane draws one view. Its numbers come from the hash of `utils.seed`, in integers; products are those of float64, so
that windows, boxes and ops are the host's, bit for bit. What a policy does is looked up in a table of all its outcomes,
made on the host, where rotations need Pillow's rounded cosines. One step is no pure arithmetic: a box's ratio is an
exponential, whose last bit libraries give as they like (NumPy's too, from machine to machine); its side in pixels would
be another one only where a square root lies within that bit of a half.

K = V x B views; N steps of a policy; R outcomes of a step.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call"
# (the arguments of a kernel's functions are of Triton's own types, which it works out itself)

from dataclasses import dataclass

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from dataset.augment import erasing
from dataset.augment.plan import Upload
from dataset.augment.policy import Policy
from dataset.augment.triton_views import COMPILER_OPTIONS, records_of
from utils import seed

LANES = 128  # views of one program
_GOLDEN = tl.constexpr(seed.GOLDEN)
_OF_VIEW = tl.constexpr(seed.OF_VIEW)
_FIRST = tl.constexpr(seed.FIRST_FACTOR)
_SECOND = tl.constexpr(seed.SECOND_FACTOR)
_PLACE_SLOTS = tl.constexpr(erasing.PLACE_SLOTS)
_TRIES = tl.constexpr(erasing.TRIES)


@dataclass(frozen=True, kw_only=True)
class Boxes:
    """Random erasing, as in `erasing.draw_erasing`."""

    probability: float
    area: tuple[float, float]
    ratio: tuple[float, float]


class Drawing:
    """Draws windows, boxes and ops on a device, where `make_drawn_views` reads them.

    Args:
        policy: whose outcomes a table can hold (`Policy.levels`), or None for no ops.
        size: side of a view in pixels.
        room: how far a crop can move down and to the right, in pixels.
        flip: mirror half of the views.
        boxes: None: nothing is erased.
        first_slot: number of the policy's first uniform number.
        device: where.
    """

    def __init__(
        self,
        policy: Policy | None,
        *,
        size: int,
        room: tuple[int, int],
        flip: bool,
        boxes: Boxes | None,
        first_slot: int,
        device: torch.device,
    ) -> None:
        self.size, self.flip, self.boxes, self.device = size, flip, boxes, device
        area, ratio = ((0.0, 0.0), (1.0, 1.0)) if boxes is None else (boxes.area, boxes.ratio)
        log_low, log_high = np.log(ratio)
        numbers = [room[0] + 1, room[1] + 1, 0.0 if boxes is None else boxes.probability]
        numbers += [area[0], area[1] - area[0], log_low, log_high - log_low]
        levels = None if policy is None else policy.levels
        self.num_steps = 0 if levels is None else len(levels.slots)
        self.majors, self.minors = (1, 1) if levels is None else (levels.majors, levels.minors)
        self.box_slot = first_slot + (0 if policy is None else policy.num_slots)
        slots_N4, chances_N = np.zeros((1, 4), np.int64), np.zeros((1, 1))
        records_NR9, tables = np.zeros((1, 1, 9), np.int64), np.zeros((1, 256), np.uint8)
        if policy is not None and levels is not None:
            slots_N4, chances_N = first_slot + np.array(levels.slots, np.int64), np.array(levels.chances, np.float64)
            steps = [(*(part[0] for part in step), policy.fill) for step in zip(*policy.outcomes(), strict=True)]
            records_NR9, tables = records_of(steps, self.majors * self.minors * 2, size)
        self._fixed = [self._place(array) for array in (np.array(numbers), slots_N4, chances_N, records_NR9)]
        self.tables = self._place(tables)

    def _place(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(self.device)

    def draw(self, key: int, positions_B: np.ndarray, num_views: int, *, first_view: int = 0) -> tuple[Tensor, Tensor]:
        """Windows int64 [K, 8] and records int64 [N, K, 9], as `triton_views` reads them; nothing waits.

        Args:
            key: of the epoch's views.
            positions_B: int64 [B], positions in the epoch's global order.
            num_views: V.
            first_view: number of the first of them.
        """
        batch, count = len(positions_B), num_views * len(positions_B)
        upload = Upload()
        upload.add(np.concatenate([[key, first_view], np.asarray(positions_B, np.int64)]))
        (positions,) = upload.send(self.device)
        windows_K8 = torch.empty((count, 8), dtype=torch.int64, device=self.device)
        records_NK9 = torch.empty((max(self.num_steps, 1), count, 9), dtype=torch.int64, device=self.device)
        with torch.cuda.device_of(windows_K8):
            _draw[(triton.cdiv(count, LANES),)](
                windows_K8,
                records_NK9,
                positions,
                *self._fixed,
                count,
                batch,
                box_slot=self.box_slot,
                num_steps=self.num_steps,
                majors=self.majors,
                minors=self.minors,
                size=self.size,
                flips=self.flip,
                erases=self.boxes is not None,
                lanes=LANES,
                **COMPILER_OPTIONS,
            )
        return windows_K8, records_NK9


# ---- the kernel ------------------------------------------------------------------------------------------------------


@triton.jit
def _mix(z):
    """SplitMix64's finaliser, on uint64."""
    z = (z ^ (z >> 30)) * _FIRST
    z = (z ^ (z >> 27)) * _SECOND
    return z ^ (z >> 31)


@triton.jit
def _uniform(stream, slot):
    """float64 in [0, 1)."""
    bits = _mix(stream + tl.cast(slot + 1, tl.uint64) * _GOLDEN)
    return (bits >> 11).to(tl.int64).to(tl.float64) * 1.1102230246251565e-16  # 2^-53


@triton.jit
def _round(values):
    """To the nearest whole number, halves to the even one: int64."""
    below = tl.floor(values)
    part, whole = values - below, below.to(tl.int64)
    up = (part > 0.5) | ((part == 0.5) & ((whole & 1) == 1))
    return whole + up.to(tl.int64)


@triton.jit(do_not_specialize=["count", "batch"])
def _draw(
    windows,
    records,
    positions,
    numbers,
    slots,
    chances,
    outcomes,
    count,
    batch,
    box_slot: tl.constexpr,
    num_steps: tl.constexpr,
    majors: tl.constexpr,
    minors: tl.constexpr,
    size: tl.constexpr,
    flips: tl.constexpr,
    erases: tl.constexpr,
    lanes: tl.constexpr,
):
    number = tl.program_id(0) * lanes + tl.arange(0, lanes)
    valid = number < count
    view = number // batch
    position = tl.load(positions + 2 + (number - view * batch), mask=valid, other=0)
    stream = _mix(tl.load(positions).to(tl.uint64) + position.to(tl.uint64) * _GOLDEN)
    stream = _mix(stream ^ ((view + tl.load(positions + 1) + 1).to(tl.uint64) * _OF_VIEW))

    window = windows + number.to(tl.int64) * 8
    tl.store(window, (_uniform(stream, 0) * tl.load(numbers)).to(tl.int64), mask=valid)
    tl.store(window + 1, (_uniform(stream, 1) * tl.load(numbers + 1)).to(tl.int64), mask=valid)
    nothing = tl.zeros((lanes,), tl.int64)
    mirrored = nothing
    if flips:
        mirrored = (_uniform(stream, 2) < 0.5).to(tl.int64)
    tl.store(window + 2, mirrored, mask=valid)

    top, left, height, width = nothing, nothing, nothing, nothing
    if erases:
        found = nothing
        for attempt in range(_TRIES):
            slot = box_slot + _PLACE_SLOTS + 2 * attempt
            area = tl.load(numbers + 3) + tl.load(numbers + 4) * _uniform(stream, slot)
            area = area * (size * size)
            ratio = tl.exp(tl.load(numbers + 5) + tl.load(numbers + 6) * _uniform(stream, slot + 1))
            rows, columns = _round(tl.sqrt(area * ratio)), _round(tl.sqrt(area / ratio))
            first = (rows < size) & (columns < size) & (found == 0)
            height, width = tl.where(first, rows, height), tl.where(first, columns, width)
            found = found | first.to(tl.int64)
        erased = found * (_uniform(stream, box_slot) < tl.load(numbers + 2)).to(tl.int64)
        top = (_uniform(stream, box_slot + 1) * (size - height + 1).to(tl.float64)).to(tl.int64) * erased
        left = (_uniform(stream, box_slot + 2) * (size - width + 1).to(tl.float64)).to(tl.int64) * erased
        height, width = height * erased, width * erased
    tl.store(window + 3, top, mask=valid)
    tl.store(window + 4, left, mask=valid)
    tl.store(window + 5, height, mask=valid)
    tl.store(window + 6, width, mask=valid)
    tl.store(window + 7, nothing, mask=valid)

    for step in tl.static_range(num_steps):
        of_step = slots + step * 4
        major = (_uniform(stream, tl.load(of_step)) * majors).to(tl.int64)
        minor = (_uniform(stream, tl.load(of_step + 1)) * minors).to(tl.int64)
        negative = (_uniform(stream, tl.load(of_step + 2)) < 0.5).to(tl.int64)
        applied = _uniform(stream, tl.load(of_step + 3)) < tl.load(chances + step * majors + major, mask=valid, other=0)
        outcome = (major * minors + minor) * 2 + negative + step * (majors * minors * 2)
        record = records + (tl.cast(step, tl.int64) * count + number) * 9
        for place in tl.static_range(9):
            # an op that is left out keeps its colour alone, which is that of all outcomes
            is_read = valid & (applied | (place == 2))
            value = tl.load(outcomes + outcome * 9 + place, mask=is_read, other=0)
            tl.store(record + place, value, mask=valid)

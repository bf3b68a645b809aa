"""Augmentation policies: which ops an image goes through, in which order and how strongly.

Drawing only, in NumPy on the host: a policy maps uniform numbers to a `Steps`, and `dataset.augment.plan` applies it.

V views, B images, N steps (ops in sequence), U uniform numbers per image and view.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from enum import IntEnum
from typing import NamedTuple

import numpy as np
import torch

from utils.errors import UserError


class Op(IntEnum):
    """One image operation; the comment says what its value means."""

    NONE = 0
    AUTOCONTRAST = 1
    EQUALIZE = 2
    CONTRAST = 3  # PIL ImageEnhance factor; 1 changes nothing
    INVERT = 4
    POSTERIZE = 5  # high bits kept, 0 to 8
    SOLARIZE = 6  # values from this on are inverted
    SOLARIZE_ADD = 7  # added to values below 128, saturating
    BRIGHTNESS = 8  # factor, as for contrast
    COLOR = 9  # factor
    SHARPNESS = 10  # factor
    SHEAR_X = 11  # output (x, y) reads (x + value * y, y)
    SHEAR_Y = 12  # output (x, y) reads (x, y + value * x)
    TRANSLATE_X = 13  # output (x, y) reads (x + value * width, y)
    TRANSLATE_Y = 14  # output (x, y) reads (x, y + value * height)
    ROTATE = 15  # degrees counter-clockwise about the centre


class Resample(IntEnum):
    """How a geometric op reads between pixels; the numbers are PIL's. NEAREST for every other op."""

    NEAREST = 0
    BILINEAR = 2
    BICUBIC = 3


class Steps(NamedTuple):
    """What happens to each image of each view, in order: ops and resamples int64, values float64, all [N, V, B]."""

    ops_NVB: np.ndarray
    values_NVB: np.ndarray
    resamples_NVB: np.ndarray


class Levels(NamedTuple):
    """How a policy of few outcomes reads its numbers, so that a table of them can be looked up where there is no NumPy.

    With u the uniform numbers and (i, j, k, l) the slots of a step, its outcome is (floor(u[i] * majors),
    floor(u[j] * minors), u[k] < 0.5), and it is left out unless u[l] < chances[its number][floor(u[i] * majors)].
    """

    majors: int
    minors: int
    slots: Sequence[tuple[int, int, int, int]]
    chances: Sequence[Sequence[float]]


class Policy(ABC):
    """Draws the ops of every image of every view."""

    num_slots: int  # U
    fill: tuple[int, int, int]  # colour where a geometric op reads outside the image
    levels: Levels | None = None  # None: magnitudes are continuous

    def outcomes(self) -> Steps:
        """Every outcome of `levels`, R of them, each step as it is where it is not left out: [N, 1, R]."""
        levels = self.levels
        if levels is None:
            raise ValueError(f"{type(self).__name__} has no table of outcomes here")
        indices = np.indices((levels.majors, levels.minors, 2)).reshape(3, -1)
        uniforms_1RU = np.zeros((1, indices.shape[1], self.num_slots))
        for major, minor, sign, whether in levels.slots:
            # the slot of the sub-policy or op last, which stands for those that a policy does not have
            uniforms_1RU[0, :, whether] = 0.0
            uniforms_1RU[0, :, sign] = np.where(indices[2], 0.25, 0.75)
            uniforms_1RU[0, :, minor] = (indices[1] + 0.5) / levels.minors
            uniforms_1RU[0, :, major] = (indices[0] + 0.5) / levels.majors
        return self.draw(uniforms_1RU)

    @abstractmethod
    def draw(self, uniforms_VBU: np.ndarray) -> Steps:
        """Uniform numbers [V, B, U] in [0, 1) -> steps; each image's depend on its own numbers only."""


# Sub-policies (p1, op1, level1, p2, op2, level2), Cubuk et al., arXiv:1805.09501, appendix. cifar100 takes cifar10's.
AUTOAUGMENT_POLICIES: dict[str, tuple[tuple[float, str, int, float, str, int], ...]] = {
    "cifar10": (
        (0.1, "invert", 7, 0.2, "contrast", 6),
        (0.7, "rotate", 2, 0.3, "translateX", 9),
        (0.8, "sharpness", 1, 0.9, "sharpness", 3),
        (0.5, "shearY", 8, 0.7, "translateY", 9),
        (0.5, "autocontrast", 8, 0.9, "equalize", 2),
        (0.2, "shearY", 7, 0.3, "posterize", 7),
        (0.4, "color", 3, 0.6, "brightness", 7),
        (0.3, "sharpness", 9, 0.7, "brightness", 9),
        (0.6, "equalize", 5, 0.5, "equalize", 1),
        (0.6, "contrast", 7, 0.6, "sharpness", 5),
        (0.7, "color", 7, 0.5, "translateX", 8),
        (0.3, "equalize", 7, 0.4, "autocontrast", 8),
        (0.4, "translateY", 3, 0.2, "sharpness", 6),
        (0.9, "brightness", 6, 0.2, "color", 8),
        (0.5, "solarize", 2, 0.0, "invert", 3),
        (0.2, "equalize", 0, 0.6, "autocontrast", 0),
        (0.2, "equalize", 8, 0.6, "equalize", 4),
        (0.9, "color", 9, 0.6, "equalize", 6),
        (0.8, "autocontrast", 4, 0.2, "solarize", 8),
        (0.1, "brightness", 3, 0.7, "color", 0),
        (0.4, "solarize", 5, 0.9, "autocontrast", 3),
        (0.9, "translateY", 9, 0.7, "translateY", 9),
        (0.9, "autocontrast", 2, 0.8, "solarize", 3),
        (0.8, "equalize", 8, 0.1, "invert", 3),
        (0.7, "translateY", 9, 0.9, "autocontrast", 1),
    ),
    "svhn": (
        (0.9, "shearX", 4, 0.2, "invert", 3),
        (0.9, "shearY", 8, 0.7, "invert", 5),
        (0.6, "equalize", 5, 0.6, "solarize", 6),
        (0.9, "invert", 3, 0.6, "equalize", 3),
        (0.6, "equalize", 1, 0.9, "rotate", 3),
        (0.9, "shearX", 4, 0.8, "autocontrast", 3),
        (0.9, "shearY", 8, 0.4, "invert", 5),
        (0.9, "shearY", 5, 0.2, "solarize", 6),
        (0.9, "invert", 6, 0.8, "autocontrast", 1),
        (0.6, "equalize", 3, 0.9, "rotate", 3),
        (0.9, "shearX", 4, 0.3, "solarize", 3),
        (0.8, "shearY", 8, 0.7, "invert", 4),
        (0.9, "equalize", 5, 0.6, "translateY", 6),
        (0.9, "invert", 4, 0.6, "equalize", 7),
        (0.3, "contrast", 3, 0.8, "rotate", 4),
        (0.8, "invert", 5, 0.0, "translateY", 2),
        (0.7, "shearY", 6, 0.4, "solarize", 8),
        (0.6, "invert", 4, 0.8, "rotate", 4),
        (0.3, "shearY", 7, 0.9, "translateX", 3),
        (0.1, "shearX", 6, 0.6, "invert", 5),
        (0.7, "solarize", 2, 0.6, "translateY", 7),
        (0.8, "shearY", 4, 0.8, "invert", 8),
        (0.7, "shearX", 9, 0.8, "translateY", 3),
        (0.8, "shearY", 5, 0.7, "autocontrast", 3),
        (0.7, "shearX", 2, 0.1, "invert", 5),
    ),
    "imagenet": (
        (0.4, "posterize", 8, 0.6, "rotate", 9),
        (0.6, "solarize", 5, 0.6, "autocontrast", 5),
        (0.8, "equalize", 8, 0.6, "equalize", 3),
        (0.6, "posterize", 7, 0.6, "posterize", 6),
        (0.4, "equalize", 7, 0.2, "solarize", 4),
        (0.4, "equalize", 4, 0.8, "rotate", 8),
        (0.6, "solarize", 3, 0.6, "equalize", 7),
        (0.8, "posterize", 5, 1.0, "equalize", 2),
        (0.2, "rotate", 3, 0.6, "solarize", 8),
        (0.6, "equalize", 8, 0.4, "posterize", 6),
        (0.8, "rotate", 8, 0.4, "color", 0),
        (0.4, "rotate", 9, 0.6, "equalize", 2),
        (0.0, "equalize", 7, 0.8, "equalize", 8),
        (0.6, "invert", 4, 1.0, "equalize", 8),
        (0.6, "color", 4, 1.0, "contrast", 8),
        (0.8, "rotate", 8, 1.0, "color", 2),
        (0.8, "color", 8, 0.8, "solarize", 7),
        (0.4, "sharpness", 7, 0.6, "invert", 8),
        (0.6, "shearX", 5, 1.0, "equalize", 9),
        (0.4, "color", 0, 0.6, "equalize", 3),
        (0.4, "equalize", 7, 0.2, "solarize", 4),
        (0.6, "solarize", 5, 0.6, "autocontrast", 5),
        (0.6, "invert", 4, 1.0, "equalize", 8),
        (0.6, "color", 4, 1.0, "contrast", 8),
        (0.8, "equalize", 8, 0.6, "equalize", 3),
    ),
}


class _Scale(NamedTuple):
    """The values of an AutoAugment op: `offset` plus the level's point between `low` and `high`, both included."""

    op: Op
    low: float = 0.0
    high: float = 0.0
    signed: bool = False  # the point counts + or - with equal chance
    offset: float = 0.0
    resample: Resample = Resample.NEAREST

    def point(self, level: int) -> float:
        """The level's point, level 0 to 9."""
        point = float(np.linspace(self.low, self.high, 10)[level])
        return float(np.rint(point)) if self.op is Op.POSTERIZE else point


# The published runs' version of AutoAugment: rotation is always counter-clockwise.
_AUTOAUGMENT_SCALES = {
    "shearX": _Scale(Op.SHEAR_X, 0, 0.3, signed=True, resample=Resample.BICUBIC),
    "shearY": _Scale(Op.SHEAR_Y, 0, 0.3, signed=True, resample=Resample.BICUBIC),
    "translateX": _Scale(Op.TRANSLATE_X, 0, 150 / 331, signed=True),
    "translateY": _Scale(Op.TRANSLATE_Y, 0, 150 / 331, signed=True),
    "rotate": _Scale(Op.ROTATE, 0, 30),
    "color": _Scale(Op.COLOR, 0, 0.9, signed=True, offset=1),
    "contrast": _Scale(Op.CONTRAST, 0, 0.9, signed=True, offset=1),
    "brightness": _Scale(Op.BRIGHTNESS, 0, 0.9, signed=True, offset=1),
    "sharpness": _Scale(Op.SHARPNESS, 0, 0.9, signed=True, offset=1),
    "posterize": _Scale(Op.POSTERIZE, 8, 4),
    "solarize": _Scale(Op.SOLARIZE, 256, 0),
    "autocontrast": _Scale(Op.AUTOCONTRAST),
    "equalize": _Scale(Op.EQUALIZE),
    "invert": _Scale(Op.INVERT),
}


class AutoAugment(Policy):
    """One of 25 sub-policies for each image; each of its two ops with its own probability.

    Args:
        name: key of AUTOAUGMENT_POLICIES.
    """

    num_slots = 5  # sub-policy; for each op: whether, sign
    fill = (128, 128, 128)

    def __init__(self, name: str) -> None:
        pairs = [((p1, op1, m1), (p2, op2, m2)) for p1, op1, m1, p2, op2, m2 in AUTOAUGMENT_POLICIES[name]]
        scales = [[_AUTOAUGMENT_SCALES[op] for _, op, _ in pair] for pair in pairs]
        self._probabilities = np.array([[p for p, _, _ in pair] for pair in pairs])
        self._points = np.array([[_AUTOAUGMENT_SCALES[op].point(m) for _, op, m in pair] for pair in pairs])
        self._ops = np.array([[scale.op for scale in pair] for pair in scales], dtype=np.int64)
        self._signed = np.array([[scale.signed for scale in pair] for pair in scales])
        self._offsets = np.array([[scale.offset for scale in pair] for pair in scales], dtype=np.float64)
        self._resamples = np.array([[scale.resample for scale in pair] for pair in scales], dtype=np.int64)
        slots = [(0, 0, 2 + 2 * i, 1 + 2 * i) for i in range(2)]
        self.levels = Levels(len(pairs), 1, slots, self._probabilities.T.tolist())

    def draw(self, uniforms_VBU: np.ndarray) -> Steps:
        """Uniform numbers [V, B, 5] -> two steps."""
        sub_policy_VB = (uniforms_VBU[..., 0] * len(self._ops)).astype(np.int64)
        steps = []
        for i in range(2):
            applied = uniforms_VBU[..., 1 + 2 * i] < self._probabilities[sub_policy_VB, i]
            negative = self._signed[sub_policy_VB, i] & (uniforms_VBU[..., 2 + 2 * i] < 0.5)
            points = np.where(negative, -1.0, 1.0) * self._points[sub_policy_VB, i]
            values = self._offsets[sub_policy_VB, i] + points
            steps.append((self._ops[sub_policy_VB, i] * applied, values * applied, self._resamples[sub_policy_VB, i]))
        ops, values, resamples = (np.stack(part) for part in zip(*steps, strict=True))
        return Steps(ops, values, resamples * (ops > 0))


_RANDAUGMENT_OPS = np.array([op for op in Op if op is not Op.NONE], dtype=np.int64)
_TOP_LEVEL = 10.0


class RandAugment(Policy):
    """`num_ops` ops drawn uniformly with replacement, each applied with probability 0.5 at a random level.

    Cubuk et al., arXiv:1909.13719, in timm's form, whose distribution this is.

    Args:
        magnitude: mean level, 0 to 10.
        num_ops: ops per image.
        std: standard deviation of the level, which is clipped to [0, 10].
        increasing: every op changes more at a higher level.
        fill: colour where a geometric op reads outside the image.
    """

    _SLOTS = 6  # op, whether, level (2), sign, resample

    def __init__(
        self,
        *,
        magnitude: float = 10.0,
        num_ops: int = 2,
        std: float = 0.0,
        increasing: bool = False,
        fill: tuple[int, int, int] = (128, 128, 128),
    ) -> None:
        self.magnitude = magnitude
        self.num_ops = num_ops
        self.std = std
        self.increasing = increasing
        self.fill = fill
        self.num_slots = num_ops * self._SLOTS
        if std == 0:
            slots = [(first, first + 5, first + 4, first + 1) for first in range(0, self.num_slots, self._SLOTS)]
            count = len(_RANDAUGMENT_OPS)  # each of them bilinear or bicubic
            self.levels = Levels(count, 2, slots, [[0.5] * count] * num_ops)

    def draw(self, uniforms_VBU: np.ndarray) -> Steps:
        """Uniform numbers [V, B, 6 * num_ops] -> num_ops steps."""
        uniforms_NVBU = np.moveaxis(uniforms_VBU.reshape(*uniforms_VBU.shape[:2], self.num_ops, self._SLOTS), 2, 0)
        drawn, applied, level_1, level_2, sign, resample = np.moveaxis(uniforms_NVBU, -1, 0)
        ops = _RANDAUGMENT_OPS[(drawn * len(_RANDAUGMENT_OPS)).astype(np.int64)] * (applied < 0.5)
        normals = np.sqrt(-2 * np.log1p(-level_1)) * np.cos(2 * np.pi * level_2)
        levels = np.clip(self.magnitude + self.std * normals, 0.0, _TOP_LEVEL)
        values = self._values(ops, levels, np.where(sign < 0.5, -1.0, 1.0))
        resamples = np.where(resample < 0.5, int(Resample.BILINEAR), int(Resample.BICUBIC)) * (ops >= Op.SHEAR_X)
        return Steps(ops, values, resamples)

    def _values(self, ops: np.ndarray, levels: np.ndarray, signs: np.ndarray) -> np.ndarray:
        """Values of the ops at their levels; all three arrays have one shape."""
        parts = levels / _TOP_LEVEL
        bits = np.trunc(parts * 4)
        threshold = np.trunc(parts * 256)
        if self.increasing:
            bits, threshold = 4 - bits, 256 - threshold
            factor = np.maximum(0.1, 1.0 + signs * (parts * 0.9))
        else:
            factor = parts * 1.8 + 0.1
        shear, shift, angle = (signs * (parts * top) for top in (0.3, 0.45, 30.0))
        of_op = {
            Op.POSTERIZE: bits,
            Op.SOLARIZE: threshold,
            Op.SOLARIZE_ADD: np.trunc(parts * 110),
            Op.BRIGHTNESS: factor,
            Op.CONTRAST: factor,
            Op.COLOR: factor,
            Op.SHARPNESS: factor,
            Op.SHEAR_X: shear,
            Op.SHEAR_Y: shear,
            Op.TRANSLATE_X: shift,
            Op.TRANSLATE_Y: shift,
            Op.ROTATE: angle,
        }
        return np.select([ops == op for op in of_op], list(of_op.values()), 0.0)


_FACTORS = (Op.BRIGHTNESS, Op.COLOR, Op.CONTRAST, Op.SHARPNESS)


class ColorJitter(Policy):
    """Brightness, contrast and saturation in random order, each by a factor uniform in [1 - strength, 1 + strength].

    The distribution of torchvision's ColorJitter(strength, strength, strength).
    """

    num_slots = 6  # three keys whose order is that of the ops, three factors
    fill = (128, 128, 128)

    def __init__(self, strength: float) -> None:
        self.strength = strength

    def draw(self, uniforms_VBU: np.ndarray) -> Steps:
        """Uniform numbers [V, B, 6] -> three steps."""
        order_VBN = uniforms_VBU[..., :3].argsort(axis=-1)
        ops_NVB = np.moveaxis(np.array([Op.BRIGHTNESS, Op.CONTRAST, Op.COLOR], dtype=np.int64)[order_VBN], -1, 0)
        low, high = max(0.0, 1 - self.strength), 1 + self.strength
        values_NVB = low + (high - low) * np.moveaxis(uniforms_VBU[..., 3:], -1, 0)
        return Steps(ops_NVB, values_NVB, np.zeros_like(ops_NVB))


TRIVIAL = "trivial"  # the value of --randaa
ALWAYS = 2.0  # above every uniform number
_TRIVIAL_BINS = 31


def _bins(top: float) -> np.ndarray:
    """The magnitudes from 0 to `top`, with torchvision's float32 rounding."""
    return torch.linspace(0.0, top, _TRIVIAL_BINS).double().numpy()


class TrivialAugment(Policy):
    """One op for each image, of 14 that are equally likely, at one of 31 magnitudes that are equally likely.

    TrivialAugment in its wide space (Müller and Hutter, arXiv:2103.10158), as torchvision's `TrivialAugmentWide` has it
    for Pillow images: geometric ops read the nearest pixel and fill with black; a sign is + or - with equal chance.

    Args:
        side: of the images, in pixels; translations are in whole pixels.
    """

    num_slots = 3  # op, magnitude, sign
    fill = (0, 0, 0)

    def __init__(self, side: int) -> None:
        zero = np.zeros(_TRIVIAL_BINS)
        factors = {op: (1 + _bins(0.99), 1 - _bins(0.99)) for op in _FACTORS}
        shears = {op: (_bins(0.99), -_bins(0.99)) for op in (Op.SHEAR_X, Op.SHEAR_Y)}
        shift = np.trunc(_bins(32.0)) / side
        shifts = dict.fromkeys((Op.TRANSLATE_X, Op.TRANSLATE_Y), (-shift, shift))
        turns = {Op.ROTATE: (_bins(135.0), -_bins(135.0))}
        bits = 8 - np.rint(np.arange(_TRIVIAL_BINS) / ((_TRIVIAL_BINS - 1) / 6))
        unsigned = {Op.NONE: zero, Op.AUTOCONTRAST: zero, Op.EQUALIZE: zero, Op.POSTERIZE: bits}
        unsigned |= {Op.SOLARIZE: 255 - _bins(255.0)}
        of_op = shears | shifts | turns | factors | {op: (values, values) for op, values in unsigned.items()}
        self._ops = np.array([*of_op], dtype=np.int64)
        self._values = np.array([*of_op.values()])  # [op, sign, magnitude]
        self.levels = Levels(len(of_op), _TRIVIAL_BINS, [(0, 1, 2, 0)], [[ALWAYS] * len(of_op)])

    def draw(self, uniforms_VBU: np.ndarray) -> Steps:
        """Uniform numbers [V, B, 3] -> one step."""
        which = (uniforms_VBU[..., 0] * len(self._ops)).astype(np.int64)
        magnitude = (uniforms_VBU[..., 1] * _TRIVIAL_BINS).astype(np.int64)
        values_VB = self._values[which, (uniforms_VBU[..., 2] < 0.5).astype(np.int64), magnitude]
        ops_VB = self._ops[which]
        return Steps(ops_VB[None], values_VB[None], np.zeros_like(ops_VB)[None])


_RANDAUGMENT_FORM = "rand-mM[-nN][-mstdD][-inc0|1], for instance rand-m9-n2-mstd0.5-inc1"


def parse_randaugment(text: str, fill: tuple[int, int, int] = (128, 128, 128)) -> RandAugment:
    """The policy that a string such as "rand-m9-n2-mstd0.5-inc1" describes; m is 10, n 2, mstd 0, inc 0 if absent.

    Raises:
        UserError: not of that form; the line names --randaa.
    """
    head, *parts = text.split("-")
    found = [re.fullmatch(r"(m|n|mstd|inc)(\d+(?:\.\d+)?)", part) for part in parts]
    values = {match[1]: match[2] for match in found if match}
    if (
        head != "rand"
        or len(values) != len(parts)
        or not re.fullmatch(r"[1-9]\d*", values.get("n", "2"))
        or values.get("inc", "0") not in ("0", "1")
    ):
        raise UserError(f"--randaa {text!r} is not a RandAugment string: expected {_RANDAUGMENT_FORM}, or {TRIVIAL}.")
    return RandAugment(
        magnitude=float(values.get("m", _TOP_LEVEL)),
        num_ops=int(values.get("n", 2)),
        std=float(values.get("mstd", 0)),
        increasing=values.get("inc") == "1",
        fill=fill,
    )

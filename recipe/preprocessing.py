"""What becomes of an image before a network sees it: the plain dict `preprocessing` that travels with every model."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from recipe.datasets import Statistic
from utils.errors import UserError

INTERPOLATIONS = ("bicubic", "bilinear")  # Pillow's, antialiased
RESIZE_FACTOR = 1.15  # evaluation of large images: the short side is this times the crop, rounded down
COLOR_ORDER = "RGB"
VALUE_RANGE = (0.0, 1.0)


def eval_resize(crop_size: int, crop_pct: float | None = None) -> int:
    """Short side, in pixels, to which evaluation resizes a large image before its centre is cut out.

    Args:
        crop_size: side of the cut in pixels.
        crop_pct: side of the cut over the short side; None: 1 / RESIZE_FACTOR.
    """
    # the summand is for quotients that rounding leaves a hair under a whole number: 160 / (160 / 232) is 231.99…
    return int(RESIZE_FACTOR * crop_size) if crop_pct is None else int(crop_size / crop_pct + 1e-6)


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """How evaluation and prediction prepare an image file. In this order:

    Attributes:
        resize: the short side becomes this many pixels, the long side in proportion, rounded down.
        interpolation: of INTERPOLATIONS.
        crop: side, in pixels, of the square that is cut out of the centre; its corner rounds half to even.
        mean, std: per channel, subtracted and divided by, after the values were brought to VALUE_RANGE.
    """

    resize: int
    interpolation: str
    crop: int
    mean: Statistic
    std: Statistic

    def as_dict(self) -> dict[str, Any]:
        """Plain data, the same fields in checkpoints, .pt2 files and ONNX."""
        return {
            "resize": self.resize,
            "interpolation": self.interpolation,
            "crop": self.crop,
            "color_order": COLOR_ORDER,
            "value_range": list(VALUE_RANGE),
            "mean": list(self.mean),
            "std": list(self.std),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], source: str) -> "Preprocessing":
        """Inverse of `as_dict`.

        Args:
            source: what errors call the file.

        Raises:
            UserError: a field is missing, or says something that is not done here.
        """
        try:
            found = cls(
                resize=int(values["resize"]),
                interpolation=str(values["interpolation"]),
                crop=int(values["crop"]),
                mean=_three(values["mean"]),
                std=_three(values["std"]),
            )
            same = (values["color_order"], tuple(values["value_range"])) == (COLOR_ORDER, VALUE_RANGE)
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise UserError(
                f"{source}: its entry 'preprocessing' is damaged: {type(error).__name__} {error}."
            ) from None
        sizes_fit = 1 <= found.crop <= found.resize
        if not (same and sizes_fit and found.interpolation in INTERPOLATIONS and all(one > 0 for one in found.std)):
            raise UserError(
                f"{source}: its entry 'preprocessing' is none that can be followed: expected a crop of at most "
                f"`resize` pixels, {' or '.join(INTERPOLATIONS)}, {COLOR_ORDER}, and values from 0 to 1."
            )
        return found


def _three(values: Any) -> Statistic:
    red, green, blue = map(float, values)
    return red, green, blue

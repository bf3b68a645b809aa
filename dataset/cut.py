"""Cutting decoded images to the squares that are trained on: random resized crops, or the centre."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dataset.augment.resized_crop import RESIZED_CROP_SLOTS, draw_resized_crops
from dataset.decode import INTERPOLATIONS, resize_crop
from dataset.options import RANDOM
from utils.seed import STREAM_VIEW, counter_uniform, fold_in


@dataclass(frozen=True, kw_only=True)
class ResizedCropSpec:
    """Random resized crops of image files.

    Attributes:
        size: side of the result in pixels.
        area: smallest and largest part of the image's area.
        ratio: smallest and largest width / height of the box.
        interpolation: one of `dataset.options.CROP_INTERPOLATIONS`; PIL's, antialiased. "random" draws one of the
            others for every view.
    """

    size: int
    area: tuple[float, float] = (0.1, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    interpolation: str = "bicubic"


class Request(NamedTuple):
    """One batch of one process, before any pixel is read; fields as in `Batch`."""

    epoch: int
    indices_B: np.ndarray
    positions_B: np.ndarray
    global_batch_size: int


class Cut(Protocol):
    """From a decoded image to V squares of one size; travels to the workers."""

    @property
    def num_views(self) -> int: ...

    @property
    def size(self) -> int: ...

    def prepare(self, request: Request) -> Callable[[Image.Image, int], Tensor]:
        """A function of a decoded image and its row in the request: uint8 [V, 3, size, size]."""


@dataclass(frozen=True)
class RandomCrops:
    """Random resized crops as torchvision makes them of PIL's images: the box is cut out, and then resized.

    Attributes:
        spec: what is drawn.
        num_views: V.
        seed: of the run.
        first_view: number of the first of these views among all that are made of an image.
    """

    spec: ResizedCropSpec
    num_views: int
    seed: int
    first_view: int = 0

    @property
    def size(self) -> int:
        return self.spec.size

    def prepare(self, request: Request) -> Callable[[Image.Image, int], Tensor]:
        key = fold_in(self.seed, STREAM_VIEW, request.epoch, 1)
        # the last slot says how a view is resized; those before it do not depend on whether it is drawn
        views_V = np.arange(self.first_view, self.first_view + self.num_views)
        uniforms = counter_uniform(key, request.positions_B, views_V, RESIZED_CROP_SLOTS + 1)
        spec = self.spec

        def cut(image: Image.Image, row: int) -> Tensor:
            boxes_V4 = draw_resized_crops(uniforms[:, row], image.height, image.width, spec.area, spec.ratio).tolist()
            views = []
            for (top, left, height, width), chance in zip(boxes_V4, uniforms[:, row, -1], strict=True):
                interpolation = spec.interpolation
                if interpolation == RANDOM:
                    interpolation = "bilinear" if chance < 0.5 else "bicubic"
                box = image.crop((left, top, left + width, top + height))
                views.append(pixels(box.resize((spec.size, spec.size), INTERPOLATIONS[interpolation])))
            return torch.stack(views)

        return cut


@dataclass(frozen=True)
class CentreCut:
    resize: int
    size: int
    interpolation: str
    num_views: int = 1

    def prepare(self, request: Request) -> Callable[[Image.Image, int], Tensor]:
        return lambda image, row: pixels(resize_crop(image, self.resize, self.size, self.interpolation)).unsqueeze(0)


def pixels(image: Image.Image) -> Tensor:
    """uint8 [3, H, W]."""
    return torch.from_numpy(np.array(np.asarray(image).transpose(2, 0, 1), order="C"))

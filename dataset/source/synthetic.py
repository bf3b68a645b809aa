"""Reproducible images of any size and number of classes, for benchmarks and tests. Ours."""

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from dataset import DataSource, ImageSet, SourceRequest, sources
from dataset.statistics import pixel_statistics
from recipe.datasets import open_row
from utils.errors import UserError
from utils.seed import STREAM_DATA, numpy_generator

TRAIN_SIZE, TEST_SIZE = 1024, 256  # images, or two and one of each class where that is more
CROP_SIZE = 32
PATTERN_SIDE = 4
CHUNK = 64  # images blended at once


@sources.register("synthetic")
def open_synthetic(request: SourceRequest) -> DataSource:
    """Images of --crop_size in memory: half a pattern of the class (4x4 random colours, upscaled), half noise.

    Labels go round the classes. A pure function of seed, class count and size.

    Raises:
        UserError: --num_classes is missing or below 2.
    """
    if request.num_classes is None or request.num_classes < 2:
        raise UserError("--dataset synthetic needs --num_classes, 2 or more, such as --num_classes 10.")
    num_classes, side = request.num_classes, request.crop_size or CROP_SIZE
    generator = numpy_generator(request.seed, STREAM_DATA)
    patterns = generator.integers(0, 256, (num_classes, 3, PATTERN_SIDE, PATTERN_SIDE), dtype=np.uint8)
    patterns_K3PP = torch.from_numpy(patterns).double()
    train = _image_set(max(TRAIN_SIZE, 2 * num_classes), patterns_K3PP, side, generator)
    test = _image_set(max(TEST_SIZE, num_classes), patterns_K3PP, side, generator)
    assert train.images is not None
    mean, std = pixel_statistics(train.images.split(CHUNK))
    return DataSource(
        name="synthetic",
        recipe=open_row(side),
        classes=tuple(str(label) for label in range(num_classes)),
        mean=mean,
        std=std,
        crop_size=side,
        train=train,
        test=test,
    )


def _image_set(size: int, patterns_K3PP: Tensor, side: int, generator: np.random.Generator) -> ImageSet:
    targets = torch.arange(size) % len(patterns_K3PP)
    images = torch.empty((size, 3, side, side), dtype=torch.uint8)
    for start in range(0, size, CHUNK):
        chunk = slice(start, start + CHUNK)
        noise = torch.from_numpy(generator.integers(0, 256, images[chunk].shape, dtype=np.uint8))
        pattern = interpolate(patterns_K3PP[targets[chunk]], size=(side, side), mode="bilinear", align_corners=False)
        images[chunk] = (pattern.clamp(0, 255) / 2 + noise / 2).round()
    return ImageSet(targets=targets, images=images)

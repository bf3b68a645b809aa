"""scikit-learn's 1,797 handwritten digits: real images that need no download. The split and the upscaling are ours."""

import torch
from torch.nn.functional import interpolate

from dataset import DataSource, ImageSet, SourceRequest, sources
from dataset.statistics import pixel_statistics


@sources.register("digits")
def open_digits(request: SourceRequest) -> DataSource:
    """16x16 images; index mod 5 = 4 is the test part (359), the rest trains (1,438).

    The 8x8 grey values 0..16 are scaled by 255/16, upscaled twofold (bilinear, align_corners=False, float64), rounded
    half to even, and repeated over three channels.
    """
    from sklearn.datasets import load_digits  # slow to load, and only this data set needs it

    bunch = load_digits()
    grey_N1HW = torch.from_numpy(bunch.images).double()[:, None] * (255 / 16)
    upscaled = interpolate(grey_N1HW, size=(16, 16), mode="bilinear", align_corners=False)
    images = upscaled.round().to(torch.uint8).repeat(1, 3, 1, 1)
    targets = torch.from_numpy(bunch.target).long()
    is_test = torch.arange(len(targets)) % 5 == 4
    splits = {
        name: ImageSet(targets=targets[mask], images=images[mask])
        for name, mask in (("train", ~is_test), ("test", is_test))
    }
    statistics = pixel_statistics([images[~is_test]])
    return DataSource.of_row("digits", tuple(str(name) for name in bunch.target_names), splits, statistics=statistics)

"""Street View House Numbers (Netzer et al. 2011), the cropped digits: MATLAB files of 32x32 images."""

from pathlib import Path

import numpy as np
import torch

from dataset import DataSource, ImageSet, SourceRequest, sources
from dataset.archive import find_or_fetch
from utils.errors import UserError, reason

URL = "http://ufldl.stanford.edu/housenumbers/"
_FILES = {  # of each split: names and MD5 sums
    "train": (
        ("train_32x32.mat", "e26dedcc434d2e4c54c9b2d4a06d8373"),
        ("extra_32x32.mat", "a93ce644f1a588dc4d68dda5feec44a7"),
    ),
    "test": (("test_32x32.mat", "eb5a983be6a315427106f1b164d9cef3"),),
}


@sources.register("svhn")
def open_svhn(request: SourceRequest) -> DataSource:
    """Training images (train, then extra: 604,388 in all) and 26,032 test images; the label 10 is the digit 0.

    Raises:
        UserError: files missing and not to be fetched, or damaged.
    """
    paths = {
        split: [find_or_fetch(request, name, URL + name, md5) for name, md5 in _FILES[split]]
        for split in request.splits
    }
    splits = {split: _image_set(paths[split]) for split in request.splits}
    return DataSource.of_row("svhn", tuple("0123456789"), splits)


def _image_set(paths: list[Path]) -> ImageSet:
    images, labels = zip(*map(_read, paths), strict=True)
    return ImageSet(targets=torch.from_numpy(np.concatenate(labels)), images=torch.from_numpy(np.concatenate(images)))


def _read(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 [N, 3, 32, 32] and labels int64 [N] of one file."""
    import scipy.io  # slow to load, and only this data set needs it

    try:
        content = scipy.io.loadmat(path, variable_names=["X", "y"])
        pixels_HWCN, labels = content["X"], content["y"].ravel().astype(np.int64)
    except Exception as error:  # scipy has no common error for a damaged file
        raise UserError(f"{path} is not a readable SVHN file ({reason(error)}). Delete it and get it again.") from None
    if pixels_HWCN.dtype != np.uint8 or pixels_HWCN.shape != (32, 32, 3, len(labels)):
        raise UserError(f"{path} does not hold uint8 X of 32 x 32 x 3 x N and N labels y. Delete it and get it again.")
    if len(labels) and (labels.min() < 1 or labels.max() > 10):
        raise UserError(f"{path} has labels outside 1..10. Delete it and get it again.")
    return np.ascontiguousarray(pixels_HWCN.transpose(3, 2, 0, 1)), labels % 10

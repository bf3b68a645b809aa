"""Sets of images for --ood: what each entry of the flag stands for, prepared as the test images are."""

from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dataset import ImageSet, SourceRequest, sources
from dataset.class_folders import iterate_images
from dataset.decode import resize_crop
from dataset.shared import open_shared
from evaluation.session import Session
from utils.errors import UserError, reason
from utils.neighbours import once_per_machine


def open_foreign(session: Session) -> dict[str, ImageSet]:
    """The sets of --ood by the words of the flag: image folders, .npy arrays, or NAME:DIR of --dataset NAME.

    Every process takes part.

    Raises:
        UserError: one that is none of these, or holds no image.
    """
    found = {}
    for word in (part.strip() for part in (session.options.ood or "").split(",")):
        if not word:
            raise UserError(f"--ood {session.options.ood}: an entry is empty.")
        found[word] = _open(session, word)
    return found


def _open(session: Session, word: str) -> ImageSet:
    name, colon, rest = word.partition(":")
    path = Path(word)
    if colon and name in sources and not path.exists():
        request = SourceRequest(
            dataset=name,
            root=Path(rest),
            splits=("test",),
            seed=session.seed,
            on_bad_image=session.config.on_bad_image,
            workers=session.config.workers,
        )
        try:
            test = open_shared(request, session.world).test
        except UserError as error:  # it speaks of --data
            raise UserError(f"--ood {word}: {error}") from None
        return test if test.images is None else fitted(session, test.images)
    if path.suffix.lower() == ".npy":
        return fitted(session, _read_array(path))
    files = list(iterate_images(path)) if path.is_dir() else []
    if not files:
        raise UserError(
            f"--ood {word}: expected a folder of images, a .npy array [N, H, W, 3] of uint8, or NAME:DIR of --dataset "
            "NAME."
        )
    return ImageSet(targets=torch.zeros(len(files), dtype=torch.int64), paths=tuple(files))


def _read_array(path: Path) -> Tensor:
    wanted = "expected a .npy array [N, H, W, 3] of uint8"
    try:
        array = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"--ood {path}: {wanted}: {reason(error)}.") from None
    if array.ndim != 4 or array.shape[3] != 3 or array.dtype != np.uint8 or 0 in array.shape:
        raise UserError(f"--ood {path}: {wanted}, found {array.dtype} {list(array.shape)}.")
    return torch.from_numpy(array).permute(0, 3, 1, 2).contiguous()


def fitted(session: Session, images: Tensor) -> ImageSet:
    """uint8 images [N, 3, H, W] at the networks' size, resized and cut as files are where they have another.

    Every process takes part, and one of a machine does it for its neighbours.
    """
    crop = session.info.crop_size
    if tuple(images.shape[2:]) != (crop, crop):
        resize, interpolation = session.resizing(session.file_recipe)
        with once_per_machine(session.world, what="resized the images") as once:
            images = once(partial(_resized, images, resize, crop, interpolation))["images"]
    return ImageSet(targets=torch.zeros(len(images), dtype=torch.int64), images=images)


def _resized(images: Tensor, resize: int, crop: int, interpolation: str) -> dict[str, Tensor]:
    """uint8 "images" [N, 3, crop, crop]."""
    cut = (resize_crop(Image.fromarray(one.permute(1, 2, 0).numpy()), resize, crop, interpolation) for one in images)
    return {"images": torch.stack([torch.from_numpy(np.array(one)).permute(2, 0, 1) for one in cut])}

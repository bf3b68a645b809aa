"""Images to classify: a file, a folder of them, or an array of prepared ones. B images of N, C = 3 channels."""

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dataset import ImageSet
from dataset.class_folders import iterate_images
from dataset.loader import EvalLoader
from dataset.sampler import shard
from utils.errors import UserError, reason
from utils.text import escaped

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Inputs:
    """What is to be classified, and one process's part of it, prepared for the networks.

    Attributes:
        names: of all inputs, N, as `utils.text.escaped` writes them.
        batches: (int64 indices [B] into `names`, prepared images [B, 3, H, W]).
    """

    names: Sequence[str]
    batches: Iterable[tuple[Tensor, Tensor]]


def array_inputs(
    path: Path,
    *,
    rank: int,
    world_size: int,
    batch_size: int,
    device: torch.device,
    dtype: torch.dtype,
    memory_format: torch.memory_format,
) -> Inputs:
    """The rows of a .npy file, taken as they are: normalised floats [N, 3, H, W], any H and W.

    Raises:
        UserError: not such an array.
    """
    wanted = "expected a .npy array [N, 3, H, W] of normalised floats"
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise UserError(f"--predict {path}: does not exist.") from None
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"--predict {path}: {wanted}: {reason(error)}.") from None
    if array.ndim != 4 or array.shape[1] != 3 or 0 in array.shape or not np.issubdtype(array.dtype, np.floating):
        raise UserError(f"--predict {path}: {wanted}, found {array.dtype} {list(array.shape)}.")
    part = shard(len(array), rank, world_size)

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        for start in range(part.start, part.stop, batch_size):
            rows = np.array(array[start : min(start + batch_size, part.stop)])  # a copy: the file is mapped read-only
            images = torch.from_numpy(rows).to(device, dtype)
            yield torch.arange(start, start + len(rows)), images.contiguous(memory_format=memory_format)

    return Inputs([f"{escaped(path.name)}[{i}]" for i in range(len(array))], batches())


def file_inputs(path: Path, *, load: Callable[[ImageSet], EvalLoader], prepare: Callable[[Tensor], Tensor]) -> Inputs:
    """An image, or all images of a folder and its subfolders.

    Args:
        load: files -> this process's part of them, cut as in evaluation.
        prepare: uint8 images -> what the networks take.

    Raises:
        UserError: nothing there.
    """
    if path.is_dir():
        files = list(iterate_images(path))
        names = [escaped(file.relative_to(path)) for file in files]
    else:
        files, names = [path], [escaped(path.name)]
    if not path.exists() or not files:
        raise UserError(f"--predict {path}: {'holds no image' if path.exists() else 'does not exist'}.")
    loader = load(ImageSet(targets=torch.zeros(len(files), dtype=torch.int64), paths=tuple(files)))

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        for batch in loader:
            yield batch.indices_B, prepare(batch.images)
        for file, why in loader.bad_images.items():
            logger.warning("left out: %s: %s", escaped(file), why)

    return Inputs(names, batches())

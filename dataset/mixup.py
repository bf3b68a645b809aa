"""Mixup (Zhang et al., arXiv:1710.09412): one weight and one permutation per step, shared by all views of the step.

With a permutation of its own for each view, a co-training loss would compare predictions for different images.
The permutation is over the step's images of all processes, so that a run does not depend on how many there are.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dataset.augment.plan import Upload
from utils.distributed import all_gather_rows
from utils.seed import STREAM_MIXUP, numpy_generator
from utils.targets import Targets


@dataclass(frozen=True)
class Mix:
    """lam: weight of an image itself, in [0, 1]; partners: int64 [B] places in the global batch of what is mixed in."""

    lam: float
    partners: np.ndarray


def draw_mix(seed: int, step: int, *, alpha: float, global_batch: int, first: int, count: int) -> Mix:
    """lambda ~ Beta(alpha, alpha) and the partners of images first ... first + count - 1 of the global batch."""
    generator = numpy_generator(seed, STREAM_MIXUP, step)
    lam = float(generator.beta(alpha, alpha))
    return Mix(lam, generator.permutation(global_batch)[first : first + count])


def apply_mix(
    views_SBCHW: Tensor, labels_B: Tensor, mix: Mix, counts: Sequence[int] | None = None
) -> tuple[Tensor, Targets]:
    """Mixed views and their targets; with several processes, images come from all of them.

    Args:
        counts: images of every process, where they are known; else the host waits to be told.
    """
    upload = Upload()
    place = upload.add(mix.partners)
    partners = upload.send(labels_B.device)[place]
    pool_BS = all_gather_rows(views_SBCHW.transpose(0, 1), counts)
    pool_labels = all_gather_rows(labels_B, counts)
    mixed = views_SBCHW.lerp(pool_BS[partners].transpose(0, 1), 1.0 - mix.lam)
    lam = views_SBCHW.new_full((), mix.lam, dtype=torch.float32)
    return mixed.to(views_SBCHW.dtype), Targets(labels_B, pool_labels[partners], lam)

"""Mixup (Zhang et al., arXiv:1710.09412) and CutMix (Yun et al., arXiv:1905.04899), of a step's images with each other.

One weight, one permutation and one box per step, shared by all views of the step: with a permutation of its own for
each view, a co-training loss would compare predictions for different images. The permutation is over the step's images
of all processes, so that a run does not depend on how many there are.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from dataset.augment.plan import Upload
from utils.distributed import exchange_rows, gather_counts, is_alone
from utils.seed import STREAM_CUTMIX, STREAM_MIX_KIND, STREAM_MIXUP, numpy_generator
from utils.targets import Targets


@dataclass(frozen=True)
class Box:
    """What CutMix takes from the partners: rows top ... bottom - 1 and columns left ... right - 1 of a view."""

    top: int
    left: int
    bottom: int
    right: int


@dataclass(frozen=True)
class Mix:
    """How a step's images are mixed.

    Attributes:
        lam: weight of an image itself, in [0, 1]; in CutMix the part of its pixels that it keeps.
        partners: int64 [B] places in the global batch of what is mixed in.
        box: what the partners fill; None: they are mixed in everywhere (mixup).
        everyones: int64, the partners of all images of the global batch; None where that is this process's.
    """

    lam: float
    partners: np.ndarray
    box: Box | None = None
    everyones: np.ndarray | None = None


def draw_mix(seed: int, step: int, *, alpha: float, global_batch: int, first: int, count: int) -> Mix:
    """lambda ~ Beta(alpha, alpha) and the partners of images first ... first + count - 1 of the global batch."""
    generator = numpy_generator(seed, STREAM_MIXUP, step)
    lam = float(generator.beta(alpha, alpha))
    everyones = generator.permutation(global_batch)
    return Mix(lam, everyones[first : first + count], everyones=everyones)


def is_cutmix_step(seed: int, step: int, *, switch_prob: float) -> bool:
    """Whether a step is CutMix, with this probability, where mixup is on too: timm's rule for whole batches."""
    return float(numpy_generator(seed, STREAM_MIX_KIND, step).random()) < switch_prob


def as_cutmix(mix: Mix, seed: int, step: int, image_size: tuple[int, int]) -> Mix:
    """The same partners in a box that their weight asks for, its centre drawn uniformly among the pixels.

    Args:
        mix: as drawn.
        seed: of the run.
        step: counted from 0.
        image_size: height and width of the views in pixels.
    """
    height, width = image_size
    generator = numpy_generator(seed, STREAM_CUTMIX, step)
    box = cutmix_box(mix.lam, image_size, centre=(int(generator.integers(height)), int(generator.integers(width))))
    kept = 1.0 - (box.bottom - box.top) * (box.right - box.left) / (height * width)
    return replace(mix, lam=kept, box=box)


def cutmix_box(lam: float, image_size: tuple[int, int], *, centre: tuple[int, int]) -> Box:
    """The box around `centre` (row, column) with sqrt(1 - λ) of the image's sides, clipped to the image.

    Half a side is rounded down to pixels, as in the paper's code and in torchvision's `v2.CutMix`.
    """
    half = 0.5 * math.sqrt(1.0 - lam)
    (height, width), (row, column) = image_size, centre
    half_height, half_width = int(half * height), int(half * width)
    return Box(
        top=max(row - half_height, 0),
        left=max(column - half_width, 0),
        bottom=min(row + half_height, height),
        right=min(column + half_width, width),
    )


def apply_mix(
    views_SBCHW: Tensor,
    labels_B: Tensor,
    mix: Mix,
    counts: Sequence[int] | None = None,
    group: dist.ProcessGroup | None = None,
) -> tuple[Tensor, Targets]:
    """Mixed views and their targets; with several processes, images come from all of them.

    Args:
        counts: images of every process, where they are known; else the host waits to be told.
        group: the processes that cut the batch among themselves; None: all.
    """
    if mix.box is None:
        partners_SBCHW, labels_other_B = _partners(views_SBCHW, labels_B, mix, counts, group)
        mixed = views_SBCHW.lerp(partners_SBCHW, 1.0 - mix.lam)
    else:
        box = (..., slice(mix.box.top, mix.box.bottom), slice(mix.box.left, mix.box.right))
        partners_SBCHW, labels_other_B = _partners(views_SBCHW[box], labels_B, mix, counts, group)
        mixed = views_SBCHW.clone()
        mixed[box] = partners_SBCHW
    lam = views_SBCHW.new_full((), mix.lam, dtype=torch.float32)
    return mixed.to(views_SBCHW.dtype), Targets(labels_B, labels_other_B, lam)


def _partners(
    views_SBCHW: Tensor,
    labels_B: Tensor,
    mix: Mix,
    counts: Sequence[int] | None,
    group: dist.ProcessGroup | None,
) -> tuple[Tensor, Tensor]:
    """Views, or the same part of each, and labels of what is mixed in."""
    upload = Upload()
    if is_alone(group):
        place = upload.add(mix.partners)
        partners = upload.send(labels_B.device)[place]
        return views_SBCHW.transpose(0, 1)[partners].transpose(0, 1), labels_B[partners]
    if mix.everyones is None:
        raise ValueError("every one of several processes must know the partners of all images")
    counts = gather_counts(len(labels_B), labels_B.device, group) if counts is None else counts
    # the permutation is known to all, so each sends what is wanted of it, and knows what comes
    rank, first_W = dist.get_rank(group), np.concatenate([[0], np.cumsum(counts)])
    wanted_W = np.split(mix.everyones, first_W[1:-1])
    asked_W = [w[(w >= first_W[rank]) & (w < first_W[rank + 1])] - first_W[rank] for w in wanted_W]
    owners_B = np.searchsorted(first_W, wanted_W[rank], side="right") - 1
    in_order_B = np.argsort(np.argsort(owners_B, kind="stable"), kind="stable")
    places = upload.add(np.concatenate(asked_W)), upload.add(in_order_B)
    tensors = upload.send(labels_B.device)
    sent_B, in_order = (tensors[place] for place in places)
    sizes = {
        "sent_W": [len(asked) for asked in asked_W],
        "received_W": np.bincount(owners_B, minlength=len(counts)).tolist(),
    }

    def exchanged(rows: Tensor) -> Tensor:
        return exchange_rows(rows.index_select(0, sent_B), **sizes, group=group).index_select(0, in_order)

    # the views of an image lie together then, and its channels as they did: rows are copied as they lie
    is_last = views_SBCHW.stride(2) == 1
    there, back = ((1, 0, 3, 4, 2), (1, 0, 4, 2, 3)) if is_last else ((1, 0, 2, 3, 4), (1, 0, 2, 3, 4))
    return exchanged(views_SBCHW.permute(there)).permute(back), exchanged(labels_B)

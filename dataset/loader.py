"""Batches of uint8 images for training and evaluation: which image comes when, on which process, decoded by whom.

Which images a batch holds, and the boxes that are cut from them, are pure functions of (seed, epoch, position in the
epoch's global order, view). They depend neither on the number of decoding workers nor on the number of processes, and
an epoch can be entered at any batch.
"""

import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from dataset import ImageSet
from dataset.cut import CentreCut, Cut, RandomCrops, Request, ResizedCropSpec
from dataset.decode import BadImage, read_rgb, refusal
from dataset.decoders import Decoders, hand_over
from dataset.sampler import Shuffled, shard
from utils.device import Uploads
from utils.errors import RunError, UserError, reason

logger = logging.getLogger(__name__)

DEVICE_SHARE = 0.25  # a split moves to a GPU if it takes at most this part of the GPU's free memory


class Batch(NamedTuple):
    """What a step gets, on one process.

    images: uint8 on the loader's device; whole images [B, 3, H, W], or the training views of files [V, B, 3, h, w].
    labels_B, indices_B: int64 on the device; class, and index in the split.
    positions_B: int64, on the host; position in the epoch's global order (in evaluation: the index).
    global_batch_size: images of this step over all processes; those that --on_bad_image skip drops are counted.
    """

    images: Tensor
    labels_B: Tensor
    indices_B: Tensor
    positions_B: np.ndarray
    global_batch_size: int


class _Loader:
    """What both loaders say of the feed that their batches come from."""

    _feed: "_Feed"

    @property
    def time_waiting(self) -> float:
        return self._feed.time_waiting

    @property
    def bad_images(self) -> dict[Path, str]:
        return self._feed.bad_images

    def resident(self, split: ImageSet) -> ImageSet:
        """The split that is loaded, its images where the loader has them: on a GPU a copy on the host may go then."""
        return split if self._feed.images is None else replace(split, images=self._feed.images)

    def on_wait(self, look: Callable[[], None]) -> None:
        """Call `look` about every second while a batch of the decoding processes does not come; it may raise."""
        self._feed.on_wait(look)

    def close(self) -> None:
        """End the decoding processes."""
        self._feed.close()


class TrainLoader(_Loader):
    """Training batches. Step t of an epoch covers positions [t * batch_size, (t + 1) * batch_size) of its order, and
    each process takes a contiguous part of them, so that all parts together are the batch of a single process.

    Images in memory stay on `device` if they take at most DEVICE_SHARE of its free memory, otherwise each batch is
    gathered on the host and copied from pinned memory. Files are decoded by worker processes, each image once, and cut
    to `num_views` random resized crops; the boxes are drawn from the key (seed, STREAM_VIEW, epoch, 1), away from the
    numbers of ViewMaker, whose key is (seed, STREAM_VIEW, epoch).

    Args:
        train: images in memory, or files.
        batch_size: images per step over all processes.
        num_views: V, crops per file; images in memory come whole, once.
        first_view: number of the first of these crops among all that are made of a file.
        rank, world_size: of this process.
        device: where images and labels go.
        workers: decoding processes; 0 decodes in this one.
        crop: of files; None for images in memory.
        sampler: epoch -> indices in order (int64, at least steps_per_epoch * batch_size of them, or all for a set that
            is smaller than a batch). Default: a permutation drawn from (seed, STREAM_ORDER, epoch).
        drop_last: leave an incomplete last batch out. It is always kept where it is the only one, and always left out
            where a process would get no image.
        on_bad_image: "fail", or "skip" to drop unreadable files from their batch.

    Attributes:
        steps_per_epoch: batches in an epoch, the same on every process.
        time_waiting: seconds spent so far in waiting for batches.
        bad_images: files dropped so far, with the reason.

    Raises:
        UserError: no images, or fewer in a batch than there are processes.
    """

    def __init__(
        self,
        train: ImageSet,
        *,
        batch_size: int,
        num_views: int,
        seed: int,
        rank: int,
        world_size: int,
        device: torch.device,
        workers: int,
        crop: ResizedCropSpec | None,
        sampler: Callable[[int], np.ndarray] | None = None,
        drop_last: bool = True,
        on_bad_image: str = "fail",
        first_view: int = 0,
    ) -> None:
        if not len(train):
            raise UserError("The training set is empty. Check --data and --val_fraction.")
        if min(batch_size, len(train)) < world_size:
            raise UserError(
                f"--batch_size {batch_size} over {len(train)} training images leaves some of {world_size} processes "
                "without an image. Use fewer processes, or a larger --batch_size or data set."
            )
        whole, rest = divmod(len(train), batch_size)
        keeps_rest = rest >= world_size and (not drop_last or not whole)
        self.steps_per_epoch = whole + keeps_rest
        self._positions = min(self.steps_per_epoch * batch_size, len(train))
        self._batch_size, self._rank, self._world_size = batch_size, rank, world_size
        self._sampler = sampler or Shuffled(len(train), seed)
        cut = None if crop is None else RandomCrops(crop, num_views, seed, first_view)
        self._feed = _Feed(train, cut, device, workers, on_bad_image)

    def fewest_images(self, batch: int) -> int:
        """How many images of a batch of the epoch, counted from 0, the process has that gets fewest of them."""
        size = min(self._batch_size, self._positions - batch * self._batch_size)
        return size // self._world_size

    def epoch(self, epoch: int, start_batch: int = 0, end_batch: int | None = None) -> Iterator[Batch]:
        """The batches of an epoch from `start_batch` to before `end_batch`; what lies outside is not decoded.

        Raises:
            RunError: an unreadable image under "fail", or a batch without a single readable one.
        """
        order = self._sampler(epoch)
        if len(order) < self._positions:
            raise ValueError(f"the sampler gave {len(order)} indices, an epoch takes {self._positions}")
        end = self.steps_per_epoch if end_batch is None else min(end_batch, self.steps_per_epoch)
        requests = [self._request(epoch, step, order) for step in range(start_batch, end)]
        for batch in self._feed.batches(requests):
            if not len(batch.labels_B):
                path, why = next(reversed(self.bad_images.items()))
                raise RunError(f"{path}: {why}; nor can any other image of its batch be read. Check --data.")
            yield batch

    def _request(self, epoch: int, step: int, order: np.ndarray) -> Request:
        start = step * self._batch_size
        size = min(self._batch_size, len(order) - start)
        part = shard(size, self._rank, self._world_size)
        positions_B = np.arange(start + part.start, start + part.stop, dtype=np.int64)
        return Request(epoch, order[positions_B], positions_B, size)


class EvalLoader(_Loader):
    """Every image of a split exactly once over all processes, in order, un-augmented.

    Processes take contiguous parts that differ by one image at most, so they may have different numbers of batches.

    Args:
        split: images in memory, or files.
        batch_size: images per step and process.
        rank, world_size: of this process.
        device: where images and labels go; images in memory stay there under the rule of `TrainLoader`.
        workers: decoding processes; 0 decodes in this one.
        resize, crop: files get their short side resized to `resize` and are cut to the central `crop` pixels; both None
            for images in memory.
        interpolation: "bicubic" or "bilinear"; PIL's, antialiased.
        on_bad_image: "fail", or "skip" to leave unreadable files out.

    Attributes:
        rounds: batches of the process that has the most, if every image can be read.
        time_waiting: seconds spent so far in waiting for batches.
        bad_images: files left out so far, with the reason.
    """

    def __init__(
        self,
        split: ImageSet,
        *,
        batch_size: int,
        rank: int,
        world_size: int,
        device: torch.device,
        workers: int,
        resize: int | None,
        crop: int | None,
        interpolation: str = "bicubic",
        on_bad_image: str = "fail",
    ) -> None:
        cut = None if resize is None or crop is None else CentreCut(resize, crop, interpolation)
        self._feed = _Feed(split, cut, device, workers, on_bad_image)
        shards = [shard(len(split), r, world_size) for r in range(world_size)]
        self.rounds = -(-shards[0].stop // batch_size)  # no process has more images than the first
        mine = shards[rank]
        self._requests = []
        for start in range(mine.start, mine.stop, batch_size):
            indices_B = np.arange(start, min(start + batch_size, mine.stop), dtype=np.int64)
            done = start - mine.start
            size = sum(min(max(s.stop - s.start - done, 0), batch_size) for s in shards)
            self._requests.append(Request(0, indices_B, indices_B, size))

    def __len__(self) -> int:
        """Batches of this process, if every image can be read."""
        return len(self._requests)

    def __iter__(self) -> Iterator[Batch]:
        """Raises RunError on an unreadable image under "fail"."""
        for batch in self._feed.batches(self._requests):
            if len(batch.labels_B):
                yield batch if batch.images.dim() == 4 else batch._replace(images=batch.images[0])


class _Decoded(NamedTuple):
    """images: uint8 [V, B', 3, h, w] of the readable files; rows: int64 [B'], which ones; bad: the others."""

    images_VBCHW: Tensor
    rows: np.ndarray
    bad: list[BadImage]


class _Files(Dataset[_Decoded]):
    """What a worker holds: the paths, or what holds the images, and how to cut. An "item" is a whole batch."""

    def __init__(self, split: ImageSet, cut: Cut) -> None:
        # one array instead of a million objects: small to send, and a look-up does not copy the pages of a fork
        self.paths = np.array([os.fsencode(path) for path in split.paths])
        self.store = split.store
        self.places = None if split.places is None else split.places.numpy()
        self.cut = cut

    def _read(self, index: int) -> Image.Image:
        path = os.fsdecode(self.paths[index])
        if self.store is None or self.places is None:
            return read_rgb(path)
        try:
            content = self.store.read(int(self.places[index]))
        except OSError as error:
            raise BadImage(path, reason(error)) from None
        return read_rgb(path, content)

    def __getitem__(self, request: Request) -> _Decoded:
        size = self.cut.size
        images_VBCHW = torch.empty((self.cut.num_views, len(request.indices_B), 3, size, size), dtype=torch.uint8)
        cut = self.cut.prepare(request)
        rows: list[int] = []
        bad = []
        for row, index in enumerate(request.indices_B):
            try:
                image = self._read(index)
            except BadImage as error:
                bad.append(error)
                continue
            images_VBCHW[:, len(rows)] = cut(image, row)
            rows.append(row)
        hand_over(images_VBCHW)
        return _Decoded(images_VBCHW[:, : len(rows)], np.array(rows, dtype=np.int64), bad)


class _Feed:
    """Turns requests into batches, from memory or from files; what both loaders share."""

    def __init__(self, split: ImageSet, cut: Cut | None, device: torch.device, workers: int, on_bad_image: str) -> None:
        if len(split) and (split.images is None) != (cut is not None):
            raise ValueError("files need a crop, images in memory take none")
        self.time_waiting = 0.0
        self.bad_images: dict[Path, str] = {}
        self._device, self._on_bad_image = device, on_bad_image
        self._labels_N = split.targets.to(device)
        self._is_resident = split.images is not None and _fits(device, split.images)
        self.images = split.images.to(device) if split.images is not None and self._is_resident else split.images
        self._uploads = Uploads(device) if device.type == "cuda" else None
        self._decoders: Decoders[_Decoded] | None = None
        if cut is not None:
            self._decoders = Decoders(_Files(split, cut), workers, pinned=device.type == "cuda")

    def on_wait(self, look: Callable[[], None]) -> None:
        if self._decoders is not None:
            self._decoders.look = look

    def close(self) -> None:
        if self._decoders is not None:
            self._decoders.close()

    def batches(self, requests: Sequence[Request]) -> Iterator[Batch]:
        """One batch per request, its images [V, B, 3, h, w] if they are files; empty where every file is skipped."""
        if not requests:
            return
        # one copy to the device for the whole epoch
        indices_N = torch.from_numpy(np.concatenate([request.indices_B for request in requests])).to(self._device)
        decoded = None if self._decoders is None else self._decoders.items(requests)
        sizes = [len(request.indices_B) for request in requests]
        for request, indices_B in zip(requests, indices_N.split(sizes), strict=True):
            started = time.perf_counter()
            batch = (
                self._gathered(request, indices_B) if decoded is None else self._read(request, indices_B, next(decoded))
            )
            self.time_waiting += time.perf_counter() - started
            yield batch

    def _gathered(self, request: Request, indices_B: Tensor) -> Batch:
        assert self.images is not None
        if self._is_resident:
            images = self.images.index_select(0, indices_B)
        else:
            shape = (len(indices_B), *self.images.shape[1:])
            images = torch.empty(shape, dtype=torch.uint8, pin_memory=self._device.type == "cuda")
            torch.index_select(self.images, 0, torch.from_numpy(request.indices_B), out=images)
            images = self._to_device(images)
        return Batch(images, self._labels_N[indices_B], indices_B, request.positions_B, request.global_batch_size)

    def _to_device(self, images: Tensor) -> Tensor:
        return images if self._uploads is None else self._uploads.send(images)

    def _read(self, request: Request, indices_B: Tensor, decoded: _Decoded) -> Batch:
        positions_B = request.positions_B
        if decoded.bad:
            if self._on_bad_image == "fail":
                raise refusal(decoded.bad[0])
            self.bad_images.update((bad.path, bad.reason) for bad in decoded.bad)
            indices_B = indices_B[torch.from_numpy(decoded.rows).to(self._device)]
            positions_B = positions_B[decoded.rows]
        images = self._to_device(decoded.images_VBCHW)
        return Batch(images, self._labels_N[indices_B], indices_B, positions_B, request.global_batch_size)


def _fits(device: torch.device, images: Tensor) -> bool:
    """Whether a split of images may move to the device, or is there."""
    if device.type == "cpu" or images.device == device:
        return True
    return device.type == "cuda" and images.nbytes <= DEVICE_SHARE * torch.cuda.mem_get_info(device)[0]

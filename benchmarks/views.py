"""Views per second: batched ops on the device against one Pillow view after another (goals G5 and G6).

Both sides make whole training views: crop, flip, exact AutoAugment, normalising, erasing. With --data DIR also large
images from files: decoded once and cut S times, against decoding for every view.
"""

import argparse
import math
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from benchmarks import baseline
from benchmarks.report import Side, as_it_is, interleave, measure_as_asked, row
from dataset import DataSource, ImageSet
from dataset.class_folders import iterate_images
from dataset.decode import read_size
from dataset.options import DataOptions
from dataset.pipeline import build_train_loader
from dataset.views import ViewMaker, ViewSpec, view_spec
from recipe.datasets import ROWS
from utils.command_line import at_least
from utils.cpus import allowed_cpus
from utils.errors import RunError, UserError
from utils.launch import World

BATCHES = ((128, "a step's batch"), (2048, "a chunk of many steps"))
SAMPLE = 384  # views that the Pillow side makes in a round without workers; it has no batches
VIEWS = 128  # of a batch of the Pillow loader
BATCHES_PER_WORKER = 2  # of a round with workers
LARGE = 64  # pixels of the short side: images up to here live decoded in memory
FILES = 96  # files read in a round
GPU_GOAL, CPU_GOAL = 50.0, 8.0  # G6, G5


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of this benchmark beside the common ones."""
    parser.add_argument(
        "--image_size", type=at_least(1), default=32, help="pixels of the images in memory (default 32)"
    )
    parser.add_argument(
        "--recipe", default="cifar10", choices=("cifar10", "cifar100", "svhn"), help="(default cifar10)"
    )
    parser.add_argument("--data", type=Path, help="folder of image files; larger ones than 64 px are read as files")
    parser.add_argument(
        "--enlarge", type=at_least(1), nargs=2, metavar=("W", "H"), help="first scale the files up to this size"
    )
    parser.add_argument(
        "--workers", type=at_least(0), default=0, help="processes of the Pillow loader (default 0: in this one)"
    )


def run(options: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    """Time what the flags ask for."""
    if options.data is not None and _short_side(options.data) > LARGE - 1:
        return _from_files(options, device)
    return _in_memory(options, device)


def _spec(recipe: str, size: int) -> ViewSpec:
    mean, std = ROWS["imagenet" if recipe == "imagenet" else "cifar10"].published_statistics
    options = DataOptions(crop_size=size, padding=4, is_autoaugment=True, is_cutout=True, erase_p=0.5)
    return view_spec(recipe, options, mean=mean, std=std)


def _short_side(folder: Path) -> int:
    path = next(iter(iterate_images(folder)), None) if folder.is_dir() else None
    if path is None:
        raise UserError(f"--data {folder} holds no image: give a folder of image files.")
    return min(read_size(path))


def _images(options: argparse.Namespace, count: int) -> Tensor:
    """uint8 [count, 3, H, W]: those of --data, else smoothed noise."""
    size = options.image_size
    if options.data is None:
        small = torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(0))
        return (255 * torch.nn.functional.interpolate(small, size=(size, size), mode="bilinear")).to(torch.uint8)
    paths = [path for path, _ in zip(iterate_images(options.data), range(count), strict=False)]
    arrays = [np.array(Image.open(path).convert("RGB").resize((size, size))) for path in paths]
    return torch.from_numpy(np.stack([arrays[i % len(arrays)] for i in range(count)])).permute(0, 3, 1, 2).contiguous()


def _in_memory(options: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    spec = _spec(options.recipe, options.image_size)
    maker, num_views = ViewMaker(spec, seed=0), options.split_factor
    images = _images(options, max(batch for batch, _ in BATCHES))
    on_device = images.to(device)
    epoch = iter(range(1 << 40))  # every call draws anew

    def ours(batch: int) -> Callable[[], Tensor]:
        part, positions = on_device[:batch], np.arange(batch)
        return lambda: maker.make(part, next(epoch), positions, num_views)

    arrays = list(images.permute(0, 2, 3, 1).numpy())
    rounds = {"pillow": _pillow_round(spec, arrays, num_views, options.workers, device)}
    if options.workers:
        rounds["one process"] = _pillow_round(spec, arrays, num_views, 0, device)
    try:
        found = measure_as_asked(
            {name: partial(as_it_is, one) for name, one in rounds.items()}
            | {why: partial(as_it_is, ours(batch)) for batch, why in BATCHES},
            options,
            device,
            warmup=2,
            calls=1,
        )
    finally:
        for one in rounds.values():
            one.close()
    for name, error in found.errors.items():
        raise RunError(f"{name}: {error}")
    base = Side(name=_pillow_name(options.workers), dtype="float32", layout="NCHW", seconds=found.seconds["pillow"])
    rates = {name: one.views / statistics.median(found.seconds[name]) for name, one in rounds.items()}
    goal, commit = _goal(options, device) if _uses_its_workers(rates, options.workers) else (None, None)
    rows = []
    for batch, why in BATCHES:
        side = Side(
            name=f"batched, {batch} images",
            dtype="float32",
            layout="NCHW",
            seconds=found.seconds[why],
            memory_mib=found.memory_mib[why],
        )
        rows.append(
            row(
                goal,
                f"{options.recipe} views at {options.image_size} px with AutoAugment, S={num_views} ({why})",
                side,
                base,
                work=batch * num_views,
                baseline_work=rounds["pillow"].views,
                commit=commit,
                unit="views",
                pillow_per_second=rates,
            )
        )
    return rows


def _goal(options: argparse.Namespace, device: torch.device) -> tuple[str | None, float | None]:
    """G5 is per core, G6 against a loader on all cores; both are of CIFAR's images."""
    if options.image_size != 32 or not options.recipe.startswith("cifar"):
        return None, None
    if device.type == "cuda":
        return ("G6", GPU_GOAL) if options.workers == allowed_cpus() else (None, None)
    return ("G5", CPU_GOAL) if _same_cores(options) else (None, None)


def _uses_its_workers(rates: Mapping[str, float], workers: int) -> bool:
    """Whether a loader of `workers` processes is at least half as many times as fast as one: else it is none to beat.

    Args:
        rates: views a second of the Pillow side, and of "one process" where there are workers.
    """
    return not workers or rates["pillow"] > workers / 2 * rates["one process"]


def _same_cores(options: argparse.Namespace) -> bool:
    """Whether ours has as many threads as the Pillow side has processes."""
    return torch.get_num_threads() == max(options.workers, 1)


def _pillow_name(workers: int) -> str:
    return f"Pillow, {workers} workers" if workers else "Pillow, one view after another"


class PillowRound:
    """Makes all views of a data set once with Pillow when it is called: in this process, or through a loader.

    The loader's workers come with the first round, stay for all, and have nothing to do between two of them.

    Args:
        data: images and how their views are made.
        workers: processes of the loader; 0: no loader.
        batch_size: images of one of its batches.
        device: where the views of a loader go.

    Attributes:
        views: of a round.
    """

    def __init__(self, data: baseline.PillowDataset, *, workers: int, batch_size: int, device: torch.device) -> None:
        self._data, self._device = data, device
        self.views = len(data) * data.num_views
        self._loader: DataLoader | None = None
        if workers:
            self._loader = baseline.loader(
                data, batch_size=batch_size, workers=workers, device=device, train=False, keeps_workers=True
            )

    def __call__(self) -> None:
        if self._loader is None:
            for i in range(len(self._data)):
                self._data[i]
            return
        for views, _ in self._loader:
            views.to(self._device)

    def close(self) -> None:
        """End the workers."""
        self._loader = None


def _pillow_round(
    spec: ViewSpec, images: Sequence[np.ndarray], num_views: int, workers: int, device: torch.device
) -> PillowRound:
    """Of images in memory, used in turn: SAMPLE views, or through a loader BATCHES_PER_WORKER batches a worker."""
    batch_size = max(1, VIEWS // num_views)
    count = workers * BATCHES_PER_WORKER * batch_size or SAMPLE // num_views
    chosen = [images[i % len(images)] for i in range(count)]
    data = baseline.PillowDataset(chosen, [0] * count, baseline.pillow_views(spec), num_views)
    return PillowRound(data, workers=workers, batch_size=batch_size, device=device)


def _from_files(options: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    """Large images: rows for one view and for --split_factor views of each file."""
    with tempfile.TemporaryDirectory() as folder:
        paths = [path for path, _ in zip(iterate_images(options.data), range(FILES), strict=False)]
        if options.enlarge:
            paths = [_enlarged(path, Path(folder) / f"{i}.jpg", options.enlarge) for i, path in enumerate(paths)]
        width, height = read_size(paths[0])
        crop = min(ROWS["imagenet"].side, width, height)
        spec = _spec("imagenet", crop)
        what = f"{width}x{height} px files to {crop} px" + (" (scaled up)" if options.enlarge else "")
        return [
            one
            for num_views in sorted({1, options.split_factor})
            for one in _files_rows(options, device, spec, paths, num_views, what)
        ]


def _enlarged(path: Path, target: Path, size: Sequence[int]) -> Path:
    with Image.open(path) as image:
        image.convert("RGB").resize((size[0], size[1]), Image.Resampling.BICUBIC).save(target, quality=90)
    return target


def _files_rows(
    options: argparse.Namespace,
    device: torch.device,
    spec: ViewSpec,
    paths: Sequence[Path],
    num_views: int,
    what: str,
) -> list[dict[str, Any]]:
    split = ImageSet(targets=torch.zeros(len(paths), dtype=torch.int64), paths=tuple(paths))
    mean, std = ROWS["imagenet"].published_statistics
    source = DataSource(
        name="folder",
        recipe="imagenet",
        classes=("all",),
        mean=mean,
        std=std,
        crop_size=spec.crop_size,
        train=split,
        test=ImageSet.empty(),
    )
    flags = DataOptions(crop_size=spec.crop_size, batch_size=len(paths), workers=options.workers)
    loader = build_train_loader(source, flags, World(0, 1, 0, 1, device), num_views=num_views, seed=0)
    maker = ViewMaker(spec, seed=0)
    epoch = iter(range(1 << 40))

    def ours() -> None:
        number = next(epoch)
        for batch in loader.epoch(number):
            maker.make(batch.images, number, batch.positions_B, num_views)

    data = baseline.PillowDataset(paths, [0] * len(paths), baseline.pillow_views(spec), num_views)
    batch_size = math.ceil(len(paths) / (max(1, options.workers) * BATCHES_PER_WORKER))
    pillow = PillowRound(data, workers=options.workers, batch_size=batch_size, device=device)
    try:
        times = interleave(
            {"pillow": pillow, "ours": ours},
            device,
            warmup=1,
            rounds=options.rounds,
            seconds=options.seconds,
            clock=options.clock,
        )
    finally:
        pillow.close()
    side = Side(name="decoded once, batched", dtype="float32", layout="NCHW", seconds=times["ours"])
    base = Side(
        name=f"{_pillow_name(options.workers)}, decoded for every view",
        dtype="float32",
        layout="NCHW",
        seconds=times["pillow"],
    )
    commit = 1.6 if num_views == 2 and _same_cores(options) else None
    subject = f"{what}, S={num_views}"
    return [row("large images", subject, side, base, work=len(paths), commit=commit, unit="images")]

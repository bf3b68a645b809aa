"""Training by others' usual means beside ours, end to end, at S = 1 on equal terms; a deep ensemble beside a loop.

An epoch of ResNet-18: random crops, mirror images, cross-entropy, SGD with Nesterov's momentum, the same images,
workers and precision. timm: its loader, network and optimiser around the usual step. torchvision: its transforms, data
set and network, torch's DataLoader. Both keep their workers; ours reads images of up to 64 px into memory once. Public
functions of others are called, none is written again. The ensemble is of four networks, each on views of its own: ours
makes all views of a batch and trains all networks on them; the loop trains one after another, each by its own loader.
"""

import argparse
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from benchmarks import own
from benchmarks.report import Side, failure, measure_as_asked, release, row
from dataset.class_folders import iterate_images
from dataset.decode import read_rgb
from utils.command_line import at_least
from utils.errors import UserError

SUBJECTS = {"memory": (32, 32), "files_64": (64, 64), "files_500": (500, 375)}
CLASSES = 4
MEMBERS = 4  # of the deep ensemble
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
AREA = (0.1, 1.0)  # of random crops
PLAIN = ["--is_autoaugment", "0", "--is_cutout", "0", "--is_mixup", "0", "--is_nesterov", "1", "--weight_decay", "1e-4"]


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of this benchmark beside the common ones."""
    parser.add_argument("--only", default=",".join([*SUBJECTS, "ensemble"]), help="comma list (default: all four)")
    parser.add_argument("--images", type=at_least(8), default=512, help="of an epoch (default 512)")
    parser.add_argument("--batch_size", type=at_least(2), default=64, help="images (default 64)")
    parser.add_argument("--crop_size", type=at_least(8), default=64, help="pixels, of views of files (default 64)")
    parser.add_argument("--workers", type=at_least(0), default=2, help="of every side (default 2)")
    parser.add_argument("--data", type=Path, help="folder of image files to scale and to use (default: smooth noise)")


def run(options: argparse.Namespace, device: torch.device) -> Iterator[dict[str, Any]]:
    """Time an epoch of every side in turns.

    Raises:
        UserError: a subject that does not exist, a batch of more images than there are, or timm is missing.
        RunError: a file below --data that gives no image.
    """
    names = options.only.split(",")
    if unknown := [name for name in names if name not in (*SUBJECTS, "ensemble")]:
        raise UserError(f"--only {unknown[0]}: expected {', '.join([*SUBJECTS, 'ensemble'])}.")
    if options.batch_size > options.images:
        raise UserError(f"--batch_size {options.batch_size}: an epoch has {options.images} images, see --images.")
    for name in names:
        yield from _rows(name, options, device)
        release(device)


@dataclass(frozen=True)
class Images:
    """What all sides train on.

    Attributes:
        paths, labels: of the files, in class folders below `root`/train.
        side: of the views in pixels.
        padded: crops are of the padded image, as is usual for small images, where a side knows such crops.
    """

    root: Path
    paths: tuple[Path, ...]
    labels: tuple[int, ...]
    side: int
    padded: bool


def write_images(root: Path, size: tuple[int, int], options: argparse.Namespace) -> Images:
    """JPEG files of this width and height in class folders, and one for each class to evaluate."""
    found = [] if options.data is None else list(islice(iterate_images(options.data), options.images))
    if options.data is not None and not found:
        raise UserError(f"--data {options.data} holds no image: give a folder of image files.")
    generator = np.random.default_rng(0)

    def image() -> Image.Image:
        return Image.fromarray(generator.integers(0, 256, (12, 12, 3), dtype=np.uint8))

    opened: Iterable[Any] = cycle(found) if found else (image() for _ in iter(int, 1))
    paths, labels = [], []
    for number, one in zip(range(options.images), opened, strict=False):
        label = number % CLASSES
        path = root / "train" / str(label) / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        source = read_rgb(one) if isinstance(one, Path) else one
        source.resize(size, Image.Resampling.BICUBIC).save(path, quality=90)
        if number < CLASSES:
            (root / "val" / str(label)).mkdir(parents=True)
            source.resize(size).save(root / "val" / str(label) / "0.jpg")
        paths.append(path)
        labels.append(label)
    small = max(size) <= 32
    return Images(root, tuple(paths), tuple(labels), size[0] if small else options.crop_size, small)


def _rows(name: str, options: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    is_ensemble = name == "ensemble"
    members = MEMBERS if is_ensemble else 1
    size = SUBJECTS["memory" if is_ensemble else name]
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        images = write_images(Path(folder) / "images", size, options)
        builders: dict[str, Callable[[], Callable[[], object]]] = {
            "ours": partial(our_epoch, images, options, Path(folder) / "run", device, stack, members=members)
        }
        if is_ensemble:
            builders["plain loop"] = partial(loop_epoch, images, options, device)
        else:
            builders |= {
                "timm": partial(timm_epoch, images, options, device),
                "torchvision": partial(torchvision_epoch, images, options, device),
            }
        found = measure_as_asked(builders, options, device, warmup=1, calls=1)
    what = f"deep ensemble of {MEMBERS}" if is_ensemble else "S=1"
    where = f"{size[0]}x{size[1]} px " + ("in memory" if images.padded else f"JPEG files, views of {images.side} px")
    subject = f"epoch of resnet18, {what}, {options.images} images of {where}, {options.workers} workers"
    rows = [failure(None, subject, side, "", error) for side, error in found.errors.items()]
    sides = {
        side: Side(name=side, dtype=_dtype(device), layout="NHWC" if side == "ours" else "NCHW", seconds=seconds)
        for side, seconds in found.seconds.items()
    }
    for side, base in sides.items():
        if side != "ours" and "ours" in sides:
            rows.append(row(None, subject, sides["ours"], base, work=options.images, unit="images"))
    return rows


def _dtype(device: torch.device) -> str:
    return "bfloat16" if device.type == "cuda" else "float32"


# ---- the sides -------------------------------------------------------------------------------------------------------


def our_epoch(
    images: Images,
    options: argparse.Namespace,
    folder: Path,
    device: torch.device,
    stack: ExitStack,
    *,
    members: int,
) -> Callable[[], None]:
    """The trainer's own epoch, with its meters, its lines and its guard."""
    flags = [*PLAIN, "--dataset", "folder", "--data", str(images.root), "--crop_size", str(images.side)]
    flags += ["--batch_size", str(options.batch_size), "--workers", str(options.workers), "--split_factor", "1"]
    flags += ["--arch", ",".join(members * ["torchvision/resnet18"])]
    flags += ["--method", "independent"] if members > 1 else []
    flags += ["--amp_dtype", "bf16" if device.type == "cuda" else "fp32"]
    trainer = own.open_trainer(flags, folder, device)
    own.close_with(stack, trainer)

    def call() -> None:
        trainer.position.batch, trainer.position.step = 0, 1  # not 0, where a picture is made of the views
        trainer.train_epoch()

    return call


class UsualStep:
    """Forward, backward and update as every example has them; on GPUs under bf16 autocast."""

    def __init__(self, network: nn.Module, optimizer: torch.optim.Optimizer, device: torch.device) -> None:
        self.network, self.optimizer, self.device = network.to(device).train(), optimizer, device

    def __call__(self, images_BCHW: Tensor, labels_B: Tensor) -> Tensor:
        """Train on a batch; the loss, on the device."""
        images_BCHW, labels_B = (value.to(self.device, non_blocking=True) for value in (images_BCHW, labels_B))
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            loss = nn.functional.cross_entropy(self.network(images_BCHW), labels_B)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.detach()


class Opened(Dataset[tuple[Any, int]]):
    """Images as Pillow's with labels: decoded once and kept, or opened each time.

    Attributes:
        transform: of an image; set by timm's loader.
    """

    def __init__(self, images: Images, transform: Callable[[Image.Image], Any] | None = None) -> None:
        self.paths, self.labels, self.transform = images.paths, images.labels, transform
        self.kept = [np.array(Image.open(path)) for path in images.paths] if images.padded else []

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image = Image.fromarray(self.kept[index]) if self.kept else Image.open(self.paths[index]).convert("RGB")
        return image if self.transform is None else self.transform(image), self.labels[index]


def torchvision_transform(images: Images) -> Callable[[Image.Image], Tensor]:
    """As torchvision's reference scripts put it together."""
    bicubic = transforms.InterpolationMode.BICUBIC
    crop: nn.Module = transforms.RandomResizedCrop(images.side, scale=AREA, interpolation=bicubic)
    if images.padded:
        crop = transforms.RandomCrop(images.side, padding=4)
    steps = [crop, transforms.RandomHorizontalFlip(), transforms.PILToTensor()]
    steps += [transforms.ConvertImageDtype(torch.float), transforms.Normalize(MEAN, STD)]
    composed: Callable[[Image.Image], Tensor] = transforms.Compose(steps)
    return composed


def _torchvision_loader(images: Images, options: argparse.Namespace, device: torch.device) -> DataLoader[Any]:
    data: Dataset[Any] = Opened(images, torchvision_transform(images))
    if not images.padded:
        data = torchvision.datasets.ImageFolder(str(images.root / "train"), torchvision_transform(images))
    return DataLoader(
        data,
        batch_size=options.batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=options.workers,
        pin_memory=device.type == "cuda",
        persistent_workers=options.workers > 0,
    )


def _torchvision_step(device: torch.device) -> UsualStep:
    network = torchvision.models.resnet18(num_classes=CLASSES)
    optimizer = torch.optim.SGD(network.parameters(), 0.1, momentum=0.9, nesterov=True, weight_decay=1e-4)
    return UsualStep(network, optimizer, device)


def _epoch(loader: Iterable[Any], step: UsualStep) -> Callable[[], None]:
    def call() -> None:
        for batch in loader:
            loss = step(*batch)
        loss.item()  # as a script prints it

    return call


def torchvision_epoch(images: Images, options: argparse.Namespace, device: torch.device) -> Callable[[], None]:
    """torchvision's transforms, data set and network."""
    return _epoch(_torchvision_loader(images, options, device), _torchvision_step(device))


def timm_epoch(images: Images, options: argparse.Namespace, device: torch.device) -> Callable[[], None]:
    """timm's loader, network and optimiser. It knows no crop of the padded image: a random resized one instead."""
    try:
        import timm
        import timm.data
        import timm.optim
    except ImportError:
        raise UserError("timm is not installed: pip install timm, or leave it out with --only ensemble.") from None
    network = timm.create_model("resnet18", num_classes=CLASSES)
    optimizer = timm.optim.create_optimizer_v2(network, opt="nesterov", lr=0.1, momentum=0.9, weight_decay=1e-4)
    loader = timm.data.create_loader(
        Opened(images),  # type: ignore[arg-type]  # any data set with a transform
        input_size=(3, images.side, images.side),
        batch_size=options.batch_size,
        is_training=True,
        scale=AREA,
        color_jitter=0.0,
        interpolation="bicubic",
        mean=MEAN,
        std=STD,
        num_workers=options.workers,
        pin_memory=device.type == "cuda",
        persistent_workers=options.workers > 0,
        use_prefetcher=device.type == "cuda",
        device=device,
    )
    return _epoch(loader, UsualStep(network, optimizer, device))


def loop_epoch(images: Images, options: argparse.Namespace, device: torch.device) -> Callable[[], None]:
    """A deep ensemble as most people train it: the members one after another, by torchvision's means."""
    epochs = [torchvision_epoch(images, options, device) for _ in range(MEMBERS)]

    def call() -> None:
        for epoch in epochs:
            epoch()

    return call

"""The published training code's behaviour, written again from its description, as the other side of every ratio.

S networks one after another in eager mode, NCHW; every view made by Pillow in DataLoader workers that are started anew
for every epoch; a blocking copy of mixup's permutation; `.item()` on every meter; un-fused SGD. On GPUs fp16 autocast
with a GradScaler; on CPUs plain float32, because fp16 autocast is tens of times slower there.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageEnhance, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from dataset.augment.policy import AUTOAUGMENT_POLICIES
from dataset.views import ViewSpec
from model.splitnet import SplitNet
from utils.precision import lay_out

GREY = (128, 128, 128)


def precision_name(device: torch.device) -> str:
    """What the published code computes in on this kind of device."""
    return "float16" if device.type == "cuda" else "float32"


# ---- views -----------------------------------------------------------------------------------------------------------


class PillowAutoAugment:
    """AutoAugment of one image with Pillow: one of 25 sub-policies, two ops, each with its own probability."""

    def __init__(self, policy: str) -> None:
        self.sub_policies = AUTOAUGMENT_POLICIES[policy]
        self.generator = np.random.default_rng()
        ranges = {
            "shearX": (0, 0.3),
            "shearY": (0, 0.3),
            "translateX": (0, 150 / 331),
            "translateY": (0, 150 / 331),
            "rotate": (0, 30),
            "color": (0, 0.9),
            "contrast": (0, 0.9),
            "brightness": (0, 0.9),
            "sharpness": (0, 0.9),
            "posterize": (8, 4),
            "solarize": (256, 0),
        }
        self.levels = {name: np.linspace(low, high, 10).tolist() for name, (low, high) in ranges.items()}

    def __call__(self, image: Image.Image) -> Image.Image:
        p1, name1, level1, p2, name2, level2 = self.sub_policies[self.generator.integers(len(self.sub_policies))]
        for probability, name, level in ((p1, name1, level1), (p2, name2, level2)):
            if self.generator.random() < probability:
                value = self.levels[name][level] if name in self.levels else 0.0
                image = self.apply(image, name, value if self.generator.random() < 0.5 else -value)
        return image

    @staticmethod
    def apply(image: Image.Image, name: str, value: float) -> Image.Image:
        """One op; ops without a sign take the value's size."""
        size, plain = image.size, abs(value)
        shears = {"shearX": (1, value, 0, 0, 1, 0), "shearY": (1, 0, 0, value, 1, 0)}
        shifts = {
            "translateX": (1, 0, value * size[0], 0, 1, 0),
            "translateY": (1, 0, 0, 0, 1, value * size[1]),
        }
        enhancers: dict[str, Callable[[Image.Image], ImageEnhance._Enhance]] = {
            "color": ImageEnhance.Color,
            "contrast": ImageEnhance.Contrast,
            "brightness": ImageEnhance.Brightness,
            "sharpness": ImageEnhance.Sharpness,
        }
        if name in shears:
            affine = Image.Transform.AFFINE
            return image.transform(size, affine, shears[name], Image.Resampling.BICUBIC, fillcolor=GREY)
        if name in shifts:
            return image.transform(size, Image.Transform.AFFINE, shifts[name], fillcolor=GREY)
        if name == "rotate":
            return image.rotate(plain, fillcolor=GREY)
        if name in enhancers:
            return enhancers[name](image).enhance(1 + value)
        if name == "posterize":
            return ImageOps.posterize(image, round(plain))
        if name == "solarize":
            return ImageOps.solarize(image, plain)  # type: ignore[arg-type]  # a real threshold works
        plain_ops: dict[str, Callable[[Image.Image], Image.Image]] = {
            "autocontrast": ImageOps.autocontrast,
            "equalize": ImageOps.equalize,
            "invert": ImageOps.invert,
        }
        return plain_ops[name](image)


def pillow_views(spec: ViewSpec) -> Callable[[Image.Image], Tensor]:
    """The published transform of one training view of a recipe with an AutoAugment policy: image -> [3, H, W]."""
    crop: list[Callable[[Image.Image], Image.Image]]
    if spec.random_resized_crop:
        bicubic = transforms.InterpolationMode.BICUBIC
        crop = [transforms.RandomResizedCrop(spec.crop_size, scale=(0.1, 1.0), interpolation=bicubic)]
    else:
        crop = [transforms.RandomCrop(spec.crop_size, padding=spec.padding)]
    return transforms.Compose(
        [
            *crop,
            transforms.RandomHorizontalFlip(),
            PillowAutoAugment(spec.policy),
            transforms.ToTensor(),
            transforms.Normalize(spec.mean, spec.std),
            transforms.RandomErasing(p=spec.erase_p, scale=spec.erase_area, ratio=spec.erase_ratio, value=0),
        ]
    )


def pillow_evaluation(spec: ViewSpec) -> Callable[[Image.Image], Tensor]:
    """The published transform of a small image for evaluation: image -> [3, H, W]."""
    return transforms.Compose([transforms.ToTensor(), transforms.Normalize(spec.mean, spec.std)])


@dataclass
class PillowDataset(Dataset[tuple[Tensor, int]]):
    """Images as Pillow's, each item V views of one of them: float [V, 3, H, W], label.

    Attributes:
        images: uint8 arrays [H, W, 3], or paths; a file is decoded once for every view.
        labels: N classes.
        transform: of one view.
        num_views: V.
    """

    images: Sequence[np.ndarray | Path]
    labels: Sequence[int]
    transform: Callable[[Image.Image], Tensor]
    num_views: int

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.stack([self.transform(self._open(index)) for _ in range(self.num_views)]), self.labels[index]

    def _open(self, index: int) -> Image.Image:
        image = self.images[index]
        if isinstance(image, Path):
            with Image.open(image) as file:
                return file.convert("RGB")
        return Image.fromarray(image)


def loader(
    dataset: PillowDataset,
    *,
    batch_size: int,
    workers: int,
    device: torch.device,
    train: bool,
    keeps_workers: bool = False,
) -> DataLoader:
    """The published loader, whose workers live for one epoch.

    Args:
        keeps_workers: they live for all epochs, so that they can be timed without their start.
    """
    return DataLoader(
        dataset,
        batch_size=batch_size,
        shuffle=train,
        drop_last=train,
        num_workers=workers,
        pin_memory=device.type == "cuda",
        persistent_workers=keeps_workers,
        # as Pythons before 3.14 do by themselves; a fork server would be sent all images for every worker
        multiprocessing_context="fork" if workers and sys.platform == "linux" else None,
    )


# ---- training --------------------------------------------------------------------------------------------------------


class Meter:
    """Running mean of a Python number, as the published code keeps it."""

    def __init__(self) -> None:
        self.total, self.count = 0.0, 0

    def update(self, value: float, count: int) -> None:
        """Add `count` values of this mean."""
        self.total += value * count
        self.count += count


class BaselineStep:
    """One training step of S networks with mixup and the Jensen-Shannon co-training loss.

    Args:
        network: a SplitNet in float32, NCHW, on its device; trained in place.
        mix_alpha: of mixup's Beta distribution.
        cot_weight: of the co-training loss.
    """

    def __init__(self, network: SplitNet, device: torch.device, *, mix_alpha: float = 0.2, cot_weight: float = 0.5):
        self.network, self.device = network.train(), device
        self.mix_alpha, self.cot_weight = mix_alpha, cot_weight
        self.optimizer = torch.optim.SGD(
            network.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-4, foreach=False, fused=False
        )
        self.is_half = device.type == "cuda"
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.is_half)
        self.meters = {name: Meter() for name in ("loss_ce", "loss_cot", "ensemble")}
        self.network_meters = [Meter() for _ in network.models]

    def __call__(self, views_SBCHW: Tensor, labels_B: Tensor) -> None:
        """Train on a batch of float views [S, B, 3, H, W] and int64 labels [B], both on the device."""
        count = len(labels_B)
        lam = float(np.random.default_rng().beta(self.mix_alpha, self.mix_alpha))
        order = torch.randperm(count).to(self.device)  # pageable memory: the host waits for the device here
        mixed = [lam * view + (1 - lam) * view[order] for view in views_SBCHW]
        with torch.autocast(self.device.type, torch.float16, enabled=self.is_half):
            logits = [one(view) for one, view in zip(self.network.models, mixed, strict=True)]
            loss_ce = torch.stack(
                [
                    lam * F.cross_entropy(own, labels_B) + (1 - lam) * F.cross_entropy(own, labels_B[order])
                    for own in logits
                ]
            ).sum()
            loss_cot = self.cot_weight * self._js_divergence(logits) if len(logits) > 1 else loss_ce.new_zeros(())
            loss = loss_ce + loss_cot
        self.optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        # every meter reads the device by itself: S + 3 times a step
        for meter, own in zip(self.network_meters, logits, strict=True):
            meter.update(self._accuracy(own, labels_B), count)
        self.meters["ensemble"].update(self._accuracy(torch.stack(logits).mean(dim=0), labels_B), count)
        self.meters["loss_ce"].update(loss_ce.item(), count)
        self.meters["loss_cot"].update(loss_cot.item(), count)

    @staticmethod
    def _js_divergence(logits: Sequence[Tensor]) -> Tensor:
        probabilities = torch.stack([own.float().softmax(dim=-1) for own in logits])
        mean = probabilities.mean(dim=0)
        entropy_of_mean = -(mean * mean.clamp_min(1e-12).log()).sum(dim=-1)
        mean_of_entropy = -(probabilities * probabilities.clamp_min(1e-12).log()).sum(dim=-1).mean(dim=0)
        return (entropy_of_mean - mean_of_entropy).mean()

    @staticmethod
    def _accuracy(logits_BK: Tensor, labels_B: Tensor) -> float:
        return float((logits_BK.argmax(dim=-1) == labels_B).float().mean().item())


@torch.no_grad()
def baseline_evaluate(
    network: SplitNet, batches: Iterator[tuple[Tensor, Tensor]], device: torch.device
) -> tuple[list[float], float]:
    """Evaluate as published, S networks one after another with a read of every meter after every batch.

    Args:
        network: in evaluation mode, float32, NCHW.
        batches: images [B, 3, H, W] and labels [B], on the host.

    Returns:
        top-1 in percent of every network, and of the mean of their logits.
    """
    meters = [Meter() for _ in range(len(network.models) + 1)]
    losses = Meter()
    is_half = device.type == "cuda"
    for host_images, host_labels in batches:
        images, labels_B = host_images.to(device), host_labels.to(device)
        with torch.autocast(device.type, torch.float16, enabled=is_half):
            logits = [one(images) for one in network.models]
            mean_BK = torch.stack(logits).mean(dim=0)
            losses.update(F.cross_entropy(mean_BK, labels_B).item(), len(labels_B))
        for meter, own in zip(meters, [*logits, mean_BK], strict=True):
            hits = own.topk(min(5, own.shape[-1]), dim=-1).indices == labels_B[:, None]
            meter.update(hits[:, 0].float().mean().item(), len(labels_B))
            hits.any(dim=-1).float().mean().item()
    accuracies = [100 * meter.total / max(meter.count, 1) for meter in meters]
    return accuracies[:-1], accuracies[-1]


def plain_network(network: SplitNet, device: torch.device) -> SplitNet:
    """The networks in float32 and NCHW on their device, as the published code holds them."""
    return lay_out(network.to(device, torch.float32), torch.contiguous_format)

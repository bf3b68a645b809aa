"""A whole epoch, and an evaluation by itself: load, augment, train, evaluate, checkpoint (G7, G11).

The published side reads Pillow images in DataLoader workers that start anew for every pass.
"""

import argparse
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import baseline, own
from benchmarks.report import Side, failure, measure_as_asked, release, row
from dataset import ImageSet
from model import BackboneRequest, build_splitnet
from model.splitnet import SplitNet
from train_split import Trainer
from utils.command_line import at_least
from utils.cpus import allowed_cpus

GPU_GOALS = {("wide_resnet16_8", 4): 2.5, ("resnet110", 4): 5.0, ("wide_resnet28_10", 4): 1.7}  # G7
EVALUATION_GOAL = 2.4  # G11, on a CPU
CIFAR_IMAGES = 50_000  # of the epoch that G7 is about


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of this benchmark beside the common ones."""
    parser.add_argument("--arch", default="resnet110", help="backbone (default resnet110)")
    parser.add_argument("--batch_size", type=at_least(1), default=128, help="images (default 128)")
    parser.add_argument("--workers", type=at_least(0), default=2, help="of the published loader (default 2)")
    parser.add_argument("--data", type=Path, help="class folders of images up to 64 px (default: synthetic images)")
    parser.add_argument(
        "--images",
        type=at_least(1),
        help="use so many of every split (default: all); more than there are: some of them again",
    )
    parser.add_argument("--cases", help="comma list such as bf16+stacked (default: every execution and precision)")
    parser.add_argument(
        "--evaluation_only", action="store_true", help="time evaluations of the test images alone (G11)"
    )


def run(options: argparse.Namespace, device: torch.device) -> Iterator[dict[str, Any]]:
    """Time the published pass and a few cases at a time in turns.

    Raises:
        UserError: a case, an architecture or a folder that does not exist.
    """
    names = own.chosen_cases(options.cases, device)
    for some in own.grouped(names):
        yield from _rows(some, options, device)
        release(device)


def _rows(names: Sequence[str], options: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    flags = ["--arch", options.arch, "--split_factor", str(options.split_factor), "--workers", "0"]
    flags += ["--batch_size", str(options.batch_size), "--eval_batch_size", str(options.batch_size)]
    if options.data is not None:
        flags += ["--dataset", "folder", "--data", str(options.data)]
    layouts: dict[str, str] = {}

    def opened(case: str, folder: Path) -> Trainer:
        trainer = own.open_trainer([*flags, *own.case_flags(case)], folder, device)
        own.close_with(stack, trainer)
        if options.images is not None:
            own.resize(trainer, options.images)
        return trainer

    def case_of(name: str, folder: Path) -> Callable[[], object]:
        trainer = opened(name, folder)
        layouts[name] = own.layout(trainer)
        return _own_evaluation(trainer) if options.evaluation_only else _own_epoch(trainer)

    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        plain = opened("loop", Path(folder) / "plain")  # what the published side is told of images and views
        published = _published_evaluation if options.evaluation_only else _published_epoch
        builders: dict[str, Callable[[], Callable[[], object]]] = {
            "published": partial(published, options, plain, device)
        }
        builders |= {name: partial(case_of, name, Path(folder) / str(i)) for i, name in enumerate(names)}
        found = measure_as_asked(
            builders,
            options,
            device,
            warmup=int(options.evaluation_only),  # an epoch brings its own, which is shorter
            calls=1,
        )
    images = len(plain.source.test) if options.evaluation_only else len(plain.source.train)
    what = "evaluation" if options.evaluation_only else "epoch with evaluation and checkpoint"
    subject = f"{what} of {options.arch} S={options.split_factor}, {images:,} images"
    base = None
    if "published" in found.seconds:
        base = Side(
            name=f"published, {options.workers} workers",
            dtype=baseline.precision_name(device),
            layout="NCHW",
            seconds=found.seconds["published"],
        )
    goal, commit = _goal(options, device, images)
    rows = [failure(goal, subject, name, "", error) for name, error in found.errors.items()]
    for name in names:
        if name in found.seconds:
            side = Side(name=name, dtype=own.case_dtype(name), layout=layouts[name], seconds=found.seconds[name])
            rows.append(row(goal, subject, side, base, work=images, commit=commit, unit="images"))
    return rows


def _goal(options: argparse.Namespace, device: torch.device, images: int) -> tuple[str | None, float | None]:
    if options.evaluation_only:
        return ("G11", EVALUATION_GOAL) if device.type == "cpu" and options.split_factor == 4 else (None, None)
    commit = GPU_GOALS.get((options.arch, options.split_factor))
    # the published side with all the workers that it can use, and long enough for their start not to count
    is_fair = images == CIFAR_IMAGES and options.workers == allowed_cpus()
    return ("G7", commit) if device.type == "cuda" and commit and is_fair else (None, None)


def _warm_up(step: Callable[[], object], device: torch.device) -> int:
    """The first steps, in which libraries choose their kernels and graphs are recorded; returns how many."""
    count = 20 if device.type == "cuda" else 1
    for _ in range(count):
        step()
    return count


def _own_epoch(trainer: Trainer) -> Callable[[], None]:
    count = _warm_up(own.training_step(trainer, ready_views=False), trainer.world.device)
    trainer.method.eval()
    trainer.evaluate_split(trainer.source.reported)

    def call() -> None:
        # not 0, where a picture is made of the views; and never at the end of training
        trainer.position.batch, trainer.position.step = 0, count
        trainer.train_epoch()
        trainer.evaluate_epoch()
        trainer.save("checkpoint_1.pth.tar")
        trainer.saver.wait()  # or it would go on while the other side is timed

    return call


def _own_evaluation(trainer: Trainer) -> Callable[[], None]:
    def call() -> None:
        trainer.method.eval()
        trainer.evaluate_split(trainer.source.reported)

    return call


def _network(options: argparse.Namespace, trainer: Trainer, device: torch.device) -> SplitNet:
    request = BackboneRequest(
        arch=options.arch, split_factor=options.split_factor, num_classes=len(trainer.source.classes)
    )
    return baseline.plain_network(build_splitnet(request, seed=1), device)


def _pillow(split: ImageSet, transform: Callable[[Any], Tensor], num_views: int) -> baseline.PillowDataset:
    assert split.images is not None
    images = list(split.images.permute(0, 2, 3, 1).contiguous().numpy())
    return baseline.PillowDataset(images, split.targets.tolist(), transform, num_views)


def _published_evaluation(
    options: argparse.Namespace, trainer: Trainer, device: torch.device, network: SplitNet | None = None
) -> Callable[[], None]:
    evaluated = (network or _network(options, trainer, device)).eval()
    data = _pillow(trainer.source.test, baseline.pillow_evaluation(trainer.training_step.views.spec), 1)

    def call() -> None:
        batches = baseline.loader(
            data, batch_size=options.batch_size, workers=options.workers, device=device, train=False
        )
        evaluated.eval()
        baseline.baseline_evaluate(evaluated, ((views[:, 0], labels) for views, labels in batches), device)

    return call


def _published_epoch(options: argparse.Namespace, trainer: Trainer, device: torch.device) -> Callable[[], None]:
    network = _network(options, trainer, device)
    step = baseline.BaselineStep(network, device)
    data = _pillow(trainer.source.train, baseline.pillow_views(trainer.training_step.views.spec), trainer.num_views)
    evaluate = _published_evaluation(options, trainer, device, network)
    path = trainer.folder / "published.pth.tar"
    batch, side = trainer.loader.fewest_images(0), trainer.config.crop_size
    views_SBCHW = torch.randn(trainer.num_views, batch, 3, side, side).to(device)
    labels_B = torch.zeros(batch, dtype=torch.int64, device=device)
    _warm_up(lambda: step(views_SBCHW, labels_B), device)

    def call() -> None:
        network.train()
        batches = baseline.loader(
            data, batch_size=options.batch_size, workers=options.workers, device=device, train=True
        )
        for views, labels in batches:
            step(views.transpose(0, 1).to(device), labels.to(device))
        evaluate()
        torch.save({"state_dict": network.state_dict(), "optimizer": step.optimizer.state_dict()}, path)

    return call

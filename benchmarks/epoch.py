"""A whole epoch, and an evaluation by itself: load, augment, train, evaluate, checkpoint (G7, G11).

The published side reads Pillow images in DataLoader workers that start anew for every pass.
"""

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import baseline, own
from benchmarks.report import Side, interleave, row
from dataset import ImageSet
from model import BackboneRequest, build_splitnet
from model.splitnet import SplitNet
from train_split import Trainer
from utils.command_line import at_least

GPU_GOALS = {("wide_resnet16_8", 4): 2.5, ("resnet110", 4): 5.0, ("wide_resnet28_10", 4): 1.7}  # G7
EVALUATION_GOAL = 2.4  # G11, on a CPU


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of this benchmark beside the common ones."""
    parser.add_argument("--arch", default="resnet110", help="backbone (default resnet110)")
    parser.add_argument("--batch_size", type=at_least(1), default=128, help="images (default 128)")
    parser.add_argument("--workers", type=at_least(0), default=2, help="of the published loader (default 2)")
    parser.add_argument("--data", type=Path, help="class folders of images up to 64 px (default: synthetic images)")
    parser.add_argument("--images", type=at_least(1), help="use so many of every split (default: all)")
    parser.add_argument("--cases", help="comma list such as bf16+stacked (default: every execution and precision)")
    parser.add_argument(
        "--evaluation_only", action="store_true", help="time evaluations of the test images alone (G11)"
    )


def run(options: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    """Time the published pass and every case in turns.

    Raises:
        UserError: a case, an architecture or a folder that does not exist.
    """
    names = options.cases.split(",") if options.cases else own.default_cases(device)
    flags = ["--arch", options.arch, "--split_factor", str(options.split_factor), "--workers", "0"]
    flags += ["--batch_size", str(options.batch_size), "--eval_batch_size", str(options.batch_size)]
    if options.data is not None:
        flags += ["--dataset", "folder", "--data", str(options.data)]
    with tempfile.TemporaryDirectory() as folder:
        trainers = {
            name: own.open_trainer([*flags, *own.case_flags(name)], Path(folder) / str(i), device)
            for i, name in enumerate(names)
        }
        if options.images is not None:
            for trainer in trainers.values():
                own.shorten(trainer, options.images)
        first = next(iter(trainers.values()))
        published = _published_evaluation if options.evaluation_only else _published_epoch
        ours = _own_evaluation if options.evaluation_only else _own_epoch
        cases: dict[str, Callable[[], object]] = {"published": published(options, first, device)}
        cases |= {name: ours(trainer) for name, trainer in trainers.items()}
        times = interleave(cases, device, warmup=1, rounds=options.rounds, seconds=options.seconds, clock=options.clock)
        images = len(first.source.test) if options.evaluation_only else len(first.source.train)
        rows = []
        for name, trainer in trainers.items():
            goal, commit = _goal(options, device)
            base = Side(
                name=f"published, {options.workers} workers",
                dtype=baseline.precision_name(device),
                layout="NCHW",
                seconds=times["published"],
            )
            side = Side(name=name, dtype=own.case_dtype(name), layout=own.layout(trainer), seconds=times[name])
            what = "evaluation" if options.evaluation_only else "epoch with evaluation and checkpoint"
            subject = f"{what} of {options.arch} S={options.split_factor}, {images:,} images"
            rows.append(row(goal, subject, side, base, work=images, commit=commit, unit="images"))
    return rows


def _goal(options: argparse.Namespace, device: torch.device) -> tuple[str | None, float | None]:
    if options.evaluation_only:
        return ("G11", EVALUATION_GOAL) if device.type == "cpu" and options.split_factor == 4 else (None, None)
    commit = GPU_GOALS.get((options.arch, options.split_factor))
    return ("G7", commit) if device.type == "cuda" and commit else (None, None)


def _own_epoch(trainer: Trainer) -> Callable[[], None]:
    def call() -> None:
        trainer.position.batch = 0
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

"""The project's own side of a benchmark: real trainers, made from the flags that a user would give."""

import logging
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from dataset import ImageSet
from dataset.pipeline import build_eval_loader, build_train_loader
from dataset.views import ViewMaker
from model.options import EXECUTIONS
from opening.data import open_shared_source
from opening.earlier import settle_seed
from parser_params import parse_config, resolve_config
from train_split import Trainer
from utils import launch
from utils.errors import UserError
from utils.precision import has_fast_bf16

WORDS = {
    "compile": ("--compile", "default"),
    "graph": ("--cuda_graph", "1"),
    "nhwc": ("--layout", "nhwc"),
    "nchw": ("--layout", "nchw"),
}
TOGETHER = 3
TYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "fp64": "float64"}


def default_cases(device: torch.device) -> list[str]:
    """Each execution in each precision that the hardware is made for; on GPUs also compiled and as one graph."""
    precisions = ["fp32"] if device.type == "cpu" else []
    precisions += ["bf16"] if has_fast_bf16(device) else []
    names = [f"{precision}+{execution}" for precision in precisions for execution in EXECUTIONS if execution != "auto"]
    if device.type == "cuda":
        names += ["bf16+loop+compile", "bf16+loop+graph", "bf16+parallel+graph", "bf16+stacked+graph"]
        names += ["bf16+parallel+compile+graph"]
    return names


def chosen_cases(names: str | None, device: torch.device) -> list[str]:
    """The cases of a comma list; None: `default_cases`.

    Raises:
        UserError: as `case_flags`.
    """
    cases = default_cases(device) if names is None else names.split(",")
    for case in cases:
        case_flags(case)
    return cases


def grouped(names: Sequence[str]) -> list[Sequence[str]]:
    """The cases, as many at a time as may lie in a GPU's memory side by side."""
    return [names[start : start + TOGETHER] for start in range(0, len(names), TOGETHER)]


def case_flags(case: str) -> list[str]:
    """Flags of a case such as bf16+stacked+compile+graph.

    Raises:
        UserError: a word that is none of these.
    """
    flags: list[str] = []
    for word in case.split("+"):
        if word in TYPES:
            flags += ["--amp_dtype", word]
        elif word in EXECUTIONS:
            flags += ["--execution", word] if word != "loop" else []
        elif word in WORDS:
            flags += WORDS[word]
        else:
            raise UserError(f"--cases {case}: {word!r} is none of {', '.join([*TYPES, *EXECUTIONS, *WORDS])}.")
    return flags


def case_dtype(case: str) -> str:
    """Type of a case's products, as torch names it."""
    return next((TYPES[word] for word in case.split("+") if word in TYPES), "auto")


def layout(trainer: Trainer) -> str:
    """NHWC or NCHW."""
    return "NHWC" if trainer.precision.memory_format is torch.channels_last else "NCHW"


def open_trainer(
    flags: Sequence[str], folder: Path, device: torch.device, *, world: launch.World | None = None
) -> Trainer:
    """A trainer as `train_split.py` makes it from these flags; data is --dataset synthetic where they name none.

    Args:
        flags: without those of the data, the seed and the device.
        folder: of the run.
        device: where it computes.
        world: this process's place, where there are several; None: it is alone.

    Raises:
        UserError: as `train_split.run`.
    """
    argv = [*flags, "--model_dir", str(folder), "--seed", "1", "--max_ckpt_nums", "1"]
    if "--dataset" not in flags:
        argv += ["--dataset", "synthetic", "--num_classes", "10", "--crop_size", "32"]
    argv += ["--no_cuda"] if device.type == "cpu" else ["--gpu", str(device.index or 0)]
    config = parse_config(argv, program="train_split.py")
    world = world or launch.join(config.gpus())
    folder.mkdir(parents=True, exist_ok=True)
    config = settle_seed(config, world, None)
    source = open_shared_source(config, world)
    resolved = resolve_config(config, data_recipe=source.recipe, crop_size=source.crop_size)
    torch.backends.cudnn.benchmark = True
    level = logging.getLogger().level
    logging.getLogger().setLevel(logging.ERROR)
    try:
        return Trainer(resolved, world, source, None)
    finally:
        logging.getLogger().setLevel(level)


def close_with(stack: ExitStack, trainer: Trainer) -> None:
    """Where the stack ends, what the trainer has started ends too: decoding processes, log and saver."""
    for loader in trainer.loaders:
        stack.callback(loader.close)
    stack.callback(trainer.log.close)
    stack.callback(trainer.saver.close)


def resize(trainer: Trainer, count: int) -> None:
    """Use `count` images of every split, evenly spaced over it and so over its classes.

    Where the training images are fewer, they are used again and again, and a fifth as many test images, as in CIFAR.
    """
    longer = count > len(trainer.source.train)

    def part(split: ImageSet, number: int) -> ImageSet:
        if longer:
            return split.subset(torch.arange(number) % len(split))
        return split.subset(torch.linspace(0, len(split) - 1, min(number, len(split)), dtype=torch.float64).long())

    train, test = part(trainer.source.train, count), part(trainer.source.test, count // 5 if longer else count)
    trainer.source = replace(trainer.source, train=train, test=test)
    config = replace(trainer.config, workers=0)
    trainer.loader = build_train_loader(
        trainer.source, config, trainer.world, num_views=trainer.num_views, seed=trainer.seed
    )
    loader = build_eval_loader(test, config, trainer.world)
    trainer.eval_loaders = {trainer.source.reported: loader}
    trainer.steps_per_epoch = trainer.loader.steps_per_epoch


class _ReadyViews(ViewMaker):
    """Gives the same views at every step, so that a step is timed without them."""

    def __init__(self, maker: ViewMaker, views_VBCHW: torch.Tensor) -> None:
        super().__init__(maker.spec, maker.seed)
        self._views = views_VBCHW

    def make(self, *_: Any, **__: Any) -> torch.Tensor:
        return self._views


def training_step(trainer: Trainer, *, ready_views: bool = True) -> Callable[[], None]:
    """One training step as the trainer makes it: mixup, networks, losses, update, guard, meters.

    Args:
        ready_views: the views are those of the first call; otherwise each step makes its own.
    """
    step = trainer.training_step
    batch = next(iter(trainer.loader.epoch(0)))
    if ready_views:
        step.views = _ReadyViews(step.views, step.make_views(batch, 0))
    trainer.method.train()

    def call() -> None:
        trainer.advance(batch, step(batch, trainer.progress(batch)))

    return call

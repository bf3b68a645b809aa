"""--dry_run: one step and one evaluation batch, each once more by the clock, in a folder that goes again."""

import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch

from dataset.loader import EvalLoader
from parser_params import Config
from record.checkpoint import checkpoint_size
from training.cost import RunCost, nearest_folder, peak_memory
from training.guard import judge_nonfinite
from training.state import RunState
from utils import distributed
from utils.device import wait_for
from utils.errors import UserError
from utils.launch import World

logger = logging.getLogger(__name__)


class Trial(Protocol):
    """What a dry run asks of a trainer."""

    steps_per_epoch: int
    eval_loaders: dict[str, EvalLoader]
    state: RunState

    def steps_left(self) -> int: ...

    def next_steps(self, count: int) -> Iterator[object]: ...

    def evaluate_split(self, name: str, *, most: int | None = None) -> Mapping[str, Any]: ...

    def close(self) -> None: ...


def dry_run(world: World, config: Config, build_trainer: Callable[[Config], Trial]) -> RunCost:
    """What the run would cost; its folder is another one meanwhile, and left as it is.

    Args:
        build_trainer: opens the run that a configuration describes.

    Raises:
        UserError, RunError: as the run itself would at its beginning.
    """
    disk = nearest_folder(Path(config.model_dir))
    if not os.access(disk, os.W_OK):
        raise UserError(f"--model_dir {config.model_dir}: cannot be written.")
    with tempfile.TemporaryDirectory() as own:
        place = distributed.gather_values(own)[0]  # process 0 writes, others may read what it wrote
        trainer = build_trainer(replace(config, model_dir=place, given={**config.given, "model_dir": place}))
        try:
            cost = _measure(trainer, config, world.device, free_bytes=shutil.disk_usage(disk).free)
        finally:
            trainer.close()
        distributed.barrier()  # nobody looks into the folder any more
    return cost


def _measure(trainer: Trial, config: Config, device: torch.device, *, free_bytes: int) -> RunCost:
    steps, state = trainer.steps_left(), trainer.state
    epochs = max(-(-steps // trainer.steps_per_epoch), 1)
    step_seconds = _seconds_of_last(trainer.next_steps(2), device)
    if (found := state.guard.read(distributed.all_reduce_sum)) is not None:
        logger.warning("%s", judge_nonfinite(found, None, trainer.steps_per_epoch))
    state.method.synchronise()
    state.method.eval()
    evaluation_seconds = 0.0
    for name, loader in trainer.eval_loaders.items():
        twice = (trainer.evaluate_split(name, most=1) for _ in range(2))
        evaluation_seconds += _seconds_of_last(twice, device) * loader.rounds
    checkpoint = state.gather()
    saves = epochs + (steps // config.save_steps if config.save_steps else 0)
    return RunCost(
        steps=steps,
        evaluations=max(epochs // config.eval_per_epoch, 1),
        step_seconds=step_seconds,
        evaluation_seconds=evaluation_seconds,
        memory_bytes=peak_memory(device),
        device=device.type,
        checkpoint_bytes=0 if checkpoint is None else checkpoint_size(checkpoint),
        checkpoints=min(saves, config.max_ckpt_nums) + 2,
        free_bytes=free_bytes,
    )


def _seconds_of_last(works: Iterable[object], device: torch.device) -> float:
    """Seconds that the last of some works took, the device having done them."""
    seconds, began = 0.0, time.perf_counter()
    for _ in works:
        wait_for(device)
        seconds, began = time.perf_counter() - began, time.perf_counter()
    return seconds

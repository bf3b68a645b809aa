"""The run directory: whether it may be trained into, which checkpoint to go on from, what it says of the machine."""

import json
import logging
import os
import platform
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch

from record.checkpoint import Checkpoint, list_checkpoints, load_checkpoint, load_newest
from utils.errors import UserError, reason
from utils.launch import World
from utils.plain_json import plain_json

logger = logging.getLogger(__name__)

RESULTS = "results.json"
HPARAMS = "hparams_train.json"


def open_run(folder: Path, resume: str | None) -> Checkpoint | None:
    """The checkpoint to go on from, or None for a fresh run.

    Args:
        folder: --model_dir.
        resume: a path, "auto" for the newest readable checkpoint of the folder, or None.

    Raises:
        UserError: the folder holds a run and `resume` is None, or the checkpoint cannot be used.
    """
    if resume == "auto":
        found = load_newest(folder) if folder.is_dir() else None
        if found is None:
            return None
        logger.info("Going on from %s", found[1])
        return cast(Checkpoint, found[0])
    if resume is not None:
        return cast(Checkpoint, load_checkpoint(resume))
    if folder.is_dir() and (list_checkpoints(folder) or (folder / "metrics.jsonl").exists()):
        raise UserError(
            f"--model_dir {folder} already holds a run: go on with --resume auto, or choose another --model_dir."
        )
    return None


def make_folder(folder: Path) -> None:
    """Make the run directory.

    Raises:
        UserError: it cannot be made or written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--model_dir {folder}: cannot be made: {reason(error)}.") from None
    if not os.access(folder, os.W_OK):
        raise UserError(f"--model_dir {folder}: cannot be written.")


def read_results(folder: Path) -> dict[str, Any] | None:
    """results.json of a run that ended, or None where there is none that can be read."""
    try:
        results = json.loads((folder / RESULTS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return results if isinstance(results, dict) else None


def as_json(value: Mapping[str, Any]) -> str:
    """The contents of a JSON file."""
    return json.dumps(plain_json(value), indent=2) + "\n"


def describe_environment(world: World) -> dict[str, Any]:
    """What a run runs on, for env.json."""
    return {
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "platform": platform.platform(),
        "cpu_count": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else "cpu",
        "world_size": world.world_size,
    }

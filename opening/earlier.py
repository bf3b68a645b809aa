"""What a run takes from the one that it goes on from: its seed, or the results where nothing is left to do."""

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from parser_params import Config
from record import checkpoint as ckpt
from record.run_folder import Resumed, read_results
from training.resume import changed_flags
from training.state import has_ended, seed_before, steps_before
from utils.launch import World
from utils.seed import draw_seed

logger = logging.getLogger(__name__)


def settle_seed(config: Config, world: World, resumed: Resumed | None) -> Config:
    """The configuration with its seed: the user's, else the resumed run's, else one drawn by process 0."""
    seed = config.seed
    if seed is None and resumed is not None:
        seed = seed_before(resumed.state)
    if seed is None:
        drawn = torch.tensor([draw_seed()], device=world.device)
        if world.world_size > 1:
            torch.distributed.broadcast(drawn, src=0)
        seed = int(drawn)
    return replace(config, seed=seed)


def finished_results(folder: Path, config: Config, resumed: Resumed | None) -> dict[str, Any] | None:
    """The results of a run that `--resume auto` finds with nothing left to do.

    Raises:
        UserError: a flag that was given makes it another run.
    """
    results = read_results(folder) if config.resume == "auto" and config.start_epoch is None else None
    if results is None or resumed is None:
        return None
    epochs = config.given.get("epochs")
    done = has_ended(
        resumed.state,
        epochs=epochs,
        max_steps=config.max_steps,
        default_epochs=config.epochs,
        patience=config.given.get("patience", resumed.state.get("config", {}).get("patience")),
    )
    if not done or results.get("steps") != steps_before(resumed.state):
        return None
    given = {name: value for name, value in config.values().items() if name in config.given}
    changed = changed_flags(resumed.state.get("config", {}), given, config.resume_choices(), config.origins)
    logger.warning("already finished: nothing was trained%s", f"; without effect: {', '.join(changed)}" * bool(changed))
    if not (folder / ckpt.BEST).exists():
        logger.warning("%s is not there any more; %s is the newest checkpoint", ckpt.BEST, resumed.path.name)
    return results

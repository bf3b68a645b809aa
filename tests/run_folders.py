"""Run directories made by hand: what train_split.py leaves of a run, with known figures."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def write_run(
    folder: Path, settings: Mapping[str, Any], acc1: list[float], ensemble: float, results: Mapping[str, Any]
) -> Path:
    """The flags and results of a finished run; of `settings` it needs the method, arch and seed.

    The best epoch was one point better for every network, and two for the ensemble; seed s took 100 + s seconds.
    """
    folder.mkdir()
    flags = {**settings, "model_dir": str(folder)}
    hparams = {name: {"value": value, "origin": "flag"} for name, value in flags.items()}
    (folder / "hparams_train.json").write_text(json.dumps(hparams))
    final = {
        **{name: settings[name] for name in ("method", "arch", "seed")},
        "acc1": acc1,
        "ensemble_acc1": ensemble,
        "best_acc1": [value + 1 for value in acc1],
        "best_ensemble_acc1": ensemble + 2,
        "best_chosen_on": "test",
        "seconds": 100.0 + settings["seed"],
        **results,
    }
    (folder / "results.json").write_text(json.dumps(final))
    return folder

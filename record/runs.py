"""Run directories as a comparison reads them: settings, final figures, and how far those came that have not ended."""

import csv
import json
import math
import statistics
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from record.run_folder import HPARAMS, read_results
from utils.errors import UserError

# flags that say where, on what and how talkatively a run is made, not what comes out
NOT_COMPARED = {"seed", "model_dir", "resume", "config", "workers", "print_freq", "proc_name", "json", "max_ckpt_nums"}
NOT_COMPARED |= {"save_steps", "gpu", "gpu_ids", "rank", "dist_url"}
NEEDED = {"method", "arch", "seed", "acc1", "ensemble_acc1", "best_acc1", "best_ensemble_acc1", "params_total"}
NEEDED |= {"macs_total", "seconds", "best_chosen_on"}
# figures of the last evaluation, by the names that a comparison has for them
OF_LAST = {
    "nll_last": "ensemble_nll",
    "ece_last": "ensemble_ece",
    "brier_last": "ensemble_brier",
    "disagreement_last": "disagreement",
}


@dataclass(frozen=True)
class FinishedRun:
    """One run directory.

    Attributes:
        folder: the directory.
        settings: value of every flag that is compared, by name.
        results: results.json; of a run that has not ended, what its last evaluation says, as far as there is one.
        figures: of the last evaluation, by the names of OF_LAST; without those that the directory does not say.
        is_finished: whether the run has ended.
        epochs_done: of a run that has not, how many are evaluated.
    """

    folder: Path
    settings: Mapping[str, Any]
    results: Mapping[str, Any]
    figures: Mapping[str, float]
    is_finished: bool = True
    epochs_done: int = 0

    @property
    def progress(self) -> str:
        """How far a run is that has not ended."""
        return f"{self.epochs_done} of {self.settings.get('epochs', '?')} epochs"


@dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation; None where there is one value only."""

    mean: float
    std: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Over the seeds."""
        return cls(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None)

    @classmethod
    def of_known(cls, values: Sequence[float | None]) -> "Spread | None":
        """Over the seeds, None where one of them lacks the value."""
        known = [value for value in values if value is not None]
        return cls.of(known) if known and len(known) == len(values) else None

    def text(self, digits: int) -> str:
        """`mean ± std`."""
        return f"{self.mean:.{digits}f}" + ("" if self.std is None else f" ± {self.std:.{digits}f}")

    def significant(self, digits: int = 3) -> str:
        """The same with so many significant digits of the mean, at least one of the deviation."""
        return _rounded(self.mean, digits) + ("" if self.std is None else f" ± {_rounded(self.std, digits - 1)}")


def _rounded(value: float, digits: int) -> str:
    """So many significant digits, whole numbers in full and without an exponent."""
    return f"{value:.0f}" if abs(value) >= 10 ** (digits - 1) else f"{value:.{digits}g}"


def spread_text(spread: Spread | None, digits: int) -> str:
    """`mean ± std`, empty where there is no figure."""
    return "" if spread is None else spread.text(digits)


def spread_numbers(spread: Spread | None) -> tuple[str, str]:
    """(mean, deviation) for CSV, empty where there is none."""
    if spread is None:
        return "", ""
    return f"{spread.mean:.4f}", "" if spread.std is None else f"{spread.std:.4f}"


def read_run(folder: Path) -> FinishedRun:
    """A run directory of train_split.py, of this and of earlier versions.

    Raises:
        UserError: no folder, none of a run, or results that are no figures.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder: give run directories (--model_dir of train_split.py).")
    values = flag_values(folder)
    if values is None:
        raise UserError(f"{folder} is no run directory: {HPARAMS} is missing or foreign. Leave it out.")
    settings = compared(values)
    results = read_results(folder)
    if results is None:
        return _unfinished(folder, settings, values)
    missing = NEEDED - results.keys()
    if missing:
        raise UserError(f"{folder}: results.json is not that of a training run: no {min(missing)}. Leave it out.")
    for name in sorted(NEEDED):
        if not _is_usable(name, results[name]):
            raise UserError(f"{folder}: results.json has {name} {results[name]!r}, no figure to compare. Leave it out.")
    return FinishedRun(folder, settings, results, _last_figures(results, _evaluations(folder), _summary(folder)))


def flag_values(folder: Path) -> dict[str, Any] | None:
    """The value of every flag of a run; None where the folder is none of a run."""
    try:
        hparams = json.loads((folder / HPARAMS).read_text(encoding="utf-8"))
        return {name: item["value"] for name, item in hparams.items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None


def compared(values: Mapping[str, Any]) -> dict[str, Any]:
    """Of the flags, those that decide what comes out."""
    return {name: value for name, value in values.items() if name not in NOT_COMPARED}


def _unfinished(folder: Path, settings: Mapping[str, Any], values: Mapping[str, Any]) -> FinishedRun:
    """What a run that has not ended says of itself."""
    results: dict[str, Any] = {name: values.get(name) for name in ("method", "arch", "seed")}
    records, rows = _evaluations(folder), _summary(folder)
    evaluated = [record for record in records if _has_accuracies(record)]
    if evaluated:
        split = "test" if "test" in evaluated[-1] else "val"
        last = evaluated[-1][split]
        chosen = "val" if "val" in evaluated[-1] else split
        alike = [record for record in evaluated if {split, chosen} <= record.keys()]
        best = max(alike, key=lambda record: record[chosen]["ensemble_acc1"])[split]
        results |= {"acc1": last["acc1"], "ensemble_acc1": last["ensemble_acc1"], "best_chosen_on": chosen}
        results |= {"best_acc1": best["acc1"], "best_ensemble_acc1": best["ensemble_acc1"]}
    if rows and _number(rows[-1].get("seconds")) is not None:
        results["seconds"] = _number(rows[-1]["seconds"])
    done = int(evaluated[-1]["epoch"]) if evaluated else 0
    figures = _last_figures(results, records, rows)
    return FinishedRun(folder, settings, results, figures, is_finished=False, epochs_done=done)


def _last_figures(
    results: Mapping[str, Any], records: Sequence[Mapping[str, Any]], rows: Sequence[Mapping[str, str]]
) -> dict[str, float]:
    """Figures of the last evaluation: in results.json, else in the last record or row of the logs."""
    split = results.get("reported_on", "test")
    last = results.get("last")
    places: list[Mapping[str, Any]] = [results, last if isinstance(last, Mapping) else {}]
    places += [record.get(split, record.get("val", {})) for record in records[-1:]] + [*rows[-1:]]
    found = {}
    for name, title in OF_LAST.items():
        # earlier versions call one network's figure by the bare name, later ones put the group before it
        known = (_number(_named(place, title)) for place in places if isinstance(place, Mapping))
        value = next((value for value in known if value is not None), None)
        if value is not None:
            found[name] = value
    return found


def _has_accuracies(record: Mapping[str, Any]) -> bool:
    splits = [record[split] for split in ("val", "test") if split in record]
    return all(
        isinstance(split, Mapping) and all(_is_usable(name, split.get(name)) for name in ("acc1", "ensemble_acc1"))
        for split in splits
    )


def _named(place: Mapping[str, Any], title: str) -> Any:
    return next((value for name, value in place.items() if name.rpartition("/")[2] == title), None)


def _evaluations(folder: Path) -> list[dict[str, Any]]:
    """The records of evaluations in metrics.jsonl; what is no record is left out."""
    try:
        lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        try:
            record = json.loads(line)
        except ValueError:
            continue  # half a line, of a run that is writing it
        if isinstance(record, dict) and record.get("kind") == "eval" and record.keys() & {"test", "val"}:
            found.append(record)
    return found


def _summary(folder: Path) -> list[dict[str, str]]:
    try:
        with (folder / "summary.csv").open(encoding="utf-8", newline="") as file:
            return [*csv.DictReader(file)]
    except (OSError, ValueError, csv.Error):
        return []


def _number(value: Any) -> float | None:
    """A finite number, also one that is written as text; else None."""
    try:
        number = float(value) if not isinstance(value, bool) else math.nan
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None


def _is_usable(name: str, value: Any) -> bool:
    """Whether a value of results.json is of its kind; a figure that was not finite is none there."""
    if name in ("method", "arch", "best_chosen_on"):
        return isinstance(value, str)
    if name in ("acc1", "best_acc1"):
        return isinstance(value, list) and bool(value) and all(map(_is_number, value))
    return _is_number(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def grouped(runs: Sequence[FinishedRun], settings_of: Any = lambda run: run.settings) -> list[list[FinishedRun]]:
    """Runs that differ by the seed alone, in the order in which each configuration was met first.

    A folder that was given twice counts once.

    Args:
        runs: that have ended.
        settings_of: run -> the settings that tell configurations apart.

    Raises:
        UserError: two runs of one configuration with the same seed.
    """
    groups: dict[str, list[FinishedRun]] = {}
    for run in {run.folder.resolve(): run for run in runs}.values():
        groups.setdefault(json.dumps(settings_of(run), sort_keys=True), []).append(run)
    for group in groups.values():
        first: dict[int, Path] = {}
        for run in group:
            other = first.setdefault(run.results["seed"], run.folder)
            if other != run.folder:
                raise UserError(f"{other} and {run.folder} have the same configuration and seed: leave one out.")
    return [*groups.values()]


def telling_apart(names: Sequence[str], runs: Sequence[FinishedRun], hidden: Collection[str]) -> list[dict[str, str]]:
    """For each run, the flags in which it differs from others of the same name, with its values as a label has them.

    Args:
        names: of the runs.
        runs: one of each configuration.
        hidden: flags that are not looked at.
    """
    found = []
    for name, run in zip(names, runs, strict=True):
        own = run.settings
        alike = [other.settings for other, its in zip(runs, names, strict=True) if its == name and other is not run]
        flags = [flag for flag in own if flag not in hidden and any(one.get(flag) != own[flag] for one in alike)]
        found.append({flag: short(own[flag]) for flag in flags})
    return found


def short(value: Any) -> str:
    """The value of a flag in a label."""
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def networks_of(run: FinishedRun) -> str:
    """`2 x resnet20`, `resnet20 + wrn_16_1`, or `resnet110, S = 2`."""
    names = [name.strip() for name in run.results["arch"].split(",")]
    count = len(run.results.get("acc1", names))
    if len(names) > 1:
        return f"{len(names)} x {names[0]}" if len(set(names)) == 1 else " + ".join(names)
    return f"{names[0]}, S = {count}" if count > 1 else names[0]

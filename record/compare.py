"""Finished runs side by side: accuracy, sizes and time per configuration, mean and spread over the seeds.

`python -m utils.compare RUN_DIR ...` is the command line; `script/compare_methods.sh` makes the runs.
"""

import csv
import io
import json
import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
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
GREY = "#444444"


@dataclass(frozen=True)
class FinishedRun:
    """One run directory.

    Attributes:
        folder: the directory.
        settings: value of every flag that is compared, by name.
        results: results.json.
    """

    folder: Path
    settings: Mapping[str, Any]
    results: Mapping[str, Any]


@dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation; None where there is one value only."""

    mean: float
    std: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Over the seeds."""
        return cls(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None)

    def text(self, digits: int) -> str:
        """`mean ± std`."""
        return f"{self.mean:.{digits}f}" + ("" if self.std is None else f" ± {self.std:.{digits}f}")


@dataclass(frozen=True)
class Row:
    """One configuration over its seeds; accuracies in percent.

    Attributes:
        label: the method, and the flags in which it differs from other rows of the same method.
        networks: what was trained, in words; num_networks: how many networks.
        seeds: in ascending order.
        single_last, single_best: mean top-1 over the networks, after the last and the best epoch.
        ensemble_last, ensemble_best: top-1 of the ensemble. The best epoch is the ensemble's.
        params, macs: of all networks together, as deployed; macs are multiply-adds of one image.
        seconds: of a whole run, its evaluations included.
    """

    label: str
    networks: str
    num_networks: int
    seeds: tuple[int, ...]
    single_last: Spread
    single_best: Spread
    ensemble_last: Spread
    ensemble_best: Spread
    params: int
    macs: int
    seconds: Spread


def read_run(folder: Path) -> FinishedRun:
    """A run directory of train_split.py.

    Raises:
        UserError: no folder, or none of a run that has ended.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder: give run directories (--model_dir of train_split.py).")
    try:
        hparams = json.loads((folder / HPARAMS).read_text(encoding="utf-8"))
        settings = {name: item["value"] for name, item in hparams.items() if name not in NOT_COMPARED}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        raise UserError(f"{folder} is no run directory: {HPARAMS} is missing or foreign. Leave it out.") from None
    results = read_results(folder)
    if results is None:
        raise UserError(f"{folder}: the run has not ended. Finish it with --resume auto, or leave it out.")
    missing = NEEDED - results.keys()
    if missing:
        raise UserError(f"{folder}: results.json is not that of a training run: no {min(missing)}. Leave it out.")
    for name in sorted(NEEDED):
        if not _is_usable(name, results[name]):
            raise UserError(f"{folder}: results.json has {name} {results[name]!r}, no figure to compare. Leave it out.")
    return FinishedRun(folder, settings, results)


def _is_usable(name: str, value: Any) -> bool:
    """Whether a value of results.json is of its kind; a figure that was not finite is none there."""
    if name in ("method", "arch", "best_chosen_on"):
        return isinstance(value, str)
    if name in ("acc1", "best_acc1"):
        return isinstance(value, list) and bool(value) and all(map(_is_number, value))
    return _is_number(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def compare_runs(runs: Sequence[FinishedRun]) -> list[Row]:
    """One row per configuration, in the order in which each was met first; runs of one differ by the seed alone.

    A folder that was given twice counts once.

    Raises:
        UserError: two runs of one configuration with the same seed.
    """
    groups: dict[str, list[FinishedRun]] = {}
    for run in {run.folder.resolve(): run for run in runs}.values():
        groups.setdefault(json.dumps(run.settings, sort_keys=True), []).append(run)
    for group in groups.values():
        first: dict[int, Path] = {}
        for run in group:
            other = first.setdefault(run.results["seed"], run.folder)
            if other != run.folder:
                raise UserError(f"{other} and {run.folder} have the same configuration and seed: leave one out.")
    labels = _labels([group[0] for group in groups.values()])
    return [_row(label, group) for label, group in zip(labels, groups.values(), strict=True)]


def _labels(runs: Sequence[FinishedRun]) -> list[str]:
    """The method of each, and what tells it from the others of the same method."""
    count = Counter(run.results["method"] for run in runs)
    labels = []
    for run in runs:
        alike = [other.settings for other in runs if other.results["method"] == run.results["method"]]
        differing = [
            name
            for name in run.settings
            if any(other.get(name) != run.settings[name] for other in alike) and name not in ("arch", "split_factor")
        ]
        detail = ", ".join(f"{name} {_short(run.settings[name])}" for name in differing)
        label = run.results["method"]
        labels.append(f"{label} ({detail})" if count[label] > 1 and detail else label)
    return labels


def _short(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def _row(label: str, group: Sequence[FinishedRun]) -> Row:
    results = sorted((run.results for run in group), key=lambda one: one["seed"])
    one = results[0]
    return Row(
        label=label,
        networks=_networks(group[0]),
        num_networks=len(one["acc1"]),
        seeds=tuple(result["seed"] for result in results),
        single_last=Spread.of([statistics.fmean(result["acc1"]) for result in results]),
        single_best=Spread.of([statistics.fmean(result["best_acc1"]) for result in results]),
        ensemble_last=Spread.of([result["ensemble_acc1"] for result in results]),
        ensemble_best=Spread.of([result["best_ensemble_acc1"] for result in results]),
        params=one["params_total"],
        macs=one["macs_total"],
        seconds=Spread.of([result["seconds"] for result in results]),
    )


def _networks(run: FinishedRun) -> str:
    """`2 x resnet20`, `resnet20 + wrn_16_1`, or `resnet110, S = 2`."""
    names = [name.strip() for name in run.results["arch"].split(",")]
    count = len(run.results["acc1"])
    if len(names) > 1:
        return f"{len(names)} x {names[0]}" if len(set(names)) == 1 else " + ".join(names)
    return f"{names[0]}, S = {count}" if count > 1 else names[0]


def markdown(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table."""
    lines = [
        "| method | networks | seeds | one network, last | one network, best | ensemble, last | ensemble, best "
        "| parameters | MACs | seconds |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        ensemble = [row.ensemble_last.text(2), row.ensemble_best.text(2)] if row.num_networks > 1 else ["", ""]
        cells = [row.label, row.networks, str(len(row.seeds)), row.single_last.text(2), row.single_best.text(2)]
        cells += [*ensemble, f"{row.params:,}", f"{row.macs:,}", row.seconds.text(0)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def csv_table(rows: Sequence[Row]) -> str:
    """The rows as CSV; the standard deviation of one run is empty."""
    spreads = ("single_last", "single_best", "ensemble_last", "ensemble_best", "seconds")
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    names = [f"{name}_{part}" for name in spreads for part in ("mean", "std")]
    writer.writerow(["method", "networks", "num_networks", "seeds", "params", "macs", *names])
    for row in rows:
        numbers = [value for name in spreads for value in _numbers(getattr(row, name))]
        seeds = " ".join(map(str, row.seeds))
        writer.writerow([row.label, row.networks, row.num_networks, seeds, row.params, row.macs, *numbers])
    return file.getvalue()


def _numbers(spread: Spread) -> tuple[str, str]:
    return f"{spread.mean:.4f}", "" if spread.std is None else f"{spread.std:.4f}"


def plot_comparison(rows: Sequence[Row], path: Path) -> Path:
    """Accuracy against MACs and against time as a PNG; returns `path`. Points of equal MACs stand side by side."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    from record.plots import COLOURS

    figure = Figure(figsize=(13, 5), layout="constrained")
    by_macs, by_time = figure.subplots(1, 2, sharey=True)
    largest = max(row.macs for row in rows) / 1e6
    for number, row in enumerate(rows):
        colour = COLOURS[number % len(COLOURS)]
        kinds = [(row.single_last, row.single_best, row.macs / row.num_networks, "s")]
        if row.num_networks > 1:
            kinds.append((row.ensemble_last, row.ensemble_best, row.macs, "o"))
        for last, best, macs, marker in kinds:
            aside = 0.02 * largest * (number - (len(rows) - 1) / 2)
            for axes, x, spread in ((by_macs, macs / 1e6 + aside, None), (by_time, row.seconds.mean, row.seconds.std)):
                axes.errorbar(x, last.mean, yerr=last.std, xerr=spread, fmt=marker, color=colour, capsize=3)
                axes.plot(x, best.mean, marker=marker, markersize=10, markerfacecolor="none", color=colour)
    by_macs.set(xlabel="million MACs of what is deployed, one image", ylabel="top-1 in %", xlim=(0, None))
    by_time.set(xlabel="seconds of a run", xlim=(0, None))
    for axes in (by_macs, by_time):
        axes.grid(color="#dddddd", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    key = [
        Line2D([], [], color=COLOURS[i % len(COLOURS)], marker="o", linestyle="", label=row.label)
        for i, row in enumerate(rows)
    ]
    key += [
        Line2D([], [], color=GREY, marker=marker, markersize=size, markerfacecolor=face, linestyle="", label=name)
        for name, marker, size, face in (
            ("one network (mean)", "s", 6, GREY),
            ("ensemble", "o", 6, GREY),
            ("best epoch", "o", 10, "none"),
        )
    ]
    legend = figure.legend(handles=key, loc="outside right upper", frameon=False, fontsize=9)
    for text in legend.get_texts():
        text.set_parse_math(False)
    figure.savefig(path, dpi=130)
    return path

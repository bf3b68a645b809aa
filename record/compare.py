"""Finished runs side by side: accuracy, sizes and time per configuration, mean and spread over the seeds.

`python -m utils.compare RUN_DIR ...` is the command line; `script/compare_methods.sh` makes the runs. A comparison at
equal budget is `record.equal_budget`'s.
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from record import tables
from record.runs import FinishedRun, Spread, grouped, networks_of, spread_numbers, spread_text, telling_apart

GREY = "#444444"
TITLES = (
    *("method", "networks", "seeds", "one network, last", "one network, best", "ensemble, last", "ensemble, best"),
    *("NLL", "ECE", "parameters", "MACs", "seconds"),
)
IS_NUMBER = [False, False, *[True] * (len(TITLES) - 2)]
SPREADS = ("single_last", "single_best", "ensemble_last", "ensemble_best", "nll_last", "ece_last", "seconds")


@dataclass(frozen=True)
class Row:
    """One configuration over its seeds, or one run that has not ended; accuracies in percent, None where unknown.

    Attributes:
        label: the method and S, and the flags in which it differs from other rows of the same method and S.
        networks: what was trained, in words; num_networks: how many networks.
        seeds: in ascending order.
        single_last, single_best: mean top-1 over the networks, after the last and the best epoch.
        ensemble_last, ensemble_best: top-1 of the ensemble; one network is its own. The best epoch is the ensemble's.
        nll_last, ece_last: of the ensemble, after the last epoch.
        params, macs: of all networks together, as deployed; macs are multiply-adds of one image.
        seconds: of a whole run, its evaluations included.
        is_finished: whether the run has ended.
    """

    label: str
    networks: str
    num_networks: int
    seeds: tuple[int, ...]
    single_last: Spread | None
    single_best: Spread | None
    ensemble_last: Spread | None
    ensemble_best: Spread | None
    nll_last: Spread | None
    ece_last: Spread | None
    params: int | None
    macs: int | None
    seconds: Spread | None
    is_finished: bool = True


def compare_runs(runs: Sequence[FinishedRun]) -> list[Row]:
    """One row per configuration, in the order in which each was met first; runs of one differ by the seed alone.

    A run that has not ended is a row of its own, behind the others.

    Raises:
        UserError: two runs of one configuration with the same seed.
    """
    groups = grouped([run for run in runs if run.is_finished])
    unfinished = {run.folder.resolve(): run for run in runs if not run.is_finished}
    groups += [[run] for run in unfinished.values()]
    labels = _labels([group[0] for group in groups])
    return [_row(label, group) for label, group in zip(labels, groups, strict=True)]


def _labels(runs: Sequence[FinishedRun]) -> list[str]:
    """The method and S of each, what tells it from others of the same, and how far it is if it has not ended."""
    names = [f"{run.results['method']}, S = {_count(run)}" for run in runs]
    labels = []
    for name, run, own in zip(names, runs, telling_apart(names, runs, ("arch", "split_factor")), strict=True):
        detail = ", ".join(f"{flag} {value}" for flag, value in own.items())
        label = f"{name} ({detail})" if detail else name
        if not run.is_finished:
            label += f" (unfinished: {run.progress})"
        labels.append(label)
    return labels


def _count(run: FinishedRun) -> int:
    """S, also of a run without an evaluation."""
    if "acc1" in run.results:
        return len(run.results["acc1"])
    listed = str(run.settings.get("arch", "")).count(",") + 1
    return listed if listed > 1 else int(run.settings.get("split_factor") or 1)


def _row(label: str, group: Sequence[FinishedRun]) -> Row:
    group = sorted(group, key=lambda run: run.results["seed"] if run.results["seed"] is not None else -1)
    results = [run.results for run in group]
    one = results[0]

    def mean(result: Mapping[str, Any], name: str) -> float | None:
        return statistics.fmean(result[name]) if name in result else None

    return Row(
        label=label,
        networks=networks_of(group[0]),
        num_networks=_count(group[0]),
        seeds=tuple(result["seed"] for result in results if result["seed"] is not None),
        single_last=Spread.of_known([mean(result, "acc1") for result in results]),
        single_best=Spread.of_known([mean(result, "best_acc1") for result in results]),
        ensemble_last=Spread.of_known([result.get("ensemble_acc1") for result in results]),
        ensemble_best=Spread.of_known([result.get("best_ensemble_acc1") for result in results]),
        nll_last=Spread.of_known([run.figures.get("nll_last") for run in group]),
        ece_last=Spread.of_known([run.figures.get("ece_last") for run in group]),
        params=one.get("params_total"),
        macs=one.get("macs_total"),
        seconds=Spread.of_known([result.get("seconds") for result in results]),
        is_finished=group[0].is_finished,
    )


def _cells(rows: Sequence[Row]) -> list[list[str]]:
    return [
        [
            row.label,
            row.networks,
            str(len(row.seeds)),
            spread_text(row.single_last, 2),
            spread_text(row.single_best, 2),
            spread_text(row.ensemble_last, 2),
            spread_text(row.ensemble_best, 2),
            spread_text(row.nll_last, 4),
            spread_text(row.ece_last, 4),
            "" if row.params is None else f"{row.params:,}",
            "" if row.macs is None else f"{row.macs:,}",
            spread_text(row.seconds, 0),
        ]
        for row in rows
    ]


def markdown(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table."""
    return tables.markdown_table(TITLES, IS_NUMBER, [_cells(rows)])


def latex(rows: Sequence[Row]) -> str:
    """The rows as a LaTeX `tabular`."""
    return tables.latex_table(TITLES, IS_NUMBER, [_cells(rows)])


def csv_table(rows: Sequence[Row]) -> str:
    """The rows as CSV; the standard deviation of one run, and what a run does not say, is empty."""
    names = [f"{name}_{part}" for name in SPREADS for part in ("mean", "std")]
    titles = ["method", "networks", "num_networks", "seeds", "params", "macs", *names, "finished"]
    lines = []
    for row in rows:
        numbers = [value for name in SPREADS for value in spread_numbers(getattr(row, name))]
        sizes = ["" if size is None else size for size in (row.params, row.macs)]
        seeds = " ".join(map(str, row.seeds))
        lines.append([row.label, row.networks, row.num_networks, seeds, *sizes, *numbers, int(row.is_finished)])
    return tables.csv_table(titles, lines)


def plot_comparison(rows: Sequence[Row], path: Path) -> Path:
    """Accuracy against MACs and against time as a PNG; returns `path`. Every point stands at its true place.

    Rows without accuracy are left out; a panel leaves out those without its other figure.
    """
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    from record.plots import COLOURS

    figure = Figure(figsize=(11, 5.6), layout="constrained")
    by_macs, by_time = figure.subplots(1, 2, sharey=True)
    for number, row in enumerate(rows):
        colour = COLOURS[number % len(COLOURS)]
        kinds = [(row.single_last, row.single_best, row.num_networks, "s")] if row.num_networks > 1 else []
        kinds.append((row.ensemble_last, row.ensemble_best, 1, "o"))
        for last, best, parts, marker in kinds:
            macs = None if row.macs is None else Spread(row.macs / parts / 1e6, None)
            for axes, x in ((by_macs, macs), (by_time, row.seconds)):
                if x is None or last is None or best is None:
                    continue
                axes.errorbar(x.mean, last.mean, yerr=last.std, xerr=x.std, fmt=marker, color=colour, capsize=3)
                axes.plot(x.mean, best.mean, marker=marker, markersize=10, markerfacecolor="none", color=colour)
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
            ("one network of several (mean)", "s", 6, GREY),
            ("ensemble, or the one network", "o", 6, GREY),
            ("best epoch", "o", 10, "none"),
        )
    ]
    legend = figure.legend(handles=key, loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    for text in legend.get_texts():
        text.set_parse_math(False)
    figure.savefig(path, dpi=130)
    return path

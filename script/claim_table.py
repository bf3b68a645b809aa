"""Prints what runs of several S and seeds reached as one table, and draws it: OUT_DIR RUN_DIR ...

Every figure is the mean over seeds ± the sample standard deviation; single networks are first averaged within a run.
A second table has the differences to the setting of the first run, paired by seed, with 95 % intervals.
"""

import json
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from record.paired import PairedDifference, half_interval
from record.runs import Spread
from utils.text import fit_streams

FIGURES = (("acc1", "top-1 %", 2), ("nll", "NLL", 3), ("ece", "ECE", 4))


@dataclass(frozen=True)
class Run:
    """A finished run: results.json of its training, and that of its evaluation at the last epoch."""

    folder: Path
    training: dict[str, Any]
    evaluation: dict[str, Any]

    @property
    def split_factor(self) -> int:
        return int(self.training["split_factor"])

    def ensemble(self, figure: str) -> float:
        """A figure of the ensemble under the reported rule."""
        return float(self.evaluation[f"ensemble_{figure}"])

    def single(self, figure: str) -> float:
        """A figure of one network, averaged over the run's networks."""
        return statistics.fmean(network[figure] for network in self.evaluation["networks"])


def read_run(folder: Path) -> Run:
    """Both results of a run directory.

    Raises:
        FileNotFoundError: the run is not complete.
    """
    training, evaluation = (
        json.loads((folder / part / "results.json").read_text(encoding="utf-8")) for part in ("", "eval")
    )
    return Run(folder, training, evaluation)


def spread(values: Sequence[float], digits: int) -> str:
    """Mean ± sample standard deviation."""
    return Spread.of(values).text(digits)


def by_setting(runs: Sequence[Run]) -> list[list[Run]]:
    """Runs that differ in the seed alone, in the order in which each setting was met first."""
    groups: dict[tuple[int, str, str], list[Run]] = {}
    for run in runs:
        groups.setdefault((run.split_factor, run.training["method"], run.training["arch"]), []).append(run)
    return list(groups.values())


def name_of(group: Sequence[Run], first: Run) -> str:
    """What a setting is, in words, where `first` is of the table's first setting."""
    run = group[0]
    name = f"ensemble of {run.split_factor}" if run.split_factor > 1 else "undivided"
    apart = ", without co-training" if run.training["method"] == "independent" else ""
    return name + apart + f", {run.training['arch']}" * (run.training["arch"] != first.training["arch"])


def table(runs: Sequence[Run]) -> str:
    """Two rows for each setting with S > 1: its ensemble and its single networks; one for S = 1."""
    titles = [f"{title}" for _, title, _ in FIGURES]
    lines = [
        f"| S | | {' | '.join(titles)} | disagree % | parameters | MACs | training min | seeds |",
        f"| ---: | --- | {'---: | ' * len(FIGURES)}---: | ---: | ---: | ---: | ---: |",
    ]
    for group in by_setting(runs):
        one, split_factor = group[0].training, group[0].split_factor
        several = split_factor > 1
        kinds: list[tuple[str, Callable[[Run, str], float], int]] = [
            (name_of(group, runs[0]), Run.ensemble, split_factor)
        ]
        if several:
            kinds.append(("its single networks", Run.single, 1))
        for name, figure_of, count in kinds:
            cells = [spread([figure_of(run, figure) for run in group], digits) for figure, _, digits in FIGURES]
            whole = count == split_factor
            apart = spread([100 * run.evaluation["disagreement"] for run in group], 1) if several and whole else ""
            minutes = spread([run.training["seconds"] / 60 for run in group], 1) if whole else ""
            params = f"{one['params_one'] * count:,}"
            macs = f"{one['macs_total'] * count / split_factor / 1e6:.1f} M"
            cells += [apart, params, macs, minutes, str(len(group))]
            lines.append(f"| {split_factor} | {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def differences(runs: Sequence[Run]) -> str:
    """A row for every setting but the first: its ensemble's figures minus the first's; "" where there is one setting.

    Where the interval of the accuracies holds 0, or there is none, the row says that no difference is seen.
    """
    first, *others = by_setting(runs)
    if not others:
        return ""
    titles = [title.replace("top-1 %", "top-1, points") for _, title, _ in FIGURES]
    sizes = "parameters | MACs"
    lines = [
        f"| minus {name_of(first, runs[0])} | {' | '.join(titles)} | {sizes} | pairs | |",
        f"| --- | {'---: | ' * len(FIGURES)}---: | ---: | ---: | --- |",
    ]
    for group in others:
        found = [(_paired(group, first, figure), digits) for figure, _, digits in FIGURES]
        cells = [difference.text(digits) if difference else "" for difference, digits in found]
        cells += [
            f"{group[0].training[size] / first[0].training[size] - 1:+.1%}".replace("%", " %")
            for size in ("params_total", "macs_total")
        ]
        accuracy = found[0][0]
        cells.append(str(accuracy.pairs if accuracy else 0))
        cells.append("" if accuracy and accuracy.is_seen else "no difference seen")
        lines.append(f"| {name_of(group, runs[0])} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _paired(group: Sequence[Run], reference: Sequence[Run], figure: str) -> PairedDifference | None:
    values, others = ({run.training["seed"]: run.ensemble(figure) for run in part} for part in (group, reference))
    return PairedDifference.of(values, others)


def plot(runs: Sequence[Run], path: Path) -> Path:
    """Top-1, NLL and ECE of every setting: runs as dots, means with their 95 % intervals; returns `path`."""
    from matplotlib.figure import Figure

    groups = by_setting(runs)
    labels = [f"S = {group[0].split_factor}" + _second_line(group, runs[0]) for group in groups]
    figure = Figure(figsize=(12, 4.2), layout="constrained")
    for axes, (name, title, _) in zip(figure.subplots(1, len(FIGURES)), FIGURES, strict=True):
        kinds: list[tuple[str, str, float, Callable[[Run, str], float]]] = [
            ("ensemble", "#1f5fa8", -0.09, Run.ensemble),
            ("single networks (mean)", "#d1571b", 0.09, Run.single),
        ]
        for label, colour, shift, figure_of in kinds:
            values = [[figure_of(run, name) for run in group] for group in groups]
            places = [i + shift for i in range(len(groups))]
            for place, found in zip(places, values, strict=True):
                axes.plot([place] * len(found), found, "o", color=colour, alpha=0.3, markersize=4)
            means = [statistics.fmean(found) for found in values]
            halves = [half_interval(statistics.stdev(v), len(v)) if len(v) > 1 else 0.0 for v in values]
            axes.errorbar(places, means, halves, color=colour, linewidth=2, capsize=4, label=label)
        axes.set(title=title)
        axes.set_xticks(range(len(groups)), labels, fontsize=9)
        axes.grid(color="#dddddd", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    figure.savefig(path, dpi=120)
    return path


def _second_line(group: Sequence[Run], first: Run) -> str:
    run = group[0]
    words = ["independent"] * (run.training["method"] == "independent")
    words += [run.training["arch"]] * (run.training["arch"] != first.training["arch"])
    return "\n" * bool(words) + ", ".join(words)


def main(arguments: list[str]) -> int:
    """The command line; returns the exit code."""
    fit_streams()
    out, *folders = map(Path, arguments)
    runs = [read_run(folder) for folder in folders]
    text = "\n\n".join(filter(None, (table(runs), differences(runs))))
    (out / "claim.md").write_text(text + "\n", encoding="utf-8")
    print(f"{text}\n\nPicture: {plot(runs, out / 'claim.png')}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))

"""Prints what runs of several S and seeds reached as one table, and draws it: OUT_DIR RUN_DIR ...

Every figure is the mean over seeds ± the sample standard deviation; single networks are first averaged within a run.
"""

import json
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
    mean = f"{statistics.fmean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def by_split_factor(runs: Sequence[Run]) -> dict[int, list[Run]]:
    """Runs of each S, in ascending order of S."""
    return {s: [run for run in runs if run.split_factor == s] for s in sorted({run.split_factor for run in runs})}


def table(runs: Sequence[Run]) -> str:
    """Two rows for each S > 1: its ensemble and its single networks; one for S = 1."""
    titles = [f"{title}" for _, title, _ in FIGURES]
    lines = [
        f"| S | | {' | '.join(titles)} | disagree % | parameters | MACs | training min | seeds |",
        f"| ---: | --- | {'---: | ' * len(FIGURES)}---: | ---: | ---: | ---: | ---: |",
    ]
    for split_factor, group in by_split_factor(runs).items():
        one = group[0].training
        several = split_factor > 1
        kinds: list[tuple[str, Callable[[Run, str], float], int]] = [
            (f"ensemble of {split_factor}" if several else "undivided", Run.ensemble, split_factor)
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


def plot(runs: Sequence[Run], path: Path) -> Path:
    """Top-1, NLL and ECE against S: every run as a dot, means as lines; returns `path`."""
    from matplotlib.figure import Figure

    groups = by_split_factor(runs)
    figure = Figure(figsize=(12, 4), layout="constrained")
    for axes, (name, title, _) in zip(figure.subplots(1, len(FIGURES)), FIGURES, strict=True):
        kinds: list[tuple[str, str, Callable[[Run, str], float]]] = [
            ("ensemble", "#1f5fa8", Run.ensemble),
            ("single networks (mean)", "#d1571b", Run.single),
        ]
        for label, colour, figure_of in kinds:
            points = [(str(s), figure_of(run, name)) for s, group in groups.items() for run in group]
            axes.plot(*zip(*points, strict=True), "o", color=colour, alpha=0.5, markersize=5)
            means = [statistics.fmean(figure_of(run, name) for run in group) for group in groups.values()]
            axes.plot([str(s) for s in groups], means, color=colour, linewidth=2, label=label)
        axes.set(title=title, xlabel="S")
        axes.grid(color="#dddddd", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=9)
    figure.savefig(path, dpi=120)
    return path


def main(arguments: list[str]) -> int:
    """The command line; returns the exit code."""
    fit_streams()
    out, *folders = map(Path, arguments)
    runs = [read_run(folder) for folder in folders]
    text = table(runs)
    (out / "claim.md").write_text(text + "\n", encoding="utf-8")
    print(f"{text}\n\nPicture: {plot(runs, out / 'claim.png')}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))

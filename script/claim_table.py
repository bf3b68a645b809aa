"""Prints what runs of several S and seeds reached as one table, and draws it: OUT_DIR [RUNS.csv ...] RUN ...

A RUN is a run directory, or `S,METHOD,ARCH,SEED` for a row of the files.

Every figure is the mean over seeds ± the sample standard deviation; single networks are first averaged within a run.
A second table has the differences to the setting of the first run, paired by seed, with 95 % intervals. claim.csv has
every run of the table, for one that goes on elsewhere.
"""

import csv
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Any

from record.checkpoint import write_file
from record.paired import PairedDifference, half_interval
from record.runs import Spread
from record.tables import csv_table
from utils.errors import UserError
from utils.text import fit_streams

FIGURES = (("acc1", "top-1 %", 2), ("nll", "NLL", 3), ("ece", "ECE", 4))


@dataclass(frozen=True, kw_only=True)
class Run:
    """A finished run: what its training says of itself, and its figures at the last epoch; a row of claim.csv.

    Attributes:
        split_factor, method, arch, seed: which run of the comparison it is; claim.sh looks for rows that begin so.
        steps: of training.
        seconds: of training, evaluations included.
        params_one, params_total, macs_total: of one network, and of all.
        ensemble_acc1, ensemble_nll, ensemble_ece: of the ensemble under the reported rule.
        single_acc1, single_nll, single_ece: of one network, averaged over the run's networks.
        disagreement: part of images, mean over pairs of networks; None for one network.
    """

    split_factor: int
    method: str
    arch: str
    seed: int
    steps: int
    seconds: float
    params_one: int
    params_total: int
    macs_total: int
    ensemble_acc1: float
    ensemble_nll: float
    ensemble_ece: float
    single_acc1: float
    single_nll: float
    single_ece: float
    disagreement: float | None

    @property
    def key(self) -> str:
        """What no two runs of a table share."""
        return f"{self.split_factor},{self.method},{self.arch},{self.seed}"

    def ensemble(self, figure: str) -> float:
        """A figure of the ensemble under the reported rule."""
        return float(getattr(self, f"ensemble_{figure}"))

    def single(self, figure: str) -> float:
        """A figure of one network, averaged over the run's networks."""
        return float(getattr(self, f"single_{figure}"))


def read_run(folder: Path) -> Run:
    """The results of a run directory's training and of its evaluation.

    Raises:
        FileNotFoundError: the run is not complete.
    """
    training, evaluation = (
        json.loads((folder / part / "results.json").read_text(encoding="utf-8")) for part in ("", "eval")
    )
    names = ("split_factor", "method", "arch", "seed", "steps", "seconds", "params_one", "params_total", "macs_total")
    values: dict[str, Any] = {name: training[name] for name in names}
    for figure, *_ in FIGURES:
        values[f"ensemble_{figure}"] = evaluation[f"ensemble_{figure}"]
        values[f"single_{figure}"] = statistics.fmean(network[figure] for network in evaluation["networks"])
    return Run(**values, disagreement=evaluation["disagreement"] if values["split_factor"] > 1 else None)


def read_rows(path: Path) -> list[Run]:
    """The runs of a claim.csv.

    Raises:
        UserError: it cannot be read, or is none.
    """
    kinds = {field.name: field.type for field in fields(Run)}
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = [*csv.DictReader(file, strict=True)]
        return [
            Run(**{name: _value(row[name], kind) for name, kind in kinds.items()})  # type: ignore[arg-type]
            for row in rows
        ]
    except (OSError, KeyError, ValueError, TypeError, csv.Error) as error:
        raise UserError(f"--runs {path}: expected a claim.csv of script/claim.sh ({error!r}).") from None


def _value(text: str, kind: object) -> object:
    if kind is str:
        return text
    if kind is int:
        return int(text)
    return None if kind is not float and not text else float(text)


def rows_of(runs: Sequence[Run]) -> str:
    """claim.csv: every figure in full."""
    return csv_table([field.name for field in fields(Run)], map(astuple, runs))


def gather(named: Sequence[str]) -> list[Run]:
    """The runs of the command line, in its order.

    Args:
        named: files of rows, then run directories and keys of rows.

    Raises:
        UserError: a file that holds no runs; runs that were trained for different numbers of steps.
    """
    files = [Path(name) for name in named if name.endswith(".csv")]
    rows = {run.key: run for file in files for run in read_rows(file)}
    runs = [rows.get(name) or read_run(Path(name)) for name in named[len(files) :]]
    for run in runs:
        if run.steps != runs[0].steps:
            raise UserError(
                f"--runs: a run of {run.steps} steps ({run.key}) beside one of {runs[0].steps} ({runs[0].key}): these "
                "compare nothing."
            )
    return runs


def spread(values: Sequence[float], digits: int) -> str:
    """Mean ± sample standard deviation."""
    return Spread.of(values).text(digits)


def by_setting(runs: Sequence[Run]) -> list[list[Run]]:
    """Runs that differ in the seed alone, in the order in which each setting was met first."""
    groups: dict[tuple[int, str, str], list[Run]] = {}
    for run in runs:
        groups.setdefault((run.split_factor, run.method, run.arch), []).append(run)
    return list(groups.values())


def name_of(group: Sequence[Run], first: Run) -> str:
    """What a setting is, in words, where `first` is of the table's first setting."""
    run = group[0]
    name = f"ensemble of {run.split_factor}" if run.split_factor > 1 else "undivided"
    apart = ", without co-training" if run.method == "independent" else ""
    return name + apart + f", {run.arch}" * (run.arch != first.arch)


def table(runs: Sequence[Run]) -> str:
    """Two rows for each setting with S > 1: its ensemble and its single networks; one for S = 1."""
    titles = [f"{title}" for _, title, _ in FIGURES]
    lines = [
        f"| S | | {' | '.join(titles)} | disagree % | parameters | MACs | training min | seeds |",
        f"| ---: | --- | {'---: | ' * len(FIGURES)}---: | ---: | ---: | ---: | ---: |",
    ]
    for group in by_setting(runs):
        one, split_factor = group[0], group[0].split_factor
        several = split_factor > 1
        kinds: list[tuple[str, Callable[[Run, str], float], int]] = [
            (name_of(group, runs[0]), Run.ensemble, split_factor)
        ]
        if several:
            kinds.append(("its single networks", Run.single, 1))
        for name, figure_of, count in kinds:
            cells = [spread([figure_of(run, figure) for run in group], digits) for figure, _, digits in FIGURES]
            whole = count == split_factor
            apart = spread([100 * (run.disagreement or 0.0) for run in group], 1) if several and whole else ""
            minutes = spread([run.seconds / 60 for run in group], 1) if whole else ""
            params = f"{one.params_one * count:,}"
            macs = f"{one.macs_total * count / split_factor / 1e6:.1f} M"
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
            f"{getattr(group[0], size) / getattr(first[0], size) - 1:+.1%}".replace("%", " %")
            for size in ("params_total", "macs_total")
        ]
        accuracy = found[0][0]
        cells.append(str(accuracy.pairs if accuracy else 0))
        cells.append("" if accuracy and accuracy.is_seen else "no difference seen")
        lines.append(f"| {name_of(group, runs[0])} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _paired(group: Sequence[Run], reference: Sequence[Run], figure: str) -> PairedDifference | None:
    values, others = ({run.seed: run.ensemble(figure) for run in part} for part in (group, reference))
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
    words = ["independent"] * (run.method == "independent")
    words += [run.arch] * (run.arch != first.arch)
    return "\n" * bool(words) + ", ".join(words)


def main(arguments: list[str]) -> int:
    """The command line; returns the exit code."""
    fit_streams()
    out, named = Path(arguments[0]), arguments[1:]
    try:
        runs = gather(named)
    except UserError as error:
        print(f"claim_table.py: {error}", file=sys.stderr)
        return error.exit_code
    text = "\n\n".join(filter(None, (table(runs), differences(runs))))
    write_file(out / "claim.csv", rows_of(runs))
    write_file(out / "claim.md", f"{text}\n")
    print(f"{text}\n\nPicture: {plot(runs, out / 'claim.png')}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))

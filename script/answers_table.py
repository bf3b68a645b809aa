"""What the runs of script/answers.sh in OUT_DIR reached of the goals A1 to A8: goals.md, goals.json, a picture a set.

A goal is met by the mean over seeds. Everything was tuned on held-out images only; figures are of the test images.
"""

import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from evaluation.files import written
from evaluation.options import CONFIDENCES
from record.checkpoint import write_file
from record.plots import COLOURS
from record.run_folder import as_json, read_results
from record.runs import Spread
from script.answers_times import threshold_text
from utils.errors import UserError
from utils.text import fit_streams

HALF = "half"  # folder of the cascade that was tuned for half of the undivided network's MACs
LEAST_SEEDS = 3
TRAINED = 70.0  # percent, of every network of A2
NAMES = {
    "digits": "digits, resnet20, S = 4",
    "cifar": "CIFAR-10, resnet20, S = 2",
    "small": "CIFAR-10 at 16 x 16, WRN-16-4, S = 4",
}


@dataclass(frozen=True, kw_only=True)
class Seed:
    """One seed of one set, as far as it has come.

    Attributes:
        rows: of the cascade that was tuned by each confidence, as results.json has them; and, under HALF, of one that
            was tuned for half of the undivided network's MACs, where there is one.
        networks: top-1 of every network in percent.
        dominates: whether a cascade of the test curve dominates the undivided network.
        window: results.json of the window, None where it has none yet.
        times: times.json, the same.
        student, plain: top-1 of the distilled student and of its network without a teacher, the same.
    """

    seed: int
    rows: Mapping[str, Sequence[Mapping[str, Any]]]
    networks: Sequence[float]
    dominates: bool
    window: Mapping[str, Any] | None
    times: Mapping[str, Any] | None
    student: float | None
    plain: float | None

    @classmethod
    def read(cls, folder: Path) -> "Seed | None":
        """None where nothing was tuned yet."""
        tuned = {name: read_results(folder / name) or {} for name in (*CONFIDENCES, HALF)}
        tuned = {name: found for name, found in tuned.items() if found.get("cascade")}
        if not tuned.keys() >= {*CONFIDENCES}:
            return None
        margin = tuned["margin"]
        evaluated = {name: read_results(folder / "distill" / f"eval_{name}") or {} for name in ("student", "plain")}
        return cls(
            seed=int(folder.name.rpartition("seed")[2]),
            rows={name: found["cascade"]["rows"] for name, found in tuned.items()},
            networks=[row["acc1"] for row in margin["networks"]],
            dominates=margin["cascade"]["dominates_undivided"] is not None,
            window=read_results(folder / "window"),
            times=read_results(folder, "times.json"),
            student=evaluated["student"].get("ensemble_acc1"),
            plain=evaluated["plain"].get("ensemble_acc1"),
        )

    def row(self, kind: str, confidence: str = "margin") -> Mapping[str, Any]:
        """The row of a kind; of cascades the chosen one."""
        rows = self.rows[confidence]
        return next(row for row in rows if row["kind"] == kind and (kind != "cascade" or row["chosen"]))

    def milliseconds(self, name: str, batch_size: int, figure: str) -> float | None:
        """The shortest time of what has this name, over its strategies."""
        if self.times is None:
            return None
        found = [row[figure] for row in self.times["rows"] if (row["name"], row["batch_size"]) == (name, batch_size)]
        return min(found, default=None)

    def lost(self, confidence: str = "margin") -> float:
        """Points that the full ensemble is above the cascade."""
        return float(self.row("ensemble", confidence)["test_acc1"] - self.row("cascade", confidence)["test_acc1"])

    def above_undivided(self, tuned: str = "margin") -> float | None:
        """Points that the cascade is above the undivided network."""
        if tuned not in self.rows:
            return None
        return float(self.row("cascade", tuned)["test_acc1"] - self.row("undivided", tuned)["test_acc1"])

    def of_undivided(self, tuned: str = "margin") -> float | None:
        """MACs of the cascade by those of the undivided network."""
        if tuned not in self.rows:
            return None
        return float(self.row("cascade", tuned)["test_macs"] / self.row("undivided", tuned)["test_macs"])

    def of_ensemble(self) -> float:
        """MACs of the cascade by those of the full ensemble."""
        return float(self.row("cascade")["macs_share"])

    def time_ratio(self, batch_size: int, figure: str) -> float | None:
        """Time of the cascade by that of the undivided network."""
        chosen = threshold_text(self.row("cascade")["thresholds"])
        times = [self.milliseconds(name, batch_size, figure) for name in (chosen, "undivided")]
        return None if times[0] is None or times[1] is None else times[0] / times[1]

    def onnx_ratio(self) -> float | None:
        """Mean time of the cascade by that of the full ensemble, both in onnxruntime at batch 1."""
        times = {row["name"]: row["mean_ms"] for row in (self.times or {}).get("onnxruntime", [])}
        return times["cascade"] / times["ensemble"] if times else None

    def window_lost(self) -> float | None:
        """Coverage at 5 % risk of the full ensemble minus that of the window."""
        if self.window is None or "uncertainty" not in self.window:
            return None
        selective = self.window["uncertainty"]["selective"]
        coverage = [selective[who]["max_prob"]["coverage_at_risk"] for who in ("ensemble", "cascade")]
        return float(coverage[0] - coverage[1])

    def window_share(self) -> float | None:
        """MACs of the window by those of the full ensemble."""
        if self.window is None or "cascade" not in self.window:
            return None
        return float(next(row["macs_share"] for row in self.window["cascade"]["rows"] if row["chosen"]))

    def student_gain(self) -> float | None:
        """Points that the student is above the same network without a teacher."""
        return None if self.student is None or self.plain is None else self.student - self.plain


@dataclass(frozen=True, kw_only=True)
class Condition:
    """A part of a goal.

    Attributes:
        goal: its name. on: name of the set.
        what: is measured.
        values: of the seeds, where known.
        commit, stretch: bounds of the mean.
        at_least: whether the mean must be at or above them, instead of at or below.
    """

    goal: str
    on: str
    what: str
    commit: float
    stretch: float
    at_least: bool = False
    values: Sequence[float] = field(default_factory=list)

    @property
    def mean(self) -> float | None:
        return statistics.fmean(self.values) if self.values else None

    def reaches(self, bound: float) -> bool:
        """Whether the mean is within a bound."""
        if self.mean is None:
            return False
        return self.mean >= bound - 1e-9 if self.at_least else self.mean <= bound + 1e-9

    @property
    def reached(self) -> str:
        """In words."""
        if not self.values:
            return "not measured"
        found = "stretch" if self.reaches(self.stretch) else "yes" if self.reaches(self.commit) else "no"
        return found if len(self.values) >= LEAST_SEEDS else f"{found} ({len(self.values)} of {LEAST_SEEDS} seeds)"

    def as_dict(self) -> dict[str, Any]:
        """Plain data for goals.json."""
        return {**vars(self), "values": list(self.values), "mean": self.mean, "reached": self.reached}


def conditions(sets: Mapping[str, Sequence[Seed]]) -> list[Condition]:
    """Every goal in its parts, with what was measured."""
    found: list[Condition] = []

    def add(
        goal: str,
        name: str,
        what: str,
        value: Callable[[Seed], float | None],
        bounds: tuple[float, float],
        at_least: bool = False,
    ) -> None:
        values = [value(seed) for seed in sets.get(name, [])]
        known = [one for one in values if one is not None]
        commit, stretch = bounds
        found.append(
            Condition(
                goal=goal,
                on=name,
                what=what,
                values=known,
                commit=commit,
                stretch=stretch,
                at_least=at_least,
            )
        )

    lost, macs = "points below the full ensemble", "MACs / "
    add("A1", "digits", lost, Seed.lost, (0.25, 0.25))
    add("A1", "digits", f"{macs}undivided's", Seed.of_undivided, (0.40, 0.30))
    add("A2", "cifar", "top-1 % of the worst network", lambda seed: min(seed.networks), (TRAINED, TRAINED), True)
    add("A2", "cifar", lost, Seed.lost, (0.3, 0.3))
    add("A2", "cifar", f"{macs}ensemble's", Seed.of_ensemble, (0.75, 0.60))
    for name in ("digits", "cifar"):
        bounds = (1.0, 1.0) if name == "digits" else (0.0, 1.0)  # on CIFAR-10 it is the stretch
        add("A3", name, "share of seeds with a cascade that dominates the undivided network", _dominates, bounds, True)
        add("A4", name, "mean ms at batch 1 / undivided's", lambda seed: seed.time_ratio(1, "mean_ms"), (1.05, 0.7))
        add("A4", name, "p50 ms at batch 128 / undivided's", lambda seed: seed.time_ratio(128, "p50_ms"), (0.95, 0.7))
        bounds = (0.6, 0.45) if name == "digits" else (0.9, 0.75)
        add("A5", name, "mean ms / full ensemble's, onnxruntime, batch 1", Seed.onnx_ratio, bounds)
    add("A6", "cifar", "coverage at 5 % risk below the full ensemble's", Seed.window_lost, (0.01, 0.01))
    add("A6", "cifar", f"{macs}ensemble's, window", Seed.window_share, (0.75, 0.60))
    for name in ("digits", "cifar"):
        add("A7", name, "points, student above the same network without a teacher", Seed.student_gain, (0, 0.5), True)
    for tuned, of_what in (("margin", ""), (HALF, ", tuned for half of its MACs")):
        above, share = partial(Seed.above_undivided, tuned=tuned), partial(Seed.of_undivided, tuned=tuned)
        add("A8", "small", f"points above the undivided network{of_what}", above, (1.5, 2.5), True)
        add("A8", "small", f"{macs}undivided's{of_what}", share, (0.50, 0.40))
    return sorted(found, key=lambda one: one.goal)


def _dominates(seed: Seed) -> float:
    return float(seed.dominates)


def spread(values: Sequence[float]) -> str:
    """Mean ± sample standard deviation."""
    return Spread.of(values).text(3) if values else "–"


def goals_table(found: Sequence[Condition]) -> str:
    """All conditions as a Markdown table."""
    lines = ["| goal | on | | measured | seeds | commit | stretch | reached |", "|---|---|---|---:|---:|---:|---:|---|"]
    for one in found:
        sign = "≥" if one.at_least else "≤"
        lines.append(
            f"| {one.goal} | {one.on} | {one.what} | {spread(one.values)} | {len(one.values)} | "
            f"{sign} {one.commit:g} | {sign} {one.stretch:g} | {one.reached} |"
        )
    return "\n".join(lines)


def set_table(name: str, seeds: Sequence[Seed]) -> str:
    """Accuracy, MACs and time of everything in one set, and of the cascades by each confidence."""
    lines = [
        f"{NAMES[name]}; seeds {', '.join(str(seed.seed) for seed in seeds)}",
        "",
        "| | top-1 % | average million MACs | mean ms, batch 1 | lost / won |",
        "|---|---:|---:|---:|---:|",
    ]
    for kind, label in (("undivided", "undivided network"), ("ensemble", "full ensemble")):
        rows = [seed.row(kind) for seed in seeds]
        lines.append(_line(label, rows, [seed.milliseconds(kind, 1, "mean_ms") for seed in seeds]))
    for confidence in CONFIDENCES:
        rows = [seed.row("cascade", confidence) for seed in seeds]
        times: list[float | None] = [None] * len(seeds)
        if confidence == "margin":
            times = [
                seed.milliseconds(threshold_text(row["thresholds"]), 1, "mean_ms")
                for seed, row in zip(seeds, rows, strict=True)
            ]
        lines.append(_line(f"cascade by {confidence}", rows, times))
    if all(HALF in seed.rows for seed in seeds):
        rows = [seed.row("cascade", HALF) for seed in seeds]
        lines.append(_line("cascade by margin, for half of the undivided network's MACs", rows, []))
    return "\n".join(lines)


def _line(label: str, rows: Sequence[Mapping[str, Any]], times: Sequence[float | None]) -> str:
    lost, won = (sum(row[key] for row in rows) for key in ("lost", "won"))
    cells = [
        spread([row["test_acc1"] for row in rows]),
        spread([row["test_macs"] / 1e6 for row in rows]),
        spread([time for time in times if time is not None]),
        f"{lost} / {won}",
    ]
    return f"| {label} | {' | '.join(cells)} |"


# ---- picture ---------------------------------------------------------------------------------------------------------

LOOKS = {
    "network": ("o", COLOURS[4], "one network"),
    "ensemble": ("D", COLOURS[2], "full ensemble"),
    "undivided": ("*", COLOURS[1], "undivided network"),
}


def plot(name: str, seeds: Sequence[Seed], path: Path) -> Path:
    """Top-1 against average MACs, and against the mean time of an image: every seed, and means; returns `path`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11.5, 4.8), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for axes, place in ((left, _macs), (right, _mean_ms)):
        for seed in seeds:
            curve = _points([(seed, row) for row in seed.rows["margin"] if row["kind"] == "cascade"], place)
            if curve:
                xs, ys = zip(*sorted(curve), strict=True)
                axes.plot(xs, ys, ".-", color=COLOURS[0], alpha=0.35, linewidth=1)
        for kind, (marker, colour, label) in LOOKS.items():
            rows = [(seed, row) for seed in seeds for row in seed.rows["margin"] if row["kind"] == kind]
            _mark(axes, _points(rows, place), marker, colour, label, 15 if kind == "undivided" else 8)
        rows = [(seed, seed.row("cascade")) for seed in seeds]
        _mark(axes, _points(rows, place), "s", COLOURS[0], "cascade, chosen on held-out images; its curve", 9)
        axes.set_xlim(left=0)
        axes.grid(color="#dddddd", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    left.set(xlabel="average million MACs of an image", ylabel="top-1 in %")
    right.set(xlabel="measured mean ms of an image, batch 1")
    figure.suptitle(f"{NAMES[name]}: every seed of {len(seeds)} pale, their means full")
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    figure.savefig(path, dpi=120)
    return path


def _points(
    rows: Sequence[tuple[Seed, Mapping[str, Any]]], place: Callable[[Seed, Mapping[str, Any]], float | None]
) -> list[tuple[float, float]]:
    found = [(place(seed, row), float(row["test_acc1"])) for seed, row in rows]
    return [(x, y) for x, y in found if x is not None]


def _macs(seed: Seed, row: Mapping[str, Any]) -> float | None:
    del seed
    return float(row["test_macs"]) / 1e6


def _mean_ms(seed: Seed, row: Mapping[str, Any]) -> float | None:
    name = row["kind"]
    if name == "network":
        name = f"network {row['networks'][0]}"
    elif name == "cascade":
        name = threshold_text(row["thresholds"])
    return seed.milliseconds(name, 1, "mean_ms")


def _mark(axes: Any, points: Sequence[tuple[float, float]], marker: str, colour: str, label: str, size: float) -> None:
    if not points:
        return
    xs, ys = zip(*points, strict=True)
    axes.plot(xs, ys, marker, color=colour, alpha=0.3, markersize=size * 0.6, linestyle="")
    axes.plot(
        [statistics.fmean(xs)], [statistics.fmean(ys)], marker, color=colour, markersize=size, linestyle="", label=label
    )


def read_sets(out: Path) -> dict[str, list[Seed]]:
    """Every set of which a seed has come far enough.

    Raises:
        UserError: none has.
    """
    found = {}
    for name in NAMES:
        folders = sorted(out.glob(f"{name}-seed*"), key=lambda path: int(path.name.rpartition("seed")[2]))
        seeds = [seed for folder in folders if (seed := Seed.read(folder)) is not None]
        if seeds:
            found[name] = seeds
    if not found:
        raise UserError(f"{out}: nothing was tuned there yet: start script/answers.sh.")
    return found


def main(arguments: Sequence[str]) -> int:
    """The command line; returns the exit code."""
    fit_streams()
    out = Path(arguments[0])
    try:
        sets = read_sets(out)
        found = conditions(sets)
        text = "\n\n".join([goals_table(found), *(set_table(name, seeds) for name, seeds in sets.items())])
        conditions_of_times = {
            name: {key: value for key, value in (seeds[-1].times or {}).items() if key not in ("rows", "onnxruntime")}
            for name, seeds in sets.items()
        }
        contents = {"goals": [one.as_dict() for one in found], "timed": conditions_of_times}
        write_file(out / "goals.md", text + "\n")
        write_file(out / "goals.json", as_json(contents))
        for name, seeds in sets.items():
            with written(out / f"{name}.png") as path:
                plot(name, seeds, path)
        print(text)
    except UserError as error:
        print(f"answers_table: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))

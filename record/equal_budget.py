"""Ways to spend one budget side by side: what each costs of the undivided network, and what it reaches over the seeds.

`python -m utils.compare --budget equal RUN_DIR ...` is the command line; `script/compare_methods.sh --budget equal`
makes the runs. Nothing is sorted by accuracy and no winner is named. Ours.
"""

import re
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from record import tables
from record.paired import PairedDifference
from record.run_folder import read_results
from record.runs import FinishedRun, Spread, compared, flag_values, grouped, short, spread_numbers, telling_apart
from utils.errors import UserError

TOLERANCE = 0.02  # parts of a budget by which an equal row may differ
BUDGETS = ("both", "params", "macs")
TRAININGS = ("epochs", "macs")
# flags in which the runs of a comparison must agree
DATA = ("dataset", "data", "val_fraction", "test_fraction", "crop_size")
# flags by which rows of one method and count are made, not what tells them apart
NOT_NAMED = {"arch", "split_factor", "num_members", "stage_widths", "teacher", "epochs"}
FIGURES = {  # name -> digits; None: significant ones
    "acc1_last": 2,
    "acc1_best": 2,
    "member_acc1_last": 2,
    "member_acc1_best": 2,
    "nll_last": 4,
    "ece_last": 4,
    "brier_last": 4,
    "disagreement_last": 4,
    "seconds": None,
}
LATENCIES = {"latency_ms_b1": 1, "latency_ms_b128": 128}  # name -> batch size
SIZES = ("params", "params_ratio", "macs", "macs_ratio", "equal")
MARKERS = "osD^vP*X<>"
DELTA = ("delta", "delta_std", "delta_pairs", "delta_low", "delta_high")
COLUMNS = ("method", "members", "networks", *SIZES, *FIGURES, "training_macs_ratio", *LATENCIES, "seeds", "delta")


@dataclass(frozen=True)
class BudgetRow:
    """One entry of a comparison over its seeds; accuracies in percent, None where a run does not say it.

    Attributes:
        entry: what was asked for.
        members: predictions that are averaged. networks: what was trained, in words.
        params, macs: as deployed; macs are multiply-adds of one image.
        params_ratio, macs_ratio: of those of the undivided network.
        is_equal: whether the row is within the budget.
        figures: by the names of FIGURES and LATENCIES.
        training_macs_ratio: multiply-adds of the training, of the first row's.
        seeds: in ascending order.
        delta: `acc1_last` minus that of the first row, paired by seed; None for the first row.
        rule: by which the members are one prediction.
        chosen_on: the images that the best epoch was chosen on; is_held_out: whether others are reported.
        teacher_seconds: of the training of its teacher, which is in no other figure.
    """

    entry: str
    members: int
    networks: str
    params: int
    macs: int
    params_ratio: float
    macs_ratio: float
    is_equal: bool
    figures: Mapping[str, Spread | None]
    training_macs_ratio: float | None
    seeds: tuple[int, ...]
    delta: PairedDifference | None
    rule: str
    chosen_on: str
    is_held_out: bool
    teacher_seconds: Spread | None


def is_within(ratios: tuple[float, float], budget_of: str) -> bool:
    """Whether sizes are equal to the undivided network's: parameters and MACs of its own, or the one that counts."""
    judged = ratios if budget_of == "both" else [ratios[BUDGETS.index(budget_of) - 1]]
    return all(abs(ratio - 1) <= TOLERANCE for ratio in judged)


def budget_rows(
    runs: Sequence[FinishedRun],
    *,
    budget_of: str = "both",
    equal_training: str = "epochs",
    reference: tuple[int, int] | None = None,
    entries: Sequence[str] = (),
) -> list[BudgetRow]:
    """A row for every configuration, in the order in which each was met first.

    Args:
        runs: that have ended.
        budget_of: what an equal row has in common with the undivided network: one of BUDGETS.
        equal_training: one of TRAININGS: whether all have the same epochs, or the same multiply-adds in training.
        reference: parameters and multiply-adds of the undivided network; None: those of its run, which is the first
            of one network that is as --arch names it, or the first of all.
        entries: what the rows are called; none: by method, members and what else differs.

    Raises:
        UserError: runs that cannot be compared, with the flag in which they differ; another number of rows than names.
    """
    if not runs:
        raise UserError("not one of the runs has ended: finish them with --resume auto.")
    groups = grouped(runs, _settings)
    _refuse_others(runs, equal_training)
    if entries and len(entries) != len(groups):
        raise UserError(f"--entries names {len(entries)} rows, and the runs make {len(groups)}.")
    first = groups[0]
    if reference is None:
        results = next((group for group in groups if _is_undivided(group[0])), first)[0].results
        reference = results["params_total"], results["macs_total"]
    rows = [_row(group, first, reference, budget_of) for group in groups]
    names = entries or _names(groups, rows)
    return [replace(row, entry=name) for row, name in zip(rows, names, strict=True)]


def _settings(run: FinishedRun) -> dict[str, Any]:
    """What tells configurations apart; of a teacher that is a run, its settings, because every seed has its own."""
    teacher = run.settings.get("teacher")
    values = flag_values(Path(teacher).parent) if isinstance(teacher, str) else None
    return {**run.settings, "teacher": teacher if values is None else compared(values)}


def _refuse_others(runs: Sequence[FinishedRun], equal_training: str) -> None:
    names = [*DATA, "batch_size", "iters_to_accumulate", *(["epochs"] if equal_training == "epochs" else [])]
    for name in names:
        _refuse_difference([(run.folder, run.settings.get(name)) for run in runs], name)
    _refuse_difference([(run.folder, run.results.get("precision")) for run in runs], "amp_dtype")


def _refuse_difference(values: Sequence[tuple[Path, Any]], flag: str) -> None:
    known = [(folder, value) for folder, value in values if value is not None]
    for folder, value in known[1:]:
        if value != known[0][1]:
            more = ", or compare with --equal_training macs" if flag == "epochs" else ""
            raise UserError(
                f"--{flag} {short(known[0][1])} in {known[0][0]} and {short(value)} in {folder}: runs at equal budget "
                f"have one value of it. Leave one of them out{more}."
            )


def _is_undivided(run: FinishedRun) -> bool:
    settings = run.settings
    return (
        len(run.results["acc1"]) == 1
        and not settings.get("stage_widths")
        and settings.get("split_factor", 1) == 1
        and run.results["method"] == "independent"
    )


def _row(
    group: Sequence[FinishedRun], first: Sequence[FinishedRun], reference: tuple[int, int], budget_of: str
) -> BudgetRow:
    group = sorted(group, key=lambda run: run.results["seed"])
    one = group[0]
    params, macs = one.results["params_total"], one.results["macs_total"]
    ratios = params / reference[0], macs / reference[1]
    by_run = [_figures(run) for run in group]
    accuracies, others = (
        {run.results["seed"]: run.results["ensemble_acc1"] for run in part} for part in (group, first)
    )
    own, its = (_training_macs(part[0]) for part in (group, first))
    settings = one.settings
    return BudgetRow(
        entry="",
        members=len(one.results["acc1"]),
        networks=_networks(one),
        params=params,
        macs=macs,
        params_ratio=ratios[0],
        macs_ratio=ratios[1],
        is_equal=is_within(ratios, budget_of),
        figures={
            **{name: Spread.of_known([figures.get(name) for figures in by_run]) for name in FIGURES},
            # one run of a structure is enough to time it
            **{name: _spread_of_some([figures.get(name) for figures in by_run]) for name in LATENCIES},
        },
        training_macs_ratio=None if own is None or its is None else own / its,
        seeds=tuple(run.results["seed"] for run in group),
        delta=None if group[0] in first else PairedDifference.of(accuracies, others),
        rule=_rule(settings),
        chosen_on=one.results["best_chosen_on"],
        is_held_out=one.results["best_chosen_on"] != one.results.get("reported_on", "test"),
        teacher_seconds=Spread.of_known([_teacher_seconds(run) for run in group]),
    )


def _spread_of_some(values: Sequence[float | None]) -> Spread | None:
    return Spread.of_known([value for value in values if value is not None])


def _figures(run: FinishedRun) -> dict[str, float]:
    """The figures of one run by name, without those that it lacks."""
    results = run.results
    found = {
        "acc1_last": results["ensemble_acc1"],
        "acc1_best": results["best_ensemble_acc1"],
        "member_acc1_last": statistics.fmean(results["acc1"]),
        "member_acc1_best": statistics.fmean(results["best_acc1"]),
        "seconds": results["seconds"],
        **run.figures,
    }
    if len(results["acc1"]) == 1:
        found.pop("disagreement_last", None)
    return found | _latencies(run.folder)


def _latencies(folder: Path) -> dict[str, float]:
    """Median milliseconds of a batch of the deployed form, in its fastest execution, of an `eval.py --benchmark`."""
    for place in ("latency", "eval"):
        try:
            rows = (read_results(folder / place) or {})["latency"]
            found = {}
            for name, size in LATENCIES.items():
                medians = [row["p50_ms"] for row in rows if row["batch_size"] == size and row["name"] != "undivided"]
                if medians:
                    found[name] = min(medians)
        except (KeyError, TypeError):
            continue
        return found
    return {}


def _training_macs(run: FinishedRun) -> float | None:
    """Multiply-adds of all steps, forward, over the images of a batch."""
    macs, steps = run.results.get("macs_training"), run.results.get("steps")
    return None if not isinstance(macs, int | float) or not isinstance(steps, int | float) else float(macs * steps)


def _rule(settings: Mapping[str, Any]) -> str:
    what = "probabilities" if settings.get("is_ensembled_after_softmax") else "logits"
    return f"{'maximum' if settings.get('is_max_ensemble') else 'mean'} of {what}"


def _teacher_seconds(run: FinishedRun) -> float | None:
    teacher = run.settings.get("teacher")
    results = read_results(Path(teacher).parent) if isinstance(teacher, str) else None
    seconds = None if results is None else results.get("seconds")
    return float(seconds) if isinstance(seconds, int | float) else None


def _networks(run: FinishedRun) -> str:
    """`resnet20`, `4 x resnet20 (8 16 32)` with the stage widths, or `resnet20 + wrn_16_1`."""
    names = [name.strip() for name in run.results["arch"].split(",")]
    one, total = run.results.get("params_one"), run.results["params_total"]
    count = round(total / one) if isinstance(one, int) and one > 0 else len(run.results["acc1"])
    what = names[0] if len(set(names)) == 1 else " + ".join(names)
    widths = run.settings.get("stage_widths")
    shown = f" ({' '.join(f'{width:g}' for width in widths)})" if isinstance(widths, list) and widths else ""
    return (f"{count} x {what}" if count > 1 and len(set(names)) == 1 else what) + shown


def _names(groups: Sequence[Sequence[FinishedRun]], rows: Sequence[BudgetRow]) -> list[str]:
    """`METHOD:N`, with `@macs` or `@params` where that alone is met, and the flags that tell equal names apart."""
    names = []
    for group, row in zip(groups, rows, strict=True):
        met = {of: is_within((row.params_ratio, row.macs_ratio), of) for of in ("params", "macs")}
        alone = [of for of, is_met in met.items() if is_met and not all(met.values())]
        names.append(f"{group[0].results['method']}:{row.members}" + "".join(f"@{of}" for of in alone))
    apart = telling_apart(names, [group[0] for group in groups], NOT_NAMED)
    return [
        name + "".join(f"+{flag}={value}" for flag, value in own.items())
        for name, own in zip(names, apart, strict=True)
    ]


# ---- what is written -------------------------------------------------------------------------------------------------


def _cells(row: BudgetRow) -> list[str]:
    figures = []
    for name, digits in FIGURES.items():
        spread = row.figures[name]
        figures.append("" if spread is None else spread.significant() if digits is None else spread.text(digits))
    training = "" if row.training_macs_ratio is None else f"{row.training_macs_ratio:.3f}"
    latencies = [row.figures[name] for name in LATENCIES]
    return [
        row.entry,
        str(row.members),
        row.networks,
        f"{row.params:,}",
        f"{row.params_ratio:.3f}",
        f"{row.macs:,}",
        f"{row.macs_ratio:.3f}",
        "yes" if row.is_equal else "no",
        *figures,
        training,
        *("" if spread is None else spread.significant() for spread in latencies),
        " ".join(map(str, row.seeds)),
        "" if row.delta is None else row.delta.text(2),
    ]


def _blocks(rows: Sequence[BudgetRow]) -> list[list[list[str]]]:
    """The equal rows, then the rest, each in the order asked."""
    return [[_cells(row) for row in rows if row.is_equal is equal] for equal in (True, False)]


IS_NUMBER = [name not in ("method", "networks", "equal", "seeds") for name in COLUMNS]


def markdown(rows: Sequence[BudgetRow]) -> str:
    """Two Markdown tables, the rows of equal budget first and the rest under a line."""
    return tables.markdown_table(COLUMNS, IS_NUMBER, _blocks(rows))


def latex(rows: Sequence[BudgetRow]) -> str:
    """The same as one LaTeX `tabular`."""
    return tables.latex_table(COLUMNS, IS_NUMBER, _blocks(rows))


def csv_table(rows: Sequence[BudgetRow]) -> str:
    """All rows as CSV, the equal ones first; what is not known is empty."""
    spreads = [f"{name}_{part}" for name in FIGURES for part in ("mean", "std")]
    latencies = [f"{name}_{part}" for name in LATENCIES for part in ("mean", "std")]
    titles = ["method", "members", "networks", *SIZES, *spreads, "training_macs_ratio", *latencies, "seeds", *DELTA]
    lines = []
    for row in sorted(rows, key=lambda row: not row.is_equal):
        sizes = [row.params, f"{row.params_ratio:.3f}", row.macs, f"{row.macs_ratio:.3f}", int(row.is_equal)]
        numbers = [value for name in FIGURES for value in spread_numbers(row.figures[name])]
        timed = [value for name in LATENCIES for value in spread_numbers(row.figures[name])]
        training = "" if row.training_macs_ratio is None else f"{row.training_macs_ratio:.3f}"
        seeds = " ".join(map(str, row.seeds))
        delta = row.delta
        differences = ["", "", "", "", ""]
        if delta is not None:
            ends = [delta.std, delta.low, delta.high]
            std, low, high = ("" if value is None else f"{value:.4f}" for value in ends)
            differences = [f"{delta.mean:.4f}", std, str(delta.pairs), low, high]
        lines.append([row.entry, row.members, row.networks, *sizes, *numbers, training, *timed, seeds, *differences])
    return tables.csv_table(titles, lines)


def notes(
    rows: Sequence[BudgetRow],
    *,
    budget_of: str = "both",
    equal_training: str = "epochs",
    left_out: Sequence[FinishedRun] = (),
) -> list[str]:
    """What has to be known to read the table, a sentence or two each; `left_out`: runs that have not ended."""
    what = {"both": "parameters and MACs", "params": "parameters", "macs": "MACs"}[budget_of]
    said = [
        f"Equal: {what} of what is deployed within {100 * TOLERANCE:g} % of the undivided network's; parts that only "
        "train are not counted. Ratios are to that network, training_macs_ratio to the first row.",
        "Figures are mean ± sample standard deviation over the seeds, accuracies in %. delta is acc1_last minus that "
        f"of {rows[0].entry} by seed, its mean and 95 % interval (Student's t).",
        _rules(rows),
    ]
    for chosen in sorted({row.chosen_on for row in rows if not row.is_held_out}):
        said.append(f"The best epoch is chosen on the {chosen} images that are reported, so acc1_best flatters.")
    said += [
        f"The best epoch is chosen on {chosen} images, which are not those reported."
        for chosen in sorted({row.chosen_on for row in rows if row.is_held_out})
    ]
    few = [row for row in rows if len(row.seeds) < 3]
    if few:
        said.append(f"Fewer than 3 seeds ({_list(few)}): spreads and intervals mean little.")
    unseen = [row for row in rows if row.delta is not None and row.delta.low is not None and not row.delta.is_seen]
    if unseen:
        said.append(f"No difference seen to {rows[0].entry}: {_list(unseen)}.")
    said += [_why_not_equal(row) for row in rows if not row.is_equal]
    if equal_training == "macs":
        said.append("Epochs are scaled so that every row trains with the multiply-adds of the first, to whole epochs.")
    said += [
        f"{row.entry}: the training of its teacher took {row.teacher_seconds.significant()} seconds more."
        for row in rows
        if row.teacher_seconds is not None
    ]
    said += [f"Left out, because it has not ended: {run.folder} ({run.progress})." for run in left_out]
    return said


def _list(rows: Sequence[BudgetRow]) -> str:
    return ", ".join(row.entry for row in rows)


def _rules(rows: Sequence[BudgetRow]) -> str:
    """By which rule members are one prediction, where one for all is not all there is to say."""
    by_rule = {rule: [row for row in rows if row.rule == rule] for rule in dict.fromkeys(row.rule for row in rows)}
    if len(by_rule) == 1:
        return f"Members answer together by the {rows[0].rule}."
    return (
        "Members answer together by " + "; ".join(f"the {rule} ({_list(own)})" for rule, own in by_rule.items()) + "."
    )


def _why_not_equal(row: BudgetRow) -> str:
    parts = [
        f"{ratio:.3g} times the {name}"
        for name, ratio in (("parameters", row.params_ratio), ("MACs", row.macs_ratio))
        if abs(ratio - 1) > TOLERANCE
    ]
    return f"{row.entry} is not equal: {' and '.join(parts)} of the undivided network."


def plot(rows: Sequence[BudgetRow], path: Path) -> Path:
    """Accuracy over MACs, NLL over MACs, accuracy over latency and over seconds as a PNG; returns `path`.

    A colour for each method and a marker for each of its entries, filled where the row is equal. A row is left out of
    a panel that needs a figure that it does not have.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    methods = [*dict.fromkeys(_method(row) for row in rows)]
    colours = {name: colormaps["tab20"](2 * i % 20 + 2 * i // 20) for i, name in enumerate(methods)}
    seen: Counter[str] = Counter()
    looks = []
    for row in rows:
        method = _method(row)
        looks.append((colours[method], MARKERS[(methods.index(method) + seen[method]) % len(MARKERS)]))
        seen[method] += 1
    figure = Figure(figsize=(12, 9.5), layout="constrained")
    panels = figure.subplots(2, 2)
    kinds = (("macs", "acc1_last"), ("macs", "nll_last"), ("latency_ms_b1", "acc1_last"), ("seconds", "acc1_last"))
    titles = {
        "macs": "million MACs of one image",
        "latency_ms_b1": "ms of one image",
        "seconds": "seconds of training",
        "acc1_last": "top-1 in %, last epoch",
        "nll_last": "NLL, last epoch",
    }
    for axes, (across, up) in zip(panels.flat, kinds, strict=True):
        for row, (colour, marker) in zip(rows, looks, strict=True):
            x = Spread(row.macs / 1e6, None) if across == "macs" else row.figures[across]
            y = row.figures[up]
            if x is None or y is None:
                continue
            axes.errorbar(
                x.mean,
                y.mean,
                xerr=x.std,
                yerr=y.std,
                fmt=marker,
                color=colour,
                markersize=8,
                markerfacecolor=colour if row.is_equal else "none",
                markeredgewidth=1.6,
                capsize=3,
                elinewidth=1,
                alpha=0.9,
            )
        if across == "macs":
            axes.set_xscale("log")
            axes.xaxis.set_major_formatter("{x:g}")
            axes.xaxis.set_minor_formatter("{x:g}")
        if not axes.containers:
            axes.text(0.5, 0.5, "not measured", ha="center", va="center", transform=axes.transAxes, color="#666666")
        axes.set(xlabel=titles[across], ylabel=titles[up])
        axes.grid(color="#dddddd", linewidth=0.6, which="both" if across == "macs" else "major")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    key = [
        Line2D([], [], color=c, marker=m, linestyle="", markersize=8, markerfacecolor=c if row.is_equal else "none",
               markeredgewidth=1.6, label=row.entry)
        for row, (c, m) in zip(rows, looks, strict=True)
    ]  # fmt: skip
    title = "filled: equal budget; hollow: not; whiskers: ± standard deviation over the seeds"
    legend = figure.legend(
        handles=key, loc="outside lower center", ncols=4, frameon=False, fontsize=9, title=title, title_fontsize=9
    )
    for text in legend.get_texts():
        text.set_parse_math(False)
    figure.savefig(path, dpi=120)
    return path


def _method(row: BudgetRow) -> str:
    return re.split(r"[:@+]", row.entry, maxsplit=1)[0]

"""Pictures of answers: the cascade's curve, reliability, risk and coverage, foreign images, shift, diversity."""

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dataset.source.corrupted import CORRUPTIONS
from evaluation.calibration import Bins
from evaluation.cascade_table import Row
from evaluation.metrics.ece import NUM_BINS
from record.plots import COLOURS

GREY, LIGHT = "#777777", "#dddddd"


def _clean(axes: Any) -> None:
    axes.grid(color=LIGHT, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def plot_cascade(rows: Sequence[Row], large_macs: int | None, title: str, path: Path) -> Path:
    """Top-1 against average MACs, and below it the shares that leave the chosen cascade after each network."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.4, 6.4), layout="constrained")
    top, bottom = figure.subplots(2, 1, height_ratios=(5, 1))
    cascades = sorted((row for row in rows if row.kind == "cascade"), key=lambda row: row.test_macs)
    top.plot(
        [row.test_macs / 1e6 for row in cascades],
        [row.test_acc1 for row in cascades],
        color=COLOURS[0],
        marker=".",
        linewidth=1.2,
        label="cascades",
    )
    looks = {
        "network": ("o", COLOURS[4], "one network"),
        "first": ("s", COLOURS[3], "first networks"),
        "ensemble": ("D", COLOURS[2], "full ensemble"),
        "undivided": ("*", COLOURS[1], "undivided network"),
    }
    for kind, (marker, colour, label) in looks.items():
        own = [row for row in rows if row.kind == kind]
        size = 14 if kind == "undivided" else 7
        if own:
            top.plot(
                [row.test_macs / 1e6 for row in own],
                [row.test_acc1 for row in own],
                marker,
                color=colour,
                markersize=size,
                linestyle="",
                label=label,
            )
    if large_macs is not None and not any(row.kind == "undivided" for row in rows):
        top.axvline(large_macs / 1e6, color=COLOURS[1], linestyle="--", label="undivided network (accuracy unknown)")
    chosen = next(row for row in rows if row.chosen)
    top.plot(
        [chosen.test_macs / 1e6],
        [chosen.test_acc1],
        "o",
        markersize=17,
        markerfacecolor="none",
        markeredgecolor="black",
        markeredgewidth=1.6,
        label="chosen on held-out images",
    )
    top.set(title=title, xlabel="average million MACs", ylabel="top-1 in %")
    top.set_xlim(left=0)
    _clean(top)
    legend = top.legend(frameon=False, fontsize=8.5)
    for text in [*legend.get_texts(), top.title]:
        text.set_parse_math(False)
    start = 0.0
    for k, share in enumerate(chosen.left_S):
        bottom.barh([0], [share], left=[start], color=COLOURS[k % len(COLOURS)], edgecolor="white")
        if share > 0.09:  # room for the words
            bottom.text(start + share / 2, 0, f"{k + 1}: {100 * share:.1f} %", ha="center", va="center", color="white")
        start += share
    bottom.set(yticks=[], xlim=(0, 1), xlabel="images leaving the chosen cascade after network 1, 2, … of its order")
    bottom.spines[["top", "right", "left"]].set_visible(False)
    figure.savefig(path, dpi=120)
    return path


def plot_reliability(panels: Sequence[tuple[str, Bins, Mapping[str, Any]]], path: Path) -> Path:
    """Rate of right answers by confidence, with the gap to the diagonal, and counts below.

    Args:
        panels: (title, bins, figures with `ece` and `nll`) before and after calibration.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2 * len(panels), 5.4), layout="constrained")
    axes = figure.subplots(2, len(panels), height_ratios=(3, 1), sharex=True, squeeze=False)
    centres = (np.arange(NUM_BINS) + 0.5) / NUM_BINS
    width = 1 / NUM_BINS
    for column, (title, bins, figures) in enumerate(panels):
        upper, lower = axes[0, column], axes[1, column]
        images = bins.images_M.numpy()
        there = images > 0
        rate = np.divide(bins.right_M.numpy(), images, where=there, out=np.zeros(NUM_BINS))
        sure = np.divide(bins.confidence_M.numpy(), images, where=there, out=np.zeros(NUM_BINS))
        upper.bar(centres[there], rate[there], width * 0.94, color=COLOURS[0], label="right")
        upper.bar(
            centres[there],
            (sure - rate)[there],
            width * 0.94,
            bottom=rate[there],
            facecolor="none",  # seen on the bar, where sureness falls short of the rate, as well as above it
            edgecolor=COLOURS[1],
            hatch="///",
            label="gap to the confidence",
        )
        upper.plot([0, 1], [0, 1], color=GREY, linestyle="--", linewidth=1)
        upper.set(
            title=f"{title}: ECE {_short(figures['ece'])}, NLL {_short(figures['nll'])}", xlim=(0, 1), ylim=(0, 1)
        )
        _clean(upper)
        lower.bar(centres, images, width * 0.94, color=GREY)
        lower.set(xlabel="confidence")
        _clean(lower)
    axes[0, 0].set_ylabel("right answers")
    axes[1, 0].set_ylabel("images")
    axes[0, 0].legend(frameon=False, fontsize=8.5, loc="upper left")
    figure.savefig(path, dpi=120)
    return path


def _short(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


def plot_risk_coverage(curves: Mapping[str, Mapping[str, Any]], oracle: Mapping[str, Any], path: Path) -> Path:
    """Risk against coverage of the ensemble, the networks (thin), the cascade, and of errors that all come last."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.6, 4.6), layout="constrained")
    axes = figure.subplots()
    looks: dict[str, dict[str, Any]] = {
        "ensemble": {"color": COLOURS[0], "linewidth": 2},
        "cascade": {"color": COLOURS[1], "linewidth": 2, "linestyle": "--"},
    }
    for name, curve in curves.items():
        look = looks.get(name, {"color": GREY, "linewidth": 0.7})
        label = name if name in looks else "one network" if name == "network 1" else None
        axes.plot(curve["coverage"], [100 * risk for risk in curve["risk"]], label=label, **look)
    axes.plot(
        oracle["coverage"], [100 * risk for risk in oracle["risk"]], color=COLOURS[2], linestyle=":", label="oracle"
    )
    axes.set(xlabel="coverage: share of the images that are answered", ylabel="risk: errors among them in %")
    axes.set_xlim(0, 1)
    axes.set_ylim(bottom=0)
    _clean(axes)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=120)
    return path


def short_names(names: Sequence[str]) -> list[str]:
    """Of paths and of NAME:PATH the last parts, as few as tell them apart; of the latter NAME is the last."""
    parts = []
    for name in names:
        kind, colon, place = name.partition(":")
        parts.append((*Path(place).parts, kind) if colon else Path(name).parts)
    shown: list[str] = []
    for count in range(1, max(map(len, parts)) + 1):
        shown = [str(Path(*part[-count:])) for part in parts]
        if len({*shown}) == len(shown):
            break
    return shown


def plot_ood(sets: Mapping[str, tuple[str, Any, Any, float | None]], path: Path) -> Path:
    """Histogram of the best score of each set beside the own images', and ROC curves.

    Args:
        sets: name -> (score, own scores [N], foreign scores [M], AUROC).
    """
    from matplotlib.figure import Figure
    from sklearn.metrics import roc_curve

    figure = Figure(figsize=(5.0 * (len(sets) + 1), 4.4 + 0.2 * len(sets)), layout="constrained")
    panels = figure.subplots(1, len(sets) + 1, squeeze=False)[0]
    for i, (name, (score, own_N, foreign_M, auroc)) in enumerate(zip(short_names([*sets]), sets.values(), strict=True)):
        own, foreign = own_N.numpy(), foreign_M.numpy()
        everything = np.concatenate([own, foreign])
        edges = np.linspace(everything.min(), everything.max() + 1e-12, 31)
        for values, colour, label in ((own, COLOURS[0], "own images"), (foreign, COLOURS[1], "foreign")):
            weights = np.full(len(values), 1 / max(len(values), 1))
            panels[i].hist(values, bins=edges, weights=weights, color=colour, alpha=0.55, label=label)
        panels[i].set(xlabel=score, ylabel="share of the images")
        panels[i].set_title(textwrap.fill(name, 40), fontsize=11).set_parse_math(False)
        panels[i].legend(frameon=False)
        _clean(panels[i])
        if len(own) and len(foreign):
            truth = np.concatenate([np.zeros(len(own)), np.ones(len(foreign))])
            accepted, found, _ = roc_curve(truth, everything, drop_intermediate=False)
            line = panels[-1].plot(accepted, found, color=COLOURS[i % len(COLOURS)])[0]
            line.set_label(f"{name}, {score}: {_short(auroc)}")
    panels[-1].plot([0, 1], [0, 1], color=GREY, linestyle="--", linewidth=1)
    panels[-1].set(xlabel="own images called foreign", ylabel="foreign images found", title="ROC, area")
    lines = panels[-1].get_legend_handles_labels()
    for text in figure.legend(*lines, loc="outside lower center", frameon=False, fontsize=8.5).get_texts():
        text.set_parse_math(False)
    _clean(panels[-1])
    figure.savefig(path, dpi=120)
    return path


def plot_shift(rows: Sequence[Mapping[str, Any]], clean_error: float, mean_name: str, path: Path) -> Path:
    """Accuracy, and the cascade's average MACs, against severity; thin lines are single corruptions."""
    from matplotlib.figure import Figure

    has_cascade = any(row["cascade_macs"] is not None for row in rows)
    figure = Figure(figsize=(6.0 if not has_cascade else 11.0, 4.4), layout="constrained")
    panels = figure.subplots(1, 1 + has_cascade, squeeze=False)[0]
    # a mean is over the corruptions of the benchmark; others are thin lines only, unless there is nothing else
    averaged = [row for row in rows if row["corruption"] in CORRUPTIONS] or rows
    severities = sorted({row["severity"] for row in averaged})

    def means(key: str) -> list[float]:
        return [float(np.mean([row[key] for row in averaged if row["severity"] == s])) for s in severities]

    for name in dict.fromkeys(row["corruption"] for row in rows):
        own = [row for row in rows if row["corruption"] == name]
        places = [row["severity"] for row in own]
        panels[0].plot(places, [row["acc1"] for row in own], color=LIGHT, linewidth=1)
        if has_cascade:
            panels[1].plot(places, [row["cascade_macs"] / 1e6 for row in own], color=LIGHT, linewidth=1)
    panels[0].plot(severities, means("acc1"), "o-", color=COLOURS[0], label=f"ensemble, {mean_name}")
    panels[0].axhline(100 - clean_error, color=GREY, linestyle="--", linewidth=1, label="ensemble, clean images")
    panels[0].set(xlabel="severity", ylabel="top-1 in %", xticks=severities)
    panels[0].set_ylim(bottom=0)
    if has_cascade:
        panels[0].plot(severities, means("cascade_acc1"), "s--", color=COLOURS[1], label="cascade")
        panels[1].plot(severities, [value / 1e6 for value in means("cascade_macs")], "s--", color=COLOURS[1])
        panels[1].set(xlabel="severity", ylabel="average million MACs of the cascade", xticks=severities)
        panels[1].set_ylim(bottom=0)
    panels[0].legend(frameon=False, fontsize=8.5)
    for axes in panels:
        _clean(axes)
    figure.savefig(path, dpi=120)
    return path


def plot_diversity(figures: Mapping[str, Any], path: Path) -> Path:
    """The disagreement of every pair, and the account of accuracy as a waterfall."""
    from matplotlib.figure import Figure

    matrix = np.array(figures["disagreement"], dtype=float)
    size = len(matrix)
    figure = Figure(figsize=(10.4, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    shown = left.imshow(100 * matrix, cmap="Blues", vmin=0)
    figure.colorbar(shown, ax=left, label="% of the images")
    names = [str(i + 1) for i in range(size)]
    left.set(title="two networks disagree", xticks=range(size), yticks=range(size), xticklabels=names)
    left.set_yticklabels(names)
    middle = 50 * matrix.max()
    for i in range(size):
        for j in range(size):
            colour = "white" if 100 * matrix[i, j] > middle else "black"
            left.text(j, i, f"{100 * matrix[i, j]:.1f}", ha="center", va="center", color=colour)
    account = figures["accuracy"]
    mean, rescued, spoiled = account["mean_network"], account["rescued"], account["spoiled"]
    bars = (
        ("mean network", 0.0, mean, COLOURS[7]),
        ("rescued", mean, rescued, COLOURS[2]),
        ("spoiled", mean + rescued - spoiled, spoiled, COLOURS[1]),
        ("ensemble", 0.0, account["ensemble"], COLOURS[0]),
    )
    for i, (name, bottom, height, colour) in enumerate(bars):
        right.bar([i], [height], bottom=[bottom], color=colour)
        sign = {"rescued": "+", "spoiled": "−"}.get(name, "")
        right.text(i, bottom + height, f"{sign}{height:.2f}", ha="center", va="bottom")
    top = max(mean + rescued, account["ensemble"])
    low = min(mean, account["ensemble"])
    right.set(title="accuracy in %", xticks=range(len(bars)), xticklabels=[name for name, *_ in bars])
    right.set_ylim(max(low - 3 * max(top - low, 1.0), 0), min(top + 0.4 * max(top - low, 1.0), 104))
    _clean(right)
    figure.savefig(path, dpi=120)
    return path

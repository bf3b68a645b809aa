"""Pictures of answers: the cascade's curve, reliability, risk and coverage, foreign images, shift, diversity."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

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
        if share > 0.04:
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
            color=COLOURS[1],
            alpha=0.35,
            edgecolor=COLOURS[1],
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

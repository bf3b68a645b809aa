"""Pictures of runs: curves over training and confusion matrices. matplotlib is imported where it is used."""

import csv
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from utils.text import escaped, one_line

COLOURS = ("#1f5fa8", "#d1571b", "#2c8a4b", "#8a3fa0", "#b8860b", "#c2185b", "#008b9a", "#6b5b4b")
MOST_CONFUSED = 18
MOST_CELLS = 200
LONGEST_NAME = 22


@dataclass(frozen=True)
class RunCurves:
    """What a run directory recorded.

    Attributes:
        epochs: [E] of each evaluation. ensemble: [E] top-1 in percent. networks: [E, S].
        steps: [T] of each progress line. losses: name -> [T]; "loss" is the total. learning_rate: [T].
    """

    epochs: np.ndarray
    ensemble: np.ndarray
    networks: np.ndarray
    steps: np.ndarray
    losses: dict[str, np.ndarray]
    learning_rate: np.ndarray


def read_curves(run_dir: Path) -> RunCurves:
    """Curves of a run from its summary.csv and metrics.jsonl; a file that is not there gives empty ones."""
    rows: list[dict[str, str]] = []
    if (run_dir / "summary.csv").exists():
        with (run_dir / "summary.csv").open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
    records: list[dict[str, Any]] = []
    if (run_dir / "metrics.jsonl").exists():
        # a killed run leaves a last line without its end
        lines = (run_dir / "metrics.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
        records = [record for record in map(json.loads, lines) if record["kind"] == "train"]
    columns = [name for name in (rows[0] if rows else ()) if name.startswith("acc1_")]
    names = sorted({name for record in records for name in record if name == "loss" or name.startswith("loss_")})
    return RunCurves(
        epochs=_numbers(row["epoch"] for row in rows),
        ensemble=_numbers(row["ensemble_acc1"] for row in rows),
        networks=np.array([_numbers(row[name] for name in columns) for row in rows]).reshape(len(rows), len(columns)),
        steps=_numbers(record["step"] for record in records),
        losses={name: _numbers(record.get(name) for record in records) for name in names},
        learning_rate=_numbers(record.get("learning_rate") for record in records),
    )


def plot_curves(runs: Path | Sequence[tuple[str, Path]], path: Path | None = None) -> Path:
    """Accuracy of the ensemble and of every network, losses and learning rate; returns the picture's path.

    Args:
        runs: one run directory, or (label, run directory) pairs to compare in one picture.
        path: the PNG to write; by default curves.png in the (first) run directory.
    """
    from matplotlib.figure import Figure

    pairs = [("", runs)] if isinstance(runs, Path) else [(escaped(label), run) for label, run in runs]
    path = path or pairs[0][1] / "curves.png"
    shown_runs = [read_curves(run_dir) for _, run_dir in pairs]
    figure = Figure(figsize=(14, 4.2), layout="constrained")
    accuracy, loss, rate = figure.subplots(1, 3, width_ratios=(1.25, 1, 1))
    alone = len(pairs) == 1
    for number, ((label, _), curves) in enumerate(zip(pairs, shown_runs, strict=True)):
        colour = COLOURS[number % len(COLOURS)]
        marker = "o" if len(curves.epochs) < 3 else None
        several = curves.networks.shape[1] > 1
        for i in range(curves.networks.shape[1] if several else 0):
            accuracy.plot(
                curves.epochs,
                curves.networks[:, i],
                color=COLOURS[(i + 1) % len(COLOURS)] if alone else colour,
                alpha=0.9 if alone else 0.4,
                linewidth=1.0,
                marker=marker,
                label=f"network {i + 1}" if alone else f"{label}: single networks" if i == 0 else None,
            )
        whole = "ensemble" if several else "network"
        accuracy.plot(
            curves.epochs,
            curves.ensemble,
            color=colour,
            linewidth=2.2,
            marker=marker,
            label=whole if alone else f"{label}: {whole}",
        )
        # the parts of a loss are told apart only where one run has the panel to itself
        shown = {name: values for name, values in curves.losses.items() if alone or name == "loss"}
        marker = "o" if len(curves.steps) < 3 else None
        for i, (name, values) in enumerate(shown.items()):
            title = ("total" if name == "loss" else name.removeprefix("loss_")) if alone else label
            loss.plot(
                curves.steps,
                values,
                color=COLOURS[i % len(COLOURS)] if alone else colour,
                linewidth=1.4,
                marker=marker,
                label=title,
            )
        rate.plot(curves.steps, curves.learning_rate, color=colour, linewidth=1.4, marker=marker, label=label or None)
    accuracy.set_ylim(*_accuracy_range(shown_runs))
    accuracy.set(title="Accuracy on the evaluation images", xlabel="epoch", ylabel="top-1 in %")
    loss.set(title="Training loss", xlabel="step", ylabel="loss")
    rate.set(title="Learning rate", xlabel="step", ylabel="learning rate")
    rate.set_ylim(bottom=0)
    for axes in (accuracy, loss, rate):
        axes.grid(color="#dddddd", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        if axes.get_legend_handles_labels()[1]:
            for text in axes.legend(frameon=False, fontsize=9).get_texts():
                text.set_parse_math(False)
    figure.savefig(path, dpi=130)
    return path


def plot_confusion(matrix_KK: np.ndarray, classes: Sequence[str], path: Path) -> Path:
    """Confusion matrix as a picture, each row in percent of its class; returns `path`.

    Up to 30 classes have their counts in the cells; beyond, a list of the most confused pairs stands beside the
    matrix. Beyond 200, a cell stands for a block of neighbouring classes and shows the largest share in it.

    Args:
        matrix_KK: counts [K, K]; rows are true classes, columns predictions.
        classes: K names.
        path: the PNG to write.
    """
    from matplotlib.colors import PowerNorm
    from matplotlib.figure import Figure

    counts = np.asarray(matrix_KK)
    num_classes = len(counts)
    names = [_shorten(one_line(name)) for name in classes]
    share = 100.0 * counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    few = num_classes <= 30
    side = min(4.0 + 0.36 * num_classes, 14.0)
    figure = Figure(figsize=(side + (1.2 if few else 5.0), side), layout="constrained")
    axes = figure.subplots() if few else None
    if axes is None:
        axes, listing = figure.subplots(1, 2, width_ratios=(side, 4.2))
        listing.axis("off")
        listing.text(0, 1, _most_confused(counts, names), va="top", fontsize=9, family="monospace", parse_math=False)
    # a root scale: a confusion of 1 % is still visible beside a diagonal of 90 %
    picture = axes.imshow(
        _largest_of_blocks(share, -(-num_classes // MOST_CELLS)),
        cmap="Blues",
        norm=PowerNorm(0.5, vmin=0, vmax=100),
        interpolation="nearest",
        extent=(-0.5, num_classes - 0.5, num_classes - 0.5, -0.5),
    )
    bar = figure.colorbar(picture, ax=axes, fraction=0.046, pad=0.02, ticks=(0, 1, 5, 20, 50, 100))
    bar.set_label("% of the true class")
    axes.set(xlabel="predicted", ylabel="true")
    if num_classes <= 120:
        size = 9.0 if few else max(4.0, 630.0 / num_classes)
        axes.set_xticks(range(num_classes), names, rotation=90, fontsize=size, parse_math=False)
        axes.set_yticks(range(num_classes), names, fontsize=size, parse_math=False)
    if few:
        for row, column in np.argwhere(counts > 0):
            tint = "white" if share[row, column] > 40 else "#222222"
            axes.text(column, row, str(int(counts[row, column])), ha="center", va="center", fontsize=8, color=tint)
    figure.savefig(path, dpi=110)
    return path


def _largest_of_blocks(share_KK: np.ndarray, block: int) -> np.ndarray:
    """Largest value of every `block` x `block` cells, so that single cells stay visible in a small picture."""
    padding = -len(share_KK) % block
    padded = np.pad(share_KK, (0, padding))
    cells = len(padded) // block
    return padded.reshape(cells, block, cells, block).max(axis=(1, 3))


def _most_confused(counts: np.ndarray, names: Sequence[str]) -> str:
    wrong = counts.copy()
    np.fill_diagonal(wrong, 0)
    order = np.argsort(wrong, axis=None, kind="stable")[::-1][:MOST_CONFUSED]
    pairs = [(int(wrong.flat[i]), *divmod(int(i), len(names))) for i in order if wrong.flat[i] > 0]
    lines = [f"{count:5d}  {names[true]} → {names[predicted]}" for count, true, predicted in pairs]
    return "\n".join(["most confused (images, true → predicted)", "", *lines])


def _accuracy_range(runs: Sequence[RunCurves]) -> tuple[float, float]:
    """From below the second half's lowest to the highest: the end matters, the climb at the start does not."""
    ends = [np.column_stack([run.ensemble, run.networks])[len(run.epochs) // 2 :].ravel() for run in runs]
    values = np.concatenate(ends)
    values = values[np.isfinite(values)]
    if not len(values):
        return 0.0, 100.0
    low = max(0.0, 5.0 * np.floor(values.min() / 5.0) - 5.0)
    return low, values.max() + max(0.05 * (values.max() - low), 0.5)


def _shorten(name: str) -> str:
    return name if len(name) <= LONGEST_NAME else name[: LONGEST_NAME - 1] + "…"


def _numbers(values: Any) -> np.ndarray:
    """Values as floats; what is missing becomes a gap in the curve."""
    return np.array([float("nan") if value in (None, "") else float(value) for value in values])

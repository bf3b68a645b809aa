"""Pictures of runs: curves over training and confusion matrices. matplotlib is imported where it is used."""

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from record.checkpoint import write_file
from utils.text import escaped, one_line

COLOURS = ("#1f5fa8", "#d1571b", "#2c8a4b", "#8a3fa0", "#b8860b", "#c2185b", "#008b9a", "#6b5b4b")
MOST_CONFUSED = 18
MOST_CELLS = 200
LONGEST_NAME = 22


@dataclass(frozen=True)
class RunCurves:
    """What a run directory recorded.

    Attributes:
        epochs: [E] of each evaluation, the first is 1. figures: name -> [E], what summary.csv has of them.
        ensemble: [E] top-1 in percent. networks: [E, S].
        steps: [T] of each progress line. trained: [T] the same place in epochs; the end of the first is 1.
        losses: name -> [T]; "loss" is the total, "loss_per_network" the mean of the networks.
        learning_rate: [T].
    """

    epochs: np.ndarray
    figures: dict[str, np.ndarray]
    ensemble: np.ndarray
    networks: np.ndarray
    steps: np.ndarray
    trained: np.ndarray
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
    steps = _numbers(record["step"] for record in records)
    losses = {name: _numbers(record.get(name) for record in records) for name in names}
    if "loss" in losses and "loss_per_network" not in losses:  # a run of an earlier version
        losses["loss_per_network"] = losses["loss"] / max(len(columns), 1)
    epochs = _numbers(row["epoch"] for row in rows)
    return RunCurves(
        epochs=epochs,
        figures={name: _numbers(row[name] for row in rows) for name in (rows[0] if rows else ())},
        ensemble=_numbers(row["ensemble_acc1"] for row in rows),
        networks=np.array([_numbers(row[name] for name in columns) for row in rows]).reshape(len(rows), len(columns)),
        steps=steps,
        trained=_in_epochs(steps + 1, epochs, _numbers(row["step"] for row in rows)),
        losses=losses,
        learning_rate=_numbers(record.get("learning_rate") for record in records),
    )


def _in_epochs(done_T: np.ndarray, epochs_E: np.ndarray, done_E: np.ndarray) -> np.ndarray:
    """Steps that were done, in epochs; between evaluations, and beyond the last one, as if all steps were alike."""
    whole = epochs_E > 0
    epochs_E, done_E = np.append(0.0, epochs_E[whole]), np.append(0.0, done_E[whole])
    if len(epochs_E) == 1:  # no epoch has ended: what was done is called one
        return done_T / max(done_T.max(initial=1.0), 1.0)
    a_step = (epochs_E[-1] - epochs_E[-2]) / max(done_E[-1] - done_E[-2], 1.0)
    beyond = np.maximum(done_T - done_E[-1], 0.0) * a_step
    return np.asarray(np.interp(done_T, done_E, epochs_E) + beyond)


def plot_curves(runs: Path | Sequence[tuple[str, Path]], path: Path | None = None) -> Path:
    """Draw `curves_png` into a file; returns its path.

    Args:
        runs: see there.
        path: the PNG to write; by default curves.png in the (first) run directory.

    Raises:
        WriteError: it cannot be written.
    """
    path = path or (runs if isinstance(runs, Path) else runs[0][1]) / "curves.png"
    write_file(path, curves_png(runs))
    return path


def curves_png(runs: Path | Sequence[tuple[str, Path]]) -> bytes:
    """Accuracy, losses, calibration and learning rate over the epochs, as a PNG.

    Args:
        runs: one run directory, or (label, run directory) pairs to compare in one picture.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    pairs = [("", runs)] if isinstance(runs, Path) else [(escaped(label), run) for label, run in runs]
    figure = Figure(figsize=(13, 9), layout="constrained")
    panels = figure.subplots(2, 2)
    accuracy, loss, calibration, rate = panels.flat
    alone = len(pairs) == 1
    last = 1.0
    for number, (label, run_dir) in enumerate(pairs):
        curves = read_curves(run_dir)
        colour = COLOURS[number % len(COLOURS)]
        last = max(last, curves.epochs.max(initial=0.0), curves.trained.max(initial=0.0))
        several = curves.networks.shape[1] > 1
        if alone:
            _plot_accuracies(accuracy, curves)
            _plot_losses(loss, curves)
        else:
            title = f"{label}: {'ensemble' if several else 'network'}"
            _line(accuracy, curves.epochs, curves.ensemble, title, colour, width=2.2)
            for i in range(curves.networks.shape[1] if several else 0):
                one = f"{label}: single networks" if i == 0 else None
                _line(accuracy, curves.epochs, curves.networks[:, i], one, colour, alpha=0.4)
            _line(loss, curves.trained, curves.losses.get("loss_per_network"), f"{label}: training", colour, alpha=0.6)
            _line(loss, curves.epochs, curves.figures.get("ensemble_nll"), f"{label}: NLL", colour, style="--")
        name = label or ("ensemble" if several else "network")
        _line(calibration, curves.epochs, curves.figures.get("ensemble_ece"), name, colour)
        if alone:
            held_out = curves.figures.get("val_ensemble_ece")
            _line(calibration, curves.epochs, held_out, f"{name}, held-out images", colour, style="--")
        _line(rate, curves.trained, curves.learning_rate, label or None, colour)
    accuracy.set(title="Accuracy on the evaluation images", ylabel="top-1 in %")
    loss.set(title="Loss per network", ylabel="nats")
    calibration.set(title="Calibration on the evaluation images", ylabel="expected calibration error")
    rate.set(title="Learning rate", ylabel="learning rate")
    for axes in (calibration, rate):
        axes.set_ylim(bottom=0)
    for axes in panels.flat:
        axes.set(xlabel="epoch", xlim=(0, 1.02 * last))
        axes.xaxis.set_major_locator(MaxNLocator(10, integer=True))
        axes.grid(color="#dddddd", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        if axes.get_legend_handles_labels()[1]:
            # below, where no curve is; to find a free place takes seconds on long runs
            below = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.13)}
            for text in axes.legend(**below, ncols=2, frameon=False, fontsize=9).get_texts():
                text.set_parse_math(False)
    picture = io.BytesIO()
    figure.savefig(picture, dpi=100)
    return picture.getvalue()


def _plot_accuracies(axes: Any, curves: RunCurves) -> None:
    """One run: every network, their ensemble, and the ensemble on held-out images where there are some."""
    several = curves.networks.shape[1] > 1
    for i in range(curves.networks.shape[1] if several else 0):
        colour = COLOURS[(i + 1) % len(COLOURS)]
        _line(axes, curves.epochs, curves.networks[:, i], f"network {i + 1}", colour, alpha=0.9, width=1.0)
    whole = "ensemble" if several else "network"
    _line(axes, curves.epochs, curves.ensemble, whole, COLOURS[0], width=2.2)
    _line(
        axes,
        curves.epochs,
        curves.figures.get("val_ensemble_acc1"),
        f"{whole}, held-out images",
        COLOURS[0],
        style="--",
    )


def _plot_losses(axes: Any, curves: RunCurves) -> None:
    """One run: the training loss and its parts, and what the evaluations found, all per network."""
    several = curves.networks.shape[1] > 1
    mean = curves.losses.get("loss_per_network")
    if mean is not None:
        _line(axes, curves.trained, mean, "training", COLOURS[0])
        with np.errstate(all="ignore"):
            scale = mean / curves.losses["loss"]
        parts = [name for name in curves.losses if name not in ("loss", "loss_per_network")]
        for i, name in enumerate(parts if len(parts) > 1 else ()):
            colour = COLOURS[(i + 3) % len(COLOURS)]
            title = f"training: {name.removeprefix('loss_')}"
            _line(axes, curves.trained, scale * curves.losses[name], title, colour, width=1.0)
    images = "evaluation images"
    if several:
        _line(axes, curves.epochs, curves.figures.get("loss"), f"NLL of the networks, {images}", COLOURS[1])
    whole = "ensemble" if several else "network"
    _line(axes, curves.epochs, curves.figures.get("ensemble_nll"), f"NLL of the {whole}, {images}", COLOURS[2])
    held_out = curves.figures.get("val_ensemble_nll")
    _line(axes, curves.epochs, held_out, f"NLL of the {whole}, held-out images", COLOURS[2], style="--")


def _line(
    axes: Any,
    places: np.ndarray,
    values: np.ndarray | None,
    label: str | None,
    colour: str,
    *,
    style: str = "-",
    width: float = 1.4,
    alpha: float = 1.0,
) -> None:
    """A curve, with points where it has few; none where there are no values."""
    if values is not None:
        marker = "o" if len(places) < 3 else None
        axes.plot(
            places, values, color=colour, linestyle=style, linewidth=width, marker=marker, alpha=alpha, label=label
        )


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


def _shorten(name: str) -> str:
    return name if len(name) <= LONGEST_NAME else name[: LONGEST_NAME - 1] + "…"


def _numbers(values: Any) -> np.ndarray:
    """Values as floats; what is missing becomes a gap in the curve."""
    return np.array([float("nan") if value in (None, "") else float(value) for value in values])

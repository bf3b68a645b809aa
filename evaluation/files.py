"""What an evaluation shows and writes: the table, results.json, per_class.csv, confusion.png. K classes."""

import csv
import io
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from evaluation.latency import Latency, as_plain, format_latencies, plot_accuracy_latency
from evaluation.passes import Evaluation
from record.checkpoint import write_file
from record.plots import plot_confusion
from record.run_folder import RESULTS, as_json
from utils.errors import WriteError, reason

FIGURES = ("acc1", "acc5", "nll", "brier", "ece")


def evaluation_results(
    evaluation: Evaluation, classes: Sequence[str], *, skipped: int, seconds: float
) -> dict[str, Any]:
    """The figures of an evaluation as results.json has them: percent, nats and [0, 1].

    Args:
        classes: K names.
        skipped: images that could not be read.
        seconds: that the pass took.
    """
    figures, confusion_KK = evaluation.figures, evaluation.confusion
    per_class_K = 100.0 * confusion_KK.diagonal().double() / confusion_KK.sum(dim=1)
    return {
        "images": figures["seen"],
        "skipped": skipped,
        "networks": [
            {"network": i + 1, **{name: figures[name][i] for name in FIGURES}} for i in range(len(figures["acc1"]))
        ],
        "ensembles": figures["rules"],
        "rule": figures["rule"],
        **{f"ensemble_{name}": figures[f"ensemble_{name}"] for name in FIGURES},
        "acc1": figures["acc1"],
        "disagreement": figures["disagreement"],
        "mean_pairwise_js": figures["js_divergence"],
        "per_class_acc": dict(zip(classes, per_class_K.tolist(), strict=True)),
        "seconds": round(seconds, 3),
        "images_per_second": round(figures["seen"] / max(seconds, 1e-9), 1),
    }


def format_table(results: Mapping[str, Any]) -> str:
    """Every network and every ensemble rule as a Markdown table; the reported rule is marked."""
    rows = [(f"network {row['network']}", row) for row in results["networks"]]
    for rule, row in results["ensembles"].items():
        rows.append((f"{rule} (reported)" if rule == results["rule"] else rule, row))
    lines = ["| | top-1 % | top-5 % | NLL | Brier | ECE |", "|---|---:|---:|---:|---:|---:|"]
    for name, row in rows:
        cells = [_cell(row[figure], 2 if figure.startswith("acc") else 4) for figure in FIGURES]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    closing = f"{results['images']} images"
    if len(results["networks"]) > 1:
        disagreement, js = results["disagreement"], results["mean_pairwise_js"]
        closing += (
            f"; two networks disagree on {_cell(disagreement and 100 * disagreement, 2)} % of them, "
            f"their mean JS divergence is {_cell(js, 4)} nats"
        )
    lines += ["", f"{closing}."]
    return "\n".join(lines)


def _cell(value: float | None, digits: int) -> str:
    return "not finite" if value is None else f"{value:.{digits}f}"


def write_evaluation(results: Mapping[str, Any], confusion_KK: Tensor, classes: Sequence[str], folder: Path) -> str:
    """Write all files of an evaluation; returns the table.

    Raises:
        WriteError: a file cannot be written.
    """
    table = format_table(results)
    accuracies, counts = results["per_class_acc"], confusion_KK.sum(dim=1).tolist()
    rows = [(i, name, counts[i], f"{accuracies[name]:.4f}") for i, name in enumerate(classes)]
    write_file(folder / RESULTS, as_json(results))
    write_file(folder / "table.md", table + "\n")
    write_file(folder / "per_class.csv", csv_text(("class", "name", "images", "acc1"), rows))
    with _written(folder / "confusion.png") as path:
        plot_confusion(confusion_KK.numpy(), classes, path)
    return table


def write_latencies(rows: Sequence[Latency], folder: Path) -> str:
    """Write latency.md, latency.json and latency.png; returns the table.

    Raises:
        WriteError: a file cannot be written.
    """
    table = format_latencies(rows)
    write_file(folder / "latency.md", table + "\n")
    write_file(folder / "latency.json", json.dumps(as_plain(rows), indent=2) + "\n")
    with _written(folder / "latency.png") as path:
        plot_accuracy_latency(rows, path)
    return table


@contextmanager
def _written(path: Path) -> Iterator[Path]:
    """The path; where Matplotlib cannot write it, that is a WriteError."""
    try:
        yield path
    except OSError as error:
        raise WriteError(f"{path}: could not be written: {reason(error)}.") from None


def csv_text(titles: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """The contents of a CSV file."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(titles)
    writer.writerows(rows)
    return text.getvalue()

"""What an evaluation shows and writes: table.md and .csv, results.json, per_class.csv, confusion.png. K classes."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from evaluation.latency import Latency, as_plain, format_latencies, plot_accuracy_latency
from evaluation.metrics import in_order, metrics
from evaluation.passes import Evaluation
from evaluation.per_class import PerClass
from record.checkpoint import write_file
from record.plots import plot_confusion
from record.run_folder import RESULTS, as_json
from record.tables import csv_table
from utils.errors import WriteError, reason

MEANS = {"balanced_acc": "balanced accuracy", "macro_f1": "macro F1"}  # below the table
_SPLITS = {"val": "validation ", "test": "test "}


def evaluation_results(
    evaluation: Evaluation, classes: Sequence[str], *, skipped: int, seconds: float
) -> dict[str, Any]:
    """The figures of an evaluation as results.json has them, in the units of each metric.

    Args:
        classes: K names.
        skipped: images that could not be read.
        seconds: that the pass took.
    """
    figures, confusion_KK = evaluation.figures, evaluation.confusion
    per_class = PerClass.of(confusion_KK)
    of_rows = in_order([*figures["rules"][figures["rule"]]])
    together = _of_all_networks(figures)
    return {
        "images": figures["seen"],
        "skipped": skipped,
        "networks": [
            {"network": i + 1, **{name: figures[name][i] for name in of_rows}} for i in range(len(figures["acc1"]))
        ],
        "ensembles": {rule: {name: row[name] for name in of_rows} for rule, row in figures["rules"].items()},
        "rule": figures["rule"],
        **{f"ensemble_{name}": figures[f"ensemble_{name}"] for name in of_rows},
        "acc1": figures["acc1"],
        **{name: figures[name] for name in together},
        **per_class.summary(),
        "per_class_acc": dict(zip(classes, per_class.recall_K.tolist(), strict=True)),
        "per_class": dict(zip(classes, per_class.rows(), strict=True)),
        "seconds": round(seconds, 3),
        "images_per_second": round(figures["seen"] / max(seconds, 1e-9), 1),
    }


def _rows(results: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """(name, figures) of every network and every ensemble rule; the reported rule is marked.

    One network is its own ensemble by every rule, and stands there once.
    """
    if len(results["networks"]) == 1:
        return [("network", results["networks"][0])]
    rows = [(f"network {row['network']}", row) for row in results["networks"]]
    for rule, row in results["ensembles"].items():
        rows.append((f"{rule} (reported)" if rule == results["rule"] else rule, row))
    return rows


def _columns(results: Mapping[str, Any]) -> list[str]:
    """Names of the metrics that every row has, in their order."""
    return in_order([name for name in results["networks"][0] if name != "network"])


def _of_all_networks(figures: Mapping[str, Any]) -> list[str]:
    """Names of the metrics among the figures that concern all networks together, in their order."""
    return in_order([name for name in figures if name in metrics and not metrics.get(name).of_rows])


def _percent(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.2f} %"


def format_table(results: Mapping[str, Any]) -> str:
    """Every network and every ensemble rule as a Markdown table, and what concerns all networks below it."""
    columns = {name: metrics.get(name) for name in _columns(results)}
    lines = [f"| | {' | '.join(metric.title for metric in columns.values())} |"]
    lines.append(f"|---|{'---:|' * len(columns)}")
    for name, row in _rows(results):
        cells = [metric.cell(row[column]) for column, metric in columns.items()]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    shares = (f"{title} {_percent(results[name])}" for name, title in MEANS.items())
    closing = f"{results['images']} {_SPLITS.get(results.get('split', ''), '')}images; {', '.join(shares)}"
    if len(results["networks"]) > 1:
        sentences = (metrics.get(name).sentence(results[name]) for name in _of_all_networks(results))
        closing += f"; {', '.join(sentences)}"
    lines += ["", f"{closing}."]
    return "\n".join(lines)


def write_evaluation(results: Mapping[str, Any], confusion_KK: Tensor, classes: Sequence[str], folder: Path) -> str:
    """Write all files of an evaluation; returns the table.

    Raises:
        WriteError: a file cannot be written.
    """
    table = format_table(results)
    counts = confusion_KK.sum(dim=1).tolist()
    rows = []
    for i, name in enumerate(classes):
        of_class = results["per_class"][name]
        shares = [of_class[figure] for figure in ("recall", "precision", "recall", "f1")]
        # a class without images has none
        rows.append((i, name, counts[i], *("" if share is None else f"{share:.4f}" for share in shares)))
    write_file(folder / RESULTS, as_json(results))
    write_file(folder / "table.md", table + "\n")
    columns = _columns(results)
    figures = [(name, *(row[column] for column in columns)) for name, row in _rows(results)]
    write_file(folder / "table.csv", csv_table(("row", *columns), figures))
    write_file(
        folder / "per_class.csv", csv_table(("class", "name", "images", "acc1", "precision", "recall", "f1"), rows)
    )
    with written(folder / "confusion.png") as path:
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
    with written(folder / "latency.png") as path:
        plot_accuracy_latency(rows, path)
    return table


@contextmanager
def written(path: Path) -> Iterator[Path]:
    """The path; where Matplotlib cannot write it, that is a WriteError."""
    try:
        yield path
    except OSError as error:
        raise WriteError(f"{path}: could not be written: {reason(error)}.") from None

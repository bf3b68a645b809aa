"""What an evaluation shows and writes."""

import csv
import json
import re
from pathlib import Path

import pytest
import torch

from evaluation.counts import EvaluationCounts
from evaluation.files import evaluation_results, format_table, write_evaluation
from evaluation.passes import Evaluation
from record.tables import csv_table
from utils.errors import WriteError

CLASSES = ("cat", "dog", "owl")


def evaluation(num_networks: int = 2) -> Evaluation:
    generator = torch.Generator().manual_seed(1)
    counts = EvaluationCounts(num_networks, 3, "mean_softmax")
    counts.update(torch.randn(num_networks, 20, 3, generator=generator), torch.arange(20) % 3)
    return Evaluation(counts.result(), counts.confusion_KK)


def test_results_say_each_figure_once_by_its_name() -> None:
    found = evaluation()
    results = evaluation_results(found, CLASSES, skipped=2, seconds=0.5)
    json.dumps(results, allow_nan=False)
    assert (results["images"], results["skipped"], results["images_per_second"]) == (20, 2, 40.0)
    assert results["rule"] == "mean_softmax"
    for name in ("acc1", "acc5", "nll", "brier", "ece"):
        assert [row[name] for row in results["networks"]] == found.figures[name]
        assert results[f"ensemble_{name}"] == results["ensembles"]["mean_softmax"][name]
    assert results["disagreement"] == found.figures["disagreement"]
    assert results["mean_pairwise_js"] == found.figures["js_divergence"]
    diagonal = found.confusion.diagonal()
    expected = {name: 100 * int(diagonal[i]) / int(found.confusion[i].sum()) for i, name in enumerate(CLASSES)}
    assert results["per_class_acc"] == pytest.approx(expected)


def test_the_table_marks_the_rule_and_says_what_concerns_all_networks() -> None:
    results = evaluation_results(evaluation(), CLASSES, skipped=0, seconds=1.0)
    lines = format_table(results).splitlines()
    assert lines[0].startswith("| | top-1 % | top-5 % | NLL | Brier | ECE |")
    assert [line.split(" | ")[0] for line in lines[2:5]] == ["| network 1", "| network 2", "| mean_logits"]
    assert sum("(reported)" in line for line in lines) == 1
    assert re.match(r"20 images; balanced accuracy [\d.]+ %, macro F1 [\d.]+ %; two networks disagree on ", lines[-1])
    assert lines[-1].endswith(" nats.")
    results["networks"][0]["nll"] = None
    assert "| not finite |" in format_table(results)


def test_one_network_has_nobody_to_disagree_with() -> None:
    results = evaluation_results(evaluation(1), CLASSES, skipped=0, seconds=1.0)
    header, _, row, *_, closing = format_table(results).splitlines()
    assert header.startswith("| | top-1 %")
    assert row.startswith("| network | ")
    assert re.fullmatch(r"20 images; balanced accuracy [\d.]+ %, macro F1 [\d.]+ %\.", closing)
    assert format_table(results).count("\n|") == 2  # it is its own ensemble by every rule, and stands there once


def test_every_file_is_written_and_a_full_disk_is_named(tmp_path: Path) -> None:
    found = evaluation()
    results = evaluation_results(found, CLASSES, skipped=0, seconds=1.0)
    table = write_evaluation(results, found.confusion, CLASSES, tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"results.json", "table.md", "table.csv", "per_class.csv", "confusion.png"}
    assert (tmp_path / "table.md").read_text() == table + "\n"
    with (tmp_path / "per_class.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["name"], int(row["images"])) for row in rows] == [("cat", 7), ("dog", 7), ("owl", 6)]
    for row in rows:
        expected = results["per_class"][row["name"]]
        assert row["recall"] == row["acc1"] == f"{results['per_class_acc'][row['name']]:.4f}"
        assert (row["precision"], row["f1"]) == (f"{expected['precision']:.4f}", f"{expected['f1']:.4f}")
    with (tmp_path / "table.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert float(rows[1]["ece"]) == results["networks"][1]["ece"]
    with pytest.raises(WriteError, match="nowhere"):
        write_evaluation(results, found.confusion, CLASSES, tmp_path / "nowhere")


def test_csv_quotes_what_has_to_be_quoted() -> None:
    assert csv_table(("a", "b"), [(1, "x,y"), (None, 'say "so"')]) == 'a,b\n1,"x,y"\n,"say ""so"""\n'

"""The registry of metrics: what every one of them promises, and that a new one needs no edit elsewhere."""

import csv
import json
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

import eval as evaluation_program
import train_split
from evaluation.counts import EvaluationCounts, logits_figures
from evaluation.ensemble import RULES
from evaluation.metrics import CountedMetric, LogitsMetric, Scored, Shape, Sums, counted, in_order, metrics
from evaluation.run import further_metrics
from evaluation.selective import aurc
from utils.errors import UserError

GOLDEN = json.loads((Path(__file__).parent / "golden" / "answers.json").read_text())["edges"]["selective"]


def draw(num_networks: int = 2, images: int = 30, num_classes: int = 4) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    logits_SNK = torch.randn(num_networks, images, num_classes, generator=generator)
    return logits_SNK, torch.randint(num_classes, (images,), generator=generator)


class MacroF1(CountedMetric):
    """Mean over the classes of F1 = 2 hits / (2 hits + misses + false alarms); absent classes count 0."""

    title, digits = "macro F1", 3

    def zeros(self, shape: Shape) -> dict[str, Tensor]:
        return {name: shape.counts(shape.num_rows, shape.num_classes) for name in ("hits", "labelled", "chosen")}

    def add(self, sums: Sums, batch: Scored) -> None:
        hits_RB = (batch.predictions_RB == batch.labels_B).long()
        labels_RB = batch.labels_B.expand_as(batch.predictions_RB)
        sums["hits"].scatter_add_(1, labels_RB, hits_RB)
        sums["labelled"].scatter_add_(1, labels_RB, torch.ones_like(labels_RB))
        sums["chosen"].scatter_add_(1, batch.predictions_RB, torch.ones_like(labels_RB))

    def figure(self, sums: Sums, seen: Tensor, shape: Shape) -> Tensor:
        together = (sums["labelled"] + sums["chosen"]).clamp(min=1)
        return (2 * sums["hits"] / together).mean(dim=1) + 0 / seen


class Spread(LogitsMetric):
    """Largest logit over all networks and images."""

    of_rows = False
    title = "largest logit"

    def of_networks(self, logits_SNK: Tensor, labels_N: Tensor) -> float:
        return float(logits_SNK.max())


@pytest.fixture
def test_f1() -> Iterator[None]:
    """Two more registered metrics, gone again afterwards."""
    metrics.add("test_f1", MacroF1())
    metrics.add("largest", Spread())
    yield
    for name in ("test_f1", "largest"):
        del metrics._items[name]


@pytest.mark.parametrize("name", metrics.names())
def test_every_metric_has_a_finite_figure_and_a_heading(name: str) -> None:
    metric = metrics.get(name)
    assert metric.title
    assert type(metric).__doc__
    logits_SNK, labels_N = draw()
    if isinstance(metric, LogitsMetric):
        result = logits_figures([name], logits_SNK, labels_N, "mean_softmax")
    else:
        counts = EvaluationCounts(2, 4, "mean_softmax")
        counts.update(logits_SNK, labels_N)
        result = counts.result()
    if not metric.of_rows:
        assert isinstance(result[name], float)
        assert metric.cell(None) in metric.sentence(None)
        return
    assert len(result[name]) == 2
    assert result["rules"].keys() == set(RULES)
    assert result[f"ensemble_{name}"] == result["rules"]["mean_softmax"][name]
    assert all(isinstance(row[name], float) for row in result["rules"].values())


def test_no_metric_takes_the_name_of_something_else_in_the_results() -> None:
    taken = {"seen", "rule", "rules", "extra", "images", "skipped", "network", "networks", "ensembles", "seconds"}
    assert not taken & {*metrics.names(), *(metrics.get(name).also for name in metrics.names())}


@pytest.mark.parametrize("name", counted())
def test_counted_metrics_do_not_depend_on_the_cut(name: str) -> None:
    logits_SNK, labels_N = draw(3)
    results = []
    for size in (30, 7, 1):
        counts = EvaluationCounts(3, 4, "max_logits")
        for logits_SBK, labels_B in zip(logits_SNK.split(size, dim=1), labels_N.split(size), strict=True):
            counts.update(logits_SBK, labels_B)
        results.append(counts.result())
    key = f"ensemble_{name}" if metrics.get(name).of_rows else name
    assert [result[key] for result in results] == pytest.approx([results[0][key]] * 3, rel=1e-12)


def test_tables_keep_their_order() -> None:
    assert in_order(["ece", "nll", "acc5", "brier", "acc1"]) == ["acc1", "acc5", "nll", "brier", "ece"]


@pytest.mark.parametrize("case", GOLDEN, ids=range(len(GOLDEN)))
def test_area_under_the_risk_coverage_curve(case: dict) -> None:
    confidence = [math.nan if value is None else value for value in case["confidence"]]
    found = aurc(torch.tensor(confidence, dtype=torch.float64), torch.tensor(case["wrong"], dtype=torch.bool))
    assert found == pytest.approx(case["aurc"], rel=1e-9, abs=1e-12)


def test_area_under_the_curve_of_nothing_and_of_nan() -> None:
    assert (
        logits_figures(["aurc"], torch.zeros(1, 0, 3), torch.zeros(0, dtype=torch.int64), "mean_logits")[
            "ensemble_aurc"
        ]
        is None
    )
    log_probs_NK = torch.tensor([[0.9, 0.1], [torch.nan, torch.nan], [0.6, 0.4]], dtype=torch.float64).log()
    # the NaN is the least confident, and wrong
    assert metrics.get("aurc").of_row(log_probs_NK, torch.tensor([0, 1, 0])) == pytest.approx((0 + 0 + 1 / 3) / 3)


def test_a_new_metric_appears_everywhere_without_an_edit(
    tmp_path: Path, test_f1: None, capsys: pytest.CaptureFixture[str], logging_restored: None
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = tmp_path / "run"
    argv = ["--dataset", "digits", "--arch", "resnet20", "--split_factor", "2", "--batch_size", "96", "--no_cuda"]
    argv += ["--amp_dtype", "fp32", "--seed", "1", "--model_dir", str(run), "--epochs", "1", "--max_steps", "2"]
    assert train_split.main(argv) == 0
    (line,) = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines() if '"eval"' in line]
    assert 0 < line["test"]["ensemble_test_f1"] < 1
    assert len(line["test"]["test_f1"]) == 2
    with (run / "summary.csv").open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert float(row["ensemble_test_f1"]) == pytest.approx(line["test"]["ensemble_test_f1"], rel=1e-5)
    events = EventAccumulator(str(run / "val"))
    events.Reload()
    assert events.Scalars("eval/ensemble_test_f1")[0].value == pytest.approx(line["test"]["ensemble_test_f1"])
    capsys.readouterr()

    argv = ["--resume", str(run / "model_best.pth.tar"), "--no_cuda", "--metrics", "aurc,largest"]
    assert evaluation_program.main(argv) == 0
    table = capsys.readouterr().out
    assert "macro F1 |" in table.splitlines()[0]
    assert "AURC |" in table.splitlines()[0]
    assert "largest logit" in table
    results = json.loads((run / "eval" / "results.json").read_text())
    assert results["ensemble_test_f1"] == pytest.approx(line["test"]["ensemble_test_f1"], rel=1e-6)
    assert results["networks"][1].keys() >= {"test_f1", "aurc"}
    assert results["largest"] > 0
    with (run / "eval" / "table.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["row"] for row in rows[:2]] == ["network 1", "network 2"]
    assert float(rows[0]["aurc"]) == results["networks"][0]["aurc"]


def test_names_that_are_no_further_metric_are_refused() -> None:
    assert further_metrics(None) == []
    assert further_metrics("aurc") == ["aurc"]
    with pytest.raises(UserError, match="--metrics nll: every evaluation has it"):
        further_metrics("aurc,nll")
    with pytest.raises(UserError, match=r"--metrics 'aurk' is not a known metric.*Did you mean 'aurc'"):
        further_metrics("aurk")

"""Evaluation counts against plain loops, and their independence of how the data is cut."""

import json
import math
from functools import partial
from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from benchmarks.passes import dispatched
from evaluation.counts import EvaluationCounts
from evaluation.ensemble import RULES, ensemble_log_probs
from evaluation.metrics import label_ranks, mean_pairwise_js
from evaluation.metrics.ece import NUM_BINS
from utils.errors import UserError


def draw(num_networks: int, images: int, num_classes: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits_SBK = 2 * torch.randn(num_networks, images, num_classes, generator=generator)
    return logits_SBK, torch.randint(num_classes, (images,), generator=generator)


def evaluate(logits_SBK: Tensor, labels_B: Tensor, cuts: list[int], rule: str = "mean_logits") -> EvaluationCounts:
    counts = EvaluationCounts(len(logits_SBK), logits_SBK.shape[2], rule)
    for first, last in zip([0, *cuts], [*cuts, len(labels_B)], strict=True):
        counts.update(logits_SBK[:, first:last], labels_B[first:last])
    return counts


def figures_by_hand(probs: list[list[float]], labels: list[int]) -> dict[str, float]:
    """Top-1, top-5, NLL, Brier and ECE of one row of predictions, image by image."""
    seen = len(labels)
    correct1 = correct5 = nll = brier = 0.0
    bins: list[list[tuple[float, bool]]] = [[] for _ in range(NUM_BINS)]
    for p, label in zip(probs, labels, strict=True):
        order = sorted(range(len(p)), key=lambda k: (-p[k], k))
        correct1 += order[0] == label
        correct5 += label in order[:5]
        nll -= math.log(p[label])
        brier += sum((v - (k == label)) ** 2 for k, v in enumerate(p))
        confidence = max(p)
        index = next(m for m in range(NUM_BINS) if confidence <= (m + 1) / NUM_BINS or m == NUM_BINS - 1)
        bins[index].append((confidence, order[0] == label))
    ece = sum(abs(sum(right for _, right in b) - sum(confidence for confidence, _ in b)) for b in bins)
    return {
        "acc1": 100 * correct1 / seen,
        "acc5": 100 * correct5 / seen,
        "nll": nll / seen,
        "brier": brier / seen,
        "ece": ece / seen,
    }


def js_by_hand(p: list[float], q: list[float]) -> float:
    mean = [(a + b) / 2 for a, b in zip(p, q, strict=True)]
    return sum(0.5 * a * math.log(a / m) for x in (p, q) for a, m in zip(x, mean, strict=True))


@pytest.mark.parametrize(("num_networks", "num_classes"), [(1, 7), (2, 2), (3, 10), (4, 3)])
@pytest.mark.parametrize("rule", ["mean_logits", "max_softmax"])
def test_figures_equal_plain_loops(num_networks: int, num_classes: int, rule: str) -> None:
    logits_SBK, labels_B = draw(num_networks, 40, num_classes)
    counts = evaluate(logits_SBK, labels_B, [13], rule)
    result, labels, logits_SBK = counts.result(), labels_B.tolist(), logits_SBK.double()
    assert result["seen"] == 40
    assert result["rule"] == rule

    networks = [figures_by_hand(logits_BK.softmax(dim=-1).tolist(), labels) for logits_BK in logits_SBK]
    for name in ("acc1", "acc5", "nll", "brier", "ece"):
        assert result[name] == pytest.approx([figures[name] for figures in networks], rel=1e-10)
    for each in RULES:
        expected = figures_by_hand(ensemble_log_probs(logits_SBK, each).exp().tolist(), labels)
        assert {name: result["rules"][each][name] for name in expected} == pytest.approx(expected, rel=1e-10)
    assert {name: result[f"ensemble_{name}"] for name in result["rules"][rule]} == result["rules"][rule]

    pairs = list(combinations(logits_SBK.softmax(dim=-1).tolist(), 2))
    apart = [p.index(max(p)) != q.index(max(q)) for one, two in pairs for p, q in zip(one, two, strict=True)]
    divergences = [js_by_hand(p, q) for one, two in pairs for p, q in zip(one, two, strict=True)]
    assert result["disagreement"] == pytest.approx(sum(apart) / max(len(apart), 1))
    assert result["mean_pairwise_js"] == result["js_divergence"]
    assert result["js_divergence"] == pytest.approx(sum(divergences) / max(len(divergences), 1), abs=1e-12)

    confusion = [[0] * num_classes for _ in range(num_classes)]
    for label, prediction in zip(labels, ensemble_log_probs(logits_SBK, rule).argmax(dim=-1).tolist(), strict=True):
        confusion[label][prediction] += 1
    assert counts.confusion_KK.tolist() == confusion


@settings(max_examples=25, deadline=None)
@given(cuts=st.lists(st.integers(0, 50), max_size=5).map(sorted), shards=st.integers(1, 4), seed=st.integers(0, 9))
def test_any_cut_and_any_sharding_give_the_same(cuts: list[int], shards: int, seed: int) -> None:
    logits_SBK, labels_B = draw(3, 50, 6, seed)
    whole = evaluate(logits_SBK, labels_B, [])
    pieces = [
        evaluate(logits_SBK[:, rank::shards], labels_B[rank::shards], [min(cut, 50 // shards) for cut in cuts])
        for rank in range(shards)
    ]
    tensors = [piece.tensors() for piece in pieces]
    totals = iter([torch.stack(values).sum(dim=0) for values in zip(*tensors, strict=True)])
    pieces[0].all_reduce(lambda value: value.copy_(next(totals)))
    for found, value in zip(pieces[0].tensors(), whole.tensors(), strict=True):
        tolerance = 1e-12 if value.is_floating_point() else 0
        torch.testing.assert_close(found, value, rtol=tolerance, atol=tolerance)


def test_an_update_launches_the_same_few_operations_for_any_number_of_networks() -> None:
    counts = []
    for num_networks in (1, 2, 4):
        logits_SBK, labels_B = draw(num_networks, 20, 10)
        evaluation = EvaluationCounts(num_networks, 10, "mean_logits")
        counts.append(dispatched(partial(evaluation.update, logits_SBK, labels_B)))
    assert counts[0] < counts[1] == counts[2] <= 60


def test_more_networks_than_pairs_at_once_have_the_same_divergence(monkeypatch: pytest.MonkeyPatch) -> None:
    logits_SBK, labels_B = draw(5, 12, 4)
    expected = evaluate(logits_SBK, labels_B, []).result()["js_divergence"]
    for at_once in (1, 10):  # networks by themselves, and in twos
        monkeypatch.setattr(mean_pairwise_js, "PAIRS", at_once)
        assert evaluate(logits_SBK, labels_B, []).result()["js_divergence"] == pytest.approx(expected, rel=1e-13)


def test_equal_scores_go_by_class_index() -> None:
    scores_RBK = torch.tensor([[[1.0, 1.0, 1.0], [1.0, 1.0, 0.0], [0.0, 2.0, 2.0], [0.0, 2.0, 2.0]]])
    labels_B = torch.tensor([0, 1, 1, 2])
    assert label_ranks(scores_RBK, labels_B).tolist() == [[0, 1, 0, 1]]
    result = evaluate(scores_RBK, labels_B, []).result()
    assert result["acc1"] == [50.0]
    assert result["acc5"] == [100.0]


def test_bins_are_closed_above() -> None:
    """Two classes of equal probability: confidence 1/2 exactly, in the eighth of fifteen bins."""
    counts = evaluate(torch.zeros(1, 2, 2), torch.tensor([0, 1]), [])
    assert counts.sums["ece"]["seen"][0].tolist() == [0] * 7 + [2] + [0] * 7
    certain = evaluate(torch.tensor([[[1e4, -1e4]]]), torch.tensor([0]), [])
    assert certain.sums["ece"]["seen"][0].tolist() == [0] * 14 + [1]


def test_low_precision_logits_and_certainty_give_finite_numbers() -> None:
    logits_SBK = torch.tensor([[[1e4, -1e4, 0.0]], [[-1e4, 1e4, 0.0]]], dtype=torch.float16)
    result = evaluate(logits_SBK, torch.tensor([1]), []).result()
    json.dumps(result, allow_nan=False)
    assert result["acc1"] == [0.0, 100.0]
    assert result["js_divergence"] == pytest.approx(math.log(2))
    assert result["disagreement"] == 1.0


def test_a_nan_is_never_right_and_never_in_the_json() -> None:
    logits_SBK = torch.tensor([[[math.nan, 0.0], [math.nan, math.nan], [0.0, 1.0]]])
    result = evaluate(logits_SBK, torch.tensor([1, 0, 1]), []).result()
    json.dumps(result, allow_nan=False)
    assert result["acc1"] == [pytest.approx(100 / 3)]
    assert result["nll"] == [None]


def test_no_image_at_all() -> None:
    counts = EvaluationCounts(2, 3, "mean_logits")
    counts.update(torch.zeros(2, 0, 3), torch.zeros(0, dtype=torch.int64))
    result = counts.result()
    json.dumps(result, allow_nan=False)
    assert result["seen"] == 0
    assert result["ensemble_acc1"] is None


def test_update_reads_nothing_back() -> None:
    """On the meta device any read of a value fails."""
    counts = EvaluationCounts(2, 3, "max_logits", device="meta")
    counts.update(torch.zeros(2, 4, 3, device="meta"), torch.zeros(4, dtype=torch.int64, device="meta"))


def test_wrong_shapes_and_rules_are_refused() -> None:
    counts = EvaluationCounts(2, 3, "mean_logits")
    with pytest.raises(ValueError, match=r"expected logits \(2, B, 3\), got \(1, 4, 3\)"):
        counts.update(torch.zeros(1, 4, 3), torch.zeros(4, dtype=torch.int64))
    with pytest.raises(UserError, match="Ensemble rule 'median' is not known"):
        EvaluationCounts(2, 3, "median")

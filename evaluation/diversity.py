"""How different the networks are, and what the ensemble gains by it. S networks, N images, K classes.

Measures of pairs: Kuncheva & Whitaker (2003). Gains: accuracy as a count of both directions (ours); NLL: Heskes (1998)
for the geometric mean, Wood et al. (arXiv:2301.03962); Brier: Krogh & Vedelsby (1995). All in float64.
"""

import math
import warnings
from typing import Any

import torch
from torch import Tensor

from evaluation.calibration import chunks
from evaluation.ensemble import ensemble_scores
from evaluation.ood import expected_entropy, mean_log_probs
from evaluation.selective import entropy_of

PAIRS = ("disagreement", "q_statistic", "kappa", "error_correlation", "double_fault")


def diversity_figures(logits_SNK: Tensor, labels_N: Tensor, rule: str) -> dict[str, Any]:
    """Matrices of all pairs with their means, and the accounts of accuracy, NLL, Brier score and entropy.

    Args:
        logits_SNK: N >= 1 images.
        rule: of the ensemble whose accuracy is accounted for.
    """
    choices_SN = logits_SNK.argmax(dim=-1)
    matrices = pair_matrices(choices_SN, labels_N)
    return {**matrices, "means": {name: _mean(matrices[name]) for name in PAIRS}} | {
        "accuracy": accuracy_account(logits_SNK, choices_SN == labels_N, labels_N, rule),
        **likelihood_accounts(logits_SNK, labels_N),
    }


def pair_matrices(choices_SN: Tensor, labels_N: Tensor) -> dict[str, list[list[float | None]]]:
    """PAIRS as S x S lists; None on the diagonal (but disagreement 0) and where a denominator is 0."""
    size = len(choices_SN)
    found: dict[str, list[list[float | None]]] = {name: [[None] * size for _ in range(size)] for name in PAIRS}
    for i in range(size):
        found["disagreement"][i][i] = 0.0
        for j in range(i + 1, size):
            for name, value in _pair(choices_SN[i], choices_SN[j], labels_N).items():
                found[name][i][j] = found[name][j][i] = value
    return found


def _pair(first_N: Tensor, second_N: Tensor, labels_N: Tensor) -> dict[str, float | None]:
    a_N, b_N = first_N == labels_N, second_N == labels_N
    n11, n10 = int((a_N & b_N).sum()), int((a_N & ~b_N).sum())
    n01, n00 = int((~a_N & b_N).sum()), int((~a_N & ~b_N).sum())
    odds = n11 * n00 - n10 * n01
    spread = math.sqrt((n11 + n10) * (n01 + n00) * (n11 + n01) * (n10 + n00))
    return {
        "disagreement": float((first_N != second_N).double().mean()),
        "q_statistic": _ratio(odds, n11 * n00 + n10 * n01),
        "kappa": _kappa(first_N, second_N),
        "error_correlation": _ratio(odds, spread),
        "double_fault": n00 / len(labels_N),
    }


def _ratio(top: float, bottom: float) -> float | None:
    return top / bottom if bottom else None


def _kappa(first_N: Tensor, second_N: Tensor) -> float | None:
    """Cohen's kappa of the predicted classes; None where chance alone would always agree."""
    if len(torch.cat([first_N, second_N]).unique()) == 1:
        return None
    from sklearn.metrics import cohen_kappa_score  # slow to load

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about denominators that are 0
        value = float(cohen_kappa_score(first_N.numpy(), second_N.numpy()))
    return value if math.isfinite(value) else None


def _mean(matrix: list[list[float | None]]) -> float | None:
    values = [value for i, row in enumerate(matrix) for value in row[i + 1 :] if value is not None]
    return sum(values) / len(values) if values else None


def accuracy_account(logits_SNK: Tensor, right_SN: Tensor, labels_N: Tensor, rule: str) -> dict[str, float]:
    """In percent: ensemble = mean_network + rescued - spoiled; images that any, and that all networks get right."""
    parts = [ensemble_scores(logits_SNK[:, p].double(), rule).argmax(dim=-1) for p in chunks(len(labels_N))]
    ensemble_N = torch.cat(parts) == labels_N
    rescued, spoiled = (ensemble_N & ~right_SN).double().mean(), (~ensemble_N & right_SN).double().mean()
    figures = {
        "ensemble": ensemble_N.double().mean(),
        "mean_network": right_SN.double().mean(),
        "gain": rescued - spoiled,
        "rescued": rescued,
        "spoiled": spoiled,
        "any_right": right_SN.any(dim=0).double().mean(),
        "all_right": right_SN.all(dim=0).double().mean(),
    }
    return {name: 100 * float(value) for name, value in figures.items()}


def likelihood_accounts(logits_SNK: Tensor, labels_N: Tensor) -> dict[str, dict[str, float]]:
    """The accounts of NLL, Brier score and entropy, both sides of each.

    NLL of the geometric (arithmetic) mean = mean network NLL - ambiguity_geometric (ambiguity_arithmetic); Brier score
    of the arithmetic mean = mean network Brier score - ambiguity; total entropy = expected + mutual_information.
    """
    images, networks = len(labels_N), len(logits_SNK)
    names = (
        ("nll", ("mean_network", "geometric", "ambiguity_geometric", "arithmetic", "ambiguity_arithmetic")),
        ("brier", ("mean_network", "arithmetic", "ambiguity")),
        ("entropy", ("total", "expected", "mutual_information")),
    )
    sums = {kind: dict.fromkeys(own, 0.0) for kind, own in names}
    for part in chunks(images):
        logits_SBK, labels_B1 = logits_SNK[:, part].double(), labels_N[part, None]
        log_probs_SBK = logits_SBK.log_softmax(dim=-1)
        geometric_BK = log_probs_SBK.mean(dim=0).log_softmax(dim=-1)
        arithmetic_BK = mean_log_probs(logits_SBK)
        label_SB = log_probs_SBK.gather(-1, labels_B1.expand(networks, -1, -1)).squeeze(-1)
        geometric_B, arithmetic_B = (mean.gather(1, labels_B1).squeeze(1) for mean in (geometric_BK, arithmetic_BK))
        probs_SBK, mean_BK = log_probs_SBK.exp(), arithmetic_BK.exp()
        label_BK = torch.zeros_like(mean_BK).scatter_(1, labels_B1, 1.0)
        # KL(g || p_s) = sum_k g (log g - log p_s); where g is 0 it adds nothing
        apart_SBK = torch.where(geometric_BK.exp() == 0, 0.0, geometric_BK.exp() * (geometric_BK - log_probs_SBK))
        expected_B = expected_entropy(logits_SBK)
        total_B = entropy_of(arithmetic_BK)
        added = {
            "nll": {
                "mean_network": -label_SB.mean(dim=0),
                "geometric": -geometric_B,
                "ambiguity_geometric": apart_SBK.sum(dim=-1).mean(dim=0),
                "arithmetic": -arithmetic_B,
                "ambiguity_arithmetic": arithmetic_B - label_SB.mean(dim=0),
            },
            "brier": {
                "mean_network": (probs_SBK - label_BK).square().sum(dim=-1).mean(dim=0),
                "arithmetic": (mean_BK - label_BK).square().sum(dim=-1),
                "ambiguity": (probs_SBK - mean_BK).square().sum(dim=-1).mean(dim=0),
            },
            "entropy": {"total": total_B, "expected": expected_B, "mutual_information": total_B - expected_B},
        }
        for kind, own in added.items():
            for name, value_B in own.items():
                sums[kind][name] += float(value_B.sum())
    return {kind: {name: value / images for name, value in own.items()} for kind, own in sums.items()}

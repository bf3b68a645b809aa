"""What answers are worth if only the most confident ones are given. N images, B of a batch, K classes.

Selective classification: Geifman & El-Yaniv (arXiv:1705.08500); AURC and its excess: Geifman et al.
(arXiv:1805.08206); AUGRC: Traub et al. (arXiv:2407.01032). Images of equal confidence have no order: each counts with
the error rate of its group. NaN is the lowest confidence.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from evaluation.options import CONFIDENCES

RISK = 0.05  # of coverage_at_risk
COVERAGE = 0.8  # of risk_at_coverage
SLACK = 1e-9  # images, that a share of N may be off by rounding


def plogp(log_probs_BK: Tensor) -> Tensor:
    """p log p for log-probabilities of any shape; 0 where p is 0."""
    probs_BK = log_probs_BK.exp()
    return torch.where(probs_BK == 0, 0.0, probs_BK * log_probs_BK)


def entropy_of(log_probs_BK: Tensor) -> Tensor:
    """Entropy in nats: (..., K) -> (...)."""
    return -plogp(log_probs_BK).sum(dim=-1)


def confidence_of(scores_BK: Tensor, kind: str) -> Tensor:
    """How sure softmax(scores) is: (..., K) -> (...), float64.

    Args:
        kind: "max_prob", the largest probability, in [1/K, 1]; "margin", the largest minus the second largest, in
            [0, 1]; "entropy", 1 - H / log K, in [0, 1]. Of one class the last two are 1.
    """
    log_probs_BK = scores_BK.double().log_softmax(dim=-1)
    num_classes = log_probs_BK.shape[-1]
    if kind == "max_prob":
        return log_probs_BK.amax(dim=-1).exp()
    if num_classes == 1:
        return torch.where(log_probs_BK[..., 0].isnan(), log_probs_BK[..., 0], 1.0)
    if kind == "margin":
        best_B2 = log_probs_BK.topk(2, dim=-1).values.exp()
        return best_B2[..., 0] - best_B2[..., 1]
    if kind == "entropy":
        return (1 - entropy_of(log_probs_BK) / math.log(num_classes)).clamp(0, 1)
    raise ValueError(f"confidence {kind!r}: expected one of {', '.join(CONFIDENCES)}")


class RiskCoverage(NamedTuple):
    """Images in groups of equal confidence, the most confident first.

    risks_N: mean of the first k grouped errors, k = 1 ... N. ends_G: int64, images up to the end of each group.
    confidence_G: of each group; that of NaN is -inf.
    """

    risks_N: Tensor
    ends_G: Tensor
    confidence_G: Tensor


def risk_coverage(confidence_N: Tensor, wrong_N: Tensor) -> RiskCoverage:
    """The risk-coverage curve of any confidences [N] and errors, bool [N], both on the CPU."""
    lowest_first = confidence_N.double().nan_to_num(nan=-math.inf)
    unique_G, group_N, size_G = lowest_first.neg().unique(return_inverse=True, return_counts=True)
    rate_G = torch.zeros(len(size_G), dtype=torch.float64).index_add_(0, group_N, wrong_N.double()) / size_G
    grouped_N = rate_G.repeat_interleave(size_G)
    ranks_N = torch.arange(1, len(grouped_N) + 1)
    return RiskCoverage(grouped_N.cumsum(0) / ranks_N, size_G.cumsum(0), -unique_G)


def aurc(confidence_N: Tensor, wrong_N: Tensor) -> float:
    """Area under the risk-coverage curve: mean over k of the risk of the k most confident; NaN without an image."""
    return float(risk_coverage(confidence_N, wrong_N).risks_N.mean())


def selective_figures(confidence_N: Tensor, wrong_N: Tensor) -> dict[str, float | None]:
    """aurc, e_aurc (above that of all errors last), augrc, coverage_at_risk, risk_at_coverage and coverage_reached.

    The last three are at RISK and COVERAGE, and only at ends of groups, which a threshold can reach.

    Args:
        confidence_N, wrong_N: floats and bool, [N]; without an image every figure is None.
    """
    images = len(confidence_N)
    if not images:
        names = ("aurc", "e_aurc", "augrc", "coverage_at_risk", "risk_at_coverage", "coverage_reached")
        return dict.fromkeys(names)
    curve = risk_coverage(confidence_N, wrong_N)
    ranks_N = torch.arange(1, images + 1, dtype=torch.float64)
    right = images - int(wrong_N.sum())
    ideal = float(((ranks_N - right).clamp(min=0) / ranks_N).sum()) / images
    area = float(curve.risks_N.mean())
    kept = kept_at_coverage(curve, COVERAGE)
    return {
        "aurc": area,
        "e_aurc": area - ideal,
        "augrc": float((ranks_N / images * curve.risks_N).mean()),
        "coverage_at_risk": kept_at_risk(curve, RISK) / images,
        "risk_at_coverage": float(curve.risks_N[kept - 1]),
        "coverage_reached": kept / images,
    }


def kept_at_risk(curve: RiskCoverage, risk: float) -> int:
    """The most images that a threshold keeps with at most this risk; 0 if none does."""
    within_G = curve.ends_G[curve.risks_N[curve.ends_G - 1] <= risk + 1e-12]
    return int(within_G[-1]) if len(within_G) else 0


def kept_at_coverage(curve: RiskCoverage, coverage: float) -> int:
    """The fewest images that a threshold keeps of at least this part of all."""
    needed = math.ceil(coverage * len(curve.risks_N) - SLACK)
    return int(curve.ends_G[curve.ends_G >= needed][0])


OPERATING_POINTS: dict[str, Callable[[RiskCoverage, float], int]] = {
    "risk": kept_at_risk,
    "coverage": kept_at_coverage,
    "tpr": kept_at_coverage,
}


class OperatingPoint(NamedTuple):
    """tau: the smallest confidence that is kept, 2 where nothing is; rejected: the share that is not kept."""

    tau: float
    rejected: float


def operating_point(confidence_N: Tensor, wrong_N: Tensor, point: str, value: float) -> OperatingPoint:
    """Where a threshold stands that keeps the most images at a risk, or a share of them.

    Args:
        confidence_N, wrong_N: floats and bool, [N], N >= 1.
        point, value: "risk" and the largest risk; "coverage" or "tpr" and the share that is kept at least.
    """
    curve = risk_coverage(confidence_N, wrong_N)
    kept = OPERATING_POINTS[point](curve, value)
    if not kept:
        return OperatingPoint(2.0, 1.0)
    tau = float(curve.confidence_G[curve.ends_G == kept][0])
    return OperatingPoint(max(tau, 0.0), 1 - kept / len(confidence_N))


def curve_points(confidence_N: Tensor, wrong_N: Tensor) -> dict[str, Any]:
    """Coverage and risk at the ends of groups, for a picture: two lists."""
    curve = risk_coverage(confidence_N, wrong_N)
    return {
        "coverage": (curve.ends_G.double() / max(len(confidence_N), 1)).tolist(),
        "risk": curve.risks_N[curve.ends_G - 1].tolist(),
    }

"""The area under the risk-coverage curve: what the most confident part of the answers is worth."""

import math

import torch
from torch import Tensor

from evaluation.metrics import LogitsMetric, metrics


class AreaUnderRiskCoverage(LogitsMetric):
    """Mean over k of the error rate among the k most confident images, in [0, 1] (Geifman et al., arXiv:1805.08206).

    Confidence is the largest probability. Images of equal confidence have no order: each counts with the error rate of
    its group. NaN is the lowest confidence.
    """

    title, place = "AURC", 50

    def of_row(self, log_probs_NK: Tensor, labels_N: Tensor) -> float:
        return aurc(log_probs_NK.amax(dim=-1).exp(), log_probs_NK.argmax(dim=-1) != labels_N)


def aurc(confidence_N: Tensor, wrong_N: Tensor) -> float:
    """The area for any confidences, float64 [N], and errors, bool [N]; NaN without an image."""
    _, group_N, size_G = confidence_N.nan_to_num(nan=-math.inf).neg().unique(return_inverse=True, return_counts=True)
    rate_G = torch.zeros(len(size_G), dtype=torch.float64).index_add_(0, group_N, wrong_N.double()) / size_G
    grouped_N = rate_G.repeat_interleave(size_G)  # the most confident first
    return float((grouped_N.cumsum(0) / torch.arange(1, len(grouped_N) + 1)).mean())


metrics.add("aurc", AreaUnderRiskCoverage())

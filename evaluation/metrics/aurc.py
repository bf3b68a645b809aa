"""The area under the risk-coverage curve: what the most confident part of the answers is worth."""

from torch import Tensor

from evaluation.metrics import LogitsMetric, metrics
from evaluation.selective import aurc


class AreaUnderRiskCoverage(LogitsMetric):
    """Mean over k of the error rate among the k most confident images, in [0, 1] (Geifman et al., arXiv:1805.08206).

    Confidence is the largest probability. Images of equal confidence have no order: each counts with the error rate of
    its group. NaN is the lowest confidence.
    """

    title, place = "AURC", 50

    def of_row(self, log_probs_NK: Tensor, labels_N: Tensor) -> float:
        return aurc(log_probs_NK.amax(dim=-1).exp(), log_probs_NK.argmax(dim=-1) != labels_N)


metrics.add("aurc", AreaUnderRiskCoverage())

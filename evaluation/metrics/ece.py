"""The expected calibration error."""

import torch
from torch import Tensor

from evaluation.metrics import CountedMetric, Scored, Shape, Sums, metrics

NUM_BINS = 15


class ExpectedCalibrationError(CountedMetric):
    """Mean gap between confidence and accuracy over 15 bins of equal width, in [0, 1] (Guo et al., arXiv:1706.04599).

    Bin m of M holds the confidences in ((m - 1) / M, m / M].
    """

    title, place = "ECE", 5

    def zeros(self, shape: Shape) -> dict[str, Tensor]:
        size = (shape.num_rows, NUM_BINS)
        return {"seen": shape.counts(*size), "correct": shape.counts(*size), "confidence": shape.sums(*size)}

    def add(self, sums: Sums, batch: Scored) -> None:
        confidence_RB = batch.probs_RBK.amax(dim=-1)
        bins_RB = (confidence_RB * NUM_BINS).ceil()  # from 1
        in_bin_RBM = bins_RB.unsqueeze(-1) == torch.arange(1, NUM_BINS + 1, device=bins_RB.device)
        sums["seen"].add_(in_bin_RBM.sum(dim=1))
        sums["correct"].add_((in_bin_RBM & batch.hits_RB.unsqueeze(-1)).sum(dim=1))
        sums["confidence"].add_(torch.where(in_bin_RBM, confidence_RB.unsqueeze(-1), 0.0).sum(dim=1))

    def figure(self, sums: Sums, seen: Tensor, shape: Shape) -> Tensor:
        return (sums["correct"] - sums["confidence"]).abs().sum(dim=1) / seen


metrics.add("ece", ExpectedCalibrationError())

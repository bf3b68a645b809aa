"""The Brier score."""

import torch
from torch import Tensor

from evaluation.metrics import CountedMetric, Scored, Shape, Sums, metrics


class Brier(CountedMetric):
    """Mean squared distance of the probabilities from the label, summed over the classes: 0 to 2.

    Of an image it is Σ p² - 2 p(label) + 1; the 1 is added to the mean.
    """

    title, place = "Brier", 4

    def zeros(self, shape: Shape) -> dict[str, Tensor]:
        return {"brier": shape.sums(shape.num_rows)}

    def add(self, sums: Sums, batch: Scored) -> None:
        squares_RB = batch.probs_RBK.square().sum(dim=-1)
        sums["brier"].add_(torch.sub(squares_RB, batch.label_log_probs_RB.exp(), alpha=2).sum(dim=1))

    def figure(self, sums: Sums, seen: Tensor, shape: Shape) -> Tensor:
        return sums["brier"] / seen + 1


metrics.add("brier", Brier())

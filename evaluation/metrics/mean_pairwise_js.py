"""How far the predictions of two networks lie apart."""

import math

import torch
from torch import Tensor

from evaluation.metrics import CountedMetric, Scored, Shape, Sums, metrics


class MeanPairwiseJS(CountedMetric):
    """Jensen-Shannon divergence of two networks' predictions in nats, mean over pairs of networks and images."""

    of_rows = False
    title, place, also = "mean pairwise JS", 7, "js_divergence"

    def zeros(self, shape: Shape) -> dict[str, Tensor]:
        return {"js": shape.sums()}

    def add(self, sums: Sums, batch: Scored) -> None:
        sums["js"].add_(summed_js(batch.log_probs_RBK[: len(batch.logits_SBK)]))

    def figure(self, sums: Sums, seen: Tensor, shape: Shape) -> Tensor:
        return sums["js"] / (shape.num_pairs * seen)

    def sentence(self, value: float | None) -> str:
        """With its unit."""
        return f"their mean JS divergence is {self.cell(value)} nats"


def summed_js(log_probs_SBK: Tensor) -> Tensor:
    """Jensen-Shannon divergence summed over ordered pairs of networks and over images: (S, B, K) -> scalar.

    The sum over i and j of KL(p_i ‖ (p_i + p_j) / 2): (i, j) and (j, i) together are twice the pair's divergence.
    """
    sums = []
    for own_BK in log_probs_SBK:
        log_means_SBK = torch.logaddexp(own_BK, log_probs_SBK) - math.log(2)
        sums.append((own_BK.exp() * (own_BK - log_means_SBK)).sum())
    return torch.stack(sums).sum()


metrics.add("mean_pairwise_js", MeanPairwiseJS())

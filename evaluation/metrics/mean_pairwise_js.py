"""How far the predictions of two networks lie apart."""

import math

import torch
from torch import Tensor

from evaluation.metrics import CountedMetric, Scored, Shape, Sums, metrics

PAIRS = 16  # of networks at a time: those of four in one go, and no more memory than that where there are more


class MeanPairwiseJS(CountedMetric):
    """Jensen-Shannon divergence of two networks' predictions in nats, mean over pairs of networks and images."""

    of_rows = False
    title, place, also = "mean pairwise JS", 7, "js_divergence"

    def zeros(self, shape: Shape) -> dict[str, Tensor]:
        return {"js": shape.sums()}

    def add(self, sums: Sums, batch: Scored) -> None:
        num_networks = len(batch.logits_SBK)
        log_probs_SBK, probs_SBK = batch.log_probs_RBK[:num_networks], batch.probs_RBK[:num_networks]
        if num_networks == 1:
            return
        at_once = max(PAIRS // num_networks, 1)
        for log_probs_sBK, probs_sBK in zip(log_probs_SBK.split(at_once), probs_SBK.split(at_once), strict=True):
            sums["js"].add_(summed_js(log_probs_sBK, probs_sBK, log_probs_SBK))

    def figure(self, sums: Sums, seen: Tensor, shape: Shape) -> Tensor:
        return sums["js"] / (shape.num_pairs * seen)

    def sentence(self, value: float | None) -> str:
        """With its unit."""
        return f"their mean JS divergence is {self.cell(value)} nats"


def summed_js(log_probs_sBK: Tensor, probs_sBK: Tensor, log_probs_SBK: Tensor) -> Tensor:
    """KL(p_i ‖ (p_i + p_j) / 2) summed over s of the networks i, all S networks j, and images: a scalar.

    Over all i it is the Jensen-Shannon divergence summed over ordered pairs: (i, j) and (j, i) together are twice the
    pair's divergence.
    """
    own_s1BK = (log_probs_sBK + math.log(2)).unsqueeze(1)
    sums_sSBK = torch.logaddexp(log_probs_sBK.unsqueeze(1), log_probs_SBK)
    return (probs_sBK.unsqueeze(1) * (own_s1BK - sums_sSBK)).sum()


metrics.add("mean_pairwise_js", MeanPairwiseJS())

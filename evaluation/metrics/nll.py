"""Negative log-likelihood of the labels."""

from torch import Tensor

from evaluation.metrics import CountedMetric, Scored, Shape, Sums, metrics


class NegativeLogLikelihood(CountedMetric):
    """Mean of -log p(label), in nats."""

    title, place = "NLL", 3

    def zeros(self, shape: Shape) -> dict[str, Tensor]:
        return {"nll": shape.sums(shape.num_rows)}

    def add(self, sums: Sums, batch: Scored) -> None:
        sums["nll"].sub_(batch.label_log_probs_RB.sum(dim=1))

    def figure(self, sums: Sums, seen: Tensor, shape: Shape) -> Tensor:
        return sums["nll"] / seen


metrics.add("nll", NegativeLogLikelihood())

"""The Brier score."""

from torch import Tensor

from evaluation.metrics import CountedMetric, Scored, Shape, Sums, metrics


class Brier(CountedMetric):
    """Mean squared distance of the probabilities from the label, summed over the classes: 0 to 2."""

    title, place = "Brier", 4

    def zeros(self, shape: Shape) -> dict[str, Tensor]:
        return {"brier": shape.sums(shape.num_rows)}

    def add(self, sums: Sums, batch: Scored) -> None:
        squares_RB = batch.probs_RBK.square().sum(dim=-1)
        sums["brier"].add_((squares_RB - 2 * batch.label_log_probs_RB.exp() + 1).sum(dim=1))

    def figure(self, sums: Sums, seen: Tensor, shape: Shape) -> Tensor:
        return sums["brier"] / seen


metrics.add("brier", Brier())

"""Top-1 and top-5 accuracy."""

from torch import Tensor

from evaluation.metrics import CountedMetric, Scored, Shape, Sums, metrics


class TopK(CountedMetric):
    """Percent of the images whose label is among the k highest scores; equal scores go by class index."""

    digits = 2

    def __init__(self, k: int, place: int) -> None:
        self.k, self.place, self.title = k, place, f"top-{k} %"

    def zeros(self, shape: Shape) -> dict[str, Tensor]:
        return {"correct": shape.counts(shape.num_rows)}

    def add(self, sums: Sums, batch: Scored) -> None:
        hits_RB = batch.hits_RB if self.k == 1 else batch.ranks_RB < self.k
        sums["correct"].add_(hits_RB.sum(dim=1))

    def figure(self, sums: Sums, seen: Tensor, shape: Shape) -> Tensor:
        return 100 * sums["correct"] / seen


metrics.add("acc1", TopK(1, place=1))
metrics.add("acc5", TopK(5, place=2))

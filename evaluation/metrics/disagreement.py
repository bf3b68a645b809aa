"""How often two networks choose different classes."""

from torch import Tensor

from evaluation.metrics import CountedMetric, Scored, Shape, Sums, metrics


class Disagreement(CountedMetric):
    """Part of the images on which two networks disagree, mean over pairs of networks: 0 to 1."""

    of_rows = False
    title, digits, place = "disagreement", 2, 6

    def zeros(self, shape: Shape) -> dict[str, Tensor]:
        return {"apart": shape.counts()}

    def add(self, sums: Sums, batch: Scored) -> None:
        own_SB = batch.predictions_RB[: len(batch.logits_SBK)]
        if len(own_SB) > 1:
            sums["apart"].add_((own_SB.unsqueeze(1) != own_SB).sum())

    def figure(self, sums: Sums, seen: Tensor, shape: Shape) -> Tensor:
        return sums["apart"] / (shape.num_pairs * seen)

    def sentence(self, value: float | None) -> str:
        """In percent of the images."""
        return f"two networks disagree on {self.cell(None if value is None else 100 * value)} % of them"


metrics.add("disagreement", Disagreement())

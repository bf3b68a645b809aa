"""What the reported ensemble says of every image of a split. S networks, B images of a batch, N of the split."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from dataset import ImageSet
from dataset.loader import Batch
from evaluation.ensemble import ensemble_scores
from evaluation.ood import pair_disagreement
from evaluation.selective import confidence_of
from record.tables import csv_table
from utils.text import escaped

TITLES = ("index", "file", "class", "name", "predicted", "predicted_name", "correct", "probability", "margin")
COLUMNS = 6  # of what is kept of an image


class ImageAnswers:
    """Collects the answers of one process batch by batch, without waiting for the device.

    Args:
        rule: of the ensemble.
        device: where the logits are.
    """

    def __init__(self, rule: str, device: torch.device) -> None:
        self.rule = rule
        self._kept = [torch.empty(0, COLUMNS, dtype=torch.float64, device=device)]

    def add(self, batch: Batch, logits_SBK: Tensor) -> None:
        """One batch: index, label, predicted class, its probability, the margin, the disagreement of the networks."""
        logits_SBK = logits_SBK.double()
        scores_BK = ensemble_scores(logits_SBK, self.rule)
        columns = (
            batch.indices_B,
            batch.labels_B,
            scores_BK.argmax(dim=-1),
            confidence_of(scores_BK, "max_prob"),
            confidence_of(scores_BK, "margin"),
            pair_disagreement(logits_SBK),
        )
        self._kept.append(torch.stack([column_B.double() for column_B in columns], dim=1))

    def gather(self, gather_rows: Callable[[Tensor], Tensor]) -> Tensor:
        """The answers of every process in the order of the images: float64 [N, COLUMNS], on the CPU.

        Args:
            gather_rows: rows [N_r, ...] of every process one after another.
        """
        return gather_rows(torch.cat(self._kept)).cpu()


def image_table(answers_NC: Tensor, split: ImageSet, classes: Sequence[str], root: Path) -> str:
    """`test_predictions.csv`: a row for every image of the split that could be read, by the ensemble's reported rule.

    `file` is relative to `root` where it lies below it, and empty for images in memory; `probability` is that of the
    predicted class, not calibrated, `margin` its lead over the second one, `disagreement` (for two networks or more not
    always 0) the part of all pairs of networks that choose different classes.

    Args:
        answers_NC: of `ImageAnswers.gather`.
        classes: K names.
        root: of the data set.
    """
    rows: list[list[object]] = []
    for index, label, predicted, probability, margin, disagreement in answers_NC.tolist():
        place, own, other = int(index), int(label), int(predicted)
        row: list[object] = [place, _name(split, place, root), own, classes[own], other, classes[other]]
        rows.append([*row, int(own == other), f"{probability:.6f}", f"{margin:.6f}", f"{disagreement:.4f}"])
    return csv_table((*TITLES, "disagreement"), rows)


def _name(split: ImageSet, place: int, root: Path) -> str:
    if not split.paths:
        return ""
    path = split.paths[place]
    return escaped(path.relative_to(root) if path.is_relative_to(root) else path)

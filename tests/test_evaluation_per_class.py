"""Precision, recall, F1 and balanced accuracy, beside scikit-learn's; classes that are absent."""

import math

import numpy as np
import pytest
import torch
from sklearn import metrics as sk
from torch import Tensor

from evaluation.per_class import PerClass


def confusion(labels_N: Tensor, predictions_N: Tensor, num_classes: int) -> Tensor:
    cells_N = labels_N * num_classes + predictions_N
    return cells_N.bincount(minlength=num_classes**2).view(num_classes, num_classes)


@pytest.mark.parametrize("seed", range(5))
def test_figures_are_those_of_scikit_learn(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    labels_N = torch.randint(0, 5, (60,), generator=generator) % (5 - seed % 3)  # some classes have no images
    predictions_N = torch.where(
        torch.rand(60, generator=generator) < 0.5, labels_N, torch.randint(0, 6, (60,), generator=generator)
    )
    predictions_N[predictions_N == 1] = 0  # this one is never predicted
    found = PerClass.of(confusion(labels_N, predictions_N, 6))
    seen = labels_N.unique().tolist()
    precision, recall, f1, _ = sk.precision_recall_fscore_support(
        labels_N, predictions_N, labels=seen, average=None, zero_division=0
    )
    for column_K, expected in zip(found, (precision, recall, f1), strict=True):
        np.testing.assert_allclose(column_K[seen] / 100, expected, rtol=1e-12)
        unseen = [k for k in range(6) if k not in seen]
        assert column_K[unseen].isnan().all()
    means = found.summary()
    for name, column in (("macro_precision", precision), ("macro_recall", recall), ("macro_f1", f1)):
        assert means[name] == pytest.approx(100 * column.mean(), rel=1e-12)
    assert means["balanced_acc"] == pytest.approx(
        100 * sk.recall_score(labels_N, predictions_N, labels=seen, average="macro", zero_division=0), rel=1e-12
    )
    if set(predictions_N.tolist()) <= set(seen):
        assert means["balanced_acc"] == pytest.approx(100 * sk.balanced_accuracy_score(labels_N, predictions_N))


def test_worked_numbers() -> None:
    # of 4 cats 3 are found, of 1 dog none; no owl was shown, and one cat and the dog were taken for owls
    found = PerClass.of(torch.tensor([[3, 0, 1], [0, 0, 1], [0, 0, 0]]))
    rows = found.rows()
    assert rows[0] == pytest.approx({"precision": 100, "recall": 75, "f1": 100 * 6 / 7})
    assert rows[1] == {"precision": 0, "recall": 0, "f1": 0}
    assert all(map(math.isnan, rows[2].values()))
    assert found.summary() == pytest.approx(
        {"balanced_acc": 37.5, "macro_precision": 50, "macro_recall": 37.5, "macro_f1": 300 / 7}
    )


def test_no_image_at_all_has_no_figures() -> None:
    assert all(map(math.isnan, PerClass.of(torch.zeros(3, 3, dtype=torch.int64)).summary().values()))

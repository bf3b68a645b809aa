"""What an evaluation says of every class, and of all of them alike. K classes.

A class without images has no figures and no part in the means, also where images of others are taken for it: those
count as errors of the classes that they are of.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor


class PerClass(NamedTuple):
    """Percent, float64 [K]; NaN for a class without images.

    With TP the images of a class that are found, FN those that are not, and FP images of others that are taken for it:

    Attributes:
        precision_K: TP / (TP + FP); 0 where nothing is taken for the class.
        recall_K: TP / (TP + FN): the accuracy on the images of the class.
        f1_K: 2 TP / (2 TP + FP + FN), the harmonic mean of the two; 0 where nothing is found.
    """

    precision_K: Tensor
    recall_K: Tensor
    f1_K: Tensor

    @classmethod
    def of(cls, confusion_KK: Tensor) -> "PerClass":
        """Of the images by label (row) and prediction (column), int64."""
        found_K = confusion_KK.diagonal().double()
        images_K, taken_K = confusion_KK.sum(dim=1).double(), confusion_KK.sum(dim=0).double()
        precision_K = 100 * found_K / taken_K.clamp(min=1)
        f1_K = 200 * found_K / (images_K + taken_K)
        unseen_K = images_K == 0
        return cls(
            precision_K.masked_fill(unseen_K, torch.nan),
            100 * found_K / images_K,
            f1_K.masked_fill(unseen_K, torch.nan),
        )

    def summary(self) -> dict[str, Any]:
        """Means over the classes with images, in percent (NaN without any): each class counts alike.

        `balanced_acc` is the mean recall (Brodersen et al., ICPR 2010), and so `macro_recall` by another name.
        """
        precision, recall, f1 = (float(column_K.nanmean()) for column_K in self)
        return {"balanced_acc": recall, "macro_precision": precision, "macro_recall": recall, "macro_f1": f1}

    def rows(self) -> list[dict[str, float]]:
        """Precision, recall and F1 of every class."""
        columns = (column_K.tolist() for column_K in self)
        return [{"precision": p, "recall": r, "f1": f} for p, r, f in zip(*columns, strict=True)]

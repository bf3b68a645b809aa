"""Positives and negatives of an image, drawn from a table of the classes."""

import torch
from torch import Tensor, nn

from utils.seed import counter_uniform_on_device


class ClassTable(nn.Module):
    """Draws, for each image, images of its class and images of other classes, without lists per class.

    Args:
        labels_N: int64, of the training set.

    Attributes:
        order_N: the images sorted by class. rank_N: each image's place among those of its class.
        start_K, count_K: first place of a class in that order, and how many images it has.
    """

    order_N: Tensor
    rank_N: Tensor
    start_K: Tensor
    count_K: Tensor

    def __init__(self, labels_N: Tensor) -> None:
        super().__init__()
        count_K = labels_N.bincount()
        start_K = count_K.cumsum(0) - count_K
        order_N = labels_N.argsort(stable=True)
        rank_N = torch.empty_like(order_N)
        rank_N[order_N] = torch.arange(len(labels_N), device=labels_N.device) - start_K[labels_N[order_N]]
        for name, value in (("order_N", order_N), ("rank_N", rank_N), ("start_K", start_K), ("count_K", count_K)):
            self.register_buffer(name, value, persistent=False)

    def draw(self, key: int, indices_B: Tensor, labels_B: Tensor, *, pos_k: int, neg_k: int) -> Tensor:
        """Columns of the contrast: the image itself, `pos_k` others of its class, `neg_k` of other classes.

        Positives are drawn without replacement, negatives with; a pure function of key and index.

        Args:
            key: from `utils.seed.fold_in`.
            indices_B, labels_B: int64, the images and their classes.

        Returns:
            int64 [B, 1 + pos_k + neg_k], indices of the training set.
        """
        uniform = counter_uniform_on_device(key, indices_B, pos_k + neg_k)
        start_B1, count_B1 = self.start_K[labels_B, None], self.count_K[labels_B, None]
        taken = self.rank_N[indices_B, None]
        for k in range(pos_k):
            # the r-th place that is still free: step over the taken ones in ascending order
            place_B1 = (uniform[:, k : k + 1] * (count_B1 - 1 - k)).long()
            for lower_B in taken.sort(dim=1).values.unbind(1):
                place_B1 += place_B1 >= lower_B[:, None]
            taken = torch.cat([taken, place_B1], dim=1)
        others = (uniform[:, pos_k:] * (len(self.order_N) - count_B1)).long()
        others += torch.where(others >= start_B1, count_B1, 0)
        return self.order_N[torch.cat([start_B1 + taken, others], dim=1)]

"""Running networks one after another, each on the images that the ones before were not sure of.

After Wang et al. (arXiv:2012.01988). S networks, B images, K classes; a stage k, from 0, has run the first k + 1
networks of the order.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

ScoresOf = Callable[[Tensor, int], Tensor]  # logits [k + 1, B, K] in the order of the networks, stage -> scores [B, K]
ConfidenceOf = Callable[[Tensor, int], Tensor]  # scores [B, K], stage -> [B]


def leaves_above(confidence_B: Tensor, threshold: float) -> Tensor:
    """Which images leave at a threshold: those at least so sure; NaN never does."""
    return confidence_B >= threshold


def leaves_window(confidence_B: Tensor, low: float, high: float) -> Tensor:
    """Which images leave at a window: those outside of it; NaN never does."""
    return (confidence_B < low) | (confidence_B > high)


class Answered(NamedTuple):
    """What a cascade says of a batch.

    scores_BK: of the stage at which each image left. stage_B: int64, that stage. logits_SBK: of every network by its
    number, NaN where it did not run.
    """

    scores_BK: Tensor
    stage_B: Tensor
    logits_SBK: Tensor


class Cascade(nn.Module):
    """Networks with the rule by which images leave after some of them.

    Args:
        networks: S modules, images [B, C, H, W] -> logits [B, K], in evaluation mode.
        order: numbers of networks, from 0, as they run.
        scores: joins the logits of the networks that ran.
        confidence: of the scores.
        bounds: of each stage but the last: (threshold,), see `leaves_above`, or (low, high), see `leaves_window`.

    Raises:
        ValueError: not a permutation, or another number of bounds.
    """

    def __init__(
        self,
        networks: Sequence[nn.Module],
        order: Sequence[int],
        *,
        scores: ScoresOf,
        confidence: ConfidenceOf,
        bounds: Sequence[tuple[float, ...]],
    ) -> None:
        super().__init__()
        if sorted(order) != list(range(len(networks))) or len(bounds) != len(networks) - 1:
            raise ValueError(f"{len(networks)} networks, order {list(order)}, {len(bounds)} bounds")
        self.models = nn.ModuleList(networks)
        self.order, self.bounds = tuple(order), tuple(bounds)
        self._scores, self._confidence = scores, confidence

    def forward(self, images_BCHW: Tensor) -> Answered:
        """Images that go on are gathered; a stage without images ends the batch."""
        going_B = torch.arange(len(images_BCHW), device=images_BCHW.device)
        so_far: list[Tensor] = []  # logits of the networks that ran, of the images that are still there
        answer = None
        for k, number in enumerate(self.order):
            logits_BK = self.models[number](images_BCHW)
            so_far.append(logits_BK.to(torch.promote_types(logits_BK.dtype, torch.float32)))
            scores_BK = self._scores(torch.stack(so_far), k)
            if answer is None:
                shape = (len(self.models), *so_far[0].shape)
                answer = Answered(scores_BK.clone(), torch.zeros_like(going_B), so_far[0].new_full(shape, torch.nan))
            answer.scores_BK[going_B], answer.stage_B[going_B] = scores_BK, k
            answer.logits_SBK[number, going_B] = so_far[-1]
            if k == len(self.bounds):
                break
            bounds = self.bounds[k]
            leaves_B = (leaves_above if len(bounds) == 1 else leaves_window)(self._confidence(scores_BK, k), *bounds)
            rows_B = (~leaves_B).nonzero().squeeze(1)
            if not len(rows_B):
                break
            if len(rows_B) < len(going_B):
                going_B, images_BCHW = going_B[rows_B], images_BCHW.index_select(0, rows_B)
                so_far = [logits_BK[rows_B] for logits_BK in so_far]
        assert answer is not None
        return answer

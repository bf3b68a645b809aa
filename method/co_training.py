"""Co-training: S networks learn from the labels and are pulled together by an agreement loss.

Zhao et al., "Towards Better Accuracy-efficiency Trade-offs: Divide and Co-training", arXiv:2011.14660.
"""

import math

import torch
from torch import Tensor

from loss import at_least_float32
from loss.agreement import AGREEMENT_LOSSES
from loss.classification import CROSS_ENTROPY, ClassLoss
from method import Method, Progress, StepOutput, Targets, methods
from method.options.co_training import CoTrainingOptions
from model.splitnet import SplitNet

MIN_WARM_UP_WEIGHT = 0.005


def cot_weight(epoch: int, *, weight: float, warm_up_epochs: int) -> float:
    """Weight of the co-training loss in an epoch counted from 0 (the published runs of arXiv:2011.14660).

    max(weight · epoch / warm_up_epochs, 0.005) during the warm-up, then `weight`.
    """
    if epoch >= warm_up_epochs:
        return weight
    return max(weight * epoch / warm_up_epochs, MIN_WARM_UP_WEIGHT)


@methods.register("co_training")
class CoTraining(Method[CoTrainingOptions]):
    """Σ_i CE(network i, labels) + w(epoch) · agreement(all networks); one network trains in the ordinary way.

    Args:
        network: S networks.
        options: flags.
        class_loss: what every prediction costs against the labels.
    """

    Options = CoTrainingOptions
    learns_from_copies = True
    _cot_weight: Tensor

    def __init__(self, network: SplitNet, options: CoTrainingOptions, *, class_loss: ClassLoss = CROSS_ENTROPY) -> None:
        super().__init__(network, options, class_loss=class_loss)
        self.agreement = AGREEMENT_LOSSES[options.cot_loss_choose]
        # On the device and written in place, so that a captured CUDA graph sees a new epoch's weight.
        self.register_buffer("_cot_weight", torch.full((), math.nan), persistent=False)
        self._written_weight = math.nan

    def peers_warm_up(self, epochs: int) -> int:
        """Epochs, of so many, over which the co-training weight rises."""
        warm_up = self.options.cot_weight_warm_up_epochs if self.options.is_cot_weight_warm_up else 0
        return round(40 * epochs / 300) if warm_up is None else warm_up

    def before_step(self, views_SBCHW: Tensor, targets: Targets, progress: Progress) -> None:
        """Bring the co-training weight up to date; until the first call it is NaN, and so is the loss."""
        warm_up = self.peers_warm_up(progress.epochs)
        epoch = progress.epoch if self.peers is None else max(0, progress.epoch - self.peers.burn_in)
        value = cot_weight(epoch, weight=self.options.cot_weight, warm_up_epochs=warm_up)
        if value != self._written_weight:
            self._cot_weight.fill_(value)
            self._written_weight = value

    def forward(self, views_SBCHW: Tensor, targets: Targets, progress: Progress) -> StepOutput:
        """Views [S, B, C, H, W], or [1, B, C, H, W] for one shared view -> loss, metrics, logits [S, B, K].

        Metrics: loss_ce (summed over networks); with two networks or more loss_cot (weighted), cot_weight and, where
        it is on, loss_ensemble (weighted).
        """
        own_SBK = at_least_float32(self.network(views_SBCHW))
        logits_SBK = self.among_peers(own_SBK, views_SBCHW, progress)
        losses_S = [self._cross_entropy(logits_BK, targets) for logits_BK in own_SBK]
        loss = loss_ce = torch.stack(losses_S).sum()
        metrics = {"loss_ce": loss_ce.detach()}
        several = len(logits_SBK) > 1
        if several and self.options.is_cot_loss:
            weight = self._cot_weight.to(loss.dtype)
            loss_cot = weight * self.agreement(logits_SBK).mean()
            loss = loss + loss_cot
            metrics |= {"loss_cot": loss_cot.detach(), "cot_weight": weight.clone()}
        if several and self.options.is_ensembled_loss:
            loss_ensemble = self.options.ensembled_loss_weight * self._cross_entropy(logits_SBK.mean(dim=0), targets)
            loss = loss + loss_ensemble
            metrics["loss_ensemble"] = loss_ensemble.detach()
        return StepOutput(loss, metrics, own_SBK.detach())

    def _cross_entropy(self, logits_BK: Tensor, targets: Targets) -> Tensor:
        """Mean over the batch: (B, K) -> scalar."""
        return self.class_loss(logits_BK, targets).mean()

"""Deep mutual learning (Zhang et al., arXiv:1706.00384): each network also fits its peers' predictions.

All networks step together, not in turn as in the paper: one backward pass for S networks.
"""

import math

import torch
from torch import Tensor

from loss import at_least_float32
from loss.agreement import kl_seperate
from loss.distillation import distillation_kl
from method import Method, Progress, StepOutput, Targets, methods
from method.options.dml import DMLOptions


def ensemble_kl(logits_SBK: Tensor) -> Tensor:
    """Σ_i KL(constant mean of the other networks' predictions ‖ prediction i): (S, B, K) -> (B,)."""
    log_probs_SBK = at_least_float32(logits_SBK).log_softmax(dim=-1)
    num_networks = len(log_probs_SBK)
    peers = [log_probs_SBK.roll(shift, dims=0) for shift in range(1, num_networks)]
    others_SBK = torch.stack(peers).logsumexp(dim=0) - math.log(num_networks - 1)
    # log-probabilities serve as logits: the log-softmax of a log-softmax is itself
    return distillation_kl(log_probs_SBK, others_SBK).sum(dim=0)


@methods.register("dml")
class DeepMutualLearning(Method[DMLOptions]):
    """Σ_i [ CE(i, labels) + w · T² / (S - 1) Σ_{j≠i} KL(constant p_j ‖ p_i) ], p = softmax(logits / T).

    S networks of one backbone or of several; all see the same view. One network alone trains in the ordinary way.
    """

    Options = DMLOptions
    shared_view = True
    learns_from_copies = True

    def forward(self, views_SBCHW: Tensor, targets: Targets, progress: Progress) -> StepOutput:
        """Views [1, B, C, H, W] -> loss, metrics (loss_ce and, weighted, loss_mutual), logits [S, B, K]."""
        own_SBK = at_least_float32(self.network(views_SBCHW))
        logits_SBK = self.among_peers(own_SBK, views_SBCHW, progress)
        loss = loss_ce = self.summed_class_loss(own_SBK, targets)
        metrics = {"loss_ce": loss_ce.detach()}
        if len(logits_SBK) > 1:
            mutual_kl = ensemble_kl if self.options.dml_teacher == "ensemble" else kl_seperate
            temperature = self.options.dml_temperature
            loss_mutual = self.options.dml_weight * temperature**2 * mutual_kl(logits_SBK / temperature).mean()
            loss = loss + loss_mutual
            metrics["loss_mutual"] = loss_mutual.detach()
        return StepOutput(loss, metrics, own_SBK.detach())

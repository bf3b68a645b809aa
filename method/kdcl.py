"""Online distillation by collaborative learning (Guo et al., CVPR 2020): all peers fit the best of their answers.

There is no official code: the formulas are ours, after the paper.
"""

from torch import Tensor

from loss import at_least_float32
from loss.classification import CROSS_ENTROPY, ClassLoss
from loss.distillation import collaborative_target, distillation_kl
from method import Method, Progress, StepOutput, Targets, methods
from method.options.kdcl import KDCLOptions
from model.splitnet import SplitNet
from utils.errors import UserError


@methods.register("kdcl")
class CollaborativeLearning(Method[KDCLOptions]):
    """Σ_i CE(i, labels) + w · Σ_i T² KL(constant softmax(z* / T) ‖ softmax(z_i / T)); z* is made of all z_i.

    Networks of one backbone or of several, each with its own view, which is the paper's distortion of the images.

    Args:
        network: two networks or more.
        options: flags.
        class_loss: what every prediction costs against the labels; smoothed labels do not touch the target.

    Raises:
        UserError: fewer than two networks.
    """

    Options = KDCLOptions

    def __init__(self, network: SplitNet, options: KDCLOptions, *, class_loss: ClassLoss = CROSS_ENTROPY) -> None:
        super().__init__(network, options, class_loss=class_loss)
        if network.split_factor < 2:
            raise UserError("--method kdcl needs two networks or more: give --arch a list, or a --split_factor.")

    def forward(self, views_SBCHW: Tensor, targets: Targets, progress: Progress) -> StepOutput:
        """Views [S, B, C, H, W], or one shared view -> loss, metrics (loss_ce; loss_kl, weighted), logits [S, B, K]."""
        logits_SBK = at_least_float32(self.network(views_SBCHW))
        options = self.options
        target_BK = collaborative_target(logits_SBK.detach(), targets, rule=options.kdcl_target)
        fits_SB = distillation_kl(logits_SBK, target_BK, temperature=options.kdcl_temperature)
        loss_ce = self.summed_class_loss(logits_SBK, targets)
        loss_kl = options.kdcl_weight * fits_SB.mean(dim=1).sum()
        metrics = {"loss_ce": loss_ce.detach(), "loss_kl": loss_kl.detach()}
        return StepOutput(loss_ce + loss_kl, metrics, logits_SBK.detach())

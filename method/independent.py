"""Independent learning: the networks share the batch and nothing else. The baseline of every other method."""

from torch import Tensor

from loss import at_least_float32
from method import Method, NoOptions, Progress, StepOutput, Targets, methods


@methods.register("independent")
class Independent(Method[NoOptions]):
    """Σ_i CE(network i on its own view, labels)."""

    def forward(self, views_SBCHW: Tensor, targets: Targets, progress: Progress) -> StepOutput:
        """Views [S, B, C, H, W], or one shared view -> loss, metrics (loss_ce), logits [S, B, K]."""
        logits_SBK = at_least_float32(self.network(views_SBCHW))
        loss = self.summed_class_loss(logits_SBK, targets)
        return StepOutput(loss, {"loss_ce": loss.detach()}, logits_SBK.detach())

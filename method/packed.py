"""Packed-Ensembles (Laurent et al., arXiv:2210.09184): M thin networks that run as one network of groups."""

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from loss import at_least_float32
from method import Progress, StepOutput, Targets, methods
from method.members import MemberMethod, joined_losses
from method.options.packed import PackedOptions
from model import BackboneRequest
from model.options import AUTO
from model.registry import MemberForm
from recipe.published import sgd_steps
from utils.errors import UserError


def require_alpha(text: str) -> str:
    """The value of --packed_alpha, if it is one.

    Raises:
        UserError: neither "auto" nor a positive number.
    """
    if text != AUTO:
        try:
            number = float(text)
        except ValueError:
            number = math.nan
        if not (math.isfinite(number) and number > 0):
            raise UserError(f"--packed_alpha {text}: expected auto, or a number above 0.")
    return text


@methods.register("packed")
class Packed(MemberMethod[PackedOptions]):
    """Σ or mean over the members of CE(member m, labels); nothing crosses members.

    With γ = 1 it differs from `independent` on S = M networks in the rule of the widths, in one view for all and in the
    mean over the members. `--execution stacked` is the one network of groups.

    Args:
        network: M networks, made by `model.packed.build_packed`.
        options: flags.
        class_loss: what every prediction costs against the labels.
    """

    Options = PackedOptions
    exchanges = "one network that holds its members"
    name = "packed"

    @classmethod
    def implied_flags(cls, given: Mapping[str, Any]) -> Mapping[str, Any]:
        """Nothing; refuses several networks, and what is no α."""
        implied = super().implied_flags(given)
        require_alpha(given.get("packed_alpha", AUTO))
        return implied

    @classmethod
    def member_form(cls, options: PackedOptions, request: BackboneRequest, seed: int) -> MemberForm:
        """M thin networks."""
        numbers: dict[str, float | int | str] = {
            "alpha": options.packed_alpha,
            "gamma": options.packed_gamma,
            "min_channels": options.packed_min_channels,
        }
        return MemberForm(kind="packed", members=options.num_members, numbers=numbers)

    @classmethod
    def recipe(
        cls, dataset_recipe: str, epochs: int | None, given: Mapping[str, Any] | None = None
    ) -> Mapping[str, Any]:
        """The training of torch-uncertainty on CIFAR; the rule of the ensemble, and one view for all, everywhere."""
        given = given or {}
        rule = {"is_ensembled_after_softmax": True, "is_diff_data_train": bool(given.get("packed_views"))}
        if not dataset_recipe.startswith("cifar"):
            return rule
        if dataset_recipe == "cifar10" and str(given.get("arch", "")).rpartition("/")[2] == "resnet18":
            rates = sgd_steps(epochs, usual=75, milestones=(25, 50), batch_size=128, lr=0.05, weight_decay=5e-4)
            return {**rates, **rule}
        rates = sgd_steps(epochs, usual=200, milestones=(60, 120, 160), batch_size=128, lr=0.1, weight_decay=5e-4)
        return {**rates, "is_nesterov": True, "lr_step_multiplier": 0.2, **rule}

    def forward(self, views_SBCHW: Tensor, targets: Targets, progress: Progress) -> StepOutput:
        """Views [M, B, C, H, W], or one shared view -> loss, metrics (loss_ce), logits [M, B, K]."""
        logits_MBK = at_least_float32(self.network(views_SBCHW))
        losses_M = [self.class_loss(logits_BK, targets).mean() for logits_BK in logits_MBK]
        loss = joined_losses(losses_M, self.options.member_loss)
        return StepOutput(loss, {"loss_ce": loss.detach()}, logits_MBK.detach())

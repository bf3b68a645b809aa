"""BatchEnsemble (Wen et al., arXiv:2002.06715): M rank-1 perturbations of one network."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from loss import at_least_float32
from loss.classification import CROSS_ENTROPY, ClassLoss
from method import Progress, StepOutput, Targets, methods
from method.members import MemberMethod, joined_losses
from method.options.batch_ensemble import BatchEnsembleOptions
from model import BackboneRequest
from model.members import BatchEnsembleNet
from model.registry import MemberForm
from model.splitnet import SplitNet
from recipe.published import long_steps
from utils.errors import UserError


@methods.register("batch_ensemble")
class BatchEnsemble(MemberMethod[BatchEnsembleOptions]):
    """Σ or mean over the members of CE(member m, labels); kernels are shared, factors and biases are the members' own.

    The factors take no weight decay and a multiple of the learning rate.

    Args:
        network: a `model.members.BatchEnsembleNet`.
        options: flags.
        class_loss: what every prediction costs against the labels.
    """

    Options = BatchEnsembleOptions
    exchanges = "the shared weights of its members"
    name = "batch_ensemble"
    runs_networks_itself = True

    def __init__(
        self, network: SplitNet, options: BatchEnsembleOptions, *, class_loss: ClassLoss = CROSS_ENTROPY
    ) -> None:
        super().__init__(network, options, class_loss=class_loss)
        if not isinstance(network, BatchEnsembleNet):
            raise ValueError("expected a network of the form batch_ensemble")

    @classmethod
    def member_form(cls, options: BatchEnsembleOptions, request: BackboneRequest, seed: int) -> MemberForm:
        """M members of one network."""
        numbers: dict[str, float | int | str] = {"norm": options.be_norm, "init": options.be_init}
        return MemberForm(kind="batch_ensemble", members=options.num_members, numbers=numbers)

    @classmethod
    def recipe(
        cls, dataset_recipe: str, epochs: int | None, given: Mapping[str, Any] | None = None
    ) -> Mapping[str, Any]:
        """The published training on CIFAR (WRN-28-10) and ImageNet (ResNet-50), and the rule of the ensemble."""
        rule = {"is_ensembled_after_softmax": True}
        if dataset_recipe == "imagenet":
            usual = long_steps(epochs, usual=135, milestones=(45, 90, 120), given=given, large=True)
            return {**usual, **rule, "be_fast_lr": 0.25}
        if not dataset_recipe.startswith("cifar"):
            return rule
        return {**long_steps(epochs, usual=250, milestones=(100, 200, 225), given=given), **rule}

    def undecayed_parameters(self) -> set[str]:
        """The factors."""
        return {f"network.{name}" for name in self._net.fast_parameters()}

    def rate_factors(self) -> dict[str, float]:
        """Of the factors."""
        return dict.fromkeys(self.undecayed_parameters(), self.options.be_fast_lr)

    @property
    def _net(self) -> BatchEnsembleNet:
        assert isinstance(self.network, BatchEnsembleNet)
        return self.network

    def forward(self, views_SBCHW: Tensor, targets: Targets, progress: Progress) -> StepOutput:
        """Views [M, B, C, H, W], or one shared view -> loss, metrics (loss_ce), logits [M, B, K].

        With --be_batch split an image's row of logits is that of the member that saw it, for all members.

        Raises:
            UserError: --be_batch split, and a batch that has not M equal parts.
        """
        members = self.network.num_members
        if self.options.be_batch == "split":
            views = self._net.members_first(views_SBCHW)
            count = views.shape[1]
            if count % members:
                raise UserError(f"--be_batch split: a batch of {count} images has not {members} equal parts.")
            parts = [part.unflatten(0, (members, -1)) for part in targets[:2]]
            own = torch.arange(members, device=views.device)
            logits_MBK = at_least_float32(self.network(views.unflatten(1, (members, -1))[own, own]))
            losses_M = [
                self.class_loss(logits_BK, Targets(one, other, targets.lam)).mean()
                for logits_BK, one, other in zip(logits_MBK, *parts, strict=True)
            ]
            shown = logits_MBK.detach().flatten(0, 1).expand(members, -1, -1)
        else:
            logits_MBK = at_least_float32(self.network(views_SBCHW))
            losses_M = [self.class_loss(logits_BK, targets).mean() for logits_BK in logits_MBK]
            shown = logits_MBK.detach()
        loss = joined_losses(losses_M, self.options.member_loss)
        return StepOutput(loss, {"loss_ce": loss.detach()}, shown)

"""On-the-fly native ensemble (Lan et al., arXiv:1806.04606): branches of one network, taught by their gated mixture."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from loss import at_least_float32
from loss.classification import CROSS_ENTROPY, ClassLoss
from loss.distillation import distillation_kl
from method import Method, Progress, StepOutput, Targets, methods
from method.inner import TeacherRamp
from method.options.one import ONEOptions
from model.heads import NativeEnsemble, require_stages
from model.members import GatedNet
from model.registry import BackboneRequest, MemberForm
from model.splitnet import SplitNet
from recipe.published import sgd_steps
from utils.errors import UserError


@methods.register("one")
class NativeEnsembleLearning(Method[ONEOptions]):
    """Σ_j CE(z_j, labels) + CE(z_e, labels) + ramp · w · Σ_j T² KL(constant softmax(z_e / T) ‖ softmax(z_j / T)).

    z_e = Σ_j g_j z_j mixes the logits of the branches by the weights of a gate on the map that they share. Several
    networks learn side by side, each with its own branches and gate; the losses add up. What lies beside the networks
    exists in training only: the network itself is branch 1. With --one_deploy gated the branches and the gate belong to
    the network (`model.members.GatedNet`), and the mixture is its answer.

    Args:
        network: S networks with two stages or more, made by `model.registry.build_network`.
        options: flags.
        class_loss: what every prediction costs against the labels.

    Raises:
        UserError: a backbone without stages, or with one only.
    """

    Options = ONEOptions
    exchanges = "the branches and the gate inside its networks, which are trained beside them"
    runs_networks_itself = True

    def __init__(self, network: SplitNet, options: ONEOptions, *, class_loss: ClassLoss = CROSS_ENTROPY) -> None:
        super().__init__(network, options, class_loss=class_loss)
        beside = nn.ModuleList() if isinstance(network, GatedNet) else network.models
        self.ensembles = nn.ModuleList(
            NativeEnsemble(require_stages(one, "one", at_least=2), options.one_branches) for one in beside
        )
        self.ramp = TeacherRamp(options.one_ramp_epochs)

    @classmethod
    def recipe(
        cls, dataset_recipe: str, epochs: int | None, given: Mapping[str, Any] | None = None
    ) -> Mapping[str, Any]:
        """CIFAR: the published training; elsewhere nothing, because nothing is published."""
        if not dataset_recipe.startswith("cifar"):
            return {}
        return sgd_steps(epochs, usual=300, milestones=(151, 225), batch_size=128, lr=0.1, weight_decay=1e-4)

    @classmethod
    def implied_flags(cls, given: Mapping[str, Any]) -> Mapping[str, Any]:
        """Nothing; refuses several networks where the gated mixture is deployed."""
        several = "," in str(given.get("arch", "")) or given.get("split_factor", 1) != 1 or given.get("is_train_sep")
        if given.get("one_deploy") == "gated" and several:
            raise UserError(
                "--one_deploy gated is one network with its branches: give --arch one name, without --split_factor "
                "and --is_train_sep."
            )
        return {}

    @classmethod
    def member_form(cls, options: ONEOptions, request: BackboneRequest, seed: int) -> MemberForm | None:
        """The branches and the gate as parts of the network, where they are deployed."""
        if options.one_deploy == "network":
            return None
        return MemberForm(kind="gated", members=1, numbers={"branches": options.one_branches})

    def before_step(self, views_SBCHW: Tensor, targets: Targets, progress: Progress) -> None:
        """Bring the weight of the teacher up to date."""
        self.ramp.bring_to(progress.epoch, progress.epochs)

    def forward(self, views_SBCHW: Tensor, targets: Targets, progress: Progress) -> StepOutput:
        """Views [S, B, C, H, W], or one shared view -> loss, metrics, logits [S, B, K] of what is deployed.

        Metrics, summed over the networks: loss_ce (of branches and mixture), loss_kl (weighted), and the ramp.
        """
        losses_ce, losses_kl, main = [], [], []
        for i, view_BCHW in enumerate(self.network.expand_views(views_SBCHW)):
            logits_MBK, gated_BK = self._branches(i, view_BCHW)
            losses_ce.append(self.summed_class_loss((*logits_MBK, gated_BK), targets))
            fits_MB = distillation_kl(logits_MBK, gated_BK, temperature=self.options.one_temperature)
            losses_kl.append(fits_MB.mean(dim=1).sum())
            main.append(logits_MBK[0] if self.ensembles else gated_BK)
        loss_ce = torch.stack(losses_ce).sum()
        weight = self.ramp(loss_ce.dtype)
        loss_kl = self.options.one_weight * weight * torch.stack(losses_kl).sum()
        metrics = {"loss_ce": loss_ce.detach(), "loss_kl": loss_kl.detach(), "ramp": weight.clone()}
        return StepOutput(loss_ce + loss_kl, metrics, torch.stack(main).detach())

    def compiled_parts(self) -> list[nn.Module]:
        """The ensembles, each of which runs its network."""
        return [self._ensemble(i) for i in range(self.network.split_factor)]

    def extra_logits(self, images_BCHW: Tensor) -> dict[str, Tensor]:
        """Logits [B, K] of the branches and the gated mixtures but for what is deployed."""
        found: dict[str, Tensor] = {}
        for i in range(self.network.split_factor):
            of = self.row_prefix(i)
            logits_MBK, gated_BK = self._branches(i, images_BCHW)
            found |= {f"{of}branch{j}": logits_BK for j, logits_BK in enumerate(logits_MBK, start=1)}
            if self.ensembles:
                del found[f"{of}branch1"]
                found[f"{of}gated"] = gated_BK
        return found

    def _branches(self, i: int, images_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of the branches of network i, its own first, [M, B, K], and of their mixture [B, K]."""
        parts = require_stages(self.network.models[i], "one")
        logits_MBK, weights_BM = self._ensemble(i)(parts, images_BCHW)
        logits_MBK = at_least_float32(logits_MBK)
        return logits_MBK, NativeEnsemble.mixture(logits_MBK, weights_BM)

    def _ensemble(self, i: int) -> nn.Module:
        """The branches and the gate of network i."""
        return self.network.ensemble if isinstance(self.network, GatedNet) else self.ensembles[i]

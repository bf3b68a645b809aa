"""Deeply-supervised knowledge synergy (Sun et al., arXiv:1906.00675): auxiliary classifiers that teach each other."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from loss import at_least_float32
from loss.classification import CROSS_ENTROPY, ClassLoss
from loss.distillation import knowledge_synergy
from method import Method, Progress, StepOutput, Targets, methods
from method.options.dks import DKSOptions
from model.heads import require_stages, synergy_branches
from model.splitnet import SplitNet
from recipe.published import scaled_milestones


@methods.register("dks")
class DKS(Method[DKSOptions]):
    """Σ_h CE(head h, labels) + Σ_{h≠g} KL(constant p_g ‖ p_h) over the branches of a network and its own head.

    Several networks learn side by side, each with its own branches; the losses add up. The branches exist in training
    only; `model.heads.synergy_branches` has the rule by which they are made.

    Args:
        network: S networks with stages, made by `model.registry.build_network`.
        options: flags.
        class_loss: what every prediction costs against the labels.

    Raises:
        UserError: a backbone without stages, or stages that cannot carry a branch.
    """

    Options = DKSOptions
    exchanges = "the branches inside its networks, which are trained beside them"
    runs_networks_itself = True

    def __init__(self, network: SplitNet, options: DKSOptions, *, class_loss: ClassLoss = CROSS_ENTROPY) -> None:
        super().__init__(network, options, class_loss=class_loss)
        self.branches = nn.ModuleList(
            synergy_branches(require_stages(one, "dks"), options.dks_branches) for one in network.models
        )

    @classmethod
    def recipe(
        cls, dataset_recipe: str, epochs: int | None, given: Mapping[str, Any] | None = None
    ) -> Mapping[str, Any]:
        """CIFAR: the published recipe, its milestones scaled with the epochs; elsewhere only what is left out.

        The published training makes a new SGD at every drop of the rate, and so loses the momentum there.
        The published augmentation is crop (after reflection padding) and flip, without policy, erasing and mixup.
        """
        plain = {"is_mixup": False, "is_autoaugment": False, "is_cutout": False, "is_label_smoothing": False}
        if not dataset_recipe.startswith("cifar"):
            return plain
        total = 200 if epochs is None else epochs
        return plain | {
            "epochs": total,
            "batch_size": 128,
            "optimizer": "SGD",
            "lr": 0.1,
            "momentum": 0.9,
            "is_nesterov": False,
            "lr_mode": "step",
            "lr_milestones": scaled_milestones((59, 119, 159), total / 200),
            "lr_step_multiplier": 0.2,
            "dks_fresh_optimizer": True,
            "slow_start_epochs": -1,
            "end_lr": 0.0,
            "weight_decay": 5e-4,
            "is_wd_all": True,
            "padding": 4,
            "padding_mode": "reflect",
            "mean": (125.3 / 255, 123.0 / 255, 113.9 / 255),
            "std": (63.0 / 255, 62.1 / 255, 66.7 / 255),
        }

    def fresh_optimizer_at(self, milestones: Sequence[int]) -> Sequence[int]:
        """Every milestone, with --dks_fresh_optimizer."""
        return milestones if self.options.dks_fresh_optimizer else ()

    def forward(self, views_SBCHW: Tensor, targets: Targets, progress: Progress) -> StepOutput:
        """Views [S, B, C, H, W], or one shared view -> loss, metrics, logits [S, B, K] of the main heads.

        Metrics: loss_ce (summed over heads), loss_synergy, and loss_ce_<head> of each head.
        """
        losses_ce, losses_synergy, main = [], [], []
        metrics = {}
        for i, view_BCHW in enumerate(self.network.expand_views(views_SBCHW)):
            logits = self._heads(i, view_BCHW)
            for name, logits_BK in logits.items():
                loss = self.class_loss(logits_BK, targets).mean()
                losses_ce.append(loss)
                metrics[f"loss_ce_{name}"] = loss.detach()
            logits_HBK = at_least_float32(torch.stack([*logits.values()]))
            losses_synergy.append(knowledge_synergy(logits_HBK, matching=self.options.dks_matching).mean())
            main.append(logits_HBK[-1])
        loss_ce, loss_synergy = torch.stack(losses_ce).sum(), torch.stack(losses_synergy).sum()
        metrics = {"loss_ce": loss_ce.detach(), "loss_synergy": loss_synergy.detach()} | metrics
        return StepOutput(loss_ce + loss_synergy, metrics, torch.stack(main).detach())

    def compiled_parts(self) -> list[nn.Module]:
        """The branches, each of which runs its network."""
        return [*self.branches]

    def extra_logits(self, images_BCHW: Tensor) -> dict[str, Tensor]:
        """Logits [B, K] of every branch; all networks see the same images."""
        found: dict[str, Tensor] = {}
        for i in range(self.network.split_factor):
            logits = self._heads(i, images_BCHW)
            logits.popitem()
            found |= logits
        return found

    def _heads(self, i: int, images_BCHW: Tensor) -> dict[str, Tensor]:
        """Logits [B, K] of network i by head: its branches, the shallowest first, and its own head last."""
        of = self.row_prefix(i)
        logits = self.branches[i](require_stages(self.network.models[i], "dks"), images_BCHW)[1]
        names = [f"{of}branch{k}" for k in range(1, len(logits))] + [f"{of}main"]
        return dict(zip(names, logits, strict=True))

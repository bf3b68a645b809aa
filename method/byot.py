"""Be your own teacher (Zhang et al., arXiv:1905.08094): exits behind the stages learn from the network's own head."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from loss import at_least_float32
from loss.classification import CROSS_ENTROPY, ClassLoss
from loss.distillation import distillation_kl
from method import Method, Progress, StepOutput, Targets, methods
from method.options.byot import BYOTOptions
from model.heads import BottleneckExits, require_stages
from model.splitnet import SplitNet
from recipe.published import sgd_steps


@methods.register("byot")
class BeYourOwnTeacher(Method[BYOTOptions]):
    """CE(z_N) + Σ_{i<N} [ (1 - α) CE(z_i) + α KL(constant p_N ‖ p_i) + λ · mean_B ‖f_i - constant f_N‖² ].

    p = softmax(z / T), without a factor T² (the authors' later code) unless --byot_T2. A batch mean everywhere; both
    public codes differ from the paper and from each other. Several networks learn side by side, each with its own
    exits; the losses add up. The exits exist in training only.

    Args:
        network: S networks with two stages or more, made by `model.registry.build_network`.
        options: flags.
        class_loss: what every prediction costs against the labels.

    Raises:
        UserError: a backbone without stages, or with one only.
    """

    Options = BYOTOptions
    exchanges = "the exits inside its networks, which are trained beside them"
    runs_networks_itself = True

    def __init__(self, network: SplitNet, options: BYOTOptions, *, class_loss: ClassLoss = CROSS_ENTROPY) -> None:
        super().__init__(network, options, class_loss=class_loss)
        self.exits = nn.ModuleList(BottleneckExits(require_stages(one, "byot", at_least=2)) for one in network.models)

    @classmethod
    def recipe(
        cls, dataset_recipe: str, epochs: int | None, given: Mapping[str, Any] | None = None
    ) -> Mapping[str, Any]:
        """CIFAR: the published training, with AutoAugment and erasing; elsewhere nothing, as nothing is published."""
        if not dataset_recipe.startswith("cifar"):
            return {}
        total = epochs or 250
        rates = sgd_steps(epochs, usual=250, milestones=(), batch_size=128, lr=0.1, weight_decay=5e-4)
        milestones = tuple(m for m in (total // 3, 2 * total // 3, total - 10) if m > 0)
        return {**rates, "lr_milestones": milestones, "is_autoaugment": True, "is_cutout": True}

    def forward(self, views_SBCHW: Tensor, targets: Targets, progress: Progress) -> StepOutput:
        """Views [S, B, C, H, W], or one shared view -> loss, metrics, logits [S, B, K] of the networks themselves.

        Metrics, summed over networks and exits and weighted: loss_ce, loss_kl and, where it is on, loss_hint.
        """
        parts: dict[str, list[Tensor]] = {}
        main = []
        for i, view_BCHW in enumerate(self.network.expand_views(views_SBCHW)):
            embeddings, logits = self.exits[i](require_stages(self.network.models[i], "byot"), view_BCHW)
            for name, loss in self._losses(embeddings, at_least_float32(torch.stack(logits)), targets).items():
                parts.setdefault(name, []).append(loss)
            main.append(at_least_float32(logits[-1]))
        losses = {name: torch.stack(values).sum() for name, values in parts.items()}
        metrics = {name: loss.detach() for name, loss in losses.items()}
        return StepOutput(torch.stack([*losses.values()]).sum(), metrics, torch.stack(main).detach())

    def _losses(self, embeddings: list[Tensor], logits_EBK: Tensor, targets: Targets) -> dict[str, Tensor]:
        """The parts of one network's loss by name; the main head is the last."""
        options = self.options
        exits_EBK, main_BK = logits_EBK[:-1], logits_EBK[-1]
        loss_ce = self.class_loss(main_BK, targets).mean()
        loss_ce = loss_ce + (1 - options.byot_alpha) * self.summed_class_loss(exits_EBK, targets)
        fits_EB = distillation_kl(exits_EBK, main_BK, temperature=options.byot_temperature)
        scale = options.byot_alpha if options.byot_T2 else options.byot_alpha / options.byot_temperature**2
        losses = {"loss_ce": loss_ce, "loss_kl": scale * fits_EB.mean(dim=1).sum()}
        if options.byot_hint_weight > 0:
            *own, main_BD = map(at_least_float32, embeddings)
            distances = [(one_BD - main_BD.detach()).square().sum(dim=1).mean() for one_BD in own]
            losses["loss_hint"] = options.byot_hint_weight * torch.stack(distances).sum()
        return losses

    def compiled_parts(self) -> list[nn.Module]:
        """The exits, which run their network."""
        return [*self.exits]

    def extra_logits(self, images_BCHW: Tensor) -> dict[str, Tensor]:
        """Logits [B, K] of every exit, the shallowest first, and the mean of all heads, the main one included."""
        found: dict[str, Tensor] = {}
        for i in range(self.network.split_factor):
            of = self.row_prefix(i)
            _, logits = self.exits[i](require_stages(self.network.models[i], "byot"), images_BCHW)
            found |= {f"{of}exit{k}": logits_BK for k, logits_BK in enumerate(logits[:-1], start=1)}
            found[f"{of}exits_mean"] = torch.stack(logits).mean(dim=0)
        return found

"""Online distillation with diverse peers (Chen et al., arXiv:1912.00350): peers attend to each other, one leads."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from loss import at_least_float32
from loss.classification import CROSS_ENTROPY, ClassLoss
from loss.distillation import distillation_kl
from method import Method, Progress, StepOutput, Targets, methods
from method.inner import TeacherRamp
from method.options.okddip import OKDDipOptions
from model.heads import PeerAttention, embedding_size, peer_branches, require_stages
from model.splitnet import SplitNet
from model.staged import Staged
from recipe.published import sgd_steps
from utils.errors import UserError


class Group(nn.Module):
    """What attends to each other: P peers and a leader, their attention, and the branches that some of them are.

    Args:
        network: of the leader; its branches are the peers. None: whole networks are.
        size_D: of the embeddings.
        options: flags.
    """

    def __init__(self, network: Staged | None, size_D: int, options: OKDDipOptions) -> None:
        super().__init__()
        self.branches = None if network is None else peer_branches(network, options.okddip_branches - 1)
        self.attention = PeerAttention(size_D, options.okddip_factor)

    def forward(self, networks: list[Staged], views: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Networks and their views [B, C, H, W] -> logits [P + 1, B, K], the leader's last; attention [B, P, P]."""
        embeddings: list[Tensor] = []
        logits: list[Tensor] = []
        if self.branches is not None:
            embeddings, logits = self.branches(networks[0], views[0])
        else:
            for network, view_BCHW in zip(networks, views, strict=True):
                embedding_BD = network.tail(network.forward_features(view_BCHW)[0][-1])
                embeddings.append(embedding_BD)
                logits.append(network.classify(embedding_BD))
        return torch.stack(logits), self.attention(embeddings[:-1])


@methods.register("okddip")
class DiversePeers(Method[OKDDipOptions]):
    """Σ_a CE(z_a) + CE(z_L) + ramp · w · [ Σ_a T² KL(p(t_a) ‖ p(z_a)) + T² KL(p(t_L) ‖ p(z_L)) ], p = softmax(· / T).

    t_a = Σ_b A_ab z_b over the peers with attention A between their embeddings, t_L = mean_a z_a. As in the published
    code nothing is constant: peers are pulled by their own targets and by the leader, and the attention learns through
    the targets only. With branches, several networks learn side by side, each with its own; the losses add up.

    Args:
        network: networks with two stages or more, made by `model.registry.build_network`.
        options: flags.
        class_loss: what every prediction costs against the labels.

    Raises:
        UserError: a backbone without stages, fewer than two peers, or networks with embeddings of other sizes.
    """

    Options = OKDDipOptions
    exchanges = "embeddings and the attention between peers"
    runs_networks_itself = True

    def __init__(self, network: SplitNet, options: OKDDipOptions, *, class_loss: ClassLoss = CROSS_ENTROPY) -> None:
        super().__init__(network, options, class_loss=class_loss)
        least = 2 if options.okddip_share == "branches" else 1
        staged = [require_stages(one, "okddip", at_least=least) for one in network.models]
        sizes = [embedding_size(one) for one in staged]
        if options.okddip_share == "branches":
            if options.okddip_branches < 3:
                raise UserError(
                    f"--okddip_branches {options.okddip_branches}: two peers and a leader are needed: 3 or more."
                )
            groups = [Group(one, size, options) for one, size in zip(staged, sizes, strict=True)]
        else:
            if len(staged) < 3:
                raise UserError(
                    f"--okddip_share networks needs two peers and a leader, and there are {len(staged)} networks: give "
                    "--arch a list of three or more, or a --split_factor."
                )
            if len(set(sizes)) > 1:
                shown = ", ".join(map(str, sizes))
                raise UserError(
                    f"--okddip_share networks needs embeddings of one size, and these have {shown}: give equal --arch."
                )
            groups = [Group(None, sizes[0], options)]
        self.groups = nn.ModuleList(groups)
        self.ramp = TeacherRamp(options.okddip_ramp_epochs)

    @classmethod
    def recipe(
        cls, dataset_recipe: str, epochs: int | None, given: Mapping[str, Any] | None = None
    ) -> Mapping[str, Any]:
        """CIFAR: the published training; elsewhere nothing, because nothing is published. Networks share one view."""
        shared = {"is_diff_data_train": False} if (given or {}).get("okddip_share") == "networks" else {}
        if not dataset_recipe.startswith("cifar"):
            return shared
        rates = sgd_steps(epochs, usual=300, milestones=(150, 225), batch_size=128, lr=0.1, weight_decay=5e-4)
        return {**rates, "is_nesterov": True, **shared}

    def before_step(self, views_SBCHW: Tensor, targets: Targets, progress: Progress) -> None:
        """Bring the weight of the targets up to date."""
        self.ramp.bring_to(progress.epoch, progress.epochs)

    def forward(self, views_SBCHW: Tensor, targets: Targets, progress: Progress) -> StepOutput:
        """Views [S, B, C, H, W], or one shared view -> loss, metrics, logits [S, B, K] of the networks.

        Metrics, summed over everybody: loss_ce, loss_peers and loss_leader (weighted), and the ramp.
        """
        views = self.network.expand_views(views_SBCHW)
        losses_ce, losses_peers, losses_leader, own = [], [], [], []
        for logits_PBK, attention_BPP in self._run(views):
            losses_ce.append(self.summed_class_loss(logits_PBK, targets))
            peers_B, leader_B = self._targets_kl(logits_PBK, attention_BPP)
            losses_peers.append(peers_B.mean())
            losses_leader.append(leader_B.mean())
            own.append(logits_PBK[-1:] if self.options.okddip_share == "branches" else logits_PBK)
        loss_ce = torch.stack(losses_ce).sum()
        weight = self.ramp(loss_ce.dtype)
        scale = self.options.okddip_weight * weight
        loss_peers, loss_leader = scale * torch.stack(losses_peers).sum(), scale * torch.stack(losses_leader).sum()
        metrics = {"loss_ce": loss_ce.detach(), "loss_peers": loss_peers.detach(), "loss_leader": loss_leader.detach()}
        return StepOutput(
            loss_ce + loss_peers + loss_leader, metrics | {"ramp": weight.clone()}, torch.cat(own).detach()
        )

    def _targets_kl(self, logits_PBK: Tensor, attention_BPP: Tensor) -> tuple[Tensor, Tensor]:
        """What the peers, and what the leader is away from the targets, each [B]."""
        peers_PBK, leader_BK = logits_PBK[:-1], logits_PBK[-1]
        inside_PBK = peers_PBK.detach() if self.options.okddip_stop_gradient else peers_PBK
        targets_PBK = torch.einsum("bpq,qbk->pbk", attention_BPP.to(inside_PBK.dtype), inside_PBK)
        temperature = self.options.okddip_temperature
        peers_B = distillation_kl(peers_PBK, targets_PBK, temperature=temperature, is_constant=False).sum(dim=0)
        return peers_B, distillation_kl(leader_BK, inside_PBK.mean(dim=0), temperature=temperature, is_constant=False)

    def _run(self, views: Iterable[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """Logits [P + 1, B, K], the leader's last, and attention [B, P, P] of every group."""
        networks = [require_stages(one, "okddip") for one in self.network.models]
        if self.options.okddip_share == "networks":
            found = [self.groups[0](networks, [*views])]
        else:
            found = [group([one], [view]) for group, one, view in zip(self.groups, networks, views, strict=True)]
        return [(at_least_float32(logits_PBK), attention_BPP) for logits_PBK, attention_BPP in found]

    def deployed(self) -> nn.Module:
        """Of networks side by side the leader, unless all are to be counted."""
        alone = self.options.okddip_share == "networks" and self.options.okddip_deploy == "leader"
        return self.network.models[-1] if alone else self.network

    def compiled_parts(self) -> list[nn.Module]:
        """The groups, which run the networks."""
        return [*self.groups]

    def extra_logits(self, images_BCHW: Tensor) -> dict[str, Tensor]:
        """Logits [B, K] of every peer that is no network of its own, and of the peers' mean."""
        views = [images_BCHW] * self.network.split_factor
        found: dict[str, Tensor] = {}
        for i, (logits_PBK, _) in enumerate(self._run(views)):
            of = f"{i + 1}_" if len(self.groups) > 1 else ""
            if self.options.okddip_share == "branches":
                found |= {f"{of}peer{a}": logits_BK for a, logits_BK in enumerate(logits_PBK[:-1], start=1)}
            found[f"{of}peers_mean"] = logits_PBK[:-1].mean(dim=0)
        return found

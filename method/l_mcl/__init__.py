"""Layer-wise mutual contrastive learning (Yang et al., arXiv:2207.11518).

Shapes: N networks; M exits of all of them, numbered network by network, a network's own output being its last exit;
P unordered pairs of exits of different networks; B images, K classes.

Differences from the published implementation: a network's contrast inside itself reads its own memory bank, the
meta-gradient is exact, a meta round leaves nothing behind but the pair weights, images without a positive are skipped,
and an image is never its own positive draw.
"""

import math
from collections.abc import Mapping
from itertools import accumulate
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from loss import at_least_float32
from loss.classification import CROSS_ENTROPY, ClassLoss
from loss.contrastive import bank_contrast, batch_contrast, exit_pairs, same_class, update_bank
from loss.distillation import distillation_kl
from method import Method, Progress, StepOutput, Targets, methods
from method.inner import average_over_processes, finite_sgd_step
from method.l_mcl.class_table import ClassTable
from method.l_mcl.meta import VirtualSGD, buffers_restored, meta_gradient
from method.options.l_mcl import LMCLOptions
from model.heads import Gate, PairWeights, ProjectionHead, embedding_size, exit_heads, require_stages
from model.splitnet import SplitNet
from model.staged import Staged
from recipe.published import scaled_milestones
from utils.distributed import all_gather_rows, broadcast_buffers
from utils.errors import UserError
from utils.seed import STREAM_METHOD, fold_in, torch_generator

VIRTUAL_MOMENTUM = 0.9

# The published pairs of different networks; `lmcl_<backbone>` is --number_net networks of one backbone.
MIXED_PAIRS = {
    "lmcl_res32_res110_cifar": ("resnet32_cifar", "resnet110_cifar"),
    "lmcl_res56_res110_cifar": ("resnet56_cifar", "resnet110_cifar"),
    "lmcl_wrn_16_2_wrn_40_2_cifar": ("wrn_16_2_cifar", "wrn_40_2_cifar"),
    "lmcl_wrn_40_2_wrn_28_4_cifar": ("wrn_40_2_cifar", "wrn_28_4_cifar"),
    "lmcl_res56_wrn_40_2_cifar": ("resnet56_cifar", "wrn_40_2_cifar"),
    "lmcl_res110_wrn_28_4_cifar": ("resnet110_cifar", "wrn_28_4_cifar"),
    "lmcl_shufflev2_res110_cifar": ("ShuffleNetV2_1x_cifar", "resnet110_cifar"),
    "lmcl_shufflev2_wrn_40_2_cifar": ("ShuffleNetV2_1x_cifar", "wrn_40_2_cifar"),
    "lmcl_res18_shufflenetv2_1x_imagenet": ("resnet18_imagenet", "ShuffleNetV2_1x_imagenet"),
    "lmcl_res50_shufflenetv2_1x_imagenet": ("ShuffleNetV2_1x_imagenet", "resnet50_imagenet"),
    "lmcl_res18_res50_imagenet": ("resnet18_imagenet", "resnet50_imagenet"),
}


class Outputs(NamedTuple):
    """What the M exits make of a batch: embeddings [B, D_m] and logits [M, B, K]."""

    embeddings: list[Tensor]
    logits_MBK: Tensor


@methods.register("l_mcl")
class LMCL(Method[LMCLOptions]):
    """Exits of all networks learn from the labels, from aggregated predictions and from contrasting each other.

    L = Σ CE(exits) + Σ CE(aggregated) + Σ_ij KD(final i | constant aggregated j)
        + α VCL + β ICL + γ Soft-VCL + λ Soft-ICL,

    where the contrast of each pair of exits is weighted per image by a small meta-network. Every --meta_freq steps that
    network is trained through virtual SGD steps on the same batch. Only the networks themselves are kept afterwards.

    All networks see one view. The method reduces its own gradients: the meta round is local to a process, then the
    gradient of the meta-network is averaged.

    Args:
        network: two or more networks with stages, made by `model.registry.build_network`.
        options: flags.
        class_loss: what every prediction costs against the labels.

    Raises:
        UserError: fewer than two networks, or a backbone without stages.
    """

    Options = LMCLOptions
    exchanges = "embeddings, the exits of its networks and their memory banks"
    shared_view = True
    runs_networks_itself = True
    reduces_own_gradients = True
    incompatible: ClassVar[Mapping[str, str]] = {
        "is_syncbn": "its virtual steps are local to a process",
        "compile": "it runs parts of networks, and whole ones are compiled",
        "cuda_graph": "every step draws by its own number, which a graph would hold fast",
    }
    pairs_2P: Tensor
    network_M: Tensor
    finals_N: Tensor
    banks_NRD: Tensor | None

    def __init__(self, network: SplitNet, options: LMCLOptions, *, class_loss: ClassLoss = CROSS_ENTROPY) -> None:
        super().__init__(network, options, class_loss=class_loss)
        if network.split_factor < 2:
            raise UserError(
                "--method l_mcl needs two networks or more: give --arch lmcl_<backbone>, a list, or a --split_factor."
            )
        self.sampler = "class_balanced" if options.contrast == "batch" else "shuffled"
        self.soft_temperature = options.kd_T if options.soft_T is None else options.soft_T
        exits = [exit_heads(one) for one in self._networks()]
        self.exits = nn.ModuleList(exits)
        exits_per_network = [len(heads) + 1 for heads in exits]
        ends = list(accumulate(exits_per_network))
        self.exits_of = [slice(end - count, end) for end, count in zip(ends, exits_per_network, strict=True)]
        network_M = [i for i, count in enumerate(exits_per_network) for _ in range(count)]
        sizes = [embedding_size(one) for one in self._networks()]
        self.heads = nn.ModuleList(ProjectionHead(sizes[i], options.feat_dim) for i in network_M)
        self.gates = nn.ModuleList(Gate(count, size) for count, size in zip(exits_per_network, sizes, strict=True))
        self.weight_net = PairWeights([sizes[i] for i in network_M])
        self.register_buffer("pairs_2P", exit_pairs(exits_per_network), persistent=False)
        self.register_buffer("network_M", torch.tensor(network_M), persistent=False)
        self.register_buffer("finals_N", torch.tensor(ends) - 1, persistent=False)
        self.register_buffer("banks_NRD", None)
        self.table: ClassTable | None = None
        self.seed = 0
        self._meta_due = False
        self.weight_optimizer = torch.optim.SGD(
            self.weight_net.parameters(), lr=0.0, momentum=VIRTUAL_MOMENTUM, nesterov=True
        )

    @classmethod
    def recipe(
        cls, dataset_recipe: str, epochs: int | None, given: Mapping[str, Any] | None = None
    ) -> Mapping[str, Any]:
        """CIFAR and ImageNet: the published recipes (milestones scaled with the epochs); elsewhere what is left out.

        The published augmentation is crop and flip, without policy, erasing and mixup; the precision is fp32.
        """
        left_out = ("is_mixup", "is_autoaugment", "is_cutout", "is_label_smoothing", "is_amp")
        plain: dict[str, Any] = dict.fromkeys(left_out, False)
        published = plain | {
            "optimizer": "SGD",
            "lr": 0.1,
            "momentum": 0.9,
            "is_nesterov": True,
            "slow_start_epochs": -1,
            "end_lr": 0.0,
            "is_wd_all": True,
            "is_div_wd": False,
        }
        if dataset_recipe.startswith("cifar"):
            return published | {
                "epochs": 300 if epochs is None else epochs,
                "batch_size": 128,
                "padding": 4,
                "lr_mode": "epoch_cos",
                "weight_decay": 5e-4,
                "mean": (0.5071, 0.4867, 0.4408),
                "std": (0.2675, 0.2565, 0.2761),
            }
        if dataset_recipe == "imagenet":
            total = 100 if epochs is None else epochs
            return published | {
                "epochs": total,
                "batch_size": 256,
                "lr_mode": "step",
                "lr_milestones": scaled_milestones((30, 60, 90), total / 100),
                "lr_step_multiplier": 0.1,
                "weight_decay": 1e-4,
                "crop_area": (0.08, 1.0),
                "crop_pct": 0.875,  # 256 pixels for a crop of 224
                "contrast": "bank",
                "tau": 0.07,
                "alpha": 0.01,
                "beta": 0.01,
                "meta_freq": 500,
            }
        return plain

    @classmethod
    def backbone_names(cls, arch: str, options: LMCLOptions) -> list[str]:
        """Backbones behind `--arch`: a published pair's two, --number_net of an `lmcl_<backbone>`, or a comma list.

        Raises:
            UserError: a number of networks that a published pair or the list does not have.
        """
        if arch in MIXED_PAIRS:
            if options.number_net != 2:
                raise UserError(
                    f"--number_net {options.number_net}: --arch {arch} is a pair; give a list --arch a,b,c."
                )
            return [*MIXED_PAIRS[arch]]
        if arch.startswith("lmcl_"):
            return [arch.removeprefix("lmcl_")] * options.number_net
        names = super().backbone_names(arch, options)
        if len(names) > 1 and options.number_net not in (2, len(names)):  # 2: the default, which nobody may have given
            raise UserError(
                f"--number_net {options.number_net}: --arch {arch} has {len(names)} networks; leave it away."
            )
        return names

    def prepare(self, labels_N: Tensor, seed: int) -> None:
        """With memory banks: make them, and the table from which an image's positives and negatives are drawn.

        Raises:
            UserError: a class with too few images for --pos_k, or only one class.
        """
        if self.options.contrast != "bank":
            return
        counts = labels_N.bincount()
        fewest = int(counts[counts > 0].min())
        if fewest <= self.options.pos_k:
            raise UserError(
                f"--pos_k {self.options.pos_k} needs {self.options.pos_k + 1} images of each class, and the smallest "
                f"class has {fewest}: lower --pos_k or use --contrast batch."
            )
        if (counts > 0).sum() < 2:
            raise UserError("--contrast bank needs images of two classes or more, and the training set has one.")
        device = self.network_M.device
        self.seed = seed
        self.table = ClassTable(labels_N.to(device))
        if self.banks_NRD is None:
            size, bound = self.options.feat_dim, 1 / math.sqrt(self.options.feat_dim / 3)
            generator = torch_generator(seed, STREAM_METHOD)
            banks_NRD = torch.rand(self.network.split_factor, len(labels_N), size, generator=generator)
            dtype = torch.promote_types(next(self.heads.parameters()).dtype, torch.float32)
            self.banks_NRD = banks_NRD.mul_(2 * bound).sub_(bound).to(device, dtype)

    def before_step(self, views_SBCHW: Tensor, targets: Targets, progress: Progress) -> None:
        """Note that a meta round is due: where batches are accumulated, the update comes some batches later."""
        self._meta_due |= progress.batch % self.options.meta_freq == 0

    def forward(self, views_SBCHW: Tensor, targets: Targets, progress: Progress) -> StepOutput:
        """Views [1, B, C, H, W] -> loss, metrics, logits [N, B, K] of the networks themselves.

        Metrics: loss_ce (exits and aggregated predictions, summed), loss_kd; vcl, soft_vcl, icl, soft_icl, not yet
        weighted by alpha, gamma, beta, lam; and, with the batch as columns, how many images had no positive.
        """
        outputs = self.outputs(_single(views_SBCHW))
        loss_ce, loss_kd = self.supervised_losses(outputs, targets)
        projected_MBD = self._projected(outputs)
        with torch.no_grad():
            weights_PB = self.weight_net(outputs.embeddings, self.pairs_2P)
        totals = self._contrast(projected_MBD, weights_PB, targets, progress)
        loss = loss_ce + loss_kd + self._combined(totals)
        metrics = {"loss_ce": loss_ce, "loss_kd": loss_kd} | totals
        if self.banks_NRD is None:
            metrics["without_positive"] = (~same_class(targets.labels_B).any(dim=-1)).sum().float()
        elif self.training:
            self._update_banks(projected_MBD.detach(), progress)
        finals_NBK = outputs.logits_MBK[self.finals_N].detach()
        return StepOutput(loss, {k: v.detach() for k, v in metrics.items()}, finals_NBK)

    def supervised_losses(self, outputs: Outputs, targets: Targets) -> tuple[Tensor, Tensor]:
        """All of the loss but the contrast: classification of exits and aggregated predictions; distillation."""
        aggregated_NBK = self._aggregated(outputs)
        loss_ce = self._cross_entropy(outputs.logits_MBK, targets) + self._cross_entropy(aggregated_NBK, targets)
        finals_NBK = outputs.logits_MBK[self.finals_N]
        kd_NNB = distillation_kl(finals_NBK[:, None], aggregated_NBK[None], temperature=self.options.kd_T)
        return loss_ce, kd_NNB.mean(dim=-1).sum()

    def after_step(self, views_SBCHW: Tensor, targets: Targets, output: StepOutput, progress: Progress) -> None:
        """Every --meta_freq batches of an epoch, train the pair weights on the same batch."""
        if not self._meta_due:
            return
        self._meta_due = False
        view_BCHW = _single(views_SBCHW)
        with (
            buffers_restored(self.network, self.exits),
            torch.autocast(view_BCHW.device.type, enabled=False),  # second derivatives, and the recipe is fp32
        ):
            gradients = self._meta_round(view_BCHW, targets, progress)
        average_over_processes(gradients)
        for parameter, gradient in zip(self.weight_net.parameters(), gradients, strict=True):
            parameter.grad = gradient
        for group in self.weight_optimizer.param_groups:
            group.update(lr=progress.learning_rate, weight_decay=progress.weight_decay)
        # a round that is not finite changes nothing; the main step was not finite either and reports it
        finite_sgd_step(self.weight_optimizer, torch.stack([gradient.sum() for gradient in gradients]).sum())
        self.weight_optimizer.zero_grad()

    def synchronise(self) -> None:
        """Make the networks' and exits' buffers those of process 0; the banks are the same everywhere as they are."""
        broadcast_buffers(self.network)
        broadcast_buffers(self.exits)

    def trained_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """All but the pair weights, which the meta rounds train."""
        return [(name, p) for name, p in super().trained_parameters() if not name.startswith("weight_net.")]

    def extra_logits(self, images_BCHW: Tensor) -> dict[str, Tensor]:
        """Logits [B, K] of each network's auxiliary exits and of its aggregated prediction."""
        outputs = self.outputs(images_BCHW)
        found = {}
        for i, (own, aggregated_BK) in enumerate(zip(self.exits_of, self._aggregated(outputs), strict=True), 1):
            for j, logits_BK in enumerate(outputs.logits_MBK[own][:-1], 1):
                found[f"{i}_exit{j}"] = logits_BK
            found[f"{i}_aggregated"] = aggregated_BK
        return found

    def complete_figures(self, figures: dict[str, Any]) -> dict[str, Any]:
        """With `<i>_exit_max`: the best exit of network i, its own output included, as the published code selects."""
        extra = dict(figures.get("extra", {}))
        for i, acc1 in enumerate(figures["acc1"], 1):
            exits = [value for name, value in extra.items() if name.startswith(f"{i}_exit")]
            if exits and acc1 is not None:
                extra[f"{i}_exit_max"] = max(acc1, *exits)
        return figures | {"extra": extra}

    def training_state(self) -> dict[str, Any]:
        """Exits, heads, gates, pair weights, banks, and the momentum of the pair weights."""
        return super().training_state() | {"weight_optimizer": self.weight_optimizer.state_dict()}

    def load_training_state(self, state: Mapping[str, Any]) -> None:
        """Inverse of `training_state`, before or after `prepare`."""
        if "banks_NRD" in state and self.banks_NRD is None:
            self.banks_NRD = torch.empty_like(state["banks_NRD"], device=self.network_M.device)
        super().load_training_state(state)
        self.weight_optimizer.load_state_dict(state["weight_optimizer"])

    def _networks(self) -> list[Staged]:
        return [require_stages(network, "l_mcl") for network in self.network.models]

    def outputs(self, view_BCHW: Tensor) -> Outputs:
        """One pass through the networks and their exits."""
        embeddings: list[Tensor] = []
        logits: list[Tensor] = []
        for network, exits in zip(self._networks(), self.exits, strict=True):
            of_network = exits(network, view_BCHW)
            embeddings += of_network[0]
            logits += of_network[1]
        return Outputs(embeddings, at_least_float32(torch.stack(logits)))

    def _aggregated(self, outputs: Outputs) -> Tensor:
        """Each network's gated mixture of its exits' logits: [N, B, K]."""
        return torch.stack(
            [
                gate(outputs.embeddings[own], outputs.logits_MBK[own])
                for gate, own in zip(self.gates, self.exits_of, strict=True)
            ]
        )

    def _cross_entropy(self, logits_MBK: Tensor, targets: Targets) -> Tensor:
        """Batch mean, summed over the classifiers."""
        losses = [self.class_loss(one, targets).mean() for one in logits_MBK]
        return torch.stack(losses).sum()

    def _projected(self, outputs: Outputs) -> Tensor:
        """Unit-length embeddings [M, B, D]."""
        return torch.stack([head(e) for head, e in zip(self.heads, outputs.embeddings, strict=True)])

    def _contrast(
        self, projected_MBD: Tensor, weights_PB: Tensor, targets: Targets, progress: Progress
    ) -> dict[str, Tensor]:
        """Each of the four terms, weighted per pair and image, averaged over the batch, summed over ordered pairs."""
        temperatures = {"tau": self.options.tau, "soft_temperature": self.soft_temperature}
        if self.banks_NRD is None:
            terms = batch_contrast(projected_MBD, targets.labels_B, self.pairs_2P, **temperatures)
        else:
            assert self.table is not None
            key = fold_in(self.seed, STREAM_METHOD, progress.step)
            pos_k, neg_k = self.options.pos_k, self.options.neg_k
            columns_BC = self.table.draw(key, progress.indices_B, targets.labels_B, pos_k=pos_k, neg_k=neg_k)
            keys_NBCD = self.banks_NRD[:, columns_BC]
            terms = bank_contrast(projected_MBD, keys_NBCD, self.network_M, self.pairs_2P, pos_k=pos_k, **temperatures)
        # both orders of a pair have the same value
        return {
            name.removesuffix("_PB"): 2 * (weights_PB * v).mean(dim=-1).sum() for name, v in terms._asdict().items()
        }

    def _combined(self, totals: Mapping[str, Tensor]) -> Tensor:
        weights = self.options
        return (
            weights.alpha * totals["vcl"]
            + weights.gamma * totals["soft_vcl"]
            + weights.beta * totals["icl"]
            + weights.lam * totals["soft_icl"]
        )

    def _update_banks(self, projected_MBD: Tensor, progress: Progress) -> None:
        """Move the entries of this step's images, on all processes, towards the networks' own embeddings."""
        assert self.banks_NRD is not None
        indices_B = all_gather_rows(progress.indices_B)
        finals_BND = all_gather_rows(projected_MBD[self.finals_N].transpose(0, 1).contiguous())
        for bank_RD, final_BD in zip(self.banks_NRD, finals_BND.transpose(0, 1), strict=True):
            update_bank(bank_RD, indices_B, final_BD, momentum=self.options.nce_m)

    def _meta_round(self, view_BCHW: Tensor, targets: Targets, progress: Progress) -> list[Tensor]:
        """Gradient of the classification loss after the virtual steps with respect to the pair weights."""
        trained = self.trained_parameters()
        theta = [p for name, p in trained if not name.startswith("gates.")]
        view_BCHW = view_BCHW.to(theta[0].dtype)

        def contrast() -> Tensor:
            outputs = self.outputs(view_BCHW)
            weights_PB = self.weight_net(outputs.embeddings, self.pairs_2P)
            return self._combined(self._contrast(self._projected(outputs), weights_PB, targets, progress))

        def classification() -> Tensor:
            return self._cross_entropy(self.outputs(view_BCHW).logits_MBK, targets)

        sgd = VirtualSGD(progress.learning_rate, VIRTUAL_MOMENTUM, progress.weight_decay)
        phi = [*self.weight_net.parameters()]
        return meta_gradient(contrast, classification, theta, phi, steps=self.options.times, sgd=sgd)[1]


def _single(views_SBCHW: Tensor) -> Tensor:
    if len(views_SBCHW) != 1:
        raise ValueError(f"l_mcl compares networks on one and the same view, got {len(views_SBCHW)}.")
    return views_SBCHW[0]

"""Multi-input multi-output networks (Havasi et al., arXiv:2010.06610): M predictions of M images in one pass."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Self

import torch
import torch.distributed as dist
from torch import Tensor

from loss import at_least_float32
from loss.classification import CROSS_ENTROPY, ClassLoss
from method import Progress, StepOutput, Targets, methods
from method.members import MemberMethod, joined_losses
from method.options.mimo import MimoOptions
from model import LARGE, BackboneRequest
from model.members import MimoNet
from model.registry import MemberForm, request_of
from model.splitnet import SplitNet
from recipe.published import long_steps
from utils.distributed import all_gather_rows, gather_counts, is_alone
from utils.seed import STREAM_METHOD, torch_generator


def member_orders(rows: int, members: int, shared: float, generator: torch.Generator) -> Tensor:
    """Which row each member takes its image from: int64 [M, N], each a permutation of the N rows.

    As the published code does: a base permutation; its first int(N (1 - ρ)) rows are permuted anew for each member, and
    the others are the same for all.

    Args:
        rows: N.
        members: M.
        shared: ρ in [0, 1].
        generator: that draws.
    """
    base_N = torch.randperm(rows, generator=generator)
    count = int(rows * (1 - shared))
    own = [base_N[:count][torch.randperm(count, generator=generator)] for _ in range(members)]
    return torch.stack([torch.cat([one, base_N[count:]]) for one in own])


class StepImages(NamedTuple):
    """A step's images of all processes, and which of them are this process's.

    Attributes:
        views_VBCHW, targets: of all images of the step, in the order of the processes.
        counts_W: images of every process.
        rank: of this process.
    """

    views_VBCHW: Tensor
    targets: Targets
    counts_W: Sequence[int]
    rank: int

    @classmethod
    def gathered(cls, views_VBCHW: Tensor, targets: Targets, counts_W: Sequence[int]) -> Self:
        """What this process has, put together with what the others have; the host does not wait."""
        labels_B, labels_other_B = (all_gather_rows(labels_B, counts_W) for labels_B in targets[:2])
        views_BVCHW = all_gather_rows(views_VBCHW.transpose(0, 1).contiguous(), counts_W)
        return cls(
            views_BVCHW.transpose(0, 1), Targets(labels_B, labels_other_B, targets.lam), counts_W, dist.get_rank()
        )

    def rows(self, repetition: int = 1) -> slice:
        """Places of this process's images, or of its share of the rows where each image has so many."""
        first, count = sum(self.counts_W[: self.rank]), self.counts_W[self.rank]
        return slice(repetition * first, repetition * (first + count))


@methods.register("mimo")
class Mimo(MemberMethod[MimoOptions]):
    """Σ_m CE(z_m, labels of member m's images): mean over N rows, each of which shows every member an image.

    The batch is repeated r times, so a step costs r times a plain one. The orders are a function of (seed, step), and
    are of the images of all processes, so that a run does not depend on how many there are: every process is given the
    images of the others and runs its share of the rows.

    Args:
        network: a `model.members.MimoNet`.
        options: flags.
        class_loss: what every prediction costs against the labels.
    """

    Options = MimoOptions
    exchanges = "all weights of its members"
    name = "mimo"
    runs_networks_itself = True

    def __init__(self, network: SplitNet, options: MimoOptions, *, class_loss: ClassLoss = CROSS_ENTROPY) -> None:
        super().__init__(network, options, class_loss=class_loss)
        if not isinstance(network, MimoNet):
            raise ValueError("expected a network of the form mimo")
        is_large = request_of(network.models[0]).shape == LARGE
        given = options.mimo_batch_repetition, options.mimo_input_repetition
        self.repetition = (2 if is_large else 4) if given[0] is None else given[0]
        self.shared = (0.6 if is_large else 0.0) if given[1] is None else given[1]
        self._seed = 0
        self._orders_MN: Tensor | None = None
        self._everyones: StepImages | None = None

    @classmethod
    def member_form(cls, options: MimoOptions, request: BackboneRequest, seed: int) -> MemberForm:
        """M inputs and outputs of one network."""
        members = options.num_members or (2 if request.shape == LARGE else 3)
        return MemberForm(kind="mimo", members=members, numbers={})

    @classmethod
    def recipe(
        cls, dataset_recipe: str, epochs: int | None, given: Mapping[str, Any] | None = None
    ) -> Mapping[str, Any]:
        """The published training on CIFAR (WRN-28-10) and ImageNet (ResNet-50), and the rule of the ensemble."""
        rule = {"is_ensembled_after_softmax": True}
        if dataset_recipe == "imagenet":
            return {**long_steps(epochs, usual=150, milestones=(50, 100, 133), given=given, large=True), **rule}
        if not dataset_recipe.startswith("cifar"):
            return rule
        return {**long_steps(epochs, usual=250, milestones=(100, 200, 225), given=given), **rule}

    def prepare(self, labels_N: Tensor, seed: int) -> None:
        """Take the seed of the orders."""
        self._seed = seed

    def before_step(self, views_SBCHW: Tensor, targets: Targets, progress: Progress) -> None:
        """Draw the members' orders of this step, and write them where the last ones stood; gather what they order."""
        count = len(targets.labels_B)
        if not is_alone():
            counts_W = progress.counts_W or gather_counts(count, targets.labels_B.device)
            views = views_SBCHW.unsqueeze(0) if views_SBCHW.dim() == 4 else views_SBCHW
            self._everyones = StepImages.gathered(views, targets, counts_W)
            count = sum(counts_W)
        rows = self.repetition * count
        generator = torch_generator(self._seed, STREAM_METHOD, progress.step)
        orders_MN = member_orders(rows, self.network.num_members, self.shared, generator)
        if self._orders_MN is None or self._orders_MN.shape != orders_MN.shape:
            self._orders_MN = orders_MN.to(targets.labels_B.device)
        else:
            self._orders_MN.copy_(orders_MN, non_blocking=True)

    def forward(self, views_SBCHW: Tensor, targets: Targets, progress: Progress) -> StepOutput:
        """Views [M, B, C, H, W], or one shared view -> loss, metrics (loss_ce), logits [M, B, K].

        The logits of an image are those of the first of its rows.
        """
        assert isinstance(self.network, MimoNet)
        everyones, own = self._everyones, slice(None)
        self._everyones = None  # of this step only
        if everyones is not None:
            views_SBCHW, targets, own = everyones.views_VBCHW, everyones.targets, everyones.rows()
        views = self.network.members_first(views_SBCHW)
        count, members = views.shape[1], len(views)
        orders_MN = self._orders_MN
        if orders_MN is None or orders_MN.shape[1] != self.repetition * count:
            # whoever asks without a step, to count what one costs
            orders_MN = torch.arange(self.repetition * count, device=views.device).expand(members, -1)
        share_MN = orders_MN if everyones is None else orders_MN[:, everyones.rows(self.repetition)]
        images_MN = share_MN % count
        rows = torch.stack([view[places] for view, places in zip(views, images_MN, strict=True)])
        logits_MNK = at_least_float32(self.network(rows))
        losses = [
            self.class_loss(logits, Targets(targets.labels_B[i], targets.labels_other_B[i], targets.lam)).mean()
            for logits, i in zip(logits_MNK, images_MN, strict=True)
        ]
        loss = joined_losses(losses, self.options.member_loss)
        where_MB = orders_MN.argsort(dim=1)[:, :count][:, own]
        all_MNK = logits_MNK.detach()
        if everyones is not None:
            sizes = [self.repetition * one for one in everyones.counts_W]
            all_MNK = all_gather_rows(all_MNK.transpose(0, 1).contiguous(), sizes).transpose(0, 1)
        shown = torch.stack([logits[rows_B] for logits, rows_B in zip(all_MNK, where_MB, strict=True)])
        return StepOutput(loss, {"loss_ce": loss.detach()}, shown)

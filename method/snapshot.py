"""Snapshot ensembles (Huang et al., arXiv:1704.00109): the members are moments of one training run."""

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from loss import at_least_float32
from loss.classification import CROSS_ENTROPY, ClassLoss
from method import Method, Progress, StepOutput, Targets, methods
from method.members import refuse_several_networks
from method.options.snapshot import SnapshotOptions
from model.splitnet import SplitNet
from utils.errors import UserError

OF_PAIRS = ("disagreement", "mean_pairwise_js", "js_divergence")  # figures that compare networks with each other


@methods.register("snapshot")
class Snapshot(Method[SnapshotOptions]):
    """CE(labels) of one network, whose weights at M moments of its training are the members of an ensemble.

    A cycle has C = ⌈T / M⌉ of the T steps (equation 2). The last of the networks is the one that trains; the others are
    the snapshots, the oldest first, and asleep. An evaluation or a checkpoint before all are taken sees the network as
    it is in the places that are still empty. Momentum is kept over the restarts.

    Args:
        network: as many networks of one structure as snapshots are kept.
        options: flags.
        class_loss: what a prediction costs against the labels.
    """

    Options = SnapshotOptions
    exchanges = "the weights of the network that its members are moments of"
    shared_view = True
    runs_networks_itself = True
    incompatible = {"ema_decay": "a snapshot is the network at one moment, not an average over many"}  # noqa: RUF012

    def __init__(self, network: SplitNet, options: SnapshotOptions, *, class_loss: ClassLoss = CROSS_ENTROPY) -> None:
        super().__init__(network, options, class_loss=class_loss)
        for one in network.models[:-1]:
            one.requires_grad_(False)
        self._taken = 0

    @classmethod
    def recipe(
        cls, dataset_recipe: str, epochs: int | None, given: Mapping[str, Any] | None = None
    ) -> Mapping[str, Any]:
        """The cycles of the learning rate, and the published rule of the ensemble."""
        given = given or {}
        rule = {"is_ensembled_after_softmax": True}
        if given.get("snapshot_lr") == "as_given":
            return rule
        cycles = given.get("num_members", SnapshotOptions.num_members)
        return rule | {"lr_mode": "cycles", "lr_cycles": cycles, "slow_start_epochs": -1, "end_lr": 0.0}

    @classmethod
    def implied_flags(cls, given: Mapping[str, Any]) -> Mapping[str, Any]:
        """Nothing; refuses what cannot go with members that are moments."""
        refuse_several_networks("snapshot", given)
        if "lr_mode" in given and given.get("snapshot_lr") != "as_given":
            raise UserError(
                f"--lr_mode {given['lr_mode']}: --method snapshot has cycles of its own; add --snapshot_lr as_given."
            )
        members, last = given.get("num_members", SnapshotOptions.num_members), given.get("snapshot_last")
        if last is not None and last > members:
            raise UserError(f"--snapshot_last {last}: there are {members} snapshots (--num_members).")
        return {}

    @classmethod
    def backbone_names(cls, arch: str, options: SnapshotOptions) -> list[str]:
        """One network for each snapshot that is kept."""
        return [arch] * (options.snapshot_last or options.num_members)

    @property
    def live(self) -> nn.Module:
        """The network that trains."""
        return self.network.models[-1]

    def before_step(self, views_SBCHW: Tensor, targets: Targets, progress: Progress) -> None:
        """Take the snapshot of a cycle that the step before this one has ended.

        Raises:
            UserError: a training so short that it has not M ends of cycles or epochs.
        """
        due = self._ended(progress)
        while self._taken < due:
            # of M snapshots the newest are kept, and the last is the network itself
            place = self._taken - (self.options.num_members - self.network.split_factor)
            if place >= 0:
                self.network.models[place].load_state_dict(self.live.state_dict())
            self._taken += 1

    def _ended(self, progress: Progress) -> int:
        """How many cycles, or counted epochs, had ended before this step; the last one ends with training."""
        members = self.options.num_members
        if self.options.snapshot_lr == "as_given":
            if progress.epochs < members:
                raise UserError(f"--num_members {members}: there are {progress.epochs} epochs to take snapshots after.")
            return max(progress.epoch - (progress.epochs - members), 0)
        steps = progress.epochs * progress.steps_per_epoch
        cycle = math.ceil(steps / members)
        if steps < members or math.ceil(steps / cycle) != members:
            raise UserError(f"--num_members {members}: {steps} steps are too few for so many cycles of equal length.")
        return progress.step // cycle

    def forward(self, views_SBCHW: Tensor, targets: Targets, progress: Progress) -> StepOutput:
        """Views [1, B, C, H, W] -> loss, metrics (loss_ce), the same logits in the place of every member [S, B, K]."""
        logits_BK = at_least_float32(self.live(views_SBCHW[0]))
        loss = self.class_loss(logits_BK, targets).mean()
        members_SBK = logits_BK.detach().expand(self.network.split_factor, -1, -1)
        return StepOutput(loss, {"loss_ce": loss.detach()}, members_SBK)

    def synchronise(self) -> None:
        """Also: places of snapshots that are not taken yet hold the network as it is."""
        super().synchronise()
        for one in self.network.models[self._kept() : -1]:
            one.load_state_dict(self.live.state_dict())

    def complete_figures(self, figures: dict[str, Any]) -> dict[str, Any]:
        """Without what compares networks, as long as the one that trains stands in all places."""
        if self._kept() or self.network.split_factor == 1:
            return figures
        return figures | {name: None for name in OF_PAIRS if name in figures}

    def _kept(self) -> int:
        """How many of the snapshots that are kept are taken."""
        return max(self._taken - (self.options.num_members - self.network.split_factor), 0)

    def losses_in_sum(self) -> int:
        """One: one network trains."""
        return 1

    def compiled_parts(self) -> list[nn.Module]:
        """The network that trains."""
        return [self.live]

    def training_state(self) -> dict[str, Any]:
        """How many snapshots are taken; they stand among the networks."""
        return {"taken": self._taken}

    def load_training_state(self, state: Mapping[str, Any]) -> None:
        """Inverse of `training_state`."""
        self._taken = int(state["taken"])

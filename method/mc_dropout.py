"""Monte-Carlo dropout (Gal and Ghahramani, arXiv:1506.02142): the members are dropout masks of one network."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from loss import at_least_float32
from loss.classification import CROSS_ENTROPY, ClassLoss
from method import Progress, StepOutput, Targets, methods
from method.members import MemberMethod
from method.options.mc_dropout import MCDropoutOptions
from model import LARGE, BackboneRequest
from model.members import MCDropoutNet
from model.registry import MemberForm
from model.splitnet import SplitNet


@methods.register("mc_dropout")
class MCDropout(MemberMethod[MCDropoutOptions]):
    """CE(labels) of one pass with dropout; an evaluation makes T passes with masks that are fixed by the seed.

    Published codes drop within blocks and draw for every image; ours drops channels behind stages, which runs on any
    backbone with stages, and by masks that are the same for every image.

    Args:
        network: a `model.members.MCDropoutNet`.
        options: flags.
        class_loss: what a prediction costs against the labels.
    """

    Options = MCDropoutOptions
    exchanges = "all weights of its members"
    name = "mc_dropout"
    shared_view = True
    runs_networks_itself = True

    def __init__(self, network: SplitNet, options: MCDropoutOptions, *, class_loss: ClassLoss = CROSS_ENTROPY) -> None:
        super().__init__(network, options, class_loss=class_loss)
        if not isinstance(network, MCDropoutNet):
            raise ValueError("expected a network of the form mc_dropout")

    @classmethod
    def recipe(
        cls, dataset_recipe: str, epochs: int | None, given: Mapping[str, Any] | None = None
    ) -> Mapping[str, Any]:
        """The published rule of the ensemble."""
        return {"is_ensembled_after_softmax": True}

    @classmethod
    def member_form(cls, options: MCDropoutOptions, request: BackboneRequest, seed: int) -> MemberForm:
        """T masks of one network, drawn from the run's seed."""
        usual = 0.05 if request.shape == LARGE else 0.1
        rate = usual if options.mc_dropout_rate is None else options.mc_dropout_rate
        numbers: dict[str, float | int | str] = {"place": options.mc_dropout_place, "rate": rate, "mask_seed": seed}
        return MemberForm(kind="mc_dropout", members=options.num_members, numbers=numbers)

    def losses_in_sum(self) -> int:
        """One: a step is one pass, with one mask."""
        return 1

    def forward(self, views_SBCHW: Tensor, targets: Targets, progress: Progress) -> StepOutput:
        """Views [1, B, C, H, W] -> loss, metrics (loss_ce), the pass's logits in every member's place [T, B, K]."""
        logits_BK = at_least_float32(self.network(views_SBCHW)[0])
        loss = self.class_loss(logits_BK, targets).mean()
        shown = logits_BK.detach().expand(self.network.num_members, -1, -1)
        return StepOutput(loss, {"loss_ce": loss.detach()}, shown)

"""Flags of co-training."""

from dataclasses import dataclass

from method.options import method_options
from utils.options import TAKES, Options, option

# keys of loss.agreement.AGREEMENT_LOSSES
AGREEMENTS = (
    "js_divergence",
    "kl_seperate",
    "kl_separate",
    "kl_mean",
    "mse_seperate",
    "mse_separate",
    "mse_mean",
    "smooth_l1_seperate",
    "smooth_l1_separate",
    "smooth_l1_mean",
)


@method_options.register("co_training")
@dataclass(frozen=True, kw_only=True)
class CoTrainingOptions(Options):
    """Flags of the losses that the networks share."""

    is_cot_loss: bool = option(True, "tie the networks by a co-training loss", resume=TAKES)
    cot_loss_choose: str = option("js_divergence", "co-training loss", choices=AGREEMENTS, resume=TAKES)
    cot_weight: float = option(0.5, "weight of the co-training loss", aliases=("kl_weight",), least=0, resume=TAKES)
    is_cot_weight_warm_up: bool = option(
        True, "raise that weight linearly at first", aliases=("is_kl_weight_warm_up",), resume=TAKES
    )
    cot_weight_warm_up_epochs: int | None = option(
        None,
        "length of that rise",
        unit="epochs",
        aliases=("kl_weight_warm_up_epochs",),
        default_text="set by the recipe",
        least=0,
        resume=TAKES,
    )
    is_ensembled_loss: bool = option(False, "also train the ensemble (mean of logits) on the labels", resume=TAKES)
    ensembled_loss_weight: float = option(0.5, "weight of the ensemble's classification loss", least=0, resume=TAKES)

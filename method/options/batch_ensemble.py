"""Flags of BatchEnsemble."""

from dataclasses import dataclass

from method.options import method_options
from utils.options import BY_RECIPE, SAME, TAKES, Options, option


@method_options.register("batch_ensemble")
@dataclass(frozen=True, kw_only=True)
class BatchEnsembleOptions(Options):
    """Flags of BatchEnsemble."""

    num_members: int = option(
        4, "M: members, in place of S networks", aliases=("num_estimators",), least=1, most=1000, resume=SAME
    )
    member_loss: str = option("mean", "over the members", choices=("sum", "mean"), resume=TAKES)
    be_norm: str = option(
        "shared",
        "one normalisation over the maps of all members, or one for each",
        choices=("shared", "member"),
        resume=SAME,
    )
    be_init: float = option(
        -0.5,
        "the members' factors: -σ draws them from N(1, σ²); p > 0 is 1 with probability p, else -1; 0 is 1",
        most=1,
        resume="the factors are those of the checkpoint",
    )
    be_batch: str = option(
        "repeat",
        "every member sees every image (M times the work of a step), or one of M equal parts each",
        choices=("repeat", "split"),
        resume=TAKES,
    )
    be_fast_lr: float = option(
        0.5, "rate of the members' factors in multiples of --lr", default_text=BY_RECIPE, least=0, resume=TAKES
    )

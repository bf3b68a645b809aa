"""Flags of deeply-supervised knowledge synergy."""

from dataclasses import dataclass

from method.options import method_options
from utils.options import BY_RECIPE, SAME, TAKES, Options, option

MATCHINGS = ("dense", "top_down", "bottom_up", "none")  # those of loss.distillation


@method_options.register("dks")
@dataclass(frozen=True, kw_only=True)
class DKSOptions(Options):
    """Flags of deeply-supervised knowledge synergy."""

    dks_branches: tuple[int, ...] | None = option(
        None,
        "stages that the branches hang behind, counted from 1",
        default_text="the two before the last",
        resume=SAME,
    )
    dks_matching: str = option(
        "dense",
        "which heads teach which: all the others, deeper ones the shallower, the other way round, or nobody "
        "(deep supervision alone)",
        choices=MATCHINGS,
        resume=TAKES,
    )
    dks_fresh_optimizer: bool = option(
        False,
        "make the optimiser anew at every --lr_milestones epoch, so that momentum starts from nothing",
        default_text=BY_RECIPE,
        resume=TAKES,
    )

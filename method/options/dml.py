"""Flags of deep mutual learning."""

from dataclasses import dataclass

from method.options import method_options
from utils.options import TAKES, Options, option


@method_options.register("dml")
@dataclass(frozen=True, kw_only=True)
class DMLOptions(Options):
    """Flags of deep mutual learning."""

    dml_weight: float = option(1.0, "weight of the peers' predictions beside the labels", least=0, resume=TAKES)
    dml_temperature: float = option(1.0, "temperature of the predictions that are compared", above=0, resume=TAKES)
    dml_teacher: str = option(
        "peers",
        "what a network fits: each peer's prediction in turn, averaged over the losses, or the mean of the peers' "
        "predictions (the paper's ensemble variant)",
        choices=("peers", "ensemble"),
        resume=TAKES,
    )

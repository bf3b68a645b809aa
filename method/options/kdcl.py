"""Flags of collaborative learning."""

from dataclasses import dataclass

from method.options import method_options
from utils.options import TAKES, Options, option

COLLABORATIVE_TARGETS = ("minlogit", "naive", "mean")  # see loss.distillation.collaborative_target


@method_options.register("kdcl")
@dataclass(frozen=True, kw_only=True)
class KDCLOptions(Options):
    """Flags of collaborative learning."""

    kdcl_target: str = option(
        "minlogit",
        "what all networks fit: the least of each class's logits above the label's, for every image the network that "
        "knows it best, or the mean of the logits",
        choices=COLLABORATIVE_TARGETS,
        resume=TAKES,
    )
    kdcl_temperature: float = option(2.0, "temperature of the predictions that are compared", above=0, resume=TAKES)
    kdcl_weight: float = option(1.0, "weight of that target beside the labels", least=0, resume=TAKES)

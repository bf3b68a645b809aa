"""Flags of the on-the-fly native ensemble."""

from dataclasses import dataclass

from method.options import method_options
from utils.options import SAME, TAKES, Options, option


@method_options.register("one")
@dataclass(frozen=True, kw_only=True)
class ONEOptions(Options):
    """Flags of the on-the-fly native ensemble."""

    one_branches: int = option(
        3, "branches: the network's own last stage and copies of it beside it", least=2, most=64, resume=SAME
    )
    one_temperature: float = option(3.0, "temperature of the predictions that are compared", above=0, resume=TAKES)
    one_weight: float = option(1.0, "weight of the gated mixture as a teacher", least=0, resume=TAKES)
    one_deploy: str = option(
        "network",
        "what is evaluated, saved and counted: the network alone, or it with its branches and their gate (one network)",
        choices=("network", "gated"),
        resume=SAME,
    )
    one_ramp_epochs: int | None = option(
        None,
        "rise of that weight",
        unit="epochs",
        default_text="80 of 300, in proportion",
        least=0,
        resume=TAKES,
    )

"""Flags of be your own teacher."""

from dataclasses import dataclass

from method.options import method_options
from utils.options import TAKES, Options, option


@method_options.register("byot")
@dataclass(frozen=True, kw_only=True)
class BYOTOptions(Options):
    """Flags of be your own teacher."""

    byot_alpha: float = option(
        0.3,
        "an exit's weight of the deepest head's prediction, 1 minus it that of the labels",
        least=0,
        most=1,
        resume=TAKES,
    )
    byot_temperature: float = option(3.0, "temperature of the predictions that are compared", above=0, resume=TAKES)
    byot_T2: bool = option(False, "multiply that part by the square of the temperature", resume=TAKES)
    byot_hint_weight: float = option(
        0.03, "weight of the distance of an exit's embedding from the network's; 0: none", least=0, resume=TAKES
    )

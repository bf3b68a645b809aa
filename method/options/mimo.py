"""Flags of multi-input multi-output networks."""

from dataclasses import dataclass

from method.options import method_options
from utils.options import SAME, TAKES, Options, option


@method_options.register("mimo")
@dataclass(frozen=True, kw_only=True)
class MimoOptions(Options):
    """Flags of multi-input multi-output networks."""

    num_members: int | None = option(
        None,
        "M: inputs and outputs, in place of S networks",
        aliases=("num_estimators",),
        default_text="3 on small images, 2 on large ones",
        least=1,
        most=1000,
        resume=SAME,
    )
    member_loss: str = option("sum", "over the members", choices=("sum", "mean"), resume=TAKES)
    mimo_batch_repetition: int | None = option(
        None,
        "rows of a step for each image of the batch",
        default_text="4 on small images, 2 on large ones",
        least=1,
        resume=TAKES,
    )
    mimo_input_repetition: float | None = option(
        None,
        "part of the rows that show one image to all members",
        default_text="0 on small images, 0.6 on large ones",
        least=0,
        most=1,
        resume=TAKES,
    )

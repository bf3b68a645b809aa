"""Flags of Packed-Ensembles."""

from dataclasses import dataclass

from method.options import method_options
from model.options import AUTO
from utils.options import SAME, TAKES, Options, option


@method_options.register("packed")
@dataclass(frozen=True, kw_only=True)
class PackedOptions(Options):
    """Flags of Packed-Ensembles; with gamma 1 they are M independent networks of width alpha / M on one view"""

    num_members: int = option(
        4, "M: members, in place of S networks", aliases=("num_estimators",), least=1, most=1000, resume=SAME
    )
    member_loss: str = option("mean", "over the members", choices=("sum", "mean"), resume=TAKES)
    packed_alpha: str = option(
        AUTO,
        "width of a member: alpha / M of the backbone's, or auto, which solves the stages' widths so that M members "
        "have the backbone's parameters (--divide_by macs: its MACs)",
        metavar="auto|X",
        resume=SAME,
    )
    packed_gamma: int = option(
        1, "into how many groups a member's convolutions are split once more", least=1, resume=SAME
    )
    packed_min_channels: int = option(64, "least inputs of a group that --packed_gamma makes", least=1, resume=SAME)
    packed_views: bool = option(False, "every member has its own view; published: all have one", resume=SAME)

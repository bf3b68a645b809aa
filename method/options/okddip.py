"""Flags of online distillation with diverse peers."""

from dataclasses import dataclass

from method.options import method_options
from utils.options import SAME, TAKES, Options, option


@method_options.register("okddip")
@dataclass(frozen=True, kw_only=True)
class OKDDipOptions(Options):
    """Flags of online distillation with diverse peers."""

    okddip_share: str = option(
        "branches",
        "who the peers are: branches behind a shared trunk, the network itself the leader; or networks side by side, "
        "the last one the leader",
        choices=("branches", "networks"),
        resume=SAME,
    )
    okddip_branches: int = option(4, "branches, the leader included", least=1, most=64, resume=SAME)
    okddip_factor: int = option(
        8, "embeddings are compared in a space of so many times fewer dimensions", least=1, resume=SAME
    )
    okddip_temperature: float = option(3.0, "temperature of the predictions that are compared", above=0, resume=TAKES)
    okddip_weight: float = option(1.0, "weight of the peers' predictions beside the labels", least=0, resume=TAKES)
    okddip_ramp_epochs: int | None = option(
        None,
        "rise of that weight",
        unit="epochs",
        default_text="80 of 300, in proportion",
        least=0,
        resume=TAKES,
    )
    okddip_stop_gradient: bool = option(
        False, "predictions inside the targets are constant; the attention still learns through them", resume=TAKES
    )
    okddip_deploy: str = option(
        "leader",
        "with --okddip_share networks, what parameters and MACs are counted of; all networks are kept in any case",
        choices=("leader", "ensemble"),
        resume=TAKES,
    )

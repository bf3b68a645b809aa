"""Flags of the architecture search."""

from dataclasses import dataclass

from method.options import method_options
from utils.errors import UserError
from utils.options import SAME, TAKES, Options, option


@method_options.register("cream")
@dataclass(frozen=True, kw_only=True)
class CreamSearchOptions(Options):
    """Flags of the search; those that shape the supernet are with the Cream backbones."""

    pool_size: int = option(10, "paths on the board", least=1, resume=SAME)
    acc_gap: float = option(
        5.0,
        "lead over the board's worst path that lets a dearer one in",
        unit="percentage points",
        least=0,
        resume=TAKES,
    )
    meta_sta_epoch: int = option(
        20,
        "last epoch, from 0, without board, teacher and meta update",
        default_text="20 of 120 epochs, else alike",
        least=0,
        resume=TAKES,
    )
    update_iter: int = option(200, "batches of an epoch between meta updates", unit="batches", least=1, resume=TAKES)
    pick_method: str = option("meta", "how the teacher is chosen", choices=("meta", "top1"), resume=TAKES)
    meta_lr: float = option(1e-4, "learning rate of the meta-network, decayed linearly", least=0, resume=TAKES)
    how_to_prob: str = option(
        "pre_prob",
        "operators drawn uniformly, by --pre_prob, or as on the board",
        choices=("even", "pre_prob", "teacher"),
        resume=TAKES,
    )
    pre_prob: tuple[float, ...] = option(
        (0.05, 0.2, 0.05, 0.5, 0.05, 0.15), "probability of every operator", least=0, resume=TAKES
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if abs(sum(self.pre_prob) - 1) > 1e-6:
            raise UserError(f"--pre_prob {self.pre_prob}: expected probabilities that add up to 1.")

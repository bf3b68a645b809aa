"""Flags of snapshot ensembles."""

from dataclasses import dataclass

from method.options import method_options
from utils.options import SAME, Options, option


@method_options.register("snapshot")
@dataclass(frozen=True, kw_only=True)
class SnapshotOptions(Options):
    """Flags of snapshot ensembles."""

    num_members: int = option(
        4, "M: snapshots, in place of S networks", aliases=("num_estimators",), least=1, most=1000, resume=SAME
    )
    snapshot_last: int | None = option(
        None, "keep so many of them only, the newest", default_text="all", least=1, resume=SAME
    )
    snapshot_lr: str = option(
        "cycles",
        "learning rate: M cosine cycles, a snapshot at the end of each; or as the other flags say, with snapshots "
        "after each of the last M epochs",
        choices=("cycles", "as_given"),
        resume=SAME,
    )

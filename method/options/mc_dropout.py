"""Flags of Monte-Carlo dropout."""

from dataclasses import dataclass

from method.options import method_options
from utils.options import SAME, Options, option

PLACES = ("stages", "classifier", "own")  # see model.members


@method_options.register("mc_dropout")
@dataclass(frozen=True, kw_only=True)
class MCDropoutOptions(Options):
    """Flags of Monte-Carlo dropout."""

    num_members: int = option(
        10, "T: masks, in place of S networks", aliases=("num_estimators",), least=1, most=1000, resume=SAME
    )
    mc_dropout_place: str = option(
        "stages",
        "where: whole channels behind every stage and numbers before the classifier; there only; or the backbone's own "
        "dropout layers",
        choices=PLACES,
        resume=SAME,
    )
    mc_dropout_rate: float | None = option(
        None,
        "part that is dropped",
        default_text="0.1 on small images, 0.05 on large ones",
        least=0,
        below=1,
        resume=SAME,
    )

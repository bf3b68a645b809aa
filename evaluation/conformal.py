"""Sets of classes that hold the true one with a promised probability. N images, K classes.

THR (LAC): Sadinle et al. (arXiv:1609.00451); APS: Romano et al. (arXiv:2006.02544); RAPS: Angelopoulos et al.
(arXiv:2009.14193). The promise is for images that are exchangeable with those the quantile was taken of.
"""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

KINDS = ("thr", "aps", "raps")
PENALTY, FREE_RANKS = 0.1, 1  # lambda and k_reg of RAPS
SIZES = ((1, 1), (2, 2), (3, 3), (4, 6), (7, None))


@dataclass(frozen=True, kw_only=True)
class Conformal:
    """One kind of set.

    Attributes:
        kind: of KINDS.
        alpha: the largest share of misses.
        q: the quantile; None where it is infinite and every set holds all classes.
        penalty, free_ranks: lambda and k_reg of RAPS; 0 elsewhere.
        randomised: whether u was drawn for each image.
    """

    kind: str
    alpha: float
    q: float | None
    penalty: float = 0.0
    free_ranks: int = 0
    randomised: bool = False

    def as_dict(self) -> dict[str, Any]:
        """The entry of `answers`."""
        values = asdict(self)
        return {
            "kind": self.kind,
            "alpha": self.alpha,
            "q": self.q,
            "lambda": values["penalty"],
            "k_reg": values["free_ranks"],
            "randomised": self.randomised,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Conformal":
        """Inverse of `as_dict`."""
        return cls(
            kind=values["kind"],
            alpha=values["alpha"],
            q=values["q"],
            penalty=values["lambda"],
            free_ranks=values["k_reg"],
            randomised=values["randomised"],
        )


def conformal_scores(
    probs_NK: Tensor, kind: str, *, uniform_N: Tensor | None = None, penalty: float = PENALTY, free: int = FREE_RANKS
) -> Tensor:
    """How strange every class would be: float64 [N, K].

    Classes are ranked by probability from 1, equal ones by index; cum is the summed probability up to a rank. THR:
    1 - p. APS: cum - u p. RAPS: APS + penalty * max(rank - free, 0).

    Args:
        uniform_N: u of every image; None: 0.
    """
    if kind == "thr":
        return 1 - probs_NK
    sorted_NK, classes_NK = probs_NK.sort(dim=-1, descending=True, stable=True)
    ranked_NK = sorted_NK.cumsum(dim=-1)
    if uniform_N is not None:
        ranked_NK = ranked_NK - uniform_N[:, None] * sorted_NK
    if kind == "raps":
        ranks_K = torch.arange(1, probs_NK.shape[1] + 1, dtype=torch.float64)
        ranked_NK = ranked_NK + penalty * (ranks_K - free).clamp(min=0)
    return torch.empty_like(ranked_NK).scatter_(1, classes_NK, ranked_NK)


def quantile_rank(images: int, alpha: float) -> int | None:
    """Which of the sorted scores, from 1, is the quantile; None where there are too few images for one."""
    rank = math.ceil((images + 1) * (1 - alpha) - 1e-9)
    return rank if rank <= images else None


def fit_conformal(
    probs_NK: Tensor, labels_N: Tensor, kind: str, alpha: float, uniform_N: Tensor | None = None
) -> Conformal:
    """The quantile of the true classes' scores; with too few images there is none, and a warning."""
    scores_N = conformal_scores(probs_NK, kind, uniform_N=uniform_N).gather(1, labels_N[:, None]).squeeze(1)
    rank = quantile_rank(len(labels_N), alpha)
    if rank is None:
        logger.warning(
            "--conformal %g: %d images are too few, sets will hold all classes; it needs %d or more.",
            alpha,
            len(labels_N),
            math.ceil(1 / alpha - 1 - 1e-9),
        )
    is_raps = kind == "raps"
    return Conformal(
        kind=kind,
        alpha=alpha,
        q=None if rank is None else float(scores_N.sort().values[rank - 1]),
        penalty=PENALTY if is_raps else 0.0,
        free_ranks=FREE_RANKS if is_raps else 0,
        randomised=uniform_N is not None and kind != "thr",
    )


def conformal_sets(probs_NK: Tensor, fitted: Conformal, uniform_N: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(raw sets, sets with the top class always in them): bool [N, K] each."""
    if fitted.q is None:
        raw_NK = torch.ones_like(probs_NK, dtype=torch.bool)
    else:
        uniform_N = uniform_N if fitted.randomised else None
        scores_NK = conformal_scores(
            probs_NK, fitted.kind, uniform_N=uniform_N, penalty=fitted.penalty, free=fitted.free_ranks
        )
        raw_NK = scores_NK <= fitted.q + 1e-9
    return raw_NK, raw_NK.scatter(1, probs_NK.argmax(dim=1, keepdim=True), True)


def conformal_figures(raw_NK: Tensor, sets_NK: Tensor, labels_N: Tensor) -> dict[str, Any]:
    """Coverage and mean size of the raw and of the final sets, and where coverage is lacking; None without an image."""
    images = len(labels_N)
    covered_N = sets_NK.gather(1, labels_N[:, None]).squeeze(1)
    sizes_N = sets_NK.sum(dim=1)

    def share(of_N: Tensor) -> float | None:
        return float(of_N.double().mean()) if len(of_N) else None

    by_class = [share(covered_N[labels_N == k]) for k in labels_N.unique().tolist()]
    by_size = {}
    for low, high in SIZES:
        in_N = (sizes_N >= low) & (sizes_N <= (high or sizes_N.max() if images else 0))
        name = str(low) if low == high else f"{low}-{high}" if high else f"{low}+"
        by_size[name] = {"images": int(in_N.sum()), "coverage": share(covered_N[in_N])}
    return {
        "raw_coverage": share(raw_NK.gather(1, labels_N[:, None]).squeeze(1)),
        "raw_mean_size": share(raw_NK.sum(dim=1)),
        "empty_share": share(raw_NK.sum(dim=1) == 0),
        "coverage": share(covered_N),
        "coverage_interval": wilson_interval(int(covered_N.sum()), images),
        "mean_size": share(sizes_N),
        "singletons": share(sizes_N == 1),
        "worst_class_coverage": min((value for value in by_class if value is not None), default=None),
        "by_size": by_size,
    }


def wilson_interval(hits: int, images: int, z: float = 1.959963984540054) -> list[float] | None:
    """The 95 % interval of a share after Wilson (1927); None without an image."""
    if not images:
        return None
    share, spread = hits / images, z * z / images
    centre = (share + spread / 2) / (1 + spread)
    half = z * math.sqrt(share * (1 - share) / images + spread / (4 * images)) / (1 + spread)
    return [max(centre - half, 0.0), min(centre + half, 1.0)]


def parse_alphas(text: str) -> Sequence[float]:
    """The numbers of --conformal; ValueError where one is none in (0, 1)."""
    alphas = [float(part) for part in text.split(",")]
    if not all(0 < alpha < 1 for alpha in alphas):
        raise ValueError(text)
    return alphas

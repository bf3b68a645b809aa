"""Probabilities that mean what they say: temperatures, and figures of calibration. S networks, N images, K classes.

Temperature scaling after Guo et al. (arXiv:1706.04599), fitted by bisection (ours), in float64. The images of a fit are
never those of a reported figure.
"""

import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from evaluation.ensemble import ensemble_scores
from evaluation.metrics.ece import NUM_BINS
from utils.errors import RunError

logger = logging.getLogger(__name__)

COLDEST, HOTTEST = 0.05, 20.0
BISECTIONS = 60
CHUNK = 4096  # images in float64 at once
FIGURES = ("acc1", "nll", "brier", "ece", "adaptive_ece", "classwise_ece")


def chunks(images: int) -> Iterator[slice]:
    """The images in order, CHUNK at a time; one empty slice where there is none."""
    for start in range(0, max(images, 1), CHUNK):
        yield slice(start, min(start + CHUNK, images))


def scores_of(
    logits_SNK: Tensor, rule: str, temperatures_S: Sequence[float] | None = None, temperature: float = 1.0
) -> Tensor:
    """Ensemble scores of the networks given, each divided by its temperature, then by one: float64 [N, K].

    Args:
        rule: of `evaluation.ensemble.RULES`.
        temperatures_S: of each network; None: 1.
    """
    logits_SNK = logits_SNK.double()
    if temperatures_S is not None:
        logits_SNK = logits_SNK / logits_SNK.new_tensor(temperatures_S)[:, None, None]
    return ensemble_scores(logits_SNK, rule) / temperature


def collected_scores(logits_SNK: Tensor, rule: str, temperatures_S: Sequence[float] | None = None) -> Tensor:
    """`scores_of` over any number of images, made CHUNK at a time: float64 [N, K]."""
    parts = [scores_of(logits_SNK[:, part], rule, temperatures_S) for part in chunks(logits_SNK.shape[1])]
    return torch.cat(parts)


def check_finite(logits_SNK: Tensor, images: str) -> None:
    """Check that every logit is finite.

    Args:
        images: what they are, for the error.

    Raises:
        RunError: one is not, by network and number of the image.
    """
    for part in chunks(logits_SNK.shape[1]):
        bad = (~logits_SNK[:, part].isfinite()).any(dim=-1).nonzero()
        if len(bad):
            network, image = bad[0].tolist()
            raise RunError(
                f"network {network + 1} gives a logit that is not finite for image {part.start + image} of the "
                f"{images}: nothing can be fitted on it. Take another checkpoint, or --amp_dtype fp32."
            )


def nll_slope(scores_NK: Tensor, labels_N: Tensor, beta: float) -> float:
    """Derivative of the mean NLL of softmax(beta a) by beta: mean over n of sum_k p_k a_k - a_y; grows with beta."""
    total = 0.0
    for part in chunks(len(scores_NK)):
        above_BK = scores_NK[part] - scores_NK[part].gather(1, labels_N[part, None])
        total += float(((beta * above_BK).softmax(dim=-1) * above_BK).sum())
    return total / len(scores_NK)


def fit_temperature(scores_NK: Tensor, labels_N: Tensor, what: str = "scores") -> float:
    """The temperature T in [0.05, 20] with the least NLL of softmax(scores / T).

    Bounds and a flat NLL (T = 1) are answered with a warning: no skill, or no errors.

    Args:
        scores_NK: float64, finite; N >= 1.
        what: they are, for the warning.
    """
    coldest, hottest = nll_slope(scores_NK, labels_N, 1 / COLDEST), nll_slope(scores_NK, labels_N, 1 / HOTTEST)
    found, why = None, ""
    if abs(coldest) < 1e-12 and abs(hottest) < 1e-12:
        found, why = 1.0, "the likelihood is the same at every temperature"
    elif hottest >= 0:
        found, why = HOTTEST, "they have no skill on the held-out images"
    elif coldest <= 0:
        found, why = COLDEST, "they make no errors on the held-out images"
    if found is not None:
        logger.warning("temperature of %s: %g, because %s.", what, found, why)
        return found
    low, high = math.log(1 / HOTTEST), math.log(1 / COLDEST)
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        if nll_slope(scores_NK, labels_N, math.exp(middle)) >= 0:
            high = middle
        else:
            low = middle
    return math.exp(-(low + high) / 2)


@dataclass(frozen=True, kw_only=True)
class Temperatures:
    """What was fitted on held-out images.

    Attributes:
        ensemble: of the ensemble's scores.
        networks: of every network, S.
        both: of the ensemble's scores of networks / their temperatures.
        stages: of the first k networks in the order of a cascade, k = 1 ... S; empty without a cascade.
    """

    ensemble: float
    networks: tuple[float, ...]
    both: float
    stages: tuple[float, ...] = ()

    def of_networks(self, mode: str) -> tuple[float, ...] | None:
        """The temperatures by which logits of networks are divided first, under --calibrate `mode`."""
        return self.networks if mode in ("networks", "both") else None

    def of_ensemble(self, mode: str) -> float:
        """The temperature by which the ensemble's scores are divided then."""
        return {"none": 1.0, "networks": 1.0, "both": self.both}.get(mode, self.ensemble)


def fit_temperatures(logits_SNK: Tensor, labels_N: Tensor, rule: str) -> Temperatures:
    """All temperatures but those of stages, in the order T_s, then of the ensembles."""
    networks = tuple(
        fit_temperature(collected_scores(one_NK[None], "mean_logits"), labels_N, f"network {s + 1}")
        for s, one_NK in enumerate(logits_SNK)
    )
    return Temperatures(
        ensemble=fit_temperature(collected_scores(logits_SNK, rule), labels_N, "the ensemble"),
        networks=networks,
        both=fit_temperature(
            collected_scores(logits_SNK, rule, networks), labels_N, "the ensemble of calibrated networks"
        ),
    )


def fit_stages(
    logits_SNK: Tensor, labels_N: Tensor, rule: str, order: Sequence[int], temperatures_S: Sequence[float] | None
) -> tuple[float, ...]:
    """A temperature for each of the first k networks of an order, k = 1 ... S.

    Args:
        order: numbers of networks, from 0.
        temperatures_S: of the networks, where their logits are divided first.
    """
    found = []
    for k in range(1, len(order) + 1):
        first = list(order[:k])
        of_first = None if temperatures_S is None else [temperatures_S[s] for s in first]
        scores_NK = collected_scores(logits_SNK[first], rule, of_first)
        found.append(fit_temperature(scores_NK, labels_N, f"the first {k} networks"))
    return tuple(found)


def calibrated_log_probs(logits_SNK: Tensor, rule: str, mode: str, fitted: Temperatures | None) -> Tensor:
    """Log-probabilities of the ensemble under --calibrate `mode`: float64 [N, K].

    Args:
        logits_SNK: a chunk of images; mode "none" needs nothing `fitted`.
    """
    if fitted is None or mode == "none":
        return scores_of(logits_SNK, rule).log_softmax(dim=-1)
    return scores_of(logits_SNK, rule, fitted.of_networks(mode), fitted.of_ensemble(mode)).log_softmax(dim=-1)


class Bins(NamedTuple):
    """Images by confidence, 15 bins of equal width: how many, how many right, and the sum of their confidences."""

    images_M: Tensor
    right_M: Tensor
    confidence_M: Tensor

    def error(self) -> float:
        """Expected calibration error; NaN without an image."""
        return float((self.right_M - self.confidence_M).abs().sum() / self.images_M.sum())


def binned(confidence_N: Tensor, right_N: Tensor) -> Bins:
    """Bin m of M holds the confidences in ((m - 1) / M, m / M]; 0 is in the first."""
    at_N = ((confidence_N * NUM_BINS).ceil() - 1).nan_to_num().clamp(0, NUM_BINS - 1).long()
    empty_M = torch.zeros(NUM_BINS, dtype=torch.float64)
    return Bins(
        empty_M.index_add(0, at_N, torch.ones_like(confidence_N)),
        empty_M.index_add(0, at_N, right_N.double()),
        empty_M.index_add(0, at_N, confidence_N),
    )


def adaptive_error(confidence_N: Tensor, right_N: Tensor, num_bins: int = NUM_BINS) -> float:
    """Calibration error over runs of equally many images by confidence; NaN without an image.

    Equal confidences stand with the wrong ones first; the first N mod M runs are one image longer.
    """
    by_right_N = right_N.long().argsort(stable=True)
    order_N = by_right_N[confidence_N[by_right_N].argsort(stable=True)]
    gap_N = right_N[order_N].double() - confidence_N[order_N]
    images = len(gap_N)
    length, longer = divmod(images, num_bins)
    sizes = [length + (m < longer) for m in range(num_bins)]
    return sum(abs(float(run.sum())) for run in gap_N.split(sizes)) / images if images else math.nan


def calibration_figures(log_probs_NK: Tensor, labels_N: Tensor) -> dict[str, float | None]:
    """FIGURES: top-1 in percent, NLL in nats, Brier score (sum over classes), three calibration errors.

    `classwise_ece` is the mean over all K classes of the error of p_k against [y = k]. None without an image, and where
    a figure is not finite.

    Args:
        log_probs_NK: float64.
    """
    images, num_classes = log_probs_NK.shape
    if not images:
        return dict.fromkeys(FIGURES)
    nll = brier = 0.0
    gap_KM = torch.zeros(num_classes * NUM_BINS, dtype=torch.float64)
    for part in chunks(images):
        log_probs_BK, labels_B1 = log_probs_NK[part], labels_N[part, None]
        probs_BK = log_probs_BK.exp()
        label_BK = torch.zeros_like(probs_BK).scatter_(1, labels_B1, 1.0)
        nll -= float(log_probs_BK.gather(1, labels_B1).sum())
        brier += float((probs_BK - label_BK).square().sum())
        bins_BK = ((probs_BK * NUM_BINS).ceil() - 1).nan_to_num().clamp(0, NUM_BINS - 1).long()
        bins_BK += NUM_BINS * torch.arange(num_classes)
        gap_KM.index_add_(0, bins_BK.flatten(), (label_BK - probs_BK).flatten())
    right_N = log_probs_NK.argmax(dim=-1) == labels_N
    confidence_N = log_probs_NK.amax(dim=-1).exp()
    figures = {
        "acc1": 100 * float(right_N.double().mean()),
        "nll": nll / images,
        "brier": brier / images,
        "ece": binned(confidence_N, right_N).error(),
        "adaptive_ece": adaptive_error(confidence_N, right_N),
        "classwise_ece": float(gap_KM.abs().sum()) / images / num_classes,
    }
    return {name: value if math.isfinite(value) else None for name, value in figures.items()}

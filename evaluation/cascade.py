"""Cascades: easy images leave after the first networks. Choice of order and thresholds, and the walk through them.

After Wang et al. (arXiv:2012.01988); windows after Xia & Bouganis (arXiv:2303.08010). Thresholds and their rules are
ours. S networks, N images, K classes; stages count from 0 in code: at stage k the first k + 1 networks of the order
have run, and their ensemble has scores a_k and a confidence c_k. Everything here is arithmetic on stored logits.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from evaluation.calibration import chunks, scores_of
from evaluation.selective import confidence_of, operating_point
from model.cascade import leaves_above, leaves_window
from utils.errors import UserError

Item = TypeVar("Item")

NOBODY = 2.0  # the threshold that no confidence reaches
MIDPOINTS = 128
MOST_STAGES_EACH = 8
SWEEPS, REFINEMENTS = 50, 100
MILLION = 1_000_000
RIGHT_WEIGHT = 1_000_000_000
PRICES = tuple(sorted({0} | {round(10 ** (i / 8)) for i in range(33)}))


def greedy_order(
    logits_SNK: Tensor,
    labels_N: Tensor,
    macs_S: Sequence[int],
    rule: str,
    temperatures_S: Sequence[float] | None = None,
) -> list[int]:
    """Numbers of the networks, from 0, in the order in which a cascade runs them.

    Next is, among the networks with the fewest MACs left, the one with which the ensemble so far has the most right
    answers, then the smaller NLL (to 9 decimals), then the lower number.
    """
    order: list[int] = []
    left = list(range(len(macs_S)))
    while left:
        fewest = min(macs_S[s] for s in left)
        cheapest = [s for s in left if macs_S[s] == fewest]

        def rank(s: int) -> tuple[int, float, int]:
            tried = [*order, s]
            own = None if temperatures_S is None else [temperatures_S[i] for i in tried]
            right, nll = 0, 0.0
            for part in chunks(len(labels_N)):
                log_probs_BK = scores_of(logits_SNK[tried][:, part], rule, own).log_softmax(dim=-1)
                labels_B = labels_N[part]
                right += int((log_probs_BK.argmax(dim=-1) == labels_B).sum())
                nll -= float(log_probs_BK.gather(1, labels_B[:, None]).sum())
            return -right, round(nll / len(labels_N), 9), s

        best = cheapest[0] if len(left) == 1 else min(map(rank, cheapest))[2]
        order.append(best)
        left.remove(best)
    return order


@dataclass(frozen=True)
class Stages:
    """What the first networks of an order say, after each stage; float64 and int64 on the CPU.

    Attributes:
        confidence_SN: c_k; NaN where scores are.
        predictions_SN: the class of the highest score.
        max_prob_SN: largest probability, with the stage's temperature.
        label_log_probs_SN: log-probability of the label, with the temperature; None where there are no labels.
    """

    confidence_SN: Tensor
    predictions_SN: Tensor
    max_prob_SN: Tensor
    label_log_probs_SN: Tensor | None


def stage_scores(
    logits_SNK: Tensor,
    order: Sequence[int],
    stage: int,
    rule: str,
    temperatures_S: Sequence[float] | None = None,
    stage_temperatures: Sequence[float] | None = None,
) -> Tensor:
    """a_k / T_k of a chunk of images: float64 [B, K].

    Args:
        order: numbers of networks, from 0.
        temperatures_S: of each network, by its number; None: 1.
        stage_temperatures: of each stage; None: 1.
    """
    first = list(order[: stage + 1])
    own = None if temperatures_S is None else [temperatures_S[s] for s in first]
    return scores_of(logits_SNK[first], rule, own, 1.0 if stage_temperatures is None else stage_temperatures[stage])


def run_stages(
    logits_SNK: Tensor,
    order: Sequence[int],
    rule: str,
    kind: str,
    *,
    temperatures_S: Sequence[float] | None = None,
    stage_temperatures: Sequence[float] | None = None,
    labels_N: Tensor | None = None,
) -> Stages:
    """What every stage says of every image; `kind` of confidence as in `selective.confidence_of`."""
    parts: list[list[tuple[Tensor, ...]]] = [[] for _ in order]
    for part in chunks(logits_SNK.shape[1]):
        for k in range(len(order)):
            scores_BK = stage_scores(logits_SNK[:, part], order, k, rule, temperatures_S, stage_temperatures)
            log_probs_BK = scores_BK.log_softmax(dim=-1)
            found: tuple[Tensor, ...] = (
                confidence_of(scores_BK, kind),
                scores_BK.argmax(dim=-1),
                log_probs_BK.amax(dim=-1).exp(),
            )
            if labels_N is not None:
                found += (log_probs_BK.gather(1, labels_N[part, None]).squeeze(1),)
            parts[k].append(found)
    columns = [
        torch.stack([torch.cat([found[i] for found in stage]) for stage in parts]) for i in range(len(parts[0][0]))
    ]
    return Stages(columns[0], columns[1], columns[2], columns[3] if labels_N is not None else None)


def leave_stages(confidence_SN: Tensor, thresholds: Sequence[float]) -> Tensor:
    """After which stage, from 0, every image leaves: the first with c_k >= t_k, else the last; NaN leaves last."""
    last = len(confidence_SN) - 1
    stage_N = torch.full(confidence_SN.shape[1:], last, dtype=torch.int64)
    for k in reversed(range(last)):
        stage_N[leaves_above(confidence_SN[k], thresholds[k])] = k
    return stage_N


def window_stages(confidence_SN: Tensor, windows: Sequence[tuple[float, float]]) -> Tensor:
    """The same for windows: an image goes on where lo <= c_k <= hi, and where c_k is NaN."""
    last = len(confidence_SN) - 1
    stage_N = torch.full(confidence_SN.shape[1:], last, dtype=torch.int64)
    for k in reversed(range(last)):
        stage_N[leaves_window(confidence_SN[k], *windows[k])] = k
    return stage_N


def at_stage(values_SN: Tensor, stage_N: Tensor) -> Tensor:
    """The value of every image at the stage where it left: [N]."""
    return values_SN.gather(0, stage_N[None]).squeeze(0)


class Walk(NamedTuple):
    """What a cascade does with images whose labels are known.

    right: right answers. lost, won: of the images that only the full ensemble, and that only the cascade gets right.
    macs: total multiply-adds. left_S: images that leave after each stage.
    """

    right: int
    lost: int
    won: int
    macs: int
    left_S: tuple[int, ...]


def walk_of(stage_N: Tensor, right_SN: Tensor, macs_S: Sequence[int]) -> Walk:
    """Count what comes of leaving after the given stages.

    Args:
        right_SN: whether the answer of each stage is right.
        macs_S: of the networks in their order.
    """
    right_N, full_N = at_stage(right_SN, stage_N), right_SN[-1]
    left_S = stage_N.bincount(minlength=len(right_SN)).tolist()
    macs = sum(count * sum(macs_S[: k + 1]) for k, count in enumerate(left_S))
    return Walk(int(right_N.sum()), int((full_N & ~right_N).sum()), int((right_N & ~full_N).sum()), macs, tuple(left_S))


def candidate_cuts(confidence_M: Tensor) -> list[float]:
    """Thresholds worth trying: 0, midpoints between distinct values (at most 128, evenly over their ranks), and 2."""
    values = confidence_M[~confidence_M.isnan()].unique().tolist()
    midpoints = []
    for low, high in itertools.pairwise(values):
        middle = (low + high) / 2
        midpoints.append(high if middle == low else middle)
    if len(midpoints) > MIDPOINTS:
        last = len(midpoints) - 1
        midpoints = [midpoints[i * last // (MIDPOINTS - 1)] for i in range(MIDPOINTS)]
    return [0.0, *midpoints, NOBODY]


@dataclass(frozen=True)
class Target:
    """What thresholds are chosen for.

    Attributes:
        name: of TARGETS.
        tolerance: points of accuracy that `no_loss` may lose.
        margin: standard errors of the difference that `no_loss` with one threshold adds to what was lost.
        budget: of `budget`: up to 1 a part of the full ensemble's MACs, above it MACs.
    """

    name: str = "no_loss"
    tolerance: float = 0.25
    margin: float = 1.0
    budget: float = 0.6

    def most_macs(self, macs_S: Sequence[int]) -> int:
        """The budget in MACs of an average image.

        Raises:
            UserError: the first network alone takes more.
        """
        most = math.floor(self.budget * sum(macs_S) if self.budget <= 1 else self.budget)
        if most < macs_S[0]:
            raise UserError(
                f"--cascade_budget {self.budget:g}: {most} MACs are less than the {macs_S[0]} of the first network: "
                "give more."
            )
        return most


class Choice(NamedTuple):
    """Thresholds after each stage but the last, and what comes of them on the images they were chosen on."""

    thresholds: list[float]
    walk: Walk


def shared_walks(confidence_SN: Tensor, right_SN: Tensor, macs_S: Sequence[int]) -> list[Choice]:
    """Every candidate cut as the threshold of all stages, the lowest first."""
    stages = len(confidence_SN) - 1
    found = []
    for cut in candidate_cuts(confidence_SN[:-1].flatten()):
        thresholds = [cut] * stages
        found.append(Choice(thresholds, walk_of(leave_stages(confidence_SN, thresholds), right_SN, macs_S)))
    return found


def choose_shared(walks: Sequence[Choice], target: Target, macs_S: Sequence[int]) -> Choice:
    """One threshold for all stages, of those of `shared_walks`.

    no_loss: from the highest downwards while 100 (lost - won + margin sqrt(lost + won)) <= tolerance N; budget: the
    highest with average MACs within it; best: most right answers, then fewest MACs, then the lowest threshold.

    Raises:
        UserError: as `Target.most_macs`.
    """
    images = sum(walks[0].walk.left_S)
    if target.name == "best":
        return min(walks, key=lambda one: (-one.walk.right, one.walk.macs, one.thresholds))
    if target.name == "budget":
        most = target.most_macs(macs_S) * images
        return next(one for one in reversed(walks) if one.walk.macs <= most)
    chosen = walks[-1]
    for one in reversed(walks):
        lost, won = one.walk.lost, one.walk.won
        if 100 * (lost - won + target.margin * math.sqrt(lost + won)) > target.tolerance * images + 1e-9:
            break
        chosen = one
    return chosen


class EachStage:
    """Thresholds of their own for every stage, S = 2 ... 8, by coordinate ascent and refinement.

    Args:
        confidence_SN, right_SN: of held-out images.
        macs_S: of the networks in their order.

    Attributes:
        pool: every solution found, everyone leaving after k, and nobody leaving, without duplicates.

    Raises:
        UserError: another S.
    """

    def __init__(self, confidence_SN: Tensor, right_SN: Tensor, macs_S: Sequence[int]) -> None:
        self._stages = len(macs_S) - 1
        if not 1 <= self._stages < MOST_STAGES_EACH:
            raise UserError(
                f"--cascade_thresholds each takes 2 to {MOST_STAGES_EACH} networks, not {len(macs_S)}: use one."
            )
        self._confidence_SN, self._right_SN, self._macs_S = confidence_SN, right_SN, macs_S
        self._images = confidence_SN.shape[1]
        self.cuts = [candidate_cuts(confidence_SN[k]) for k in range(self._stages)]
        total = sum(macs_S)
        weights_S = [round(MILLION * m / total) for m in macs_S]
        self._weight_S = torch.tensor(weights_S).cumsum(0)
        self._cost_S = torch.tensor(list(macs_S)).cumsum(0)
        # how many of a stage's cuts, from the lowest, let an image leave: none where the confidence is NaN
        self._reach_SN = [
            torch.where(
                confidence_SN[k].isnan(),
                0,
                torch.searchsorted(torch.tensor(cuts, dtype=torch.float64), confidence_SN[k].contiguous(), right=True),
            )
            for k, cuts in enumerate(self.cuts)
        ]
        self.pool = self._pool()

    def choose(self, target: Target) -> Choice:
        """The best of the pool for a target, refined by single changes.

        Raises:
            UserError: as `Target.most_macs`.
        """
        most = self._images * target.most_macs(self._macs_S) if target.name == "budget" else 0
        full = int(self._right_SN[-1].sum())
        least = full - math.floor(target.tolerance * self._images / 100 + 1e-9)

        def is_allowed(right: int, macs: int) -> bool:
            return target.name == "best" or (macs <= most if target.name == "budget" else right >= least)

        def key(right: int, macs: int) -> tuple[int, int]:
            return (macs, -right) if target.name == "no_loss" else (-right, macs)

        found = min(
            (one for one in self.pool if is_allowed(one.walk.right, one.walk.macs)),
            key=lambda one: (key(one.walk.right, one.walk.macs), one.thresholds),
        )
        if target.name == "best":
            return found
        thresholds, now = list(found.thresholds), key(found.walk.right, found.walk.macs)
        for _ in range(REFINEMENTS):
            changes = [
                (key(right, macs), k, j)
                for k in range(self._stages)
                for j, (right, macs) in enumerate(self._single_changes(thresholds, k))
                if is_allowed(right, macs)
            ]
            best, k, j = min(changes)
            if best >= now:
                break
            thresholds[k], now = self.cuts[k][j], best
        return self._walked(thresholds)

    def pareto(self, most: int) -> list[Choice]:
        """Of the pool those that no other beats in right answers and MACs, by MACs; evenly thinned to `most`."""
        front: list[Choice] = []
        for one in sorted(self.pool, key=lambda one: (one.walk.macs, -one.walk.right, one.thresholds)):
            if not front or one.walk.right > front[-1].walk.right:
                front.append(one)
        return thinned(front, most)

    def _walked(self, thresholds: Sequence[float]) -> Choice:
        stage_N = leave_stages(self._confidence_SN, thresholds)
        return Choice(list(thresholds), walk_of(stage_N, self._right_SN, self._macs_S))

    def _pool(self) -> list[Choice]:
        solutions: list[tuple[float, ...]] = [
            tuple([NOBODY] * k + [0.0] + [NOBODY] * (self._stages - k - 1)) for k in range(self._stages)
        ]
        solutions.append((NOBODY,) * self._stages)
        start = None
        for price in PRICES:
            found = [self._ascend([NOBODY] * self._stages, price)]
            if start is not None:
                found.append(self._ascend(list(start), price))
            solutions += found
            start = max(reversed(found), key=lambda one: self._gain(one, price))
        return [self._walked(one) for one in dict.fromkeys(solutions)]

    def _gain(self, thresholds: Sequence[float], price: int) -> int:
        stage_N = leave_stages(self._confidence_SN, thresholds)
        right = int(at_stage(self._right_SN, stage_N).sum())
        return RIGHT_WEIGHT * right - price * int(self._weight_S[stage_N].sum())

    def _ascend(self, thresholds: list[float], price: int) -> tuple[float, ...]:
        """Set one stage after another, the last first, to its best cut with the others fixed, until nothing changes."""
        for _ in range(SWEEPS):
            before = list(thresholds)
            for k in reversed(range(self._stages)):
                gain_J = RIGHT_WEIGHT * self._change(thresholds, k, self._right_SN.long())
                gain_J -= price * self._change(thresholds, k, self._weight_S[:, None].expand_as(self._right_SN))
                thresholds[k] = self.cuts[k][int(gain_J.argmax())]  # of equal ones the lowest cut
            if thresholds == before:
                break
        return tuple(thresholds)

    def _change(self, thresholds: Sequence[float], k: int, values_SN: Tensor) -> Tensor:
        """For each cut of stage k, by how much it changes a sum over images against nobody leaving there: int64 [J]."""
        stage_N = leave_stages(self._confidence_SN, [*thresholds[:k], NOBODY, *thresholds[k + 1 :]])
        reaches_N = stage_N > k
        gain_N = torch.where(reaches_N, values_SN[k] - at_stage(values_SN, stage_N), 0)
        hist_J = torch.zeros(len(self.cuts[k]) + 1, dtype=torch.int64).index_add_(0, self._reach_SN[k], gain_N)
        return hist_J.flip(0).cumsum(0).flip(0)[1:]

    def _single_changes(self, thresholds: Sequence[float], k: int) -> Iterator[tuple[int, int]]:
        """(right answers, MACs) with each cut of stage k in place of its threshold."""
        without = self._walked([*thresholds[:k], NOBODY, *thresholds[k + 1 :]]).walk
        right_J = without.right + self._change(thresholds, k, self._right_SN.long())
        macs_J = without.macs + self._change(thresholds, k, self._cost_S[:, None].expand_as(self._right_SN))
        return zip(right_J.tolist(), macs_J.tolist(), strict=True)


def thinned(choices: Sequence[Item], most: int) -> list[Item]:
    """At most so many, evenly over their places, first and last among them."""
    if len(choices) <= most:
        return list(choices)
    last = len(choices) - 1
    return [choices[i * last // (most - 1)] for i in range(most)]


def curve_of(walks: Sequence[Choice], most: int = 30) -> list[Choice]:
    """About every (Q / 30)-th cut of `shared_walks`: the points of a curve."""
    return thinned(walks, most)


class Window(NamedTuple):
    """lo, hi: confidences between which images go on. tau, rejected: of the stage's operating point."""

    low: float
    high: float
    tau: float
    rejected: float


def fit_window(confidence_N: Tensor, wrong_N: Tensor, point: str, value: float, width: float) -> Window:
    """The part of the confidences of one stage around its operating point.

    Args:
        confidence_N, wrong_N: of held-out images at that stage.
        point, value: as in `selective.operating_point`.
        width: h, the share of images to each side.
    """
    tau, rejected = operating_point(confidence_N, wrong_N, point, value)
    known_N = confidence_N.nan_to_num(nan=0.0).double()
    ends = torch.tensor([max(rejected - width, 0.0), min(rejected + width, 1.0)], dtype=torch.float64)
    low, high = quantiles(known_N, ends).tolist()
    return Window(low, high, tau, rejected)


def quantiles(values_N: Tensor, shares_Q: Tensor) -> Tensor:
    """Linear quantiles of any number of values: float64 [Q]. (torch.quantile takes at most 16 million.)"""
    sorted_N = values_N.sort().values
    places_Q = shares_Q * (len(sorted_N) - 1)
    low_Q = places_Q.floor().long()
    high_Q = (low_Q + 1).clamp(max=len(sorted_N) - 1)
    return sorted_N[low_Q] + (places_Q - low_Q) * (sorted_N[high_Q] - sorted_N[low_Q])


def sign_test(lost: int, won: int) -> float:
    """Exact two-sided p of a difference in matched pairs (McNemar): 1 where nothing differs."""
    total, smaller = lost + won, min(lost, won)
    log_half = total * math.log(0.5)

    def probability(i: int) -> float:
        return math.exp(math.lgamma(total + 1) - math.lgamma(i + 1) - math.lgamma(total - i + 1) + log_half)

    return min(1.0, 2 * sum(probability(i) for i in range(smaller + 1)))

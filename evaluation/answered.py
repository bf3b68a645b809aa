"""What tuned answers say of images without labels: the further columns of predictions.csv. S networks, N images."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from evaluation.answers import Answers
from evaluation.cascade import at_stage
from evaluation.conformal import conformal_sets
from evaluation.ensemble import ensemble_scores
from evaluation.ood import mutual_information, pair_disagreement
from evaluation.selective import confidence_of, entropy_of
from evaluation.tuning import UNIFORM_TEST, cascade_scores, log_probs_of, uniform_of
from model.cascade import Cascade

TITLES = ("networks_used", "confidence", "entropy", "mutual_information", "accepted", "set")


class CascadeLogits(nn.Module):
    """A cascade as `evaluation.prediction.predict` takes networks: logits [S, B, K], NaN of those that did not run."""

    def __init__(self, cascade: Cascade) -> None:
        super().__init__()
        self.cascade = cascade

    def forward(self, images_BCHW: Tensor) -> Tensor:
        logits_SBK: Tensor = self.cascade(images_BCHW).logits_SBK
        return logits_SBK


@dataclass(frozen=True, kw_only=True)
class Answered:
    """N answers.

    Attributes:
        scores_NK: of the ensemble, or of the stage that answered.
        log_probs_NK: calibrated, float64.
        networks_used_N: int64.
        disagreement: share of pairs, of the networks that ran; None for one.
        columns: of TITLES, as predictions.csv has them.
    """

    scores_NK: Tensor
    log_probs_NK: Tensor
    networks_used_N: Tensor
    disagreement: Sequence[float | None]
    columns: dict[str, list[str]]


def answer_images(answers: Answers, mode: str, logits_SNK: Tensor, *, by_cascade: bool, seed: int) -> Answered:
    """The answers of the ensemble, or of the cascade that left NaN for networks that did not run.

    Args:
        mode: how probabilities are calibrated; "none" of a cascade too.
        seed: of the run, for randomised sets.
    """
    networks, images = len(logits_SNK), logits_SNK.shape[1]
    if by_cascade:
        assert answers.cascade is not None
        ran_SN = ~logits_SNK.isnan().any(dim=-1)
        used_N = ran_SN.sum(dim=0)
        stage_N = used_N - 1
        scores_NK = cascade_scores(answers, logits_SNK, stage_N)
        raw = mode == "none" or answers.temperatures is None
        log_probs_NK = scores_NK.log_softmax(dim=-1) if raw else answers.stage_log_probs(scores_NK, stage_N)
    else:
        used_N = torch.full((images,), networks)
        scores_NK = ensemble_scores(logits_SNK, answers.rule)
        log_probs_NK = log_probs_of(answers, logits_SNK, mode)
    kind = "max_prob" if answers.cascade is None else answers.cascade.confidence
    confidence_N = confidence_of(log_probs_NK, kind)
    information, disagreement = _of_those_that_ran(answers, logits_SNK, used_N)
    columns = {
        "networks_used": [str(used) for used in used_N.tolist()],
        "confidence": [f"{value:.6f}" for value in confidence_N.tolist()],
        "entropy": [f"{value:.6f}" for value in entropy_of(log_probs_NK).tolist()],
        "mutual_information": ["" if value is None else f"{value:.6f}" for value in information],
        "accepted": [""] * images,
        "set": [""] * images,
    }
    if by_cascade and answers.cascade is not None and answers.cascade.accept is not None:
        final_N = at_stage(answers.stages(logits_SNK).confidence_SN, used_N - 1)
        columns["accepted"] = [str(int(value)) for value in (final_N >= answers.cascade.accept).tolist()]
    if answers.conformal and not by_cascade:  # the promise is of the ensemble's probabilities
        fitted = answers.conformal[0]
        probs_NK = log_probs_of(answers, logits_SNK).exp()
        _, sets_NK = conformal_sets(probs_NK, fitted, uniform_of(seed, UNIFORM_TEST, images))
        columns["set"] = ["|".join(map(str, row.nonzero().flatten().tolist())) for row in sets_NK]
    return Answered(
        scores_NK=scores_NK,
        log_probs_NK=log_probs_NK,
        networks_used_N=used_N,
        disagreement=disagreement,
        columns=columns,
    )


def _of_those_that_ran(
    answers: Answers, logits_SNK: Tensor, used_N: Tensor
) -> tuple[list[float | None], list[float | None]]:
    """(mutual information, disagreement) of the first networks that ran; None where it was one."""
    order = range(len(logits_SNK)) if answers.cascade is None else answers.cascade.order
    information: list[float | None] = [None] * len(used_N)
    disagreement: list[float | None] = [None] * len(used_N)
    for used in used_N.unique().tolist():
        if used < 2:
            continue
        rows = (used_N == used).nonzero().squeeze(1)
        first = list(order[:used])
        part = logits_SNK[first][:, rows]
        pairs = zip(rows.tolist(), mutual_information(part).tolist(), pair_disagreement(part).tolist(), strict=True)
        for n, one, other in pairs:
            information[n], disagreement[n] = one, other
    return information, disagreement


def cascade_summary(answers: Answers, answered: Answered) -> dict[str, Any]:
    """Average MACs, and the share of the images that each number of networks answered."""
    assert answers.cascade is not None
    macs = answers.cascade.macs
    used_N = answered.networks_used_N
    average = answers.cascade.average_macs(used_N - 1)
    counts = used_N.bincount(minlength=len(macs) + 1)[1:]
    return {
        "average_macs": average,
        "macs_share": average / sum(macs),
        "left": (counts.double() / len(used_N)).tolist(),
    }

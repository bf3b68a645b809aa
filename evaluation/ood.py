"""How well networks tell images that are none of theirs. S networks, N images, K classes; higher is more foreign.

Largest probability: Hendrycks & Gimpel (arXiv:1610.02136); energy: Liu et al. (arXiv:2010.03759); mutual information:
Depeweg et al. (arXiv:1710.07283).
"""

import math

import torch
from torch import Tensor

from evaluation.calibration import chunks
from evaluation.selective import SLACK, entropy_of
from utils.errors import RunError

ALONE = ("max_prob", "entropy", "max_logit", "energy")  # what one network has
TOGETHER = ("mutual_information", "expected_entropy", "disagreement")  # what takes two
SCORES = (*ALONE, *TOGETHER)
FIGURES = ("auroc", "aupr_out", "aupr_in", "fpr95", "fpr95_out")
ACCEPTED = 0.95


def mean_log_probs(logits_SNK: Tensor) -> Tensor:
    """log of the arithmetic mean of the networks' probabilities, normalised: float64 [N, K]."""
    log_probs_SNK = logits_SNK.double().log_softmax(dim=-1)
    return log_probs_SNK.logsumexp(dim=0) - math.log(len(logits_SNK))


def expected_entropy(logits_SNK: Tensor) -> Tensor:
    """Mean entropy of the networks: float64 [N]."""
    return entropy_of(logits_SNK.double().log_softmax(dim=-1)).mean(dim=0)


def mutual_information(logits_SNK: Tensor) -> Tensor:
    """Entropy of the arithmetic mean minus the networks' mean entropy, 0 at least: float64 [N]."""
    return (entropy_of(mean_log_probs(logits_SNK)) - expected_entropy(logits_SNK)).clamp(min=0)


def pair_disagreement(logits_SNK: Tensor) -> Tensor:
    """The part of all pairs of networks that choose different classes: float64 [N]; 0 for one network."""
    choices_SN = logits_SNK.argmax(dim=-1)
    pairs = max(len(choices_SN) * (len(choices_SN) - 1), 1)
    return (choices_SN[:, None] != choices_SN).sum(dim=(0, 1)).double() / pairs


def ood_scores(logits_SNK: Tensor, log_probs_NK: Tensor) -> dict[str, Tensor | None]:
    """Every score of SCORES: float64 [N]; those of TOGETHER are None for one network.

    Args:
        log_probs_NK: of the reported answer, calibrated or not; `max_prob` and `entropy` are taken from it.
    """
    parts: dict[str, list[Tensor]] = {name: [] for name in SCORES}
    for part in chunks(logits_SNK.shape[1]):
        logits_SBK = logits_SNK[:, part].double()
        mean_BK = logits_SBK.mean(dim=0)
        parts["max_prob"].append(1 - log_probs_NK[part].amax(dim=-1).exp())
        parts["entropy"].append(entropy_of(log_probs_NK[part]))
        parts["max_logit"].append(-mean_BK.amax(dim=-1))
        parts["energy"].append(-mean_BK.logsumexp(dim=-1))
        parts["mutual_information"].append(mutual_information(logits_SBK))
        parts["expected_entropy"].append(expected_entropy(logits_SBK))
        parts["disagreement"].append(pair_disagreement(logits_SBK))
    alone = len(logits_SNK) == 1
    return {name: None if alone and name in TOGETHER else torch.cat(found) for name, found in parts.items()}


def ood_figures(own_N: Tensor, foreign_M: Tensor, name: str = "--ood") -> dict[str, float | None]:
    """FIGURES of one score; None where one side has no image.

    auroc: ties count a half. aupr_out, aupr_in: average precision, foreign images by the score, own ones by its
    negative. fpr95: share of foreign images accepted at the threshold that accepts 95 % of the own ones or more;
    fpr95_out: share of own images rejected where at least 95 % of the foreign ones are. Thresholds stand only at ends
    of groups of equal scores.

    Raises:
        RunError: a score that is not finite; `name` is the set's.
    """
    if not len(own_N) or not len(foreign_M):
        return dict.fromkeys(FIGURES)
    if not bool(own_N.isfinite().all() and foreign_M.isfinite().all()):
        raise RunError(f"{name}: a score is not finite. Take another checkpoint, or --amp_dtype fp32.")
    from sklearn.metrics import average_precision_score, roc_auc_score  # slow to load

    scores = torch.cat([own_N, foreign_M]).numpy()
    is_foreign = torch.cat([torch.zeros(len(own_N)), torch.ones(len(foreign_M))]).numpy()
    accepting = own_N.sort().values[math.ceil(ACCEPTED * len(own_N) - SLACK) - 1]
    rejecting = foreign_M.sort(descending=True).values[math.ceil(ACCEPTED * len(foreign_M) - SLACK) - 1]
    return {
        "auroc": float(roc_auc_score(is_foreign, scores)),
        "aupr_out": float(average_precision_score(is_foreign, scores)),
        "aupr_in": float(average_precision_score(1 - is_foreign, -scores)),
        "fpr95": float((foreign_M <= accepting).double().mean()),
        "fpr95_out": float((own_N >= rejecting).double().mean()),
    }

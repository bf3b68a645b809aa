"""How S predictions become one. S networks, B images, K classes."""

import torch
from torch import Tensor

from utils.errors import UserError

RULES = ("mean_logits", "mean_softmax", "max_logits", "max_softmax", "geometric_mean")
OF_LOGITS = ("mean_logits", "max_logits")  # the others are of probabilities


def ensemble_rule(after_softmax: bool, maximum: bool) -> str:
    """The rule that --is_ensembled_after_softmax and --is_max_ensemble ask for."""
    return f"{'max' if maximum else 'mean'}_{'softmax' if after_softmax else 'logits'}"


def rule_index(rule: str) -> int:
    """Place of a rule in RULES.

    Raises:
        UserError: unknown rule.
    """
    if rule not in RULES:
        raise UserError(f"Ensemble rule {rule!r} is not known: use {', '.join(RULES)}.")
    return RULES.index(rule)


def ensemble_scores(logits_SBK: Tensor, rule: str) -> Tensor:
    """Scores that order the classes as the ensemble does: (S, B, K) -> (B, K), in float32 or better.

    mean_logits, max_logits: mean or elementwise maximum of the logits; mean_softmax, max_softmax, geometric_mean: log
    of the sum, the maximum, the geometric mean of the probabilities.

    Raises:
        UserError: unknown rule.
    """
    rule_index(rule)
    logits_SBK = logits_SBK.to(torch.promote_types(logits_SBK.dtype, torch.float32))
    return _joined(logits_SBK if rule in OF_LOGITS else logits_SBK.log_softmax(dim=-1), rule)


def scores_of_all_rules(logits_SBK: Tensor) -> list[Tensor]:
    """`ensemble_scores` of every rule in the order of RULES; the probabilities are computed once."""
    log_probs_SBK = logits_SBK.log_softmax(dim=-1)
    return [_joined(logits_SBK if rule in OF_LOGITS else log_probs_SBK, rule) for rule in RULES]


def _joined(values_SBK: Tensor, rule: str) -> Tensor:
    """Logits or log-probabilities, as the rule has them, as scores: (S, B, K) -> (B, K)."""
    if rule == "mean_softmax":
        return values_SBK.logsumexp(dim=0)
    return values_SBK.amax(dim=0) if rule.startswith("max") else values_SBK.mean(dim=0)


def ensemble_log_probs(logits_SBK: Tensor, rule: str = "mean_logits") -> Tensor:
    """Log-probabilities of the ensemble, normalised over the classes: (S, B, K) -> (B, K), in float32 or better.

    Raises:
        UserError: unknown rule.
    """
    return ensemble_scores(logits_SBK, rule).log_softmax(dim=-1)

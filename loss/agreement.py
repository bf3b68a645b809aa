"""Losses that pull the predictions of S networks together (co-training losses). S networks, B images, K classes.

All map logits (S, B, K) to one value per image (B,), unweighted, and are 0 for S = 1. `*_seperate` (the published
spelling) compares every network with every other one, `*_mean` with the mean prediction; what a network is compared
with is a constant, except in `js_divergence`.

Sources: `js_divergence` and `kl_seperate` are those of Zhao et al., arXiv:2011.14660; the others are ours.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from loss import at_least_float32

AgreementLoss = Callable[[Tensor], Tensor]
Distance = Callable[[Tensor, Tensor], Tensor]


def _log_probs(logits: Tensor) -> Tensor:
    return at_least_float32(logits).log_softmax(dim=-1)


def _log_mean(log_probs_SBK: Tensor) -> Tensor:
    """Log of the mean of S distributions: (S, B, K) -> (B, K)."""
    return log_probs_SBK.logsumexp(dim=0) - math.log(len(log_probs_SBK))


def _kl(log_probs: Tensor, target_log_probs: Tensor) -> Tensor:
    """KL(target ‖ prediction): (..., K) -> (...)."""
    return (target_log_probs.exp() * (target_log_probs - log_probs)).sum(dim=-1)


def _mse(probs: Tensor, target_probs: Tensor) -> Tensor:
    """Squared difference averaged over classes: (..., K) -> (...)."""
    return (probs - target_probs).square().mean(dim=-1)


def _smooth_l1(probs: Tensor, target_probs: Tensor) -> Tensor:
    """Huber distance with β = 1 averaged over classes: (..., K) -> (...)."""
    return F.smooth_l1_loss(probs, target_probs.expand_as(probs), reduction="none").mean(dim=-1)


def _to_each_other(distance: Distance, predictions_SBK: Tensor) -> Tensor:
    """1 / (S - 1) Σ over ordered pairs i ≠ j of distance(i, constant j): (S, B, K) -> (B,)."""
    num_networks = len(predictions_SBK)
    if num_networks == 1:
        return 0.0 * predictions_SBK.sum(dim=(0, 2))
    peers_SBK = predictions_SBK.detach()
    # Rolling the networks by 1 ... S - 1 meets every ordered pair once and never pairs a network with itself.
    rolled = [distance(predictions_SBK, peers_SBK.roll(shift, dims=0)) for shift in range(1, num_networks)]
    return torch.stack(rolled).sum(dim=(0, 1)) / (num_networks - 1)


def js_divergence(logits_SBK: Tensor) -> Tensor:
    """Jensen-Shannon divergence among S predictions: (S, B, K) -> (B,), in nats.

    H(mean_i p_i) - mean_i H(p_i), computed as the equal mean_i KL(p_i ‖ mean_j p_j), which rounds less where there are
    many classes.
    """
    log_probs_SBK = _log_probs(logits_SBK)
    return _kl(_log_mean(log_probs_SBK), log_probs_SBK).mean(dim=0)


def kl_seperate(logits_SBK: Tensor) -> Tensor:
    """1 / (S - 1) Σ_{i≠j} KL(constant p_j ‖ p_i): (S, B, K) -> (B,)."""
    return _to_each_other(_kl, _log_probs(logits_SBK))


def kl_mean(logits_SBK: Tensor) -> Tensor:
    """Σ_i KL(constant mean_j p_j ‖ p_i): (S, B, K) -> (B,)."""
    log_probs_SBK = _log_probs(logits_SBK)
    return _kl(log_probs_SBK, _log_mean(log_probs_SBK).detach()).sum(dim=0)


def mse_seperate(logits_SBK: Tensor) -> Tensor:
    """1 / (S - 1) Σ_{i≠j} mean_k (p_i - constant p_j)²: (S, B, K) -> (B,)."""
    return _to_each_other(_mse, _log_probs(logits_SBK).exp())


def smooth_l1_seperate(logits_SBK: Tensor) -> Tensor:
    """1 / (S - 1) Σ_{i≠j} mean_k Huber(p_i - constant p_j): (S, B, K) -> (B,)."""
    return _to_each_other(_smooth_l1, _log_probs(logits_SBK).exp())


def mse_mean(logits_SBK: Tensor) -> Tensor:
    """Σ_i mean_k (p_i - constant mean_j p_j)²: (S, B, K) -> (B,)."""
    probs_SBK = _log_probs(logits_SBK).exp()
    return _mse(probs_SBK, probs_SBK.mean(dim=0).detach()).sum(dim=0)


def smooth_l1_mean(logits_SBK: Tensor) -> Tensor:
    """Σ_i mean_k Huber(p_i - constant mean_j p_j): (S, B, K) -> (B,)."""
    probs_SBK = _log_probs(logits_SBK).exp()
    return _smooth_l1(probs_SBK, probs_SBK.mean(dim=0).detach()).sum(dim=0)


AGREEMENT_LOSSES: dict[str, AgreementLoss] = {
    "js_divergence": js_divergence,
    "kl_seperate": kl_seperate,
    "kl_separate": kl_seperate,
    "kl_mean": kl_mean,
    "mse_seperate": mse_seperate,
    "mse_separate": mse_seperate,
    "mse_mean": mse_mean,
    "smooth_l1_seperate": smooth_l1_seperate,
    "smooth_l1_separate": smooth_l1_seperate,
    "smooth_l1_mean": smooth_l1_mean,
}

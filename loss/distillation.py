"""Losses that pull predictions towards fixed ones. B images, K classes, H classifier heads.

All map logits to one value per image, unweighted. The target side is a constant.
"""

import math

import torch
from torch import Tensor

from loss import at_least_float32
from utils.targets import Targets

MATCHINGS = ("dense", "top_down", "bottom_up", "none")


def distillation_kl(
    student_logits: Tensor, teacher_logits: Tensor, *, temperature: float = 1.0, is_constant: bool = True
) -> Tensor:
    """T² · KL(softmax(teacher / T) ‖ softmax(student / T)): (..., B, K) -> (..., B), broadcasting.

    Hinton et al., arXiv:1503.02531; T² keeps the size of the gradient independent of T.

    Args:
        student_logits, teacher_logits: of the two sides.
        temperature: T.
        is_constant: no gradient reaches the teacher's side.
    """
    if is_constant:
        teacher_logits = teacher_logits.detach()
    log_student = (at_least_float32(student_logits) / temperature).log_softmax(dim=-1)
    log_teacher = (at_least_float32(teacher_logits) / temperature).log_softmax(dim=-1)
    return temperature**2 * _kl(log_teacher, log_student)


def joint_teacher(logits_SBK: Tensor, *, temperature: float, rule: str) -> Tensor:
    """Logits of one teacher whose softmax(logits / T) is what S networks say together: (S, B, K) -> (B, K).

    Args:
        logits_SBK: of the networks.
        temperature: T.
        rule: "mean_softmax", the mean of softmax(z_s / T), or "mean_logits", softmax(mean z_s /
            T).
    """
    logits_SBK = at_least_float32(logits_SBK)
    if rule == "mean_logits" or len(logits_SBK) == 1:
        return logits_SBK.mean(dim=0)
    log_probs_SBK = (logits_SBK / temperature).log_softmax(dim=-1)
    # log-probabilities serve as logits: the softmax of a log-softmax is the softmax itself
    return temperature * (log_probs_SBK.logsumexp(dim=0) - math.log(len(logits_SBK)))


def decoupled_kl(
    student_BK: Tensor, teacher_BK: Tensor, labels_B: Tensor, *, temperature: float, alpha: float, beta: float
) -> Tensor:
    """T² · [ α · KL(b_t ‖ b_s) + β · KL(ĉ_t ‖ ĉ_s) ], the teacher constant: logits (B, K) twice -> (B,).

    b = (p(y), 1 - p(y)) with p = softmax(logits / T), ĉ: softmax over the classes other than y. With α = 1 and
    β = 1 - p_t(y) it is `distillation_kl`. Zhao et al., arXiv:2203.08679, in log space.

    Args:
        student_BK, teacher_BK: logits.
        labels_B: int64, the classes y.
        temperature, alpha, beta: T, α, β.
    """
    target, others = zip(
        _parted(teacher_BK.detach(), labels_B, temperature), _parted(student_BK, labels_B, temperature), strict=True
    )
    target_kl_B, others_kl_B = (_kl(*sides) for sides in (target, others))
    return temperature**2 * (alpha * target_kl_B + beta * others_kl_B)


def mixed_decoupled_kl(
    student_BK: Tensor, teacher_BK: Tensor, targets: Targets, *, temperature: float, alpha: float, beta: float
) -> Tensor:
    """λ · `decoupled_kl` for the labels + (1 - λ) · the same for the other labels of mixup: -> (B,). Ours."""

    def to(labels_B: Tensor) -> Tensor:
        return decoupled_kl(student_BK, teacher_BK, labels_B, temperature=temperature, alpha=alpha, beta=beta)

    if targets.labels_other_B is targets.labels_B:
        return to(targets.labels_B)
    return targets.lam * to(targets.labels_B) + (1 - targets.lam) * to(targets.labels_other_B)


def collaborative_target(logits_SBK: Tensor, targets: Targets, *, rule: str) -> Tensor:
    """Logits of what S networks should all say, made of what they say: (S, B, K) -> (B, K).

    After Guo et al., "Online Knowledge Distillation via Collaborative Learning", CVPR 2020; the choice of the label of
    mixed images is ours.

    Args:
        logits_SBK: of the networks.
        targets: labels; of mixed images, the one with the larger part counts.
        rule: "minlogit", min_i (z_i - z_i[y]) for each class; "naive", for each image the
            z_i of least cross-entropy, the first of equal ones; "mean", the mean of the logits.
    """
    logits_SBK = at_least_float32(logits_SBK)
    if rule == "mean":
        return logits_SBK.mean(dim=0)
    labels_B = torch.where(targets.lam >= 0.5, targets.labels_B, targets.labels_other_B)
    labels_SB1 = labels_B[None, :, None].expand(len(logits_SBK), -1, 1)
    if rule == "minlogit":
        return (logits_SBK - logits_SBK.gather(-1, labels_SB1)).amin(dim=0)
    best_B = logits_SBK.log_softmax(dim=-1).gather(-1, labels_SB1)[..., 0].argmax(dim=0)
    return logits_SBK.gather(0, best_B[None, :, None].expand(1, *logits_SBK.shape[1:]))[0]


def _parted(logits_BK: Tensor, labels_B: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """log b [B, 2] and log ĉ [B, K - 1] of `decoupled_kl`."""
    log_probs_BK = (at_least_float32(logits_BK) / temperature).log_softmax(dim=-1)
    places = torch.arange(log_probs_BK.shape[-1] - 1, device=labels_B.device)
    others_BK1 = log_probs_BK.gather(-1, places + (places >= labels_B[:, None]))
    # log(1 - p) is the logsumexp over the others: 1 - p rounds to 0 where p nears 1
    pair_B2 = torch.stack([log_probs_BK.gather(-1, labels_B[:, None])[:, 0], others_BK1.logsumexp(dim=-1)], dim=-1)
    return pair_B2, others_BK1.log_softmax(dim=-1)


def _kl(log_target: Tensor, log_probs: Tensor) -> Tensor:
    """KL(target ‖ probs) over the last dimension."""
    return (log_target.exp() * (log_target - log_probs)).sum(dim=-1)


def knowledge_synergy(logits_HBK: Tensor, *, matching: str = "dense") -> Tensor:
    """Σ KL(constant p_g ‖ p_h) over ordered pairs of different heads: (H, B, K) -> (B,); 0 for one head.

    Sun et al., arXiv:1906.00675.

    Args:
        logits_HBK: of the heads, the shallowest first, the main head last.
        matching: which heads g teach which heads h: "dense", all others; "top_down", deeper ones teach shallower
            ones; "bottom_up", the other way round; "none", the loss is 0.

    Raises:
        ValueError: unknown matching.
    """
    if matching not in MATCHINGS:
        raise ValueError(f"matching {matching!r} is not one of {', '.join(MATCHINGS)}")
    num_heads = len(logits_HBK)
    loss_B = 0.0 * at_least_float32(logits_HBK).sum(dim=(0, 2))
    for teacher in range(num_heads):
        students = {
            "dense": [*range(teacher), *range(teacher + 1, num_heads)],
            "top_down": [*range(teacher)],
            "bottom_up": [*range(teacher + 1, num_heads)],
            "none": [],
        }[matching]
        for student in students:
            loss_B = loss_B + distillation_kl(logits_HBK[student], logits_HBK[teacher])
    return loss_B

"""Losses that pull predictions towards fixed ones. B images, K classes, H classifier heads.

All map logits to one value per image, unweighted. The target side is a constant.
"""

from torch import Tensor

from loss import at_least_float32

MATCHINGS = ("dense", "top_down", "bottom_up", "none")


def distillation_kl(student_logits: Tensor, teacher_logits: Tensor, *, temperature: float = 1.0) -> Tensor:
    """T² · KL(constant softmax(teacher / T) ‖ softmax(student / T)): (..., B, K) -> (..., B), broadcasting.

    Hinton et al., arXiv:1503.02531; T² keeps the size of the gradient independent of T.
    """
    log_student = (at_least_float32(student_logits) / temperature).log_softmax(dim=-1)
    log_teacher = (at_least_float32(teacher_logits.detach()) / temperature).log_softmax(dim=-1)
    return temperature**2 * (log_teacher.exp() * (log_teacher - log_student)).sum(dim=-1)


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

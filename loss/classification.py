"""Cross-entropy against labels, plain or mixed up. B images, K classes."""

from torch import Tensor
from torch.nn import functional as F

from loss import at_least_float32
from utils.targets import Targets


def cross_entropy(logits_BK: Tensor, labels_B: Tensor, *, label_smoothing: float = 0.0) -> Tensor:
    """Cross-entropy of each image: logits (B, K), int64 labels (B,) -> (B,).

    With smoothing ε the target is (1 - ε) · one_hot + ε / K (Szegedy et al., arXiv:1512.00567).
    """
    return F.cross_entropy(at_least_float32(logits_BK), labels_B, reduction="none", label_smoothing=label_smoothing)


def mixed_cross_entropy(logits_BK: Tensor, targets: Targets, *, label_smoothing: float = 0.0) -> Tensor:
    """λ · CE(logits, labels) + (1 - λ) · CE(logits, other labels) of each image: (B, K) -> (B,).

    Mixup (Zhang et al., arXiv:1710.09412); where both labels are one and the same tensor it is `cross_entropy`.
    """
    loss_B = cross_entropy(logits_BK, targets.labels_B, label_smoothing=label_smoothing)
    if targets.labels_other_B is targets.labels_B:
        return loss_B
    loss_other_B = cross_entropy(logits_BK, targets.labels_other_B, label_smoothing=label_smoothing)
    return targets.lam * loss_B + (1 - targets.lam) * loss_other_B

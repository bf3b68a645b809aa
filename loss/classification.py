"""What a prediction costs against the labels, plain or mixed. B images, K classes."""

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from loss import at_least_float32
from utils.targets import Targets


def cross_entropy(
    logits_BK: Tensor, labels_B: Tensor, *, label_smoothing: float = 0.0, weights_K: Tensor | None = None
) -> Tensor:
    """Cross-entropy of each image: logits (B, K), int64 labels (B,) -> (B,).

    With smoothing ε the target is (1 - ε) · one_hot + ε / K (Szegedy et al., arXiv:1512.00567). With weights of the
    classes, every term of the sum over the classes is times its class's, as in `torch.nn.CrossEntropyLoss`; but a mean
    over images does not divide by their sum.
    """
    logits_BK = at_least_float32(logits_BK)
    weights_K = None if weights_K is None else weights_K.to(logits_BK)
    return F.cross_entropy(logits_BK, labels_B, weights_K, reduction="none", label_smoothing=label_smoothing)


def mixed_cross_entropy(
    logits_BK: Tensor, targets: Targets, *, label_smoothing: float = 0.0, weights_K: Tensor | None = None
) -> Tensor:
    """λ · CE(logits, labels) + (1 - λ) · CE(logits, other labels) of each image: (B, K) -> (B,).

    Mixup (Zhang et al., arXiv:1710.09412); where both labels are one and the same tensor it is `cross_entropy`.
    """
    loss_B = cross_entropy(logits_BK, targets.labels_B, label_smoothing=label_smoothing, weights_K=weights_K)
    if targets.labels_other_B is targets.labels_B:
        return loss_B
    others_B = targets.labels_other_B
    loss_other_B = cross_entropy(logits_BK, others_B, label_smoothing=label_smoothing, weights_K=weights_K)
    return targets.lam * loss_B + (1 - targets.lam) * loss_other_B


def mixed_binary_cross_entropy(logits_BK: Tensor, targets: Targets, *, label_smoothing: float = 0.0) -> Tensor:
    """Mean over the classes of the binary cross-entropy of each image: (B, K) -> (B,).

        -1/K Σ_k [ t_k log σ(z_k) + (1 - t_k) log σ(-z_k) ],   t = λ · target(labels) + (1 - λ) · target(other labels)

    with smoothed targets as in `cross_entropy`: every class is told by itself whether it is there, and of mixed images
    two are. Wightman et al., "ResNet strikes back", arXiv:2110.00476, without their threshold.
    """
    logits_BK = at_least_float32(logits_BK)
    num_classes = logits_BK.shape[-1]

    def target(labels_B: Tensor) -> Tensor:
        # F.one_hot would read the labels on the host
        return torch.zeros_like(logits_BK).scatter_(1, labels_B[:, None], 1.0)

    target_BK = target(targets.labels_B)
    if targets.labels_other_B is not targets.labels_B:
        target_BK = targets.lam * target_BK + (1 - targets.lam) * target(targets.labels_other_B)
    target_BK = (1 - label_smoothing) * target_BK + label_smoothing / num_classes
    return F.binary_cross_entropy_with_logits(logits_BK, target_BK, reduction="none").mean(dim=-1)


@dataclass(frozen=True, kw_only=True)
class ClassLoss:
    """The classification loss of a run: what methods give their predictions to.

    Attributes:
        kind: "ce", `mixed_cross_entropy`, or "bce", `mixed_binary_cross_entropy`.
        label_smoothing: ε, in [0, 1).
        weights_K: of the classes, for "ce" only; None: all are 1.
    """

    kind: str = "ce"
    label_smoothing: float = 0.0
    weights_K: Tensor | None = field(default=None, compare=False)

    def __call__(self, logits_BK: Tensor, targets: Targets) -> Tensor:
        """The loss of each image: logits (B, K) -> (B,), in float32 or better."""
        if self.kind == "bce":
            return mixed_binary_cross_entropy(logits_BK, targets, label_smoothing=self.label_smoothing)
        return mixed_cross_entropy(logits_BK, targets, label_smoothing=self.label_smoothing, weights_K=self.weights_K)


CROSS_ENTROPY = ClassLoss()

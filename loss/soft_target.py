"""Cross-entropy against soft labels. B images, K classes."""

from torch import Tensor

from loss import at_least_float32


def soft_cross_entropy(logits_BK: Tensor, probs_BK: Tensor) -> Tensor:
    """-sum_k p_k log softmax(z)_k of each image: logits and probabilities (B, K) -> (B,).

    The distillation loss of Cream (Peng et al., NeurIPS 2020), at temperature 1.
    """
    return -(at_least_float32(probs_BK) * at_least_float32(logits_BK).log_softmax(dim=-1)).sum(dim=-1)

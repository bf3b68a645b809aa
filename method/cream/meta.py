"""The teacher of a step, and the gradient that teaches the meta-network to choose it (Peng et al., NeurIPS 2020)."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from loss import at_least_float32
from loss.soft_target import soft_cross_entropy
from method.cream.board import BoardEntry
from method.inner import average_over_processes


class WeightSharing(Protocol):
    """What the functions below need of a supernet."""

    meta_layer: nn.Linear

    def __call__(self, images: Tensor, path: Any) -> Tensor: ...

    def active_parameters(self, path: Any) -> list[nn.Parameter]: ...


@contextmanager
def frozen_statistics(network: Any) -> Iterator[None]:
    """Within the block, batch norms in training mode use the batch's statistics and leave their running ones alone."""
    norms = [module for module in network.modules() if isinstance(module, _BatchNorm) and module.track_running_stats]
    for norm in norms:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True


def probabilities(logits_BK: Tensor) -> Tensor:
    return at_least_float32(logits_BK).softmax(dim=-1)


@torch.no_grad()
def match_features(supernet: WeightSharing, path: Any, entries: Sequence[BoardEntry]) -> Tensor:
    """What the meta-network judges: softmax(student(x_i)) - q_i for every entry i, flattened to [N, SLICE * K]."""
    return torch.stack([(probabilities(supernet(e.images, path)) - e.probs).flatten() for e in entries])


@torch.no_grad()
def match_scores(meta_layer: nn.Linear, features: Tensor) -> tuple[int, Tensor]:
    """(index of the best-matching entry, its score), from features [N, SLICE * K] and averaged over processes."""
    scores_N = meta_layer(features.to(meta_layer.weight.dtype)).squeeze(1)
    average_over_processes([scores_N])
    values = scores_N.tolist()
    best = values.index(max(values))
    return best, scores_N[best]


class MetaGradient(NamedTuple):
    """Gradient of the validation loss behind the virtual step.

    teacher: index of the board entry. gate: its weight. kd, dot: KD on the inner slice, <V, G>.
    weight, bias: gradients of the meta layer, shaped as its parameters.
    """

    teacher: int
    gate: Tensor
    kd: Tensor
    dot: Tensor
    weight: Tensor
    bias: Tensor


def match_gradient(
    supernet: WeightSharing,
    path: Any,
    entries: Sequence[BoardEntry],
    inner_images: Tensor,
    outer_images: Tensor,
    outer_loss: Callable[[Tensor], Tensor],
    learning_rate: float,
) -> MetaGradient:
    """How the meta layer should move so that a step on the weighted distillation loss lowers `outer_loss`.

    With w the student's weights, G = dKD/dw on the inner slice, w' = w - a g G (plain SGD) and V = d(outer loss)/dw' on
    the outer slice, the gradient is -a <V, G> dg/dtheta: exact, because the scores in g = sigmoid(score) rest on
    detached outputs. G, V and the result are averages over processes. The weights are bit for bit what they were.

    Args:
        supernet: student and teachers.
        path: the student.
        entries: the board.
        inner_images, outer_images: the two slices of the batch, [SLICE, C, H, W].
        outer_loss: logits [SLICE, K] -> scalar.
        learning_rate: a.
    """
    features = match_features(supernet, path, entries)
    teacher, score = match_scores(supernet.meta_layer, features)
    gate = score.sigmoid()
    weights = supernet.active_parameters(path)
    with torch.no_grad():
        probs = probabilities(supernet(inner_images, entries[teacher].arch))
    kd = soft_cross_entropy(supernet(inner_images, path), probs).mean()
    inner_grads = torch.autograd.grad(kd, weights)
    average_over_processes(inner_grads)
    with torch.no_grad():
        kept = [weight.clone() for weight in weights]
        for weight, gradient in zip(weights, inner_grads, strict=True):
            weight.sub_(learning_rate * gate * gradient)
    try:
        outer_grads = torch.autograd.grad(outer_loss(supernet(outer_images, path)), weights)
    finally:
        with torch.no_grad():
            for weight, value in zip(weights, kept, strict=True):
                weight.copy_(value)
    average_over_processes(outer_grads)
    dot = torch.stack([(v * g).sum() for v, g in zip(outer_grads, inner_grads, strict=True)]).sum()
    slope = -learning_rate * dot * gate * (1 - gate)
    weight_grad, bias_grad = (slope * features[teacher])[None], slope[None]
    average_over_processes([weight_grad, bias_grad])
    return MetaGradient(teacher, gate, kd.detach(), dot, weight_grad, bias_grad)

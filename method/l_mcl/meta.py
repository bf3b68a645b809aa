"""Exact gradients through a few virtual SGD steps: how parameters of an inner loss affect an outer one."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

Objective = Callable[[], Tensor]


class VirtualSGD(NamedTuple):
    """SGD without Nesterov whose velocity starts at zero: v <- momentum · v + g + weight_decay · θ, θ <- θ - lr · v."""

    lr: float
    momentum: float
    weight_decay: float


class Snapshot(NamedTuple):
    """Values of θ, and the random state (of the CPU, and of the device if it has its own) that goes with them."""

    theta: list[Tensor]
    random: tuple[Tensor, Tensor | None]


def virtual_steps(objectives: Sequence[Objective], theta: Sequence[Tensor], sgd: VirtualSGD) -> Iterator[Snapshot]:
    """Make one SGD step on each objective in turn, in place, and yield the state before each.

    A parameter that an objective does not reach has g = 0: decay and momentum still apply to it.
    """
    velocity = [torch.zeros_like(p) for p in theta]
    for objective in objectives:
        yield Snapshot([p.detach().clone() for p in theta], _random_state(theta[0].device))
        gradients = _filled(torch.autograd.grad(objective(), theta, allow_unused=True), theta)
        with torch.no_grad():
            for p, v, g in zip(theta, velocity, gradients, strict=True):
                v.mul_(sgd.momentum).add_(g).add_(p, alpha=sgd.weight_decay)
                p.sub_(v, alpha=sgd.lr)


def meta_gradient(
    inner: Objective, outer: Objective, theta: Sequence[Tensor], phi: Sequence[Tensor], *, steps: int, sgd: VirtualSGD
) -> tuple[Tensor, list[Tensor]]:
    """J and dJ/dφ, where J = outer(θ_n) after `steps` virtual SGD steps on `inner` and one on `outer` from θ_0.

    The chain is differentiated backwards from the saved states, with one step's graph at a time (the recursion of
    arXiv:2207.11518, with its weight-decay term in full), so memory grows by one copy of θ per step only. Afterwards
    θ has its values back, bit for bit, also when an objective raises. Buffers that the objectives change (batch-norm
    statistics) are the caller's: see `buffers_restored`.

    Args:
        inner: closure over θ and φ -> scalar. Random layers see the same draws when a step is replayed.
        outer: closure over θ -> scalar.
        theta: parameters that the virtual steps move.
        phi: parameters whose gradient is wanted; no `.grad` is touched.
        steps: virtual steps on `inner`, 1 or more.
        sgd: rule of the virtual steps.
    """
    objectives = [inner] * steps + [outer]
    states: list[Snapshot] = []
    try:
        states.extend(virtual_steps(objectives, theta, sgd))
        value = outer()
        continuing = _random_state(theta[0].device)
        p = _filled(torch.autograd.grad(value, theta, allow_unused=True), theta)
        q = [torch.zeros_like(tensor) for tensor in theta]
        phi_grads = [torch.zeros_like(tensor) for tensor in phi]
        for t in reversed(range(len(objectives))):
            _set_values(theta, states[t].theta)
            _set_random_state(states[t].random, theta[0].device)
            direction = [b - sgd.lr * a for a, b in zip(p, q, strict=True)]
            gradients = torch.autograd.grad(objectives[t](), theta, create_graph=True, allow_unused=True)
            product = torch.stack([(g * d).sum() for g, d in zip(gradients, direction, strict=True) if g is not None])
            wanted = [*phi, *theta] if t else [*phi]  # nothing needs the derivative by θ_0
            found = [torch.zeros_like(tensor) for tensor in wanted]
            if product.requires_grad:
                found = _filled(torch.autograd.grad(product.sum(), wanted, allow_unused=True), wanted)
            for total, part in zip(phi_grads, found, strict=False):
                total += part
            if t:
                kept, decay = 1 - sgd.lr * sgd.weight_decay, sgd.weight_decay
                p = [kept * a + decay * b + h for a, b, h in zip(p, q, found[len(phi) :], strict=True)]
                q = [sgd.momentum * d for d in direction]
        _set_random_state(continuing, theta[0].device)
    finally:
        if states:
            _set_values(theta, states[0].theta)
    return value.detach(), phi_grads


@contextmanager
def buffers_restored(*modules: nn.Module) -> Iterator[None]:
    """Within the block buffers of the modules may change; afterwards they hold their values again, bit for bit."""
    saved = [(buffer, buffer.clone()) for module in modules for buffer in module.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in saved:
                buffer.copy_(value)


def _filled(gradients: Sequence[Tensor | None], like: Sequence[Tensor]) -> list[Tensor]:
    return [torch.zeros_like(p) if g is None else g for g, p in zip(gradients, like, strict=True)]


def _set_values(theta: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    with torch.no_grad():
        for p, value in zip(theta, values, strict=True):
            p.copy_(value)


def _random_state(device: torch.device) -> tuple[Tensor, Tensor | None]:
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def _set_random_state(state: tuple[Tensor, Tensor | None], device: torch.device) -> None:
    on_cpu, on_device = state
    torch.set_rng_state(on_cpu)
    if on_device is not None:
        torch.cuda.set_rng_state(on_device, device)

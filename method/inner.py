"""What methods need for steps of their own, beside the main optimiser's: means over processes, a small guarded SGD."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor


@torch.no_grad()
def finite_sgd_step(optimizer: torch.optim.SGD, judged: Tensor) -> None:
    """`guarded_step` for a small SGD with momentum that is not from `build_optimizer`: what changed is put back.

    Args:
        judged: scalar; the step counts where it is finite.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    momenta = [optimizer.state[p].get("momentum_buffer") for p in parameters]
    before = [p.clone() for p in parameters]
    before += [torch.zeros_like(p) if m is None else m.clone() for p, m in zip(parameters, momenta, strict=True)]
    optimizer.step()
    after = parameters + [optimizer.state[p]["momentum_buffer"] for p in parameters]
    for old, new in zip(before, after, strict=True):
        new.copy_(torch.where(judged.isfinite(), new, old))


def average_over_processes(tensors: Sequence[Tensor]) -> None:
    """Replace each tensor by its mean over all processes, by one all-reduce; nothing happens with one process."""
    if not (dist.is_initialized() and dist.get_world_size() > 1) or not tensors:
        return
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for tensor, mean in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(mean.view_as(tensor))

"""What methods need inside: means over processes, a small guarded SGD, weights that follow the epoch, frozen copies."""

import math
from collections.abc import Sequence
from typing import Self

import torch
import torch.distributed as dist
from torch import Tensor, nn

from utils.distributed import is_alone


@torch.no_grad()
def finite_sgd_step(optimizer: torch.optim.SGD, judged: Tensor) -> None:
    """A step of a small SGD with momentum that a judged number can take back (as `training.optim.guarded_step` does).

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


def average_over_processes(tensors: Sequence[Tensor], group: dist.ProcessGroup | None = None) -> None:
    """Replace each tensor by its mean over all processes (of a group), by one all-reduce; alone, nothing happens."""
    if is_alone(group) or not tensors:
        return
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    dist.all_reduce(flat, group=group)
    flat /= dist.get_world_size(group)
    for tensor, mean in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(mean.view_as(tensor))


def ramp(epoch: int, length: int) -> float:
    """exp(-5 (1 - min(epoch, length) / length)²), the epoch counted from 0; 1 for a length of 0.

    The weight of a teacher that has to learn itself, as in the published code of arXiv:1806.04606 and 1912.00350:
    0.0067, not 0, in the first epoch.
    """
    return math.exp(-5 * (1 - min(epoch, length) / length) ** 2) if length else 1.0


class EpochNumber(nn.Module):
    """A number of a loss that changes from epoch to epoch, on the device and written in place.

    A captured CUDA graph sees its new values so. No checkpoint holds it. Until it is first written it is NaN.
    """

    value: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("value", torch.full((), math.nan), persistent=False)
        self._written = math.nan

    def write(self, number: float) -> None:
        """Make it `number`; the device is not touched where it is that already."""
        if number != self._written:
            self.value.fill_(number)
            self._written = number

    def forward(self, dtype: torch.dtype) -> Tensor:
        """The number as a scalar of this type."""
        return self.value.to(dtype)


class TeacherRamp(EpochNumber):
    """The `ramp` of a teacher that has to learn itself.

    Args:
        length: epochs that it rises over; None: 80 of 300, in proportion.
    """

    def __init__(self, length: int | None) -> None:
        super().__init__()
        self.length = length

    def bring_to(self, epoch: int, epochs: int) -> None:
        """Make it that of an epoch, counted from 0, of so many."""
        self.write(ramp(epoch, round(80 * epochs / 300) if self.length is None else self.length))


class Asleep(nn.Module):
    """A frozen network: no gradients, and in evaluation mode whatever `train()` says to the method that holds it.

    Args:
        network: a copy of its own, usually by `copy.deepcopy`; state-dict keys begin with `network.`.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network.requires_grad_(False)
        self.train()

    def train(self, mode: bool = True) -> Self:
        """Changes nothing: the network stays in evaluation mode."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """What the network gives, without a graph."""
        outputs: Tensor = self.network(images)
        return outputs

    @torch.no_grad()
    def refresh(self, network: nn.Module) -> None:
        """Take parameters and buffers over from a network of the same structure."""
        self.network.load_state_dict(network.state_dict())

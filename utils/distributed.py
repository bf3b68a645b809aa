"""What processes tell each other: sums, rows, values and buffers. Alone, a process tells itself.

`utils.launch` says who a process is and how others are started.
"""

import inspect
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from utils.launch import World

T = TypeVar("T")


def is_alone() -> bool:
    """Whether this process has no others to talk to."""
    return not dist.is_initialized() or dist.get_world_size() == 1


def all_reduce_sum(value: Tensor) -> Tensor:
    """Sum over all processes, in place; the value itself where there is one process."""
    if not is_alone():
        dist.all_reduce(value)
    return value


def all_gather_rows(rows: Tensor, sizes: Sequence[int] | None = None) -> Tensor:
    """Rows [B_r, ...] of every process, in rank order -> [sum of B_r, ...]; B_r may differ. No gradient.

    Args:
        sizes: every process's B_r; None: the processes ask each other, for which the host waits.
    """
    if is_alone():
        return rows
    if sizes is None:
        sizes = gather_counts(len(rows), rows.device)
    padded = rows.new_zeros((max(sizes), *rows.shape[1:]))
    padded[: len(rows)] = rows
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded)
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])


def gather_values(value: Any) -> list[Any]:
    """A small value (plain objects and CPU tensors) of every process, in rank order."""
    if is_alone():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def gather_counts(count: int, device: torch.device) -> list[int]:
    """Every process's count, in rank order; the host waits for them."""
    if is_alone():
        return [count]
    counts = torch.zeros(dist.get_world_size(), dtype=torch.int64, device=device)
    counts[dist.get_rank()] = count
    dist.all_reduce(counts)
    return [int(number) for number in counts.tolist()]


def wrap(module: nn.Module, world: World) -> DistributedDataParallel:
    """`module` with gradients averaged over the processes; buffers stay each process's own."""
    # torch before 2.12 knows the option by its old name only
    known = inspect.signature(DistributedDataParallel).parameters
    name = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    own_buffers: dict[str, Any] = {name: False}
    ids = [world.device.index] if world.device.type == "cuda" else None
    return DistributedDataParallel(module, device_ids=ids, gradient_as_bucket_view=True, **own_buffers)


def broadcast_buffers(module: nn.Module) -> None:
    """Give every process the buffers of process 0, whose BN statistics are the run's (as in the published runs)."""
    if is_alone():
        return
    for buffer in module.buffers():
        dist.broadcast(buffer, src=0)


def barrier() -> None:
    """Wait for all processes."""
    if dist.is_initialized():
        dist.barrier()


def main_first(world: World, work: Callable[[], T]) -> T:
    """What `work` gives, in every process, after it is done in process 0: that one may write what the others read."""
    if world.is_main:
        result = work()
        barrier()
        return result
    barrier()
    return work()

"""What processes tell each other: sums, rows, values and buffers. Alone, a process tells itself.

`utils.launch` says who a process is and how others are started.
"""

import inspect
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from utils.device import by_type
from utils.errors import RunError
from utils.launch import World

T = TypeVar("T")
PATIENCE, INTERVAL = 12 * 3600.0, 0.2  # seconds that a process waits for another one's download, and between two looks


def is_alone(group: dist.ProcessGroup | None = None) -> bool:
    """Whether this process has no others to talk to, in the job or in a group of it."""
    return not dist.is_initialized() or dist.get_world_size(group) == 1


def all_reduce_sum(value: Tensor) -> Tensor:
    """Sum over all processes, in place; the value itself where there is one process."""
    if not is_alone():
        dist.all_reduce(value)
    return value


def said_by_first(work: Callable[[], T]) -> T:
    """What `work` gives in process 0, in every process; the others do not do it. The value is plain data."""
    if is_alone():
        return work()
    box = [work() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(box, src=0)
    return box[0]  # type: ignore[return-value]


def add_once(world: World) -> Callable[[Tensor], Tensor]:
    """The sum over all processes, in place, of what was counted of a batch or a split, each image counted once.

    Where the networks are spread, every group of them has counted the same.
    """
    return all_reduce_sum if world.mesh is None else world.mesh.sum_once


def gather_into(everyones: Tensor, own: Tensor, group: dist.ProcessGroup | None = None) -> None:
    """Fill `everyones` with the `own` of every process, in rank order; all are of one size."""
    # torch 2.14 warns of the one name, 2.11 has not the other
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    gather(everyones, own, group=group)


def all_gather_rows(rows: Tensor, sizes: Sequence[int] | None = None) -> Tensor:
    """Rows [B_r, ...] of every process, in rank order -> [sum of B_r, ...]; B_r may differ. No gradient.

    Args:
        sizes: every B_r; None: the processes ask each other for them, and the host waits.
    """
    if is_alone():
        return rows
    sizes = gather_counts(len(rows), rows.device) if sizes is None else sizes
    if min(sizes) == max(sizes):
        everyones = rows.new_empty((sum(sizes), *rows.shape[1:]))
        gather_into(everyones, rows.contiguous())
        return everyones
    padded = rows.new_zeros((max(sizes), *rows.shape[1:]))
    padded[: len(rows)] = rows
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded)
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])


def exchange_rows(
    outgoing: Tensor,
    *,
    sent_W: Sequence[int],
    received_W: Sequence[int],
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """Rows for each process in rank order -> rows from each process in rank order. No gradient; the host does not wait.

    Args:
        outgoing: [sum of sent_W, ...], contiguous.
        sent_W, received_W: how many rows are for, and come from, every process.
        group: of the job's processes; None: all.
    """
    incoming = outgoing.new_empty((sum(received_W), *outgoing.shape[1:]))
    dist.all_to_all_single(incoming, outgoing, list(received_W), list(sent_W), group=group)
    return incoming


def gather_values(value: Any) -> list[Any]:
    """A small value (plain objects and CPU tensors) of every process, in rank order."""
    if is_alone():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def gather_counts(count: int, device: torch.device, group: dist.ProcessGroup | None = None) -> list[int]:
    """Every process's count, in rank order; the host waits for them."""
    if is_alone(group):
        return [count]
    counts = torch.zeros(dist.get_world_size(group), dtype=torch.int64, device=device)
    counts[dist.get_rank(group)] = count
    dist.all_reduce(counts, group=group)
    return [int(number) for number in counts.tolist()]


def wrap(module: nn.Module, world: World) -> DistributedDataParallel:
    """`module` with gradients averaged over the processes that share it; buffers stay each process's own."""
    # torch before 2.12 knows the option by its old name only
    known = inspect.signature(DistributedDataParallel).parameters
    name = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    own_buffers: dict[str, Any] = {name: False}
    # networks on streams of their own (--execution parallel) are ordered by autograd's engine; torch warns all the same
    quieten = getattr(torch.autograd.graph, "set_warn_on_accumulate_grad_stream_mismatch", None)
    if quieten is not None:
        quieten(False)
    ids = [world.device.index] if world.device.type == "cuda" else None
    return DistributedDataParallel(
        module, device_ids=ids, process_group=world.sharers, gradient_as_bucket_view=True, **own_buffers
    )


def broadcast_buffers(module: nn.Module, group: dist.ProcessGroup | None = None) -> None:
    """Give every process the buffers of process 0, whose BN statistics are the run's (as in the published runs).

    Args:
        group: the processes with the same networks, whose first one gives; None: all.
    """
    if is_alone(group):
        return
    everything = [*module.buffers()]
    for places in by_type(everything):  # an exchange for each buffer takes longer than all of them together
        buffers = [everything[place] for place in places]
        flat = torch.cat([buffer.reshape(-1) for buffer in buffers])
        dist.broadcast(flat, group=group, group_src=0)
        parts = flat.split([buffer.numel() for buffer in buffers])
        torch._foreach_copy_(buffers, [part.view(b.shape) for part, b in zip(parts, buffers, strict=True)])


def barrier() -> None:
    """Wait for all processes."""
    if dist.is_initialized():
        dist.barrier()


def main_first(world: World, work: Callable[[], T], *, what: str) -> T:
    """What `work` gives, in every process, after it is done in process 0: that one may write what the others read.

    The others look into the store until then. In an exchange they would wait no longer than its time limit, which a
    download may well take.

    Args:
        what: process 0 has done then, as the end of "process 0 has not …".

    Raises:
        RunError: process 0 is not done after PATIENCE.
    """
    result = main_alone(world, work, what=what)
    return result if world.store is None or world.is_main else work()  # type: ignore[return-value]


def main_alone(world: World, work: Callable[[], T], *, what: str) -> T | None:
    """What `work` gives, in process 0; the others wait for it as in `main_first`, and get None.

    Args:
        what: as of `main_first`.

    Raises:
        RunError: as `main_first`.
    """
    if world.store is None:
        return work()
    store, key = world.store, f"done first/{next(world.waits)}"
    if world.is_main:
        result = work()
        store.set(key, "")
        return result
    wait_until(lambda: store.check([key]), f"process 0 has not {what}")
    return None


def wait_until(is_so: Callable[[], bool], not_yet: str) -> None:
    """Look until something is so that other processes say in the store; `is_so` must not wait there itself.

    Args:
        not_yet: what is the matter as long as it is not, as the beginning of "… after 12 hours."

    Raises:
        RunError: it is not so after PATIENCE.
    """
    deadline, pause = time.monotonic() + PATIENCE, INTERVAL / 256
    while not is_so():
        if time.monotonic() > deadline:
            raise RunError(f"{not_yet} after {PATIENCE / 3600:.0f} hours.")
        time.sleep(pause)  # not in the store, which the heartbeat needs meanwhile
        pause = min(2 * pause, INTERVAL)

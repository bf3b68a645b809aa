"""Processes as a mesh of N groups of networks times R replicas (--placement networks): who holds, and sends, what.

Ranks are numbered with the replica fastest, so that the R processes of a group lie on one machine where they fit: DDP's
gradients stay inside, logits travel between groups.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from utils.errors import UserError

_Value = TypeVar("_Value")


@dataclass(frozen=True, kw_only=True)
class Mesh:
    """The place of one process in the mesh.

    Attributes:
        groups, replicas: N and R; N · R processes.
        group: which of the N groups of networks this process belongs to.
        replica: which of the R shards of every batch it takes.
        network_dim: the N processes with the same shard, one of every group.
        data_dim: the R processes with the same networks.
    """

    groups: int
    replicas: int
    group: int
    replica: int
    network_dim: dist.ProcessGroup
    data_dim: dist.ProcessGroup

    def __deepcopy__(self, memo: dict[int, Any]) -> "Mesh":
        return self  # process groups are what they are

    def first_rank_of(self, group: int) -> int:
        """The process that speaks for a group: its first replica."""
        return group * self.replicas

    def held(self, num_networks: int) -> range:
        """Numbers of the networks that this process holds."""
        share = num_networks // self.groups
        return range(self.group * share, (self.group + 1) * share)

    def gather_networks(self, rows: Tensor) -> Tensor:
        """Rows [S/N, ...] of every group's networks, in order -> [S, ...], at least float32: one collective.

        On a GPU no host waits for it.
        This process's own rows stay in the graph; the others are constants. So a loss L of all rows has the exact
        gradient for the own networks, on which it depends through their rows alone.
        """
        own = rows.to(torch.promote_types(rows.dtype, torch.float32)).contiguous()
        parts = [torch.empty_like(own) for _ in range(self.groups)]
        dist.all_gather(parts, own.detach(), group=self.network_dim)
        parts[self.group] = own
        return torch.cat(parts)

    def sum_once(self, value: Tensor) -> Tensor:
        """Sum over the shards, in place, equal in all processes; what every group has counted is taken of the first."""
        if self.group > 0:
            value.zero_()
        dist.all_reduce(value)
        return value

    def sum_networks(self, value: Tensor) -> Tensor:
        """Sum over the groups, in place."""
        dist.all_reduce(value, group=self.network_dim)
        return value

    def collect(self, make: Callable[[int], _Value], numbers: range) -> list[_Value]:
        """What `make` gives for every network, in order; in process 0; the others get an empty list.

        One network after another is made, sent and received, so that nobody needs room for more than one on its way.

        Args:
            make: number of a network -> plain objects and CPU tensors; equal in all replicas of a group.
            numbers: of the networks of this process's group.
        """
        rank = dist.get_rank()
        if rank == 0:
            found = [make(number) for number in numbers]
            for group in range(1, self.groups):
                for _ in numbers:
                    received: list[Any] = [None]
                    dist.recv_object_list(received, src=self.first_rank_of(group))
                    found.append(received[0])
            return found
        if self.replica == 0:
            for number in numbers:
                dist.send_object_list([make(number)], dst=0)
        return []


def choose_groups(num_networks: int, world_size: int, asked: int | None) -> int:
    """N: --network_groups, or the largest divisor of S that divides the number of processes.

    Raises:
        UserError: one process, or an N that does not divide both.
    """
    if world_size == 1:
        raise UserError(
            "--placement networks needs several processes: start them with torchrun --nproc_per_node N, or with "
            "--multiprocessing_distributed, or leave the flag away."
        )
    if asked is None:
        return max(n for n in range(1, num_networks + 1) if num_networks % n == 0 and world_size % n == 0)
    for count, what in ((num_networks, "networks"), (world_size, "processes")):
        if count % asked:
            raise UserError(
                f"--network_groups {asked} does not divide the {count} {what}: give a divisor of both, or none."
            )
    return asked


def build_mesh(groups: int, device: torch.device) -> Mesh:
    """This process's place among N groups; every process of the job takes part."""
    replicas = dist.get_world_size() // groups
    mesh = init_device_mesh(device.type, (groups, replicas), mesh_dim_names=("network", "data"))
    group, replica = mesh.get_coordinate() or (0, 0)
    return Mesh(
        groups=groups,
        replicas=replicas,
        group=group,
        replica=replica,
        network_dim=mesh.get_group("network"),
        data_dim=mesh.get_group("data"),
    )

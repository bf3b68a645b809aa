"""The mesh of --placement networks: who holds what, gathers that keep a gradient, sums, skips and states."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image
from torch import nn

from benchmarks.sync_audit import SyncAudit
from dataset.cut import RandomCrops, Request, ResizedCropSpec
from dataset.views import ViewMaker, plain_spec
from model.layers.random import Dropout
from model.splitnet import SplitNet
from tests.processes import run_processes
from training.guard import NonfiniteGuard
from training.optim import clip_gradients
from training.spread import join, part_of
from training.update import WeightUpdate
from utils.errors import UserError
from utils.launch import World
from utils.mesh import Mesh, build_mesh, choose_groups

CPU = torch.device("cpu")


def small_networks(count: int) -> SplitNet:
    torch.manual_seed(0)
    return SplitNet([nn.Sequential(nn.Flatten(), nn.Linear(12, 3), Dropout(0.5)) for _ in range(count)]).double()


def in_the_middle(replicas: int, group: int) -> Mesh:
    """The place of a process of the 2nd of two groups, which talks to nobody."""
    nobody: dist.ProcessGroup = None  # type: ignore[assignment]
    return Mesh(groups=2, replicas=replicas, group=group, replica=0, network_dim=nobody, data_dim=nobody)


@pytest.mark.parametrize(("networks", "world_size", "groups"), [(4, 8, 4), (4, 2, 2), (3, 2, 1), (6, 4, 2), (2, 6, 2)])
def test_as_many_groups_as_divide_networks_and_processes(networks: int, world_size: int, groups: int) -> None:
    assert choose_groups(networks, world_size, None) == groups
    assert choose_groups(networks, world_size, 1) == 1


@pytest.mark.parametrize(("networks", "world_size", "asked"), [(4, 8, 3), (4, 6, 4), (2, 1, None)])
def test_groups_that_do_not_fit_are_refused(networks: int, world_size: int, asked: int | None) -> None:
    with pytest.raises(UserError, match="does not divide" if asked else "several processes"):
        choose_groups(networks, world_size, asked)


@pytest.mark.parametrize(("replicas", "local_size", "nodes"), [(1, 1, 1), (2, 4, 1), (4, 4, 1), (8, 4, 2), (6, 4, 2)])
def test_a_batch_grows_with_the_nodes_of_one_group_alone(replicas: int, local_size: int, nodes: int) -> None:
    world = World(0, 2 * replicas, 0, local_size, CPU, mesh=in_the_middle(replicas, 0))
    assert (world.num_nodes, world.num_shards) == (nodes, replicas)


def test_held_networks_keep_their_names_and_draws() -> None:
    whole, part = small_networks(4), small_networks(4)
    part.hold(in_the_middle(1, 1))
    assert [number for number, _ in part.numbered()] == [2, 3]
    assert (part.split_factor, part.num_members, part.first_network) == (4, 4, 2)
    state = whole.state_dict()
    assert list(part.state_dict()) == [name for name in state if name.startswith(("models.2.", "models.3."))]
    part.load_state_dict({name: state[name] for name in part.state_dict()})
    assert part.models[1] is part.get_submodule("models.3")
    images = torch.ones(2, 3, 2, 2, dtype=torch.float64)
    for network in (whole, part):
        network.begin_step(7)
    for number, one in part.numbered():
        assert torch.equal(one(images), whole.models[number](images))
    assert list(copy.deepcopy(part).state_dict()) == list(part.state_dict())


def test_views_are_drawn_by_their_numbers_in_the_whole() -> None:
    images = torch.randint(256, (3, 3, 8, 8), dtype=torch.uint8)
    maker = ViewMaker(plain_spec(6, (0.5,) * 3, (0.2,) * 3), seed=3)
    positions_B = np.arange(3)
    whole = maker.make(images, 1, positions_B, 4)
    assert torch.equal(maker.make(images, 1, positions_B, 2, first_view=2), whole[2:])
    assert not torch.equal(maker.make(images, 1, positions_B, 2), whole[2:])
    crops = [RandomCrops(ResizedCropSpec(size=4), count, 3, first) for count, first in ((4, 0), (2, 2))]
    request = Request(1, positions_B, positions_B, 3)
    picture = Image.linear_gradient("L").convert("RGB")
    both = [cut.prepare(request)(picture, 1) for cut in crops]
    assert torch.equal(both[0][2:], both[1])


def losses_and_gradients(rank: int, world_size: int) -> list:
    mesh = build_mesh(world_size, CPU)
    network = small_networks(2 * world_size).train()
    twin = copy.deepcopy(network)
    network.hold(mesh)
    views = torch.randn(2 * world_size, 5, 3, 2, 2, generator=torch.Generator().manual_seed(1)).double()
    found = []
    for one, seen in ((network, views[2 * rank : 2 * rank + 2]), (twin, views)):
        one.begin_step(3)
        logits_SBK = one(seen)
        # a loss that is no sum over networks
        (logits_SBK.softmax(-1).prod(dim=0).sum() + logits_SBK.mean(0).square().sum()).backward()
        found.append(logits_SBK.detach())
    assert torch.equal(*found)
    for name, parameter in network.named_parameters():
        torch.testing.assert_close(parameter.grad, twin.get_parameter(name).grad, rtol=0, atol=1e-15)
    norms = [
        clip_gradients(one.parameters(), 0.1, others=group)
        for one, group in ((network, mesh.network_dim), (twin, None))
    ]
    torch.testing.assert_close(*norms)
    for name, parameter in network.named_parameters():
        torch.testing.assert_close(parameter.grad, twin.get_parameter(name).grad)
    return [float(norms[0])]


def test_gathered_logits_give_every_network_its_exact_gradient(tmp_path: Path) -> None:
    first, second = run_processes(2, losses_and_gradients, tmp_path / "r")
    assert first == second


def skipped_and_joined(rank: int, world_size: int) -> list:
    """One group's gradient is not finite, in float32 and under a scaler of fp16; then everybody's state is joined."""
    mesh = build_mesh(world_size, CPU)
    network = small_networks(2).float()
    whole = copy.deepcopy(network)
    network.hold(mesh)
    flags = []
    for scaled in (False, True):
        optimizer = torch.optim.SGD(network.parameters(), 0.1, momentum=0.9, fused=True)
        for parameter in network.parameters():
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
            parameter.grad = torch.ones_like(parameter)
        scaler = torch.amp.GradScaler("cpu", enabled=scaled, init_scale=1.0)
        scaler.scale(torch.ones(()))
        update = WeightUpdate(
            network=network,
            parameters=[*network.parameters()],
            optimizer=optimizer,
            scaler=scaler,
            guard=NonfiniteGuard(2, CPU, sticky=False),
            average=None,
            clip_grad=None,
            kept=None,
            others=mesh.network_dim,
        )
        if rank == 1:
            next(network.parameters()).grad[0] = torch.inf
        before = [parameter.detach().clone() for parameter in network.parameters()]
        step = (torch.ones(()), torch.zeros(2, 1, 3), torch.zeros((), dtype=torch.int64))
        with SyncAudit(CPU) as audit:
            update(*step)
        assert scaled or audit.found == [], audit.found
        flags.append(all(torch.equal(*pair) for pair in zip(before, network.parameters(), strict=True)))
    names = [[f"network.{name}" for name, _ in network.named_parameters()]]
    optimizer.param_groups[0] |= {"weight_decay": 0.0, "lr_multiplier": 1.0}
    optimizer.state[next(network.parameters())]["momentum_buffer"].fill_(rank + 1)

    def make(number: int) -> object:
        return part_of(network.state_dict(), None, optimizer.state_dict(), names, number)

    joined = join(mesh.collect(make, mesh.held(2)))
    if rank == 0:
        assert list(joined.network) == list(whole.state_dict())
        assert all(torch.equal(value, joined.network[name]) for name, value in whole.state_dict().items())
        assert joined.parameters == [f"network.{name}" for name, _ in whole.named_parameters()]
        states = sorted(joined.optimizer["state"].items())
        momenta = [float(state["momentum_buffer"].flatten()[0]) for _, state in states]
        assert momenta == [1, 0, 2, 0]
        assert [group["params"] for group in joined.optimizer["param_groups"]] == [[0, 1, 2, 3]]
    else:
        assert joined.parameters == []
    return flags


def test_all_networks_skip_a_step_together_and_their_states_are_one(tmp_path: Path) -> None:
    assert run_processes(2, skipped_and_joined, tmp_path / "r") == [[True, True], [True, True]]


def counted_once(rank: int, world_size: int) -> list:
    mesh = build_mesh(2, CPU)
    assert dist.get_process_group_ranks(mesh.data_dim) == [2 * mesh.group, 2 * mesh.group + 1]  # replica fastest
    assert mesh.first_rank_of(mesh.group) == 2 * mesh.group
    total = mesh.sum_once(torch.tensor([10 ** (mesh.replica)]))
    networks = mesh.sum_networks(torch.tensor([mesh.group + 1]))
    return [int(total), int(networks)]


def test_what_every_group_counts_is_counted_once(tmp_path: Path) -> None:
    assert run_processes(4, counted_once, tmp_path / "r") == [[11, 3]] * 4

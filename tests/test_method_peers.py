"""Copies of the other jobs' networks: how many a step learns from, from which epoch on, and with which weight."""

import pytest
import torch
from torch import Tensor, nn

from method import Peers
from tests.test_method_co_training import LABELS, B, K, learn, make, progress, views
from utils.targets import plain_targets

S, OWN = 6, 1
OTHERS = [0, 2, 3, 4, 5]


def peers(*, number: int = OWN, seed: int = 3, burn_in: int = 0, most: int | None = None) -> Peers:
    """A network that gives K numbers, among S; peer j gives j everywhere, and all are heard of."""
    made = Peers(nn.Linear(2, K), number=number, split_factor=S, seed=seed, burn_in=burn_in, most=most)
    for j in made.numbers:
        made.take(j, {"weight": torch.zeros(K, 2), "bias": torch.full((K,), float(j))})
    made.set_present(made.numbers)
    return made


def of_steps(of: Peers) -> list[list[int]]:
    return [of.chosen(0, step) for step in range(40)]


def test_so_many_peers_are_drawn_by_seed_and_step() -> None:
    drawn = of_steps(peers(most=2))
    assert all(len(set(row)) == 2 and row == sorted(row) for row in drawn)
    assert {j for row in drawn for j in row} == set(OTHERS)
    assert drawn == of_steps(peers(most=2))
    assert drawn != of_steps(peers(most=2, seed=4))
    assert of_steps(peers()) == [OTHERS] * 40
    few = peers(most=2)
    few.set_present([4])
    assert of_steps(few) == [[4]] * 40


def test_the_drawn_peers_stand_in_the_order_of_the_numbers() -> None:
    own = torch.full((1, B, K), float(OWN), requires_grad=True)
    of = peers(most=3)
    for step in range(5):
        joined: Tensor = of.join(own, torch.zeros(B, 2), epoch=0, step=step)
        assert joined[:, 0, 0].tolist() == sorted([OWN, *of.chosen(0, step)])
        assert of.metrics["peers"] == 3
        (gradient,) = torch.autograd.grad(joined.sum(), own)
        assert torch.equal(gradient, torch.ones_like(own))  # the others are constants


@pytest.mark.parametrize(("flags", "alone"), [({}, 4), ({"is_cot_weight_warm_up": False}, 0)])
def test_a_network_is_alone_as_long_as_the_weight_rises_and_then_it_rises(flags: dict[str, bool], alone: int) -> None:
    method = make(1, **flags)
    assert method.peers_warm_up(30) == alone  # 40 epochs of 300
    method.peers = Peers(method.network.models[0], number=0, split_factor=2, seed=0, burn_in=4)
    method.peers.set_present([1])
    method.peers.take(1, {name: -value for name, value in method.network.models[0].state_dict().items()})
    weights = []
    for epoch in range(10):
        output = learn(method, views(1), plain_targets(LABELS), progress(epoch, 30))
        weights.append(output.metrics["cot_weight"].item() if "loss_cot" in output.metrics else None)
        assert method.peers.metrics["peers"] == (epoch >= 4)
    rising = [0.005, 0.125, 0.25, 0.375, 0.5, 0.5] if alone else [0.5] * 6
    assert weights == [None] * 4 + rising

"""Copies of weights in autocast's type: what a step casts and writes; their numbers are in test_method_contract.py."""

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from model.casting import CastWatch
from model.splitnet import SplitNet
from training.copies import WeightCopies

VIEWS = torch.randn(2, 4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def make(execution: str = "loop") -> SplitNet:
    def one() -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)
        )

    torch.manual_seed(1)
    network = SplitNet([one(), one()])
    network.execution = execution
    return network


class Written(torch.overrides.TorchFunctionMode):
    """Counts what writes many tensors at once."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch._foreach_copy_:
            self.sizes.append(len(args[0]))
        return func(*args, **(kwargs or {}))


def trained(network: SplitNet, copies: WeightCopies) -> Tensor:
    with copies:
        with torch.autocast("cpu", torch.bfloat16):
            logits_SBK = network(VIEWS)
        logits_SBK.float().square().mean().backward()
    return logits_SBK.detach()


@pytest.mark.parametrize("execution", ["loop", "parallel"])
def test_from_the_third_pass_on_nothing_is_cast_and_two_operations_write(execution: str) -> None:
    network = make(execution)
    copies = WeightCopies(network, network, torch.bfloat16)
    weights = {name: weight.detach().clone() for name, weight in network.named_parameters()}
    gradients, sizes = [], []
    for number in range(4):
        network.zero_grad()
        # under a watch networks run as a loop, and in the second pass the copies have one of their own
        watch = CastWatch(network, torch.bfloat16)
        with Written() as written, watch if execution == "loop" and number != 1 else nullcontext():
            trained(network, copies)
        gradients.append({name: weight.grad for name, weight in network.named_parameters()})
        sizes.append((len(watch.found()), written.sizes))
    layers = 2 * (2 + 2)  # weight and bias of convolution and classifier, of two networks
    assert network.execution == execution
    first = (layers if execution == "loop" else 0, [])
    assert sizes == [first, (0, []), *[(0, [layers, layers])] * 2]
    for name, weight in network.named_parameters():
        assert torch.equal(weight, weights[name])
        assert isinstance(weight, nn.Parameter)
        assert weight.dtype == torch.float32
        for later in gradients[1:]:
            assert torch.equal(later[name], gradients[0][name])


def test_a_weight_that_anybody_changes_between_two_steps_counts_as_it_is() -> None:
    network = make()
    copies = WeightCopies(network, network, torch.bfloat16)
    for _ in range(3):
        before = trained(network, copies)
    with torch.no_grad():
        for weight in network.parameters():
            weight.mul_(2)
    after = trained(network, copies)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(after, network(VIEWS))
    assert not torch.equal(after, before)


def test_stacked_networks_have_none() -> None:
    network = make("stacked")
    copies = WeightCopies(network, network, torch.bfloat16)
    with Written() as written:
        for _ in range(4):
            trained(network, copies)
    assert written.sizes == []


def test_a_step_that_fails_leaves_the_weights_in_their_places() -> None:
    network = make()
    copies = WeightCopies(network, network, torch.bfloat16)
    for _ in range(2):
        trained(network, copies)
    weights = [*network.parameters()]
    with pytest.raises(ValueError, match="views"), copies:
        network(VIEWS[[0, 0, 0]])
    assert all(one is other for one, other in zip(network.parameters(), weights, strict=True))

"""Dilated convolutions with groups under CPU autocast, where oneDNN's weight gradient reads memory nobody wrote."""

import copy

import pytest
import torch
from torch import nn

from model.splitnet import SplitNet

SHAPES = [  # in, out, groups, dilation, padding mode
    (12, 12, 12, 2, "zeros"),
    (8, 8, 8, 3, "zeros"),
    (48, 12, 4, 2, "zeros"),
    (12, 12, 12, 2, "reflect"),
]


def dilated_network(channels, out_channels, groups, dilation, mode):
    torch.manual_seed(0)
    conv = nn.Conv2d(
        channels, out_channels, 3, padding=dilation, dilation=dilation, groups=groups, bias=False, padding_mode=mode
    )
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(out_channels, 10))
    return nn.Sequential(conv, nn.ReLU(), *head)


def gradients(network, images, *, autocast):
    """Weight gradients after memory was filled with NaN and given back."""
    network.zero_grad()
    junk = [torch.full((size,), float("nan")) for size in (100, 432, 3000, 50_000, 300_000, 1_000_000) * 8]
    del junk
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        logits = network(images)
    logits.float().square().sum().backward()
    return [parameter.grad.clone() for parameter in network.parameters()]


@pytest.mark.parametrize("execution", ["loop", "stacked"])
@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_in_bfloat16_are_right_and_the_same_every_time(shape, execution):
    if execution == "stacked" and shape[-1] != "zeros":
        pytest.skip("padding by reflection is not stacked")
    one = dilated_network(*shape)
    network = SplitNet([one, copy.deepcopy(one)]).to(memory_format=torch.channels_last)
    network.execution = execution
    images = torch.randn(2, 16, shape[0], 32, 32, generator=torch.Generator().manual_seed(1))
    images = images.flatten(0, 1).contiguous(memory_format=torch.channels_last).view(images.shape)
    exact = gradients(network, images, autocast=False)
    first = gradients(network, images, autocast=True)
    for one, other in zip(exact, first, strict=True):
        assert (one - other).norm() < 0.05 * one.norm()
    for _ in range(3):
        assert all(map(torch.equal, first, gradients(network, images, autocast=True)))


def test_nothing_else_changes():
    plain = dilated_network(*SHAPES[0])
    network = SplitNet([copy.deepcopy(plain)])
    images = torch.randn(2, 12, 16, 16)
    assert torch.equal(network(images)[0], plain(images))
    assert list(network.models[0].state_dict()) == list(plain.state_dict())
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):  # evaluation is not slowed down
        assert network.models[0][0](images).dtype == torch.bfloat16

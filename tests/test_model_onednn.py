"""Convolutions on CPUs where oneDNN's weight gradient reads memory that nobody wrote, or writes behind its own."""

import copy
import multiprocessing

import pytest
import torch
from torch import nn

from model.layers.onednn import conv2d
from model.splitnet import SplitNet

CONVOLUTIONS = {  # of [16, C, side, side]: its arguments, and the side
    "dilated_depthwise": ({"in_channels": 12, "out_channels": 12, "groups": 12, "dilation": 2, "padding": 2}, 32),
    "dilated_by_3": ({"in_channels": 8, "out_channels": 8, "groups": 8, "dilation": 3, "padding": 3}, 32),
    "dilated_groups": ({"in_channels": 48, "out_channels": 12, "groups": 4, "dilation": 2, "padding": 2}, 32),
    "dilated_reflect": (
        {"in_channels": 12, "out_channels": 12, "groups": 12, "dilation": 2, "padding": 2, "padding_mode": "reflect"},
        32,
    ),
    "strided": ({"in_channels": 64, "out_channels": 512, "stride": 2, "padding": 1}, 1),
    "strided_wide": ({"in_channels": 64, "out_channels": 64, "kernel_size": 7, "stride": 4, "padding": 3}, 3),
    "strided_groups": ({"in_channels": 64, "out_channels": 64, "groups": 4, "stride": 2, "padding": 1}, 1),
    "strided_depthwise": (
        {"in_channels": 48, "out_channels": 48, "groups": 48, "kernel_size": 5, "stride": 3, "padding": 2},
        2,
    ),
}


def network_of(kind):
    torch.manual_seed(0)
    conv = nn.Conv2d(**{"kernel_size": 3, "bias": False} | CONVOLUTIONS[kind][0])
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(conv.out_channels, 10))
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
@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_gradients_in_bfloat16_are_right_and_the_same_every_time(kind, execution):
    if execution == "stacked" and "reflect" in kind:
        pytest.skip("padding by reflection is not stacked")
    one, side = network_of(kind), CONVOLUTIONS[kind][1]
    network = SplitNet([one, copy.deepcopy(one)]).to(memory_format=torch.channels_last)
    network.execution = execution
    images = torch.randn(2, 16, one[0].in_channels, side, side, generator=torch.Generator().manual_seed(1))
    images = images.flatten(0, 1).contiguous(memory_format=torch.channels_last).view(images.shape)
    exact = gradients(network, images, autocast=False)
    first = gradients(network, images, autocast=True)
    for one, other in zip(exact, first, strict=True):
        assert (one - other).norm() < 0.05 * one.norm()
    for _ in range(3):
        assert all(map(torch.equal, first, gradients(network, images, autocast=True)))


@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_nothing_else_changes(kind):
    plain, side = network_of(kind), CONVOLUTIONS[kind][1]
    network = SplitNet([copy.deepcopy(plain)])
    images = torch.randn(2, plain[0].in_channels, side, side)
    assert torch.equal(network(images)[0], plain(images))
    assert list(network.models[0].state_dict()) == list(plain.state_dict())
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):  # evaluation is not slowed down
        assert network.models[0][0](images).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("width", "kernel", "stride", "padding", "dtype"),
    [
        (1, 3, 2, 1, torch.float32),
        (2, 7, 4, 3, torch.float32),
        (2, 3, 2, 1, torch.bfloat16),
        (1, 3, 1, 1, torch.bfloat16),
        (1, 1, 2, 0, torch.bfloat16),
        (3, 3, 4, 0, torch.bfloat16),
        (3, 3, 4, "valid", torch.bfloat16),
        (3, 3, 1, "same", torch.bfloat16),
    ],
)
def test_only_padded_maps_narrower_than_the_stride_are_convolved_in_float32(width, kernel, stride, padding, dtype):
    with torch.autocast("cpu", torch.bfloat16):
        out = conv2d(torch.randn(2, 4, 8, width), torch.randn(4, 4, kernel, kernel), None, (1, stride), padding)
    assert out.dtype == dtype


def thin_images(side):
    images = torch.randn(2, 9, side, side, generator=torch.Generator().manual_seed(1))
    return images.contiguous(memory_format=torch.channels_last)


def thin_network():
    torch.manual_seed(0)
    conv = nn.Conv2d(9, 24, 1, 2)
    return SplitNet([nn.Sequential(conv, nn.AdaptiveAvgPool2d(1), nn.Flatten())]).to(memory_format=torch.channels_last)


def compare_gradients():
    """Of many passes with those in float64; without the way round the process does not get to its end."""
    split = thin_network()
    exact = copy.deepcopy(split).double()
    for _ in range(12):
        for net, images in ((split, thin_images(112)), (exact, thin_images(112).double())):
            net.zero_grad()
            net(images[None]).square().sum().backward()
    for ours, theirs in zip(split.parameters(), exact.parameters(), strict=True):
        assert ours.grad is not None
        assert theirs.grad is not None
        assert 0 < (ours.grad - theirs.grad).abs().max() < 1e-5 * theirs.grad.abs().max()


def test_gradients_of_thin_strided_convolutions_are_right_and_the_process_lives():
    process = multiprocessing.get_context("forkserver").Process(target=compare_gradients)
    process.start()
    process.join()
    assert process.exitcode == 0


def test_thin_strided_convolutions_of_small_maps_are_torchs_own():
    conv = thin_network().models[0][0]
    for side in (64, 33, 112):
        found, expected = conv(thin_images(side)), nn.functional.conv2d(thin_images(side), conv.weight, conv.bias, 2)
        assert found.shape == expected.shape
        if side == 112:
            torch.testing.assert_close(found, expected)
        else:
            assert torch.equal(found, expected)
    others = (nn.Conv2d(16, 24, 1, 2), nn.Conv2d(9, 24, 1), nn.Conv2d(8, 24, 1, 2, groups=2), nn.Conv2d(9, 24, 1, 2, 1))
    assert not any("_conv_forward" in vars(other) for other in SplitNet([nn.Sequential(*others)]).modules())

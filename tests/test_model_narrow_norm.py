"""Batch norm of few channels by rows of pixels: equal to torch's, and used where it is faster only."""

import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from model.layers import narrow_norm
from model.layers.narrow_norm import batch_norm_by_rows, restore_narrow_norms, widen_narrow_norms
from model.splitnet import SplitNet


def channels_last(*shape, seed=0, dtype=torch.float64, mean=0.0):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + mean
    return x.to(dtype).contiguous(memory_format=torch.channels_last)


def tensors(channels, dtype=torch.float64):
    """Weight, bias, running mean, running variance."""
    values = [torch.linspace(low, high, channels, dtype=dtype) for low, high in ((0.5, 2), (-1, 1), (-2, 3), (0.1, 4))]
    return [value.requires_grad_(i < 2) for i, value in enumerate(values)]


def outcome(norm, x, channels, grad_out, dtype=torch.float64):
    """Output, gradients, running moments of norm(x, weight, bias, running_mean, running_var)."""
    x = x.clone(memory_format=torch.channels_last).requires_grad_()
    weight, bias, *running = tensors(channels, dtype)
    out = norm(x, weight, bias, *running)
    out.backward(grad_out)
    return [out.detach(), x.grad, weight.grad, bias.grad, *running]


@settings(deadline=None)
@given(
    channels=st.integers(1, 70),
    batch=st.integers(1, 5),
    size=st.sampled_from([(4, 4), (8, 2), (6, 10), (1, 8)]),
    pixels=st.sampled_from([1, 2, 4]),
    momentum=st.floats(0, 1),
    mean=st.floats(-5, 5),
)
def test_equals_torch_in_float64(channels, batch, size, pixels, momentum, mean):
    x, grad_out = channels_last(batch, channels, *size, mean=mean), channels_last(batch, channels, *size, seed=1)
    ours = outcome(lambda *a: batch_norm_by_rows(*a, momentum, 1e-3, pixels), x, channels, grad_out)
    theirs = outcome(lambda x, w, b, m, v: F.batch_norm(x, m, v, w, b, True, momentum, 1e-3), x, channels, grad_out)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-11)
        assert one.dim() < 4 or one.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(("dtype", "excess"), [(torch.float32, 2), (torch.bfloat16, 1.5)])
@pytest.mark.parametrize("mean", [0.0, 3.0])
def test_is_as_exact_as_torch(dtype, excess, mean):
    """Against float64 on the same rounded numbers, the largest error is about that of torch's own kernel."""
    x, grad_out = (
        channels_last(32, 12, 16, 16, dtype=dtype, mean=mean),
        channels_last(32, 12, 16, 16, seed=1, dtype=dtype),
    )
    exact = outcome(
        lambda x, w, b, m, v: F.batch_norm(x, m, v, w, b, True, 0.1, 1e-5), x.double(), 12, grad_out.double()
    )
    theirs = outcome(lambda x, w, b, m, v: F.batch_norm(x, m, v, w, b, True, 0.1, 1e-5), x, 12, grad_out, torch.float32)
    ours = outcome(lambda *a: batch_norm_by_rows(*a, 0.1, 1e-5, 32), x, 12, grad_out, torch.float32)
    for one, other, true in zip(ours, theirs, exact, strict=True):
        assert one.dtype == other.dtype
        floor = torch.finfo(one.dtype).eps * true.abs().max()
        assert (one - true).abs().max() <= excess * (other - true).abs().max() + floor


def test_gradients_are_right_twice_over():
    x = channels_last(2, 3, 4, 4).requires_grad_()
    weight, bias, *_ = tensors(3)

    def by_rows(x, weight, bias):
        return batch_norm_by_rows(
            x.contiguous(memory_format=torch.channels_last), weight, bias, None, None, 0.1, 1e-5, 4
        )

    assert torch.autograd.gradcheck(by_rows, (x, weight, bias))
    assert torch.autograd.gradgradcheck(by_rows, (x, weight, bias))
    assert torch.autograd.gradgradcheck(by_rows, (x.detach(), weight, bias.detach()))


def test_gradients_that_can_be_differentiated_are_the_plain_ones():
    grad_out = channels_last(2, 3, 4, 4, seed=1)
    x, (weight, bias, *_) = channels_last(2, 3, 4, 4).requires_grad_(), tensors(3)
    plain, differentiable = (
        torch.autograd.grad(
            batch_norm_by_rows(x, weight, bias, None, None, 0.1, 0.5, 4),
            (x, weight, bias),
            grad_out,
            create_graph=graph,
        )
        for graph in (False, True)
    )
    for one, other in zip(plain, differentiable, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-11)
        assert other.requires_grad


def test_output_may_be_changed_in_place():
    x = channels_last(2, 3, 4, 4).requires_grad_()
    weight, bias, *_ = tensors(3)
    out = F.relu(batch_norm_by_rows(x, weight, bias, None, None, 0.1, 1e-5, 4), inplace=True)
    assert out.min() == 0
    out.sum().backward()


def norm_of(channels=12, **options):
    """A batch norm made wide, and torch's."""
    plain = nn.BatchNorm2d(channels, **options)
    if plain.affine:
        nn.init.uniform_(plain.weight), nn.init.uniform_(plain.bias)
    norm = copy.deepcopy(plain)
    widen_narrow_norms(norm)
    return norm, plain


def count_rows(monkeypatch):
    calls = []
    real = narrow_norm.batch_norm_by_rows
    monkeypatch.setattr(narrow_norm, "batch_norm_by_rows", lambda *a: (calls.append(a[-1]), real(*a))[1])
    return calls


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_trains_alike_and_keeps_its_state(dtype, monkeypatch):
    calls = count_rows(monkeypatch)
    norm, plain = norm_of(momentum=0.3)
    assert type(norm) is nn.BatchNorm2d
    assert list(norm.state_dict()) == list(plain.state_dict())
    x = channels_last(32, 12, 32, 32, dtype=dtype)
    grad_out = channels_last(32, 12, 32, 32, seed=1, dtype=dtype)
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 1e-2}
    for module in (norm, plain):
        module(x).backward(grad_out)
    assert calls == [32]
    torch.testing.assert_close(norm(x), plain(x), **tolerance)
    for one, other in zip(norm.state_dict().values(), plain.state_dict().values(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert int(norm.num_batches_tracked) == 2
    for one, other in zip(norm.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=5e-2)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda norm: pickle.loads(pickle.dumps(norm))])
def test_a_copy_works_on_its_own_tensors(copied, monkeypatch):
    norm, _ = norm_of()
    other, calls = copied(norm), count_rows(monkeypatch)
    other(channels_last(32, 12, 32, 32, dtype=torch.float32))
    assert int(norm.num_batches_tracked) == 0
    assert int(other.num_batches_tracked) == 1
    assert not norm.running_mean.any()
    assert other.running_mean.any()
    assert calls == [32]


@pytest.mark.parametrize(
    ("options", "shape", "dtype", "layout"),
    [
        ({}, (8, 12, 32, 32), torch.float32, "last"),  # few pixels
        ({}, (32, 12, 32, 32), torch.float64, "last"),
        ({}, (32, 12, 32, 32), torch.float32, "first"),
        ({"affine": False}, (32, 12, 32, 32), torch.float32, "last"),
        ({"track_running_stats": False}, (32, 12, 32, 32), torch.float32, "last"),
        ({"momentum": None}, (32, 12, 32, 32), torch.float32, "last"),
        ({}, (33, 12, 33, 33), torch.float32, "last"),  # an odd number of pixels makes no rows
        ({}, (32, 12, 32, 32), torch.float32, "evaluation"),
    ],
)
def test_any_other_pass_is_torchs_own(options, shape, dtype, layout, monkeypatch):
    calls = count_rows(monkeypatch)
    norm, plain = norm_of(**options)
    x = channels_last(*shape, dtype=dtype)
    x = x.contiguous() if layout == "first" else x
    for module in (norm, plain):
        module.to(dtype if dtype == torch.float64 else torch.float32).train(layout != "evaluation")
    assert torch.equal(norm(x), plain(x))
    assert not calls
    for one, other in zip(norm.state_dict().values(), plain.state_dict().values(), strict=True):
        assert torch.equal(one, other)


def test_a_norm_to_be_compiled_is_torchs_own_again():
    norm, plain = norm_of()
    assert "forward" in vars(norm)
    restore_narrow_norms(nn.Sequential(norm))
    assert vars(norm).keys() == vars(plain).keys()


@pytest.mark.parametrize("channels", [16, 32, 48, 64, 100])
def test_norms_that_fill_registers_are_left_alone(channels):
    assert "forward" not in vars(norm_of(channels)[0])


def test_networks_of_a_splitnet_use_it(monkeypatch):
    calls = count_rows(monkeypatch)
    network = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.Flatten())
    split = SplitNet([network, copy.deepcopy(network)]).to(memory_format=torch.channels_last)
    images = channels_last(64, 3, 32, 32, dtype=torch.float32).view(2, 32, 3, 32, 32)
    with torch.autocast("cpu", torch.bfloat16):
        logits = split(images)
    assert len(calls) == 2
    assert logits.dtype == torch.bfloat16
    logits.float().square().mean().backward()
    assert all(parameter.grad is not None for parameter in split.parameters())

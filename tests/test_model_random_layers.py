"""Shake-Shake, ShakeDrop and DropBlock: their distributions, their two passes, and where their draws come from."""

import copy

import pytest
import torch
from torch import Tensor, nn

from model.backbone.senet import DropBlock, dropblock_gamma
from model.layers.shake import ShakeDrop, ShakeShake, scale_twice
from tests.waits import nothing_waits

DTYPES = (torch.float64, torch.float32, torch.bfloat16)


def features(batch: int, *shape: int, dtype: torch.dtype = torch.float64, requires_grad: bool = True) -> Tensor:
    values = torch.randn(batch, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return values.to(dtype).requires_grad_(requires_grad)


def test_scale_twice_scales_each_pass_by_its_own_factor():
    x_BC = features(3, 4)
    forward_B1, backward_B1 = torch.tensor([[2.0], [-1.0], [0.0]]), torch.tensor([[0.25], [0.5], [3.0]])
    y_BC = scale_twice(x_BC, forward_B1, backward_B1)
    assert torch.equal(y_BC, x_BC * forward_B1)
    upstream_BC = torch.arange(12.0, dtype=torch.float64).reshape(3, 4)
    (gradient_BC,) = torch.autograd.grad(y_BC, x_BC, upstream_BC)
    assert torch.equal(gradient_BC, upstream_BC * backward_B1)


def test_scale_twice_can_be_differentiated_twice_and_mapped():
    x_BC = features(3, 4)
    forward_B1, backward_B1 = torch.tensor([[2.0], [-1.0], [0.0]]), torch.tensor([[0.25], [0.5], [3.0]])
    (first_BC,) = torch.autograd.grad(scale_twice(x_BC**2, forward_B1, backward_B1).sum(), x_BC, create_graph=True)
    (second_BC,) = torch.autograd.grad(first_BC.sum(), x_BC)
    torch.testing.assert_close(first_BC, 2 * x_BC * backward_B1)
    torch.testing.assert_close(second_BC, (2.0 * backward_B1.double()).expand(3, 4))
    mapped_BC = torch.vmap(torch.func.grad(lambda x, f, b: scale_twice(x, f, b).sum()))(x_BC, forward_B1, backward_B1)
    assert torch.equal(mapped_BC, backward_B1.double().expand(3, 4))


def test_shake_drop_draws():
    layer, x_BCHW = ShakeDrop(0.3), features(2000, 1, 1, 1)
    torch.manual_seed(0)
    draws = [layer.draw(x_BCHW) for _ in range(400)]
    closed = [pair for pair in draws if not (pair[0] == 1).all()]
    # standard error of the rate: sqrt(0.3 * 0.7 / 400) = 0.023
    assert abs(len(closed) / len(draws) - 0.3) < 0.08
    for forward_B111, backward_B111 in draws:
        is_open = bool((forward_B111 == 1).all())
        assert (backward_B111 == 1).all() == is_open
    forward, backward = (torch.stack(scales).flatten() for scales in zip(*closed, strict=True))
    assert_uniform(forward, -1, 1)
    assert_uniform(backward, 0, 1)
    assert abs(torch.corrcoef(torch.stack((forward, backward)))[0, 1]) < 0.01


def test_shake_shake_draws():
    torch.manual_seed(0)
    forward, backward = (share.flatten() for share in ShakeShake().draw(features(200_000, 1, 1, 1)))
    assert_uniform(forward, 0, 1)
    assert_uniform(backward, 0, 1)
    assert abs(torch.corrcoef(torch.stack((forward, backward)))[0, 1]) < 0.01


def assert_uniform(sample: Tensor, low: float, high: float) -> None:
    assert low <= sample.min() < low + 0.01 * (high - low)
    assert high - 0.01 * (high - low) < sample.max() <= high
    assert abs(sample.mean() - (low + high) / 2) < 0.01 * (high - low)
    assert abs(sample.var() - (high - low) ** 2 / 12) < 0.01 * (high - low) ** 2


@pytest.mark.parametrize("drop_prob", [0.0, 1.0])
def test_shake_drop_passes(drop_prob):
    layer, x_BCHW = ShakeDrop(drop_prob), features(4, 3, 5, 5)
    torch.manual_seed(1)
    y_BCHW = layer(x_BCHW)
    torch.manual_seed(1)
    forward_B111, backward_B111 = layer.draw(x_BCHW)
    assert (forward_B111 == 1).all() == (drop_prob == 0)
    assert len(forward_B111.unique()) == (1 if drop_prob == 0 else 4)
    assert torch.equal(y_BCHW, x_BCHW * forward_B111)
    (gradient_BCHW,) = torch.autograd.grad(y_BCHW.sum(), x_BCHW)
    assert torch.equal(gradient_BCHW, backward_B111.double().expand_as(x_BCHW))


def test_shake_shake_passes():
    layer, x1_BCHW, x2_BCHW = ShakeShake(), features(4, 3, 5, 5), features(4, 3, 5, 5).detach().neg().requires_grad_()
    torch.manual_seed(1)
    y_BCHW = layer(x1_BCHW, x2_BCHW)
    torch.manual_seed(1)
    forward_B111, backward_B111 = layer.draw(x1_BCHW)
    assert len(forward_B111.unique()) == len(backward_B111.unique()) == 4
    torch.testing.assert_close(y_BCHW, forward_B111 * x1_BCHW + (1 - forward_B111) * x2_BCHW)
    gradient1, gradient2 = torch.autograd.grad(y_BCHW.sum(), (x1_BCHW, x2_BCHW))
    torch.testing.assert_close(gradient1, backward_B111.double().expand_as(x1_BCHW))
    torch.testing.assert_close(gradient1 + gradient2, torch.ones_like(x1_BCHW))


def test_shake_evaluation_is_fixed_and_differentiable():
    x_BCHW = features(2, 3, 4, 4)
    y_BCHW = ShakeDrop(0.3).eval()(x_BCHW)
    torch.testing.assert_close(y_BCHW, 0.7 * x_BCHW)
    (gradient_BCHW,) = torch.autograd.grad(y_BCHW.sum(), x_BCHW)
    torch.testing.assert_close(gradient_BCHW, torch.full_like(x_BCHW, 0.7))
    other_BCHW = torch.ones_like(x_BCHW)
    torch.testing.assert_close(ShakeShake().eval()(x_BCHW, other_BCHW), (x_BCHW + 1) / 2)


@pytest.mark.parametrize(
    ("block_size", "height", "width", "expected"),
    [
        (1, 14, 14, 0.1),
        (3, 14, 14, 0.1 * 196 / 9 / 144),
        (3, 7, 9, 0.1 * 63 / 9 / 35),
        (4, 10, 10, 0.1 * 100 / 16 / 49),
    ],
)
def test_dropblock_gamma(block_size, height, width, expected):
    assert dropblock_gamma(0.1, block_size, height, width) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("block_size", [1, 2, 3, 4, 5])
def test_dropblock_mask_is_the_union_of_blocks_around_seeds(block_size):
    layer, x_BCHW = DropBlock(0.2, block_size), features(3, 4, 9, 8)
    torch.manual_seed(2)
    kept = layer.keep(x_BCHW)
    torch.manual_seed(2)
    seeds = torch.rand(3, 4, 9, 8) < dropblock_gamma(0.2, block_size, 9, 8)
    expected = torch.ones(3, 4, 9, 8)
    for image, channel, row, column in seeds.nonzero().tolist():
        # an even block cannot be centred: it lies towards the end
        top, left = row - (block_size - 1) // 2, column - (block_size - 1) // 2
        expected[image, channel, max(top, 0) : top + block_size, max(left, 0) : left + block_size] = 0
    assert 0 < seeds.sum() < seeds.numel()
    assert torch.equal(kept, expected)


def test_dropblock_drops_its_share_and_rescales_over_the_batch():
    layer, x_BCHW = DropBlock(0.1, 3), torch.ones(16, 32, 14, 14)
    torch.manual_seed(3)
    y_BCHW = layer(x_BCHW)
    torch.manual_seed(3)
    kept = layer.keep(x_BCHW)
    # a cell is kept if none of the seeds in its reach, 9 inside the map, falls
    reach = nn.functional.avg_pool2d(torch.ones(1, 1, 14, 14), 3, 1, 1, divisor_override=1)
    assert kept.mean() == pytest.approx(float(((1 - dropblock_gamma(0.1, 3, 14, 14)) ** reach).mean()), abs=0.01)
    torch.testing.assert_close(y_BCHW, kept * (kept.numel() / kept.sum()))
    assert y_BCHW.mean() == pytest.approx(1, rel=1e-5)
    assert layer.eval()(x_BCHW) is x_BCHW


@pytest.mark.parametrize(("height", "width"), [(4, 4), (2, 7), (1, 1)])
def test_a_block_larger_than_the_map_shrinks_to_it(height, width):
    x_BCHW, masks = features(64, 3, height, width), []
    for block_size in (5, min(height, width)):
        torch.manual_seed(0)
        masks.append(DropBlock(0.2, block_size).keep(x_BCHW))
    assert torch.equal(*masks)
    assert 0 < masks[0].sum() < masks[0].numel()


def test_dropblock_survives_the_loss_of_everything():
    x_BCHW = features(2, 3, 2, 2)
    torch.testing.assert_close(DropBlock(1.0, 1)(x_BCHW), torch.zeros_like(x_BCHW))


LAYERS = {
    "shake_drop": ShakeDrop(0.6),
    "shake_shake": ShakeShake(),
    "dropblock_3": DropBlock(0.3, 3),
    "dropblock_4": DropBlock(0.3, 4),
}
each_layer = pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS.keys())


def inputs(layer: nn.Module, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """As many maps [8, 4, 6, 6] as the layer takes."""
    maps = [features(8, 4, 6, 6, dtype=dtype)]
    if isinstance(layer, ShakeShake):
        maps.append(maps[0].detach().flip(0).requires_grad_())
    return maps


@each_layer
def test_draws_follow_the_device_generator_and_not_the_dtype(layer):
    outputs = []
    for dtype in DTYPES:
        torch.manual_seed(4)
        outputs.append(layer(*inputs(layer, dtype)))
        assert outputs[-1].dtype == dtype
    torch.testing.assert_close(outputs[1].double(), outputs[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(outputs[2].double(), outputs[0], rtol=2e-2, atol=4e-2)
    others = [layer(*inputs(layer)) for _ in range(8)]
    assert any(not torch.equal(other, outputs[0]) for other in others)


@each_layer
def test_training_never_reads_a_value_on_the_host(layer):
    # a tensor without storage has no value to read
    maps = [x_BCHW.detach().to("meta") for x_BCHW in inputs(layer)]
    assert layer(*maps).shape == (8, 4, 6, 6)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@each_layer
def test_training_on_a_gpu_never_waits_for_it(layer):
    maps = [x_BCHW.detach().cuda().requires_grad_() for x_BCHW in inputs(layer)]
    torch.autograd.grad(layer(*maps).sum(), maps)
    with nothing_waits():
        torch.autograd.grad(layer(*maps).sum(), maps)


@each_layer
def test_compiled_layer_equals_eager(layer):
    maps = inputs(layer)
    results = []
    for one in (layer, torch.compile(copy.deepcopy(layer), backend="aot_eager", fullgraph=True)):
        torch.manual_seed(5)
        y_BCHW = one(*maps)
        results.append((y_BCHW, *torch.autograd.grad(y_BCHW.square().sum(), maps)))
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-12, atol=1e-12)

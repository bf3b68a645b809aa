"""What the golden rows do not show of SE-ResNet, SENet, ResNeXSt, ResNeSt, Shake-Shake, PyramidNet, DenseNet and
EfficientNet: rates, initial weights, padding, options, memory, and that the compiled network is the same."""

import copy
import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model import LARGE, SMALL, BackboneRequest, backbones, build_network, check_request
from model.backbone.densenet import DenseNet, DenseNetOptions
from model.backbone.efficientnet import (
    BlockSpec,
    LightNetEfficientNet,
    LukemelasEfficientNet,
    SamePadConv2d,
    Swish,
    efficientnet_structure,
)
from model.backbone.pyramidnet import PyramidNet
from model.backbone.senet import DropBlock
from model.backbone.shake_resnet import ShakeResNet, ShiftedShortcut
from model.division import (
    densenet_growth,
    densenet_shake_drop_rates,
    efficientnet_channels,
    pyramid_planes,
    pyramid_shake_drop_rates,
)
from model.layers.shake import ShakeDrop
from model.layers.split_attention import SplitAttentionConv
from model.layers.squeeze_excitation import SqueezeExcitation
from model.staged import StagedBackbone
from tests.processes import run_processes
from utils.errors import UserError
from utils.macs import count_params

ONE_TO_64 = tuple(range(1, 65))


def build(arch: str, split_factor: int = 1, shape: str = LARGE, **changes) -> StagedBackbone:
    """The network of a request, without storage: structure only."""
    with torch.device("meta"):
        return build_real(arch, split_factor, shape, **changes)


def build_real(arch: str, split_factor: int = 1, shape: str = LARGE, **changes) -> StagedBackbone:
    values = {"num_classes": 10, "crop_size": 224 if shape == LARGE else 32, **changes}
    dataset = "imagenet" if shape == LARGE else "cifar10"
    return build_network(BackboneRequest(arch=arch, split_factor=split_factor, shape=shape, dataset=dataset, **values))


def found(network: nn.Module, kind: type) -> list:
    return [module for module in network.modules() if isinstance(module, kind)]


def images(batch: int = 4, size: int = 32) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(batch, 3, size, size, generator=generator, dtype=torch.float64)


# ---- which S -------------------------------------------------------------------------------------------------------

LEGAL = {
    "se_resnet50": {LARGE: (1, 2, 4, 8)},
    "se_resnet50_B": {LARGE: (1, 2, 4, 8)},
    "se_resnet101": {LARGE: (1, 2, 4, 8)},
    "se_resnet152": {LARGE: (1, 2, 4, 8)},
    "se_resnet110": {SMALL: (1, 2, 4)},
    "se_resnet164": {SMALL: (1, 2, 4)},
    "se_resnext101_64x4d": {LARGE: ONE_TO_64},
    "se_resnext101_64x4d_B": {LARGE: ONE_TO_64},
    "senet154": {LARGE: ONE_TO_64},
    "senet113": {LARGE: ONE_TO_64},
    "resnexst50_4x16d": {LARGE: (1, 2, 3, 4)},
    "resnexst50_8x16d": {LARGE: tuple(range(1, 9))},
    "resnexst50_4x32d": {LARGE: (1, 2, 3, 4)},
    "resnexst101_8x32d": {LARGE: tuple(range(1, 9))},
    "resnest101": {LARGE: (1,)},
    "resnest200": {LARGE: (1,)},
    "resnest269": {LARGE: (1,)},
    "shake_resnet26_2x96d": {SMALL: (1, 2, 4, 8, 16)},
    "pyramidnet164": {SMALL: ONE_TO_64},
    "pyramidnet272": {SMALL: ONE_TO_64},
    "densenet190": {SMALL: ONE_TO_64},
    **{f"efficientnetb{i}": {LARGE: (1, 2, 4), SMALL: (1, 2, 4)} for i in range(8)},
    "efficientnetb8": {LARGE: (1, 2, 4)},
    "efficientnetl2": {LARGE: (1, 2, 4)},
}


@pytest.mark.parametrize("arch", LEGAL)
def test_legal_split_factors(arch):
    assert dict(backbones.get(arch).split_factors) == LEGAL[arch]
    shape, legal = next(iter(LEGAL[arch].items()))
    with pytest.raises(UserError, match=f"--split_factor {legal[-1] + 1}.*not possible.*--arch {arch}"):
        check_request(BackboneRequest(arch=arch, split_factor=legal[-1] + 1, shape=shape))


@pytest.mark.parametrize("arch", ["se_resnext101_64x4d", "senet113", "resnexst50_8x16d"])
@pytest.mark.parametrize("split_factor", [3, 5, 7])
def test_split_factors_that_do_not_divide_the_groups(arch, split_factor):
    network = build(arch, split_factor)
    groups = (8 if arch.startswith("resnexst") else 64) // split_factor
    last = network.layer4[-1].conv2
    conv = last.conv if isinstance(last, SplitAttentionConv) else last
    assert conv.groups == groups * (2 if arch.startswith("resnexst") else 1)
    assert network(torch.empty(2, 3, 64, 64, device="meta")).shape == (2, 10)


@pytest.mark.parametrize(
    "arch", ["senet113", "resnexst50_4x16d", "shake_resnet26_2x96d", "pyramidnet164", "densenet190"]
)
def test_a_last_stage_of_the_halved_depth_fits_the_tail(arch):
    shape = next(iter(LEGAL[arch]))
    network = build(arch, 4, shape)
    *early, last = network.stages
    features = network.stem(torch.empty(2, 3, 64, 64, device="meta"))
    for stage in early:
        features = stage(features)
    assert network.classify(network.tail(last[: network.halved_depth()](features))).shape == (2, 10)


# counts of other implementations of the same structures, for members that the golden rows do not show
@pytest.mark.parametrize(
    ("arch", "params"), [("senet154", 115_088_984), ("efficientnetb3", 12_233_232), ("efficientnetb7", 66_347_960)]
)
def test_undivided_sizes_are_those_of_other_libraries(arch, params):
    assert count_params(build(arch, num_classes=1000)) == params


def test_pyramidnet_classifies_svhn_too():
    request = BackboneRequest(arch="pyramidnet164", split_factor=16, dataset="svhn")
    with torch.device("meta"):
        assert build_network(request)(torch.empty(2, 3, 32, 32)).shape == (2, 10)


# ---- SE-ResNet, SE-ResNeXt, SENet, ResNeXSt --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arch", "shape", "split_factor", "first_widths"),
    [
        ("se_resnet50", LARGE, 1, (64, 64, 256, 16)),
        ("se_resnet50_B", LARGE, 2, (44, 44, 176, 11)),
        ("se_resnet152", LARGE, 8, (24, 24, 96, 6)),
        ("se_resnet164", SMALL, 2, (12, 12, 48, 12)),
        ("se_resnext101_64x4d", LARGE, 3, (84, 84, 256, 16)),
        ("senet154", LARGE, 1, (128, 256, 256, 16)),
        ("senet154", LARGE, 4, (32, 64, 256, 16)),
        ("senet113", LARGE, 64, (2, 4, 256, 16)),
    ],
)
def test_widths_of_the_first_se_bottleneck(arch, shape, split_factor, first_widths):
    block = build(arch, split_factor, shape).layer1[0]
    convs = (block.conv1, block.conv2, block.conv3, block.se_module.fc1)
    assert tuple(conv.out_channels for conv in convs) == first_widths
    assert block.se_module.fc2.out_channels == first_widths[2]
    assert block.se_module.fc1.bias is not None


def test_squeeze_excitation_by_its_definition():
    torch.manual_seed(0)
    layer = SqueezeExcitation(6, 3).double()
    x_BCHW = torch.randn(2, 6, 4, 5, dtype=torch.float64)
    hidden = F.linear(x_BCHW.mean((2, 3)), layer.fc1.weight[:, :, 0, 0], layer.fc1.bias).relu()
    weights = F.linear(hidden, layer.fc2.weight[:, :, 0, 0], layer.fc2.bias).sigmoid()
    torch.testing.assert_close(layer(x_BCHW), x_BCHW * weights[:, :, None, None])


def test_stems_differ_in_their_last_width_and_pool():
    for arch, width in {
        "se_resnet50": 64,
        "se_resnext101_64x4d": 64,
        "se_resnext101_64x4d_B": 128,
        "senet113": 128,
    }.items():
        stem = build(arch).layer0
        assert stem.conv3.out_channels == width
        assert (stem.pool.padding, stem.pool.ceil_mode) == (0, True)
    assert build("resnexst50_4x16d").layer0.pool.ceil_mode
    assert (build("resnest101").maxpool.padding, build("resnest101").maxpool.ceil_mode) == (1, False)


def test_senet154_projects_by_a_3x3_convolution_from_stage_2_on():
    network = build("senet154")
    assert [type(part) for part in network.layer1[0].downsample] == [nn.Conv2d, nn.BatchNorm2d]
    assert network.layer1[0].downsample[0].kernel_size == (1, 1)
    for stage in network.stages[1:]:
        conv, _ = stage[0].downsample
        assert (conv.kernel_size, conv.stride, conv.padding) == ((3, 3), (2, 2), (1, 1))
    assert isinstance(build("senet113").layer2[0].downsample[0], nn.AvgPool2d)


@pytest.mark.parametrize(("crop_size", "block_size"), [(224, 3), (320, 4), (32, 1), (416, 5)])
def test_dropblock_of_se_resnet50_b(crop_size, block_size):
    network = build("se_resnet50_B", 4, crop_size=crop_size)
    assert [len(found(stage, DropBlock)) for stage in network.stages] == [0, 0, 18, 9]
    for layer in found(network, DropBlock):
        assert layer.block_size == block_size
        assert layer.drop_prob == pytest.approx(0.05)
    assert not found(build("se_resnext101_64x4d_B"), DropBlock)
    assert not found(build("se_resnet50"), DropBlock)


def test_dropblock_follows_each_batch_norm():
    block = build("se_resnet50_B", 8).layer3[1]
    calls = []
    for name in ("bn1", "bn2", "bn3", "drop1", "drop2", "drop3", "se_module"):
        block.get_submodule(name).register_forward_hook(lambda *_, name=name: calls.append(name))
    block(torch.empty(2, 4 * 96, 4, 4, device="meta"))
    assert calls == ["bn1", "drop1", "bn2", "drop2", "bn3", "drop3", "se_module"]


@pytest.mark.parametrize(
    ("arch", "shape", "split_factor", "rate"),
    [
        ("se_resnet50", LARGE, 2, 0.2 / math.sqrt(2)),
        ("se_resnext101_64x4d", LARGE, 16, 0.05),
        ("senet154", LARGE, 1, 0.2),
        ("se_resnet110", SMALL, 2, 0.0),
        ("resnexst50_4x32d", LARGE, 2, 0.0),
        ("resnexst101_8x32d", LARGE, 4, 0.05),
        ("resnest101", LARGE, 1, 0.0),
        ("efficientnetb4", LARGE, 4, 0.2),
        ("efficientnetb4", SMALL, 4, 0.2),
        ("densenet190", SMALL, 1, 0.0),
    ],
)
def test_classifier_dropout(arch, shape, split_factor, rate):
    layers = [module for module in build(arch, split_factor, shape).modules() if type(module) is nn.Dropout]
    assert sum(layer.p for layer in layers) == pytest.approx(rate)


def test_every_resnexst_block_after_stage_1_pools_and_only_stage_heads_of_resnest():
    def pools(network: nn.Module) -> list[list]:
        return [[getattr(block.pool, "stride", None) for block in stage] for stage in network.stages]

    assert pools(build("resnexst50_4x32d")) == [[None] * 3, [2, 1, 1, 1], [2, 1, 1, 1, 1, 1], [2, 1, 1]]
    resnest = pools(build("resnest101"))
    assert [stage[:2] for stage in resnest] == [[None, None], [2, None], [2, None], [2, None]]


@pytest.mark.parametrize("groups", [1, 2])
def test_split_attention_by_its_definition(groups):
    torch.manual_seed(0)
    width = 8
    layer = SplitAttentionConv(width, groups).double().eval()
    x_BCHW = torch.randn(3, width, 5, 6, dtype=torch.float64)
    slabs = F.relu(layer.bn0(layer.conv(x_BCHW))).chunk(2, dim=1)
    pooled = (slabs[0] + slabs[1]).mean((2, 3), keepdim=True)
    assert layer.fc1.out_channels == 32
    scores = layer.fc2(F.relu(layer.bn1(layer.fc1(pooled)))).flatten(1)
    per_group = width // groups
    expected = torch.zeros_like(x_BCHW)
    for channel in range(width):
        group, inner = divmod(channel, per_group)
        ours = [scores[:, group * 2 * per_group + slab * per_group + inner] for slab in range(2)]
        weights = torch.stack(ours).softmax(dim=0)
        expected[:, channel] = sum(weights[slab][:, None, None] * slabs[slab][:, channel] for slab in range(2))
    torch.testing.assert_close(layer(x_BCHW), expected, rtol=1e-10, atol=1e-12)


# ---- Shake-Shake, PyramidNet -----------------------------------------------------------------------------------------


def test_shake_resnet_keeps_and_freezes_the_shortcuts_it_never_runs():
    network = build("shake_resnet26_2x96d", 16, SMALL)
    names = network.unused_parameter_names()
    blocks = {name.split(".shortcut.")[0] for name in names}
    assert blocks == {f"stage_{stage}.{block}" for stage in (1, 2, 3) for block in (1, 2, 3)}
    assert len(names) == 9 * 4
    assert {name for name, parameter in network.named_parameters() if not parameter.requires_grad} == names


def test_shifted_shortcut_by_its_definition():
    torch.manual_seed(0)
    layer = ShiftedShortcut(3, 4, 2).double().eval()
    x_BCHW = torch.randn(2, 3, 6, 7, dtype=torch.float64)
    rows, columns = range(0, 6, 2), range(0, 7, 2)
    expected = torch.zeros(2, 4, 3, 4, dtype=torch.float64)
    for i, row in enumerate(rows):
        for j, column in enumerate(columns):
            here = x_BCHW[:, :, row, column].relu()
            inside = row + 1 < 6 and column + 1 < 7
            moved = x_BCHW[:, :, row + 1, column + 1].relu() if inside else torch.zeros_like(here)
            expected[:, :2, i, j] = here @ layer.conv1.weight[:, :, 0, 0].T
            expected[:, 2:, i, j] = moved @ layer.conv2.weight[:, :, 0, 0].T
    torch.testing.assert_close(layer(x_BCHW), layer.bn(expected))


@pytest.mark.parametrize(("split_factor", "last"), [(1, 864), (2, 628), (4, 464), (8, 348), (16, 264)])
def test_pyramidnet272_widths(split_factor, last):
    planes = pyramid_planes(90, 200, split_factor)
    assert 4 * planes[-1] == last
    if split_factor == 2:
        assert planes[:3] == [18, 19, 21]
        assert (planes[30], planes[60], planes[89]) == (65, 112, 157)


def test_pyramid_planes_round_half_to_even():
    # steps of 5 at S = 1 and of 2.5 at S = 4: 18.5 -> 18, 21, 23.5 -> 24
    assert pyramid_planes(54, 270, 1)[:3] == [21, 26, 31]
    assert pyramid_planes(54, 270, 4)[:4] == [18, 21, 24, 26]


def test_pyramidnet_shake_drop_rates_grow_to_half_over_sqrt_s():
    network = build("pyramidnet164", 4, SMALL)
    rates = [layer.drop_prob for layer in found(network, ShakeDrop)]
    assert rates == pytest.approx([0.25 * k / 54 for k in range(1, 55)])
    assert pyramid_shake_drop_rates(90, 1)[-1] == 0.5


def test_pyramid_shortcut_pools_and_appends_zeros():
    torch.manual_seed(0)
    block = PyramidNet([18, 20, 24], [0.1, 0.2, 0.3], 5).double().eval().layer2[0]
    x_BCHW = torch.randn(2, 72, 7, 7, dtype=torch.float64)
    nn.init.zeros_(block.bn4.weight)
    y_BCHW = block(x_BCHW)
    assert y_BCHW.shape == (2, 80, 4, 4)
    assert (y_BCHW[:, 72:] == 0).all()
    torch.testing.assert_close(y_BCHW[:, :72, :3, :3], F.avg_pool2d(x_BCHW, 2))
    torch.testing.assert_close(y_BCHW[:, :72, 3, 3], x_BCHW[:, :, 6, 6])


def test_pyramidnet_back_propagates_in_evaluation():
    network = PyramidNet([18, 20, 24], [0.1, 0.2, 0.3], 5).double().eval()
    x_BCHW = images().requires_grad_()
    network(x_BCHW).sum().backward()
    assert x_BCHW.grad.abs().sum() > 0


# ---- DenseNet --------------------------------------------------------------------------------------------------------


def small_densenet(*, official: bool = True, recompute: bool = False, drop_prob: float = 0.0) -> DenseNet:
    torch.manual_seed(0)
    rates = [[drop_prob] * 3] * 3
    return DenseNet(4, rates, 5, official=official, recompute=recompute).double()


def test_densenet_growth():
    assert [densenet_growth(s) for s in (1, 2, 3, 4, 5, 8, 16, 64)] == [40, 28, 23, 20, 17, 14, 10, 5]


def test_densenet_shake_drop_rates():
    layers = found(build("densenet190", 4, SMALL, options={"densenet_p_shakedrop": 0.5}), ShakeDrop)
    assert len(layers) == 93
    for m in range(3):
        for i in range(1, 32):
            assert layers[31 * m + i - 1].drop_prob == pytest.approx(0.25 * m / 3 + 0.25 * i / 93)
    assert densenet_shake_drop_rates(0.5, 3, 31, 1)[2][30] == pytest.approx(0.5)
    assert not found(build("densenet190", 4, SMALL), ShakeDrop)


@pytest.mark.parametrize("official", [True, False])
@pytest.mark.parametrize("drop_prob", [0.0, 0.5])
@pytest.mark.parametrize("training", [True, False])
def test_densenet_recomputes_without_changing_anything(official, drop_prob, training):
    results, saved_bytes = [], []
    for recompute in (False, True):
        network = small_densenet(official=official, recompute=recompute, drop_prob=drop_prob).train(training)
        sizes: dict[int, int] = {}

        def note(tensor: Tensor, sizes: dict[int, int] = sizes) -> Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        torch.manual_seed(1)
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            logits_BK = network(images())
        logits_BK.square().sum().backward()
        results.append([logits_BK, *(p.grad for p in network.parameters()), *network.buffers()])
        saved_bytes.append(sum(sizes.values()))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*results, strict=True))
    assert saved_bytes[1] < 0.8 * saved_bytes[0]


def test_densenet_options():
    assert DenseNetOptions() == DenseNetOptions(
        is_efficient_densenet=False, is_official_densenet=True, densenet_p_shakedrop=0.0
    )
    network = build("densenet190", 16, SMALL, options={"is_efficient_densenet": True, "is_official_densenet": False})
    assert network.block1.layer[0].recompute
    assert network.classifier_name == "fc"
    with pytest.raises(UserError, match=r"--densenet_p_shakedrop.*between 0 and 1"):
        DenseNetOptions(densenet_p_shakedrop=1.5)
    with pytest.raises(UserError, match="--is_official_densenet 1"):
        DenseNetOptions(densenet_p_shakedrop=0.5, is_official_densenet=False)


# ---- EfficientNet ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("split_factor", "expected"),
    [
        (1, (32, 16, 24, 48, 88, 120, 208, 352, 1408)),
        (2, (28, 12, 16, 28, 60, 88, 148, 248, 1012)),
        (4, (16, 12, 16, 24, 44, 60, 104, 176, 704)),
    ],
)
def test_worked_example_of_b2(split_factor, expected):
    assert efficientnet_channels(1.1, split_factor) == expected
    structure = efficientnet_structure(1.1, 1.2, split_factor, LARGE)
    assert [len(stage) for stage in structure.stages] == [2, 3, 3, 4, 4, 5, 2]
    assert (structure.stem, structure.head) == (expected[0], expected[-1])
    assert [stage[-1].out_channels for stage in structure.stages] == list(expected[1:-1])


def test_squeezed_width_is_a_quarter_of_the_block_input():
    assert BlockSpec(24, 40, 6, 5, 2).squeezed == 6
    assert BlockSpec(3, 3, 6, 5, 1).squeezed == 1


def test_small_images_pass_with_two_strides_of_two():
    network = build("efficientnetb0", 2, SMALL)
    taps, _ = network.forward_features(torch.empty(2, 3, 32, 32, device="meta"))
    assert [tap.shape[-1] for tap in taps] == [32, 16, 16, 8, 8, 8, 8]


def test_channel_dropout_of_lightnet_grows_with_the_stage():
    network = build("efficientnetb2", 4)
    for j, stage in enumerate(network.stages, start=1):
        for block in stage:
            assert block.dropout.p == pytest.approx(0.15 * j / 7)
    block = network.mod3.block2
    assert block.is_residual
    assert not network.mod3.block1.is_residual


def test_channel_dropout_drops_whole_channels_before_the_addition():
    torch.manual_seed(0)
    structure = efficientnet_structure(1.0, 1.0, 4, SMALL)
    block = LightNetEfficientNet(structure, 5, 0.5, nn.SiLU()).mod8.block1
    assert not block.is_residual
    block = LightNetEfficientNet(structure, 5, 0.5, nn.SiLU()).mod7.block2
    x_BCHW = torch.randn(4, 96, 5, 5)
    added = block(x_BCHW) - x_BCHW
    dropped = (added.abs() < 1e-12).flatten(2).all(dim=2)
    assert 0.2 < dropped.float().mean() < 0.7
    assert ((added.abs() < 1e-12).flatten(2).any(dim=2) == dropped).all()


@pytest.mark.parametrize("shape", [LARGE, SMALL])
def test_both_swishes_give_the_same_network(shape):
    outputs = []
    for swish in (nn.SiLU(), Swish()):
        torch.manual_seed(0)
        network = LightNetEfficientNet(efficientnet_structure(1.0, 0.3, 4, shape), 5, 0.0, swish).double()
        logits_BK = network(images())
        logits_BK.square().sum().backward()
        outputs.append([logits_BK, *(p.grad for p in network.parameters())])
    for memory_efficient, plain in zip(*outputs, strict=True):
        torch.testing.assert_close(memory_efficient, plain, rtol=1e-7, atol=1e-10)


def test_swish_option():
    assert found(build("efficientnetb0"), nn.SiLU)
    assert not found(build("efficientnetb0"), Swish)
    network = build("efficientnetb0", options={"is_memory_efficient_swish": False})
    assert found(network, Swish)
    assert not found(network, nn.SiLU)


@pytest.mark.parametrize("nominal", [7, 8, 36, 150])
@pytest.mark.parametrize("size", [7, 10])
@pytest.mark.parametrize(("kernel", "stride"), [(3, 1), (3, 2), (5, 1), (5, 2)])
def test_same_padding_of_the_nominal_size(nominal, size, kernel, stride):
    torch.manual_seed(0)
    conv = SamePadConv2d(2, 4, kernel, stride, nominal).double()
    x_BCHW = torch.randn(1, 2, size, size, dtype=torch.float64)
    total = max((math.ceil(nominal / stride) - 1) * stride + kernel - nominal, 0)
    before, after = total // 2, total - total // 2
    assert (after - before == 1) == (stride == 2 and nominal % 2 == 0)
    expected = F.conv2d(F.pad(x_BCHW, (before, after, before, after)), conv.weight, stride=stride)
    torch.testing.assert_close(conv(x_BCHW), expected)


@pytest.mark.parametrize(
    ("options", "uneven"),
    [
        # 224, 112, 56, 28, 14, 7: every stride-2 convolution sees an even size
        ({}, [True, True, True, True, True]),
        # 75, 38, 19, 10, 5: stem and stage 3, and the last, see odd ones
        ({"is_efficientnet_user_crop": True}, [False, True, False, True, False]),
    ],
)
def test_padding_is_fixed_by_the_own_size_or_the_users_crop(options, uneven):
    network = build("efficientnetb0", 2, crop_size=75, options={"is_lukemelas_efficientnet": True, **options})
    strided = [conv for conv in found(network, SamePadConv2d) if conv.stride == (2, 2)]
    assert [conv.uneven_padding is not None for conv in strided] == uneven
    assert all(conv.uneven_padding is None for conv in found(network, SamePadConv2d) if conv.stride == (1, 1))


def test_lukemelas_exists_for_large_images_only():
    with pytest.raises(UserError, match="--is_lukemelas_efficientnet 0"):
        build("efficientnetb0", 2, SMALL, options={"is_lukemelas_efficientnet": True})


def test_efficientnets_name_their_crop_size():
    sizes = [backbones.get(f"efficientnet{name}").crop_size for name in ("b0", "b1", "b2", "b3", "b4", "b5", "b6")]
    assert sizes == [224, 240, 260, 300, 380, 456, 528]
    assert [backbones.get(f"efficientnet{name}").crop_size for name in ("b7", "b8", "l2")] == [600, 672, 800]


# ---- initial weights -------------------------------------------------------------------------------------------------


def assert_std(weight: Tensor, std: float) -> None:
    # standard error of a standard deviation: std / sqrt(2 n)
    assert weight.std().item() == pytest.approx(std, rel=5 / math.sqrt(2 * weight.numel()))
    assert abs(weight.mean().item()) < 5 * std / math.sqrt(weight.numel())


def fan_out_std(conv: nn.Conv2d) -> float:
    return math.sqrt(2 / (conv.kernel_size[0] ** 2 * conv.out_channels))


def named_convs(network: nn.Module) -> Iterator[nn.Conv2d]:
    yield from (conv for conv in found(network, nn.Conv2d) if conv.weight.numel() > 500)


@pytest.mark.parametrize(
    ("arch", "shape", "split_factor"),
    [
        ("se_resnet110", SMALL, 4),
        ("resnexst50_4x16d", LARGE, 4),
        ("shake_resnet26_2x96d", SMALL, 16),
        ("pyramidnet164", SMALL, 64),
        ("efficientnetb0", SMALL, 4),
    ],
)
def test_convolutions_start_kaiming_normal_by_fan_out(arch, shape, split_factor):
    torch.manual_seed(0)
    network = build_real(arch, split_factor, shape, num_classes=100)
    for conv in named_convs(network):
        assert_std(conv.weight, fan_out_std(conv))
    norms = found(network, nn.BatchNorm2d)
    assert all((norm.weight == 1).all() and (norm.bias == 0).all() for norm in norms)
    classifier = network.get_submodule(network.classifier_name)
    bound = {"pyramidnet164": classifier.in_features**-0.5, "efficientnetb0": 0.1}.get(arch)
    if bound is None:
        assert_std(classifier.weight, 1e-3)
    else:
        assert 0.98 * bound < classifier.weight.abs().max() <= bound
        assert_std(classifier.weight, bound / math.sqrt(3))
    assert (classifier.bias == 0).all() == (arch != "pyramidnet164")
    biases = [conv.bias for conv in found(network, nn.Conv2d) if conv.bias is not None]
    # Shake-Shake's stem, the only one of its convolutions with a bias, keeps the library's
    assert all((bias == 0).all() == (arch != "shake_resnet26_2x96d") for bias in biases)


@pytest.mark.parametrize("official", [True, False])
def test_densenet_starts_by_fan_in_or_fan_out(official):
    network = small_densenet(official=official)
    for conv in named_convs(network):
        fan_in_std = math.sqrt(2 / (conv.kernel_size[0] ** 2 * conv.in_channels))
        assert_std(conv.weight, fan_in_std if official else fan_out_std(conv))
    classifier = network.get_submodule(network.classifier_name)
    assert (classifier.bias == 0).all()
    assert classifier.weight.abs().max() <= classifier.in_features**-0.5


def test_lukemelas_starts_as_the_library_does():
    torch.manual_seed(0)
    network = LukemelasEfficientNet(efficientnet_structure(1.0, 0.3, 4, LARGE), 100, 0.2, nn.SiLU(), 224)
    for conv in named_convs(network):
        fan_in = conv.weight[0].numel()
        assert_std(conv.weight, 1 / math.sqrt(3 * fan_in))
    assert (network._fc.bias != 0).all()


def test_batch_norms_of_efficientnet():
    for options in ({}, {"is_lukemelas_efficientnet": True}):
        norms = found(build("efficientnetb0", options=options), nn.BatchNorm2d)
        assert {(norm.eps, norm.momentum) for norm in norms} == {(1e-3, 0.01)}


# ---- training, compiled, under autocast, in processes ----------------------------------------------------------------


def one_block(arch: str, split_factor: int) -> nn.Module:
    """The first block of stage 3: stride, projection, every part that the family has."""
    return build_real(arch, split_factor, num_classes=5).stages[2][0]


def lightnet() -> nn.Module:
    structure = efficientnet_structure(1.0, 0.5, 4, SMALL)
    return LightNetEfficientNet(structure._replace(stages=structure.stages[:3]), 5, 0.2, nn.SiLU())


def lukemelas() -> nn.Module:
    structure = efficientnet_structure(1.0, 0.5, 4, LARGE)
    return LukemelasEfficientNet(structure._replace(stages=structure.stages[:3]), 5, 0.2, Swish(), 33)


# One module for each family, as small as its parts allow: how it is made, and the channels of its input.
PIECES = {
    "senet": (lambda: one_block("senet154", 64), 512),
    "se_resnet_B": (lambda: one_block("se_resnet50_B", 8), 192),
    "resnexst": (lambda: one_block("resnexst50_8x16d", 4), 512),
    "resnest": (lambda: one_block("resnest101", 1), 512),
    "shake_resnet": (lambda: ShakeResNet(2, 8, 5), 3),
    "pyramidnet": (lambda: PyramidNet([18, 20, 24], [0.5, 0.7, 0.9], 5), 3),
    "densenet": (lambda: DenseNet(4, [[0.5]] * 3, 5, official=True, recompute=False), 3),
    "densenet_recomputed": (lambda: DenseNet(4, [[0.0]] * 3, 5, official=False, recompute=True), 3),
    "lightnet": (lightnet, 3),
    "lukemelas": (lukemelas, 3),
}
COMPILED = ("se_resnet_B", "densenet")  # also outside the long suite
each_piece = pytest.mark.parametrize("name", PIECES)


def piece(name: str) -> tuple[nn.Module, Tensor]:
    """A module in float64, and an input for it."""
    make, channels = PIECES[name]
    torch.manual_seed(0)
    module = make().double()
    return module, torch.randn(4, channels, 16, 16, dtype=torch.float64)


def step(module: nn.Module, x_BCHW: Tensor) -> Tensor:
    """Output of a forward pass with the random draws of one seed, after a backward pass."""
    torch.manual_seed(1)
    output = module(x_BCHW)
    output.float().square().mean().backward()
    return output


@pytest.mark.parametrize(
    "name", [name if name in COMPILED else pytest.param(name, marks=pytest.mark.long) for name in PIECES]
)
def test_compiled_equals_eager(name):
    eager, x_BCHW = piece(name)
    other = copy.deepcopy(eager)
    torch._dynamo.reset()
    compiled = torch.compile(other, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(step(compiled, x_BCHW), step(eager, x_BCHW), rtol=1e-9, atol=1e-12)
    for ours, theirs in zip(other.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-6, atol=1e-9)
    for ours, theirs in zip(other.buffers(), eager.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


@each_piece
def test_training_step_under_autocast(name):
    module, x_BCHW = piece(name)
    with torch.autocast("cpu", torch.bfloat16):
        output = step(module.float(), x_BCHW.float())
    assert output.isfinite().all()
    for key, parameter in module.named_parameters():
        assert not parameter.requires_grad or parameter.grad.isfinite().all(), key


@pytest.mark.parametrize("name", ["shake_resnet", "pyramidnet", "densenet_recomputed"])
def test_two_steps_under_distributed_data_parallel(name, tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        network, x_BCHW = piece(name)
        wrapped = nn.parallel.DistributedDataParallel(copy.deepcopy(network))
        for _ in range(2):
            torch.testing.assert_close(step(wrapped, x_BCHW), step(network, x_BCHW))
    finally:
        torch.distributed.destroy_process_group()
    for ours, theirs in zip(wrapped.module.parameters(), network.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


def gradients_in_process(rank: int, world_size: int, names: list[str]) -> dict[str, list[Tensor]]:
    """Two steps of each piece on this process's images with its own draws; the gradients."""
    found = {}
    for name in names:
        network, x_BCHW = piece(name)
        wrapped = nn.parallel.DistributedDataParallel(network)
        for number in range(2):
            torch.manual_seed(10 * number + rank)
            wrapped(x_BCHW[rank::world_size]).square().mean().backward()
        found[name] = [parameter.grad for parameter in network.parameters() if parameter.grad is not None]
    return found


@pytest.mark.slow
def test_random_layers_in_two_processes(tmp_path):
    names = ["shake_resnet", "pyramidnet", "densenet"]
    first, second = run_processes(2, gradients_in_process, tmp_path / "results", names)
    for name in names:
        network, _ = piece(name)
        trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
        assert len(first[name]) == len(trained)
        for ours, theirs in zip(first[name], second[name], strict=True):
            assert torch.equal(ours, theirs)
            assert ours.isfinite().all()

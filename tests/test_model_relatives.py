"""Backbones of the related methods: sizes from their tables, structure, initialisation, library weights."""

import pytest
import torch
from torch import nn

from model import LARGE, SMALL, BackboneRequest, build_network
from model.backbone.hcgnet import AttentionPool, GatedUnit, HybridUnit
from model.backbone.shufflenetv2 import channel_shuffle
from model.backbone.wrn import PreActivationBlock, WideResNet, WrnOptions
from utils.errors import UserError
from utils.macs import count_macs, count_params

# arch: parameters, MACs in millions, embedding size, maps behind the stages
SIZES = {
    "resnet32_cifar": (472_756, 69.130, 64, ("16x32x32", "32x16x16", "64x8x8")),
    "resnet56_cifar": (861_620, 125.754, 64, ("16x32x32", "32x16x16", "64x8x8")),
    "resnet110_cifar": (1_170_868, 167.454, 256, ("64x32x32", "128x16x16", "256x8x8")),
    "wrn_16_2_cifar": (703_284, 101.118, 128, ("32x32x32", "64x16x16", "128x8x8")),
    "wrn_40_2_cifar": (2_255_156, 327.611, 128, ("32x32x32", "64x16x16", "128x8x8")),
    "wrn_28_4_cifar": (5_872_180, 845.620, 256, ("64x32x32", "128x16x16", "256x8x8")),
    "wrn_16_4": (2_772_020, None, 256, ("64x32x32", "128x16x16", "256x8x8")),
    "wrn_28_10": (36_536_884, None, 640, ("160x32x32", "320x16x16", "640x8x8")),
    "ShuffleNetV2_05x_cifar": (444_292, 10.994, 1024, ("48x16x16", "96x8x8", "192x4x4")),
    "ShuffleNetV2_1x_cifar": (1_356_104, 45.094, 1024, ("116x16x16", "232x8x8", "464x4x4")),
    "hcgnet_A1_cifar": (1_102_651, 154.269, 414, ("60x16x16", "126x8x8", "414x8x8")),
    "hcgnet_A2_cifar": (3_133_679, 488.668, 716, ("120x16x16", "204x8x8", "716x8x8")),
    "resnet18_imagenet": (11_689_512, 1814.073, 512, ("64x56x56", "128x28x28", "256x14x14", "512x7x7")),
    "resnet34_imagenet": (21_797_672, 3663.761, 512, ("64x56x56", "128x28x28", "256x14x14", "512x7x7")),
    "resnet50_imagenet": (25_557_032, 4089.184, 2048, ("256x56x56", "512x28x28", "1024x14x14", "2048x7x7")),
    "ShuffleNetV2_1x_imagenet": (2_278_604, 144.908, 1024, ("116x28x28", "232x14x14", "464x7x7")),
}


def request_of(arch: str, **changes) -> BackboneRequest:
    """100 classes at 32 pixels, or 1000 at 224."""
    large = arch.endswith("imagenet")
    values = {
        "arch": arch,
        "num_classes": 1000 if large else 100,
        "shape": LARGE if large else SMALL,
        "dataset": "imagenet" if large else "cifar100",
        "crop_size": 224 if large else 32,
    }
    return BackboneRequest(**(values | changes))


def convolutions(module: nn.Module) -> list[nn.Conv2d]:
    return [part for part in module.modules() if isinstance(part, nn.Conv2d)]


@pytest.mark.parametrize("arch", SIZES)
def test_sizes_are_those_of_the_tables(arch):
    params, macs, embedding, maps = SIZES[arch]
    request = request_of(arch)
    with torch.device("meta"):
        network = build_network(request)
        taps, embedding_BD = network.forward_features(torch.empty(2, 3, request.crop_size, request.crop_size))
    assert count_params(network) == params
    if macs is not None:
        assert round(count_macs(network, (3, request.crop_size, request.crop_size)) / 1e6, 3) == macs
    assert embedding_BD.shape == (2, embedding)
    assert tuple("x".join(map(str, tap.shape[1:])) for tap in taps) == maps


@pytest.mark.parametrize(
    ("arch", "library"),
    [
        ("resnet18_imagenet", "resnet18"),
        ("resnet34_imagenet", "resnet34"),
        ("resnet50_imagenet", "resnet50"),
        ("resnet101_imagenet", "resnet101"),
        ("resnet152_imagenet", "resnet152"),
        ("ShuffleNetV2_1x_imagenet", "shufflenet_v2_x1_0"),
    ],
)
def test_torchvision_names(arch, library):
    torchvision = pytest.importorskip("torchvision")
    with torch.device("meta"):
        theirs = getattr(torchvision.models, library)().state_dict()
        ours = build_network(request_of(arch)).state_dict()
    assert [(k, v.shape) for k, v in ours.items()] == [(k, v.shape) for k, v in theirs.items()]


@pytest.mark.parametrize(
    ("arch", "library"), [("resnet18_imagenet", "resnet18"), ("ShuffleNetV2_1x_imagenet", "shufflenet_v2_x1_0")]
)
def test_torchvision_weights_give_torchvision_logits(arch, library):
    torchvision = pytest.importorskip("torchvision")
    torch.manual_seed(0)
    theirs = getattr(torchvision.models, library)()
    ours = build_network(request_of(arch))
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        theirs(images)  # running statistics of its own
        ours.load_state_dict(theirs.state_dict())
        torch.testing.assert_close(ours.eval()(images), theirs.eval()(images))


@pytest.mark.parametrize("arch", ["resnet32_cifar", "resnet110_cifar", "wrn_16_2_cifar", "resnet18_imagenet"])
def test_convolutions_are_drawn_by_fan_out(arch):
    torch.manual_seed(0)
    network = build_network(request_of(arch))
    for conv in convolutions(network):
        expected = (2 / (conv.kernel_size[0] ** 2 * conv.out_channels)) ** 0.5
        assert conv.weight.std().item() == pytest.approx(expected, rel=6 / conv.weight.numel() ** 0.5)
    norms = [part for part in network.modules() if isinstance(part, nn.BatchNorm2d)]
    assert all((norm.weight == 1).all() and (norm.bias == 0).all() for norm in norms)


def test_the_two_initialisations_of_the_wide_network():
    torch.manual_seed(0)
    by_fan_in, by_fan_out = (build_network(request_of(arch)) for arch in ("wrn_16_2", "wrn_16_2_cifar"))
    assert list(by_fan_in.state_dict()) == list(by_fan_out.state_dict())
    widening = by_fan_in.layer2[0].conv1  # 32 -> 64 channels
    assert widening.weight.std().item() == pytest.approx((2 / (9 * 32)) ** 0.5, rel=0.05)
    assert by_fan_out.layer2[0].conv1.weight.std().item() == pytest.approx((2 / (9 * 64)) ** 0.5, rel=0.05)
    assert by_fan_in.fc.weight.std().item() == pytest.approx((2 / 128) ** 0.5, rel=0.05)
    assert by_fan_out.fc.weight.abs().max().item() <= 128**-0.5
    assert (by_fan_in.fc.bias == 0).all()
    assert (by_fan_out.fc.bias == 0).all()


def test_pre_activation_block_by_hand():
    torch.manual_seed(0)
    x = torch.randn(2, 8, 6, 6)
    for block in (PreActivationBlock(8, 8), PreActivationBlock(8, 12, 2)):
        block.eval()
        activated = block.bn1(x).relu()
        branch = block.conv2(block.bn2(block.conv1(activated)).relu())
        shortcut = x if block.shortcut is None else block.shortcut(activated)
        torch.testing.assert_close(block(x), branch + shortcut)
    assert PreActivationBlock(8, 8).shortcut is None


def test_wide_dropout_is_an_option():
    plain = build_network(request_of("wrn_16_1"))
    dropped = build_network(request_of("wrn_16_1", options={"wrn_dropout": 0.3, "is_official_densenet": True}))
    assert not any(isinstance(part, nn.Dropout) for part in plain.modules())
    rates = [part.p for part in dropped.modules() if isinstance(part, nn.Dropout)]
    assert rates == [0.3] * 6
    with pytest.raises(UserError, match="--wrn_dropout"):
        WrnOptions(wrn_dropout=1.0)
    with pytest.raises(ValueError, match="6n"):
        WideResNet(15, 1, 10)


@pytest.mark.parametrize("growth", [12, 24])
@pytest.mark.parametrize("channels", [24, 132])
def test_hybrid_unit_has_the_parameters_of_its_formula(channels, growth):
    C, g = channels, growth
    expected = 2 * C + 4 * C * g + 8 * g + 9 * g**2 + 22 * g + 3 * (g + 1) + (2 * g**2 + g) + 2 * g
    expected += 2 * (g**2 + g) + g + (g * g // 2 + g // 2) + (g * g // 2 + g)
    assert count_params(HybridUnit(C, g)) == expected


def test_attention_pool_by_hand():
    torch.manual_seed(0)
    pool, x = AttentionPool(5), torch.randn(2, 5, 3, 4)
    scores = pool.score(x).reshape(2, 12).softmax(dim=1)
    expected = torch.einsum("bcp,bp->bc", x.reshape(2, 5, 12), scores)
    torch.testing.assert_close(pool(x), expected[:, :, None, None])


def test_gated_unit_by_hand():
    torch.manual_seed(0)
    unit, x = GatedUnit(8, 2, 2).eval(), torch.randn(3, 8, 5, 7)
    near, far = unit.pool_near(unit.near(x)), unit.pool_far(unit.far(x))
    hidden = unit.update(torch.cat([near, far], dim=1))
    scores = torch.stack([unit.score_near(hidden), unit.score_far(hidden)]).softmax(dim=0)
    expected = x * unit.forget(unit.pool_input(x)) + scores[0] * near + scores[1] * far
    torch.testing.assert_close(unit(x), expected)
    assert unit.far[2].dilation == (2, 2)


def test_channel_shuffle_interleaves():
    x = torch.arange(6.0).reshape(1, 6, 1, 1)
    assert channel_shuffle(x).flatten().tolist() == [0, 3, 1, 4, 2, 5]


def test_basic_shuffle_unit_leaves_the_first_half_alone():
    torch.manual_seed(0)
    unit = build_network(request_of("ShuffleNetV2_05x_cifar")).stages[0][1].eval()
    x = torch.randn(1, 48, 4, 4)
    torch.testing.assert_close(unit(x)[:, ::2], x[:, :24])


@pytest.mark.parametrize("arch", ["hcgnet_A1_cifar", "ShuffleNetV2_05x_cifar", "wrn_16_1", "resnet32_cifar"])
def test_maps_need_not_be_square_or_even(arch):
    network = build_network(request_of(arch)).eval()
    with torch.inference_mode():
        assert network(torch.randn(1, 3, 19, 30)).shape == (1, 100)


@pytest.mark.parametrize(
    ("arch", "message"),
    [("resnet32_cifar", "large images only|small images only"), ("resnet18_imagenet", "large images only")],
)
def test_each_has_one_shape_and_is_not_divided(arch, message):
    right = request_of(arch)
    wrong = request_of(arch, shape=SMALL if right.shape == LARGE else LARGE)
    with pytest.raises(UserError, match=message):
        build_network(wrong)
    with pytest.raises(UserError, match="--split_factor 2"):
        build_network(request_of(arch, split_factor=2))

"""How ResNet, wide ResNet and ResNeXt divide, and how S of them are built."""

import math

import pytest
import torch
from torch import nn

from model import LARGE, SMALL, BackboneRequest, backbones, build_network, build_splitnet
from model.backbone.resnet import ResNet
from model.division import (
    RESNET_WIDTHS,
    bottleneck_width,
    divided_groups,
    group_splits,
    resnet_dropout,
    wide_resnet_factor,
    wide_resnet_large_widths,
)
from model.division import __main__ as command_line
from model.division.coverage import coverage, named_widths
from model.layers.resnet_parts import BasicBlock, Bottleneck, projection_shortcut
from utils.errors import UserError
from utils.macs import count_params


def make_request(arch, split_factor=1, shape=SMALL, **fields):
    return BackboneRequest(
        arch=arch,
        split_factor=split_factor,
        shape=shape,
        **{"dataset": "cifar10" if shape == SMALL else "imagenet", "crop_size": 32 if shape == SMALL else 64} | fields,
    )


def structure(arch, split_factor=1, shape=SMALL, **fields):
    """The network without storage."""
    with torch.device("meta"):
        return build_network(make_request(arch, split_factor, shape, **fields))


@pytest.mark.parametrize(
    ("widen_factor", "expected"), [(8, (8, 6, 4, 3, 2)), (10, (10, 7, 5, 3, 2)), (12, (12, 8, 6, 4, 3)), (1, (1,) * 5)]
)
def test_widening_factors(widen_factor, expected):
    assert tuple(wide_resnet_factor(widen_factor, split_factor) for split_factor in (1, 2, 4, 8, 16)) == expected


def test_resnet_widths_stay_near_the_square_root():
    for shape, base in ((LARGE, 64), (SMALL, 16)):
        for split_factor, width in RESNET_WIDTHS[shape].items():
            assert abs(width - base / math.sqrt(split_factor)) <= 1.4


@pytest.mark.parametrize(
    ("arch", "base_width", "split_factor", "expected"),
    [
        ("wide_resnet50_2", 128, 1, (64, 128)),
        ("wide_resnet50_2", 128, 2, (64, 64)),
        ("wide_resnet50_2", 128, 4, (32, 128)),
        ("wide_resnet50_3", 192, 1, (64, 192)),
        ("wide_resnet50_3", 192, 2, (64, 128)),
        ("wide_resnet50_3", 192, 4, (32, 192)),
        ("wide_resnet101_2", 128, 2, (44, 128)),
        ("wide_resnet101_2", 128, 4, (32, 128)),
    ],
)
def test_large_wide_resnet_widths(arch, base_width, split_factor, expected):
    assert wide_resnet_large_widths(arch, base_width, split_factor) == expected


def test_groups_need_not_divide():
    assert [divided_groups(8, split_factor) for split_factor in group_splits(8)] == [8, 4, 2, 2, 1, 1, 1, 1]
    assert bottleneck_width(44, 128, 1) == 88
    assert bottleneck_width(64, 4, 64) == 256
    assert bottleneck_width(44, 4, 32) == 64  # 2.75 channels a group, truncated before they are multiplied
    assert resnet_dropout(0.1, 4) == 0.025


@pytest.mark.parametrize(
    ("arch", "shape", "legal"),
    [
        ("resnet20", SMALL, (1, 2, 4, 8, 16)),
        ("resnet110", SMALL, (1, 2, 4, 8, 16)),
        ("resnet50", LARGE, (1, 2, 4, 8)),
        ("resnet50", SMALL, (1, 2, 4, 8, 16)),
        ("wide_resnet28_10", SMALL, (1, 2, 4, 8, 16)),
        ("wide_resnet50_3", LARGE, (1, 2, 4)),
        ("resnext29_8x64d", SMALL, tuple(range(1, 9))),
        ("resnext101_64x4d", LARGE, tuple(range(1, 65))),
    ],
)
def test_legal_split_factors(arch, shape, legal):
    assert backbones.get(arch).split_factors[shape] == legal
    for split_factor in (0, -1, 3 if 3 not in legal else legal[-1] + 1, 2 * legal[-1]):
        with pytest.raises(UserError, match=rf"--split_factor {split_factor} .*--arch {arch} .*use {legal[0]}"):
            build_splitnet(make_request(arch, split_factor, shape), seed=0)


@pytest.mark.parametrize(
    ("arch", "shape"), [("resnet20", LARGE), ("resnext29_8x64d", LARGE), ("wide_resnet16_8", LARGE)]
)
def test_small_networks_are_not_for_large_images(arch, shape):
    with pytest.raises(UserError, match=f"--arch {arch}.*small images only"):
        build_network(make_request(arch, 1, shape))


def test_large_wide_resnet_is_not_for_small_images():
    with pytest.raises(UserError, match=r"--arch wide_resnet50_2.*large images only"):
        build_network(make_request("wide_resnet50_2"))


@pytest.mark.parametrize("split_factor", [1, 2, 4, 8, 16])
def test_plain_resnet_on_small_images(split_factor):
    width = RESNET_WIDTHS[SMALL][split_factor]
    basic = structure("resnet32", split_factor)
    assert [len(stage) for stage in basic.stages] == [5, 5, 5]
    assert all(isinstance(block, BasicBlock) for stage in basic.stages for block in stage)
    assert basic.fc.in_features == 4 * width
    assert isinstance(basic.layer1[0].downsample, nn.Identity)

    # on svhn the published constructor gives the ImageNet networks a CIFAR stem and three stages
    deep = structure("resnet152", split_factor, dataset="svhn")
    assert [len(stage) for stage in deep.stages] == [3, 8, 36]
    assert all(isinstance(block, Bottleneck) for stage in deep.stages for block in stage)
    assert deep.layer0[0].weight.shape == (width, 3, 3, 3)
    assert deep.layer1[0].conv1.out_channels == width
    assert deep.fc.in_features == 16 * width


def test_resnet20_has_the_parameters_of_its_formula():
    """3x3 convolutions of 7 x 16, 6 x 32 and 6 x 64 channels, two projections, BN, the linear layer."""
    convs = 9 * (3 * 16 + 6 * 16**2 + 16 * 32 + 5 * 32**2 + 32 * 64 + 5 * 64**2) + 16 * 32 + 32 * 64
    norms = 2 * (7 * 16 + 7 * 32 + 7 * 64)
    assert count_params(structure("resnet20")) == convs + norms + 64 * 10 + 10


def test_wide_resnet16_4_divides_its_widening_factor_by_the_rule():
    widths = [structure("wide_resnet16_4", split).layer1[0].conv1.out_channels for split in (1, 2, 4, 8, 16)]
    assert widths == [16 * factor for factor in (4, 3, 2, 1, 1)]


def test_wide_resnet_keeps_its_stem_and_resnext_all_but_its_groups():
    wide = structure("wide_resnet28_10", 4)
    assert wide.layer0[0].out_channels == 16
    assert wide.layer1[0].conv1.out_channels == 80
    assert wide.fc.in_features == 4 * 80

    for shape, channels in ((SMALL, 64), (LARGE, 128)):
        grouped = structure("resnext50_32x4d", 3, shape)
        assert len(grouped.stages) == (3 if shape == SMALL else 4)
        assert grouped.layer1[0].conv1.in_channels == channels
        assert grouped.layer1[0].conv2.groups == 10
        assert grouped.layer1[0].conv2.out_channels == 40
        assert grouped.layer1[0].conv3.out_channels == 256


@pytest.mark.parametrize(("output_stride", "sizes"), [(None, [32, 16, 8]), (8, [32, 16, 8]), (2, [32, 32, 16])])
@pytest.mark.parametrize("arch", ["resnet20", "wide_resnet16_8", "resnext29_8x64d", "resnet50"])
def test_output_stride(arch, output_stride, sizes):
    options = {} if output_stride is None else {"output_stride": output_stride}
    network = structure(arch, 4, options=options)
    taps, _ = network.forward_features(torch.empty(1, 3, 32, 32, device="meta"))
    assert [tap.shape[-1] for tap in taps] == sizes


def test_output_stride_is_for_small_images():
    network = structure("resnet50", 8, LARGE, options={"output_stride": 2})
    taps, _ = network.forward_features(torch.empty(1, 3, 64, 64, device="meta"))
    assert [tap.shape[-1] for tap in taps] == [16, 8, 4, 2]


@pytest.mark.parametrize(
    ("arch", "shape", "dataset", "rate"),
    [
        ("resnet101", LARGE, "imagenet", 0.1),
        ("resnet101", LARGE, "folder", 0.1),
        ("resnet101", SMALL, "svhn", None),
        ("resnet50", LARGE, "imagenet", None),
        ("wide_resnet40_10", SMALL, "cifar10", 0.1),
        ("wide_resnet40_10", SMALL, "cifar100", 0.1),
        ("wide_resnet40_10", SMALL, "digits", 0.1),
        ("wide_resnet40_10", SMALL, "folder", 0.1),
        ("wide_resnet40_10", SMALL, "svhn", None),
        ("wide_resnet52_8", SMALL, "cifar10", None),
        ("wide_resnet28_10", SMALL, "cifar10", None),
    ],
)
def test_classifier_dropout_is_divided_by_S(arch, shape, dataset, rate):
    for split_factor in (1, 2, 4):
        network = structure(arch, split_factor, shape, dataset=dataset)
        rates = [module.p for module in network.modules() if isinstance(module, nn.Dropout)]
        assert rates == ([] if rate is None else [rate / split_factor])


def test_dropout_sits_before_the_classifier():
    network = build_network(make_request("wide_resnet40_10", 16))
    network.dropout.p = 1.0
    embedding = torch.rand(2, network.fc.in_features)
    assert torch.equal(network.classify(embedding), network.fc.bias.expand(2, -1))
    assert not torch.equal(network.eval().classify(embedding), network.fc.bias.expand(2, -1))


def test_shortcuts():
    assert isinstance(projection_shortcut(8, 8, 1), nn.Identity)
    assert [type(part) for part in projection_shortcut(8, 16, 1)] == [nn.Conv2d, nn.BatchNorm2d]
    pooled = projection_shortcut(8, 8, 2)
    assert pooled[1].weight.shape == (8, 8, 1, 1)
    assert pooled[1].stride == (1, 1)
    # an odd map: the windows that stick out average what they hold
    corner = pooled[0](torch.arange(9.0).view(1, 1, 3, 3))
    assert torch.equal(corner, torch.tensor([[[[2.0, 3.5], [6.5, 8.0]]]]))


@pytest.mark.parametrize(
    ("arch", "split_factor", "shape"),
    [("resnet20", 1, SMALL), ("wide_resnet16_8", 2, SMALL), ("resnet50", 8, LARGE), ("resnext29_8x64d", 8, SMALL)],
)
def test_initialisation(arch, split_factor, shape):
    network = build_splitnet(make_request(arch, split_factor, shape, num_classes=100), seed=5).models[0]
    assert isinstance(network, ResNet)
    last = {id(m.last_bn) for m in network.modules() if isinstance(m, BasicBlock | Bottleneck)}
    assert len(last) == sum(len(stage) for stage in network.stages)
    z_scores = []
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            assert module.bias is None
            fan_out = module.out_channels * module.kernel_size[0] ** 2 // module.groups
            z_scores.append(z_of_std(module.weight, math.sqrt(2 / fan_out)))
        elif isinstance(module, nn.BatchNorm2d):
            assert (module.weight == (0 if id(module) in last else 1)).all()
            assert (module.bias == 0).all()
            assert (module.eps, module.momentum) == (1e-5, 0.1)
    z_scores.append(z_of_std(network.fc.weight, 1e-3))
    assert (network.fc.bias == 0).all()
    assert max(map(abs, z_scores)) < 5


def z_of_std(weight: torch.Tensor, std: float) -> float:
    """How many standard errors the spread of normal weights lies from what it should be."""
    measured = weight.detach().double().square().mean().sqrt().item()
    return (measured / std - 1) * math.sqrt(2 * weight.numel())


def test_weights_depend_on_the_seed_alone():
    request = make_request("resnet20", 2)
    torch.manual_seed(1)
    first = build_splitnet(request, seed=11)
    state = torch.get_rng_state()
    torch.manual_seed(2)
    again = build_splitnet(request, seed=11)
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), state)
    for key, value in first.state_dict().items():
        assert torch.equal(value, again.state_dict()[key])
    assert first.split_factor == 2

    weights = [network.layer0[0].weight for network in first.models]
    weights += [build_splitnet(request, seed=12).models[0].layer0[0].weight]
    assert all(not torch.equal(weights[i], weights[j]) for i in range(3) for j in range(i))


def test_identical_initialisation():
    independent = build_splitnet(make_request("resnet20", 4), seed=3)
    identical = build_splitnet(make_request("resnet20", 4), seed=3, identical_init=True)
    for network in identical.models:
        for name, value in network.state_dict().items():
            assert torch.equal(value, independent.models[0].state_dict()[name])
    assert len({id(p) for p in identical.parameters()}) == 4 * len(list(identical.models[0].parameters()))


def test_training_one_of_S_separately():
    one = build_splitnet(make_request("resnet20", 4), seed=3, train_separately=True)
    assert one.split_factor == 1
    assert one.models[0].fc.in_features == 4 * RESNET_WIDTHS[SMALL][4]


def test_several_full_networks():
    network = build_splitnet(make_request("resnet50", 2), seed=0, archs=["resnet20", "resnet32"])
    assert [len(one.layer1) for one in network.models] == [3, 5]
    assert [one.fc.in_features for one in network.models] == [64, 64]
    assert network(torch.zeros(2, 3, 16, 16)).shape == (2, 2, 10)

    with pytest.raises(UserError, match=r"--split_factor 4.*2 full networks"):
        build_splitnet(make_request("resnet50", 4), seed=0, archs=["resnet20", "resnet32"])
    with pytest.raises(UserError, match=r"--is_identical_init.*equal networks"):
        build_splitnet(make_request("resnet20"), seed=0, archs=["resnet20", "resnet32"], identical_init=True)
    with pytest.raises(UserError, match=r"--is_train_sep.*divided network"):
        build_splitnet(make_request("resnet20"), seed=0, archs=["resnet20"], train_separately=True)
    with pytest.raises(UserError, match=r"--arch 'resnet2'.*not a known"):
        build_splitnet(make_request("resnet20"), seed=0, archs=["resnet2"])


def test_every_block_count_of_the_table():
    counts = {
        "resnet20": 9, "resnet32": 15, "resnet56": 27, "resnet110": 36, "resnet164": 54,
        "resnet50": 16, "resnet101": 33, "resnet152": 50, "resnet200": 66,
        "wide_resnet16_2": 6, "wide_resnet16_4": 6, "wide_resnet16_8": 6, "wide_resnet16_12": 6,
        "wide_resnet28_10": 12, "wide_resnet40_10": 18, "wide_resnet52_8": 24,
        "wide_resnet50_2": 16, "wide_resnet50_3": 16, "wide_resnet101_2": 33,
        "resnext29_8x64d": 9, "resnext29_16x64d": 9,
        "resnext50_32x4d": 16, "resnext101_32x4d": 33, "resnext101_64x4d": 33,
    }  # fmt: skip
    families = ("resnet", "wide_resnet", "resnext")
    assert {name for name, entry in backbones.items() if entry.family in families} == set(counts)
    for arch, count in counts.items():
        shape = LARGE if LARGE in backbones.get(arch).split_factors else SMALL
        assert sum(len(stage) for stage in structure(arch, 4, shape).stages) == count


@pytest.mark.parametrize(("arch", "shape"), [("resnet20", SMALL), ("resnext50_32x4d", LARGE)])
def test_compiles_as_one_graph(arch, shape):
    network = build_splitnet(make_request(arch, 16, shape), seed=0, train_separately=True).models[0].eval()
    images_BCHW = torch.randn(2, 3, 64, 64)
    compiled = torch.compile(network, backend="eager", fullgraph=True)
    with torch.no_grad():
        assert torch.equal(compiled(images_BCHW), network(images_BCHW))


def test_exports_with_any_batch():
    network = build_splitnet(make_request("resnet20", 16), seed=0, train_separately=True).models[0].eval()
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(network, (torch.randn(2, 3, 33, 33),), dynamic_shapes=({0: batch},))
    images_BCHW = torch.randn(5, 3, 33, 33)
    torch.testing.assert_close(program.module()(images_BCHW), network(images_BCHW))


def test_the_table_of_coverage_says_what_divides_and_why_not() -> None:
    titles, line, *rows, empty, counted = coverage(["torchvision/squeezenet1_1", "torchvision/googlenet"], (2, 4))
    assert titles.count("|") == line.count("|") == 7
    assert [row.split("|")[1:4] for row in rows] == [
        [f" torchvision/{name} ", f" {s} ", f" {way} "]
        for name, way in (("squeezenet1_1", "channels"), ("googlenet", "refused"))
        for s in (2, 4)
    ]
    assert "auxiliary logits" in rows[-1]
    assert "Others" not in rows[-1]
    assert (empty, counted) == ("", "S = 2: 1 of 2 divide, S = 4: 1 of 2 divide.")


def test_coverage_of_one_list_and_of_all(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    lists = {"torchvision": ("torchvision/squeezenet1_1",), "held out": ("torchvision/googlenet",)}
    monkeypatch.setattr(command_line, "LISTS", lists)
    assert command_line.main(["--coverage", "held out"]) == 0
    one = capsys.readouterr().out
    assert "S = 2: 0 of 1 divide" in one
    assert command_line.main(["--coverage"]) == 0
    every = capsys.readouterr().out
    assert every.endswith(f"\n## held out\n\n{one}")
    assert "\n## torchvision\n" in every
    assert "S = 2: 1 of 1 divide" in every


def test_widths_of_one_kind_stand_together() -> None:
    assert named_widths(["", "", ""], [16, 16, 32]) == "16, 16, 32"
    names = ["blocks.0.c", "blocks.1.0.c", "stem", "blocks.2.c", "cfg.ratio", "blocks.3.c"]
    assert named_widths(names, [24, 24, 8, 48, 3.0521, 24]) == "c 24, 48, 24; stem 8; ratio 3.052"

"""How deep parameters lie: layers and their rates, held against timm's; what is frozen stays as it is."""

import pytest
import torch
from torch import nn

from model import LARGE, SMALL, BackboneRequest, SplitNet, backbones, build_splitnet
from model.depth import freeze, layer_factors, layer_rates, layers
from model.options import check_freeze
from model.registry import MemberForm
from model.staged import classifier_name, classifier_names, staged_parts
from training.optim import build_optimizer, parameter_groups, set_learning_rate
from training.options import OptimizerOptions
from utils.errors import UserError


def small(arch: str, split_factor: int = 1, **request: object) -> SplitNet:
    shape = SMALL if SMALL in backbones.get(arch).split_factors else LARGE
    if "/" in arch:
        shape = LARGE
    request = {"num_classes": 5, "crop_size": 64, "shape": shape, "dataset": "folder", **request}
    return build_splitnet(BackboneRequest(arch=arch, split_factor=split_factor, **request), seed=0)


# ---- layers ----------------------------------------------------------------------------------------------------------


def test_layers_of_a_resnet18_are_its_stem_its_eight_blocks_and_its_classifier() -> None:
    network = small("torchvision/resnet18").models[0]
    found = {layer.label: layer.names for layer in layers(network)}
    blocks = [f"layer{stage}.{block}" for stage in (1, 2, 3, 4) for block in (0, 1)]
    assert list(found) == ["stem", *blocks, "classifier"]
    assert found["stem"] == ("conv1.weight", "bn1.weight", "bn1.bias")
    assert found["classifier"] == ("fc.weight", "fc.bias")
    for block in blocks:
        assert found[block] == tuple(name for name, _ in network.named_parameters() if name.startswith(f"{block}."))


def test_rates_of_a_resnet18_worked_by_hand() -> None:
    network = small("torchvision/resnet18")
    factors = layer_factors(network, 0.5)
    assert factors["models.0.fc.weight"] == 1
    assert factors["models.0.layer4.1.conv2.weight"] == 0.5
    assert factors["models.0.layer1.0.bn1.bias"] == 0.5**8
    assert factors["models.0.conv1.weight"] == 0.5**9
    assert factors.keys() == dict(network.named_parameters()).keys()
    (line,) = layer_rates(network, 0.5, 0.1)
    assert line.startswith("torchvision/resnet18: stem 0.000195, layer1.0 0.000391, ")
    assert line.endswith(", layer4.1 0.05, classifier 0.1")


@pytest.mark.parametrize(
    "name",
    [
        "resnet18",
        "convnext_atto",
        "mobilenetv3_small_050",
        pytest.param("efficientnet_b0", marks=pytest.mark.slow),
        pytest.param("vit_tiny_patch16_224", marks=pytest.mark.slow),
        pytest.param("densenet121", marks=pytest.mark.slow),
    ],
)
def test_rates_of_timms_networks_are_timms(name: str) -> None:
    optim = pytest.importorskip("timm.optim")
    side = 224 if "224" in name else 64
    network = small(f"timm/{name}", crop_size=side)
    factors = layer_factors(network, 0.7)
    theirs = pytest.importorskip("timm").create_model(name, num_classes=5)
    by_id = {id(parameter): key for key, parameter in theirs.named_parameters()}
    expected = {
        f"models.0.{by_id[id(parameter)]}": group["lr_scale"]
        for group in optim.param_groups_layer_decay(theirs, layer_decay=0.7)
        for parameter in group["params"]
    }
    assert factors == pytest.approx(expected)
    assert len(set(expected.values())) > 5


OWN = ["resnet20", "wrn_10_1", "wide_resnet16_8", "se_resnet110", "shake_resnet26_2x96d", "efficientnetb0"]
OWN += ["resnet18_imagenet", "hcgnet_A1_cifar", "ShuffleNetV2_05x_cifar"]


@pytest.mark.parametrize("arch", [*OWN, "torchvision/mobilenet_v3_small", "torchvision/regnet_y_400mf"])
def test_every_parameter_lies_in_one_layer_and_the_classifier_above_all(arch: str) -> None:
    network = small(arch).models[0]
    staged = staged_parts(network)
    assert staged is not None
    found = layers(network)
    names = [name for layer in found for name in layer.names]
    assert sorted(names) == sorted(name for name, _ in network.named_parameters())
    assert all(layer.names for layer in found)
    assert {name.rpartition(".")[0] for name in found[-1].names} == {classifier_name(network)}
    assert found[0].label == "stem"
    assert len({layer.label for layer in found}) == len(found) >= 2 + len(staged.stages)
    # deeper parts of the network lie in later layers
    place = {name: i for i, layer in enumerate(found) for name in layer.names}
    ids = {id(parameter): name for name, parameter in network.named_parameters()}
    deepest = [0]
    for stage in staged.stages:
        depths = [place[ids[id(parameter)]] for parameter in stage.parameters()]
        if depths:
            assert min(depths) > deepest[-1]
            deepest.append(max(depths))


def test_a_network_without_stages_has_no_layers() -> None:
    network = small("torchvision/squeezenet1_1")
    with pytest.raises(UserError, match="--layer_decay: torchvision/squeezenet1_1 has no stages"):
        layer_factors(network, 0.5)


def test_a_network_that_timm_does_not_number_is_refused_by_name() -> None:
    pytest.importorskip("timm")
    with torch.device("meta"):
        network = small("timm/pit_ti_224", crop_size=224)
    with pytest.raises(UserError, match="--layer_decay: timm/pit_ti_224 has no stages"):
        layer_factors(network, 0.5)


def test_optimiser_groups_have_the_rates_of_their_layers() -> None:
    network = small("resnet20", 2)
    options = OptimizerOptions(lr=0.2, weight_decay=1e-3, layer_decay=0.5, lr_multiplier=10.0)
    factors = layer_factors(network, options.layer_decay)
    heads = ("models.1.fc.",)
    groups = parameter_groups(network, network.named_parameters(), options, new_heads=heads, factors=factors)
    optimizer = build_optimizer(options, groups)
    set_learning_rate(optimizer, 0.1)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    decays = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert all(group["params"] for group in optimizer.param_groups)
    for name, parameter in network.named_parameters():
        new = 10.0 if name.startswith(heads) else 1.0
        assert rates[id(parameter)] == pytest.approx(0.1 * factors[name] * new)
        assert decays[id(parameter)] == (0.0 if name.endswith("bias") else 1e-3)


def test_without_layers_the_groups_are_those_of_before() -> None:
    network = small("resnet20")
    groups = parameter_groups(network, network.named_parameters(), OptimizerOptions())
    assert [group["lr_multiplier"] for group in groups] == [1.0, 1.0]
    sizes = [
        sum(name.endswith("bias") == is_bias for name, _ in network.named_parameters()) for is_bias in (False, True)
    ]
    assert [len(group["params"]) for group in groups] == sizes


# ---- freezing --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["", "stages", "stages:0", "stages:-1", "stages:x", "head", "Stem"])
def test_a_freeze_that_is_none_is_refused(what: str) -> None:
    with pytest.raises(UserError, match=f"--freeze {what}: expected stem, stages:N"):
        check_freeze(what)


def test_more_stages_than_there_are_and_networks_without_stages_are_refused() -> None:
    with pytest.raises(UserError, match="--freeze stages:4: resnet20 has 3 stages"):
        freeze(small("resnet20"), "stages:4")
    with pytest.raises(UserError, match="--freeze stem: torchvision/squeezenet1_1 has no stages"):
        freeze(small("torchvision/squeezenet1_1"), "stem")


def test_a_network_that_ends_in_no_classifier_has_no_backbone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("model.depth.classifier_names", lambda network: ())
    with pytest.raises(UserError, match="--freeze backbone: resnet20 has no classifier"):
        freeze(small("resnet20"), "backbone")


FROZEN = {
    "stem": ("layer0.",),
    "stages:1": ("layer0.", "layer1."),
    "stages:3": ("layer0.", "layer1.", "layer2.", "layer3."),
    "backbone": ("layer0.", "layer1.", "layer2.", "layer3."),
}


@pytest.mark.parametrize("execution", ["loop", "stacked"])
@pytest.mark.parametrize("what", FROZEN)
def test_what_is_frozen_stays_bit_for_bit_and_the_rest_learns(what: str, execution: str) -> None:
    network = small("resnet20", 2, crop_size=32)
    network.execution = execution
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    count = freeze(network, what)
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.1, momentum=0.9, weight_decay=0.1)
    for mode in (True, False, True):  # as an evaluation in between
        network.train(mode)
        for _ in range(2 * mode):
            network(torch.rand(2, 4, 3, 32, 32)).square().mean().backward()
            optimizer.step()
    frozen = tuple(f"models.{i}.{prefix}" for i in (0, 1) for prefix in FROZEN[what])
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, before[name]) == name.startswith(frozen), name
    assert count == sum(tensor.numel() for name, tensor in network.named_parameters() if name.startswith(frozen))


@pytest.mark.parametrize("arch", [*OWN, "torchvision/mobilenet_v3_small", "torchvision/shufflenet_v2_x0_5"])
def test_a_frozen_backbone_leaves_the_classifier_alone_to_learn(arch: str) -> None:
    network = small(arch)
    one = network.models[0]
    head = classifier_name(one)
    freeze(network, "backbone")
    network.train()
    assert {n.rpartition(".")[0] for n, p in one.named_parameters() if p.requires_grad} == {head}
    buffers = {name: tensor.clone() for name, tensor in network.named_buffers()}
    first, second = (network(torch.ones(1, 2, 3, 64, 64)) for _ in range(2))
    assert all(torch.equal(tensor, buffers[name]) for name, tensor in network.named_buffers())
    assert first.requires_grad
    for module in one.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            assert not module.training
    assert second.shape == first.shape


FORM_OF = {
    "batch_ensemble": MemberForm(kind="batch_ensemble", members=3, numbers={"init": -0.5, "norm": "shared"}),
    "mimo": MemberForm(kind="mimo", members=3, numbers={}),
    "mc_dropout": MemberForm(kind="mc_dropout", members=3, numbers={"place": "stages", "rate": 0.1, "mask_seed": 0}),
    "gated": MemberForm(kind="gated", members=1, numbers={"branches": 2}),
}


@pytest.mark.parametrize("kind", FORM_OF)
@pytest.mark.parametrize("arch", ["resnet20", "torchvision/resnet18", "timm/resnet18"])
def test_of_members_the_whole_classifier_is_found_and_trained(arch: str, kind: str) -> None:
    if arch.startswith("timm/"):
        pytest.importorskip("timm")
    network = small(arch, form=FORM_OF[kind])
    one = network.models[0]
    assert classifier_name(one) == "fc"
    beside = "native_ensemble."  # branches and their gate are no part of the backbone
    head = {name for name, _ in one.named_parameters() if name.startswith("fc.")}
    assert len(head) == (4 if kind == "batch_ensemble" else 2)
    found = layers(one)
    assert {name for name in found[-1].names if not name.startswith(beside)} == head
    assert any(name.startswith("conv1." if "/" in arch else "layer0.") for name in found[0].names)
    freeze(network, "backbone")
    trained = {name for name, parameter in one.named_parameters() if parameter.requires_grad}
    assert trained == head | {name for name, _ in one.named_parameters() if name.startswith(beside)}
    assert any(name.startswith(beside) for name in trained) == (kind == "gated")


@pytest.mark.parametrize(
    ("arch", "form"),
    [
        ("timm/deit_tiny_distilled_patch16_224", None),
        ("timm/deit_tiny_distilled_patch16_224", "batch_ensemble"),
        ("timm/deit_tiny_distilled_patch16_224", "mimo"),
        ("timm/levit_128s", None),
        ("timm/repvit_m1", None),  # one module holds both
    ],
)
def test_networks_that_answer_by_the_mean_of_several_heads_have_all_trained(arch: str, form: str | None) -> None:
    pytest.importorskip("timm")
    with torch.device("meta"):
        network = small(arch, crop_size=224, form=FORM_OF.get(form))
    one = network.models[0]
    heads = {name for name, module in one.named_modules() if getattr(module, "out_features", 0) in (5, 3 * 5)}
    heads = {name.removesuffix(".layer") for name in heads}
    assert len(heads) == 2
    assert {*classifier_names(one)} == heads
    freeze(network, "backbone")
    trained = {name for name, parameter in one.named_parameters() if parameter.requires_grad}
    assert {name.rpartition(".")[0].removesuffix(".layer") for name in trained} == heads
    assert trained <= {*layers(one)[-1].names}


def test_a_network_of_ones_own_may_call_anything_its_configuration() -> None:
    network = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 5))
    network.pretrained_cfg = "mine"
    assert classifier_names(network) == ("2",)
    network.pretrained_cfg = {"classifier": ("2", "gone")}
    assert classifier_names(network) == ("2",)
    network.pretrained_cfg = {"classifier": ("0", "2")}
    assert classifier_names(network) == ("0", "2")


def test_the_stem_is_found_again_where_it_is_frozen_and_nothing_else_changes() -> None:
    network = small("resnet20")
    expected = [layer.names for layer in layers(network.models[0])]
    freeze(network, "stages:1")
    network.train()
    before = {name: (p.requires_grad, None if p.grad is None else 1) for name, p in network.named_parameters()}
    modes = {name: module.training for name, module in network.named_modules()}
    assert [layer.names for layer in layers(network.models[0])] == expected
    assert {n: (p.requires_grad, None if p.grad is None else 1) for n, p in network.named_parameters()} == before
    assert {name: module.training for name, module in network.named_modules()} == modes
    assert modes["models.0.layer0.1"] is False

"""Heads beside the networks: sizes from the tables, what they copy, what they drop, how they start."""

import json
from functools import lru_cache
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from method import methods
from model import LARGE, SMALL, BackboneRequest, backbones, build_network, staged_parts
from model.heads import (
    AuxiliaryHeads,
    Gate,
    PairWeights,
    ProjectionHead,
    embedding_size,
    exit_heads,
    first_blocks,
    fresh_network,
    require_stages,
    synergy_branches,
)
from utils.errors import UserError
from utils.macs import count_macs, count_params

GOLDEN = json.loads((Path(__file__).parent / "golden" / "dks.json").read_text())

# arch: parameters and MACs (in millions) of one network with its exits
WITH_EXITS = {
    "resnet32_cifar": (1_281_852, 136.776),
    "resnet56_cifar": (2_336_828, 250.023),
    "resnet110_cifar": (3_181_948, 337.374),
    "wrn_16_2_cifar": (1_911_484, 201.807),
    "wrn_40_2_cifar": (6_122_684, 654.792),
    "wrn_28_4_cifar": (15_961_212, 1701.309),
    "ShuffleNetV2_05x_cifar": (1_272_060, 24.366),
    "ShuffleNetV2_1x_cifar": (3_762_356, 99.331),
    "hcgnet_A1_cifar": (2_581_080, 270.435),
    "hcgnet_A2_cifar": (7_248_225, 806.794),
    "resnet18_imagenet": (26_316_000, 2894.594),
    "resnet34_imagenet": (36_424_160, 4744.282),
    "resnet50_imagenet": (53_226_976, 6330.368),
    "ShuffleNetV2_1x_imagenet": (8_398_400, 394.210),
}

# pair: parameters of the two networks with exits, of heads, of gates, of the weight network
PAIRS = {
    "lmcl_resnet32_cifar": (2_563_704, 148_992, 25_094, 49_920),
    "lmcl_resnet56_cifar": (4_673_656, 148_992, 25_094, 49_920),
    "lmcl_resnet110_cifar": (6_363_896, 296_448, 395_270, 197_376),
    "lmcl_wrn_16_2_cifar": (3_822_968, 198_144, 99_334, 99_072),
    "lmcl_wrn_40_2_cifar": (12_245_368, 198_144, 99_334, 99_072),
    "lmcl_wrn_28_4_cifar": (31_922_424, 296_448, 395_270, 197_376),
    "lmcl_ShuffleNetV2_05x_cifar": (2_544_120, 886_272, 6_299_654, 787_200),
    "lmcl_ShuffleNetV2_1x_cifar": (7_524_712, 886_272, 6_299_654, 787_200),
    "lmcl_hcgnet_A1_cifar": (5_162_160, 417_792, 1_031_694, 318_720),
    "lmcl_hcgnet_A2_cifar": (14_496_450, 649_728, 3_081_670, 550_656),
    "lmcl_res32_res110_cifar": (4_463_800, 222_720, 210_182, 123_648),
    "lmcl_res56_res110_cifar": (5_518_776, 222_720, 210_182, 123_648),
    "lmcl_wrn_16_2_wrn_40_2_cifar": (8_034_168, 198_144, 99_334, 99_072),
    "lmcl_wrn_40_2_wrn_28_4_cifar": (22_083_896, 247_296, 247_302, 148_224),
    "lmcl_res56_wrn_40_2_cifar": (8_459_512, 173_568, 62_214, 74_496),
    "lmcl_res110_wrn_28_4_cifar": (19_143_160, 296_448, 395_270, 197_376),
    "lmcl_shufflev2_res110_cifar": (6_944_304, 591_360, 3_347_462, 492_288),
    "lmcl_shufflev2_wrn_40_2_cifar": (9_885_040, 542_208, 3_199_494, 443_136),
    "lmcl_resnet18_imagenet": (52_632_000, 657_408, 2_102_280, 525_312),
    "lmcl_resnet34_imagenet": (72_848_320, 657_408, 2_102_280, 525_312),
    "lmcl_resnet50_imagenet": (106_453_952, 2_230_272, 33_574_920, 2_098_176),
    "lmcl_ShuffleNetV2_1x_imagenet": (16_796_800, 1_181_696, 8_398_856, 1_049_600),
    "lmcl_res18_shufflenetv2_1x_imagenet": (34_714_400, 919_552, 5_250_568, 787_456),
    "lmcl_res50_shufflenetv2_1x_imagenet": (61_625_376, 1_705_984, 20_986_888, 1_573_888),
    "lmcl_res18_res50_imagenet": (79_542_976, 1_443_840, 17_838_600, 1_311_744),
}


class WithHeads(nn.Module):
    """A network and its heads as one module, to count both."""

    def __init__(self, network: nn.Module, heads: AuxiliaryHeads) -> None:
        super().__init__()
        self.network, self.heads = network, heads

    def forward(self, images: Tensor) -> list[Tensor]:
        return self.heads(self.network, images)[1]


def request_of(arch: str, **changes) -> BackboneRequest:
    """100 classes at 32 pixels, or 1000 at 224."""
    large = LARGE in backbones.get(arch).split_factors
    values = {
        "arch": arch,
        "num_classes": 1000 if large else 100,
        "shape": LARGE if large else SMALL,
        "dataset": "imagenet" if large else "cifar100",
        "crop_size": 224 if large else 32,
    }
    return BackboneRequest(**(values | changes))


def build(arch: str, **changes) -> nn.Module:
    return build_network(request_of(arch, **changes))


@lru_cache
def with_exits(arch: str) -> WithHeads:
    """A network and its exits without storage."""
    with torch.device("meta"):
        network = build(arch)
        return WithHeads(network, exit_heads(network))


@pytest.mark.parametrize("arch", WITH_EXITS)
def test_sizes_with_exits(arch):
    whole = with_exits(arch)
    side = request_of(arch).crop_size
    params, macs = WITH_EXITS[arch]
    assert count_params(whole) == params
    assert round(count_macs(whole, (3, side, side)) / 1e6, 3) == macs


@pytest.mark.parametrize("name", PAIRS)
def test_sizes_of_pairs(name):
    l_mcl = methods.get("l_mcl")
    wholes = [with_exits(arch) for arch in l_mcl.backbone_names(name, l_mcl.Options())]
    with torch.device("meta"):
        sizes = [embedding_size(whole.network) for whole in wholes]
        counts = [len(whole.heads) + 1 for whole in wholes]
        per_exit = [size for size, count in zip(sizes, counts, strict=True) for _ in range(count)]
        heads = [ProjectionHead(size, 128) for size in per_exit]
        gates = [Gate(count, size) for count, size in zip(counts, sizes, strict=True)]
        weight_net = PairWeights(per_exit)
    found = [sum(map(count_params, group)) for group in (wholes, heads, gates, (weight_net,))]
    assert tuple(found) == PAIRS[name]


@pytest.mark.parametrize("row", GOLDEN["params"], ids=lambda row: f"wrn_{row['depth']}_{row['width']}")
def test_sizes_of_branches(row):
    arch = f"wrn_{row['depth']}_{row['width']}"
    with torch.device("meta"):
        network = build(arch, num_classes=row["num_classes"])
        branches = synergy_branches(network)
    assert [count_params(part) for part in (network, *branches)] == [row["main"], row["branch1"], row["branch2"]]


def test_widths_and_depths_of_the_published_branches():
    branches = synergy_branches(build("wrn_28_1"))
    assert [[len(stage) for stage in branch.stages] for branch in branches] == [[4, 2], [4]]
    widths = [[stage[0].conv2.out_channels for stage in branch.stages] for branch in branches]
    assert widths == [[32, 64], [128]]
    assert all(stage[0].conv1.stride == (2, 2) for branch in branches for stage in branch.stages)


def test_a_wide_network_with_one_block_per_group_is_refused():
    network = build("wrn_10_1")
    with pytest.raises(UserError, match=r"one block per group.*depth 16"):
        synergy_branches(network)
    assert len(synergy_branches(network, [2])) == 1


# arch, blocks of the branches' stages, embedding sizes of the branches
@pytest.mark.parametrize(
    ("arch", "depths", "widths"),
    [
        ("resnet20", [[3, 1], [3]], [64, 64]),
        ("resnet32_cifar", [[5, 2], [5]], [64, 128]),
        ("ShuffleNetV2_05x_cifar", [[8, 2], [4]], [1024, 1024]),
        ("resnet18_imagenet", [[2, 1], [2]], [512, 1024]),
        ("hcgnet_A1_cifar", [[9, 8], [8]], [414, 414]),  # its blocks change the width
    ],
)
def test_our_rule_for_branches_of_other_backbones(arch, depths, widths):
    with torch.device("meta"):
        network = build(arch)
        branches = synergy_branches(network)
    assert [[len(stage) for stage in branch.stages] for branch in branches] == depths
    assert [branch.rest.get_submodule(network.classifier_name).in_features for branch in branches] == widths
    last = len(network.stages)
    assert [branch.tap for branch in branches] == [last - 2, last - 1]


# arch, blocks of the last stage of the two branches; parts of a trunk that are found by position, stages of other types
@pytest.mark.parametrize(
    ("arch", "depths"),
    [
        ("torchvision/vgg11", [0, 0]),  # its last stage is a max-pool
        ("torchvision/convnext_tiny", [2, 2]),  # a downsampling layer and all blocks
        ("torchvision/regnet_x_400mf", [6, 12]),
        ("torchvision/mobilenet_v3_small", [1, 3]),
        ("timm/mobilenetv3_small_050", [2, 2]),
        ("timm/efficientnet_b0", [2, 2]),
    ],
)
def test_branches_and_exits_of_library_networks(arch, depths):
    if arch.startswith("timm/"):
        pytest.importorskip("timm")
    with torch.device("meta"):
        request = BackboneRequest(arch=arch, num_classes=5, dataset="synthetic", crop_size=64)
        network = staged_parts(build_network(request))
        branches, exits = synergy_branches(network), exit_heads(network)
        for heads in (branches, exits):
            embeddings, logits = heads(network, torch.empty(2, 3, 64, 64))
            assert {e.shape for e in embeddings} == {(2, embedding_size(network))}
            assert {one.shape for one in logits} == {(2, 5)}
            loss = torch.stack(logits).sum()
            trained = [p for p in heads.parameters() if p.requires_grad]
            gradients = torch.autograd.grad(loss, trained, allow_unused=True)
            assert all(gradient is not None for gradient in gradients)  # nothing that is not used was kept
    assert [len([*branch.stages[-1].children()]) for branch in branches] == depths


def test_branches_hang_where_they_are_asked_to():
    network = build("resnet18_imagenet", num_classes=5)
    branches = synergy_branches(network, (3, 1))
    assert [branch.tap for branch in branches] == [1, 3]
    assert [[len(stage) for stage in branch.stages] for branch in branches] == [[2, 2, 1], [2]]
    assert len(synergy_branches(network, ())) == 0
    for wrong in ((0,), (4,), (1, 1)):
        with pytest.raises(UserError, match=r"--dks_branches .*from 1 to 3"):
            synergy_branches(network, wrong)


@pytest.mark.parametrize(
    ("arch", "taps", "depths"),
    [
        ("resnet32_cifar", [1, 2], [[5, 5], [5]]),
        ("hcgnet_A1_cifar", [1, 2], [[9, 8], [8]]),
        ("resnet50_imagenet", [1, 2, 3], [[1, 1, 1], [1, 1], [1]]),
        ("ShuffleNetV2_1x_imagenet", [0, 1, 2], [[2, 2, 2], [8, 4], [4]]),
        ("resnet20", [1, 2], [[3, 3], [3]]),
        ("resnet50", [1, 2, 3], [[4, 6, 3], [6, 3], [3]]),
    ],
)
def test_exits_hang_where_the_plan_says(arch, taps, depths):
    with torch.device("meta"):
        exits = exit_heads(build(arch))
    assert [one.tap for one in exits] == taps
    assert [[len(stage) for stage in one.stages] for one in exits] == depths


def test_heads_are_copies_with_weights_of_their_own():
    torch.manual_seed(0)
    network = build("resnet32_cifar")
    first, second = exit_heads(network)
    assert {id(p) for p in network.parameters()}.isdisjoint(id(p) for p in (*first.parameters(), *second.parameters()))
    weights = [network.layer3[0].conv1.weight, first.stages[1][0].conv1.weight, second.stages[0][0].conv1.weight]
    for i, weight in enumerate(weights):
        assert weight.std().item() == pytest.approx((2 / (9 * 64)) ** 0.5, rel=0.05)
        assert not any(torch.equal(weight, other) for other in weights[:i])
    assert (first.rest.fc.bias == 0).all()
    assert (network.fc.bias != 0).any()


def test_a_head_is_the_network_behind_its_stage():
    torch.manual_seed(0)
    network = build("wrn_16_1").eval()
    heads = exit_heads(network).eval()
    for head in heads:
        for stage, own in zip(head.stages, network.stages[head.tap :], strict=True):
            stage.load_state_dict(own.state_dict())
        head.rest.load_state_dict({k: v for k, v in network.state_dict().items() if k.startswith(("bn.", "fc."))})
    images = torch.randn(3, 3, 16, 16)
    with torch.no_grad():
        embeddings, logits = heads(network, images)
        for one in logits:
            torch.testing.assert_close(one, network(images))
        torch.testing.assert_close(network.classify(embeddings[0]), logits[0])


def test_a_fresh_network_keeps_the_options():
    network = build("wrn_16_1", options={"wrn_dropout": 0.25})
    for fresh in (fresh_network(network), fresh_network(network, wide=True)):
        assert fresh.layer3[0].dropout.p == 0.25
    with pytest.raises(ValueError, match="request"):
        fresh_network(type(network)(16, 1, 10))


def test_only_sequences_can_be_cut():
    with pytest.raises(UserError, match="cannot be cut"):
        first_blocks(nn.Conv2d(1, 1, 1), 1)
    with pytest.raises(UserError, match=r"--method dks.*stages"):
        require_stages(nn.Linear(2, 2), "dks")


def test_projection_head_is_on_the_sphere_in_float32():
    torch.manual_seed(0)
    head = ProjectionHead(6, 4)
    x = torch.randn(5, 6)
    hidden = (x @ head[0].weight.T + head[0].bias).relu() @ head[2].weight.T + head[2].bias
    torch.testing.assert_close(head(x), hidden / hidden.norm(dim=1, keepdim=True))
    with torch.autocast("cpu", torch.bfloat16):
        low = head(x)
    assert low.dtype == torch.float32
    torch.testing.assert_close(low.norm(dim=1), torch.ones(5))
    assert head.double()(x.double()).dtype == torch.float64


def test_gate_mixes_by_weights_that_sum_to_one():
    torch.manual_seed(0)
    gate, embeddings, logits = Gate(3, 4), torch.randn(3, 5, 4), torch.randn(3, 5, 7)
    weights = gate.weights([*embeddings])
    torch.testing.assert_close(weights.sum(dim=1), torch.ones(5))
    torch.testing.assert_close(gate([*embeddings], logits), torch.einsum("be,ebk->bk", weights, logits))
    with torch.autocast("cpu", torch.bfloat16):
        assert gate.weights([*embeddings]).dtype == torch.float32

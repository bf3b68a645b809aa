"""Cream's networks and supernet against the published code's numbers, and against each other."""

import json
import math
from pathlib import Path

import pytest
import torch
from torch import nn

from model import LARGE, SMALL, BackboneRequest, backbones, build_network, build_splitnet
from model.backbone.cream import CreamNet, CreamOptions
from model.search.blocks import InvertedResidual, SqueezeExcite
from model.search.costs import BlockPlan, Operator
from model.search.estimates import size_supernet
from model.search.reading import space_to_text
from model.search.space import PUBLISHED, SearchSpace, Stage
from model.search.supernet import Supernet
from utils.errors import UserError
from utils.macs import count_macs

GOLDEN = json.loads((Path(__file__).parent / "golden" / "cream.json").read_text())
TINY = SearchSpace(
    operators=(Operator(3, 2), Operator(5, 2), Operator(3, 4)),
    stages=(Stage(8, 2, Operator(5, 2)), Stage(16, 1)),
    deepening=((2, 3), (1, 2)),
    resolution=12,
    stem_channels=8,
    stem_stride=1,
    base_channels=8,
    tail_channels=24,
    head_channels=32,
)
PATH = [[0], [1, 2], [0, 2, 1], [0]]


def request(arch, shape=LARGE, *, split_factor=1, num_classes=1000, **options):
    return BackboneRequest(
        arch=arch, split_factor=split_factor, num_classes=num_classes, shape=shape, dataset="imagenet", options=options
    )


def fill_as_golden(network):
    """The parameter values of the golden file's forward recipe, in place."""
    parameters = dict(network.named_parameters())
    for k, name in enumerate(sorted(parameters)):
        parameter = parameters[name]
        i = torch.arange(parameter.numel(), dtype=torch.float64)
        values = torch.sin(12.9898 * i + 78.233 * k).reshape(parameter.shape)
        if name.endswith("bias"):
            values = 0.05 * values
        elif parameter.dim() == 1:
            values = 1 + 0.1 * values
        else:
            values = values * math.sqrt(2.0 / math.prod(parameter.shape[1:]))
        with torch.no_grad():
            parameter.copy_(values)


@pytest.mark.parametrize("row", GOLDEN["released"], ids=lambda row: row["name"])
def test_released_forward(row):
    network = build_network(request(f"cream_{row['selection']}")).double().train()
    fill_as_golden(network)
    images = torch.sin(12.9898 * torch.arange(4 * 3 * 64 * 64, dtype=torch.float64)).reshape(4, 3, 64, 64)
    with torch.no_grad():
        _, embedding_BD = network.forward_features(images)
        logits_BK = network.classify(embedding_BD)
    expected = row["forward"]

    def close(actual, wanted):
        torch.testing.assert_close(actual, torch.tensor(wanted, dtype=torch.float64), rtol=0, atol=1e-6)

    close(logits_BK[0, :5], expected["logits_first5"])
    close(logits_BK.sum(), expected["logits_sum"])
    close(logits_BK.abs().mean(), expected["logits_abs_mean"])
    close(embedding_BD[0, :3], expected["feat_first3"])
    close(embedding_BD.abs().mean(), expected["feat_abs_mean"])


@pytest.mark.parametrize("row", GOLDEN["released"], ids=lambda row: row["name"])
def test_released_structure(row):
    with torch.device("meta"):
        network = build_network(request(f"cream_{row['selection']}"))
        twins = [build_network(request(f"cream_{alias}")) for alias in row["aliases"]]
        from_list = build_network(request("cream", arch_list=json.dumps(row["arch"])))
    assert len(network.state_dict()) == row["state_dict_entries"]
    assert sum(b.numel() for b in network.buffers()) == row["buffer_elements"]
    assert backbones.get(f"cream_{row['selection']}").crop_size == row["resolution"]
    for other in (*twins, from_list):
        assert other.plan == network.plan


def test_aliases():
    assert backbones.get("cream_42").crop_size == 96
    assert backbones.get("cream_112").crop_size == 160
    with torch.device("meta"):
        assert build_network(request("cream_42")).plan == build_network(request("cream_43")).plan
        assert build_network(request("cream_112")).plan == build_network(request("cream_114")).plan
        assert build_network(request("cream_43")).plan != build_network(request("cream_114")).plan


def test_state_dict_names():
    with torch.device("meta"):
        names = set(build_network(request("cream_14")).state_dict())
    block = {"conv_pw", "conv_dw", "conv_pwl", "bn1", "bn2", "bn3", "se.conv_reduce", "se.conv_expand"}
    norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")

    def entries(prefix, parts):
        return {
            f"{prefix}{part}.{leaf}"
            for part in parts
            for leaf in (norm if part.startswith("bn") else ("weight", "bias") if "se." in part else ("weight",))
        }

    expected = entries("", ["bn1"]) | {"conv_stem.weight", "conv_head.weight", "conv_head.bias"}
    expected |= {"classifier.weight", "classifier.bias"}
    expected |= entries("blocks.0.0.", ["conv_dw", "bn1", "se.conv_reduce", "se.conv_expand", "conv_pw", "bn2"])
    expected |= entries("blocks.6.0.", ["conv", "bn1"])
    for stage, depth in enumerate((1, 2, 2, 1, 1), start=1):
        for position in range(depth):
            expected |= entries(f"blocks.{stage}.{position}.", block)
    assert names == expected


def test_entries_stand_in_the_order_of_the_released_files():
    def parts(network, prefix=""):
        return list(dict.fromkeys(key.removeprefix(prefix).split(".")[0] for key in network if key.startswith(prefix)))

    with torch.device("meta"):
        network = build_network(request("cream_14")).state_dict()
        supernet = Supernet(TINY, (2, 2), 5).state_dict()
    assert parts(network) == ["conv_stem", "bn1", "blocks", "conv_head", "classifier"]
    assert parts(supernet) == ["path", "conv_stem", "bn1", "blocks", "conv_head", "classifier", "meta_layer"]
    assert parts(network, "blocks.0.0.") == ["conv_dw", "bn1", "se", "conv_pw", "bn2"]
    for keys, prefix in ((network, "blocks.1.0."), (supernet, "blocks.1.0.2.")):
        assert parts(keys, prefix) == ["conv_pw", "bn1", "conv_dw", "bn2", "se", "conv_pwl", "bn3"]


def test_squeeze_widths():
    widths = [
        SqueezeExcite(c).conv_reduce.out_channels for c in (16, 64, 96, 144, 160, 240, 320, 384, 480, 576, 768, 1152)
    ]
    assert widths == [8, 16, 24, 40, 40, 64, 80, 96, 120, 144, 192, 288]


def test_shortcuts_only_where_shapes_allow():
    images = torch.randn(2, 8, 6, 6)
    for plan, has_shortcut in (
        (BlockPlan(8, 8, 3, 2, 1), True),
        (BlockPlan(8, 8, 3, 2, 2), False),
        (BlockPlan(8, 16, 3, 2, 1), False),
    ):
        block = InvertedResidual(plan).eval()
        nn.init.zeros_(block.bn3.weight)
        expected = (
            images if has_shortcut else torch.zeros(2, plan.out_channels, *([3, 3] if plan.stride == 2 else [6, 6]))
        )
        assert torch.equal(block(images), expected)


def test_initialisation():
    torch.manual_seed(0)
    network = build_network(request("cream_43"))
    for name, module in network.named_modules():
        if isinstance(module, nn.Conv2d):
            fan_out = module.kernel_size[0] ** 2 * module.out_channels // module.groups
            if module.weight.numel() > 2000:
                assert module.weight.std().item() == pytest.approx(math.sqrt(2 / fan_out), rel=0.1), name
            assert module.bias is None or not module.bias.any()
            assert (module.bias is not None) == ("se." in name or name == "conv_head")
        elif isinstance(module, nn.BatchNorm2d):
            assert (module.momentum, module.eps) == (0.1, 1e-5)
            assert module.weight.eq(1).all()
            assert not module.bias.any()
    weight = network.classifier.weight
    assert weight.abs().max() <= 1 / math.sqrt(1000)
    assert weight.abs().max() > 0.99 / math.sqrt(1000)
    assert not network.classifier.bias.any()
    meta_layer = build_network(request("cream_supernet", SMALL, sta_num=(1,) * 5)).meta_layer
    assert 0.9 < meta_layer.weight.abs().max() <= 1


@pytest.mark.parametrize(("shape", "side"), [(LARGE, 64), (SMALL, 32)])
@pytest.mark.parametrize("split_factor", [1, 2, 4])
def test_division(shape, side, split_factor):
    with torch.device("meta"):
        network = build_network(request("cream_14", shape, split_factor=split_factor, num_classes=10, dropout_rate=0.2))
        taps, embedding_BD = network.forward_features(torch.empty(2, 3, side, side))
    assert network.dropout.p == pytest.approx(0.2 / split_factor**0.5)
    assert network.plan.cost(side).macs == count_macs(network, (3, side, side))
    assert [tap.shape[-1] for tap in taps] == ([32, 16, 8, 4, 4, 2, 2] if shape == LARGE else [32, 32, 16, 8, 8, 4, 4])
    assert embedding_BD.shape == (2, {1: 1280, 2: 896, 4: 624}[split_factor])
    with pytest.raises(UserError, match="--split_factor 3"):
        build_network(request("cream_14", shape, split_factor=3))


def test_divided_networks_cost_about_one_s_th():
    with torch.device("meta"):
        params, macs = zip(
            *(
                (cost.params, cost.macs)
                for cost in (build_network(request("cream_287", split_factor=s)).plan.cost(224) for s in (1, 2, 4))
            ),
            strict=True,
        )
    assert [round(p / params[0], 2) for p in params] == [1.0, 0.5, 0.25]
    assert [round(m / macs[0], 2) for m in macs] == [1.0, 0.45, 0.2]


def test_pooling_and_dropout_options():
    torch.manual_seed(0)
    features = torch.randn(2, 320, 3, 3)
    network = build_network(request("cream_14", SMALL, num_classes=10))
    assert network.dropout.p == 0
    pools = {}
    for name in ("avg", "max", "avgmax"):
        network.global_pool = name
        network.conv_head = nn.Identity()
        pools[name] = network.tail(features)
    silu = nn.functional.silu
    assert torch.equal(pools["avg"], silu(features.mean((2, 3))))
    assert torch.equal(pools["max"], silu(features.amax((2, 3))))
    torch.testing.assert_close(pools["avgmax"], silu((features.mean((2, 3)) + features.amax((2, 3))) / 2))
    assert build_network(request("cream_14", SMALL, global_pool="max")).global_pool == "max"


@pytest.mark.parametrize("arch", ["cream_14", "cream", "cream_supernet"])
@pytest.mark.parametrize("rate", [-0.1, 1.0, 1.5, math.nan])
def test_a_dropout_rate_that_cannot_be_is_refused(arch, rate):
    with torch.device("meta"), pytest.raises(UserError, match=r"--dropout_rate.*below 1"):
        build_network(request(arch, dropout_rate=rate))


def test_single_block_rule_and_its_switch():
    arch = "[[0],[5],[5],[0],[0],[0],[0]]"
    with torch.device("meta"):
        plain = build_network(request("cream", arch_list=arch))
        honest = build_network(request("cream", arch_list=arch, honour_single_block=True))
    assert [(stage[0].kernel, stage[0].expansion) for stage in plain.plan.stages] == [
        (3, 4),
        (5, 4),
        (3, 6),
        (3, 6),
        (5, 6),
    ]
    assert [(stage[0].kernel, stage[0].expansion) for stage in honest.plan.stages] == [
        (7, 6),
        (7, 6),
        (3, 4),
        (3, 4),
        (3, 4),
    ]


def test_a_search_space_of_ones_own():
    network = build_network(
        request("cream", SMALL, num_classes=5, search_space=space_to_text(TINY), arch_list="[[0],[2],[0,1],[0]]")
    )
    assert [(b.kernel, b.expansion) for b in network.plan.stages[0]] == [(5, 2)]
    assert [(b.kernel, b.expansion) for b in network.plan.stages[1]] == [(3, 2), (5, 2)]
    assert network(torch.randn(2, 3, 12, 12)).shape == (2, 5)
    with pytest.raises(UserError, match="expected 4 inner lists"):
        build_network(request("cream", SMALL, search_space=space_to_text(TINY)))


# ---- supernet --------------------------------------------------------------------------------------------------------


def tiny_supernet(**arguments):
    torch.manual_seed(0)
    return Supernet(TINY, (2, 3), 5, slice_size=2, **arguments)


def copy_path(supernet, path):
    """The stand-alone network of a path with the supernet's weights, by dropping the CHOICE level of the names."""
    child = CreamNet(TINY.plan(path, 5, honour_single_block=True))
    state = {}
    for name, value in supernet.state_dict().items():
        parts = name.split(".")
        if parts[0] == "blocks":
            stage, position, choice = map(int, parts[1:4])
            if path[stage][position] != choice:
                continue
            name = ".".join([*parts[:3], *parts[4:]])
        if parts[0] not in ("meta_layer", "path"):
            state[name] = value
    child.load_state_dict(state, strict=True)
    return child


@pytest.mark.parametrize("training", [True, False])
def test_a_path_is_the_stand_alone_network(training):
    supernet = tiny_supernet().train(training)
    with torch.no_grad():
        for norm in (m for m in supernet.modules() if isinstance(m, nn.BatchNorm2d)):
            norm.running_mean.normal_(0, 0.1)
    child = copy_path(supernet, PATH).train(training)
    images = torch.randn(3, 3, 12, 12)
    assert torch.equal(supernet(images, PATH), child(images))


@pytest.mark.parametrize(
    ("key", "row"), [(key, row) for key, row in GOLDEN["supernet_totals"].items()], ids=lambda value: str(value)[:6]
)
def test_supernet_totals(key, row):
    minimum, maximum = map(float, key.split("-"))
    assert size_supernet(minimum, maximum) == (tuple(row["sta_num"]), row["resolution"])
    with torch.device("meta"):
        ours = build_network(request("cream_supernet", flops_minimum=minimum, flops_maximum=maximum))
        as_published = build_network(request("cream_supernet", sta_num=tuple(row["blocks_built"][1:-1])))
    assert [len(stage) for stage in ours.blocks] == [1, *row["sta_num"], 1]
    assert sum(p.numel() for p in as_published.parameters()) == row["params"]


def test_default_supernet_has_no_dead_block():
    with torch.device("meta"):
        supernet = build_network(request("cream_supernet"))
        widest = build_network(request("cream_supernet", sta_num=(4, 4, 5, 4, 4)))
    assert sum(p.numel() for p in supernet.parameters()) == 28_845_913
    assert sum(p.numel() for p in supernet.meta_layer.parameters()) == 4001
    groups = {row["name"]: row for row in GOLDEN["supernet_optimizer_groups_0_600"]}
    weights = [(n, p) for n, p in widest.named_parameters() if not n.startswith("meta_layer")]
    spared = [p for n, p in weights if p.dim() == 1 or n.endswith("bias")]
    decayed = [p for n, p in weights if not (p.dim() == 1 or n.endswith("bias"))]
    for name, group in (("no_decay", spared), ("decay", decayed)):
        assert (len(group), sum(p.numel() for p in group)) == (groups[name]["tensors"], groups[name]["elements"])


def test_inactive_blocks_get_no_gradient_and_keep_their_statistics():
    supernet = tiny_supernet()
    before = {name: buffer.clone() for name, buffer in supernet.named_buffers()}
    supernet(torch.randn(4, 3, 12, 12), PATH).square().sum().backward()
    active = {id(p) for p in supernet.active_parameters(PATH)}
    for name, parameter in supernet.named_parameters():
        assert (parameter.grad is not None) == (id(parameter) in active), name
    moved = {name.rpartition(".")[0] for name, b in supernet.named_buffers() if not torch.equal(b, before[name])}
    norms = {
        name
        for name, module in supernet.named_modules()
        if isinstance(module, nn.BatchNorm2d) and id(module.weight) in active
    }
    assert moved == norms


def test_a_skipped_block_is_left_out():
    supernet = tiny_supernet().eval()
    images = torch.randn(2, 3, 12, 12)
    skipping = [[0], [1, 2], [0, -1, 1], [0]]
    for choice in supernet.blocks[2][1]:
        nn.init.zeros_(choice.bn3.weight)  # an identity, thanks to the shortcut
    assert torch.equal(supernet(images, skipping), supernet(images, PATH))
    assert len(supernet.active_parameters(skipping)) < len(supernet.active_parameters(PATH))


def test_default_path_decides_the_evaluation_and_travels_with_the_weights():
    supernet = tiny_supernet().eval()
    images = torch.randn(2, 3, 12, 12)
    assert supernet.default_path == [[0], [0, 0], [0, 0, 0], [0]]
    supernet.default_path = PATH
    assert torch.equal(supernet(images), supernet(images, PATH))
    assert not torch.equal(supernet(images), supernet(images, [[0], [0, 0], [0, 0, 0], [0]]))
    composed = supernet.classify(supernet.forward_features(images)[1])
    assert torch.equal(composed, supernet(images))
    other = Supernet(TINY, (2, 3), 5, slice_size=2).eval()
    other.load_state_dict(supernet.state_dict(), strict=True)
    assert other.default_path == PATH
    assert torch.equal(other(images), supernet(images))
    names = supernet.unused_parameter_names()
    assert {"meta_layer.weight", "blocks.1.0.0.conv_pw.weight"} <= names
    assert not {"conv_stem.weight", "blocks.1.0.1.conv_pw.weight"} & names


@pytest.mark.parametrize(
    "path",
    [[[0], [1], [0, 2, 1], [0]], [[0], [1, 3], [0, 2, 1], [0]], [[0], [1, 2], [0]], [[0], [-1, 2], [0, 2, 1], [0]]],
)
def test_paths_that_do_not_fit_are_refused(path):
    supernet = tiny_supernet()
    with pytest.raises(UserError):
        supernet(torch.randn(2, 3, 12, 12), path)
    with pytest.raises(UserError):
        supernet.default_path = path


def test_supernet_options():
    small = build_network(request("cream_supernet", SMALL, num_classes=10, sta_num=(1, 2, 1, 1, 1), slice=3))
    assert (small.depths, small.slice_size, small.meta_layer.in_features) == ((1, 2, 1, 1, 1), 3, 30)
    assert small(torch.randn(2, 3, 32, 32)).shape == (2, 10)
    for options, fault in (
        ({"sta_num": (1, 2)}, "--sta_num"),
        ({"sta_num": (1, 2, 0, 1, 1)}, "--sta_num"),
        ({"flops_maximum": 1.0}, "--flops_minimum"),
        ({"slice": 0}, "--slice"),
    ):
        with pytest.raises(UserError, match=fault):
            build_network(request("cream_supernet", **options))
    with pytest.raises(UserError, match="--split_factor 2"):
        build_network(request("cream_supernet", split_factor=2))


def test_splitnet_of_a_supernet():
    network = build_splitnet(
        request("cream_supernet", SMALL, num_classes=5, search_space=space_to_text(TINY), sta_num=(2, 3)), seed=1
    )
    assert network(torch.randn(1, 2, 3, 12, 12)).shape == (1, 2, 5)
    assert {name.split(".")[2] for name in network.state_dict()} >= {"blocks", "meta_layer", "path"}


def test_option_defaults_are_the_published_ones():
    options = CreamOptions()
    assert (options.flops_minimum, options.flops_maximum, options.slice, options.dropout_rate) == (0.0, 600.0, 4, 0.0)
    assert PUBLISHED.operators == tuple(Operator(k, e) for k in (3, 5, 7) for e in (4, 6))

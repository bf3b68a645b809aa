"""Search space, operation counts and sizing against the published code's numbers."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from model import LARGE, BackboneRequest, build_network
from model.search.costs import Operator, div8, macs, ref_flops
from model.search.estimates import cost_table, est_flops, estimate, size_supernet
from model.search.reading import parse_arch_list, read_space, space_from_mapping, space_to_text
from model.search.space import PUBLISHED, PUBLISHED_SMALL, divided
from utils.errors import UserError
from utils.macs import count_macs

GOLDEN = json.loads((Path(__file__).parent / "golden" / "cream.json").read_text())
EXAMPLE = "[[0],[3],[3,3],[3,1,3],[3,3,3,3],[3,3,3],[0]]"


def stand_alone(arch, *, honour=False, num_classes=1000):
    request = BackboneRequest(
        arch="cream",
        num_classes=num_classes,
        shape=LARGE,
        dataset="imagenet",
        crop_size=224,
        options={"arch_list": json.dumps(arch), "honour_single_block": honour},
    )
    with torch.device("meta"):
        return build_network(request)


def test_div8():
    assert [div8(v) for v in (1, 11.9, 12, 16 / 2**0.5, 20, 24 / 2**0.5, 36, 100, 1280 / 2**0.5)] == [
        8, 16, 16, 16, 24, 16, 40, 104, 904,
    ]  # fmt: skip


@pytest.mark.parametrize("row", GOLDEN["released"], ids=lambda row: row["name"])
def test_released_counts(row):
    with torch.device("meta"):
        network = build_network(
            BackboneRequest(arch=f"cream_{row['selection']}", num_classes=1000, shape=LARGE, dataset="imagenet")
        )
    assert macs(network, row["resolution"]) == row["macs"]
    assert ref_flops(network, row["resolution"]) == row["ref_flops"]
    assert network.plan.cost(224).params == row["params"] == sum(p.numel() for p in network.parameters())
    blocks = [[[b.kernel, b.expansion, b.stride, b.out_channels] for b in stage] for stage in network.plan.stages]
    assert blocks == row["blocks_k_e_s_c"]

    honoured = stand_alone(row["arch"], honour=True)
    expected = row["if_single_block_choice_were_honoured"]
    assert macs(honoured, row["resolution"]) == expected["macs"]
    assert ref_flops(honoured, row["resolution"]) == expected["ref_flops"]
    assert honoured.plan.cost(1).params == expected["params"]


@pytest.mark.parametrize("row", GOLDEN["random_archs"]["items"], ids=lambda row: json.dumps(row["arch"]))
def test_random_archs(row):
    assert est_flops(row["arch"]) == round(row["est_flops_M"] * 1e6)
    assert estimate(row["arch"], PUBLISHED).params == round(row["est_params_M"] * 1e6)
    network = stand_alone(row["arch"])
    assert sum(p.numel() for p in network.parameters()) == row["childnet_params"]
    assert macs(network, 224) == row["childnet_macs_224"] == count_macs(network, (3, 224, 224))
    assert ref_flops(network, 224) == row["childnet_ref_flops_224"]
    honoured = stand_alone(row["arch"], honour=True)
    assert honoured.plan.cost(224).params == row["params_if_choice_honoured"]
    assert macs(honoured, 224) == row["macs_224_if_choice_honoured"]
    assert ref_flops(honoured, 224) - est_flops(row["arch"]) == 1_682_408
    assert honoured.plan.cost(224).params - estimate(row["arch"], PUBLISHED).params == 1_281_032


def test_cost_table():
    golden, table = GOLDEN["estimator"], cost_table()
    assert (table.fixed.ref_flops, table.fixed.params) == (golden["fixed_flops"], golden["fixed_params"])
    assert (table.base.ref_flops, table.base.params) == tuple(golden["stage0"].values())
    assert (table.tail.ref_flops, table.tail.params) == tuple(golden["stage6"].values())
    assert len(golden["stages"]) == 5
    for row, first, later in zip(golden["stages"], table.first, table.later, strict=True):
        for kind, costs in (("first", first), ("later", later)):
            assert [cost.ref_flops for cost in costs] == row[kind]["flops"]
            assert [cost.params for cost in costs] == row[kind]["params"]
    for choice, key in ((0, "all_choice0_4x5"), (5, "all_choice5_4x5")):
        assert est_flops([[0], *[[choice] * 4] * 5, [0]]) == golden[key]


@pytest.mark.parametrize("space", [PUBLISHED, PUBLISHED_SMALL], ids=["large", "small"])
@pytest.mark.parametrize("resolution", [33, 64, 97])
def test_counts_match_a_tracing_counter_at_any_size(space, resolution):
    arch = parse_arch_list(EXAMPLE)
    shape = "large" if space is PUBLISHED else "small"
    with torch.device("meta"):
        network = build_network(BackboneRequest(arch="cream_287", num_classes=10, shape=shape))
    assert network.plan == space.plan(arch, 10)
    assert macs(network, resolution) == count_macs(network, (3, resolution, resolution))


def test_a_skipped_block_costs_nothing():
    full, skipped = parse_arch_list(EXAMPLE), [[0], [3], [3, 3], [3, -1, 3], [3, 3, 3, 3], [3, 3, 3], [0]]
    assert est_flops(full) - est_flops(skipped) == cost_table().later[2][1].ref_flops
    assert estimate(full, PUBLISHED).params - estimate(skipped, PUBLISHED).params == cost_table().later[2][1].params
    with pytest.raises(UserError, match="-1 in stage 1"):
        est_flops([[0], [-1], [3, 3], [3, 1, 3], [3, 3, 3, 3], [3, 3, 3], [0]])


@pytest.mark.parametrize("row", GOLDEN["supernet_sizing"], ids=lambda r: f"{r['flops_minimum']}-{r['flops_maximum']}")
def test_sizing(row):
    interval = (row["flops_minimum"], row["flops_maximum"])
    if row["sta_num"] is None:
        with pytest.raises(UserError, match=r"--flops_minimum .* --flops_maximum"):
            size_supernet(*interval)
    else:
        assert size_supernet(*interval) == (tuple(row["sta_num"]), row["resolution"])


@pytest.mark.parametrize(
    ("interval", "expected"),
    [
        ((0, 65.148928), ((1, 1, 1, 1, 1), 224)),
        ((0, 65.148927), ((1, 1, 1, 1, 1), 192)),
        ((0, 141.29648), ((1, 1, 2, 1, 1), 224)),
        ((0, 141.296479), ((1, 1, 1, 1, 1), 224)),
        ((121.01608, 121.01608), ((1, 1, 1, 1, 1), 224)),
        ((121.0161, 130), ((1, 1, 2, 1, 1), 224)),
    ],
)
def test_sizing_compares_strictly(interval, expected):
    assert size_supernet(*interval) == expected


def test_an_interval_the_wrong_way_round_is_refused():
    with pytest.raises(UserError, match="--flops_minimum 300 --flops_maximum 200"):
        size_supernet(300, 200)


@pytest.mark.parametrize("interval", [(float("nan"), 600), (0, float("nan"))])
def test_what_is_no_number_is_no_interval(interval):
    with pytest.raises(UserError, match=r"--flops_minimum .* --flops_maximum"):
        size_supernet(*interval)


def test_sizing_of_another_space_steps_by_its_own_stride():
    full = size_supernet(0, 600, PUBLISHED_SMALL)
    assert full == ((4, 4, 4, 4, 4), 32)
    lowest = sum(min(cost.ref_flops for cost in costs) for costs in cost_table(PUBLISHED_SMALL).first) / 1e6
    assert size_supernet(0, lowest * 0.9, PUBLISHED_SMALL) == ((1, 1, 1, 1, 1), 24)


@pytest.mark.parametrize("resolution", [28, 10, 6])
def test_a_resolution_that_is_no_multiple_of_the_stride_is_kept(resolution):
    space = dataclasses.replace(PUBLISHED_SMALL, resolution=resolution)
    assert space.total_stride == 8
    assert size_supernet(0, 600, space).resolution == resolution
    assert size_supernet(0, 600, dataclasses.replace(PUBLISHED, resolution=100)).resolution == 100
    lowest = sum(min(cost.ref_flops for cost in costs) for costs in cost_table(space).first) / 1e6
    if resolution == 28:
        assert size_supernet(0, lowest * 0.9, space).resolution == 16


@given(st.floats(0, 700), st.floats(0, 700))
def test_sizing_keeps_the_dearest_path_below_the_maximum_where_the_minimum_allows(low, high):
    low, high = min(low, high), max(low, high)
    try:
        depths, resolution = size_supernet(low, high)
    except UserError:
        return
    assert resolution in range(64, 225, 32)
    assert all(1 <= depth <= 4 for depth in depths)
    dearest = sum(
        first[5].ref_flops + (depth - 1) * later[5].ref_flops
        for depth, first, later in zip(depths, cost_table().first, cost_table().later, strict=True)
    )
    if resolution == 224 and depths != (1, 1, 1, 1, 1):
        assert dearest / 1e6 <= high or dearest / 1e6 >= low


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("[[0],[3],[3],[3],[3],[3]]", "expected 7 inner lists"),
        ("[[1],[3],[3],[3],[3],[3],[0]]", "must be"),
        ("[[0],[3],[3],[3],[3],[3],[0,0]]", "must be"),
        ("[[0],[3],[],[3],[3],[3],[0]]", "stage 2 is empty"),
        ("[[0],[3],[6],[3],[3],[3],[0]]", "6 in stage 2.* 0 to 5"),
        ("[[0],[3],[3,-1],[3],[3],[3],[0]]", "-1 in stage 2"),
        ("[[0],[3],[1.5],[3],[3],[3],[0]]", "whole numbers"),
        ("[[0],[3],[true],[3],[3],[3],[0]]", "whole numbers"),
        ("[0,3]", "whole numbers"),
        ("3", "whole numbers"),
        ("[[0],[3", "whole numbers"),
        ('["0","3"]', "whole numbers"),
        ({"a": 1}, "whole numbers"),
    ],
)
def test_wrong_arch_lists_are_refused(text, fault):
    with pytest.raises(UserError, match=fault) as error:
        parse_arch_list(text)
    assert str(error.value).startswith("--arch_list")
    assert "\n" not in str(error.value)


def test_arch_list_as_text_or_lists():
    assert parse_arch_list(EXAMPLE) == parse_arch_list(json.loads(EXAMPLE)) == parse_arch_list(f" {EXAMPLE} ")


def test_spaces_survive_text(tmp_path):
    for space in (PUBLISHED, PUBLISHED_SMALL, dataclasses.replace(PUBLISHED, operators=(Operator(9, 1),))):
        assert read_space(space_to_text(space)) == space
        (tmp_path / "space.yaml").write_text(space_to_text(space))
        assert read_space(str(tmp_path / "space.yaml")) == space
    without = dataclasses.replace(
        PUBLISHED, stages=tuple(dataclasses.replace(s, template=None) for s in PUBLISHED.stages)
    )
    assert read_space(space_to_text(without)) == without
    assert without.plan(parse_arch_list(EXAMPLE), 10) == PUBLISHED.plan(
        parse_arch_list(EXAMPLE), 10, honour_single_block=True
    )


def changed(**values):
    return {**json.loads(space_to_text(PUBLISHED)), **values}


@pytest.mark.parametrize(
    ("mapping", "fault"),
    [
        (changed(stem_chanels=16), "'stem_chanels' is not a key .* Did you mean 'stem_channels'"),
        ({k: v for k, v in changed().items() if k != "operators"}, "lacks operators"),
        (changed(operators=[]), "operators and stages.*needed"),
        (changed(operators=[[4, 6]]), "kernels must be odd"),
        (changed(operators=[3]), "form of a search space"),
        (changed(operators=[[3.7, 6]]), r"3\.7.*must be whole"),
        (changed(operators=[[3, True]]), "True.*must be whole"),
        (changed(resolution=32.5), r"32\.5.*must be whole"),
        (changed(stages=[{"channels": 24, "stride": 2, "template": [4, 6]}], deepening=[]), "kernels must be odd"),
        (changed(stages=[{"channels": 24, "stride": 2, "template": ["a", 6]}], deepening=[]), "'a': every number"),
        (changed(stages=[{"channels": 24}]), "stride"),
        (changed(stages=[{"channels": 24, "stride": 2, "depth": 3}]), "depth"),
        (changed(stages=[{"channels": 0, "stride": 2}], deepening=[]), "at least 1"),
        (changed(stem_stride="two"), "two"),
        (changed(deepening=[[6, 2]]), "beyond the 5"),
    ],
)
def test_wrong_spaces_are_refused(mapping, fault):
    with pytest.raises(UserError, match=fault) as error:
        space_from_mapping(mapping, "--search_space x.yaml")
    assert str(error.value).startswith("--search_space x.yaml: ")


def test_unreadable_spaces_are_refused(tmp_path):
    (tmp_path / "list.yaml").write_text("[1, 2]")
    (tmp_path / "broken.yaml").write_text("{a: [")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00\x01")
    for name, fault in (("list", "found list"), ("broken", "not valid YAML"), ("binary", "not valid YAML")):
        with pytest.raises(UserError, match=fault):
            read_space(str(tmp_path / f"{name}.yaml"))
    with pytest.raises(UserError, match="cannot be read"):
        read_space(str(tmp_path / "missing.yaml"))


@pytest.mark.parametrize("split_factor", [2, 4])
@pytest.mark.parametrize("space", [PUBLISHED, PUBLISHED_SMALL])
def test_division_keeps_the_parameters_and_the_rounding(space, split_factor):
    arch = tuple(map(tuple, parse_arch_list("[[0],[3],[3,3],[3,1,3],[3,3,3,3],[3,3,3],[0]]")))
    assert divided(space, arch, 1, 10) is space
    part = divided(space, arch, split_factor, 10)
    assert all(width % 8 == 0 and 8 <= width <= whole for width, whole in zip(part.widths, space.widths, strict=True))
    assert part.base_channels == part.stem_channels
    whole, one = (which.plan(arch, 10).cost(64).params for which in (space, part))
    assert split_factor * one == pytest.approx(whole, rel=0.02)
    assert (part.operators, part.resolution) == (space.operators, space.resolution)
    assert [stage.template for stage in part.stages] == [stage.template for stage in space.stages]
    assert space.with_widths(space.widths) == space

"""Equal budgets: counts by stage widths are those of built networks, solved widths meet both, and runs keep them."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import train_split
from model import BackboneRequest, build_network, build_splitnet
from model.budget import BUDGETS, budget_widths, deployed_counter
from model.division.__main__ import main as show_plan
from model.division.resizing import followed, plan_by_channels
from model.division.solver import TOLERANCE, solve_both
from model.heads import peer_branches, synergy_branches
from model.registry import ARGUMENTS, ASKED, MemberForm, request_of
from model.restore import restore_splitnet
from model.staged import staged_parts
from record.checkpoint import load_checkpoint
from utils.errors import UserError
from utils.macs import count_macs, count_params

FORMS: dict[str, dict[str, Any]] = {
    "mimo": {},
    "batch_ensemble": {"norm": "shared", "init": -0.5},
    "mc_dropout": {"place": "stages", "rate": 0.1, "mask_seed": 1},
    "gated": {"branches": 3},
    "packed": {"alpha": "auto", "gamma": 2, "min_channels": 8},
}


def request(arch: str = "resnet20", **changes: Any) -> BackboneRequest:
    return BackboneRequest(**{"arch": arch, "num_classes": 10, "dataset": "cifar10", "crop_size": 32} | changes)


def sizes(of: BackboneRequest, networks: int = 1) -> tuple[int, int]:
    """Parameters and multiply-adds of what a request builds, counted from the modules."""
    with torch.device("meta"):
        network = build_splitnet(replace(of, split_factor=networks), seed=0)
    return count_params(network), count_macs(network, (3, of.crop_size, of.crop_size))


@pytest.mark.parametrize("arch", ["resnet20", "wide_resnet16_2", "torchvision/resnet18"])
@pytest.mark.parametrize("kind", [None, *FORMS])
def test_counts_by_stage_widths_are_those_of_the_modules(arch: str, kind: str | None) -> None:
    form = None if kind is None else MemberForm(kind=kind, members=3, numbers=FORMS[kind])
    graph, deployed = deployed_counter(request(arch, form=form), 3)
    assert len(graph.widths) > 2
    smaller = tuple(
        max(unit, width * 3 // 4 // unit * unit) for width, unit in zip(graph.widths, graph.units, strict=True)
    )
    for widths in (graph.widths, smaller):
        built = request(arch, form=form, widths=tuple(map(float, widths)))
        assert sizes(built, 3 if form is None else 1) == deployed(widths)
    if form is None:
        assert tuple(size // 3 for size in deployed(graph.widths)) == sizes(request(arch))


@pytest.mark.parametrize("place", ["classifier", "own"])
def test_dropout_elsewhere_is_counted_where_it_begins(place: str) -> None:
    arch = "torchvision/vgg11" if place == "own" else "resnet20"
    form = MemberForm(kind="mc_dropout", members=3, numbers=FORMS["mc_dropout"] | {"place": place})
    graph, deployed = deployed_counter(request(arch, form=form), 1)
    assert sizes(request(arch, form=form)) == deployed(graph.widths)


@pytest.mark.parametrize(("arch", "count"), [("resnet20", 4), ("wide_resnet16_4", 2), ("torchvision/resnet18", 4)])
def test_several_networks_meet_parameters_and_macs_at_once(arch: str, count: int) -> None:
    budgets = sizes(request(arch))
    widths = budget_widths(request(arch), count, "both", budgets)
    assert widths is not None
    found = sizes(request(arch, widths=tuple(map(float, widths))), count)
    assert all(abs(size / budget - 1) <= TOLERANCE for size, budget in zip(found, budgets, strict=True))


def test_one_of_the_two_is_met_where_only_one_can_be() -> None:
    """Four members of one network make four times the MACs of its parameters."""
    form = MemberForm(kind="batch_ensemble", members=4, numbers=FORMS["batch_ensemble"])
    budgets = sizes(request())
    ratios = {}
    for of in BUDGETS:
        widths = budget_widths(request(form=form), 1, of, budgets)
        assert widths is not None
        found = sizes(request(form=form, widths=tuple(map(float, widths))))
        ratios[of] = [size / budget for size, budget in zip(found, budgets, strict=True)]
    assert ratios["params"][0] == pytest.approx(1, abs=TOLERANCE)
    assert ratios["params"][1] > 3.5
    assert ratios["macs"][1] == pytest.approx(1, abs=TOLERANCE)
    assert ratios["macs"][0] < 0.4
    params, macs = ratios["both"]
    assert 1 - params == pytest.approx(macs - 1, abs=0.05), "the larger deviation is as small as it can be"
    assert budget_widths(request(), 1, "both", budgets) is None


def test_both_is_the_larger_of_two_deviations() -> None:
    """Cost one grows with the first stage, cost two with the second; both halves are met at once."""
    found = solve_both((64, 64), (1, 1), lambda w: (w[0] * 100, w[1] * 10), (3200, 320))
    assert found == (32, 32)
    skewed = solve_both((64, 64), (1, 1), lambda w: (w[0] * 100 + w[1], w[0] + w[1] * 10), (3200, 160))
    costs = (skewed[0] * 100 + skewed[1], skewed[0] + skewed[1] * 10)
    assert max(abs(costs[0] / 3200 - 1), abs(costs[1] / 160 - 1)) <= TOLERANCE


def test_full_widths_are_the_network_itself() -> None:
    _, graph = followed(request())
    with torch.random.fork_rng():
        torch.manual_seed(3)
        plain = build_network(request())
        torch.manual_seed(3)
        same = build_network(request(widths=tuple(map(float, graph.widths))))
    for name, value in plain.state_dict().items():
        assert torch.equal(same.state_dict()[name], value), name


def test_dropout_is_divided_with_the_network() -> None:
    plain, divided = (
        build_network(request("wide_resnet40_10", split_factor=count, widths=widths))
        for count, widths in ((1, None), (4, (16.0, 40.0, 80.0, 160.0)))
    )
    rates = [[m.p for m in one.modules() if isinstance(m, nn.Dropout)] for one in (plain, divided)]
    assert rates == [[0.1], [0.05]]


def test_copies_of_parts_have_the_widths_of_the_network() -> None:
    """What hangs beside a network, such as the branches of `one`, is built anew; a branch twice as wide cannot be."""
    network = build_network(request(widths=(8.0, 16.0, 40.0)))
    parts = staged_parts(network)
    assert parts is not None
    images: Tensor = torch.randn(2, 3, 32, 32)
    taps, _ = parts.forward_features(images)
    (branch,) = peer_branches(parts, 1)
    assert branch(taps[-2])[1].shape == (2, 10)
    wide = build_network(request("wrn_16_1", widths=(8.0, 16.0, 32.0)))
    wide_parts = staged_parts(wide)
    assert wide_parts is not None
    with pytest.raises(UserError, match=r"--stage_widths: .*dks"):
        synergy_branches(wide_parts)


def test_wrong_widths_are_named() -> None:
    for widths in ((8.0, 16.0), (8.0, 16.0, 1000.0)):
        with pytest.raises(UserError, match=r"--arch resnet20.*--stage_widths"):
            build_network(request(widths=widths))
    with pytest.raises(UserError, match="--stage_widths: --arch pyramidnet164"):
        build_network(request("pyramidnet164", widths=(8.0,) * len(followed(request("pyramidnet164"))[1].widths)))
    with pytest.raises(UserError, match="--stage_widths are those of one backbone"):
        build_splitnet(request(widths=(8.0, 16.0, 32.0)), seed=0, archs=["resnet20", "wrn_16_1"])


@pytest.mark.slow
def test_widths_of_a_network_that_divides_through_arguments() -> None:
    """They are the plan's numbers, in its order."""
    pytest.importorskip("timm")
    asked = request("timm/deit_tiny_patch16_224", split_factor=2, crop_size=32, divide_by=None)
    plan = request_of(build_network(asked))
    assert plan.way == ARGUMENTS
    given = build_network(replace(asked, widths=plan.widths, way=ASKED))
    assert request_of(given).width_names == plan.width_names
    assert count_params(given) == count_params(build_network(asked))
    with pytest.raises(UserError, match=r"--stage_widths names 1"):
        build_network(replace(asked, widths=(3.0,), way=ASKED))


def test_the_command_shows_what_stage_widths_takes(capsys: pytest.CaptureFixture[str]) -> None:
    assert show_plan(["resnet20", "--split_factor", "4", "--by_channels", "--num_classes", "10"]) == 0
    text = capsys.readouterr().out
    plan = plan_by_channels(request(split_factor=4), "both")
    assert text == plan.table() + "\n"
    assert "divided by 4 (both)" in text
    assert show_plan(["resnet20", "--divide_by", "both"]) == 2
    assert "--by_channels" in capsys.readouterr().err


def test_channels_that_cannot_be_followed_are_refused_in_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("timm")
    assert show_plan(["timm/pit_ti_224", "--by_channels"]) == 2
    assert "--arch timm/pit_ti_224 cannot be divided: its channels cannot be followed" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags",
    ["--method co_training --split_factor 2", "--method snapshot --num_members 2", "--method mimo --num_members 2"],
)
def test_a_run_keeps_its_widths(flags: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A divided network, snapshots and members alike; and what was saved is built again from the checkpoint alone."""
    common = "--dataset digits --arch resnet20 --stage_widths 6,12,20 --batch_size 32 --workers 0 --seed 1"
    where = ["--no_cuda", "--model_dir", str(tmp_path)]
    assert train_split.main([*common.split(), *flags.split(), *where, "--max_steps", "2"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    network, info = restore_splitnet(load_checkpoint(next(tmp_path.glob("checkpoint_*"))), source="it")
    assert info.request.widths == (6.0, 12.0, 20.0)
    assert {layer.out_channels for layer in network.modules() if isinstance(layer, nn.Conv2d)} == {6, 12, 20}
    assert count_params(network) == result["params_total"]
    assert train_split.main([*common.split(), *flags.split(), *where, "--resume", "auto", "--max_steps", "3"]) == 0

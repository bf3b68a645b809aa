"""Packed networks: golden shapes and sizes, members that nothing crosses, loop and stack, checkpoints and runs."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import eval as evaluation
import train_split
from method import Progress, methods
from model import LARGE, BackboneRequest, build_network, build_splitnet
from model.packed import further_groups, member_channels, packed_widths
from model.registry import MemberForm
from model.restore import restore_splitnet
from parser_params import parse_config, resolve_config
from tests.rivals import GOLDEN, assert_record, every_precision, fill
from utils.errors import UserError
from utils.macs import count_macs, count_params
from utils.targets import plain_targets

REQUEST = BackboneRequest(arch="resnet20", num_classes=10, dataset="digits", crop_size=16)
PLAIN = [row for row in GOLDEN["packed_networks"] if row["style"] == "imagenet"]


def packed(members: int = 3, *, request: BackboneRequest = REQUEST, seed: int = 0, **numbers: Any) -> Any:
    form = MemberForm(kind="packed", members=members, numbers={"alpha": "2", "gamma": 1, "min_channels": 64} | numbers)
    return build_splitnet(replace(request, form=form), seed=seed)


def views_of(count: int, size: int = 2) -> Tensor:
    return torch.randn(count, size, 3, 16, 16, generator=torch.Generator().manual_seed(1)).double()


@pytest.mark.parametrize("row", GOLDEN["packed_layer_shapes"])
def test_layers_have_the_shapes_of_the_golden_file(row: dict[str, Any]) -> None:
    members, groups = row["M"], row["groups"]
    outputs = member_channels(row["out"], row["alpha"] / members, groups)
    if row["first"]:
        assert [row["in"], members * outputs, 1] == row["ours_in_out_groups"]
        return
    inputs = member_channels(row["in"], row["alpha"] / members, groups)
    more = further_groups(inputs, outputs, groups, row["gamma"], row["min_channels"])
    assert [members * inputs, members * outputs, members * groups * more] == row["ours_in_out_groups"]


@pytest.mark.parametrize("row", PLAIN)
def test_networks_have_the_published_sizes(row: dict[str, Any]) -> None:
    request = BackboneRequest(
        arch=f"torchvision/resnet{row['resnet']}",
        num_classes=row["num_classes"],
        crop_size=row["crop"],
        dataset="imagenet",
        shape=LARGE,
    )
    with torch.device("meta"):
        network = packed(row["M"], request=request, alpha=str(row["alpha"]), gamma=row["gamma"])
    assert count_params(network) == row["params"]
    assert count_macs(network, (3, row["crop"], row["crop"])) == row["macs"]


@every_precision
@pytest.mark.parametrize("row", GOLDEN["packed_conv"])
def test_a_convolution_of_all_members_is_theirs_side_by_side(row: dict[str, Any], dtype: torch.dtype) -> None:
    """The published layer has the groups of all members; a member's own convolution is a part of it."""
    weight, x, bias = (fill(row[name], dtype) for name in ("weight", "input", "bias"))
    members = row["M"]
    groups = row["resolved_groups"] // members
    whole = F.conv2d(x, weight, bias, padding=1, groups=row["resolved_groups"])
    parts = zip(x.chunk(members, dim=1), weight.chunk(members), bias.chunk(members), strict=True)
    apart = torch.cat([F.conv2d(part, w, b, padding=1, groups=groups) for part, w, b in parts], dim=1)
    if list(whole.shape) == row["output"]["shape"]:
        assert_record(apart, row["output"])
        apart.backward(fill(row["grad_output"], dtype).detach())
        assert_record(weight.grad, row["grad_weight"])
        assert_record(x.grad, row["grad_input"])
    torch.testing.assert_close(apart, whole)


@pytest.mark.parametrize("row", GOLDEN["packed_linear_last"])
def test_a_classifier_has_the_logits_of_each_member(row: dict[str, Any]) -> None:
    weights = fill(row["weight_MKD"])
    biases = fill(row["bias_MK_flat"]).chunk(row["M"])
    parts = zip(fill(row["input"]).chunk(row["M"], dim=1), weights, biases, strict=True)
    assert_record(torch.stack([F.linear(*part) for part in parts]), row["logits_MBK"])


def test_members_are_networks_of_alpha_over_m() -> None:
    """Channels of every layer are the base network's times 2 / 4, and each has the initial values of its own code."""
    network = packed(4)
    base = build_network(REQUEST)
    for name, layer in base.named_modules():
        if isinstance(layer, nn.Conv2d):
            part = network.models[0].get_submodule(name)
            assert part.out_channels == layer.out_channels // 2
            expected = (2 / (part.out_channels * part.kernel_size[0] ** 2)) ** 0.5  # He-normal by outputs
            assert part.weight.std().item() == pytest.approx(expected, rel=0.3)
    firsts = [next(one.parameters()) for one in network.models]
    assert not torch.equal(firsts[0], firsts[1])


@pytest.mark.parametrize("gamma", [1, 2])
def test_loop_and_stack_agree_and_no_gradient_crosses_members(gamma: int) -> None:
    network = packed(3, alpha="3", gamma=gamma, min_channels=4).double().train()
    assert any(m.groups > 1 for m in network.models[0].modules() if isinstance(m, nn.Conv2d)) == (gamma > 1)
    found = {}
    for name in ("loop", "stacked"):
        network.execution = name
        network.zero_grad()
        logits = network(views_of(1))
        assert network.execution == name
        logits.square().sum().backward()
        found[name] = [logits.detach(), *(p.grad.clone() for p in network.parameters() if p.grad is not None)]
    for ours, theirs in zip(*found.values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)
    network.zero_grad()
    network(views_of(1))[1].sum().backward()
    crossed = {
        i for i, one in enumerate(network.models) for p in one.parameters() if p.grad is not None and p.grad.any()
    }
    assert crossed == {1}


@pytest.mark.parametrize(
    ("arch", "side"), [("resnet20", 32), ("wide_resnet16_4", 32), ("resnext29_8x64d", 32), ("efficientnetb0", 32)]
)
@pytest.mark.parametrize("divide_by", [None, "macs"])
def test_auto_meets_the_budget_of_the_backbone(arch: str, side: int, divide_by: str | None) -> None:
    request = replace(REQUEST, arch=arch, crop_size=side)
    widths = packed_widths(replace(request, divide_by=divide_by), members=4, alpha="auto", gamma=1, min_channels=64)
    with torch.device("meta"):
        base = build_network(request)
        form = MemberForm(kind="packed", members=4, numbers={"alpha": "auto", "gamma": 1, "min_channels": 64})
        network = build_splitnet(replace(request, form=form, widths=widths), seed=0)
    image = (3, side, side)
    sizes = (count_macs(network, image), count_macs(base, image))
    if divide_by is None:
        sizes = (count_params(network), count_params(base))
    assert sizes[0] / sizes[1] == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("arch", ["pyramidnet272", "senet154", "ShuffleNetV2_1x_cifar"])
def test_a_network_that_cannot_be_made_narrower_is_refused_by_name(arch: str) -> None:
    large = {"dataset": "imagenet", "shape": LARGE, "crop_size": 64} if arch == "senet154" else {"crop_size": 32}
    with pytest.raises(UserError, match=arch), torch.device("meta"):
        packed(4, request=replace(REQUEST, arch=arch, **large))


def test_one_whole_member_is_ordinary_training() -> None:
    kind, plain = methods.get("packed"), methods.get("independent")
    method = kind(packed(1, alpha="1"), kind.Options(num_members=1)).double().train()
    alone = plain(build_splitnet(REQUEST, seed=0), plain.Options()).double().train()
    targets = plain_targets(torch.tensor([3, 7]))
    progress = Progress(0, 0, 0, 10, 2, 0.1, torch.arange(2))
    outputs = [one(views_of(1), targets, progress) for one in (method, alone)]
    assert torch.equal(outputs[0].loss, outputs[1].loss)
    for output in outputs:
        output.loss.backward()
    for ours, theirs in zip(method.parameters(), alone.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)


def test_a_checkpoint_says_what_its_members_are() -> None:
    network = packed(3, seed=4).eval()
    own = network.models[0].request
    content = {
        "state_dict": network.state_dict(),
        "config": {"arch": "resnet20", "dataset": "digits", "crop_size": 16},
        "form": own.form.as_dict(),
        "widths": list(own.widths),
        "classes": list("0123456789"),
    }
    restored, info = restore_splitnet(content)
    assert (info.num_networks, info.num_classes) == (3, 10)
    images = views_of(1)[0].float()
    assert torch.equal(restored(images), network(images))


def test_flags() -> None:
    words = ["--method", "packed", "--dataset", "cifar10", "--arch", "resnet20"]
    config = resolve_config(parse_config(words), data_recipe="cifar10")
    expected = {"epochs": 200, "lr_milestones": (60, 120, 160), "lr_step_multiplier": 0.2, "is_nesterov": True}
    assert {flag: getattr(config, flag) for flag in expected} == expected
    assert not config.is_diff_data_train
    assert resolve_config(parse_config([*words, "--packed_views", "1"]), data_recipe="cifar10").is_diff_data_train
    for flags, said in (
        (["--packed_alpha", "0"], "--packed_alpha 0: expected auto, or a number above 0"),
        (["--packed_alpha", "nan"], "--packed_alpha nan"),
        (["--packed_gamma", "0"], "--packed_gamma must be"),
        (["--split_factor", "2"], "--split_factor 2: --method packed divides nothing"),
    ):
        with pytest.raises(UserError, match=said):
            parse_config([*words, *flags])


def test_a_run_resumes_and_eval_finds_its_members(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], logging_restored: None
) -> None:
    run = tmp_path / "run"
    argv = ["--method", "packed", "--num_members", "2", "--dataset", "digits", "--arch", "resnet20", "--no_cuda"]
    argv += ["--amp_dtype", "fp32", "--batch_size", "32", "--seed", "1", "--model_dir", str(run)]
    assert train_split.main([*argv, "--max_steps", "1"]) == 0
    capsys.readouterr()
    assert train_split.main([*argv, "--max_steps", "2", "--resume", "auto"]) == 0
    results = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert results["split_factor"] == 2
    assert results["params_total"] == pytest.approx(count_params(build_network(REQUEST)), rel=0.02)
    assert evaluation.main(["--resume", str(run / "checkpoint_0_2.pth.tar"), "--no_cuda", "--workers", "0"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["ensemble_acc1"] == pytest.approx(results["ensemble_acc1"])

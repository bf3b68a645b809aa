"""BatchEnsemble, MIMO and Monte-Carlo dropout as methods: losses, orders, decay and rates, runs."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import eval as evaluation
import train_split
from dataset.sampler import shard
from method import Progress, methods
from model import BackboneRequest, build_splitnet
from parser_params import parse_config, resolve_config
from record.checkpoint import load_checkpoint
from tests.processes import run_processes
from tests.rivals import GOLDEN, assert_number, assert_record, fill
from training.optim import parameter_groups
from training.options import OptimizerOptions
from utils.errors import UserError
from utils.targets import Targets, plain_targets

REQUEST = BackboneRequest(arch="resnet20", num_classes=10, dataset="digits", crop_size=16)
KINDS = ("batch_ensemble", "mimo", "mc_dropout")


def make(name: str, **options: Any) -> Any:
    kind = methods.get(name)
    options = kind.Options(**options)
    request = replace(REQUEST, form=kind.member_form(options, REQUEST, 3))
    method = kind(build_splitnet(request, seed=0), options)
    method.prepare(torch.zeros(1, dtype=torch.int64), 3)
    return method.train()


def step(method: Any, views: Tensor, targets: Targets, number: int = 0) -> Any:
    progress = Progress(0, number, number, 10, 2, 0.1, torch.arange(len(targets.labels_B)))
    method.before_step(views, targets, progress)
    return method(views, targets, progress)


def batch(views: int = 1, size: int = 8) -> tuple[Tensor, Targets]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(views, size, 3, 16, 16, generator=generator), plain_targets(torch.arange(size) % 10)


@pytest.mark.parametrize("row", GOLDEN["ensemble"])
def test_the_mean_of_probabilities_is_that_of_the_golden_file(row: dict[str, Any]) -> None:
    logits, labels = fill(row["logits_MBK"]).detach(), torch.tensor(row["labels"])
    method = make("batch_ensemble", num_members=len(logits))
    for rule, key in (("sum", "loss_sum_over_members"), ("mean", "loss_mean_over_members")):
        method.network.forward = lambda views: logits
        method.options = replace(method.options, member_loss=rule)
        assert_number(step(method, torch.zeros(1, len(labels), 3, 4, 4), plain_targets(labels)).loss, row[key])
    probabilities = logits.softmax(dim=-1).mean(dim=0)
    assert_record(probabilities, row["probabilities"])


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("batch_ensemble", {"be_init": 0.0}),
        ("mimo", {"mimo_batch_repetition": 1}),
        ("mc_dropout", {"mc_dropout_rate": 0.0}),
    ],
)
def test_one_member_is_ordinary_training(name: str, options: dict[str, Any]) -> None:
    method = make(name, num_members=1, **options).double()
    alone = methods.get("independent")
    plain = alone(build_splitnet(REQUEST, seed=0), alone.Options()).double().train()
    views, targets = batch()
    outputs = [step(one, views.double(), targets) for one in (method, plain)]
    torch.testing.assert_close(outputs[0].loss, outputs[1].loss, rtol=1e-12, atol=1e-12)
    for output in outputs:
        output.loss.backward()
    ours = {n.replace(".layer.", "."): p.grad for n, p in method.network.named_parameters()}
    for parameter_name, parameter in plain.network.named_parameters():
        found = ours[parameter_name].reshape(parameter.shape)
        torch.testing.assert_close(found, parameter.grad, rtol=1e-10, atol=1e-12)


def test_views_and_parts_reach_the_members() -> None:
    views, targets = batch(4)
    for options in ({}, {"be_norm": "member"}):
        whole = make("batch_ensemble", be_init=0.0, **options)
        assert step(whole, views, targets).logits_SBK.shape == (4, 8, 10)
    split = make("batch_ensemble", be_init=0.0, be_batch="split").eval()
    plain = build_splitnet(REQUEST, seed=0).eval()
    one_view, _ = batch()
    output = step(split, one_view, targets)
    torch.testing.assert_close(output.logits_SBK, plain(one_view).detach().expand(4, -1, -1))
    with pytest.raises(UserError, match="--be_batch split: a batch of 6 images has not 4 equal parts"):
        step(split, *batch(size=6))


def test_mimo_orders_follow_seed_and_step_and_its_logits_are_the_images() -> None:
    method, again = make("mimo"), make("mimo")
    views, targets = batch()
    first = step(method, views, targets, 5)
    assert torch.equal(first.loss, step(again, views, targets, 5).loss)
    orders = method._orders_MN.clone()
    step(method, views, targets, 6)
    assert not torch.equal(orders, method._orders_MN)
    same = make("mimo", mimo_input_repetition=1.0)
    step(same, views, targets)
    assert (same._orders_MN == same._orders_MN[0]).all()
    # all members see one image in each row, so a row's logits are those of the image
    same.eval()
    shown = step(same, views, targets).logits_SBK
    torch.testing.assert_close(shown, same.network(views[0]).detach(), rtol=1e-4, atol=1e-5)


def _shares_of_a_step(rank: int, world_size: int) -> dict[str, Tensor]:
    """A step of mimo on this process's part of seven mixed images, each member on a view of its own; norms as stored.

    Returns:
        loss and gradient, weighted by the part, and the logits of its images.
    """
    method = make("mimo", num_members=2, mimo_batch_repetition=2, mimo_input_repetition=0.3).eval()
    views, targets = batch(2, 7)
    part = shard(7, rank, world_size)
    labels_B, others_B = targets.labels_B[part], targets.labels_B.flip(0)[part]
    counts_W = tuple(len(range(7)[shard(7, other, world_size)]) for other in range(world_size))
    progress = Progress(0, 4, 4, 10, 2, 0.1, torch.arange(len(labels_B)), counts_W=counts_W)
    mixed = Targets(labels_B, others_B, torch.tensor(0.3))
    method.before_step(views[:, part], mixed, progress)
    output = method(views[:, part], mixed, progress)
    (output.loss * len(labels_B) / 7).backward()
    gradient = torch.cat([parameter.grad.flatten() for parameter in method.parameters()])
    return {"loss": output.loss.detach() * len(labels_B) / 7, "gradient": gradient, "logits": output.logits_SBK}


def test_the_orders_of_mimo_do_not_depend_on_the_number_of_processes(tmp_path: Path) -> None:
    whole = _shares_of_a_step(0, 1)
    parts = run_processes(2, _shares_of_a_step, tmp_path)
    for key in ("loss", "gradient"):
        torch.testing.assert_close(parts[0][key] + parts[1][key], whole[key])
    torch.testing.assert_close(torch.cat([part["logits"] for part in parts], dim=1), whole["logits"])


def test_the_factors_take_no_decay_and_a_rate_of_their_own() -> None:
    method = make("batch_ensemble")
    options = OptimizerOptions(weight_decay=1e-3, is_wd_all=True)
    groups = parameter_groups(
        method,
        method.trained_parameters(),
        options,
        factors=method.rate_factors(),
        undecayed=method.undecayed_parameters(),
    )
    fast = {id(p) for p in method.network.fast_parameters().values()}
    for group in groups:
        for parameter in group["params"]:
            expected = (0.0, 0.5) if id(parameter) in fast else (1e-3, 1.0)
            assert (group["weight_decay"], group["lr_multiplier"]) == expected


@pytest.mark.parametrize("name", KINDS)
def test_flags(name: str) -> None:
    words = ["--method", name, "--dataset", "cifar10", "--arch", "resnet20"]
    config = resolve_config(parse_config([*words, "--num_estimators", "2"]), data_recipe="cifar10")
    assert config.method_options.num_members == 2
    assert config.is_ensembled_after_softmax
    for flags, said in (
        (["--split_factor", "2"], f"--split_factor 2: --method {name} divides nothing"),
        (["--arch", "resnet20,resnet32"], f"--method {name} takes one backbone"),
        (["--num_members", "0"], "--num_members must be"),
        (["--is_identical_init", "1"], f"--is_identical_init cannot go with --method {name}"),
    ):
        with pytest.raises(UserError, match=said):
            parse_config([*words, *flags])


@pytest.mark.parametrize(
    ("name", "data", "expected"),
    [
        ("batch_ensemble", "cifar10", {"epochs": 250, "lr_milestones": (100, 200, 225), "weight_decay": 6e-4}),
        ("batch_ensemble", "imagenet", {"epochs": 135, "lr_milestones": (45, 90, 120), "slow_start_epochs": 5}),
        ("mimo", "cifar10", {"epochs": 250, "lr_step_multiplier": 0.2, "is_nesterov": True, "slow_start_epochs": 1}),
        ("mimo", "imagenet", {"epochs": 150, "lr_milestones": (50, 100, 133), "weight_decay": 2e-4, "lr": 0.1}),
    ],
)
def test_recipes_are_the_published_ones(name: str, data: str, expected: dict[str, Any]) -> None:
    config = resolve_config(parse_config(["--method", name, "--dataset", data]), data_recipe=data)
    assert {flag: getattr(config, flag) for flag in expected} == expected


@pytest.mark.parametrize("name", KINDS)
def test_a_run_resumes_and_eval_finds_its_members(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], logging_restored: None
) -> None:
    run = tmp_path / "run"
    argv = ["--method", name, "--num_members", "2", "--dataset", "digits", "--arch", "resnet20", "--no_cuda"]
    argv += ["--amp_dtype", "fp32", "--batch_size", "32", "--seed", "1", "--model_dir", str(run)]
    assert train_split.main([*argv, "--max_steps", "1"]) == 0
    capsys.readouterr()
    assert train_split.main([*argv, "--max_steps", "2", "--resume", "auto"]) == 0
    results = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert results["split_factor"] == 2
    saved = load_checkpoint(run / "checkpoint_0_2.pth.tar")
    assert saved["form"]["members"] == 2
    assert evaluation.main(["--resume", str(run / "checkpoint_0_2.pth.tar"), "--no_cuda", "--workers", "0"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [row["acc1"] for row in found["networks"]] == pytest.approx(results["acc1"])
    assert found["ensemble_acc1"] == pytest.approx(results["ensemble_acc1"])

"""--one_deploy gated: branches and gate belong to the network that is evaluated, counted, saved and exported."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import eval as evaluation
import train_split
from evaluation.export import load_exported
from evaluation.exporting import main as export
from method import Progress, methods
from method.costs import training_params
from model import BackboneRequest, build_network, build_splitnet
from model.members import GatedNet
from model.restore import restore_splitnet
from record.checkpoint import load_checkpoint
from record.run_folder import read_results
from utils.errors import UserError
from utils.macs import count_macs, count_params
from utils.targets import plain_targets

REQUEST = BackboneRequest(arch="resnet20", num_classes=10, dataset="digits", crop_size=16)
BASE = "--dataset digits --arch resnet20 --method one --one_deploy gated --batch_size 96 --workers 0 --seed 1 --no_cuda"
BASE += " --val_fraction 0.8 --amp_dtype fp32"


def make(deploy: str, arch: str = "resnet20") -> Any:
    kind = methods.get("one")
    options = kind.Options(one_deploy=deploy)
    request = replace(REQUEST, arch=arch)
    form = kind.member_form(options, request, 1)
    torch.manual_seed(1)
    return kind(build_splitnet(replace(request, form=form), seed=1), options).train()


def step(method: Any) -> Any:
    views = torch.randn(1, 8, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    targets = plain_targets(torch.arange(8) % 10)
    progress = Progress(40, 0, 0, 10, 100, 0.1, torch.arange(8))
    method.before_step(views, targets, progress)
    return method(views, targets, progress)


@pytest.mark.parametrize("arch", ["resnet20", "torchvision/resnet18"])
def test_it_learns_as_where_the_network_is_deployed(arch: str) -> None:
    """The same loss and gradients on the same weights; only what is deployed differs."""
    network, gated = make("network", arch), make("gated", arch)
    own = network.network.models[0].state_dict()
    own |= {f"native_ensemble.{key}": value for key, value in network.ensembles[0].state_dict().items()}
    gated.network.models[0].load_state_dict(own)
    outputs = [step(method) for method in (network, gated)]
    assert torch.equal(outputs[0].loss, outputs[1].loss)
    for output in outputs:
        output.loss.backward()
    found = {key: parameter.grad for key, parameter in gated.network.models[0].named_parameters()}
    for key, parameter in network.network.models[0].named_parameters():
        assert torch.equal(found[key], parameter.grad), key
    assert len(found) == len([*network.parameters()])
    assert not torch.equal(outputs[0].logits_SBK, outputs[1].logits_SBK)

    images = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    network.eval()
    gated.eval()
    # a step has moved the statistics of both alike
    with torch.no_grad():
        rows, others = network.extra_logits(images), gated.extra_logits(images)
        torch.testing.assert_close(gated.network(images)[0], rows["gated"])
        torch.testing.assert_close(others["branch1"], network.network(images)[0])
    assert rows.keys() == {"branch2", "branch3", "gated"}
    assert others.keys() == {"branch1", "branch2", "branch3"}


def test_everything_is_deployed_and_counted() -> None:
    network, gated = make("network"), make("gated")
    assert training_params(gated) == 0
    assert count_params(gated.deployed()) == count_params(network.deployed()) + training_params(network)
    size = (3, 16, 16)
    plain, whole = count_macs(network.deployed(), size), count_macs(gated.deployed(), size)
    assert plain < whole < 3 * plain
    assert not [key for key in gated.training_state() if "native_ensemble" in key]


def test_a_run_is_rebuilt_evaluated_resumed_and_exported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], logging_restored: None
) -> None:
    assert train_split.main([*BASE.split(), "--max_steps", "2", "--model_dir", str(tmp_path / "whole")]) == 0
    whole = read_results(tmp_path / "whole") or {}
    halves = [*BASE.split(), "--model_dir", str(tmp_path / "halves")]
    assert train_split.main([*halves, "--max_steps", "1"]) == 0
    assert train_split.main([*halves, "--max_steps", "2", "--resume", "auto"]) == 0
    assert (read_results(tmp_path / "halves") or {})["state_sha256"] == whole["state_sha256"]

    checkpoint = str(tmp_path / "whole" / "checkpoint_1.pth.tar")
    network, _ = restore_splitnet(load_checkpoint(Path(checkpoint)))
    assert isinstance(network, GatedNet)
    assert whole["params_total"] == count_params(network) > count_params(build_network(REQUEST))
    capsys.readouterr()
    assert evaluation.main(["--resume", checkpoint, "--workers", "0", "--no_cuda", "--json"]) == 0
    evaluated = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert evaluated["ensemble_nll"] == pytest.approx(whole["ensemble_nll"], rel=1e-5)

    assert export([checkpoint, "--out", str(tmp_path / "all.pt2")]) == 0
    run, _ = load_exported(tmp_path / "all.pt2")
    images = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(run(images)[1], network.eval()(images), rtol=1e-3, atol=1e-3)

    assert train_split.main([*halves, "--one_deploy", "network", "--resume", "auto"]) == UserError.exit_code
    assert "--one_deploy" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("flags", [["--split_factor", "2"], ["--arch", "resnet20,resnet20"], ["--is_train_sep", "1"]])
def test_it_is_one_network(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], logging_restored: None
) -> None:
    assert train_split.main([*BASE.split(), *flags, "--model_dir", str(tmp_path)]) == UserError.exit_code
    assert "--one_deploy gated is one network with its branches" in capsys.readouterr().err.splitlines()[-1]

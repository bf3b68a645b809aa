"""Running statistics made anew: those of the batches, and nothing else of the networks moves."""

import pytest
import torch
from torch import nn

from model import BackboneRequest, build_splitnet
from tests.runs import TINY, train
from training.statistics import renew_statistics
from utils.precision import choose_precision

PRECISION = choose_precision(torch.device("cpu"), is_amp=False, amp_dtype="fp32")


def test_they_are_the_mean_over_the_batches() -> None:
    request = BackboneRequest(arch="resnet20", split_factor=2, dataset="digits", crop_size=16)
    network = build_splitnet(request, seed=0)
    first = [next(m for m in one.modules() if isinstance(m, nn.BatchNorm2d)) for one in network.models]
    inputs: list[torch.Tensor] = []
    first[1].register_forward_pre_hook(lambda module, args: inputs.append(args[0].clone()))
    before = {name: value.clone() for name, value in network.named_parameters()}
    momenta = [m.momentum for m in network.modules() if isinstance(m, nn.BatchNorm2d)]
    first[0].train(False)
    views = [torch.randn(2, 4, 3, 16, 16, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    assert renew_statistics(network, iter(views), PRECISION) == 3
    expected = torch.stack([x.mean((0, 2, 3)) for x in inputs]).mean(0)
    torch.testing.assert_close(first[1].running_mean, expected)
    variances = torch.stack([x.transpose(0, 1).flatten(1).var(1) for x in inputs]).mean(0)
    torch.testing.assert_close(first[1].running_var, variances)
    assert all(torch.equal(value, before[name]) for name, value in network.named_parameters())
    assert [m.momentum for m in network.modules() if isinstance(m, nn.BatchNorm2d)] == momenta
    assert (first[0].training, first[1].training, network.training) == (False, True, True)


def test_without_batch_norms_nothing_is_run() -> None:
    request = BackboneRequest(arch="torchvision/convnext_tiny", dataset="folder", shape="large", crop_size=32)
    with torch.device("meta"):
        network = build_splitnet(request, seed=0)
    assert renew_statistics(network, iter([torch.empty(0)]), PRECISION) == 0


@pytest.mark.slow
def test_a_divided_run_starts_from_a_whole_network_and_goes_on(tmp_path) -> None:
    argv = [*TINY, "--seed", 1, "--val_fraction", 0.5]
    parent = train([*argv, "--epochs", 2, "--model_dir", tmp_path / "parent"], tmp_path)
    assert parent.code == 0, parent.stderr
    sliced = [*argv, "--split_factor", 2, "--epochs", 1, "--pretrained", tmp_path / "parent" / "model_best.pth.tar"]
    whole = train([*sliced, "--model_dir", tmp_path / "whole"], tmp_path)
    assert whole.code == 0, whole.stderr
    assert "each of the 2 starts from a slice of it" in whole.stderr
    assert "running statistics made anew from 7 batches" in whole.stderr
    broken = [*sliced, "--model_dir", tmp_path / "broken"]
    assert train([*broken, "--max_steps", 3], tmp_path).code == 0
    resumed = train([*broken, "--resume", "auto"], tmp_path)
    assert resumed.code == 0, resumed.stderr
    assert "running statistics" not in resumed.stderr
    assert resumed.result["state_sha256"] == whole.result["state_sha256"]

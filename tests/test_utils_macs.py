"""Counting of parameters and multiply-adds."""

import sys
import types

import pytest
import torch
from torch import nn

from model import BackboneRequest, build_splitnet
from utils.macs import count_macs, count_params, thop_macs


def make_network():
    return nn.Sequential(
        nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2, bias=True),
        nn.BatchNorm2d(6),
        nn.ReLU(inplace=True),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 5),
    )


def test_closed_form():
    network = make_network()
    assert count_params(network) == (6 * 2 * 9 + 6) + 2 * 6 + (6 * 5 + 5)
    assert count_macs(network, (4, 9, 7)) == 6 * 2 * 9 * 5 * 4 + 6 * 5


def test_matrix_products_count():
    class Attention(nn.Module):
        def forward(self, tokens_BTD):
            return tokens_BTD @ tokens_BTD.transpose(1, 2)

    assert count_macs(Attention(), (7, 3)) == 7 * 7 * 3


def test_what_only_training_runs_does_not_count():
    class Auxiliary(nn.Module):
        def __init__(self):
            super().__init__()
            self.main, self.auxiliary = nn.Linear(3, 5), nn.Linear(3, 7)

        def forward(self, features_BD):
            logits_BK = self.main(features_BD)
            return logits_BK + self.auxiliary(features_BD).sum() if self.training else logits_BK

    network = Auxiliary()
    assert count_params(network) == 4 * 12
    assert count_macs(network, (3,)) == 3 * 5


def test_counting_leaves_the_module_alone():
    network = make_network()
    network[1].eval()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    modes = [module.training for module in network.modules()]
    count_macs(network, (4, 8, 8))
    thop_macs(network, (4, 8, 8))
    assert [module.training for module in network.modules()] == modes
    assert True in modes
    assert False in modes
    assert list(network.state_dict()) == list(before)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert all(value.device.type == "cpu" for value in network.state_dict().values())
    assert not any(hasattr(module, "total_ops") or module._forward_hooks for module in network.modules())


def test_mode_is_restored_after_a_failure():
    network = make_network()
    with pytest.raises(RuntimeError):
        count_macs(network, (3, 8, 8))
    assert network.training


def test_every_network_of_a_splitnet_counts():
    networks = build_splitnet(BackboneRequest(arch="resnet20", split_factor=4), seed=0)
    one = build_splitnet(BackboneRequest(arch="resnet20", split_factor=4), seed=0, train_separately=True)
    assert count_params(networks) == 4 * count_params(one)
    assert count_macs(networks, (3, 32, 32)) == 4 * count_macs(one, (3, 32, 32))


def test_counting_does_not_depend_on_where_the_weights_are():
    request = BackboneRequest(arch="resnet20", split_factor=2)
    network = build_splitnet(request, seed=0)
    with torch.device("meta"):
        shapes = build_splitnet(request, seed=0)
    expected = count_macs(network, (3, 32, 32))
    assert count_macs(shapes, (3, 32, 32)) == expected
    assert count_macs(network.to(memory_format=torch.channels_last).bfloat16(), (3, 32, 32)) == expected


def test_thop_reads_a_little_more():
    pytest.importorskip("thop")
    network = build_splitnet(BackboneRequest(arch="resnet20"), seed=0)
    macs = count_macs(network, (3, 32, 32))
    assert macs < thop_macs(network, (3, 32, 32)) < 1.1 * macs


def test_thop_is_optional(monkeypatch):
    monkeypatch.setitem(sys.modules, "thop", None)
    assert thop_macs(make_network(), (4, 8, 8)) is None


def test_thop_sees_a_copy_in_evaluation_mode(monkeypatch):
    network = make_network()

    def profile(module, inputs, verbose):
        assert module is not network
        assert not module.training
        assert [image.shape for image in inputs] == [(1, 4, 8, 8)]
        assert not verbose
        return 12.0, 3.0

    monkeypatch.setitem(sys.modules, "thop", types.SimpleNamespace(profile=profile))
    assert thop_macs(network, (4, 8, 8)) == 12

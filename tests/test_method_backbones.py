"""Every method on every kind of backbone that `--arch` names: it takes a step, or the backbone is refused by name."""

import dataclasses
from pathlib import Path

import pytest
import torch

import train_split
from method import Progress, methods
from model import LARGE, SMALL, BackboneRequest, backbones, build_splitnet
from model.staged import staged_parts
from tests.test_method_contract import batch, options_of
from utils.errors import UserError

K, B, SIDE = 4, 2, 16
FACTORIES = """
from torch import nn
from model.staged import StagedBackbone

def block(inputs, outputs, stride):
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride, 1), nn.BatchNorm2d(outputs), nn.ReLU())

class Staged(StagedBackbone):
    classifier_name = "fc"

    def __init__(self, width, num_classes):
        super().__init__()
        c = round(128 * width)
        self.first, self.near, self.far = block(3, c, 1), block(c, c, 2), block(c, 2 * c, 2)
        self.fc = nn.Linear(2 * c, num_classes)

    @property
    def stages(self):
        return [self.near, self.far]

    def stem(self, images):
        return self.first(images)

    def tail(self, features):
        return features.mean(dim=(2, 3))

    def classify(self, embedding):
        return self.fc(embedding)

def staged(width, num_classes):
    return Staged(width, num_classes)

def plain(width, num_classes):
    c = round(128 * width)
    return nn.Sequential(block(3, c, 2), block(c, 2 * c, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                         nn.Linear(2 * c, num_classes))
"""
BACKBONES = ("resnet20", "mine.py:staged", "mine.py:plain")
LARGER_BACKBONES = ("efficientnetb0", "torchvision/resnet18")
LARGE_BACKBONES = ("wide_resnet16_8", "resnext29_8x64d", "densenet190")
NEED_STAGES = ("byot", "dks", "l_mcl", "mc_dropout", "okddip", "one")
ORDINARY = [name for name in methods.names() if name != "cream"]  # it searches one supernet of its own


def named(arch: str, folder: Path) -> str:
    """The backbone's name; the file of one of `FACTORIES` is written."""
    if ".py:" not in arch:
        return arch
    (folder / "mine.py").write_text(FACTORIES)
    return str(folder / arch)


def take_a_step(name: str, arch: str) -> None:
    """Two images through the method, there and back, on networks of the backbone; then their logits in evaluation."""
    kind, options = methods.get(name), options_of(name)
    shape = SMALL if SMALL in backbones.get(arch).split_factors else LARGE
    request = BackboneRequest(arch=arch, num_classes=K, shape=shape, dataset="synthetic", crop_size=SIDE)
    request = dataclasses.replace(request, form=kind.member_form(options, request, 3))
    network = build_splitnet(request, seed=1, archs=[arch] * (2 if kind.networks_from_list else 1))
    method = kind(network, options)
    method.prepare(torch.arange(40) % K, 3)
    method.train()
    views, targets = batch(method, 1, size=B, side=SIDE)
    progress = Progress(0, 1, 1, 10, 2, 0.05, torch.arange(B), 1e-4)
    method.before_step(views, targets, progress)
    output = method(views, targets, progress)
    output.loss.backward()
    assert output.loss.isfinite()
    assert output.logits_SBK.shape == (network.num_members, B, K)
    idle = [key for key, parameter in method.trained_parameters() if parameter.grad is None]
    assert not idle
    with torch.no_grad():
        logits_SBK = method.eval().network(views[0])
    assert logits_SBK.shape == (network.num_members, B, K)
    assert logits_SBK.isfinite().all()


@pytest.mark.parametrize("name", ORDINARY)
@pytest.mark.parametrize("arch", BACKBONES)
def test_every_method_takes_it_or_refuses_it_by_name(arch: str, name: str, tmp_path: Path) -> None:
    arch = named(arch, tmp_path)
    if arch.endswith("mine.py:plain") and name in NEED_STAGES:
        with pytest.raises(UserError, match=rf"--method {name}: {arch} has no stages that run one after another"):
            take_a_step(name, arch)
    else:
        take_a_step(name, arch)


@pytest.mark.slow
@pytest.mark.parametrize("name", ORDINARY)
@pytest.mark.parametrize("arch", LARGER_BACKBONES)
def test_every_method_takes_the_larger_ones(arch: str, name: str) -> None:
    take_a_step(name, arch)


@pytest.mark.long
@pytest.mark.parametrize("name", ORDINARY)
@pytest.mark.parametrize("arch", LARGE_BACKBONES)
def test_every_method_takes_the_large_ones(arch: str, name: str) -> None:
    take_a_step(name, arch)


def test_a_network_of_ones_own_has_the_parts_that_it_says(tmp_path: Path) -> None:
    request = BackboneRequest(arch=named("mine.py:staged", tmp_path), num_classes=K, crop_size=SIDE, split_factor=2)
    network = build_splitnet(request, seed=1).models[0]
    parts = staged_parts(network)
    assert parts is not None
    assert parts.request is not None
    assert (parts.request.arch, parts.request.split_factor) == (request.arch, 2)
    assert parts.request.widths is not None
    assert 0.5 < parts.request.widths[0] < 0.9


@pytest.mark.parametrize("name", [*NEED_STAGES, "cream"])
def test_a_refusal_ends_the_run_with_one_line(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], logging_restored: None
) -> None:
    arch = named("mine.py:plain", tmp_path)
    words = ["--dataset", "digits", "--arch", arch, "--method", name, "--workers", "0", "--no_cuda"]
    words += ["--split_factor", "2"] if name == "l_mcl" else []  # it needs two networks
    assert train_split.main([*words, "--model_dir", str(tmp_path / "run")]) == UserError.exit_code
    *_, error = capsys.readouterr().err.splitlines()
    assert f"--method {name}" in error
    assert arch in error or "--arch cream_supernet" in error

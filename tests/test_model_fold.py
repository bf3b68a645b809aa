"""Batch norm folded for inference: the same logits; what does not stand alone behind a convolution is left as it is."""

import copy

import pytest
import torch
from torch import Tensor, nn

from model import LARGE, SMALL, BackboneRequest, build_splitnet
from model.fold import fold_batch_norm
from model.registry import MemberForm
from model.splitnet import SplitNet

IMAGE = (3, 16, 16)


def norms(network: nn.Module) -> int:
    return sum(isinstance(module, nn.BatchNorm2d) for module in network.modules())


def scrambled(network: nn.Module) -> nn.Module:
    """In float64, with statistics and factors as no fresh network has them."""
    generator = torch.Generator().manual_seed(0)
    for module in network.double().modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight, module.running_var):
                tensor.data.uniform_(0.5, 1.5, generator=generator)
            for tensor in (module.bias, module.running_mean):
                tensor.data.normal_(generator=generator)
    return network


# norms that stay: those before a convolution, and those behind the two joined ones of Shake-Shake's three shortcuts
@pytest.mark.parametrize(
    ("arch", "shape", "split_factor", "left"),
    [
        ("resnet20", SMALL, 2, 0),
        ("densenet190", SMALL, 16, 16 * (93 + 2 + 1)),
        ("shake_resnet26_2x96d", SMALL, 1, 3 + 9),
        ("resnexst50_4x16d", LARGE, 4, 0),
    ],
)
def test_folded_networks_give_the_same_logits(arch, shape, split_factor, left):
    size = 32 if shape == SMALL else 64
    request = BackboneRequest(arch=arch, split_factor=split_factor, shape=shape, crop_size=size)
    network = scrambled(build_splitnet(request, seed=0, train_separately=split_factor > 2))
    state = copy.deepcopy(network.state_dict())
    folded = fold_batch_norm(network, (3, size, size))
    networks = len(network.models)
    assert norms(folded) * (split_factor // networks) == left
    images_BCHW = torch.randn(2, 3, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        torch.testing.assert_close(folded(images_BCHW), network.eval()(images_BCHW), rtol=1e-8, atol=1e-8)
    assert not folded.training
    assert not any(parameter.requires_grad for parameter in folded.parameters())
    assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())
    # a copy of the copy, as an export makes one, is still folded
    assert norms(copy.deepcopy(folded)) == norms(folded)


class Awkward(nn.Module):
    """Convolutions with a bias, read twice, run twice, changed before their norm; and a norm with a second name."""

    def __init__(self) -> None:
        super().__init__()
        self.folds, self.norm = nn.Conv2d(3, 4, 3, bias=True), nn.BatchNorm2d(4)
        self.alias = [self.norm]
        self.read_twice, self.norm_twice = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.run_twice, self.norm_a, self.norm_b = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.changed, self.norm_changed = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.plain, self.norm_plain = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4, affine=False)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        x = self.alias[0](self.folds(images_BCHW)).relu()
        y = self.read_twice(x)
        x = self.norm_twice(y) + y
        x = self.norm_b(self.run_twice(self.norm_a(self.run_twice(x))))
        y = self.changed(x)
        y[:, 0] = 1.0
        return self.norm_plain(self.plain(self.norm_changed(y))).mean((2, 3))


def test_only_what_stands_alone_is_folded():
    network = Awkward().double()
    for norm in (module for module in network.modules() if isinstance(module, nn.BatchNorm2d)):
        norm.running_mean.normal_(generator=torch.Generator().manual_seed(2))
        norm.running_var.uniform_(0.5, 2, generator=torch.Generator().manual_seed(3))
    folded = fold_batch_norm(network, IMAGE)
    left = {name for name, module in folded.named_modules() if isinstance(module, nn.BatchNorm2d)}
    assert left == {"norm_twice", "norm_a", "norm_b", "norm_changed"}
    images_BCHW = torch.randn(3, *IMAGE, dtype=torch.float64)
    torch.testing.assert_close(folded(images_BCHW), network.eval()(images_BCHW))


@pytest.mark.parametrize("norm", ["shared", "member"])
def test_members_of_a_batch_ensemble_become_networks_of_their_own(norm: str) -> None:
    form = MemberForm(kind="batch_ensemble", members=3, numbers={"norm": norm, "init": -0.5})
    request = BackboneRequest(arch="resnet20", dataset="digits", crop_size=16, form=form)
    members = scrambled(build_splitnet(request, seed=0)).double().eval()
    folded = fold_batch_norm(members, (3, 16, 16))
    assert isinstance(folded, SplitNet)
    assert len(folded.models) == 3
    assert norms(folded) == 0
    images = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    torch.testing.assert_close(folded(images), members(images), rtol=1e-6, atol=1e-8)

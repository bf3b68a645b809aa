"""`divide`: by name the command line's division; of an instance the channels are followed, or the refusal says why."""

import copy

import pytest
import torch
import torchvision
from torch import Tensor, nn

from model import BackboneRequest, SplitNet, build_splitnet
from model.divide import divide
from utils.errors import UserError
from utils.macs import count_params


def small_resnet() -> nn.Module:
    return torchvision.models.resnet18(num_classes=5)


def plain_network() -> nn.Module:
    """Somebody's own: convolutions, norms, a depthwise one, a head of two layers behind a flattened map."""
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 32, 3, 2, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU()),
        nn.Sequential(nn.Conv2d(32, 32, 3, 1, 1, groups=32), nn.Conv2d(32, 64, 1), nn.BatchNorm2d(64), nn.ReLU()),
        nn.MaxPool2d(4),
        nn.Flatten(),
        nn.Linear(64 * 4 * 4, 48),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Linear(48, 7),
    )


def test_a_name_gives_what_the_command_line_gives():
    network, plan = divide("resnet20", 2, num_classes=10, crop_size=32, seed=3)
    expected = build_splitnet(BackboneRequest(arch="resnet20", split_factor=2, dataset="cifar100"), seed=3)
    assert isinstance(network, SplitNet)
    assert plan.divide_by == "table"
    assert plan.params_one == count_params(network.models[0])
    state = network.state_dict()
    assert all(torch.equal(state[name], value) for name, value in expected.state_dict().items())


def test_an_instance_of_a_library_is_divided_as_its_name_is():
    module = small_resnet()
    before = copy.deepcopy(module.state_dict())
    random_state = torch.get_rng_state()
    network, plan = divide(module, 2, crop_size=64, seed=1)
    named, plan_of_name = divide("torchvision/resnet18", 2, num_classes=5, crop_size=64, seed=1)
    assert plan.widths == plan_of_name.widths
    assert (plan.params_one, plan.macs_one) == (plan_of_name.params_one, plan_of_name.macs_one)
    ours, theirs = network.state_dict(), named.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)  # the library's initial values, by the seed
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert not torch.equal(network.models[0].fc.weight, network.models[1].fc.weight)


@pytest.mark.parametrize("split_factor", [2, 3])
@pytest.mark.parametrize("divide_by", ["params", "macs"])
def test_a_network_of_somebodys_own(split_factor, divide_by):
    torch.manual_seed(0)
    network, plan = divide(plain_network(), split_factor, crop_size=32, divide_by=divide_by)
    full = count_params(plain_network())
    assert plan.params_full == full
    difference = plan.params_difference if divide_by == "params" else plan.macs_difference
    assert abs(difference) < 0.02
    logits_SBK = network(torch.randn(split_factor, 4, 3, 32, 32))
    assert logits_SBK.shape == (split_factor, 4, 7)
    logits_SBK.square().mean().backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in network.parameters())
    spread = network.models[0][0][0].weight.std().item()
    assert spread == pytest.approx(plain_network()[0][0].weight.std().item(), rel=0.3)  # convolutions' usual values


def test_one_is_a_copy():
    module = plain_network()
    network, plan = divide(module, 1, crop_size=32)
    assert plan.params_one == plan.params_full
    state = network.models[0].state_dict()
    assert all(torch.equal(state[name], value) for name, value in module.state_dict().items())
    assert network.models[0][0][0].weight is not module[0][0].weight


class NumbersInItsCode(nn.Module):
    """Its forward pass knows how many channels there are."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 64, 3, 2), nn.Linear(64, 4)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        return self.head(self.conv(images_BCHW).mean(dim=(2, 3)).reshape(-1, 64))


class LooksAtValues(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 32, 3, 2), nn.Linear(32, 4)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        features_BC = self.conv(images_BCHW).mean(dim=(2, 3))
        return self.head(features_BC if features_BC.sum() > 0 else -features_BC)


class ScaledByHand(nn.Module):
    """A parameter of no layer, whose initial values only its constructor knows."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 64, 3, 2), nn.BatchNorm2d(64))
        self.part = nn.Module()
        self.last = Scaled()
        self.head = nn.Linear(64, 4)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        return self.head(self.last(self.body(images_BCHW)).mean(dim=(2, 3)))


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(64, 64, 3)
        self.gamma = nn.Parameter(torch.full((1, 64, 1, 1), 0.1))

    def forward(self, features_BCHW: Tensor) -> Tensor:
        return self.gamma * self.conv(features_BCHW)


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (NumbersInItsCode(), "NumbersInItsCode cannot be followed: a narrower one"),
        (LooksAtValues(), "LooksAtValues cannot be followed: "),
        (ScaledByHand(), "its parameter last.gamma has no initial values"),
        (nn.Sequential(nn.Conv2d(3, 8, 3)), r"two images give \[2, 8, 30, 30\], expected logits"),
        (nn.Sequential(nn.Conv2d(4, 8, 3), nn.Flatten()), "cannot be followed: "),
        ("torchvision/resnet19", "resnet19"),
        (3, "expected a module or a name, got int"),
    ],
)
def test_what_cannot_be_followed_is_refused_in_one_line(module, message):
    with pytest.raises(UserError, match=message) as error:
        divide(module, 2, crop_size=32)
    assert "\n" not in str(error.value)


def test_arguments_that_do_not_fit():
    for arguments, message in (
        ({"split_factor": 0}, "1 or more"),
        ({"split_factor": 2, "num_classes": 5}, "num_classes goes with a name"),
        ({"split_factor": 2, "divide_by": "weight"}, "params or macs"),
        ({"split_factor": 64, "crop_size": 32}, "no widths"),
    ):
        with pytest.raises(UserError, match=message):
            divide(plain_network(), **arguments)


@pytest.mark.slow
def test_an_instance_of_a_transformer_is_divided_as_its_name_is():
    timm = pytest.importorskip("timm")
    module = timm.create_model("test_vit", num_classes=5)
    before = copy.deepcopy(module.state_dict())
    network, plan = divide(module, 2, crop_size=160, seed=1)
    named, plan_of_name = divide("timm/test_vit", 2, num_classes=5, crop_size=160, seed=1)
    assert plan.way == "arguments"
    assert plan == plan_of_name
    ours, theirs = network.state_dict(), named.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


@pytest.mark.parametrize("changed", [{"num_heads": 1}, {"drop_rate": 0.3}, {"mlp_ratio": 2.0}])
def test_an_instance_that_no_name_gives_is_refused(changed):
    """What no tensor shows decides too: other heads or rates are another network."""
    timm = pytest.importorskip("timm")
    module = timm.create_model("test_vit", num_classes=5, **changed)
    with pytest.raises(UserError, match="this VisionTransformer cannot be followed"):
        divide(module, 2, crop_size=160)

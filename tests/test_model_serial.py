"""Stages of libraries' networks that are found: they compose to the network, and methods hang their parts on them."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from method import Method, Progress, Targets, methods
from model import BackboneRequest, SplitNet, build_network, build_splitnet, solved_request, staged_parts
from model.heads import require_stages, stage_maps
from model.members import FixedDropout
from model.serial import SerialParts, serial_layout
from utils.errors import UserError

timm = pytest.importorskip("timm")

# arch, S, crop: one of each shape of class
FOUND = (
    ("timm/test_vit", 2, 32),
    ("timm/mixer_s32_224", 8, 32),
    ("timm/hgnetv2_b0", 8, 64),
    ("torchvision/vit_b_32", 32, 32),
    ("torchvision/swin_t", 16, 64),
)
SLOW = (
    ("timm/swin_tiny_patch4_window7_224", 16, 32),
    ("timm/poolformer_s12", 4, 64),
    ("timm/pvt_v2_b0", 2, 64),
    ("timm/davit_tiny", 8, 64),
)


def request_for(arch: str, split_factor: int, crop_size: int) -> BackboneRequest:
    request = BackboneRequest(arch=arch, split_factor=split_factor, num_classes=5, crop_size=crop_size, shape="large")
    return solved_request(request)


@pytest.mark.parametrize(
    ("arch", "split_factor", "crop_size"), [*FOUND, *(pytest.param(*one, marks=pytest.mark.slow) for one in SLOW)]
)
def test_parts_compose_bit_for_bit(arch: str, split_factor: int, crop_size: int) -> None:
    request = request_for(arch, split_factor, crop_size)
    torch.manual_seed(0)
    network = build_network(request).eval()
    parts = staged_parts(network)
    assert isinstance(parts, SerialParts)
    assert len(parts.stages) == 4
    image = torch.randn(2, 3, crop_size, crop_size)
    with torch.no_grad():
        logits = network(image)
        assert torch.equal(parts.composed(image), logits)
        assert logits.isfinite().all()
        taps, _ = parts.forward_features(image)
    maps = [parts.as_map(tap) for tap in taps]
    assert all(one.dim() == 4 and one.shape[2] == one.shape[3] for one in maps)
    assert [(one.shape[1], one.shape[3]) for one in maps] == stage_maps(parts)
    assert [tap.shape[parts.channel_dim] for tap in taps] == [one.shape[1] for one in maps]
    assert not network._forward_pre_hooks  # and no hook is left behind
    assert not any(module._forward_pre_hooks for module in network.modules())


@pytest.mark.parametrize("name", ["dks", "l_mcl", "one", "byot", "okddip"])
def test_methods_with_branches_train_a_step_on_tokens(name: str) -> None:
    request = request_for("timm/test_vit", 2, 32)
    kind = methods.get(name)
    network = build_splitnet(request, seed=0)
    try:
        method: Method[Any] = kind(network, kind.Options())
    except UserError:  # it takes one whole network
        method = kind(build_splitnet(request, seed=0, train_separately=True), kind.Options())
    take_a_step(method)


# one of each class of both libraries that has stages; S so large that two of its networks are small
STAGED = (
    ("timm/mixer_s32_224", 8, 32),
    ("timm/convnext_atto", 4, 32),
    ("timm/regnetx_002", 2, 32),
    ("timm/swin_tiny_patch4_window7_224", 16, 32),
    ("torchvision/vit_b_32", 32, 32),
    ("torchvision/swin_t", 16, 32),
    ("torchvision/convnext_tiny", 16, 32),
    ("torchvision/regnet_y_400mf", 4, 32),
)


@pytest.mark.slow
@pytest.mark.parametrize(("arch", "split_factor", "crop_size"), STAGED)
def test_dks_and_l_mcl_train_a_step_on_one_of_each_class(arch: str, split_factor: int, crop_size: int) -> None:
    request = request_for(arch, split_factor, crop_size)
    for name in ("dks", "l_mcl"):
        kind = methods.get(name)
        take_a_step(kind(SplitNet([build_network(request) for _ in range(2)]), kind.Options()))


def take_a_step(method: Method[Any]) -> None:
    """Four images of 32 pixels, there and back: every parameter that is trained has a gradient."""
    method.prepare(torch.arange(40) % 5, 0)
    method.train()
    views = torch.randn(1 if method.shared_view else method.network.num_members, 4, 3, 32, 32)
    labels = torch.arange(4)
    progress = Progress(0, 1, 1, 10, 2, 0.05, torch.arange(4), 1e-4)
    targets = Targets(labels, labels, torch.tensor(1.0))
    method.before_step(views, targets, progress)
    method(views, targets, progress).loss.backward()
    assert all(parameter.grad is not None for _, parameter in method.trained_parameters())


def test_what_does_not_run_one_after_another_is_refused_by_name() -> None:
    network = build_network(BackboneRequest(arch="timm/levit_128", num_classes=5, crop_size=224, shape="large"))
    assert staged_parts(network) is None
    with pytest.raises(UserError, match=r"--method dks: timm/levit_128 has no stages that run one after another; use"):
        require_stages(network, "dks")


class Serial(nn.Module):
    """A network as timm writes them."""

    num_features = 8

    def __init__(self, kind: str = "") -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 4, 4)
        self.stages = nn.Sequential(*(nn.Conv2d(8, 8, 1) for _ in range(3)))
        self.norm = nn.GroupNorm(1, 8)
        self.head = nn.Linear(8, 5)
        self.kind = kind

    def forward_features(self, image: Tensor) -> Tensor:
        x = self.stem(image)
        if self.kind == "sum between":
            for stage in self.stages:
                x = x + stage(x)
        elif self.kind == "skip":
            x = self.stages(x) + x
        else:
            x = self.stages(x)
        x = self.norm(x)
        return x

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = x.mean((2, 3))
        return x if pre_logits else self.head(x)

    def get_classifier(self) -> nn.Module:
        return self.head

    def forward(self, image: Tensor) -> Tensor:
        x = self.forward_head(self.forward_features(image))
        return 2 * x if self.kind == "scaled" else x.relu() if self.kind == "behind" else x


def test_only_what_the_network_does_itself_is_taken() -> None:
    image = torch.zeros(1, 3, 16, 16)
    layout = serial_layout(Serial().eval(), image)
    assert layout is not None
    assert (layout.members, layout.after) == (("stages.0", "stages.1", "stages.2"), ("norm",))
    assert layout.stages == ((0, 1), (1, 2), (2, 3))
    for kind in ("sum between", "skip", "scaled", "behind"):
        assert serial_layout(Serial(kind).eval(), image) is None


def test_channels_are_dropped_whole_wherever_they_stand() -> None:
    torch.manual_seed(0)
    for dim, shape, others in ((1, (2, 16, 5, 5), (2, 3)), (-1, (2, 9, 16), (1,)), (-1, (2, 5, 5, 16), (1, 2))):
        dropped = FixedDropout(0.5, by_channel=True, dim=dim)(torch.ones(shape))
        assert torch.equal(dropped.amax(others), dropped.amin(others))
        assert 0 < int((dropped == 0).sum()) < dropped.numel()

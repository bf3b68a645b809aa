"""Networks without batch norm stacked by vmap: the loop's logits, gradients and masks."""

import copy
import logging

import pytest
import torch
from torch import Tensor, nn

from model import BackboneRequest, SplitNet, build_splitnet, solved_request

timm = pytest.importorskip("timm")

NETWORKS = (("timm/test_vit", 2, 32), ("timm/test_vit", 4, 32), ("timm/convnext_atto", 4, 32))
SLOW = (("timm/swin_tiny_patch4_window7_224", 2, 32), ("timm/mixer_s32_224", 4, 32), ("torchvision/vit_b_32", 4, 32))


def largest(tensor: Tensor) -> float:
    return float(tensor.detach().abs().max())


@pytest.mark.parametrize(
    ("arch", "split_factor", "crop_size"), [*NETWORKS, *(pytest.param(*one, marks=pytest.mark.slow) for one in SLOW)]
)
def test_logits_and_gradients_are_the_loops(arch: str, split_factor: int, crop_size: int) -> None:
    request = BackboneRequest(arch=arch, split_factor=split_factor, num_classes=5, crop_size=crop_size, shape="large")
    loop = build_splitnet(solved_request(request), seed=0).eval()
    for network in loop.models:  # libraries begin heads at zero, which would hide everything
        nn.init.normal_([p for p in network.parameters() if p.dim() == 2][-1])
    mapped = copy.deepcopy(loop)
    mapped.execution = "stacked"
    views = torch.randn(split_factor, 2, 3, crop_size, crop_size, generator=torch.Generator().manual_seed(1))
    expected, found = loop(views), mapped(views)
    assert mapped.execution == "stacked"
    assert largest(expected - found) <= 1e-5 * largest(expected)
    for logits in (expected, found):
        logits.square().sum().backward()
    # a bias before a norm has no gradient but for rounding, which is that of all others
    rounding = 1e-6 * max(largest(parameter.grad) for parameter in loop.parameters() if parameter.grad is not None)
    for ours, theirs in zip(mapped.parameters(), loop.parameters(), strict=True):
        assert ours.grad is not None
        assert theirs.grad is not None
        assert largest(ours.grad - theirs.grad) <= 1e-4 * largest(theirs.grad) + rounding


class Tokens(nn.Module):
    """Attention of torch, dropout of torch, stochastic depth of timm."""

    def __init__(self, norm: nn.Module | None = None) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 4, 4)
        self.norm = norm or nn.Identity()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.dropout = nn.Dropout(0.5)
        self.depth = timm.layers.DropPath(0.5)
        self.table: Tensor
        self.register_buffer("table", torch.arange(16).flip(0))
        self.head = nn.Linear(8, 5)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.norm(self.patches(images)).flatten(2).mT[:, self.table]
        mixed = self.attention(tokens, tokens, tokens, need_weights=False)[0]
        return self.head((tokens + self.depth(self.dropout(mixed))).mean(1))


def make(norm: type[nn.Module] | None = None) -> SplitNet:
    torch.manual_seed(0)
    return SplitNet([Tokens(None if norm is None else norm(8)) for _ in range(3)])


def test_masks_are_each_members_own() -> None:
    loop = make()
    for network in loop.models:
        network.load_state_dict(loop.models[0].state_dict())
        network.depth.drop_prob = 0.0
    mapped = copy.deepcopy(loop)
    mapped.execution = "stacked"
    images = torch.randn(4, 3, 16, 16)
    for network in (loop, mapped):
        network.train().begin_step(7)
    found = mapped(images)
    assert mapped.execution == "stacked"
    assert torch.allclose(found, loop(images), atol=1e-6)  # dropout draws by network and layer
    assert not torch.allclose(found[0], found[1])
    for network in mapped.models:
        network.dropout.p, network.depth.drop_prob = 0.0, 0.5
    first, second, _ = mapped(images)
    assert not torch.allclose(first, second)
    assert torch.allclose(*mapped.eval()(images)[:2])


def test_batch_norms_keep_the_loop_and_say_so(caplog: pytest.LogCaptureFixture) -> None:
    network = make(nn.BatchNorm2d)
    network.execution = "stacked"
    with caplog.at_level(logging.INFO):
        network(torch.randn(4, 3, 16, 16))
    assert network.execution == "loop"
    assert "its batch norms write statistics, which vmap cannot" in caplog.text


def test_mixed_precision_keeps_the_loop_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    network = make().eval()
    network.execution = "stacked"
    with caplog.at_level(logging.INFO), torch.autocast("cpu", torch.bfloat16):
        assert network(torch.randn(4, 3, 16, 16)).dtype == torch.bfloat16
    assert network.execution == "loop"
    assert "vmap leaves mixed precision out" in caplog.text

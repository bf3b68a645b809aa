"""Weights that are cast once: the same bits as under autocast, and a pass that casts none of them."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from model import BackboneRequest, build_splitnet
from model.casting import CastWatch, cast_parameters, only_cast
from model.fold import fold_batch_norm

IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def seen(network: nn.Module, images: torch.Tensor) -> tuple[torch.Tensor, CastWatch]:
    watch = CastWatch(network, torch.bfloat16)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), watch:
        return network(images), watch


@pytest.mark.parametrize("arch", ["resnet20", "wide_resnet16_8", "pyramidnet272", "efficientnetb0", "timm/vit_tiny"])
def test_autocast_finds_the_same_bits_and_nothing_to_cast(arch: str) -> None:
    if arch.startswith("timm/"):
        vit = pytest.importorskip("timm.models.vision_transformer").VisionTransformer
        network: nn.Module = vit(img_size=32, patch_size=8, num_classes=10, embed_dim=24, depth=2, num_heads=2).eval()
    else:
        whole = build_splitnet(BackboneRequest(arch=arch, split_factor=2), seed=0).eval()
        network = fold_batch_norm(whole, (3, 32, 32))
    expected, before = seen(network, IMAGES)
    names = only_cast(network, IMAGES, torch.bfloat16)
    cast = copy.deepcopy(network)
    cast_parameters(cast, names, torch.bfloat16)
    found, after = seen(cast, IMAGES)
    assert torch.equal(found, expected)
    assert len(names) > 10
    assert before.operations - after.operations == len(names) == len(before.found())
    assert not after.found()
    norms = {name for name, p in cast.named_parameters() if p.dtype == torch.float32}
    assert norms == {name for name, _ in network.named_parameters()} - set(names)


class Tied(nn.Module):
    """One weight that is also used in float32, one that is not used at all, one that two layers share."""

    def __init__(self) -> None:
        super().__init__()
        self.measured, self.unused, self.one, self.two = (nn.Linear(4, 4, bias=False) for _ in range(4))
        self.two.weight = self.one.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scaled = F.linear(x, self.measured.weight / self.measured.weight.norm())
        return self.two(self.one(self.measured(scaled)))


def test_a_weight_that_float32_needs_stays() -> None:
    assert only_cast(Tied(), torch.randn(2, 4), torch.bfloat16) == ["one.weight"]

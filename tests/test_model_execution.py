"""Every strategy computes what the loop computes: logits, gradients, statistics, masks; or says why it does not run."""

import copy
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from model import BackboneRequest, build_network
from model.backbone.cifar_resnet import CifarResNet
from model.backbone.densenet import DenseNet
from model.backbone.efficientnet import (
    BlockSpec,
    LightNetEfficientNet,
    LukemelasEfficientNet,
    Structure,
    Swish,
)
from model.backbone.hcgnet import HCGNet
from model.backbone.imagenet_resnet import ImageNetResNet
from model.backbone.pyramidnet import PyramidNet
from model.backbone.resnest import _stage as resnest_stage
from model.backbone.resnet import ResNet
from model.backbone.senet import SEBottleneck, _drop_block
from model.backbone.shake_resnet import ShakeResNet
from model.backbone.shufflenetv2 import ShuffleNetV2
from model.backbone.wrn import WideResNet
from model.layers.resnet_parts import ResNetSkeleton, cifar_stem, deep_stem, make_stage, projection_shortcut
from model.layers.split_attention import SplitAttentionBottleneck
from model.splitnet import SplitNet

K = 5
SMALL, LARGE = (BackboneRequest(arch="resnet20", num_classes=K, shape=shape) for shape in ("small", "large"))
STRUCTURE = Structure(8, 1, [[BlockSpec(8, 12, 1, 3, 2)], [BlockSpec(12, 12, 6, 5, 1)]], 16)


def senet(pool: nn.Module) -> nn.Module:
    block = partial(
        SEBottleneck, planes=4, widths=(8, 16), groups=4, reduction=4, conv_shortcut=True,
        make_drop=partial(_drop_block, BackboneRequest(arch="se_resnet50_B", crop_size=224)),
    )  # fmt: skip
    stages = [make_stage(block, 16, 16, 1, 1), make_stage(block, 16, 16, 2, 2)]
    return ResNetSkeleton(nn.Sequential(deep_stem(8, 16, pool)), stages, num_features=16, num_classes=K, dropout=0.2)


def resnest() -> nn.Module:
    stages = [resnest_stage(8, 4, 1, 1), resnest_stage(16, 4, 2, 2)]
    return ResNetSkeleton(nn.Sequential(cifar_stem(8)), stages, num_features=16, num_classes=K)


def hcgnet() -> nn.Module:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("model.backbone.hcgnet._UNITS_PER_BLOCK", 1)
        return HCGNet((4, 4, 4), K)


def resnexst() -> nn.Module:
    def block(in_channels: int, stride: int) -> nn.Module:
        pool = nn.AvgPool2d(3, stride, padding=1)
        return SplitAttentionBottleneck(in_channels, 4, 8, 2, pool, projection_shortcut(in_channels, 16, stride))

    stages = [make_stage(block, 8, 16, 1, 1), make_stage(block, 16, 16, 2, 2)]
    return ResNetSkeleton(nn.Sequential(cifar_stem(8)), stages, num_features=16, num_classes=K, dropout=0.1)


# The smallest networks that hold every block and every option of each family.
FAMILIES: dict[str, Callable[[], nn.Module]] = {
    "resnet": lambda: ResNet(SMALL, (1, 1, 1), 4, 4, dropout=0.2),
    "resnet-basic": lambda: ResNet(SMALL, (1, 2, 1), 4, 4, bottleneck=False),
    "resnet-large": lambda: ResNet(LARGE, (1, 1, 1, 1), 4, 4),
    "resnext": lambda: ResNet(SMALL, (1, 1, 1), 8, 8, base_width=32, groups=2),
    "wide_resnet": lambda: ResNet(SMALL, (1, 1, 1), 16, 32, bottleneck=False, dropout=0.1),
    "wrn": lambda: WideResNet(16, 1, K, dropout=0.3),
    "cifar_resnet": lambda: CifarResNet((4, 8), (1, 2), bottleneck=True, num_classes=K),
    "imagenet_resnet": lambda: ImageNetResNet((4, 8, 8, 8), (1, 1, 1, 1), bottleneck=False, num_classes=K),
    "senet": lambda: senet(nn.MaxPool2d(3, 2, ceil_mode=True)),
    "pyramidnet": lambda: PyramidNet((4, 5, 6), (0.2, 0.5, 0.8), K),
    "densenet": lambda: DenseNet(4, [[0.3, 0.5]] * 2, K, official=True, recompute=False),
    "densenet-recompute": lambda: DenseNet(4, [[0.3, 0.5]] * 2, K, official=True, recompute=True),
    "densenet3": lambda: DenseNet(4, [[0.0] * 2] * 2, K, official=False, recompute=False),
    "shake_resnet": lambda: ShakeResNet(2, 8, K),
    "efficientnet": lambda: LightNetEfficientNet(STRUCTURE, K, 0.4, nn.SiLU()),
    "efficientnet-lukemelas": lambda: LukemelasEfficientNet(STRUCTURE, K, 0.3, Swish(), 16),
    "resnest": resnest,
    "resnexst": resnexst,
    "shufflenetv2": lambda: ShuffleNetV2((8, 16, 16), K, large=True),
    "hcgnet": hcgnet,
    "cream": lambda: build_network(
        BackboneRequest(arch="cream_14", split_factor=4, num_classes=K, options={"global_pool": "avgmax"})
    ),
}
NEED_ROOM = ("resnet-large", "imagenet_resnet", "senet", "shufflenetv2", "cream")


def split_net(make: Callable[[], nn.Module], count: int, dtype: torch.dtype = torch.float64) -> SplitNet:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        network = SplitNet([make() for _ in range(count)])
        for name, parameter in network.named_parameters():
            if parameter.dim() == 1:  # zero-initialised branches would hide mistakes
                nn.init.normal_(parameter, 0.5 if name.endswith("weight") else 0.0, 0.3)
    return network.to(dtype)


def some_views(network: SplitNet, step: int, size: int = 16, batch: int = 4) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    dtype = next(network.parameters()).dtype
    return torch.randn(len(network.models), batch, 3, size, size, generator=generator, dtype=dtype)


def train(network: SplitNet, execution: str, size: int = 16) -> dict[str, Tensor]:
    """Everything that two training steps with momentum and an evaluation leave behind, of a copy of the network."""
    network = copy.deepcopy(network).train()
    network.execution = execution
    optimizer = torch.optim.SGD([p for p in network.parameters() if p.requires_grad], lr=0.05, momentum=0.9)
    found: dict[str, Tensor] = {}
    for step in range(2):
        network.begin_step(step)
        logits_SBK = network(some_views(network, step, size))
        found[f"logits {step}"] = logits_SBK.detach()
        optimizer.zero_grad()
        logits_SBK.log_softmax(dim=-1)[..., 0].square().mean().backward()
        optimizer.step()
    found |= {f"gradient {n}": p.grad for n, p in network.named_parameters() if p.grad is not None}
    found |= {f"momentum {i}": state["momentum_buffer"] for i, state in enumerate(optimizer.state.values())}
    network.eval()
    with torch.inference_mode():
        found["evaluation"] = network(some_views(network, 9, size)[0])
    assert network.execution == execution
    return found | network.state_dict()


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert list(found) == list(expected)
    for name, value in expected.items():
        scale = max(1.0, float(value.abs().max()))
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-12 * scale, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("family", FAMILIES)
def test_strategies_equal_the_loop(family: str) -> None:
    network, size = split_net(FAMILIES[family], 3 if family == "wrn" else 2), 32 if family in NEED_ROOM else 16
    expected = train(network, "loop", size)
    for execution in ("stacked", "parallel"):
        assert_same(train(network, execution, size), expected)

"""Every strategy computes what the loop computes: logits, gradients, statistics, masks; or says why it does not run."""

import copy
import itertools
import logging
import threading
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import model.execution
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
from model.execution.stacking import NotStackable, Stacked
from model.execution.streams import Streams
from model.execution.threads import Threads
from model.layers.random import RandomLayer
from model.layers.resnet_parts import ResNetSkeleton, cifar_stem, deep_stem, make_stage, projection_shortcut
from model.layers.split_attention import SplitAttentionBottleneck
from model.options import EXECUTIONS
from model.splitnet import SplitNet
from tests.processes import run_processes
from tests.waits import needs_gpu
from utils.errors import RunError
from utils.macs import count_macs

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


class Unknown(nn.Module):
    """A user's network with an operation that has no stacked form."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.fc = nn.Linear(4, K)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        return self.fc(torch.cumsum(self.norm(self.conv(images_BCHW)).mean((2, 3)), dim=0))


class DropsUnseen(nn.Module):
    """A user's network that draws from the default generator."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(12, K)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        return self.fc(F.dropout(F.adaptive_avg_pool2d(images_BCHW, 2).flatten(1), training=self.training))


FALLBACKS = {
    "unknown": ("stacked", [Unknown, Unknown], "cumsum has no stacked form"),
    "different": ("stacked", [FAMILIES["wrn"], FAMILIES["resnet"]], "differ in structure"),
    "unseen": ("parallel", [DropsUnseen, DropsUnseen], "draws random numbers"),
}


@pytest.mark.parametrize("case", FALLBACKS)
def test_what_cannot_run_says_why_in_one_line_and_runs_as_a_loop(case: str, caplog: pytest.LogCaptureFixture) -> None:
    execution, makers, message = FALLBACKS[case]
    network = SplitNet([make() for make in makers]).double()
    before = copy.deepcopy(network.state_dict())
    network.execution = execution
    with caplog.at_level(logging.INFO), torch.no_grad():
        network.begin_step(1)
        views = some_views(network, 0)
        torch.manual_seed(0)
        found_SBK = network(views)
        network(views)
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 1
    assert message in lines[0]
    assert lines[0].startswith(f"execution {execution}: ")
    assert network.execution == "loop"
    reference = SplitNet([make() for make in makers]).double()
    reference.load_state_dict(before)
    reference.begin_step(1)
    torch.manual_seed(0)
    assert torch.equal(found_SBK, reference(views))


WRONG = {
    "of each other": lambda self: torch.cat(self.tensors[::-1]),
    "not finite": lambda self: torch.cat(self.tensors).fill_(torch.nan),
}


@pytest.mark.parametrize("weights", WRONG)
def test_a_strategy_that_would_be_wrong_is_not_used(
    weights: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = split_net(FAMILIES["wrn"], 2)
    network.execution = "stacked"
    monkeypatch.setattr("model.execution.stacking.Joined.cat", WRONG[weights])
    with caplog.at_level(logging.INFO):
        network(some_views(network, 0))
    assert "differ from the loop's" in caplog.text
    assert network.execution == "loop"


def test_the_trial_is_made_in_whole_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """A strategy's kernels may use TF32 where the loop's do not, and after many layers that looks like a mistake."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    seen: list[bool] = []

    class Network(nn.Linear):
        def forward(self, images_BCHW: Tensor) -> Tensor:
            seen.append(torch.backends.cudnn.allow_tf32)
            return super().forward(images_BCHW.flatten(1))

    network = SplitNet([Network(12, K), Network(12, K)]).double()
    network.execution = "parallel"
    views_SBCHW = torch.randn(2, 4, 3, 2, 2, dtype=torch.float64)
    network(views_SBCHW)
    assert network.execution == "parallel"
    assert seen[:-2]
    assert not any(seen[:-2])
    assert all(seen[-2:])  # the pass itself


def chosen_by_two(rank: int, world_size: int, refusing: int) -> dict[str, str]:
    """Executions in use after a training pass, where process 1 cannot use stacked."""
    real = model.execution._tried

    def tried(name: str, *args: Any) -> Any:
        if name == "stacked" and rank == refusing:
            raise NotStackable("its images are odd")
        return real(name, *args)

    model.execution._tried = tried
    found = {}
    for name in ("stacked", "parallel", "auto"):
        network = split_net(FAMILIES["wrn"], 2).train()
        network.execution = name
        network(some_views(network, 0))
        found[name] = network.execution
    return found


def test_a_strategy_that_one_process_cannot_use_is_used_by_none(tmp_path: Path) -> None:
    results = run_processes(2, chosen_by_two, tmp_path / "r", 1)
    assert [result["stacked"] for result in results] == ["loop", "loop"]
    assert [result["parallel"] for result in results] == ["parallel", "parallel"]
    assert results[0]["auto"] == results[1]["auto"] != "stacked"


def test_a_strategy_may_give_zeros_where_the_loop_does() -> None:
    network = split_net(FAMILIES["wrn"], 2)
    for one in network.models:
        for parameter in one.fc.parameters():
            nn.init.zeros_(parameter)
    network.execution = "stacked"
    assert not network(some_views(network, 0)).any()
    assert network.execution == "stacked"


ACROSS_IMAGES = {
    "mean over images": lambda x: x.mean(0),
    "flatten all": lambda x: x.flatten(),
    "first image": lambda x: x[0],
    "first images": lambda x: x[:2],
    "shuffled images": lambda x: x[torch.tensor([1, 0])],
    "cat of images": lambda x: torch.cat([x, x]),
    "value": lambda x: bool(x),
    "shared tensor": lambda x: x * torch.ones(1, 4, 1, 1),
    "fold images into channels": lambda x: x.view(2, 8, 3, 3),
    "iterate": lambda x: torch.stack(list(x)),
    "write into a part": lambda x: x[:, :2].mul_(2),
    "all numbers": lambda x: x - x.mean(),
}


@pytest.mark.parametrize("case", ACROSS_IMAGES)
def test_operations_that_networks_would_share_are_refused(case: str) -> None:
    with pytest.raises(NotStackable):
        ACROSS_IMAGES[case](Stacked(torch.randn(4, 8, 3, 3), 2))


def test_auto_times_the_strategies_and_leaves_nothing_behind(caplog: pytest.LogCaptureFixture) -> None:
    network = split_net(FAMILIES["wrn"], 2)
    network.begin_step(3)
    network.execution = "auto"
    expected = train(network, "loop")
    with caplog.at_level(logging.INFO):
        views = some_views(network, 0)
        network.begin_step(0)
        logits_SBK = network(views)
    (line,) = [record.getMessage() for record in caplog.records]
    assert all(f"{name} " in line for name in ("loop", "parallel", "stacked"))
    assert network.execution in ("loop", "parallel", "stacked")
    assert line.endswith(f"training pass: {network.execution}.")
    torch.testing.assert_close(logits_SBK, expected["logits 0"], rtol=0, atol=1e-12)
    assert all(int(n.num_batches_tracked) == 1 for n in network.modules() if isinstance(n, nn.BatchNorm2d))
    assert all(p.grad is None for p in network.parameters())


class Clocked:
    """A recorder whose replays take seconds of a clock of its own, one after another of those given."""

    def __init__(self, seconds: Sequence[float], refuses: Sequence[int] = ()) -> None:
        self.now, self.recorded, self.seconds, self.refuses = 0.0, 0, seconds, refuses

    def warm_up(self, function: Callable[[], Any]) -> Any:
        self.now += 1 - 0.1 * self.recorded  # as it is, the last one is the fastest
        return function()

    def record(self, function: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
        number, self.recorded = self.recorded, self.recorded + 1
        if number in self.refuses:
            raise RunError("it cannot be captured.")

        def replay() -> None:
            self.now += self.seconds[number]

        return function(), replay


@pytest.mark.parametrize(("refuses", "chosen"), [((), "parallel"), ((1,), "loop")])
def test_auto_times_replays_where_steps_are_replayed(
    refuses: tuple[int, ...], chosen: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    recorder = Clocked((0.2, 0.1, 0.3), refuses)
    monkeypatch.setattr("model.execution.time.perf_counter", lambda: recorder.now)
    network = split_net(FAMILIES["wrn"], 2)
    network.begin_step(3)
    network.execution = "auto"
    network.recorder = recorder
    with caplog.at_level(logging.INFO):
        network(some_views(network, 0))
    times = ["loop 200.0 ms", "parallel 100.0 ms", "stacked 300.0 ms"]
    shown = ", ".join(text for number, text in enumerate(times) if number not in refuses)
    assert caplog.messages[-1] == f"execution auto: {shown} for a replayed training pass: {chosen}."
    assert caplog.messages[:-1] == ["execution auto leaves parallel out: it cannot be captured."] * len(refuses)
    assert (network.execution, recorder.recorded) == (chosen, 3)
    assert all(int(n.num_batches_tracked) == 1 for n in network.modules() if isinstance(n, nn.BatchNorm2d))
    assert all(p.grad is None for p in network.parameters())
    assert network._execution.recorder is recorder
    assert copy.deepcopy(network)._execution.recorder is None


def test_masks_depend_on_step_network_and_layer_only() -> None:
    network = split_net(lambda: WideResNet(16, 1, K, dropout=0.5), 2)
    first, second = ([m for m in one.modules() if isinstance(m, RandomLayer)] for one in network.models)
    features = torch.ones(64, 32, 4, 4)

    def masks(key: int) -> list[Tensor]:
        network.begin_step(key)
        return [layer(features) for layer in (*first, *second)]

    one, again, other = masks(1), masks(1), masks(2)
    assert len(one) == 12
    assert all(torch.equal(a, b) for a, b in zip(one, again, strict=True))
    for a, b in [*zip(one, other, strict=True), *itertools.combinations(one, 2)]:
        kept, both = float((a > 0).float().mean()), float(((a > 0) & (b > 0)).float().mean())
        assert abs(kept - 0.5) < 0.02  # standard error 0.003
        assert abs(both - 0.25) < 0.02


def test_without_a_key_masks_follow_the_seed_and_change_from_pass_to_pass() -> None:
    network = split_net(FAMILIES["wrn"], 2)
    views = some_views(network, 0)
    torch.manual_seed(1)
    first, second = network(views), network(views)
    torch.manual_seed(1)
    assert torch.equal(network(views), first)
    assert not torch.equal(second, first)


@pytest.mark.parametrize("execution", ["stacked", "parallel"])
def test_bf16_and_channels_last(execution: str) -> None:
    network = split_net(FAMILIES["senet"], 2, torch.float32)
    network.to(memory_format=torch.channels_last).train()
    views = some_views(network, 0, 32)
    found = []
    for name in ("loop", execution):
        one = copy.deepcopy(network)
        one.execution = name
        one.begin_step(0)
        with torch.autocast("cpu", torch.bfloat16):
            logits_SBK = one(views)
        logits_SBK.float().square().mean().backward()
        found.append((logits_SBK.float(), one.models[1].get_parameter("layer1.0.conv1.weight").grad))
        assert one.execution == name
        assert logits_SBK.dtype == torch.bfloat16
    for expected, value in zip(*found, strict=True):
        assert (value - expected).norm() < 0.1 * expected.norm()
    assert found[1][1].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("execution", ["stacked", "parallel"])
def test_images_get_their_gradients_too(execution: str) -> None:
    network = split_net(FAMILIES["wide_resnet"], 2).eval()
    gradients = []
    for name in ("loop", execution):
        network.execution = name
        views = some_views(network, 0).requires_grad_()
        gradients.append(torch.autograd.grad(network(views).square().sum(), views)[0])
    torch.testing.assert_close(gradients[1], gradients[0], rtol=0, atol=1e-12)


@pytest.mark.slow
def test_stacked_networks_compile_whole() -> None:
    network = split_net(FAMILIES["wrn"], 2)
    network.execution = "stacked"
    network.begin_step(0)
    views = some_views(network, 0)
    expected_SBK = copy.deepcopy(network)(views)
    network(views)  # the first pass builds and tries the strategy
    assert network.execution == "stacked"
    compiled = torch.compile(network, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(views), expected_SBK, rtol=0, atol=1e-12)


def test_macs_are_counted_whatever_the_strategy() -> None:
    network = split_net(FAMILIES["wrn"], 2)
    expected = count_macs(network, (3, 16, 16))
    network.execution = "stacked"
    network(some_views(network, 0))
    assert count_macs(network, (3, 16, 16)) == expected


@pytest.mark.parametrize(("of_process", "networks", "of_each"), [(6, 3, 2), (7, 2, 3), (2, 4, 1)])
def test_networks_in_threads_share_the_threads_of_the_process(
    monkeypatch: pytest.MonkeyPatch, of_process: int, networks: int, of_each: int
) -> None:
    asked: list[tuple[str, int]] = []
    monkeypatch.setattr(torch, "get_num_threads", lambda: of_process)
    monkeypatch.setattr(
        torch, "set_num_threads", lambda number: asked.append((threading.current_thread().name, number))
    )
    Threads([nn.Identity() for _ in range(networks)])
    here = threading.current_thread().name
    assert sorted(asked[:-1]) == [(f"network_{i}", of_each) for i in range(networks)]
    assert asked[-1] == (here, of_process)


def test_a_failing_network_fails_in_its_thread_as_in_the_loop() -> None:
    network = split_net(FAMILIES["wrn"], 2).eval()
    threads = Threads([*network.models])
    with pytest.raises(RuntimeError, match="channels"):
        threads(torch.zeros(2, 1, 4, 8, 8, dtype=torch.float64))


def test_on_several_gpus_no_network_waits_for_the_answer_of_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy between two GPUs makes the streams of both wait, so no logits may move before every network has begun."""
    events: list[str] = []

    class Map(Tensor):
        def to(self, device: torch.device, **_: Any) -> Tensor:  # type: ignore[override]
            events.append(f"to {device.index}")
            return self

        def record_stream(self, stream: Any) -> None: ...

    class Network(nn.Module):
        def forward(self, images_BCHW: Tensor) -> Tensor:
            events.append("network")
            return images_BCHW.flatten(1)

    for name in ("Stream", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, lambda device: Mock(device=device))
    monkeypatch.setattr(torch.cuda, "stream", nullcontext)
    gpus = [torch.device("cuda", number) for number in range(3)]
    logits_SBK = Streams([Network() for _ in gpus], gpus)(torch.zeros(3, 2, 3, 1, 1).as_subclass(Map))
    assert logits_SBK.shape == (3, 2, 3)
    assert events == ["to 0", "network", "to 1", "network", "to 2", "network", "to 0", "to 0", "to 0"]


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match="use loop, parallel, stacked, auto"):
        SplitNet([nn.Linear(1, 1)]).execution = "fast"
    assert EXECUTIONS[0] == "loop"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("family", ["wrn", "pyramidnet", "densenet"])
def test_strategies_equal_the_loop_on_a_gpu(family: str) -> None:
    network = split_net(FAMILIES[family], 2).to("cuda")
    expected = train(network, "loop")
    for execution in ("stacked", "parallel"):
        assert_same(train(network, execution), expected)


@needs_gpu
def test_streams_share_memory_that_hardly_suffices_without_mixing_it_up() -> None:
    """A block that one stream gives back must not reach another before its last reader is done."""

    def one() -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(3, 64, 3),
            nn.ReLU(),
            nn.Conv2d(64, 64, 3),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(64, K),
        )

    network = split_net(one, 4).to("cuda").eval()
    views = [some_views(network, step, size=32, batch=64).cuda() for step in range(8)]

    def logits_of(execution: str, some: list[Tensor]) -> list[Tensor]:
        network.execution = execution
        with torch.no_grad():
            return [network(2 * one).cpu() for one in some]  # made anew, and given back while streams read them

    expected = logits_of("loop", views)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    logits_of("parallel", views[:1])  # takes what a pass needs
    room = torch.cuda.max_memory_reserved()
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(1.05 * room / torch.cuda.get_device_properties(0).total_memory)
    try:
        found = logits_of("parallel", views)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert network.execution == "parallel"
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)

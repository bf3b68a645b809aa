"""Batch normalisation over all processes: two and three of them give what one gives on the same global batch."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torchvision
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.module import register_module_forward_pre_hook

from dataset.sampler import shard
from model import BackboneRequest, backbones, build_network
from model.layers import sync_norm
from model.layers.narrow_norm import widen_narrow_norms
from model.layers.sync_norm import ProcessSyncBatchNorm, SyncBatchNorm, synchronise_batchnorm
from tests.networks import LIBRARY_NETWORKS, needs_timm
from tests.processes import run_processes
from utils import distributed
from utils.errors import UserError

CPU, GPU = torch.device("cpu"), torch.device("cuda")  # where torch's own synchronised norms take over


def small_net() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.Conv2d(5, 4, 3, 3), nn.BatchNorm2d(4), nn.Flatten()
    ).double()


def images(count: int) -> Tensor:
    return torch.randn(count, 3, 20, 20, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def step(net: nn.Module, batch: Tensor, scale: float) -> dict[str, Tensor]:
    loss = net(batch).square().sum(dim=1).mean() * scale
    loss.backward()
    return {name: p.grad for name, p in net.named_parameters() if p.grad is not None}


def timms_net() -> nn.Module:
    """With BatchNormAct2d, whose activation is SiLU here, and is lost where only the norm is kept."""
    timm = pytest.importorskip("timm")
    torch.manual_seed(3)
    return timm.create_model("test_efficientnet", num_classes=4).double()


NETS: dict[str, Callable[[], nn.Module]] = {"small": small_net, "timm": timms_net}


def synced_step(rank: int, world_size: int, count: int, which: str) -> dict[str, Any]:
    net = synchronise_batchnorm(NETS[which](), CPU)
    mine = shard(count, rank, world_size)
    gradients = step(net, images(count)[mine], (mine.stop - mine.start) * world_size / count)
    for gradient in gradients.values():
        distributed.all_reduce_sum(gradient).div_(world_size)
    return {"gradients": gradients, "buffers": dict(net.named_buffers()), "keys": list(net.state_dict())}


@pytest.mark.parametrize(
    ("world_size", "count", "which"),
    [
        (2, 8, "small"),
        pytest.param(3, 10, "small", marks=pytest.mark.slow),
        pytest.param(2, 7, "timm", marks=needs_timm),
    ],
)
def test_synchronised_batchnorm_equals_one_process(tmp_path: Path, world_size: int, count: int, which: str) -> None:
    reference = NETS[which]()
    expected = step(reference, images(count), 1.0)
    for result in run_processes(world_size, synced_step, tmp_path / "r", count, which):
        assert result["keys"] == list(reference.state_dict())
        for name, gradient in expected.items():
            torch.testing.assert_close(result["gradients"][name], gradient, rtol=0, atol=1e-10)
        for name, buffer in reference.named_buffers():
            torch.testing.assert_close(result["buffers"][name], buffer, rtol=0, atol=1e-10)


def test_synchronised_batchnorm_alone_is_batchnorm() -> None:
    net, other = small_net(), synchronise_batchnorm(small_net(), CPU)
    assert any(isinstance(part, ProcessSyncBatchNorm) for part in other.modules())
    torch.testing.assert_close(net(images(4)), other(images(4)), rtol=0, atol=0)
    torch.testing.assert_close(net.eval()(images(4)), other.eval()(images(4)), rtol=0, atol=0)


# ---- what is replaced, and what is refused ---------------------------------------------------------------------------


@contextmanager
def running_norms() -> Iterator[list[_BatchNorm]]:
    """The batch norms that run within the context."""
    ran: list[_BatchNorm] = []
    hook = register_module_forward_pre_hook(lambda m, _: ran.append(m) if isinstance(m, _BatchNorm) else None)
    try:
        yield ran
    finally:
        hook.remove()


@pytest.mark.parametrize(
    "arch",
    LIBRARY_NETWORKS,
)
def test_every_network_stays_the_same_and_every_norm_of_it_is_synchronised(arch: str) -> None:
    """Of the libraries; of our own backbones in test_model_contract.py."""
    torch.manual_seed(0)
    side = backbones.get(arch).crop_size or 224
    network = build_network(BackboneRequest(arch=arch, num_classes=5, crop_size=side))
    widen_narrow_norms(network)
    for module in network.modules():
        if isinstance(module, _BatchNorm):  # a norm that is skipped, or whose values are lost, shows
            nn.init.uniform_(module.running_mean, -0.1, 0.1)
            nn.init.uniform_(module.weight, 0.5, 1.5)
    for parameter in network.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.02)
    network.eval()
    images_BCHW = torch.randn(1, 3, side, side)
    keys, tensors = list(network.state_dict()), [id(p) for p in (*network.parameters(), *network.buffers())]
    with torch.inference_mode():
        expected_BK = network(images_BCHW)
        assert expected_BK.abs().max() > 0
        # the GPU's form last: it holds the same tensors, and is not trained here
        for device, kind in ((GPU, nn.SyncBatchNorm), (CPU, ProcessSyncBatchNorm)):
            synced = synchronise_batchnorm(copy.deepcopy(network) if device == GPU else network, device)
            with running_norms() as ran:
                assert torch.equal(synced(images_BCHW), expected_BK)
            assert all(isinstance(norm, kind) for norm in ran)
            assert list(synced.state_dict()) == keys
    assert [id(p) for p in (*network.parameters(), *network.buffers())] == tensors


class Doubled(nn.BatchNorm2d):
    """Does more than its base."""

    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


class ByItself(nn.Module):
    """A batch norm that inherits nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("running_var", torch.ones(5))


def patched() -> nn.Module:
    norm = nn.BatchNorm2d(5)
    norm.forward = lambda x: x  # type: ignore[method-assign, assignment]
    return norm


@pytest.mark.parametrize(
    ("norm", "named"),
    [
        (Doubled(5), "Doubled"),
        (nn.LazyBatchNorm2d(), "LazyBatchNorm2d"),
        (ByItself(), "ByItself"),
        (patched(), "BatchNorm2d"),
    ],
    ids=["subclass", "lazy", "own", "patched"],
)
@pytest.mark.parametrize("device", [CPU, GPU], ids=str)
def test_a_norm_of_another_kind_is_refused_by_name_and_nothing_is_replaced(
    norm: nn.Module, named: str, device: torch.device
) -> None:
    net = nn.Sequential(nn.BatchNorm2d(5), nn.Sequential(norm))
    with pytest.raises(UserError, match=rf"--is_syncbn 1: the layer 1\.0 is .*{named}.*Leave the flag away\."):
        synchronise_batchnorm(net, device)
    assert type(net[0]) is nn.BatchNorm2d


def test_what_normalises_by_no_batch_is_let_alone() -> None:
    net = nn.Sequential(
        torchvision.ops.FrozenBatchNorm2d(5), nn.InstanceNorm2d(5, track_running_stats=True), nn.GroupNorm(1, 5)
    )
    before = [*net]
    synchronise_batchnorm(net, CPU)
    assert all(a is b for a, b in zip(before, net, strict=True))


def test_a_norm_in_two_places_stays_one_and_a_norm_alone_is_replaced() -> None:
    norm = nn.BatchNorm2d(5)
    net = synchronise_batchnorm(nn.ModuleDict({"a": norm, "b": nn.Sequential(norm)}), CPU)
    assert net["a"] is net["b"][0]
    assert isinstance(net["a"], ProcessSyncBatchNorm)
    assert isinstance(synchronise_batchnorm(norm, CPU), ProcessSyncBatchNorm)
    assert synchronise_batchnorm(net, CPU)["a"] is net["a"]  # again: nothing to do


# ---- the norm of GPUs ------------------------------------------------------------------------------------------------


@pytest.fixture
def two_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """A job of two processes that have the same images, and what a GPU's kernels compute, in plain operations."""

    def over(value: Tensor) -> list[int]:
        return [0, *range(2, value.dim())]

    def wide(value_C: Tensor, like: Tensor) -> Tensor:
        return value_C.view(1, -1, *[1] * (like.dim() - 2))

    def stats(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        return x.mean(over(x)), (x.var(over(x), correction=0) + eps).rsqrt()

    def gathered(x, means_WC, invstds_WC, running_mean, running_var, momentum, eps, counts_W):  # type: ignore[no-untyped-def]
        share_W1 = (counts_W / counts_W.sum()).unsqueeze(1)
        mean_C = (share_W1 * means_WC).sum(dim=0)
        variance_C = (share_W1 * (invstds_WC.pow(-2) - eps + (means_WC - mean_C).square())).sum(dim=0)
        running_mean.lerp_(mean_C, momentum)
        running_var.lerp_(variance_C * counts_W.sum() / (counts_W.sum() - 1), momentum)
        return mean_C, (variance_C + eps).rsqrt()

    def normalised(x, weight, bias, mean_C, invstd_C, eps):  # type: ignore[no-untyped-def]
        return (x - wide(mean_C, x)) * wide(invstd_C * weight, x) + wide(bias, x)

    def reduced(dy, x, mean_C, invstd_C, weight, *_):  # type: ignore[no-untyped-def]
        products_C = (dy * (x - wide(mean_C, x))).sum(over(x))
        return dy.sum(over(x)), products_C, products_C * invstd_C, dy.sum(over(x))

    def of_input(dy, x, mean_C, invstd_C, weight, sum_C, products_C, counts_W):  # type: ignore[no-untyped-def]
        centred = (x - wide(mean_C, x)) * wide(invstd_C.square() * products_C / counts_W.sum(), x)
        return (dy - wide(sum_C / counts_W.sum(), x) - centred) * wide(invstd_C * weight, x)

    kernels = {
        "stats": stats,
        "gather_stats_with_counts": gathered,
        "elemt": normalised,
        "backward_reduce": reduced,
        "backward_elemt": of_input,
    }
    for name, function in kernels.items():
        monkeypatch.setattr(torch, f"batch_norm_{name}", function)
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda group=None: 2)
    monkeypatch.setattr(sync_norm, "gather_into", lambda out, own, group: out.copy_(own.repeat(2)))
    monkeypatch.setattr(dist, "all_reduce", lambda sums, group: sums.mul_(2))


def test_the_norm_of_gpus_is_the_norm_of_all_images_together(two_alike: None) -> None:
    torch.manual_seed(0)
    plain = nn.BatchNorm2d(5).double()
    nn.init.uniform_(plain.weight)
    nn.init.uniform_(plain.bias)
    synced = synchronise_batchnorm(copy.deepcopy(plain), GPU)
    x = torch.randn(4, 5, 3, 3, dtype=torch.float64, requires_grad=True)
    factor = torch.randn_like(x)
    found = synced(x)
    (found * factor).sum().backward()
    gradient, x.grad = x.grad, None
    expected = plain(torch.cat([x, x]))
    (expected * torch.cat([factor, factor])).sum().backward()
    torch.testing.assert_close(found, expected[:4])
    torch.testing.assert_close(gradient, x.grad / 2)  # its two copies have the same
    for one, other in zip(synced.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad / 2)  # DDP adds up what each process has
    for one, other in zip(synced.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(one, other)


def test_the_norm_of_gpus_reads_nothing(two_alike: None) -> None:
    """A fake tensor has no values: who asks for one, or indexes by a mask, fails."""
    with FakeTensorMode():
        norm = SyncBatchNorm(5)
        output = norm(x := torch.randn(4, 5, 3, 3, requires_grad=True))
        output.sum().backward()
        assert output.shape == x.grad.shape == x.shape
        with pytest.raises(DataDependentOutputException):
            float(output.sum())

"""Batch normalisation over all processes: two and three of them give what one gives on the same global batch."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dataset.sampler import shard
from model.layers.sync_norm import ProcessSyncBatchNorm, synchronise_batchnorm
from tests.processes import run_processes
from utils import distributed


def small_net() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.Conv2d(5, 4, 3), nn.BatchNorm2d(4), nn.Flatten()
    ).double()


def images(count: int) -> Tensor:
    return torch.randn(count, 3, 6, 6, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def step(net: nn.Module, batch: Tensor, scale: float) -> dict[str, Tensor]:
    loss = net(batch).square().sum(dim=1).mean() * scale
    loss.backward()
    return {name: p.grad for name, p in net.named_parameters() if p.grad is not None}


def synced_step(rank: int, world_size: int, count: int) -> dict[str, Any]:
    net = synchronise_batchnorm(small_net(), torch.device("cpu"))
    mine = shard(count, rank, world_size)
    gradients = step(net, images(count)[mine], (mine.stop - mine.start) * world_size / count)
    for gradient in gradients.values():
        distributed.all_reduce_sum(gradient).div_(world_size)
    return {"gradients": gradients, "buffers": dict(net.named_buffers()), "keys": list(net.state_dict())}


@pytest.mark.parametrize(("world_size", "count"), [(2, 8), pytest.param(3, 10, marks=pytest.mark.slow)])
def test_synchronised_batchnorm_equals_one_process(tmp_path: Path, world_size: int, count: int) -> None:
    reference = small_net()
    expected = step(reference, images(count), 1.0)
    for result in run_processes(world_size, synced_step, tmp_path / "r", count):
        assert result["keys"] == list(reference.state_dict())
        for name, gradient in expected.items():
            torch.testing.assert_close(result["gradients"][name], gradient, rtol=0, atol=1e-10)
        for name, buffer in reference.named_buffers():
            torch.testing.assert_close(result["buffers"][name], buffer, rtol=0, atol=1e-10)


def test_synchronised_batchnorm_alone_is_batchnorm() -> None:
    net, other = small_net(), synchronise_batchnorm(small_net(), torch.device("cpu"))
    assert any(isinstance(part, ProcessSyncBatchNorm) for part in other.modules())
    torch.testing.assert_close(net(images(4)), other(images(4)), rtol=0, atol=0)
    torch.testing.assert_close(net.eval()(images(4)), other.eval()(images(4)), rtol=0, atol=0)

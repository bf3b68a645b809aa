"""Two and three processes give what one process gives on the same global batch."""

import os
import signal
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.sync_audit import SyncAudit
from dataset.mixup import apply_mix, draw_mix
from dataset.sampler import shard
from model.layers.sync_norm import ProcessSyncBatchNorm, synchronise_batchnorm
from tests.processes import run_processes
from training.interrupt import Stopped, StopRequest
from utils import distributed, launch
from utils.errors import RunError, UserError


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


@pytest.mark.parametrize(("world_size", "count"), [(2, 8), (3, 10)])
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


def gathered(rank: int, world_size: int) -> dict[str, Any]:
    rows = torch.full((rank + 1, 2), float(rank))
    return {
        "rows": distributed.all_gather_rows(rows),
        "counts": distributed.gather_counts(rank + 1, torch.device("cpu")),
        "agreed": asked_together(rank),
        "until_stopped": until_stopped(rank),
    }


def asked_together(rank: int) -> bool:
    request = StopRequest()
    request.number = 15 if rank == 1 else 0
    return request.agreed(torch.device("cpu"))


def until_stopped(rank: int) -> list[int]:
    """The batches that each process sees when process 1, with fewer of them, is signalled at its first."""
    request, seen = StopRequest(), []
    try:
        for batch in request.until_stopped(range((5, 2, 0)[rank]), rounds=5, device=torch.device("cpu"), every=2):
            seen.append(batch)
            request.number = signal.SIGTERM if rank == 1 else request.number
    except Stopped as stopped:
        seen.append(-stopped.number)
    return seen


def test_rows_of_uneven_processes_and_stop_requests(tmp_path: Path) -> None:
    results = run_processes(3, gathered, tmp_path / "r")
    for result in results:
        assert result["rows"][:, 0].tolist() == [0, 1, 1, 2, 2, 2]
        assert result["counts"] == [1, 2, 3]
        assert result["agreed"]
    seen = [result["until_stopped"] for result in results]
    assert seen == [[0, 1, -signal.SIGTERM], [0, 1, -signal.SIGTERM], [-signal.SIGTERM]]


def mixed(rank: int, world_size: int) -> dict[str, Any]:
    """Mixed views and labels; what the host waits for where it knows the processes' counts, and where not."""
    counts = [part.stop - part.start for part in (shard(7, other, world_size) for other in range(world_size))]
    mine = shard(7, rank, world_size)
    views, labels = torch.arange(2 * 7 * 3.0).view(2, 7, 3, 1, 1)[:, mine], torch.arange(7)[mine]
    mix = draw_mix(11, 5, alpha=0.2, global_batch=7, first=mine.start, count=counts[rank])
    with SyncAudit(torch.device("cpu")) as asking:
        expected = apply_mix(views, labels, mix)
    with SyncAudit(torch.device("cpu")) as knowing:
        views, targets = apply_mix(views, labels, mix, counts)
    assert torch.equal(views, expected[0])
    assert torch.equal(targets.labels_other_B, expected[1].labels_other_B)
    waits = [len(asking.found), len(knowing.found)]
    return {"views": views, "other": targets.labels_other_B, "lam": targets.lam, "waits": waits}


def test_mixup_does_not_depend_on_the_number_of_processes(tmp_path: Path) -> None:
    alone = mixed(0, 1)
    parts = run_processes(3, mixed, tmp_path / "r")
    torch.testing.assert_close(torch.cat([p["views"] for p in parts], dim=1), alone["views"], rtol=0, atol=0)
    assert torch.equal(torch.cat([p["other"] for p in parts]), alone["other"])
    assert all(p["lam"] == alone["lam"] for p in parts)
    for asking, knowing in (p["waits"] for p in parts):
        assert asking > knowing == 0


def test_mixup_mixes_all_views_with_one_weight_and_one_permutation() -> None:
    views = torch.rand(3, 6, 3, 4, 4)
    labels = torch.arange(6)
    mix = draw_mix(1, 2, alpha=0.2, global_batch=6, first=0, count=6)
    out, targets = apply_mix(views, labels, mix)
    for s in range(3):
        for b in range(6):
            partner = int(mix.partners[b])
            torch.testing.assert_close(out[s, b], mix.lam * views[s, b] + (1 - mix.lam) * views[s, partner])
            assert targets.labels_other_B[b] == labels[partner]
    assert float(targets.lam) == pytest.approx(mix.lam)
    assert draw_mix(1, 3, alpha=0.2, global_batch=6, first=0, count=6).lam != mix.lam


def test_mixup_weight_is_beta_distributed() -> None:
    weights = torch.tensor([draw_mix(9, i, alpha=0.2, global_batch=1, first=0, count=1).lam for i in range(2000)])
    # Beta(a, a): mean 1/2, variance 1 / (4 (2a + 1))
    assert abs(weights.mean() - 0.5) < 0.04
    assert abs(weights.var() - 1 / (4 * 1.4)) < 0.01


def test_gpu_ids_that_do_not_exist_are_refused() -> None:
    with pytest.raises(UserError, match=r"--gpu_ids 0,99: no such GPU"):
        launch.visible_gpus(no_cuda=False, gpu=None, gpu_ids="0,99")
    with pytest.raises(UserError, match=r"--gpu 99: no such GPU"):
        launch.visible_gpus(no_cuda=False, gpu=99, gpu_ids=None)
    with pytest.raises(UserError, match=r"--gpu_ids 'zero'"):
        launch.visible_gpus(no_cuda=False, gpu=None, gpu_ids="zero")
    assert launch.visible_gpus(no_cuda=True, gpu=None, gpu_ids=None) == []


def test_several_gpus_are_named_once_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    named = launch.named_gpus("--devices", "cuda:1, cuda:0")
    assert named == [torch.device("cuda", 1), torch.device("cuda", 0)]
    with pytest.raises(UserError, match="--devices cuda,cuda:0: names a GPU twice"):
        launch.named_gpus("--devices", "cuda,cuda:0")


def test_several_nodes_need_a_meeting_point() -> None:
    with pytest.raises(UserError, match="meeting point"):
        launch.spawn(print, (), processes=1, nodes=2, node=0, url="env://")
    with pytest.raises(UserError, match=r"--dist_url host:1"):
        launch.spawn(print, (), processes=1, nodes=2, node=0, url="host:1")


def test_a_port_in_use_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        for name, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": 0, "WORLD_SIZE": 2}.items():
            monkeypatch.setenv(name, str(value))
        with pytest.raises(RunError, match=rf"--dist_url: no meeting at 127.0.0.1:{port} \(port in use") as caught:
            launch.join([])
    assert "\n" not in str(caught.value)


def test_a_second_signal_ends_the_process_unless_it_is_an_echo(monkeypatch: pytest.MonkeyPatch) -> None:
    now, raised = [100.0], []
    monkeypatch.setattr("training.interrupt.time.monotonic", lambda: now[0])
    monkeypatch.setattr("training.interrupt.signal.raise_signal", raised.append)
    with StopRequest() as request:
        os.kill(os.getpid(), signal.SIGTERM)
        assert (request.number, raised) == (signal.SIGTERM, [])
        now[0] += 1.0  # a launcher passes on what the terminal has sent already
        os.kill(os.getpid(), signal.SIGINT)
        assert (request.number, raised) == (signal.SIGTERM, [])
        now[0] += 10.0
        os.kill(os.getpid(), signal.SIGINT)
        assert raised == [signal.SIGINT]


def test_without_a_signal_every_batch_comes() -> None:
    request = StopRequest()
    assert list(request.until_stopped(range(5), rounds=3, device=torch.device("cpu"))) == [0, 1, 2, 3, 4]

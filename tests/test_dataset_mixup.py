"""Mixup: one weight and one permutation for all views, drawn and mixed alike however many processes there are."""

from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.sync_audit import SyncAudit
from dataset.mixup import apply_mix, draw_mix
from dataset.sampler import shard
from tests.processes import run_processes


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

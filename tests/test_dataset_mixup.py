"""Mixup and CutMix: one weight and permutation for all views, drawn and mixed alike by any number of processes."""

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torchvision.transforms import v2

from benchmarks.sync_audit import SyncAudit
from dataset.mixup import Box, Mix, apply_mix, as_cutmix, cutmix_box, draw_mix, is_cutmix_step
from dataset.sampler import shard
from tests.processes import run_processes


def mixed(rank: int, world_size: int) -> dict[str, Any]:
    """Mixed views and labels; what the host waits for where it knows the processes' counts, and where not."""
    counts = [part.stop - part.start for part in (shard(7, other, world_size) for other in range(world_size))]
    mine = shard(7, rank, world_size)
    views, labels = torch.arange(2 * 7 * 3 * 4.0).view(2, 7, 3, 2, 2)[:, mine], torch.arange(7)[mine]
    mix = draw_mix(11, 5, alpha=0.2, global_batch=7, first=mine.start, count=counts[rank])
    cut = replace(mix, lam=0.75, box=Box(0, 1, 1, 2))
    with SyncAudit(torch.device("cpu")) as asking:
        expected = apply_mix(views, labels, mix)
    with SyncAudit(torch.device("cpu")) as knowing:
        views, targets = apply_mix(views, labels, mix, counts)
    assert torch.equal(views, expected[0])
    assert torch.equal(targets.labels_other_B, expected[1].labels_other_B)
    cut_views, cut_targets = apply_mix(views, labels, cut, counts)
    assert torch.equal(cut_targets.labels_other_B, targets.labels_other_B)
    waits = [len(asking.found), len(knowing.found)]
    return {"views": views, "cut": cut_views, "other": targets.labels_other_B, "lam": targets.lam, "waits": waits}


@pytest.mark.slow
def test_mixup_does_not_depend_on_the_number_of_processes(tmp_path: Path) -> None:
    alone = mixed(0, 1)
    parts = run_processes(3, mixed, tmp_path / "r")
    torch.testing.assert_close(torch.cat([p["views"] for p in parts], dim=1), alone["views"], rtol=0, atol=0)
    assert torch.equal(torch.cat([p["cut"] for p in parts], dim=1), alone["cut"])
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


@pytest.mark.parametrize("alpha", [0.2, 1.0, 4.0])
def test_mixup_weight_is_beta_distributed(alpha: float) -> None:
    weights = torch.tensor([draw_mix(9, i, alpha=alpha, global_batch=1, first=0, count=1).lam for i in range(2000)])
    # Beta(a, a): mean 1/2, variance 1 / (4 (2a + 1))
    assert abs(weights.mean() - 0.5) < 0.04
    assert abs(weights.var() - 1 / (4 * (2 * alpha + 1))) < 0.01
    assert 0 <= weights.min() <= weights.max() <= 1


def test_every_permutation_is_as_likely() -> None:
    drawn = (draw_mix(4, i, alpha=0.2, global_batch=3, first=0, count=3).partners for i in range(3000))
    counts = Counter(tuple(partners.tolist()) for partners in drawn)
    assert len(counts) == 6
    assert all(abs(count - 500) < 5 * 500**0.5 for count in counts.values())


def test_weight_and_permutation_are_drawn_apart() -> None:
    mixes = [draw_mix(4, i, alpha=0.2, global_batch=2, first=0, count=2) for i in range(2000)]
    swapped, kept = ([mix.lam for mix in mixes if mix.partners[0] == place] for place in (1, 0))
    assert abs(np.mean(swapped) - np.mean(kept)) < 0.08


def test_a_draw_belongs_to_its_seed_and_step() -> None:
    def draw(seed: int, step: int) -> Mix:
        return draw_mix(seed, step, alpha=0.2, global_batch=50, first=0, count=50)

    first, same = draw(1, 2), draw(1, 2)
    assert first.lam == same.lam
    assert first.partners.tolist() == same.partners.tolist()
    for other in (draw(2, 2), draw(1, 3)):
        assert first.lam != other.lam
        assert first.partners.tolist() != other.partners.tolist()


def test_processes_hold_parts_of_one_permutation() -> None:
    whole = draw_mix(3, 8, alpha=0.2, global_batch=10, first=0, count=10)
    assert sorted(whole.partners.tolist()) == list(range(10))
    parts = [draw_mix(3, 8, alpha=0.2, global_batch=10, first=first, count=count) for first, count in ((0, 4), (4, 6))]
    assert [part.lam for part in parts] == [whole.lam, whole.lam]
    assert np.concatenate([part.partners for part in parts]).tolist() == whole.partners.tolist()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_images_and_labels_of_a_mix_worked_by_hand(dtype: torch.dtype) -> None:
    views = torch.tensor([[1.0, 3.0, -1.0], [8.0, 0.0, 4.0]], dtype=dtype).view(2, 3, 1, 1, 1)
    labels_B = torch.tensor([5, 6, 7])
    mixed, targets = apply_mix(views, labels_B, Mix(0.75, np.array([2, 0, 1])))
    assert mixed.dtype == dtype
    assert mixed.flatten().tolist() == [0.5, 2.5, 0.0, 7.0, 2.0, 3.0]
    assert targets.labels_B.tolist() == [5, 6, 7]
    assert targets.labels_other_B.tolist() == [7, 5, 6]
    assert (float(targets.lam), targets.lam.dtype, targets.lam.shape) == (0.75, torch.float32, ())


def test_a_weight_of_one_keeps_the_images_and_one_of_zero_takes_the_partners() -> None:
    views, partners = torch.rand(2, 4, 3, 2, 2), np.array([3, 2, 0, 1])
    assert torch.equal(apply_mix(views, torch.arange(4), Mix(1.0, partners))[0], views)
    assert torch.equal(apply_mix(views, torch.arange(4), Mix(0.0, partners))[0], views[:, partners])


# ---- CutMix ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(8, 8), (9, 13), (1, 5)])
def test_cutmix_is_torchvisions(monkeypatch: pytest.MonkeyPatch, size: tuple[int, int]) -> None:
    views = torch.rand(1, 4, 3, *size)
    labels_B = torch.tensor([0, 1, 2, 3])
    theirs = v2.CutMix(num_classes=4)
    generator = torch.Generator().manual_seed(0)
    for _ in range(40):
        lam = float(torch.rand((), generator=generator, dtype=torch.float64))
        row, column = (int(torch.randint(side, (), generator=generator)) for side in size)
        centres = iter([column, row])  # they draw the column first
        monkeypatch.setattr(theirs._dist, "sample", lambda shape=(), lam=lam: torch.tensor(lam, dtype=torch.float64))
        with monkeypatch.context() as patched:
            patched.setattr(torch, "randint", lambda *a, centres=centres, **k: torch.tensor([next(centres)]))
            expected, expected_targets_BK = theirs(views[0], labels_B)
        box = cutmix_box(lam, size, centre=(row, column))
        kept = 1 - (box.bottom - box.top) * (box.right - box.left) / (size[0] * size[1])
        mixed_views, targets = apply_mix(views, labels_B, Mix(kept, np.array([3, 0, 1, 2]), box))
        assert torch.equal(mixed_views[0], expected)
        both_BK = F.one_hot(targets.labels_B, 4) * targets.lam + F.one_hot(targets.labels_other_B, 4) * (
            1 - targets.lam
        )
        torch.testing.assert_close(both_BK, expected_targets_BK)


def test_a_cutmix_keeps_partners_and_says_what_part_of_the_image_is_left() -> None:
    rows, columns, areas = Counter[int](), Counter[int](), []
    for step in range(1500):
        mix = draw_mix(5, step, alpha=1.0, global_batch=4, first=1, count=2)
        cut = as_cutmix(mix, 5, step, (6, 10))
        assert cut.partners.tolist() == mix.partners.tolist()
        assert cut.box is not None
        height, width = cut.box.bottom - cut.box.top, cut.box.right - cut.box.left
        assert cut.lam == 1 - height * width / 60
        assert height <= 6 * (1 - mix.lam) ** 0.5 + 1e-9
        assert width <= 10 * (1 - mix.lam) ** 0.5 + 1e-9
        assert as_cutmix(mix, 5, step, (6, 10)) == cut
        areas.append(height * width)
        whole = as_cutmix(Mix(0.8, mix.partners), 5, step, (6, 10)).box  # half sides of 1 and 2 pixels
        assert whole is not None
        rows[whole.bottom], columns[whole.right] = rows[whole.bottom] + 1, columns[whole.right] + 1
    # the centre is any pixel, each as likely: two columns lead to the last end of a box
    assert all(abs(rows[end] - 1500 / 6) < 80 for end in range(1, 6))
    assert abs(rows[6] - 1500 / 6) < 80
    assert all(abs(columns[end] - 150) < 60 for end in range(2, 10))
    assert abs(columns[10] - 300) < 80
    assert len(set(areas)) == 20  # every one that such views can have


def test_the_kind_of_a_step_is_drawn_with_its_probability_and_apart_from_the_weight() -> None:
    kinds = [is_cutmix_step(3, step, switch_prob=0.3) for step in range(2000)]
    assert abs(np.mean(kinds) - 0.3) < 0.05
    assert not any(is_cutmix_step(3, step, switch_prob=0.0) for step in range(100))
    assert all(is_cutmix_step(3, step, switch_prob=1.0) for step in range(100))
    weights = [draw_mix(3, step, alpha=1.0, global_batch=1, first=0, count=1).lam for step in range(2000)]
    assert abs(np.corrcoef(kinds, weights)[0, 1]) < 0.08


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_step_is_chosen_as_timm_chooses(monkeypatch: pytest.MonkeyPatch) -> None:
    mixup = pytest.importorskip("timm.data.mixup")
    theirs = mixup.Mixup(mixup_alpha=0.2, cutmix_alpha=1.0, switch_prob=0.3, num_classes=2)
    for drawn in (0.0, 0.299, 0.3, 0.9):
        monkeypatch.setattr(np.random, "rand", lambda drawn=drawn: drawn)
        alphas: list[float] = []
        monkeypatch.setattr(np.random, "beta", lambda a, b, alphas=alphas: alphas.append(a) or 0.5)
        _, is_cutmix = theirs._params_per_batch()

        class Drawn:
            def random(self, drawn: float = drawn) -> float:
                return drawn

        monkeypatch.setattr("dataset.mixup.numpy_generator", lambda *parts: Drawn())
        assert is_cutmix_step(0, 0, switch_prob=0.3) == is_cutmix == (alphas == [1.0])

"""Distillation losses against golden values, definitions and finite differences."""

import json
from itertools import permutations
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from loss.classification import cross_entropy
from loss.distillation import distillation_kl, knowledge_synergy

GOLDEN = Path(__file__).parent / "golden"
SYNERGY = json.loads((GOLDEN / "dks.json").read_text())["loss"]
LMCL = json.loads((GOLDEN / "lmcl_loss.json").read_text())
FLOAT32 = {"rtol": 2e-4, "atol": 1e-5}
FLOAT64 = {"rtol": 1e-6, "atol": 1e-8}

precisions = pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, FLOAT64), (torch.float32, FLOAT32)], ids=["float64", "float32"]
)


def smoothed_synergy(logits_HBK: torch.Tensor) -> torch.Tensor:
    """The reference's form: every probability is smoothed before its logarithm."""
    K = logits_HBK.shape[-1]
    probs = (logits_HBK.softmax(dim=-1) + 1e-8) / (1 + 1e-8 * K)
    pairs = permutations(range(len(probs)), 2)
    return sum((probs[g].detach() * (probs[g].detach().log() - probs[h].log())).sum(dim=-1) for g, h in pairs)


@pytest.mark.parametrize("row", SYNERGY, ids=lambda row: f"K{row['K']}")
@pytest.mark.parametrize(
    ("dtype", "relative"), [(torch.float64, 1e-8), (torch.float32, 1e-5)], ids=["float64", "float32"]
)
def test_synergy_golden(row, dtype, relative):
    logits = torch.tensor(row["logits"], dtype=dtype, requires_grad=True)
    labels = torch.tensor(row["targets"])
    ce_sum = sum(cross_entropy(one, labels).mean() for one in logits)
    kl_sum = knowledge_synergy(logits).mean()
    (gradient,) = torch.autograd.grad(ce_sum + kl_sum, logits)
    found = {"ce_sum": ce_sum, "kl_sum": kl_sum, "total": ce_sum + kl_sum, "grad_norm": gradient.norm()}
    expected = {"ce_sum": row["ce_sum"]} | row["exact"]
    for name, value in found.items():
        assert value.item() == pytest.approx(expected[name], rel=relative), name


@pytest.mark.parametrize("row", SYNERGY, ids=lambda row: f"K{row['K']}")
def test_synergy_golden_of_the_reference(row):
    logits = torch.tensor(row["logits"], dtype=torch.float64, requires_grad=True)
    labels = torch.tensor(row["targets"])
    kl_sum = smoothed_synergy(logits).mean()
    total = sum(cross_entropy(one, labels).mean() for one in logits) + kl_sum
    (gradient,) = torch.autograd.grad(total, logits)
    assert kl_sum.item() == pytest.approx(row["kl_sum"], rel=1e-8)
    assert total.item() == pytest.approx(row["total"], rel=1e-8)
    assert gradient.norm().item() == pytest.approx(row["grad_norm"], rel=1e-8)


@pytest.mark.parametrize("num_heads", [1, 2, 3, 5])
@pytest.mark.parametrize("matching", ["dense", "top_down", "bottom_up", "none"])
def test_synergy_is_the_sum_over_its_pairs(num_heads, matching):
    torch.manual_seed(0)
    logits = torch.randn(num_heads, 4, 6, dtype=torch.float64, requires_grad=True)
    expected = torch.zeros(4, dtype=torch.float64)
    for g, h in permutations(range(num_heads), 2):  # g teaches h
        if matching == "dense" or (matching == "top_down" and g > h) or (matching == "bottom_up" and g < h):
            log_probs = logits[h].log_softmax(dim=-1)
            teacher = logits[g].detach().softmax(dim=-1)
            expected = expected + F.kl_div(log_probs, teacher, reduction="none").sum(dim=-1)
    found = knowledge_synergy(logits, matching=matching)
    torch.testing.assert_close(found, expected)
    (gradient,) = torch.autograd.grad(found.sum(), logits)
    learning = {"dense": slice(0, None), "top_down": slice(0, -1), "bottom_up": slice(1, None), "none": slice(0, 0)}
    expected_zero = torch.ones(num_heads, dtype=torch.bool)
    if num_heads > 1:
        expected_zero[learning[matching]] = False
    assert [(one == 0).all().item() for one in gradient] == expected_zero.tolist()


def test_synergy_refuses_an_unknown_matching():
    with pytest.raises(ValueError, match="dense, top_down"):
        knowledge_synergy(torch.zeros(2, 1, 3), matching="sideways")


@precisions
def test_distillation_golden(dtype, tolerance):
    golden = LMCL["kd"]
    student = torch.tensor(golden["student"], dtype=dtype, requires_grad=True)
    teacher = torch.tensor(golden["teacher"], dtype=dtype, requires_grad=True)
    loss = distillation_kl(student, teacher, temperature=golden["T"]).mean()
    gradient, none = torch.autograd.grad(loss, [student, teacher], allow_unused=True)
    torch.testing.assert_close(loss, torch.tensor(golden["expected"]["loss"], dtype=dtype), **tolerance)
    expected = torch.tensor(golden["expected"]["grad_student"], dtype=dtype)
    torch.testing.assert_close(gradient, expected, **tolerance)
    assert none is None


def test_distillation_gradcheck():
    torch.manual_seed(0)
    student = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(3, 5, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: distillation_kl(x, teacher, temperature=2.0), student)
    assert torch.autograd.gradgradcheck(lambda x: distillation_kl(x, teacher, temperature=2.0), student)


def test_distillation_broadcasts_and_is_zero_between_equals():
    torch.manual_seed(0)
    logits = torch.randn(3, 4, 6)
    pairs = distillation_kl(logits[:, None], logits[None], temperature=3.0)
    assert pairs.shape == (3, 3, 4)
    torch.testing.assert_close(pairs[1, 2], distillation_kl(logits[1], logits[2], temperature=3.0))
    assert (pairs.diagonal() == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_extreme_logits_stay_finite(dtype):
    logits = torch.tensor([[[1e4, -1e4, 0.0]], [[-1e4, 1e4, 0.0]], [[0.0, 0.0, 1e4]]], dtype=dtype, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        loss = knowledge_synergy(logits)
    assert loss.dtype == torch.float32
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    assert loss.isfinite().all()
    assert gradient.isfinite().all()

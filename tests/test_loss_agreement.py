"""Co-training losses: the published numbers, a plain reference for each, and their limits."""

import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from loss.agreement import AGREEMENT_LOSSES, js_divergence
from method.co_training import cot_weight

GOLDEN = json.loads((Path(__file__).parent / "golden" / "losses.json").read_text())["groups"]
CASES = [(group["logits"], case) for group in GOLDEN for case in group["cases"]]


def logits_of(num_networks: int, batch: int = 4, num_classes: int = 6, scale: float = 3.0) -> Tensor:
    generator = torch.Generator().manual_seed(num_networks)
    return scale * torch.randn(num_networks, batch, num_classes, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize(("logits", "case"), CASES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 2e-8), (torch.float32, 2e-5)])
def test_published_values_and_gradients(logits: list, case: dict, dtype: torch.dtype, tolerance: float) -> None:
    logits_SBK = torch.tensor(logits, dtype=dtype, requires_grad=True)
    warm_up_epochs = case["warm_up_epochs"] if case["warm_up"] else 0
    weight = cot_weight(case["epoch"], weight=case["cot_weight"], warm_up_epochs=warm_up_epochs)
    value = weight * AGREEMENT_LOSSES[case["choice"]](logits_SBK).mean()
    value.backward()
    assert value.item() == pytest.approx(case["value"], rel=tolerance)
    assert logits_SBK.grad.norm().item() == pytest.approx(case["grad_norm"], rel=tolerance)
    expected = torch.tensor(case["grad_first_network_first_image"], dtype=dtype)
    torch.testing.assert_close(logits_SBK.grad[0, 0], expected, rtol=10 * tolerance, atol=tolerance * case["grad_norm"])


def reference(name: str, logits_SBK: Tensor) -> Tensor:
    """The definitions, word for word, image by image; constants are detached: (S, B, K) -> (B,)."""
    probs = logits_SBK.softmax(dim=-1)
    num_networks, batch, _ = probs.shape

    def entropy(p: Tensor) -> Tensor:
        return -(p * p.log()).sum()

    def kl(target: Tensor, prediction: Tensor) -> Tensor:
        return (target.detach() * (target.detach().log() - prediction.log())).sum()

    def mse(target: Tensor, prediction: Tensor) -> Tensor:
        return ((prediction - target.detach()) ** 2).mean()

    def smooth_l1(target: Tensor, prediction: Tensor) -> Tensor:
        gap = (prediction - target.detach()).abs()
        return torch.where(gap < 1, 0.5 * gap**2, gap - 0.5).mean()

    values = []
    for b in range(batch):
        p = probs[:, b]
        mean = p.mean(dim=0)
        if name == "js_divergence":
            values.append(entropy(mean) - sum(entropy(q) for q in p) / num_networks)
            continue
        kind, _, against = name.rpartition("_")
        distance = {"kl": kl, "mse": mse, "smooth_l1": smooth_l1}[kind]
        if against == "mean":
            values.append(sum(distance(mean, q) for q in p))
        else:
            pairs = [(i, j) for i in range(num_networks) for j in range(num_networks) if i != j]
            values.append(sum(distance(p[j], p[i]) for i, j in pairs) / (num_networks - 1))
    return torch.stack(values)


@pytest.mark.parametrize("num_networks", [2, 3, 5])
@pytest.mark.parametrize("name", AGREEMENT_LOSSES)
def test_equals_its_definition(name: str, num_networks: int) -> None:
    logits_SBK = logits_of(num_networks).requires_grad_()
    weights_B = torch.linspace(0.5, 2, 4, dtype=torch.float64)
    ours, plain = AGREEMENT_LOSSES[name](logits_SBK), reference(name, logits_SBK)
    torch.testing.assert_close(ours, plain, rtol=1e-10, atol=1e-13)
    (gradient,) = torch.autograd.grad((weights_B * ours).sum(), logits_SBK)
    (expected,) = torch.autograd.grad((weights_B * plain).sum(), logits_SBK)
    torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("name", AGREEMENT_LOSSES)
def test_nothing_to_agree_on(name: str) -> None:
    single = logits_of(1).requires_grad_()
    value = AGREEMENT_LOSSES[name](single)
    assert value.shape == (4,)
    assert (value == 0).all()
    (gradient,) = torch.autograd.grad(value.sum(), single)
    assert gradient.abs().max() < 1e-15

    twins = logits_of(1).expand(3, -1, -1)
    assert AGREEMENT_LOSSES[name](twins).abs().max() < 1e-14


@pytest.mark.parametrize("name", AGREEMENT_LOSSES)
def test_order_of_networks_and_constant_shifts_do_not_matter(name: str) -> None:
    logits_SBK = logits_of(4)
    value = AGREEMENT_LOSSES[name](logits_SBK)
    assert (value > 0).all()
    torch.testing.assert_close(AGREEMENT_LOSSES[name](logits_SBK.flip(0)), value)
    torch.testing.assert_close(AGREEMENT_LOSSES[name](logits_SBK + logits_of(4, num_classes=1)), value)


def test_js_divergence_lies_between_zero_and_log_s() -> None:
    certain = 1e4 * torch.eye(3, dtype=torch.float64).unsqueeze(1)
    assert js_divergence(certain).item() == pytest.approx(math.log(3), rel=1e-12)
    (gradient,) = torch.autograd.grad(js_divergence(x := logits_of(3).requires_grad_()).sum(), x)
    assert gradient.abs().max() > 1e-3  # nothing is constant here


@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", AGREEMENT_LOSSES)
def test_huge_logits_give_finite_values_and_gradients(
    name: str, dtype: torch.dtype, autocast: torch.dtype | None
) -> None:
    rows = [[[1e4, -1e4, 0.0], [0.0, 0.0, 1e4]], [[-1e4, 1e4, 1.0], [0.0, 0.0, 1e4]], [[1e4, 1e4, 1e4], [0.0, 1.0, 0]]]
    logits_SBK = torch.tensor(rows).to(dtype).requires_grad_()
    with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
        loss_B = AGREEMENT_LOSSES[name](logits_SBK)
        (gradient,) = torch.autograd.grad(loss_B.mean(), logits_SBK)
    assert loss_B.dtype == torch.float32
    assert loss_B.isfinite().all()
    assert gradient.isfinite().all()


def test_the_published_spelling_and_the_right_one_are_the_same() -> None:
    for name, function in AGREEMENT_LOSSES.items():
        assert AGREEMENT_LOSSES[name.replace("separate", "seperate")] is function
        assert AGREEMENT_LOSSES[name.replace("seperate", "separate")] is function

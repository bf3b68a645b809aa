"""Cross-entropy, plain, smoothed and mixed; the same of every class by itself."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from loss import at_least_float32
from loss.classification import ClassLoss, cross_entropy, mixed_binary_cross_entropy, mixed_cross_entropy
from training.options import CLASS_LOSSES
from utils.targets import Targets, plain_targets

LABELS = torch.tensor([2, 0, 1])
LOGITS = torch.tensor([[1.0, 2.0, 4.0], [0.0, 0.0, 0.0], [-1.0, 3.0, 0.5]], dtype=torch.float64)


def by_hand(logits: list[float], label: int, smoothing: float) -> float:
    """Σ_k -target_k log p_k with target = (1 - ε) one_hot + ε / K."""
    log_sum = math.log(sum(math.exp(v) for v in logits))
    targets = [smoothing / len(logits) + (1 - smoothing) * (k == label) for k in range(len(logits))]
    return sum(t * (log_sum - v) for t, v in zip(targets, logits, strict=True))


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5])
def test_cross_entropy_of_each_image(smoothing: float) -> None:
    loss_B = cross_entropy(LOGITS, LABELS, label_smoothing=smoothing)
    expected = [by_hand(row, label, smoothing) for row, label in zip(LOGITS.tolist(), LABELS.tolist(), strict=True)]
    assert loss_B.dtype == torch.float64
    assert loss_B.tolist() == pytest.approx(expected, rel=1e-13)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_mixup_weighs_the_two_labels(smoothing: float) -> None:
    other = torch.tensor([0, 2, 2])
    loss_B = mixed_cross_entropy(LOGITS, Targets(LABELS, other, torch.tensor(0.25)), label_smoothing=smoothing)
    first = cross_entropy(LOGITS, LABELS, label_smoothing=smoothing)
    second = cross_entropy(LOGITS, other, label_smoothing=smoothing)
    torch.testing.assert_close(loss_B, 0.25 * first + 0.75 * second, rtol=1e-13, atol=0)


def test_without_mixup_it_is_cross_entropy_itself() -> None:
    assert torch.equal(mixed_cross_entropy(LOGITS, plain_targets(LABELS)), cross_entropy(LOGITS, LABELS))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_binary_cross_entropy_is_timms(smoothing: float) -> None:
    timm_loss = pytest.importorskip("timm.loss")
    mixup = pytest.importorskip("timm.data.mixup")
    theirs = timm_loss.BinaryCrossEntropy(smoothing=smoothing)(LOGITS, LABELS)
    plain_B = mixed_binary_cross_entropy(LOGITS, plain_targets(LABELS), label_smoothing=smoothing)
    torch.testing.assert_close(plain_B.mean(), theirs, rtol=1e-13, atol=0)
    lam = torch.tensor(0.25, dtype=torch.float64)
    target_BK = mixup.mixup_target(LABELS, 3, 0.25, smoothing).double()  # mixes with the batch in reverse
    theirs = timm_loss.BinaryCrossEntropy(smoothing=0.0)(LOGITS, target_BK)
    mixed_B = mixed_binary_cross_entropy(LOGITS, Targets(LABELS, LABELS.flip(0), lam), label_smoothing=smoothing)
    torch.testing.assert_close(mixed_B.mean(), theirs, rtol=1e-6, atol=0)


def test_binary_cross_entropy_of_each_image_by_hand() -> None:
    other = torch.tensor([0, 0, 0])
    loss_B = mixed_binary_cross_entropy(LOGITS, Targets(LABELS, other, torch.tensor(0.25)), label_smoothing=0.2)
    for row, label, loss in zip(LOGITS.tolist(), LABELS.tolist(), loss_B.tolist(), strict=True):
        total = 0.0
        for k, logit in enumerate(row):
            target = 0.8 * (0.25 * (k == label) + 0.75 * (k == 0)) + 0.2 / 3
            total += target * math.log1p(math.exp(-logit)) + (1 - target) * math.log1p(math.exp(logit))
        assert loss == pytest.approx(total / 3, rel=1e-12)
    images = torch.tensor([0, 2])  # a value belongs to its image alone
    alone_B = mixed_binary_cross_entropy(LOGITS[images], Targets(LABELS[images], other[images], torch.tensor(0.25)))
    whole_B = mixed_binary_cross_entropy(LOGITS, Targets(LABELS, other, torch.tensor(0.25)))
    assert torch.equal(alone_B, whole_B[images])


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_loss_of_a_run_is_the_one_that_is_named(smoothing: float) -> None:
    targets = Targets(LABELS, LABELS.flip(0), torch.tensor(0.6))
    named = dict(zip(CLASS_LOSSES, (mixed_cross_entropy, mixed_binary_cross_entropy), strict=True))
    for kind, function in named.items():
        loss_B = ClassLoss(kind=kind, label_smoothing=smoothing)(LOGITS, targets)
        assert torch.equal(loss_B, function(LOGITS, targets, label_smoothing=smoothing))


@pytest.mark.parametrize("loss", [mixed_cross_entropy, mixed_binary_cross_entropy])
@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_huge_logits_give_finite_values_and_gradients(
    dtype: torch.dtype, autocast: torch.dtype | None, loss: Callable[..., Tensor]
) -> None:
    logits = torch.tensor([[1e4, -1e4, 0.0], [-1e4, -1e4, 1e4], [1e4, 1e4, 1e4]]).to(dtype).requires_grad_()
    with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
        loss_B = loss(logits, Targets(LABELS, LABELS.flip(0), torch.tensor(0.3)), label_smoothing=0.1)
        assert loss_B.dtype == torch.float32
        (gradient,) = torch.autograd.grad(loss_B.mean(), logits)
    assert loss_B.isfinite().all()
    assert gradient.isfinite().all()
    assert gradient.abs().max() > 0


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_losses_are_computed_in_float32_or_better(given: torch.dtype, expected: torch.dtype) -> None:
    assert at_least_float32(torch.zeros(2, dtype=given)).dtype == expected


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_weights_of_classes_are_those_of_torch_without_its_division(smoothing: float) -> None:
    generator = torch.Generator().manual_seed(0)
    logits_BK = torch.randn(6, 4, generator=generator, dtype=torch.float64)
    labels_B, others_B = torch.randint(4, (2, 6), generator=generator)
    weights_K = torch.tensor([0.5, 2.0, 0.0, 1.0])
    plain = ClassLoss(label_smoothing=smoothing, weights_K=weights_K)

    def reference(labels: torch.Tensor) -> torch.Tensor:
        mean = torch.nn.CrossEntropyLoss(weights_K.double(), label_smoothing=smoothing)
        whole = [mean(logits[None], label[None]) for logits, label in zip(logits_BK, labels, strict=True)]
        used = weights_K[labels].double()  # what the mean of one image is divided by
        return torch.stack(whole).nan_to_num() * used

    loss_B = plain(logits_BK, Targets(labels_B, labels_B, torch.tensor(1.0)))
    counted = weights_K[labels_B] > 0  # torch's own mean of an image without weight is 0 / 0
    torch.testing.assert_close(loss_B[counted], reference(labels_B)[counted])
    mixed_B = plain(logits_BK, Targets(labels_B, others_B, torch.tensor(0.3, dtype=torch.float64)))
    other_B = plain(logits_BK, Targets(others_B, others_B, torch.tensor(1.0)))
    torch.testing.assert_close(mixed_B, 0.3 * loss_B + 0.7 * other_B)
    assert ClassLoss(kind="ce") == ClassLoss()

"""The co-training method: what is added up, with which weight, and what is left for one network."""

import math

import pytest
import torch
from torch import Tensor, nn

from loss.agreement import AGREEMENT_LOSSES
from loss.classification import ClassLoss, mixed_cross_entropy
from method import Progress, StepOutput, methods
from method.co_training import CoTraining, CoTrainingOptions, cot_weight
from model.splitnet import SplitNet
from utils.errors import UserError
from utils.targets import Targets, plain_targets

S, B, K = 3, 4, 5
LABELS = torch.tensor([0, 3, 1, 4])
MIXED = Targets(LABELS, LABELS.flip(0), torch.tensor(0.3))


def progress(epoch: int = 0, epochs: int = 300) -> Progress:
    return Progress(
        epoch=epoch, step=0, batch=0, steps_per_epoch=1, epochs=epochs, learning_rate=0.1, indices_B=torch.arange(B)
    )


def make(num_networks: int = S, *, label_smoothing: float = 0.0, dtype: torch.dtype = torch.float64, **flags: object):
    torch.manual_seed(0)
    networks = [nn.Sequential(nn.Flatten(), nn.Linear(12, K)) for _ in range(num_networks)]
    return CoTraining(
        SplitNet(networks), CoTrainingOptions(**flags), class_loss=ClassLoss(label_smoothing=label_smoothing)
    ).to(dtype)


def views(num_views: int = S, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(num_views, B, 3, 2, 2, generator=torch.Generator().manual_seed(1), dtype=dtype)


def learn(method: CoTraining, views_SBCHW: Tensor, targets: Targets, place: Progress) -> StepOutput:
    """`before_step`, then `forward`, as whoever makes steps calls them."""
    method.before_step(views_SBCHW, targets, place)
    return method(views_SBCHW, targets, place)


@pytest.mark.parametrize(
    ("epoch", "warm_up_epochs", "expected"),
    [(0, 40, 0.005), (10, 40, 0.125), (39, 40, 0.4875), (40, 40, 0.5), (299, 40, 0.5), (0, 0, 0.5), (1, 200, 0.005)],
)
def test_weight_rises_from_its_minimum(epoch: int, warm_up_epochs: int, expected: float) -> None:
    assert cot_weight(epoch, weight=0.5, warm_up_epochs=warm_up_epochs) == pytest.approx(expected, rel=1e-14)


@pytest.mark.parametrize("targets", [plain_targets(LABELS), MIXED])
@pytest.mark.parametrize("name", AGREEMENT_LOSSES)
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_loss_is_the_sum_of_its_parts(name: str, targets: Targets, label_smoothing: float) -> None:
    method = make(label_smoothing=label_smoothing, cot_loss_choose=name, is_ensembled_loss=True)
    images = views()
    output = learn(method, images, targets, progress(epoch=10))
    logits_SBK = torch.stack([network(view) for network, view in zip(method.network.models, images, strict=True)])

    def classification(logits_BK: Tensor) -> Tensor:
        return mixed_cross_entropy(logits_BK, targets, label_smoothing=label_smoothing).mean()

    parts = {
        "loss_ce": sum(classification(logits_BK) for logits_BK in logits_SBK),
        "loss_cot": 0.125 * AGREEMENT_LOSSES[name](logits_SBK).mean(),
        "loss_ensemble": 0.5 * classification(logits_SBK.mean(dim=0)),
    }
    for key, value in parts.items():
        torch.testing.assert_close(output.metrics[key], value.detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(output.loss, sum(parts.values()), rtol=1e-12, atol=0)
    assert output.metrics["cot_weight"].item() == 0.125
    assert torch.equal(output.logits_SBK, logits_SBK)
    assert not output.logits_SBK.requires_grad
    assert not any(value.requires_grad for value in output.metrics.values())
    output.loss.backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in method.parameters())


@pytest.mark.parametrize("flags", [{"is_cot_loss": False}, {"cot_weight": 0.0, "is_cot_weight_warm_up": False}])
def test_without_agreement_networks_learn_alone(flags: dict) -> None:
    method = make(**flags)
    output = learn(method, views(), plain_targets(LABELS), progress())
    assert output.loss.item() == output.metrics["loss_ce"].item()


@pytest.mark.parametrize("flags", [{}, {"is_ensembled_loss": True}])
def test_one_network_trains_in_the_ordinary_way(flags: dict) -> None:
    method = make(1, **flags)
    output = learn(method, views(1), plain_targets(LABELS), progress())
    ordinary = nn.functional.cross_entropy(method.network.models[0](views(1)[0]), LABELS, reduction="none").mean()
    assert torch.equal(output.loss, ordinary)
    assert set(output.metrics) == {"loss_ce"}
    gradient = torch.autograd.grad(output.loss, list(method.parameters()))
    expected = torch.autograd.grad(ordinary, list(method.parameters()))
    assert all(torch.equal(ours, plain) for ours, plain in zip(gradient, expected, strict=True))


def test_one_shared_view_is_enough() -> None:
    one = views(1)
    expected = learn(make(), one.expand(S, -1, -1, -1, -1), plain_targets(LABELS), progress())
    assert torch.equal(learn(make(), one, plain_targets(LABELS), progress()).loss, expected.loss)


@pytest.mark.parametrize(
    ("flags", "epochs", "weights"),
    [
        ({"cot_weight_warm_up_epochs": 4}, 300, [0.005, 0.125, 0.25, 0.375, 0.5]),
        ({"is_cot_weight_warm_up": False, "cot_weight_warm_up_epochs": 4}, 300, [0.5] * 3),
        ({"cot_weight": 2.0, "cot_weight_warm_up_epochs": 0}, 300, [2.0] * 2),
        ({}, 30, [0.005, 0.125, 0.25, 0.375, 0.5]),  # 40 of 300, in proportion
    ],
)
def test_weight_follows_the_epoch(flags: dict, epochs: int, weights: list[float]) -> None:
    method = make(**flags)
    for epoch, weight in [*enumerate(weights), (0, weights[0])]:
        output = learn(method, views(), plain_targets(LABELS), progress(epoch, epochs))
        assert output.metrics["cot_weight"].item() == pytest.approx(weight, rel=1e-12)


def test_weight_is_one_tensor_on_the_device_that_before_step_writes() -> None:
    """A captured graph replays `forward` with whatever this tensor holds."""
    method = make()
    assert method(views(), plain_targets(LABELS), progress(0)).loss.isnan()
    learn(method, views(), plain_targets(LABELS), progress(0))
    (weight,) = [buffer for name, buffer in method.named_buffers() if name == "_cot_weight"]
    method.before_step(views(), plain_targets(LABELS), progress(20))
    assert weight.item() == 0.25
    assert dict(method.named_buffers())["_cot_weight"] is weight
    assert method.training_state() == {}


def test_losses_stay_in_float32_under_autocast() -> None:
    method = make(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        output = learn(method, views(dtype=torch.float32), MIXED, progress())
    assert output.loss.dtype == torch.float32
    assert output.logits_SBK.dtype == torch.float32
    assert all(value.dtype == torch.float32 for value in output.metrics.values())


def test_nothing_of_the_step_needs_to_be_read_back() -> None:
    """On the meta device any read of a value fails."""
    method = make().to("meta")
    output = learn(method, views().to("meta"), Targets(*(value.to("meta") for value in MIXED)), progress(3))
    assert output.loss.is_meta


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"cot_loss_choose": "kl_sepparate"}, r"--cot_loss_choose.*'kl_sepparate' .* Did you mean 'kl_separate'\?"),
        ({"cot_weight": -1.0}, "--cot_weight must be 0 or more"),
        ({"cot_weight": math.nan}, "--cot_weight must be 0 or more"),
        ({"ensembled_loss_weight": math.inf}, "--ensembled_loss_weight must be 0 or more"),
        ({"cot_weight_warm_up_epochs": -1}, "--cot_weight_warm_up_epochs must be 0"),
    ],
)
def test_unusable_flags_are_refused(flags: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        CoTrainingOptions(**flags)


def test_it_is_registered() -> None:
    assert methods.get("co_training") is CoTraining

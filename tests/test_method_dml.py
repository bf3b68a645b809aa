"""Deep mutual learning: values by hand, who learns from whom, options."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from method import Progress, Targets, methods
from method.dml import DMLOptions, ensemble_kl
from model import BackboneRequest, build_splitnet
from model.splitnet import SplitNet
from utils.errors import UserError

PROGRESS = Progress(0, 0, 0, 10, 2, 0.1, torch.arange(6))


def make(num_networks: int, **options):
    torch.manual_seed(0)
    networks = [nn.Sequential(nn.Flatten(), nn.Linear(12, 4)) for _ in range(num_networks)]
    return methods.get("dml")(SplitNet(networks), DMLOptions(**options)).double()


def batch() -> tuple[Tensor, Targets]:
    torch.manual_seed(1)
    labels = torch.randint(4, (6,))
    return torch.randn(1, 6, 3, 2, 2, dtype=torch.float64), Targets(labels, labels, torch.tensor(1.0))


def kl(teacher: Tensor, student: Tensor, temperature: float) -> Tensor:
    """Batch mean of T² KL(teacher ‖ student)."""
    log_student = (student / temperature).log_softmax(dim=-1)
    return temperature**2 * F.kl_div(log_student, teacher, reduction="batchmean")


@pytest.mark.parametrize("num_networks", [2, 3, 4])
@pytest.mark.parametrize("teacher", ["peers", "ensemble"])
def test_each_network_learns_what_the_paper_says(num_networks, teacher):
    temperature, weight = 2.0, 0.6
    method = make(num_networks, dml_temperature=temperature, dml_weight=weight, dml_teacher=teacher)
    views, targets = batch()
    output = method(views, targets, PROGRESS)
    output.loss.backward()
    logits = [network(views[0]) for network in method.network.models]
    probs = [(one / temperature).softmax(dim=-1).detach() for one in logits]
    total = 0.0
    for i, network in enumerate(method.network.models):
        others = [p for j, p in enumerate(probs) if j != i]
        if teacher == "ensemble":
            mutual = kl(sum(others) / len(others), logits[i], temperature)
        else:
            mutual = sum(kl(p, logits[i], temperature) for p in others) / len(others)
        loss = F.cross_entropy(logits[i], targets.labels_B) + weight * mutual
        total += loss.item()
        for parameter, gradient in zip(
            network.parameters(), torch.autograd.grad(loss, [*network.parameters()]), strict=True
        ):
            torch.testing.assert_close(parameter.grad, gradient)
    assert output.loss.item() == pytest.approx(total)
    assert sum(m.item() for m in output.metrics.values()) == pytest.approx(total)


def test_two_peers_make_both_variants_equal():
    views, targets = batch()
    losses = [make(2, dml_teacher=teacher)(views, targets, PROGRESS).loss for teacher in ("peers", "ensemble")]
    torch.testing.assert_close(*losses)


def test_one_network_trains_in_the_ordinary_way():
    method = make(1)
    views, targets = batch()
    output = method(views, targets, PROGRESS)
    assert set(output.metrics) == {"loss_ce"}
    torch.testing.assert_close(output.loss, F.cross_entropy(method.network.models[0](views[0]), targets.labels_B))


def test_extreme_logits_stay_finite():
    logits = torch.tensor([[[1e4, -1e4, 0.0]], [[-1e4, 1e4, 0.0]], [[0.0, 0.0, 1e4]]], requires_grad=True)
    loss = ensemble_kl(logits).sum()
    (gradient,) = torch.autograd.grad(loss, logits)
    assert loss.isfinite()
    assert gradient.isfinite().all()


def test_different_backbones_learn_together():
    request = BackboneRequest(arch="", num_classes=10, dataset="digits", crop_size=16)
    network = build_splitnet(request, seed=0, archs=["resnet20", "wrn_16_1"])
    method = methods.get("dml")(network, DMLOptions())
    assert method.shared_view
    output = method(torch.randn(1, 4, 3, 16, 16), Targets(*[torch.arange(4)] * 2, torch.tensor(1.0)), PROGRESS)
    output.loss.backward()
    assert all(p.grad is not None for p in method.parameters())


@pytest.mark.parametrize("wrong", [{"dml_weight": -1.0}, {"dml_temperature": 0.0}, {"dml_weight": float("nan")}])
def test_senseless_options_are_refused(wrong):
    with pytest.raises(UserError, match=f"--{next(iter(wrong))}"):
        DMLOptions(**wrong)

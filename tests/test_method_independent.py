"""Independent learning is ordinary training, several times."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from loss.classification import ClassLoss
from method import Progress, Targets, methods
from model.splitnet import SplitNet

PROGRESS = Progress(0, 0, 0, 10, 2, 0.1, torch.arange(6))


def make(num_networks: int, **kwargs):
    torch.manual_seed(0)
    networks = [nn.Sequential(nn.Flatten(), nn.Linear(12, 4)) for _ in range(num_networks)]
    cls = methods.get("independent")
    return cls(SplitNet(networks), cls.Options(), **kwargs)


@pytest.mark.parametrize("num_networks", [1, 3])
@pytest.mark.parametrize("shared", [True, False])
def test_loss_is_the_sum_and_gradients_stay_apart(num_networks, shared):
    method = make(num_networks, class_loss=ClassLoss(label_smoothing=0.1))
    views = torch.randn(1 if shared else num_networks, 6, 3, 2, 2)
    labels, others = torch.randint(4, (6,)), torch.randint(4, (6,))
    targets = Targets(labels, others, torch.tensor(0.7))
    output = method(views, targets, PROGRESS)
    output.loss.backward()
    total = 0.0
    for i, network in enumerate(method.network.models):
        logits = network(views[0 if shared else i])
        losses = [F.cross_entropy(logits, one, label_smoothing=0.1) for one in (labels, others)]
        loss = 0.7 * losses[0] + 0.3 * losses[1]
        total += loss.item()
        expected = torch.autograd.grad(loss, [*network.parameters()])
        for parameter, gradient in zip(network.parameters(), expected, strict=True):
            torch.testing.assert_close(parameter.grad, gradient)
        torch.testing.assert_close(output.logits_SBK[i], logits.detach())
    assert output.loss.item() == pytest.approx(total)
    assert output.metrics["loss_ce"].item() == pytest.approx(total)
    assert not output.logits_SBK.requires_grad
    assert method.training_state() == {}

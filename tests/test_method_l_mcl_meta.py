"""The reverse recursion equals a fully unrolled chain, and leaves nothing behind."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from method.l_mcl.meta import VirtualSGD, buffers_restored, meta_gradient, virtual_steps

GOLDEN = json.loads((Path(__file__).parent / "golden" / "lmcl_loss.json").read_text())["meta_sgd"]
SGD = VirtualSGD(GOLDEN["lr"], GOLDEN["momentum"], GOLDEN["weight_decay"])


def toy(dtype=torch.float64):
    """The golden problem: inner and outer objective, θ and φ."""
    X, y, U, s = (torch.tensor(GOLDEN[name], dtype=dtype) for name in ("X", "y", "U", "s"))
    theta = torch.tensor(GOLDEN["theta0"], dtype=dtype, requires_grad=True)
    phi = torch.tensor(GOLDEN["phi0"], dtype=dtype, requires_grad=True)

    def inner() -> Tensor:
        return ((U @ phi).sigmoid() * (X @ theta - y).square()).mean()

    def outer() -> Tensor:
        return F.softplus(-s * (X @ theta)).mean()

    return inner, outer, theta, phi


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, {"rtol": 1e-6, "atol": 1e-8}), (torch.float32, {"rtol": 2e-4, "atol": 1e-5})],
    ids=["float64", "float32"],
)
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_golden(steps, dtype, tolerance):
    expected = GOLDEN["expected"][f"T{steps}"]
    inner, outer, theta, phi = toy(dtype)
    value, (gradient,) = meta_gradient(inner, outer, [theta], [phi], steps=steps, sgd=SGD)
    torch.testing.assert_close(value, torch.tensor(expected["outer_value"], dtype=dtype), **tolerance)
    torch.testing.assert_close(gradient, torch.tensor(expected["phi_grad_exact"], dtype=dtype), **tolerance)
    assert theta.tolist() == torch.tensor(GOLDEN["theta0"], dtype=dtype).tolist()
    assert theta.grad is None
    assert phi.grad is None

    trajectory = [state.theta[0] for state in virtual_steps([inner] * steps + [outer], [theta], SGD)]
    found = torch.stack([*trajectory[1:], theta.detach()])
    torch.testing.assert_close(found, torch.tensor(expected["theta_trajectory"], dtype=dtype), **tolerance)

    phi.grad = gradient
    torch.optim.SGD([phi], SGD.lr, momentum=SGD.momentum, weight_decay=SGD.weight_decay, nesterov=True).step()
    torch.testing.assert_close(phi.detach(), torch.tensor(expected["phi_after_step_exact"], dtype=dtype), **tolerance)


def test_the_fixture_tells_the_exact_recursion_from_the_reference():
    for steps in (2, 3):
        expected = GOLDEN["expected"][f"T{steps}"]
        exact, reference = (torch.tensor(expected[f"phi_grad_{name}"]) for name in ("exact", "reference"))
        assert (exact - reference).norm() > 0.01 * exact.norm()


class Problem:
    """A small network with batch norm and dropout; φ weighs images by the network's own features."""

    def __init__(self, dropout: float = 0.0) -> None:
        torch.manual_seed(1)
        self.network = nn.Sequential(
            nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(dropout), nn.Linear(6, 4)
        ).double()
        self.unreached = nn.Linear(4, 3).double()  # the outer objective alone uses it
        self.weights = nn.Linear(4, 1).double()
        self.x = torch.randn(8, 5, dtype=torch.float64)
        self.labels = torch.randint(3, (8,))
        self.theta = [*self.network.parameters(), *self.unreached.parameters()]
        self.phi = [*self.weights.parameters()]

    def features(self, values: dict[str, Tensor] | None = None) -> Tensor:
        if values is None:
            return self.network(self.x)
        own = {name: values[name] for name, _ in self.network.named_parameters()}
        return functional_call(self.network, own, (self.x,))

    def inner(self, values: dict[str, Tensor] | None = None) -> Tensor:
        features = self.features(values)
        return (self.weights(features).sigmoid().squeeze(1) * features.square().sum(dim=1)).mean()

    def outer(self, values: dict[str, Tensor] | None = None) -> Tensor:
        features = self.features(values)
        if values is None:
            return F.cross_entropy(self.unreached(features), self.labels)
        own = {name: values["unreached." + name] for name, _ in self.unreached.named_parameters()}
        return F.cross_entropy(functional_call(self.unreached, own, (features,)), self.labels)

    def unrolled(self, steps: int, sgd: VirtualSGD) -> tuple[Tensor, list[Tensor]]:
        """The oracle: one graph through all steps."""
        values = {n: p.detach().clone().requires_grad_() for n, p in self.network.named_parameters()}
        values |= {"unreached." + n: p.detach().clone().requires_grad_() for n, p in self.unreached.named_parameters()}
        velocity = {name: torch.zeros_like(value) for name, value in values.items()}
        for objective in [self.inner] * steps + [self.outer]:
            found = torch.autograd.grad(objective(values), [*values.values()], create_graph=True, allow_unused=True)
            for (name, value), g in zip([*values.items()], found, strict=True):
                g = torch.zeros_like(value) if g is None else g
                velocity[name] = sgd.momentum * velocity[name] + g + sgd.weight_decay * value
                values[name] = value - sgd.lr * velocity[name]
        outcome = self.outer(values)
        return outcome.detach(), [*torch.autograd.grad(outcome, self.phi)]


@pytest.mark.parametrize("sgd", [VirtualSGD(0.1, 0.9, 0.05), VirtualSGD(0.3, 0.0, 0.5), VirtualSGD(0.05, 0.9, 0.0)])
@pytest.mark.parametrize("steps", [1, 2, 4])
def test_the_recursion_equals_the_unrolled_chain(steps, sgd):
    problem = Problem()
    expected_value, expected = problem.unrolled(steps, sgd)
    value, found = meta_gradient(problem.inner, problem.outer, problem.theta, problem.phi, steps=steps, sgd=sgd)
    torch.testing.assert_close(value, expected_value, rtol=1e-10, atol=1e-12)
    for one, wanted in zip(found, expected, strict=True):
        assert wanted.abs().max() > 1e-6
        torch.testing.assert_close(one, wanted, rtol=1e-8, atol=1e-12)


def test_random_layers_see_the_same_draws_when_a_step_is_replayed():
    problem = Problem(dropout=0.5)
    torch.manual_seed(3)
    expected_value, expected = problem.unrolled(2, SGD)
    after_unrolled = torch.rand(1)
    torch.manual_seed(3)
    value, found = meta_gradient(problem.inner, problem.outer, problem.theta, problem.phi, steps=2, sgd=SGD)
    assert torch.equal(torch.rand(1), after_unrolled)
    torch.testing.assert_close(value, expected_value)
    for one, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(one, wanted, rtol=1e-8, atol=1e-12)


def test_nothing_is_left_behind():
    problem = Problem()
    before = [p.detach().clone() for p in problem.theta]
    buffers = [b.clone() for b in problem.network.buffers()]
    with buffers_restored(problem.network):
        meta_gradient(problem.inner, problem.outer, problem.theta, problem.phi, steps=2, sgd=SGD)
        assert not torch.equal(next(problem.network.buffers()), buffers[0])
    assert all(torch.equal(p, saved) and p.grad is None for p, saved in zip(problem.theta, before, strict=True))
    assert all(torch.equal(b, saved) for b, saved in zip(problem.network.buffers(), buffers, strict=True))


def test_parameters_come_back_after_an_error():
    problem = Problem()
    before = [p.detach().clone() for p in problem.theta]

    def broken() -> Tensor:
        raise RuntimeError("broken")

    buffers = [b.clone() for b in problem.network.buffers()]
    with pytest.raises(RuntimeError, match="broken"), buffers_restored(problem.network):
        meta_gradient(problem.inner, broken, problem.theta, problem.phi, steps=2, sgd=SGD)
    assert all(torch.equal(p, saved) for p, saved in zip(problem.theta, before, strict=True))
    assert all(torch.equal(b, saved) for b, saved in zip(problem.network.buffers(), buffers, strict=True))


def test_an_inner_objective_without_phi_gives_no_gradient():
    problem = Problem()
    _, found = meta_gradient(problem.outer, problem.outer, problem.theta, problem.phi, steps=1, sgd=SGD)
    assert all((one == 0).all() for one in found)

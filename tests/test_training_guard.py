"""The guard names the first bad step and its networks, and holds the weights afterwards."""

import pytest
import torch
from torch import Tensor, nn

from benchmarks.dispatched import CountedOperations
from training.guard import NonfiniteGuard, NonfiniteSteps, judge_nonfinite
from training.update import KeptBuffers
from utils.errors import RunError

CPU = torch.device("cpu")


def alone(value: Tensor) -> Tensor:
    return value


def test_finite_steps_leave_nothing() -> None:
    guard = NonfiniteGuard(2, CPU, sticky=True)
    assert guard.judge(torch.tensor(1.0), torch.zeros(2, 3, 4), 0) == 0
    assert guard.read(alone) is None


def test_first_bad_step_and_network_are_named() -> None:
    guard = NonfiniteGuard(3, CPU, sticky=False)
    logits = torch.zeros(3, 2, 4)
    logits[1, 0, 2] = float("nan")
    guard.judge(torch.tensor(1.0), torch.zeros(3, 2, 4), 4)
    assert guard.judge(torch.tensor(float("inf")), logits, 5) == 1
    assert guard.judge(torch.tensor(1.0), torch.zeros(3, 2, 4), 6) == 0
    guard.judge(torch.tensor(float("nan")), torch.full((3, 2, 4), float("nan")), 7)
    found = guard.read(alone)
    assert found is not None
    assert (found.count, found.first_step, found.networks) == (2, 5, (1,))


def test_sticky_holds_all_later_steps() -> None:
    guard = NonfiniteGuard(1, CPU, sticky=True)
    guard.judge(torch.tensor(float("nan")), torch.zeros(1, 2, 2), 0)
    assert guard.judge(torch.tensor(1.0), torch.zeros(1, 2, 2), 1) == 1


def test_state_round_trip() -> None:
    guard, other = NonfiniteGuard(2, CPU, sticky=False), NonfiniteGuard(2, CPU, sticky=False)
    guard.judge(torch.tensor(float("nan")), torch.full((2, 1, 2), float("inf")), 9)
    other.load_state_dict(guard.state_dict())
    assert other.read(alone) == guard.read(alone)


def test_what_was_found_ends_the_run_or_is_a_warning() -> None:
    found = NonfiniteSteps(count=3, first_step=25, networks=(0, 2))
    with pytest.raises(RunError, match=r"step 25 \(epoch 3\).*network 1, 3.*--on_nonfinite skip"):
        judge_nonfinite(found, None, 10)
    with pytest.raises(RunError, match=r"3 steps.*--nonfinite_limit 2.*first.*step 25"):
        judge_nonfinite(found, 2, 10)
    assert judge_nonfinite(found, 3, 10).startswith("Skipped 3 non-finite steps so far; the first: step 25 (epoch 3)")
    assert "none in its logits" in judge_nonfinite(NonfiniteSteps(1, 0, ()), 3, 10)


def test_buffers_of_a_step_that_does_not_count_come_back_in_a_few_operations() -> None:
    network = nn.Sequential(*(nn.BatchNorm2d(3) for _ in range(20)))
    kept = KeptBuffers(network)
    before = {name: value.clone() for name, value in network.named_buffers()}
    for wanted in (True, False):
        with CountedOperations() as counted:
            kept.keep()
        network(torch.randn(4, 3, 2, 2))
        network[0].running_mean = torch.full((3,), 7.0)  # a strategy of execution has replaced it
        after = {name: value.clone() for name, value in network.named_buffers()}
        with counted:
            kept.restore(torch.tensor(wanted))
        for name, value in network.named_buffers():
            assert torch.equal(value, before[name] if wanted else after[name])
    assert sum(counted.calls.values()) <= 10  # of two types

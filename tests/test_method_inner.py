"""What methods need inside: networks that stay asleep."""

import copy

import torch
from torch import nn

from method.inner import Asleep


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Dropout(0.5))


class Holder(nn.Module):
    """Stands for a method: it learns with `student` and is taught by a frozen copy."""

    def __init__(self) -> None:
        super().__init__()
        self.student = network()
        self.teacher = Asleep(copy.deepcopy(self.student))


def test_a_frozen_copy_stays_in_evaluation_mode_through_train() -> None:
    holder = Holder().train()
    assert holder.student.training
    assert not any(module.training for module in holder.teacher.modules())
    before = {name: value.clone() for name, value in holder.teacher.state_dict().items()}
    images = torch.randn(8, 4)
    first, again = holder.teacher(images), holder.teacher(images)
    assert torch.equal(first, again)  # no dropout
    assert not first.requires_grad
    assert all(torch.equal(value, before[name]) for name, value in holder.teacher.state_dict().items())
    assert {name.split(".")[0] for name, p in holder.named_parameters() if p.requires_grad} == {"student"}


def test_a_frozen_copy_takes_weights_and_statistics_over() -> None:
    holder = Holder().train()
    for _ in range(3):
        holder.student(torch.randn(8, 4)).sum().backward()
    with torch.no_grad():
        holder.student[0].weight.add_(1.0)
    images = torch.randn(5, 4)
    holder.teacher.refresh(holder.student)
    torch.testing.assert_close(holder.teacher(images), holder.student.eval()(images))
    assert holder.teacher.state_dict().keys() == {f"network.{name}" for name in holder.student.state_dict()}

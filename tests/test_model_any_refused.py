"""Networks of a library that no rule divides: one line for each, which names what stopped it."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from model.library import Library
from model.registry import BackboneRequest
from utils.errors import UserError


class Tokens(nn.Module):
    """Its parameter without a layer keeps it from being divided by channels."""

    def __init__(self, width: int, fixed: int, num_classes: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, width, 4, 4)
        self.second = nn.Linear(width, fixed)
        self.third = nn.Linear(fixed, fixed)
        self.loose = nn.Parameter(torch.zeros(7))
        self.fc = nn.Linear(fixed, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.second(self.first(images).flatten(2).mT)
        return self.fc(self.third(tokens.relu()).mean(1)) + self.loose.sum()


class Fixed(Tokens):
    def __init__(self, num_classes: int) -> None:
        super().__init__(64, 64, num_classes)


class HalfFixed(Tokens):
    def __init__(self, num_classes: int, dim: int = 512) -> None:
        super().__init__(dim, 64, num_classes)


class MostlyFixed(Tokens):
    def __init__(self, num_classes: int, dim: int = 8) -> None:
        super().__init__(dim, 64, num_classes)


class OneWidth(Tokens):
    def __init__(self, num_classes: int, dim: int = 64) -> None:
        if dim < 64:
            raise ValueError("64 or more")
        super().__init__(dim, dim, num_classes)


class Maps(Fixed):
    def forward(self, images: Tensor) -> Tensor:
        return self.first(images)


class Unbuilt(Fixed):
    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes)
        raise ValueError("it wants weights of its own")


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        (Fixed, "cannot be divided: Fixed has no argument that is a width. Others that can be divided: another."),
        (HalfFixed, "leaves 7% of the parameters behind, most in third.weight. Others that can be divided: another."),
        (MostlyFixed, "cannot be divided by --split_factor 2: the nearest plan misses by 72.7%. Others"),
        (OneWidth, "cannot be divided: OneWidth takes no others for those that are widths. Others"),
        (Maps, "two images give [2, 64, 8, 8], expected logits [2, 10]"),
        (Unbuilt, "cannot be built: it wants weights of its own. Others: another."),
    ],
)
def test_what_no_rule_divides_is_one_line(kind: Callable[[int], nn.Module], why: str) -> None:
    library = Library(prefix="mine/", create=lambda name, num_classes: kind(num_classes), examples="another")
    request = BackboneRequest(arch="mine/net", split_factor=2, num_classes=10, crop_size=32)
    with torch.random.fork_rng(), pytest.raises(UserError) as refused:
        library.plan(request)
    line = str(refused.value)
    assert line.startswith("--arch mine/net ")
    assert why in line
    assert "\n" not in line

"""Golden numbers of the methods that a division is compared with: inputs by formula, tensors as records."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

GOLDEN: dict[str, Any] = json.loads((Path(__file__).parent / "golden" / "rivals.json").read_text())
# dtype -> (relative tolerance of a number, tolerance of a tensor as a part of its norm)
PRECISIONS = {torch.float64: (1e-8, 1e-8), torch.float32: (1e-4, 1e-4)}
every_precision = pytest.mark.parametrize("dtype", PRECISIONS)


def fill(spec: dict[str, Any], dtype: torch.dtype = torch.float64) -> Tensor:
    """The tensor of an input's {seed, shape, scale, shift}, as a leaf that wants its gradient."""
    numbers = torch.arange(math.prod(spec["shape"]), dtype=torch.int64)
    steps = (7919 * numbers + 104729 * spec["seed"] + 12345) % 20011
    values = spec["scale"] * (steps.double() / 10005.5 - 1) + spec["shift"]
    return values.reshape(spec["shape"]).to(dtype).requires_grad_()


def assert_number(found: Tensor | float, expected: float, dtype: torch.dtype = torch.float64) -> None:
    """A scalar is the golden one, as far as the precision goes."""
    number = found.detach().item() if isinstance(found, Tensor) else found
    assert number == pytest.approx(expected, rel=PRECISIONS[dtype][0], abs=PRECISIONS[dtype][0])


def assert_record(found: Tensor, record: dict[str, Any]) -> None:
    """A tensor is the one that was recorded as shape, sum, norm, projection and first six elements."""
    assert list(found.shape) == record["shape"]
    values = found.detach().double()
    tolerance = PRECISIONS[found.dtype][1] * max(record["norm"], 1e-6)
    ones = fill({"seed": 999, "shape": record["shape"], "scale": 1.0, "shift": 0.0}).detach()
    assert float(values.norm()) == pytest.approx(record["norm"], abs=tolerance)
    root = math.sqrt(values.numel())
    assert float(values.sum()) == pytest.approx(record["sum"], abs=root * tolerance)
    assert float((values * ones).sum()) == pytest.approx(record["proj"], abs=root * tolerance)
    assert values.flatten()[:6].tolist() == pytest.approx(record["head"], abs=tolerance)

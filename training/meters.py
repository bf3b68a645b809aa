"""Running means that stay on the device until somebody asks for them."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from utils.device import Fetched

Means = dict[str, float | list[float]]


class MeanMeter:
    """Sums of named values weighted by images; reading divides once, and is the only host synchronisation.

    Args:
        device: where the sums live.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.count = 0
        self.sums: dict[str, Tensor] = {}
        self._shapes: dict[str, torch.Size] = {}  # of the sums, while they are parts of one tensor
        self._sums = torch.empty(0)

    def update(self, values: Mapping[str, Tensor], count: int) -> None:
        """Add means over `count` images; scalars or vectors, by name."""
        self.count += count
        if not values:
            return
        totals = torch.cat([value.detach().reshape(-1) for value in values.values()]).to(torch.float64) * count
        shapes = {name: value.shape for name, value in values.items()}
        if shapes == self._shapes:
            self._sums += totals
            return
        parts = totals.split([shape.numel() for shape in shapes.values()])
        new = {name: part.view(shapes[name]) for name, part in zip(shapes, parts, strict=True)}
        if not self.sums:
            # as always from here on, unless the names change: then all of them are one tensor, and one operation
            self._shapes, self._sums, self.sums = shapes, totals, new
            return
        self._shapes = {}
        for name, value in new.items():
            self.sums[name] = self.sums[name] + value if name in self.sums else value

    def read(self, all_reduce: Callable[[Tensor], Tensor] | None = None) -> Means:
        """Means since the last `reset`, over all processes if a sum over them is given."""
        return self.reading(all_reduce).get()

    def reading(self, all_reduce: Callable[[Tensor], Tensor] | None = None) -> "Reading":
        """As `read`, but the host need not wait yet. What comes later does not change it."""
        names = sorted(self.sums)
        shapes = {name: self.sums[name].shape for name in names}
        if not names:
            return Reading(shapes, None)
        flat = torch.cat([self.sums[name].reshape(-1) for name in names])
        flat = torch.cat([flat, flat.new_full((1,), self.count)])
        if all_reduce is not None:
            flat = all_reduce(flat)
        return Reading(shapes, Fetched(flat / flat[-1]))

    def reset(self) -> None:
        """Forget everything."""
        self.sums, self.count, self._shapes = {}, 0, {}

    def state_dict(self) -> dict[str, object]:
        """Plain state for a checkpoint."""
        return {"sums": {name: value.to("cpu", copy=True) for name, value in self.sums.items()}, "count": self.count}

    def load_state_dict(self, *states: Mapping[str, Any]) -> None:
        """Inverse of `state_dict`; several are added up."""
        self.reset()
        for state in states:
            for name, value in state["sums"].items():
                here = value.to(self.device)
                self.sums[name] = self.sums[name] + here if name in self.sums else here
            self.count += int(state["count"])


class Reading:
    """Means of a `MeanMeter` on their way to the host.

    Args:
        shapes: by name, in order.
        flat: one after another; None where there are none.
    """

    def __init__(self, shapes: Mapping[str, torch.Size], flat: Fetched | None) -> None:
        self._shapes, self._flat = shapes, flat

    def is_here(self) -> bool:
        """Whether `get` would not wait."""
        return self._flat is None or self._flat.is_here()

    def get(self) -> Means:
        """The means by name: a number of a scalar, else a list."""
        numbers = [] if self._flat is None else self._flat.get().tolist()
        means: Means = {}
        start = 0
        for name, shape in self._shapes.items():
            values = numbers[start : start + shape.numel()]
            means[name] = values if shape else values[0]
            start += shape.numel()
        return means

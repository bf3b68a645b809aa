"""Running means that stay on the device until somebody asks for them."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor


class MeanMeter:
    """Sums of named values weighted by images; reading divides once, and is the only host synchronisation.

    Args:
        device: where the sums live.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.sums: dict[str, Tensor] = {}
        self.count = 0

    def update(self, values: Mapping[str, Tensor], count: int) -> None:
        """Add means over `count` images; scalars or vectors, by name."""
        for name, value in values.items():
            total = value.detach().to(torch.float64) * count
            self.sums[name] = self.sums[name] + total if name in self.sums else total
        self.count += count

    def read(self, all_reduce: Callable[[Tensor], Tensor] | None = None) -> dict[str, float | list[float]]:
        """Means since the last `reset`, over all processes if a sum over them is given."""
        if not self.sums:
            return {}
        names = sorted(self.sums)
        flat = torch.cat([self.sums[name].reshape(-1) for name in names])
        flat = torch.cat([flat, flat.new_tensor([self.count])])
        if all_reduce is not None:
            flat = all_reduce(flat)
        numbers = (flat / flat[-1]).tolist()
        means: dict[str, float | list[float]] = {}
        start = 0
        for name in names:
            size = self.sums[name].numel()
            values = numbers[start : start + size]
            means[name] = values if self.sums[name].dim() else values[0]
            start += size
        return means

    def reset(self) -> None:
        """Forget everything."""
        self.sums = {}
        self.count = 0

    def state_dict(self) -> dict[str, object]:
        """Plain state for a checkpoint."""
        return {"sums": {name: value.cpu() for name, value in self.sums.items()}, "count": self.count}

    def load_state_dict(self, *states: Mapping[str, Any]) -> None:
        """Inverse of `state_dict`; several are added up."""
        self.reset()
        for state in states:
            for name, value in state["sums"].items():
                here = value.to(self.device)
                self.sums[name] = self.sums[name] + here if name in self.sums else here
            self.count += int(state["count"])

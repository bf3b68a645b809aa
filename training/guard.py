"""Noticing non-finite steps without waiting for the device in every one of them."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from utils.device import Fetched
from utils.errors import RunError

_NEVER = 2**62


@dataclass(frozen=True)
class NonfiniteSteps:
    """What was found: how many steps, which was the first, and which networks' logits were non-finite in it."""

    count: int
    first_step: int
    networks: tuple[int, ...]


def judge_nonfinite(found: NonfiniteSteps, limit: int | None, steps_per_epoch: int) -> str:
    """What non-finite steps mean to the run: a warning where they may be skipped.

    Args:
        found: from `NonfiniteGuard.read`.
        limit: how many of them may be skipped (--on_nonfinite skip); None: none.
        steps_per_epoch: to name the epoch.

    Raises:
        RunError: the end of the run.
    """
    where = f"step {found.first_step} (epoch {found.first_step // steps_per_epoch + 1})"
    networks = ", ".join(str(i + 1) for i in found.networks) or "none in its logits, so in a loss or gradient"
    if limit is None:
        raise RunError(
            f"non-finite loss or gradient at {where}, network {networks}: that step changed no weights. Lower "
            "--lr, set --clip_grad, or --on_nonfinite skip; the last checkpoint is whole."
        )
    if found.count > limit:
        raise RunError(
            f"{found.count} steps were non-finite, more than --nonfinite_limit {limit}; "
            f"the first was {where}, network {networks}."
        )
    return f"Skipped {found.count} non-finite steps so far; the first: {where}, network {networks}."


class NonfiniteGuard:
    """Counts non-finite steps on the device; `read` is the only call that waits for it.

    Args:
        num_networks: S.
        device: where steps are judged.
        sticky: after one bad step all later ones count as bad too, so that the weights stay as they were before it
            until somebody reads the guard and stops the run.
    """

    def __init__(self, num_networks: int, device: torch.device, *, sticky: bool) -> None:
        self.sticky = sticky
        self._bad_steps = torch.zeros((), dtype=torch.float64, device=device)
        self._first_step = torch.full((), _NEVER, dtype=torch.int64, device=device)
        self._networks_S = torch.zeros(num_networks, dtype=torch.float64, device=device)

    @torch.no_grad()
    def judge(self, value: Tensor, logits_SBK: Tensor, step: int | Tensor) -> Tensor:
        """1 if this step must not change the weights, else 0: float32 scalar on the device.

        Args:
            value: the scalar that must be finite, equal on all processes (norm of the reduced gradient, or the loss).
            logits_SBK: of this step; only used to name the networks.
            step: its number; a tensor where the judging is recorded and replayed.
        """
        bad = ~value.isfinite()
        first = bad & (self._bad_steps == 0)
        networks_S = ~logits_SBK.flatten(1).isfinite().all(dim=1)
        self._networks_S += (networks_S & first).to(self._networks_S.dtype)
        self._first_step.copy_(torch.where(first, step, self._first_step))
        if self.sticky:
            bad = bad | (self._bad_steps > 0)
        self._bad_steps += bad.to(self._bad_steps.dtype)
        return bad.to(torch.float32)

    def read(self, all_reduce: Callable[[Tensor], Tensor]) -> NonfiniteSteps | None:
        """What was found so far, over all processes; None if every step was finite."""
        return self.reading(all_reduce)()

    def reading(self, all_reduce: Callable[[Tensor], Tensor]) -> Callable[[], NonfiniteSteps | None]:
        """As `read`, but the host waits only where what this returns is called. Later steps do not change it."""
        together = Fetched(all_reduce(torch.cat([self._bad_steps.reshape(1), self._networks_S])))
        own = Fetched(torch.stack([self._bad_steps, self._first_step.double()]))  # double has room for every step

        def found() -> NonfiniteSteps | None:
            bad_steps, *networks_S = together.get().tolist()
            if bad_steps == 0:
                return None
            count, first_step = map(int, own.get().tolist())
            return NonfiniteSteps(count, first_step, tuple(i for i, number in enumerate(networks_S) if number > 0))

        return found

    def count(self) -> int:
        """Number of bad steps in this process."""
        return int(self._bad_steps)

    def tensors(self) -> list[Tensor]:
        """What a step changes, on the device."""
        return [self._bad_steps, self._first_step, self._networks_S]

    def state_dict(self) -> dict[str, Tensor]:
        """Tensors for a checkpoint."""
        return {"steps": self._bad_steps.cpu(), "first": self._first_step.cpu(), "networks": self._networks_S.cpu()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Inverse of `state_dict`."""
        self._bad_steps.copy_(state["steps"])
        self._first_step.copy_(state["first"])
        self._networks_S.copy_(state["networks"])

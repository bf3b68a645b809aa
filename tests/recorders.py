"""What stands for a recorder of CUDA graphs where there is no GPU."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from utils.errors import RunError


class Recorder:
    """Records by keeping the function, and replays by calling it.

    Args:
        calls: what was called, in order; of several recorders, where they are given one list.
        fails: it refuses to record.
        changed: the tensors that the function writes in place, which recording leaves alone.
    """

    def __init__(
        self,
        calls: list[str] | None = None,
        *,
        fails: bool = False,
        changed: Callable[[], Sequence[Tensor]] = tuple,
    ) -> None:
        self.calls = [] if calls is None else calls
        self.fails = fails
        self.changed = changed

    def warm_up(self, function: Callable[[], Any]) -> Any:
        """As it is."""
        self.calls.append("warm-up")
        return function()

    def record(self, function: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
        """(the result, what computes it anew and in its place)."""
        if self.fails:
            raise RunError("cannot be captured")
        self.calls.append("record")
        before = [(tensor, tensor.clone()) for tensor in self.changed()]
        result = function()
        for tensor, value in before:
            tensor.copy_(value)

        def replay() -> None:
            self.calls.append("replay")
            result.copy_(function())

        return result, replay

"""SIGTERM and SIGINT as a wish that training looks at between steps."""

import signal
from types import FrameType, TracebackType

import torch
import torch.distributed as dist


class Stopped(Exception):
    """The run was asked to stop by a signal; `number` is the signal's."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


class StopRequest:
    """Context in which SIGTERM and SIGINT are noted; a second signal ends the process at once."""

    def __init__(self) -> None:
        self.number = 0
        self._before: dict[int, object] = {}

    def __enter__(self) -> "StopRequest":
        for number in (signal.SIGTERM, signal.SIGINT):
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.number:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self.number = number

    def agreed(self, device: torch.device) -> bool:
        """Whether any process was signalled; all processes must ask together, and get the same answer."""
        if dist.is_initialized() and dist.get_world_size() > 1:
            asked = torch.tensor([self.number], device=device)
            dist.all_reduce(asked, op=dist.ReduceOp.MAX)
            self.number = int(asked)
        return self.number != 0

"""Recording what a function does on its device, so that it can be done again without the function (a CUDA graph)."""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol, TypeVar

import torch

from utils.errors import RunError, reason

Result = TypeVar("Result")

WARM_UP = 3  # calls of a form before one is recorded: libraries choose and load their kernels in them
REFUSAL = "--cuda_graph: this step cannot be captured ({}). Leave the flag out."


class Recorder(Protocol):
    """Records what a function does on its device, so that it can be done again without the function."""

    def warm_up(self, function: Callable[[], Result]) -> Result:
        """Call the function in the way in which it will be recorded."""

    def record(self, function: Callable[[], Result]) -> tuple[Result, Callable[[], None]]:
        """Record a call without doing it: its result, whose tensors each replay fills anew, and the replay."""


class CudaRecorder:
    """Records into a CUDA graph. Random numbers come from the device's default generator, as it stands at a replay.

    Args:
        device: the GPU.
        refusal: the line where a function does what no graph can hold, with a place for the reason.
    """

    def __init__(self, device: torch.device, refusal: str = REFUSAL) -> None:
        self._stream = torch.cuda.Stream(device)
        self._refusal = refusal

    def warm_up(self, function: Callable[[], Result]) -> Result:
        here = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(here)
        with torch.cuda.stream(self._stream):
            result = function()
        here.wait_stream(self._stream)
        return result

    def record(self, function: Callable[[], Result]) -> tuple[Result, Callable[[], None]]:
        """Raises RunError where the function does what no graph can hold."""
        graph = torch.cuda.CUDAGraph()
        try:
            # other threads, such as the one that pins batches, go on with their own calls meanwhile
            with (
                _no_garbage(),
                torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"),
            ):
                result = function()
        except RuntimeError as error:
            raise RunError(self._refusal.format(reason(error))) from error
        return result, graph.replay


@contextmanager
def _no_garbage() -> Iterator[None]:
    """Inside, nothing is collected: an older graph that is freed while another is recorded would break that one."""
    gc.collect()
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()

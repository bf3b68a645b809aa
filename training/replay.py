"""Replaying a recorded step: it repeats its kernels on the same memory (a CUDA graph).

All that changes from step to step must lie in tensors on the device that are written in place.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from utils.errors import UserError
from utils.recording import WARM_UP, Recorder

Result = TypeVar("Result")


class ReplayedStep:
    """Calls functions of tensors, the first few times of a form as they are, then by replaying a recorded one.

    Inputs of the recorded form are copied into buffers that the recording reads. Inputs of any other form, such as a
    smaller last batch, are computed by their function as it is. The first WARM_UP calls are real ones: nothing is
    computed that does not count.

    Args:
        recorder: how to record.
    """

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder
        self._seen: dict[object, int] = {}
        self._form: object = None
        self._buffers: list[Tensor] = []
        self._result: Any = None

    def __call__(self, function: Callable[..., Result], *inputs: Tensor) -> Result:
        """`function(*inputs)`; the result's tensors are valid until the next call.

        Args:
            function: does the same with its inputs in every call, whatever else it refers to; returns tensors that
                need no gradient.
        """
        form = _form(inputs)
        if self._form is None:
            self._seen[form] = self._seen.get(form, 0) + 1
            if self._seen[form] <= WARM_UP:
                return self.recorder.warm_up(lambda: function(*inputs))
            self._record(form, function, inputs)
        elif form != self._form:
            return function(*inputs)
        for buffer, value in zip(self._buffers, inputs, strict=True):
            buffer.copy_(value)
        self._replay()
        return self._result

    def _record(self, form: object, function: Callable[..., Result], inputs: Sequence[Tensor]) -> None:
        buffers = {id(value): value.clone() for value in inputs}  # one for an input that comes twice
        self._buffers = [buffers[id(value)] for value in inputs]
        self._result, self._replay = self.recorder.record(lambda: function(*self._buffers))
        self._form = form


def _form(inputs: Sequence[Tensor]) -> object:
    """Shapes, types and strides, and which of the inputs are one and the same."""
    places = [id(value) for value in inputs]
    return tuple((value.shape, value.stride(), value.dtype, places.index(id(value))) for value in inputs)


def check_replayable(
    *, device: torch.device, world_size: int, scaler: bool, iters_to_accumulate: int, decides_on_host: bool
) -> None:
    """Refuse --cuda_graph where a step cannot be one graph.

    Args:
        device: where the run computes.
        world_size: number of processes.
        scaler: fp16 with a gradient scaler.
        iters_to_accumulate: batches per update.
        decides_on_host: see `method.Method`.

    Raises:
        UserError: the line says which setting to change.
    """
    why = {
        "needs a GPU: leave it out on a CPU": device.type != "cuda",
        "is for a single process: leave it out, or start one process": world_size > 1,
        "does not go with fp16, whose scaler changes between steps: use --amp_dtype bf16 or fp32": scaler,
        "does not go with --iters_to_accumulate: leave one of them out": iters_to_accumulate > 1,
        "does not go with this --method, which decides on the host what a step computes: leave it out": decides_on_host,
    }
    for text, holds in why.items():
        if holds:
            raise UserError(f"--cuda_graph 1 {text}.")

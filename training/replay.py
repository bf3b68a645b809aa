"""Replaying a recorded step: it repeats its kernels on the same memory (a CUDA graph).

All that changes from step to step must lie in tensors on the device that are written in place.
"""

import logging
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from method import Method
from utils.errors import UserError
from utils.launch import World
from utils.recording import WARM_UP, CudaRecorder, Recorder

logger = logging.getLogger(__name__)

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


def choose_recorder(
    asked: str,
    method: Method[Any],
    *,
    name: str,
    has_exchange: bool,
    iters_to_accumulate: int,
    scaler: bool,
    world: World,
    before: bool | None,
) -> Recorder | None:
    """What replayed steps are recorded by, where --cuda_graph asks for them.

    `auto` asks where a step can be replayed, and does as the resumed run did. With 0, a line tells what it would do
    on a GPU.

    Args:
        asked: --cuda_graph.
        method, name: what is trained, and its name.
        has_exchange: whether peers come and go.
        iters_to_accumulate, scaler: as of `check_replayable`.
        world: where the run computes.
        before: whether the resumed run replayed its steps; None: unknown, or there is none.

    Raises:
        UserError: a step cannot be replayed, and shall be.
    """
    device = world.device
    if asked == "0" and device.type != "cuda":
        return None
    try:
        if why := method.incompatible.get("cuda_graph"):
            raise UserError(f"--cuda_graph cannot go with --method {name}: {why}.")
        if has_exchange:
            raise UserError("--cuda_graph replays one and the same step, and peers come and go in an --exchange.")
        check_replayable(
            device=device,
            world_size=world.world_size,
            scaler=scaler,
            iters_to_accumulate=iters_to_accumulate,
            decides_on_host=method.decides_on_host,
        )
    except UserError as error:
        if asked == "1":
            raise
        logger.info("--cuda_graph %s: steps are not replayed. %s", asked, error)
        return None
    if asked == "0":
        logger.info("--cuda_graph 0: steps are not replayed; with auto, or 1, they would be, as one CUDA graph.")
        return None
    if asked == "auto":
        is_wanted = before is None or before
        as_before = "" if before is None else ", as the run before did"
        logger.info(
            "--cuda_graph auto: steps are %s%s.",
            "replayed as one CUDA graph" if is_wanted else "not replayed",
            as_before,
        )
        if not is_wanted:
            return None
    return CudaRecorder(device)

"""The machinery of a training step: the update of the weights, replaying a whole step, compiling networks.

A step that is replayed (a CUDA graph) repeats its kernels on the same memory, so all that changes from step to step
must lie in tensors on the device that are written in place.
"""

import importlib.util
import shutil
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from utils.errors import RunError, UserError, reason
from utils.guard import NonfiniteGuard
from utils.optim import WeightAverage, clip_gradients, guarded_step

Result = TypeVar("Result")

COMPILE_MODES = ("default", "max-autotune-no-cudagraphs", "aot_eager")
WARM_UP = 3  # steps of a form before one is recorded: libraries choose and load their kernels in them


@dataclass(frozen=True, kw_only=True)
class WeightUpdate:
    """What follows a backward pass: judge it, clip, step, average. A non-finite step changes nothing, without a sync.

    Attributes:
        network: whose buffers and moving average are kept.
        parameters: all that are trained.
        optimizer: over them, from `build_optimizer`.
        scaler: of fp16 gradients; disabled otherwise.
        guard: notes non-finite steps.
        average: moving average of the network, if any.
        clip_grad: largest global norm of the gradient; None: no limit.
        restores_buffers: a non-finite step leaves the network's buffers as `snapshot` found them.
    """

    network: nn.Module
    parameters: Sequence[nn.Parameter]
    optimizer: Optimizer
    scaler: torch.amp.GradScaler
    guard: NonfiniteGuard
    average: WeightAverage | None
    clip_grad: float | None
    restores_buffers: bool

    def snapshot(self) -> list[Tensor]:
        """Copies of the network's buffers before a forward pass, as far as they may have to be restored."""
        return [buffer.clone() for buffer in self.network.buffers()] if self.restores_buffers else []

    def __call__(self, loss: Tensor, logits_SBK: Tensor, step: Tensor, before: Sequence[Tensor]) -> None:
        """One update from the gradients that lie in the parameters, which it then drops.

        Args:
            loss: scalar.
            logits_SBK: of this step; only used to name the networks of a non-finite one.
            step: int64 scalar, its number.
            before: from `snapshot`.
        """
        scaled = self.scaler.is_enabled()
        if scaled:
            self.scaler.unscale_(self.optimizer)
        norm = clip_gradients(self.parameters, self.clip_grad)
        # fp16 overflows now and then by design, and its scaler skips those steps: there only the loss is judged.
        bad = self.guard.judge(loss.detach() if scaled else norm, logits_SBK, step)
        if scaled:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        else:
            guarded_step(self.optimizer, bad)
        self.optimizer.zero_grad(set_to_none=True)
        if before:
            for buffer, old in zip(self.network.buffers(), before, strict=True):
                buffer.copy_(torch.where(bad > 0, old, buffer))
        if self.average is not None:
            self.average.update(self.network)


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
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)

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
            with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
                result = function()
        except RuntimeError as error:
            raise RunError(
                f"--cuda_graph: this step cannot be captured ({reason(error)}). Leave the flag out."
            ) from error
        return result, graph.replay


class ReplayedStep:
    """Calls functions of tensors, the first few times of a form as they are, then by replaying a recorded one.

    Inputs of the recorded form are copied into buffers that the recording reads. Inputs of any other form, such as a
    smaller last batch, are computed by their function as it is. The first WARM_UP calls are real ones: nothing is
    computed that does not count.

    Args:
        recorder: how to record.
    """

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
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
                return self._recorder.warm_up(lambda: function(*inputs))
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
        self._result, self._replay = self._recorder.record(lambda: function(*self._buffers))
        self._form = form


def _form(inputs: Sequence[Tensor]) -> object:
    """Shapes, types and strides, and which of the inputs are one and the same."""
    places = [id(value) for value in inputs]
    return tuple((value.shape, value.stride(), value.dtype, places.index(id(value))) for value in inputs)


def check_replayable(
    *, device: torch.device, world_size: int, scaler: bool, iters_to_accumulate: int, own_gradients: bool
) -> None:
    """Refuse --cuda_graph where a step cannot be one graph.

    Args:
        device: where the run computes.
        world_size: number of processes.
        scaler: fp16 with a gradient scaler.
        iters_to_accumulate: batches per update.
        own_gradients: the method exchanges gradients itself, and decides on the host what a step computes.

    Raises:
        UserError: the line says which setting to change.
    """
    why = {
        "needs a GPU: leave it out on a CPU": device.type != "cuda",
        "is for a single process: leave it out, or start one process": world_size > 1,
        "does not go with fp16, whose scaler changes between steps: use --amp_dtype bf16 or fp32": scaler,
        "does not go with --iters_to_accumulate: leave one of them out": iters_to_accumulate > 1,
        "does not go with this --method, which decides on the host what a step computes: leave it out": own_gradients,
    }
    for text, holds in why.items():
        if holds:
            raise UserError(f"--cuda_graph 1 {text}.")


def compile_modules(modules: Iterable[nn.Module], mode: str, device: torch.device, execution: str = "loop") -> None:
    """Let torch compile each module at its first call; keys of state dicts and hooks stay as they are.

    Args:
        modules: networks, or what holds them.
        mode: one of COMPILE_MODES; "aot_eager" traces forward and backward and generates no code.
        device: where they run.
        execution: how the networks run; those that become one function, or run in threads, cannot be compiled singly.

    Raises:
        UserError: nothing to compile, no compiler, or another way of execution.
    """
    modules = list(modules)
    if execution != "loop" and not (execution == "parallel" and device.type == "cuda"):
        raise UserError(f"--compile does not go with --execution {execution}: leave one of them out.")
    if not modules:
        raise UserError("--compile: this --method decides in every step what it computes; leave the flag out.")
    if mode != "aot_eager":
        if device.type == "cuda" and importlib.util.find_spec("triton") is None:
            raise UserError(f"--compile {mode} needs the package triton on a GPU; install it or leave the flag out.")
        if device.type == "cpu" and not any(map(shutil.which, ("g++", "clang++", "c++"))):
            raise UserError(f"--compile {mode} needs a C++ compiler such as g++ on a CPU; leave the flag out.")
    # networks of one class share a limit that is meant for one network
    limits = torch._dynamo.config
    limits.recompile_limit = max(limits.recompile_limit, 8 * len(modules))
    for module in modules:
        if mode == "aot_eager":
            module.compile(backend="aot_eager")
        else:
            module.compile(mode=mode)


def as_written(compiled: bool) -> AbstractContextManager[Any]:
    """Context in which modules run as they are written, compiled or not: the numbers of a program without --compile."""
    return torch.compiler.set_stance("force_eager") if compiled else nullcontext()

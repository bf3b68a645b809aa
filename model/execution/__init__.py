"""Ways to run S networks: one after another, at the same time, or stacked into one. All give the same numbers.

`loop` is the definition. `parallel` gives each network a CUDA stream, or a thread on a CPU. `stacked` runs one network
with S times the channels and groups (stacking.py), or networks without batch norm by vmap (mapped.py). `auto` times
them on the first batch and keeps the fastest. A strategy that cannot run these networks gives way to `loop`, and one
line of the log says why.
"""

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode
from torch.utils._python_dispatch import _get_current_dispatch_mode

from model.execution.mapped import MappedNetworks
from model.execution.stacking import NotStackable, StackedNetworks
from model.execution.streams import Streams
from model.execution.threads import Threads
from model.options import EXECUTIONS
from utils.device import wait_for
from utils.distributed import all_reduce_sum, is_alone
from utils.errors import RunError, reason
from utils.recording import WARM_UP, Recorder

logger = logging.getLogger(__name__)

TRIAL_IMAGES = 2  # per view, in the trial before a strategy's first use
TIMED_ROUNDS = 3  # of `auto`, after one to warm up

Strategy = Callable[[Tensor], Tensor]  # views [S, B, C, H, W] -> logits [S, B, K]


class Execution:
    """The strategy of a SplitNet; built at the first forward pass, when the networks are where they will stay.

    Args:
        name: one of EXECUTIONS.
        devices: spread the networks over these GPUs; None: they stay where they are.

    Attributes:
        recorder: records what `auto` times in training; None: it times the passes as they are.
    """

    def __init__(self, name: str = "loop", devices: Sequence[torch.device] | None = None) -> None:
        if name not in EXECUTIONS:
            raise ValueError(f"execution {name!r} is not known: use {', '.join(EXECUTIONS)}.")
        self.name = name
        self.devices = devices
        self.recorder: Recorder | None = None
        self._strategy: Strategy | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> "Execution":
        return Execution(self.name, self.devices)  # threads, streams and a recorder stay with the original

    def __call__(self, networks: Sequence[nn.Module], views_SBCHW: Tensor) -> Tensor:
        """Views [S, B, C, H, W] -> logits [S, B, K]."""
        if self.name == "loop" or len(networks) == 1:
            return run_loop(networks, views_SBCHW)
        if not torch.compiler.is_compiling():  # a pass before compilation has prepared the strategy
            if _is_observed():
                return run_loop(networks, views_SBCHW)
            if self._strategy is None:
                self._prepare(networks, views_SBCHW)
        return run_loop(networks, views_SBCHW) if self._strategy is None else self._strategy(views_SBCHW)

    def _prepare(self, networks: Sequence[nn.Module], views_SBCHW: Tensor) -> None:
        """Build and try the strategy; `name` becomes that of the one in use."""
        if self.devices is not None:
            self._strategy = Streams(networks, self.devices)
            return
        candidates = ("parallel", "stacked") if self.name == "auto" else (self.name,)
        usable: dict[str, Strategy] = {}
        for name in candidates:
            try:
                usable[name] = _usable(name, networks, views_SBCHW)
            except NotStackable as why:
                if self.name != "auto":
                    logger.info("execution %s: %s; the networks run one after another (loop).", name, why)
        if networks[0].training:  # every process has images then, and an evaluation exchanges nothing
            usable = _usable_everywhere(usable, candidates, views_SBCHW.device)
        if self.name == "auto" and usable:
            self.name = _fastest(usable, networks, views_SBCHW, self.recorder if networks[0].training else None)
        elif not usable:
            self.name = "loop"
        self._strategy = usable.get(self.name)


def run_loop(networks: Sequence[nn.Module], views_SBCHW: Tensor) -> Tensor:
    """One network after another: views [S, B, C, H, W] -> logits [S, B, K]."""
    return torch.stack([network(view) for network, view in zip(networks, views_SBCHW, strict=True)])


def _is_observed() -> bool:
    """Whether a mode that sees single operations (counters of MACs, audits) is on: other threads do not inherit it."""
    return _get_current_function_mode() is not None or _get_current_dispatch_mode() is not None


def _usable_everywhere(
    usable: dict[str, Strategy], candidates: Sequence[str], device: torch.device
) -> dict[str, Strategy]:
    """The strategies that can be used in every process: their exchanges of statistics must meet each other."""
    if is_alone():
        return usable
    here = torch.tensor([1.0, *(float(name in usable) for name in candidates)], device=device)
    processes, *counts = all_reduce_sum(here).tolist()
    for name, count in zip(candidates, counts, strict=True):
        if name in usable and count < processes:
            logger.info("execution %s: another process cannot use it, so that this one does not either.", name)
    return {name: usable[name] for name, count in zip(candidates, counts, strict=True) if count == processes}


@contextmanager
def _without_tf32() -> Iterator[None]:
    """Inside, cuDNN multiplies float32 as it is: strategies use different kernels, which would round differently."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def _as_written(networks: Sequence[nn.Module]) -> AbstractContextManager[Any]:
    """Inside, compiled networks run as they are written: compiled for a few images, their graphs would count for all.

    torch compiles anew for another batch size, and from then on for every one.
    """
    is_compiled = any(module._compiled_call_impl is not None for network in networks for module in network.modules())
    # asking for a stance loads the compiler, which takes seconds
    return torch.compiler.set_stance("force_eager") if is_compiled else nullcontext()


def _usable(name: str, networks: Sequence[nn.Module], views_SBCHW: Tensor) -> Strategy:
    """The strategy of a name; `stacked` by rules for channels, else by vmap where there are no batch norms.

    Raises:
        NotStackable: it cannot run these networks; the message says why.
    """
    try:
        return _tried(name, networks, views_SBCHW)
    except NotStackable as why:
        if name != "stacked":
            raise
        if torch.is_autocast_enabled(views_SBCHW.device.type):
            raise NotStackable(f"{why}, and vmap leaves mixed precision out (--is_amp 0)") from None
        try:
            return _tried("mapped", networks, views_SBCHW)
        except NotStackable as other:
            raise NotStackable(f"{why}, and {other}") from None


def _tried(name: str, networks: Sequence[nn.Module], views_SBCHW: Tensor) -> Strategy:
    """A strategy that has run a few images and agreed with the loop.

    Raises:
        NotStackable: it cannot run these networks; the message says why.
    """
    device = views_SBCHW.device
    few_SBCHW = views_SBCHW[:, :TRIAL_IMAGES].detach()
    try:
        with (
            _left_as_they_were(networks),
            _as_written(networks),
            _without_tf32(),
            torch.no_grad(),
            torch.autocast(device.type, enabled=False),
        ):
            if name == "stacked":
                strategy: Strategy = StackedNetworks(networks)
            elif name == "mapped":
                strategy = MappedNetworks(networks)
            elif device.type == "cuda":
                strategy = Streams(networks)
            else:
                if networks[0].training:
                    _require_own_draws(networks, few_SBCHW)
                strategy = Threads(networks)
            if networks[0].training:
                strategy(few_SBCHW)
            for network in networks:
                network.eval()
            expected_SBK, found_SBK = run_loop(networks, few_SBCHW).double(), strategy(few_SBCHW).double()
    except (RuntimeError, TypeError, ValueError, AttributeError) as error:
        # code of other libraries may do anything with a map that is no tensor
        raise NotStackable(reason(error)) from None
    if found_SBK.shape != expected_SBK.shape:
        raise NotStackable(f"its logits have the shape {list(found_SBK.shape)}")
    difference, size = float((found_SBK - expected_SBK).norm()), float(expected_SBK.norm())
    if not difference <= 1e-2 * size:  # float32 stays well below; NaN is above
        raise NotStackable(
            f"its logits differ from the loop's by {difference:.1g}, and theirs have the norm {size:.1g}"
        )
    return strategy


def _require_own_draws(networks: Sequence[nn.Module], views_SBCHW: Tensor) -> None:
    """Refuse networks that draw from the CPU's one default generator: in threads, the order would be chance.

    Raises:
        NotStackable: they do.
    """
    before = torch.get_rng_state()
    run_loop(networks, views_SBCHW)
    if not torch.equal(before, torch.get_rng_state()):
        torch.set_rng_state(before)
        raise NotStackable("a layer of these networks draws random numbers that cannot be told apart by network")


@contextmanager
def _left_as_they_were(networks: Sequence[nn.Module]) -> Iterator[None]:
    """Afterwards buffers and modes are those of before."""
    values = [buffer.clone() for network in networks for buffer in network.buffers()]
    modes = {module: module.training for network in networks for module in network.modules()}
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
        # asked for again, because stacking puts views in their places
        buffers = (buffer for network in networks for buffer in network.buffers())
        with torch.no_grad():
            for buffer, value in zip(buffers, values, strict=True):
                buffer.copy_(value)


def _fastest(
    usable: dict[str, Strategy], networks: Sequence[nn.Module], views_SBCHW: Tensor, recorder: Recorder | None
) -> str:
    """Name of the strategy whose forward pass, with the backward pass in training, takes the least time here.

    Args:
        recorder: times the replay of a recorded pass, in place of the pass itself.
    """
    device = views_SBCHW.device
    parameters = [p for network in networks for p in network.parameters() if p.requires_grad]
    strategies: dict[str, Strategy] = {"loop": lambda views: run_loop(networks, views), **usable}
    learns = torch.is_grad_enabled() and bool(parameters)

    def pass_by(strategy: Strategy) -> Tensor:
        logits_SBK = strategy(views_SBCHW)
        if learns:
            torch.autograd.grad(logits_SBK.float().square().mean(), parameters, allow_unused=True)
        return logits_SBK.detach()

    passes = {name: partial(pass_by, strategy) for name, strategy in strategies.items()}
    with _left_as_they_were(networks):
        times = _timed_in_turns(passes, device) if recorder is None else _timed_replays(passes, device, recorder)
    seconds = torch.tensor([sorted(own)[TIMED_ROUNDS // 2] for own in times.values()], device=device)
    shares = all_reduce_sum(seconds).tolist()  # every process must choose the same
    chosen = min(zip(shares, times, strict=True))[1]
    shown = ", ".join(f"{name} {1e3 * share:.1f} ms" for name, share in zip(times, shares, strict=True))
    kind = "training" if learns else "forward"
    logger.info("execution auto: %s for a %s%s pass: %s.", shown, "replayed " * (recorder is not None), kind, chosen)
    return chosen


def _timed_in_turns(passes: Mapping[str, Callable[[], object]], device: torch.device) -> dict[str, list[float]]:
    """Seconds of the rounds of each pass, by name."""
    times: dict[str, list[float]] = {name: [] for name in passes}
    for number in range(1 + TIMED_ROUNDS):
        for name, one in passes.items():
            seconds = _seconds(one, device)
            if number:
                times[name].append(seconds)
    return times


def _timed_replays(
    passes: Mapping[str, Callable[[], object]], device: torch.device, recorder: Recorder
) -> dict[str, list[float]]:
    """`_timed_in_turns` of recorded passes: one recording lives at a time, because each has memory of its own.

    Raises:
        RunError: none of the passes can be recorded.
    """
    times: dict[str, list[float]] = {}
    refused: list[RunError] = []
    kind = device.type
    dtype, is_cast = torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)
    for name, one in passes.items():
        try:
            # a cast that autocast keeps would be the recording's, or be missing in it
            with torch.autocast(kind, dtype, is_cast, cache_enabled=False):
                for _ in range(WARM_UP):
                    recorder.warm_up(one)
                _, replay = recorder.record(one)
        except RunError as error:
            logger.info("execution auto leaves %s out: %s", name, error)
            refused.append(error)
            continue
        times[name] = [_seconds(replay, device) for _ in range(1 + TIMED_ROUNDS)][1:]
        del replay
    if not times:
        raise refused[0]
    return times


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    """Seconds until the device has done it."""
    wait_for(device)
    began = time.perf_counter()
    work()
    wait_for(device)
    return time.perf_counter() - began

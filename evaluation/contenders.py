"""Networks prepared for answering: batch norm folded, weights cast once, a copy for every way of running S of them."""

import copy
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from evaluation.latency import BATCH_SIZES, CASCADE, Candidate, Latency, measure
from model import BackboneRequest, build_splitnet
from model.cascade import Answered, Cascade
from model.casting import cast_parameters, only_cast
from model.fold import fold_batch_norm
from model.options import EXECUTIONS
from model.splitnet import SplitNet
from training.replay import ReplayedStep
from utils.errors import RunError
from utils.precision import Precision, autocast, lay_out
from utils.recording import WARM_UP, CudaRecorder, Recorder

logger = logging.getLogger(__name__)

IN_GRAPHS = ("loop", "parallel")  # strategies that are also timed as CUDA graphs
NO_GRAPH = "its pass cannot be captured as a CUDA graph ({}); it is timed without."


def undivided(request: BackboneRequest) -> SplitNet:
    """The large network that a division started from, with random weights: its latency does not depend on them.

    Raises:
        UserError: as `model.registry.check_request`.
    """
    return build_splitnet(replace(request, split_factor=1), seed=0).eval()


@dataclass(frozen=True)
class Contender:
    """What is timed.

    Attributes:
        name: as the rows call it.
        network: a SplitNet in evaluation mode; left as it is.
        accuracy: top-1 of the network, or of the ensemble, in percent; None where it is not known.
    """

    name: str
    network: nn.Module
    accuracy: float | None


@dataclass(frozen=True)
class CascadeContender:
    """A cascade that is timed.

    Attributes:
        over: makes the running cascade of the networks.
        first: number of the network that runs first, from 0.
        images_NCHW: prepared ones, such as it is for: noise leaves nowhere typical.
        accuracy, first_accuracy: top-1 in percent of the cascade and of its first network; None where not known.
    """

    over: Callable[[Sequence[nn.Module]], Cascade]
    first: int
    images_NCHW: Tensor
    accuracy: float | None
    first_accuracy: float | None


def compare_latencies(
    ensemble: Contender,
    large: Contender | None,
    *,
    crop_size: int,
    device: torch.device,
    precision: Precision,
    devices: Sequence[torch.device] = (),
    cascade: CascadeContender | None = None,
) -> list[Latency]:
    """Time S networks, in every way of running them, beside the large one; both with batch norm folded.

    Args:
        large: the undivided network, or None to time the ensemble alone.
        crop_size: side of the images in pixels.
        devices: several GPUs to spread the networks over, as a further way.
        cascade: of the ensemble's networks; with it, and its first network, everything is timed on its images.
    """
    if cascade is None:
        images_BCHW = torch.randn(
            (max(BATCH_SIZES), 3, crop_size, crop_size), generator=torch.Generator().manual_seed(0)
        )
    else:
        images_BCHW = cascade.images_NCHW
    images_BCHW = images_BCHW.to(device, precision.autocast or precision.weights, memory_format=precision.memory_format)
    candidates = [] if large is None else candidates_of(large, images_BCHW, precision, ("loop",))
    candidates += candidates_of(ensemble, images_BCHW, precision, EXECUTIONS, devices)
    if cascade is not None:
        candidates += cascade_candidates(cascade, ensemble, images_BCHW, precision)
    return measure(candidates, images_BCHW, autocast_dtype=precision.autocast, each_image=cascade is not None)


def cascade_candidates(
    cascade: CascadeContender, ensemble: Contender, images_BCHW: Tensor, precision: Precision
) -> list[Candidate]:
    """The cascade over folded copies of the ensemble's networks, and its first network alone."""
    assert isinstance(ensemble.network, SplitNet)
    first = Contender("first network", SplitNet([ensemble.network.models[cascade.first]]), cascade.first_accuracy)
    found = candidates_of(first, images_BCHW, precision, ("loop",))
    network, cast = _prepared(ensemble, images_BCHW, precision)
    if precision.autocast is not None:
        cast_parameters(network, cast, precision.autocast)
    running = cascade.over(list(network.models))

    def forward(images: Tensor) -> Tensor:
        answered: Answered = running(images)
        return answered.scores_BK

    return [*found, Candidate(name=ensemble.name, strategy=CASCADE, forward=forward, accuracy=cascade.accuracy)]


def candidates_of(
    contender: Contender,
    images_BCHW: Tensor,
    precision: Precision,
    executions: Sequence[str],
    devices: Sequence[torch.device] = (),
    recorder: Callable[[], Recorder] | None = None,
) -> list[Candidate]:
    """Folded copies of the networks, one for each strategy that can run them ("auto" is one of the others).

    Their weights are cast once, so a pass under autocast casts none. Networks that run one after another or in parallel
    on a GPU are candidates twice: as they are, and as one CUDA graph for each batch size.

    Args:
        images_BCHW: as they will come, in autocast's type where there is one.
        precision: of the networks.
        executions: names of strategies.
        devices: several GPUs to spread the networks over, as a further way.
        recorder: makes what graphs are recorded by; None: `CudaRecorder` on a GPU, and no graphs on a CPU.
    """
    device, few_BCHW = images_BCHW.device, images_BCHW[:2]
    prepared, cast = _prepared(contender, images_BCHW, precision)
    if recorder is None and device.type == "cuda":
        recorder = partial(CudaRecorder, device, NO_GRAPH)
    several = len(prepared.models) > 1
    names = [execution for execution in executions if execution != "auto"] if several else ["loop"]
    if several and len(devices) > 1:
        names.append(f"{len(devices)} devices")
    found = []
    for name in names:
        network = copy.deepcopy(prepared)
        if name in EXECUTIONS:
            network.execution = name
        else:
            network.spread(devices)
        with _answering(device, precision):  # in the weights' own type, in which a strategy is tried
            network(few_BCHW.to(precision.weights))
        # a strategy that cannot run these networks has given way to the loop, and said why
        if name in EXECUTIONS and network.execution != name:
            continue
        if precision.autocast is not None:
            cast_parameters(network, cast, precision.autocast)
        strategy = name if several else "one network"
        candidate = Candidate(name=contender.name, strategy=strategy, forward=network, accuracy=contender.accuracy)
        found.append(candidate)
        if recorder is not None and name in IN_GRAPHS:
            graphs = Graphs(network, recorder)
            try:
                with _answering(device, precision):
                    graphs(few_BCHW)
            except RunError as error:
                logger.info("%s, %s: %s", contender.name, strategy, error)
            else:
                found.append(replace(candidate, strategy=f"{strategy} + graph", forward=graphs))
    return found


def _prepared(contender: Contender, images_BCHW: Tensor, precision: Precision) -> tuple[SplitNet, list[str]]:
    """(a folded copy of the networks where the images are, names of parameters that autocast would cast in a pass)."""
    folded = fold_batch_norm(contender.network, tuple(images_BCHW.shape[1:]))
    assert isinstance(folded, SplitNet)
    prepared = lay_out(folded.to(images_BCHW.device, precision.weights), precision.memory_format)
    if precision.autocast is None:
        return prepared, []
    return prepared, only_cast(prepared, images_BCHW[:2], precision.autocast)


@contextmanager
def _answering(device: torch.device, precision: Precision) -> Iterator[None]:
    """Inside, networks compute as they do when they answer."""
    dtype = precision.autocast
    with torch.inference_mode(), autocast(device, dtype):
        yield


class Graphs:
    """A network as one graph for each form of its images: it repeats its kernels, and the host launches one thing.

    A new form takes some passes that warm up, and the recording. Logits are valid until the next call.

    Args:
        network: images -> logits.
        recorder: makes what each graph is recorded by.
    """

    def __init__(self, network: nn.Module, recorder: Callable[[], Recorder]) -> None:
        self._network, self._recorder = network, recorder
        self._passes: dict[object, ReplayedStep] = {}

    def __call__(self, images: Tensor) -> Tensor:
        """Images -> logits.

        Raises:
            RunError: the network does what no graph can hold.
        """
        form = (images.shape, images.stride(), images.dtype)
        if form not in self._passes:
            replayed = ReplayedStep(self._recorder())
            for _ in range(WARM_UP + 1):
                replayed(self._network, images)
            self._passes[form] = replayed
        logits: Tensor = self._passes[form](self._network, images)
        return logits

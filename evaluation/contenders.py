"""Networks prepared for answering: batch norm folded, one copy for every way of running S of them."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from evaluation.latency import BATCH_SIZES, Candidate, Latency, measure
from model import BackboneRequest, build_splitnet
from model.fold import fold_batch_norm
from model.options import EXECUTIONS
from model.splitnet import SplitNet
from utils.precision import Precision, lay_out


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


def compare_latencies(
    ensemble: Contender,
    large: Contender | None,
    *,
    crop_size: int,
    device: torch.device,
    precision: Precision,
    devices: Sequence[torch.device] = (),
) -> list[Latency]:
    """Time S networks, in every way of running them, beside the large one; both with batch norm folded.

    Args:
        large: the undivided network, or None to time the ensemble alone.
        crop_size: side of the images in pixels.
        devices: several GPUs to spread the networks over, as a further way.
    """
    images_BCHW = torch.randn(
        (max(BATCH_SIZES), 3, crop_size, crop_size), generator=torch.Generator().manual_seed(0)
    ).to(device, precision.weights, memory_format=precision.memory_format)
    candidates = [] if large is None else candidates_of(large, images_BCHW, ("loop",))
    candidates += candidates_of(ensemble, images_BCHW, EXECUTIONS, devices)
    return measure(candidates, images_BCHW, autocast_dtype=precision.autocast)


def candidates_of(
    contender: Contender, images_BCHW: Tensor, executions: Sequence[str], devices: Sequence[torch.device] = ()
) -> list[Candidate]:
    """Folded copies of the networks, one for each strategy that can run them ("auto" is one of the others)."""
    folded = fold_batch_norm(contender.network, tuple(images_BCHW.shape[1:]))
    assert isinstance(folded, SplitNet)
    several = len(folded.models) > 1
    like = torch.channels_last if images_BCHW.stride(1) == 1 else torch.contiguous_format
    names = [execution for execution in executions if execution != "auto"] if several else ["loop"]
    if several and len(devices) > 1:
        names.append(f"{len(devices)} devices")
    found = []
    for name in names:
        network = lay_out(copy.deepcopy(folded).to(images_BCHW.device, images_BCHW.dtype), like)
        if name in EXECUTIONS:
            network.execution = name
        else:
            network.spread(devices)
        with torch.inference_mode():
            network(images_BCHW[:2])
        # a strategy that cannot run these networks has given way to the loop, and said why
        if name not in EXECUTIONS or network.execution == name:
            strategy = name if several else "one network"
            found.append(
                Candidate(name=contender.name, strategy=strategy, forward=network, accuracy=contender.accuracy)
            )
    return found

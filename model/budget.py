"""Equal budgets: stage widths at which several networks, or members, cost together what the undivided network costs.

Ours. What is counted is what is deployed, all members of it; parts that only train are no part of a budget.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import nn

from model.division.rechannel import ChannelGraph, count_layers
from model.division.resizing import followed, times
from model.division.solver import AIM, bisected_widths, nearest_widths, solve_both
from model.heads import require_stages
from model.packed import packed_plan
from model.registry import BackboneRequest
from model.staged import staged_parts

BUDGETS = ("both", "params", "macs")  # what of the undivided network is met
Counter = Callable[[Sequence[int]], tuple[int, int]]  # stage widths -> (parameters, multiply-adds) of what is deployed


def budget_widths(
    request: BackboneRequest, networks: int, of: str, budgets: tuple[int, int]
) -> tuple[float, ...] | None:
    """Stage widths of one network at which what is deployed meets a budget; None where the full widths do already.

    The best that is found is returned, also where it misses the budget by more than `solver.TOLERANCE`.

    Args:
        request: of the undivided network, with the form of the members, if they have one.
        networks: how many of them are deployed; 1 with a form, which has its own number of members.
        of: one of BUDGETS.
        budgets: parameters and multiply-adds for one image of the undivided network.

    Raises:
        UserError: a network whose channels cannot be followed.
    """
    graph, deployed = deployed_counter(request, networks)
    full = graph.widths

    def misses(widths: Sequence[int]) -> tuple[float, float]:
        params, macs = (abs(cost / budget - 1) for cost, budget in zip(deployed(widths), budgets, strict=True))
        return params, macs

    def miss(widths: Sequence[int]) -> float:
        return max(misses(widths)) if of == "both" else misses(widths)[BUDGETS.index(of) - 1]

    if miss(full) <= AIM:
        return None
    if of == "both":
        return solve_both(full, graph.units, deployed, budgets)
    which = BUDGETS.index(of) - 1
    start = bisected_widths(full, graph.units, lambda widths: deployed(widths)[which], budgets[which])
    return nearest_widths(full, graph.units, miss, start)


def deployed_counter(request: BackboneRequest, networks: int) -> tuple[ChannelGraph, Counter]:
    """The channels of the undivided network, and what is deployed costs by its stages' widths; arguments as above."""
    form = request.form
    if form is not None and form.kind == "packed":
        plan = packed_plan(request, int(form.numbers["gamma"]), int(form.numbers["min_channels"]))
        return plan.graph, lambda widths: times(form.members, plan.count(widths))
    network, graph = followed(request)
    if form is None:
        return graph, lambda widths: times(networks, graph.count(widths))
    counters = {"mimo": _mimo, "batch_ensemble": _batch_ensemble, "mc_dropout": _mc_dropout, "gated": _gated}
    return graph, counters[form.kind](network, graph, form.members, form.numbers)


def _mimo(network: nn.Module, graph: ChannelGraph, members: int, numbers: object) -> Counter:
    """M times the first kernel, and M times the classifier."""
    ends = [next(layer for layer in graph.layers if not layer.sources)]
    ends.append(next(layer for layer in reversed(graph.layers) if layer.kind != "norm" and layer.out is None))

    def count(widths: Sequence[int]) -> tuple[int, int]:
        params, macs = graph.count(widths)
        channels = graph.channels(widths)
        sizes = [graph.sizes(layer, channels) for layer in ends]
        more_params, more_macs = count_layers(zip(ends, sizes, strict=True))
        more_params -= sizes[0].outputs * ends[0].per_channel  # the first layer keeps its outputs
        return params + (members - 1) * more_params, macs + (members - 1) * more_macs

    return count


def _batch_ensemble(network: nn.Module, graph: ChannelGraph, members: int, numbers: object) -> Counter:
    """M factors of every input and output of a layer, and its bias M times; M passes."""
    layers = [layer for layer in graph.layers if layer.kind != "norm"]

    def count(widths: Sequence[int]) -> tuple[int, int]:
        params, macs = graph.count(widths)
        channels = graph.channels(widths)
        for layer in layers:
            sizes = graph.sizes(layer, channels)
            params += members * (sizes.inputs + sizes.outputs) + (members - 1) * sizes.outputs * layer.per_channel
        return params, members * macs

    return count


def _mc_dropout(network: nn.Module, graph: ChannelGraph, members: int, numbers: object) -> Counter:
    """T passes of what comes behind the first dropout."""
    assert isinstance(numbers, dict)
    parts = staged_parts(network)
    last = graph.layers[-1].name
    place = numbers["place"]
    if place == "classifier":
        once = {layer.name for layer in graph.layers} - {last}
    elif place == "stages" and parts is not None:
        of_first = {id(part) for part in parts.stages[0].modules()}
        behind = [i for i, layer in enumerate(graph.layers) if id(network.get_submodule(layer.name)) in of_first]
        once = {layer.name for layer in graph.layers[: behind[-1] + 1]}
    else:
        once = set()
    shared = [layer for layer in graph.layers if layer.name in once]

    def count(widths: Sequence[int]) -> tuple[int, int]:
        params, macs = graph.count(widths)
        channels = graph.channels(widths)
        before = count_layers((layer, graph.sizes(layer, channels)) for layer in shared)[1]
        return params, before + members * (macs - before)

    return count


def _gated(network: nn.Module, graph: ChannelGraph, members: int, numbers: object) -> Counter:
    """What lies behind the last stage but one as often as there are branches, and the gate on its map."""
    assert isinstance(numbers, dict)
    branches = int(numbers["branches"])
    last_stage = {id(part) for part in require_stages(network, "one", at_least=2).stages[-1].modules()}
    first = next(i for i, layer in enumerate(graph.layers) if id(network.get_submodule(layer.name)) in last_stage)
    behind = graph.layers[first:]
    entry = next(layer for layer in behind if layer.kind != "norm")

    def count(widths: Sequence[int]) -> tuple[int, int]:
        params, macs = graph.count(widths)
        channels = graph.channels(widths)
        more_params, more_macs = count_layers((layer, graph.sizes(layer, channels)) for layer in behind)
        gate = graph.sizes(entry, channels).inputs * branches
        # the gate: a linear layer with bias, and a batch norm
        return params + (branches - 1) * more_params + gate + 3 * branches, macs + (branches - 1) * more_macs + gate

    return count

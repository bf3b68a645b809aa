"""The state of networks that stand in several processes (--placement networks), as one process would hold it.

A part is what belongs to one network, as plain objects and CPU tensors; `join` makes of the parts of all networks what
a checkpoint has always held.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from record.saving import snapshot


class Whole(NamedTuple):
    """What all processes hold together.

    network, average: tensors by the names `models.<i>...`; no average without --ema_decay.
    optimizer: as `state_dict()` gives it. parameters: names in its order.
    """

    network: Mapping[str, Tensor]
    average: Mapping[str, Tensor] | None
    optimizer: dict[str, Any]
    parameters: list[str]


class Part(NamedTuple):
    """What belongs to one network; `groups`: settings of the optimiser, and states of parameters by name."""

    network: dict[str, Tensor]
    average: dict[str, Tensor] | None
    groups: list[tuple[dict[str, Any], dict[str, Any]]]


def tensors_of(state: Mapping[str, Tensor], number: int) -> dict[str, Tensor]:
    """Of tensors by name, those of one network, copied to the CPU."""
    copied: dict[str, Tensor] = snapshot({k: v for k, v in state.items() if k.startswith(f"models.{number}.")})
    return copied


def part_of(
    network: Mapping[str, Tensor],
    average: Mapping[str, Tensor] | None,
    optimizer: Mapping[str, Any],
    names: Sequence[Sequence[str]],
    number: int,
) -> Part:
    """What belongs to network `number`, copied to the CPU.

    Args:
        network, average: tensors by name.
        optimizer: as `state_dict()` gives it.
        names: of its parameters, by group.
    """
    groups = []
    for group, of_group in zip(optimizer["param_groups"], names, strict=True):
        settings = {key: value for key, value in group.items() if key != "params"}
        own = {
            name: optimizer["state"].get(place)
            for place, name in zip(group["params"], of_group, strict=True)
            if name.startswith(f"network.models.{number}.")
        }
        groups.append((snapshot(settings), snapshot(own)))
    return Part(tensors_of(network, number), None if average is None else tensors_of(average, number), groups)


def join(parts: Sequence[Part]) -> Whole:
    """The parts of all networks, in their order, as one; of none, nothing.

    Groups of parameters with the same settings become one, as they are where one process holds all networks.
    """
    groups: dict[tuple[Any, ...], tuple[dict[str, Any], dict[str, Any]]] = {}
    for part in parts:
        seen: dict[tuple[Any, ...], int] = {}
        for settings, states in part.groups:
            kind = (settings["weight_decay"], settings["lr_multiplier"])
            seen[kind] = seen.get(kind, 0) + 1  # several groups of one network may have the same settings
            groups.setdefault((*kind, seen[kind]), (settings, {}))[1].update(states)
    optimizer: dict[str, Any] = {"state": {}, "param_groups": []}
    parameters: list[str] = []
    for settings, states in groups.values():
        places = range(len(parameters), len(parameters) + len(states))
        optimizer["param_groups"].append({**settings, "params": [*places]})
        kept = zip(places, states.values(), strict=True)
        optimizer["state"].update({place: state for place, state in kept if state is not None})
        parameters += states
    return Whole(
        {name: value for part in parts for name, value in part.network.items()},
        None
        if not parts or parts[0].average is None
        else {name: value for part in parts for name, value in (part.average or {}).items()},
        optimizer,
        parameters,
    )

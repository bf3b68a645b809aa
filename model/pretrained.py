"""Fine-tuning: weights of a checkpoint for networks whose heads may have another size."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from model.splitnet import SplitNet
from utils.checkpoint import plain_keys
from utils.errors import UserError


def load_pretrained(network: SplitNet, content: Mapping[str, Any], path: str) -> tuple[str, ...]:
    """Load all weights but those of heads whose size differs; these keep their fresh initialisation.

    Args:
        network: the S networks.
        content: a loaded checkpoint with a `state_dict` of S networks, `module.` in front of its keys or not.
        path: named in errors.

    Returns:
        Names of the heads that were not loaded, as "models.<i>.<classifier>.".

    Raises:
        UserError: no weights, another number of networks, or a shape that differs elsewhere than in a head.
    """
    state = content.get("ema") or content.get("state_dict")
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"--pretrained {path}: expected weights by name in its 'state_dict'.")
    state = plain_keys(state)
    own = network.state_dict()
    heads = tuple(f"models.{i}.{one.classifier_name}." for i, one in enumerate(network.models))
    missing = sorted(own.keys() - state.keys())
    if missing:
        there = len({key.split(".")[1] for key in state if key.startswith("models.")})
        raise UserError(
            f"--pretrained {path}: holds no {missing[0]}; it has {there} networks, this run {len(network.models)}. "
            "Use the --arch and --split_factor that it was trained with."
        )
    differing = [key for key in own if state[key].shape != own[key].shape]
    wrong = [key for key in differing if not key.startswith(heads)]
    if wrong:
        raise UserError(
            f"--pretrained {path}: {wrong[0]} is {list(state[wrong[0]].shape)}, expected {list(own[wrong[0]].shape)}. "
            "Use the --arch and --split_factor that it was trained with."
        )
    renewed = tuple(head for head in heads if any(key.startswith(head) for key in differing))
    network.load_state_dict({k: own[k] if renewed and k.startswith(renewed) else state[k] for k in own})
    return renewed

"""Weights that autocast casts in every pass, and that may as well be cast once.

Autocast keeps a cast weight for the rest of its block only where the weight needs a gradient, so networks that answer
cast all of theirs in every pass. Which ones those are is seen in a pass: what else autocast does stays as it is, and
so do all numbers.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_CAST = torch.ops.aten._to_copy.default


class CastWatch(TorchDispatchMode):
    """Within it, notes which parameters of a module are cast to a type and used for nothing else.

    Networks are run one after another meanwhile, in the calling thread (model/execution).

    Args:
        module: whose parameters.
        dtype: of autocast.

    Attributes:
        operations: how many operations were dispatched, views and casts included.
    """

    def __init__(self, module: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.operations = 0
        self._dtype = dtype
        self._parameters = {id(parameter): parameter for parameter in module.parameters()}
        self._cast: set[int] = set()
        self._else: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        self.operations += 1
        is_cast = func is _CAST and kwargs.get("dtype") is self._dtype
        for used in tree_leaves((args, kwargs)):
            if id(used) in self._parameters:
                (self._cast if is_cast else self._else).add(id(used))
        return func(*args, **kwargs)

    def found(self) -> list[nn.Parameter]:
        """The parameters that were cast and nothing else, in the order of the module."""
        return [parameter for place, parameter in self._parameters.items() if place in self._cast - self._else]


def only_cast(network: nn.Module, images: Tensor, dtype: torch.dtype) -> list[str]:
    """Names of the parameters that a pass under autocast casts and uses for nothing else.

    Args:
        network: in evaluation mode, on the device of the images.
        images: a few of them, as they will come.
        dtype: of autocast.
    """
    watch = CastWatch(network, dtype)
    # in inference mode a watch would see whole layers, in place of what they are made of
    with torch.inference_mode(False), torch.no_grad(), torch.autocast(images.device.type, dtype), watch:
        network(images)
    found = {id(parameter) for parameter in watch.found()}
    return [name for name, parameter in network.named_parameters() if id(parameter) in found]


def cast_parameters(network: nn.Module, names: Iterable[str], dtype: torch.dtype) -> None:
    """Give parameters a type, in place; of those of `only_cast` it changes no bit of what autocast gives."""
    for name in names:
        parameter = network.get_parameter(name)
        parameter.data = parameter.data.to(dtype)

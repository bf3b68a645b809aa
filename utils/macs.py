"""Parameters and multiply-adds (MACs) of a module. The papers' tables call MACs "FLOPs"."""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode


def count_params(module: nn.Module) -> int:
    """Number of parameters, also of those that the forward pass never uses."""
    return sum(parameter.numel() for parameter in module.parameters())


def count_macs(module: nn.Module, input_shape: Sequence[int]) -> int:
    """Multiply-adds of convolutions and matrix products in evaluation mode: no biases, no batch norm, no pooling.

    Nothing is computed: the forward pass runs on tensors without storage. The module is left as it was.

    Args:
        module: takes one tensor; a SplitNet counts through all S networks.
        input_shape: [C, H, W] of one image.
    """
    # detached, because a parameter as an operand of `cat` breaks the counter
    shapes = {name: tensor.detach().to("meta") for name, tensor in _tensors(module)}
    counter = FlopCounterMode(display=False)
    with _evaluating(module), torch.no_grad(), counter, without_batch_norm():
        functional_call(module, shapes, torch.empty(1, *input_shape, device="meta"))
    return counter.get_total_flops() // 2


def thop_macs(module: nn.Module, input_shape: Sequence[int]) -> int | None:
    """What the package thop counts for one image [C, H, W], None where it is not installed.

    It counts batch norm and pooling too, and so reads a few percent more than `count_macs`. It runs on a copy,
    because it leaves attributes on the modules.
    """
    try:
        from thop import profile
    except ImportError:
        return None
    image = next(module.parameters()).new_zeros(1, *input_shape)
    twin = copy.deepcopy(module).eval().to(image.device)  # buffers too that keep their values elsewhere
    macs, _ = profile(twin, inputs=(image,), verbose=False)
    return int(macs)


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters()
    yield from module.named_buffers()


class without_batch_norm(TorchFunctionMode):
    """Batch norm has no MACs and keeps the shape, but is most of the time of a forward pass without storage."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is nn.functional.batch_norm:
            return args[0]
        return func(*args, **(kwargs or {}))


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode for the time of a block; afterwards each submodule is in the mode it was in."""
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for part, training in modes.items():
            part.training = training

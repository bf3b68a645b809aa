"""Batch norm folded into the convolutions before it, for inference."""

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import fuse_conv_bn_weights
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from model.layers.sync_norm import SyncBatchNorm
from model.members import BatchEnsembleNet

_META = torch.device("meta")
_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm, SyncBatchNorm)
_ANSWERS = (bool, int, torch.Size, torch.dtype, torch.device)  # what a call returns that asks a tensor for its form


def fold_batch_norm(network: nn.Module, image_shape: Sequence[int]) -> nn.Module:
    """A copy for inference: every batch norm that alone takes a convolution's output becomes part of the convolution.

    In evaluation mode batch norm multiplies and shifts each channel by constants; the convolution's weights take the
    factor, its bias the shift. Batch norms elsewhere (before the convolution, as in DenseNet and PyramidNet) stay.
    Which batch norm follows which convolution is seen in a forward pass without storage, so any module folds whose
    forward pass runs on the meta device; its logits stay equal up to rounding. The members of a BatchEnsemble become
    networks of their own first.

    Args:
        network: [B, *image_shape] -> anything; a SplitNet folds in all its networks. It is left as it was.
        image_shape: [C, H, W] of one image that the network can take.

    Returns:
        the copy in evaluation mode, its parameters without gradients.
    """
    folded = network.folded() if isinstance(network, BatchEnsembleNet) else copy.deepcopy(network)
    folded = folded.eval().requires_grad_(False)
    for conv_name, norm_name in _pairs(folded, image_shape):
        conv: Any = folded.get_submodule(conv_name)
        norm: Any = folded.get_submodule(norm_name)
        conv.weight, conv.bias = fuse_conv_bn_weights(
            conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
        )
        # where it is, because a network may know it under a second name
        norm.__class__, norm.__dict__ = nn.Identity, nn.Identity().eval().__dict__
    return folded


def _pairs(network: nn.Module, image_shape: Sequence[int]) -> list[tuple[str, str]]:
    """Names (convolution, batch norm) that can be folded, in the order in which they run."""
    tensors = {**dict(network.named_parameters()), **dict(network.named_buffers())}
    without_storage = {name: tensor.to(_META) for name, tensor in tensors.items()}
    dtype = next((tensor.dtype for tensor in without_storage.values() if tensor.is_floating_point()), None)
    watch = _Watch()
    with torch.no_grad(), watch:
        functional_call(network, without_storage, torch.empty(1, *image_shape, dtype=dtype, device=_META))
    # by the tensor that a call took: the weight of a convolution, the running mean of a batch norm
    names = {id(tensor): name.rpartition(".")[0] for name, tensor in without_storage.items()}
    pairs = []
    for weight, uses in watch.outputs:
        conv = names.get(id(weight), "")
        norm = names.get(id(uses[0]), "") if len(uses) == 1 and uses[0] is not None else ""
        # a subclass of batch norm may do more, and a convolution that runs twice has one weight for two statistics
        known = isinstance(network.get_submodule(conv), nn.Conv2d) and type(network.get_submodule(norm)) in _NORMS
        if conv and norm and known and watch.calls[id(weight)] == 1 and watch.calls[id(uses[0])] == 1:
            pairs.append((conv, norm))
    return pairs


class _Watch(TorchFunctionMode):
    """Follows what becomes of the outputs of convolutions.

    Attributes:
        outputs: for each call of a convolution its weight and, for each use of its output, the running mean of the
            batch norm that used it, None for any other use.
        calls: how often each weight (running mean), by its id, took part in a convolution (batch norm).
    """

    def __init__(self) -> None:
        super().__init__()
        self.outputs: list[tuple[Tensor, list[Tensor | None]]] = []
        self.calls: dict[int, int] = {}
        self._uses: dict[int, list[Tensor | None]] = {}
        self._alive: list[Tensor] = []  # an id stays that of one tensor as long as the tensor lives

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        is_norm = func is nn.functional.batch_norm and len(args) > 1 and isinstance(args[1], Tensor)
        only_asked = isinstance(result, _ANSWERS)
        for used in tree_leaves((args, kwargs)):
            if isinstance(used, Tensor) and id(used) in self._uses and not only_asked:
                self._uses[id(used)].append(args[1] if is_norm else None)
        if is_norm:
            self.calls[id(args[1])] = self.calls.get(id(args[1]), 0) + 1
        if func is nn.functional.conv2d:
            self.calls[id(args[1])] = self.calls.get(id(args[1]), 0) + 1
            self._alive.append(result)
            self._uses[id(result)] = []
            self.outputs.append((args[1], self._uses[id(result)]))
        return result

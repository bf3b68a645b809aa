"""S networks of one structure by `torch.func.vmap`: the second form of `stacked`, for networks without batch norm.

The code of the first network runs once on parameters that are stacked in every pass, so gradients reach the networks'
own. It needs no rule of ours for attention, layer norms, tables of positions or LayerScale. Batch norms would write
their statistics, which vmap cannot.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _NormBase

from model.execution.stacking import NotStackable, require_one_structure
from model.layers.random import RandomLayer


class MappedNetworks:
    """Strategy: views [S, B, C, H, W] -> logits [S, B, K] by one pass over a further dimension.

    Layers that draw from the default generator draw for every network anew.

    Args:
        networks: S of one structure.

    Raises:
        NotStackable: their structures differ, or they have batch norms.
    """

    def __init__(self, networks: Sequence[nn.Module]) -> None:
        if any(isinstance(module, _NormBase) for module in networks[0].modules()):
            raise NotStackable("its batch norms write statistics, which vmap cannot")
        require_one_structure(networks)
        self.networks = list(networks)
        self.layers = [[part for part in one.modules() if isinstance(part, RandomLayer)] for one in networks]

    def __call__(self, views_SBCHW: Tensor) -> Tensor:
        parameters = [dict(network.named_parameters()) for network in self.networks]
        buffers = [dict(network.named_buffers()) for network in self.networks]
        # whole numbers, such as the places in a table, are the structure's and not a network's
        shared = {name: value for name, value in buffers[0].items() if not value.is_floating_point()}
        own = [name for name in buffers[0] if name not in shared]
        stacked = {name: torch.stack([one[name] for one in parameters]) for name in parameters[0]}
        stacked |= {name: torch.stack([one[name] for one in buffers]) for name in own}
        keys = [layers[0].key for layers in self.layers if layers]
        keys_S = torch.stack([key for key in keys if key is not None]) if keys and keys[0] is not None else None

        def one(tensors: dict[str, Tensor], key: Tensor | None, view_BCHW: Tensor) -> Tensor:
            with _keyed(self.layers[0], key):
                logits_BK: Tensor = functional_call(self.networks[0], {**tensors, **shared}, (view_BCHW,))
            return logits_BK

        mapped = vmap(one, in_dims=(0, None if keys_S is None else 0, 0), randomness="different")
        with _mappable_attention(views_SBCHW.device):
            logits_SBK: Tensor = mapped(stacked, keys_S, views_SBCHW)
        return logits_SBK


@contextmanager
def _mappable_attention(device: torch.device) -> Iterator[None]:
    """Inside, attention runs by kernels that vmap knows: not torch's fast path, and on CPUs the products themselves."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" else nullcontext():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


@contextmanager
def _keyed(layers: Sequence[RandomLayer], key: Tensor | None) -> Iterator[None]:
    """Inside, random layers draw by another key."""
    before = [layer.key for layer in layers]
    for layer in layers:
        layer.key = key
    try:
        yield
    finally:
        for layer, own in zip(layers, before, strict=True):
            layer.key = own

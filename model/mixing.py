"""Which networks mix tokens without batch normalisation: those that the recipe of transformers is for. Ours."""

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

# attributes in which layers of attention keep how many heads they have
_HEADS = ("num_heads", "heads", "num_attention_heads", "n_heads")
# classes of torchvision and timm that mix tokens by other means: linear layers, pooling, recurrence, modulation
_MIXERS = frozenset(("MlpMixer", "MetaFormer", "FocalNet", "Sequencer2d", "MambaOut"))


def mixes_tokens(network: nn.Module) -> bool:
    """Whether a network has attention, or mixes tokens otherwise, and no batch norm.

    Hybrids with batch norm (LeViT, MaxViT, MobileViT) are none: they train as the ConvNets do.
    """
    if any(isinstance(module, _NormBase) for module in network.modules()):
        return False
    return type(network).__name__ in _MIXERS or any(map(_attends, network.modules()))


def _attends(module: nn.Module) -> bool:
    counts = (getattr(module, name, None) for name in _HEADS)
    return any(isinstance(count, int) and not isinstance(count, bool) and count >= 1 for count in counts)

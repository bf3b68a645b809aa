"""A way round three faults of oneDNN 3.12 and 3.13 (torch 2.14 and 2.15) on CPUs. In bfloat16, the weight gradient
of two kinds of convolution reads memory that nobody wrote: it is off by a tenth or not finite, and differs from one
run to the next.

- Dilated ones with groups, of channels-last maps.
- Those of padded maps that are narrower than the stride, as 3x3 of stride 2 on 1x1 maps: the columns of the kernel
  that meet nothing but padding keep what lay in the memory given to them.

Such convolutions are trained in float32.

In any type, the weight gradient of a strided 1x1 convolution of fewer than 16 channels, of channels-last maps that
give more than 32 x 32 pixels, writes behind the memory that it asked for (oneDNN 3.12, with AVX-512), and the process
ends sooner or later: GENet does, undivided or not. The pixels that such a convolution skips are left out before it.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.utils import _pair

VECTOR = 16  # float32 numbers in a register of AVX-512
MOST_PIXELS = 32 * 32  # of maps that are written where they belong


def conv2d(
    x: Any, weight: Any, bias: Any = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: int = 1
) -> Any:
    """torch's conv2d; in float32, or without the pixels that it skips, where oneDNN's gradient would be wrong."""
    if not (isinstance(x, Tensor) and x.device.type == "cpu" and torch.is_grad_enabled()):
        return F.conv2d(x, weight, bias, stride, padding, dilation, groups)
    if _is_thin(weight.shape, stride, padding, groups) and x.dim() == 4 and not x.is_contiguous():
        down, across = _pair(stride)
        fewer = x[:, :, ::down, ::across]
        if fewer.shape[2] * fewer.shape[3] > MOST_PIXELS:
            return F.conv2d(fewer, weight, bias)
    if torch.is_autocast_enabled("cpu") and (
        _is_dilated(dilation, groups) or _is_narrow(x.shape[-1], weight.shape[-1], stride, padding)
    ):
        with torch.autocast("cpu", enabled=False):
            bias = None if bias is None else bias.float()
            return F.conv2d(x.float(), weight.float(), bias, stride, padding, dilation, groups)
    return F.conv2d(x, weight, bias, stride, padding, dilation, groups)


def _is_dilated(dilation: Any, groups: int) -> bool:
    return groups > 1 and max(_pair(dilation)) > 1


def _is_narrow(width: int, kernel: int, stride: Any, padding: Any) -> bool:
    return kernel > 1 and width < _pair(stride)[1] and padding != "valid" and _pair(padding)[1] > 0


def _is_thin(weight_shape: Sequence[int], stride: Any, padding: Any, groups: int) -> bool:
    _, channels, *kernel = weight_shape
    is_padded = padding != "valid" and (padding == "same" or max(_pair(padding)) > 0)
    return channels < VECTOR and groups == 1 and max(kernel) == 1 < max(_pair(stride)) and not is_padded


def mend_convolutions(network: nn.Module) -> None:
    """Let every convolution that can meet a fault use `conv2d`, in place; nothing else about it changes."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d) and (
            _is_dilated(module.dilation, module.groups)
            or (module.stride[1] > 1 and module.kernel_size[1] > 1)
            or _is_thin(module.weight.shape, module.stride, module.padding, module.groups)
        ):
            module._conv_forward = _forward_of(module)  # type: ignore[method-assign]


def _convolve(
    stride: Any, padding: Any, dilation: Any, groups: int, mode: str, edges: Any, x: Any, weight: Any, bias: Any
) -> Any:
    if mode != "zeros":
        return conv2d(F.pad(x, edges, mode=mode), weight, bias, stride, 0, dilation, groups)
    return conv2d(x, weight, bias, stride, padding, dilation, groups)


def _forward_of(conv: nn.Conv2d) -> partial[Any]:
    """Not of the module itself: a copy of it must not run the original. Not a closure either: it can be pickled."""
    edges = conv._reversed_padding_repeated_twice
    return partial(_convolve, conv.stride, conv.padding, conv.dilation, conv.groups, conv.padding_mode, edges)

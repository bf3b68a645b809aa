"""Numeric precision of a run: decided once from the flags and the hardware."""

from dataclasses import dataclass
from itertools import chain
from types import MappingProxyType
from typing import TypeVar

import torch
from torch import nn

from utils.errors import UserError

AnyModule = TypeVar("AnyModule", bound=nn.Module)


LAYOUTS = MappingProxyType({"nhwc": torch.channels_last, "nchw": torch.contiguous_format})
# By strategy, where nobody says a layout. Grouped convolutions have been slow in channels_last with some versions of
# cuDNN: what `python -m benchmarks convolutions` shows for `stacked` is to be written here.
GPU_LAYOUTS = MappingProxyType(
    {"loop": torch.channels_last, "parallel": torch.channels_last, "stacked": torch.channels_last}
)


@dataclass(frozen=True)
class Precision:
    """What computes in which type.

    Attributes:
        name: bf16, fp16, fp32 or fp64.
        weights: type of parameters and views.
        autocast: type of matrix products and convolutions under autocast, or None for none.
        scaler: whether gradients need a scaler (fp16).
        memory_format: layout of images and convolution weights.
    """

    name: str
    weights: torch.dtype
    autocast: torch.dtype | None
    scaler: bool
    memory_format: torch.memory_format


def has_fast_bf16(device: torch.device) -> bool:
    """True where bf16 products run in hardware; emulated bf16 is slower than fp32."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    checks = (getattr(torch.cpu, f"_is_{name}_supported", None) for name in ("avx512_bf16", "amx_tile"))
    return any(check is not None and check() for check in checks)


def choose_precision(
    device: torch.device, *, is_amp: bool, amp_dtype: str, layout: str = "auto", execution: str = "loop"
) -> Precision:
    """The precision of a run.

    Args:
        device: where it computes.
        is_amp: mixed precision wanted.
        amp_dtype: auto, bf16, fp16, fp32 or fp64.
        layout: auto, nhwc or nchw.
        execution: how the networks run, which decides an `auto` layout on a GPU.

    Raises:
        UserError: fp16 on a CPU, where it runs tens of times slower than fp32.
    """
    name = amp_dtype if is_amp or amp_dtype == "fp64" else "fp32"
    if name == "auto":
        name = "bf16" if has_fast_bf16(device) else "fp16" if device.type == "cuda" else "fp32"
    if name == "fp16" and device.type == "cpu":
        raise UserError("--amp_dtype fp16 needs a GPU: on a CPU it is far slower than fp32. Use auto, bf16 or fp32.")
    types = {"bf16": torch.bfloat16, "fp16": torch.float16}
    memory_format = LAYOUTS.get(layout)
    if memory_format is None and device.type == "cuda":
        memory_format = GPU_LAYOUTS.get(execution, torch.channels_last)
    elif memory_format is None:
        # float32 training steps are 1.1 to 1.8 times as fast in it; float64 convolutions know one layout only
        memory_format = torch.channels_last if name != "fp64" else torch.contiguous_format
    return Precision(
        name=name,
        weights=torch.float64 if name == "fp64" else torch.float32,
        autocast=types.get(name),
        scaler=name == "fp16",
        memory_format=memory_format,
    )


def autocast(device: torch.device, dtype: torch.dtype | None) -> torch.autocast:
    """Within it, matrix products and convolutions are in this type; None: in that of the weights."""
    return torch.autocast(device.type, dtype, enabled=dtype is not None)


def lay_out(module: AnyModule, memory_format: torch.memory_format) -> AnyModule:
    """Give the module's 4-dimensional parameters and buffers this layout, in place; returns the module.

    `module.to` would ask it of 5-dimensional ones too, such as timm's lambda layers have, and fail.
    """
    for tensor in chain(module.parameters(), module.buffers()):
        if tensor.dim() == 4:
            tensor.data = tensor.data.to(tensor.dtype, memory_format=memory_format)
    return module

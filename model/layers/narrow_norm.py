"""Batch norm of maps with few channels, in training on CPUs (ours).

torch's channels-last kernel takes one pixel at a time, and the channels of a pixel that fill no vector register go one
by one: all of them below 16 channels. A channels-last map [B, C, H, W] is also a matrix [B*H*W/k, k*C] with k pixels in
a row. The same kernels over such rows give the moments of k*C columns, which pool to those of the C channels, and apply
scale and shift at full width.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

VECTOR = 16  # float32 numbers in a register of AVX-512; a multiple of it leaves nothing over
MAX_CHANNELS = 64  # from here on what is left over is a small part of a pixel
MIN_PIXELS = 1 << 15  # below, the small tensors of pooling cost more than the rows save
MIN_COLUMNS = 256

_affine_into = torch.ops.aten.native_batch_norm.out


def widen_narrow_norms(network: nn.Module) -> None:
    """Let every `nn.BatchNorm2d` of few channels work by rows of pixels where that is faster, in place.

    Type, parameters, buffers and state-dict keys stay; a pass of any other kind runs torch's own code.
    """
    for module in network.modules():
        if type(module) is nn.BatchNorm2d and module.num_features < MAX_CHANNELS and module.num_features % VECTOR:
            # a partial, because a bound method would not come back from a pickle
            module.forward = partial(_forward, module)  # type: ignore[method-assign]


def restore_narrow_norms(network: nn.Module) -> None:
    """Undo `widen_narrow_norms`, in place.

    For compilation: it has a code of its own for norms, and alike networks share it only if no module of theirs has a
    forward of its own.
    """
    for module in network.modules():
        forward = vars(module).get("forward")
        if isinstance(forward, partial) and forward.func is _forward:
            del module.forward


def _forward(norm: nn.BatchNorm2d, x: Tensor) -> Tensor:
    pixels = _pixels_per_row(norm, x)
    if pixels == 1:
        return nn.BatchNorm2d.forward(norm, x)
    assert norm.num_batches_tracked is not None
    norm.num_batches_tracked.add_(1)
    return batch_norm_by_rows(
        x, norm.weight, norm.bias, norm.running_mean, norm.running_var, norm.momentum, norm.eps, pixels
    )


def _pixels_per_row(norm: nn.BatchNorm2d, x: Tensor) -> int:
    """k, a power of two that divides B*H*W; 1: leave this pass to torch."""
    if (
        not norm.training
        or torch.compiler.is_compiling()
        or x.device.type != "cpu"
        or x.dtype not in (torch.float32, torch.bfloat16)
        or x.dim() != 4
        or x.numel() < MIN_PIXELS * x.shape[1]
        or not x.is_contiguous(memory_format=torch.channels_last)
        or norm.weight is None
        or norm.weight.dtype != torch.float32
        or norm.running_mean is None
        or norm.momentum is None
    ):
        return 1
    num_pixels, k = x.numel() // x.shape[1], 1
    while k * x.shape[1] < MIN_COLUMNS and num_pixels % (2 * k) == 0:
        k *= 2
    return k


def batch_norm_by_rows(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float | None,
    eps: float,
    pixels: int,
) -> Tensor:
    """`F.batch_norm` in training for a channels-last map, `pixels` pixels at a time.

    Args:
        x: [B, C, H, W], dense in channels-last order.
        weight, bias, running_mean, running_var: [C]; the running ones are updated in place.
        momentum: weight of this batch in the running moments.
        pixels: a divisor of B*H*W.

    Returns:
        [B, C, H, W] in channels-last order.
    """
    out: Tensor = _NormByRows.apply(x, weight, bias, running_mean, running_var, momentum, eps, pixels)
    return out


def _by_rows(x: Tensor, pixels: int) -> Tensor:
    """[B, C, H, W] in channels-last order -> the same memory as [B*H*W/k, k*C, 1, 1]."""
    return x.permute(0, 2, 3, 1).view(-1, pixels * x.shape[1]).unsqueeze(-1).unsqueeze(-1)


def _tile(values: Tensor, pixels: int) -> Tensor:
    """[C] -> [k*C], memory of its own; several times as fast as `repeat` at these sizes."""
    return values.expand(pixels, -1).contiguous().view(-1)


def _scale_and_shift(x: Tensor, scale: Tensor, shift: Tensor, pixels: int) -> Tensor:
    """x * scale + shift per channel, rounded once; a map of its own memory, so that what follows may work in place."""
    out = torch.empty_like(x)
    scale, shift = _tile(scale, pixels), _tile(shift, pixels)
    zeros, ones, unused = torch.zeros_like(scale), torch.ones_like(scale), scale.new_empty(0)
    _affine_into(
        _by_rows(x, pixels),
        scale,
        shift,
        zeros,
        ones,
        False,
        0.0,
        0.0,
        out=_by_rows(out, pixels),
        save_mean=unused,
        save_invstd=unused,
    )
    return out


class _NormByRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        momentum: float,
        eps: float,
        pixels: int,
    ) -> Tensor:
        rows = _by_rows(x, pixels)
        ignored = weight.new_zeros(2, rows.shape[1])
        means, variances = torch.batch_norm_update_stats(rows, ignored[0], ignored[1], 0.0)
        var, mean = torch.var_mean(means.view(pixels, -1), 0, unbiased=False)
        var += variances.view(pixels, -1).mean(0)
        if running_mean is not None and running_var is not None:
            count = x.numel() // x.shape[1]
            running_mean.lerp_(mean, momentum)
            running_var.lerp_(var * (count / (count - 1)), momentum)
        invstd = torch.rsqrt(var + eps)
        ctx.save_for_backward(x, weight, bias, mean, invstd)
        ctx.eps, ctx.pixels = eps, pixels
        scale = weight * invstd
        return _scale_and_shift(x, scale, bias - mean * scale, pixels)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, mean, invstd = ctx.saved_tensors
        none = (None,) * 5  # for running moments, momentum, eps, pixels
        if torch.is_grad_enabled():  # create_graph: torch's own formula can be differentiated again
            wanted = [tensor for tensor in (x, weight, bias) if tensor.requires_grad]
            out = F.batch_norm(x, None, None, weight, bias, True, 0.0, ctx.eps)
            found = iter(torch.autograd.grad(out, wanted, grad_out, create_graph=True))
            return *(next(found) if tensor.requires_grad else None for tensor in (x, weight, bias)), *none

        k = ctx.pixels
        grad_out = grad_out.contiguous(memory_format=torch.channels_last)
        mean_k, invstd_k = _tile(mean, k), _tile(invstd, k)
        _, grad_weight, grad_bias = torch.ops.aten.native_batch_norm_backward(
            _by_rows(grad_out, k),
            _by_rows(x, k),
            invstd_k,
            mean_k,
            mean_k,
            mean_k,
            invstd_k,
            True,
            0.0,
            [False, True, True],
        )
        grad_weight, grad_bias = grad_weight.view(k, -1).sum(0), grad_bias.view(k, -1).sum(0)
        if not ctx.needs_input_grad[0]:
            return None, grad_weight, grad_bias, *none
        # dL/dx = scale * (grad - mean(grad) - x_hat * mean(grad * x_hat)): a multiple of grad, one of x, and a shift;
        # the multiple of x is rounded first, so that it and the shift still cancel at the mean
        count = x.numel() // x.shape[1]
        scale = weight * invstd
        slope = (-scale * invstd * grad_weight / count).to(x.dtype)
        shift = -scale * grad_bias / count - slope * mean
        grad_x = _scale_and_shift(grad_out, scale, shift, k)
        _by_rows(grad_x, k).addcmul_(_by_rows(x, k), _tile(slope, k).view(1, -1, 1, 1))
        return grad_x, grad_weight, grad_bias, *none

"""Batch normalisation over all processes, also where torch has none (CPU with gloo)."""

import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase

from model.layers.narrow_norm import restore_narrow_norms
from utils.distributed import gather_into
from utils.errors import UserError


class _SumOverProcesses(torch.autograd.Function):
    """all_reduce(sum) whose gradient is the sum of the gradients."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        ctx.group = group
        total = value.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        total = gradients[0].contiguous().clone()
        dist.all_reduce(total, group=ctx.group)
        return total, None


class ProcessSyncBatchNorm(_BatchNorm):
    """Batch normalisation over the images of all processes, for devices where torch has none (CPU with gloo).

    Same state-dict keys and momentum rule as nn.BatchNorm2d; processes may hold different numbers of images.

    Attributes:
        process_group: in which the sums are exchanged, None: the job's own.
    """

    process_group: dist.ProcessGroup | None = None

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"expected at least 2 dimensions [B, C, ...], got {input.dim()}")

    def forward(self, input: Tensor) -> Tensor:
        """[B, C, ...] -> the same shape, normalised over all dimensions but C and over all processes."""
        self._check_input_dim(input)
        if not self.training or not dist.is_initialized() or dist.get_world_size(self.process_group) == 1:
            return super().forward(input)
        values = input.float() if input.dtype in (torch.bfloat16, torch.float16) else input
        axes = [0, *range(2, input.dim())]
        shape = [1, -1] + [1] * (input.dim() - 2)
        count = values.new_full((1,), values.numel() // values.shape[1])
        sums = _SumOverProcesses.apply(torch.cat([values.sum(axes), count]), self.process_group)
        total = sums[-1].detach()
        mean = sums[:-1] / total
        centred = values - mean.view(shape)
        variance = _SumOverProcesses.apply((centred * centred).sum(axes), self.process_group) / total
        if self.track_running_stats and self.running_mean is not None and self.running_var is not None:
            with torch.no_grad():
                assert self.num_batches_tracked is not None
                self.num_batches_tracked.add_(1)
                rate = self.momentum if self.momentum is not None else 1.0 / float(self.num_batches_tracked)
                self.running_mean.lerp_(mean.detach().to(self.running_mean.dtype), rate)
                unbiased = variance.detach() * total / (total - 1)
                self.running_var.lerp_(unbiased.to(self.running_var.dtype), rate)
        normalised = centred * torch.rsqrt(variance + self.eps).view(shape)
        if self.affine:
            normalised = normalised * self.weight.view(shape) + self.bias.view(shape)
        return normalised.to(input.dtype)


class _NormOverProcesses(torch.autograd.Function):
    """Batch normalisation over the images of all GPUs, by the kernels of torch's own layer.

    torch's takes processes without an image out of its sums, by a mask that the host waits for, three times a layer and
    step. Here every process has at least one.
    """

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running: tuple[Tensor | None, Tensor | None],
        eps: float,
        momentum: float,
        group: dist.ProcessGroup | None,
    ) -> Tensor:
        input = _dense(input)
        mean_C, invstd_C = torch.batch_norm_stats(input, eps)
        count = mean_C.new_full((1,), input.numel() // input.shape[1])
        own = torch.cat([mean_C, invstd_C, count])
        everyones = own.new_empty(dist.get_world_size(group) * own.numel())
        gather_into(everyones, own, group)
        means_WC, invstds_WC, counts_W1 = everyones.view(-1, own.numel()).split([len(mean_C), len(mean_C), 1], dim=1)
        counts_W = counts_W1.reshape(-1)
        running_mean, running_var = running
        mean_C, invstd_C = torch.batch_norm_gather_stats_with_counts(
            input,
            means_WC.contiguous(),
            invstds_WC.contiguous(),
            running_mean,
            running_var,
            momentum,
            eps,
            counts_W if running_mean is None else counts_W.to(running_mean.dtype),
        )
        ctx.save_for_backward(input, weight, mean_C, invstd_C, counts_W.to(torch.int32))
        ctx.group = group
        return torch.batch_norm_elemt(input, weight, bias, mean_C, invstd_C, eps)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        gradient = _dense(gradients[0])
        input, weight, mean_C, invstd_C, counts_W = ctx.saved_tensors
        sum_C, sum_of_products_C, of_weight, of_bias = torch.batch_norm_backward_reduce(
            gradient, input, mean_C, invstd_C, weight, *ctx.needs_input_grad[:3]
        )
        of_input = None
        if ctx.needs_input_grad[0]:
            sums = torch.cat([sum_C, sum_of_products_C])
            dist.all_reduce(sums, group=ctx.group)
            sum_C, sum_of_products_C = sums.split(len(sum_C))
            weight = weight if weight is None else weight.to(mean_C.dtype)
            of_input = torch.batch_norm_backward_elemt(
                gradient, input, mean_C, invstd_C, weight, sum_C, sum_of_products_C, counts_W
            )
        return of_input, of_weight, of_bias, None, None, None, None


def _dense(value: Tensor) -> Tensor:
    """A tensor in one of the layouts that the kernels know."""
    is_dense = value.is_contiguous() or (value.dim() == 4 and value.is_contiguous(memory_format=torch.channels_last))
    return value if is_dense else value.contiguous()


class SyncBatchNorm(nn.SyncBatchNorm):
    """torch's layer for GPUs, which in a training step waits for nothing; every process must have an image.

    Nor does it count its batches on the host: a momentum of None, an average over all batches, is left to torch.
    """

    def forward(self, input: Tensor) -> Tensor:
        """[B, C, ...] -> the same shape, normalised over all dimensions but C and over all processes."""
        group = self.process_group  # None: the job's own
        alone = not dist.is_initialized() or dist.get_world_size(group) == 1
        if alone or not self.training or self.momentum is None:
            return super().forward(input)
        self._check_input_dim(input)
        self._check_non_zero_input_channels(input)
        running = (self.running_mean, self.running_var) if self.track_running_stats else (None, None)
        if self.track_running_stats and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        output: Tensor = _NormOverProcesses.apply(
            input, self.weight, self.bias, running, self.eps, self.momentum, group
        )
        return output


class _ThenDropAndAct(nn.Module):
    """What timm's BatchNormAct2d does behind the norm; under its names, which `act` needs where it has parameters."""

    drop: nn.Module
    act: nn.Module

    def forward(self, input: Tensor) -> Tensor:
        """[B, C, H, W] -> the same shape: normalised over all processes, dropped, activated."""
        output: Tensor = self.act(self.drop(super().forward(input)))
        return output


class ProcessSyncBatchNormAct(_ThenDropAndAct, ProcessSyncBatchNorm):
    """timm's BatchNormAct2d over all processes, where torch has no synchronised norm."""


class SyncBatchNormAct(_ThenDropAndAct, SyncBatchNorm):
    """timm's BatchNormAct2d over all processes, on GPUs."""


_PLAIN = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def synchronise_batchnorm(module: nn.Module, device: torch.device, group: dist.ProcessGroup | None = None) -> nn.Module:
    """`module` with every batch normalisation synchronised over the processes; parameters and buffers are kept.

    Only what is known exactly is replaced: torch's own BatchNorm1d, 2d and 3d (also where they work by rows of pixels,
    model/layers/narrow_norm.py) and timm's BatchNormAct2d, whose drop and activation stay. A subclass of them may do
    anything beside.

    Args:
        module: holds the norms.
        device: where they compute.
        group: the processes whose images are normalised together; None: all.

    Raises:
        UserError: a batch norm of another kind; nothing has been replaced then.
    """
    on_gpu = device.type == "cuda"
    done = SyncBatchNorm if on_gpu else ProcessSyncBatchNorm
    found: dict[int, nn.Module] = {}
    restore_narrow_norms(module)
    for name, norm in module.named_modules():
        if isinstance(norm, done):
            continue
        has_act = type(norm) is _norm_act_of_timm()
        if type(norm) not in _PLAIN and not has_act:
            _refuse_another_kind(name, norm)
            continue
        if "forward" in vars(norm):
            raise _refusal(name, norm)
        if on_gpu:
            found[id(norm)] = _synced(norm, SyncBatchNormAct if has_act else SyncBatchNorm)
        else:
            found[id(norm)] = _synced(norm, ProcessSyncBatchNormAct if has_act else ProcessSyncBatchNorm)
    for norm in found.values() if group is not None else ():
        norm.process_group = group  # type: ignore[assignment]
    for parent in list(module.modules()):
        for name, child in list(parent._modules.items()):
            if id(child) in found:
                setattr(parent, name, found[id(child)])
    return found.get(id(module), module)


def _norm_act_of_timm() -> type | None:
    """timm's norm with activation; None where nobody has imported timm, and so no network holds one."""
    return getattr(sys.modules.get("timm.layers"), "BatchNormAct2d", None)


def _refuse_another_kind(name: str, module: nn.Module) -> None:
    """Refuse what normalises by the batch in a way of its own; frozen statistics are those of no batch."""
    if isinstance(module, _BatchNorm):
        raise _refusal(name, module)
    keeps_statistics = "running_var" in module._buffers and not isinstance(module, _NormBase)
    if keeps_statistics and not type(module).__name__.startswith("Frozen"):
        raise _refusal(name, module)


def _refusal(name: str, module: nn.Module) -> UserError:
    kind = type(module)
    return UserError(
        f"--is_syncbn 1: the layer {name or 'given'} is a batch norm of another kind ({kind.__module__}."
        f"{kind.__qualname__}) than torch's BatchNorm1d, 2d, 3d and timm's BatchNormAct2d. Leave the flag away."
    )


def _synced(norm: Any, kind: Callable[..., Any]) -> nn.Module:
    """A synchronised norm of this kind in the place of another one, with all that the other one holds."""
    synced: nn.Module = kind(norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats)
    synced._parameters.update(norm._parameters)
    synced._buffers.update(norm._buffers)
    synced._modules.update(norm._modules)
    synced.training = norm.training
    return synced

"""Batch normalisation over all processes, also where torch has none (CPU with gloo)."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


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


class ProcessSyncBatchNorm(nn.modules.batchnorm._BatchNorm):
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
        if not self.training or not dist.is_initialized() or dist.get_world_size() == 1:
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


def synchronise_batchnorm(module: nn.Module, device: torch.device) -> nn.Module:
    """`module` with every batch normalisation synchronised over the processes; parameters and buffers are kept."""
    if device.type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(module)
    for name, child in list(module.named_children()):
        if isinstance(child, nn.modules.batchnorm._BatchNorm) and not isinstance(child, ProcessSyncBatchNorm):
            synced = ProcessSyncBatchNorm(
                child.num_features, child.eps, child.momentum, child.affine, child.track_running_stats
            )
            synced.load_state_dict(child.state_dict())
            for part, value in [*child._parameters.items()]:
                synced._parameters[part] = value
            for part, buffer in [*child._buffers.items()]:
                synced._buffers[part] = buffer
            synced.train(child.training)
            setattr(module, name, synced)
        else:
            synchronise_batchnorm(child, device)
    return module

"""The update of the weights, after the last backward pass of an accumulation group."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from method import Method
from model.depth import layer_factors
from training.flat import Flat
from training.guard import NonfiniteGuard
from training.optim import WeightAverage, build_optimizer, clip_gradients, guarded_step, parameter_groups
from training.options import OptimizerOptions
from utils.device import by_type
from utils.launch import World


class KeptBuffers:
    """A module's buffers as they were, in a few operations however many there are.

    Args:
        module: keeps its structure; its buffers may be replaced by others of their form.
    """

    def __init__(self, module: nn.Module) -> None:
        self._places = [
            (part._buffers, name)
            for part in module.modules()
            for name, value in part._buffers.items()
            if value is not None
        ]
        self._kept: list[tuple[list[int], Flat, Flat]] = []  # of one type each: which, before a step and after it

    def _buffers(self) -> list[Tensor]:
        return [value for owner, name in self._places if (value := owner[name]) is not None]

    @torch.no_grad()
    def keep(self) -> None:
        """Copy them."""
        buffers = self._buffers()
        if not self._kept:
            self._kept = [
                (some, Flat([buffers[i] for i in some]), Flat([buffers[i] for i in some])) for some in by_type(buffers)
            ]
        for some, before, _ in self._kept:
            torch._foreach_copy_(before.parts, [buffers[i] for i in some])

    @torch.no_grad()
    def restore(self, wanted: Tensor) -> None:
        """Where the flag is true, give the buffers back what was kept; the host does not ask."""
        buffers = self._buffers()
        for some, before, after in self._kept:
            own = [buffers[i] for i in some]
            torch._foreach_copy_(after.parts, own)
            torch.where(wanted, before.whole, after.whole, out=after.whole)
            torch._foreach_copy_(own, after.parts)


@dataclass(frozen=True, kw_only=True)
class WeightUpdate:
    """What follows a backward pass: judge it, clip, step, average. A non-finite step changes nothing, without a sync.

    Attributes:
        network: whose buffers and moving average are kept.
        parameters: all that are trained.
        optimizer: over them, from `build_optimizer`.
        scaler: of fp16 gradients; disabled otherwise.
        guard: notes non-finite steps.
        average: moving average of the network, if any.
        clip_grad: largest global norm of the gradient; None: no limit.
        kept: a non-finite step leaves the network's buffers as `keep_buffers` found them; None: as the step left them.
        others: processes that hold the other networks, which skip the same steps; None: there are none.
    """

    network: nn.Module
    parameters: Sequence[nn.Parameter]
    optimizer: Optimizer
    scaler: torch.amp.GradScaler
    guard: NonfiniteGuard
    average: WeightAverage | None
    clip_grad: float | None
    kept: KeptBuffers | None
    others: dist.ProcessGroup | None = None

    def keep_buffers(self) -> None:
        """Before a forward pass: copy the network's buffers, as far as they may have to be restored."""
        if self.kept is not None:
            self.kept.keep()

    def __call__(self, loss: Tensor, logits_SBK: Tensor, step: Tensor) -> None:
        """One update from the gradients that lie in the parameters, which it then drops.

        Args:
            loss: scalar.
            logits_SBK: of this step; only used to name the networks of a non-finite one.
            step: int64 scalar, its number.
        """
        scaled = self.scaler.is_enabled()
        if scaled:
            self.scaler.unscale_(self.optimizer)
            if self.others is not None:
                for found_inf in self.scaler._found_inf_per_device(self.optimizer).values():
                    dist.all_reduce(found_inf, op=dist.ReduceOp.MAX, group=self.others)
        norm = clip_gradients(self.parameters, self.clip_grad, others=self.others)
        # fp16 overflows now and then by design, and its scaler skips those steps: there only the loss is judged.
        bad = self.guard.judge(loss.detach() if scaled else norm, logits_SBK, step)
        if scaled:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        else:
            guarded_step(self.optimizer, bad)
        self.optimizer.zero_grad(set_to_none=True)
        if self.kept is not None:
            self.kept.restore(bad > 0)
        if self.average is not None:
            self.average.update(self.network)


def build_update(
    method: Method[Any],
    options: OptimizerOptions,
    *,
    new_heads: tuple[str, ...],
    on_nonfinite: str,
    scaler: bool,
    capturable: bool,
    world: World,
) -> WeightUpdate:
    """Optimiser, and what else follows a backward pass.

    Args:
        method: what is trained, on its device.
        options: of the optimiser.
        new_heads: prefixes of the parameters that --pretrained did not bring.
        on_nonfinite: "stop", or "skip" such steps.
        scaler: fp16 with a gradient scaler.
        capturable: steps are replayed as a CUDA graph.
        world: this process's place among all.
    """
    network, trained = method.network, method.trained_parameters()
    factors = layer_factors(network, options.layer_decay) if options.layer_decay < 1 else {}
    groups = parameter_groups(
        method,
        trained,
        options,
        new_heads=new_heads,
        factors={f"network.{name}": factor for name, factor in factors.items()} | method.rate_factors(),
        undecayed=method.undecayed_parameters(),
    )
    return WeightUpdate(
        network=network,
        parameters=[parameter for _, parameter in trained],
        optimizer=build_optimizer(options, groups, capturable=capturable),
        scaler=torch.amp.GradScaler(world.device.type, enabled=scaler),
        guard=NonfiniteGuard(network.num_members, world.device, sticky=on_nonfinite == "stop"),
        average=WeightAverage(network, options.ema_decay) if options.ema_decay > 0 else None,
        clip_grad=options.clip_grad,
        kept=KeptBuffers(network) if on_nonfinite == "skip" else None,
        others=None if world.mesh is None else world.mesh.network_dim,
    )

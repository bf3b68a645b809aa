"""S networks at the same time on a CPU: one thread per network."""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from model.layers.sync_norm import ProcessSyncBatchNorm


class Threads:
    """S networks in S threads that share the process's threads for single operations; also their backward passes.

    To autograd the S networks are one function of views and parameters, so hooks of parameters (DDP's) fire in the
    calling thread, in a fixed order.
    """

    def __init__(self, networks: Sequence[nn.Module]) -> None:
        self.networks = list(networks)
        threads, count = torch.get_num_threads(), len(networks)
        started = threading.Barrier(count)
        self.pool = ThreadPoolExecutor(count, "network")

        def start(_: int) -> None:
            started.wait()  # so that each thread of the pool gets here once
            torch.set_num_threads(max(1, threads // count))

        list(self.pool.map(start, range(count)))
        torch.set_num_threads(threads)
        self._separate_exchanges()

    def _separate_exchanges(self) -> None:
        """Networks that exchange batch statistics do so in process groups of their own: threads have no order."""
        for network in self.networks:
            norms = [module for module in network.modules() if isinstance(module, ProcessSyncBatchNorm)]
            sharers = norms[0].process_group if norms else None
            if norms and dist.is_initialized() and dist.get_world_size(sharers) > 1:
                ranks = None if sharers is None else dist.get_process_group_ranks(sharers)
                group: Any = dist.new_group(ranks, use_local_synchronization=sharers is not None)
                for norm in norms:
                    norm.process_group = group

    def __call__(self, views_SBCHW: Tensor) -> Tensor:
        """Views [S, B, C, H, W] -> logits [S, B, K]."""
        if not torch.is_grad_enabled():
            return torch.stack(self.map(lambda i: self.networks[i](views_SBCHW[i])))
        return _InThreads.apply(self, views_SBCHW, *self.parameters())

    def parameters(self) -> list[nn.Parameter]:
        """Of all networks, in order."""
        return [p for network in self.networks for p in network.parameters()]

    def map(self, work: Callable[[int], Any]) -> list[Any]:
        """work(0), ..., work(S - 1) in threads that see this thread's modes."""
        grad, inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        dtype, autocast = torch.get_autocast_dtype("cpu"), torch.is_autocast_enabled("cpu")

        def run(i: int) -> Any:
            with torch.inference_mode(inference), torch.set_grad_enabled(grad), torch.autocast("cpu", dtype, autocast):
                return work(i)

        return list(self.pool.map(run, range(len(self.networks))))


class _InThreads(torch.autograd.Function):
    """(views, parameters of all networks) -> logits; not differentiable twice."""

    @staticmethod
    def forward(ctx: Any, threads: Threads, views_SBCHW: Tensor, *parameters: nn.Parameter) -> Tensor:
        ctx.threads, ctx.wanted = threads, ctx.needs_input_grad[2:]
        needs_views = ctx.needs_input_grad[1]

        def run(i: int) -> tuple[Tensor, Tensor]:
            view_BCHW = views_SBCHW[i].detach().requires_grad_(needs_views)
            with torch.enable_grad():
                return view_BCHW, threads.networks[i](view_BCHW)

        ctx.passes = threads.map(run)
        return torch.stack([logits_BK.detach() for _, logits_BK in ctx.passes])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Any) -> Any:
        if ctx.passes is None:
            raise RuntimeError("execution parallel keeps a graph for one backward pass; use loop to go back twice.")
        (gradient_SBK,), passes, ctx.passes = gradients, ctx.passes, None
        threads: Threads = ctx.threads
        wanted = iter(ctx.wanted)
        inputs = [[p for p in network.parameters() if next(wanted)] for network in threads.networks]

        def run(i: int) -> list[Tensor | None]:
            view_BCHW, logits_BK = passes[i]
            own = [view_BCHW, *inputs[i]] if view_BCHW.requires_grad else inputs[i]
            found = torch.autograd.grad(logits_BK, own, gradient_SBK[i], allow_unused=True)
            return list(found) if view_BCHW.requires_grad else [None, *found]

        results = threads.map(run)
        of_views = [result.pop(0) for result in results]
        of_parameters = iter([gradient for result in results for gradient in result])
        views = None if of_views[0] is None else torch.stack(of_views)
        return None, views, *(next(of_parameters) if want else None for want in ctx.wanted)

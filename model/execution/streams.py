"""S networks at the same time on GPUs: one CUDA stream per network."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Streams:
    """S networks side by side on one GPU, or on several; autograd runs each backward pass on its forward's stream.

    Args:
        networks: where they are, unless `devices` says otherwise.
        devices: network i moves to the i-th, round and round; views come from, and logits go to, the first.
    """

    def __init__(self, networks: Sequence[nn.Module], devices: Sequence[torch.device] | None = None) -> None:
        self.networks = list(networks)
        devices = devices or [next(networks[0].parameters()).device]
        self.home = devices[0]
        self.devices = [devices[i % len(devices)] for i in range(len(networks))]
        if len(devices) > 1:
            for network, device in zip(networks, self.devices, strict=True):
                network.to(device)
        self.streams = [torch.cuda.Stream(device) for device in self.devices]

    def __call__(self, views_SBCHW: Tensor) -> Tensor:
        """Views [S, B, C, H, W] -> logits [S, B, K]."""
        here = torch.cuda.current_stream(self.home)
        ready = here.record_event()
        found = []
        for i, (network, device, stream) in enumerate(zip(self.networks, self.devices, self.streams, strict=True)):
            with torch.cuda.stream(stream):
                stream.wait_event(ready)
                views_SBCHW.record_stream(stream)  # the allocator must not hand their memory on before it is read
                found.append(network(views_SBCHW[i].to(device, non_blocking=True)))
        # only now: a copy between GPUs makes `here` wait for it, and with that the copies of views after it
        logits = []
        for stream, logits_BK in zip(self.streams, found, strict=True):
            with torch.cuda.stream(stream):
                logits.append(logits_BK.to(self.home, non_blocking=True))
            here.wait_stream(stream)
            logits[-1].record_stream(here)
        return torch.stack(logits)

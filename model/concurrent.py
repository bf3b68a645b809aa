"""S networks at the same time, for inference on GPUs: one per device, or one per CUDA stream of a device."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from model.splitnet import SplitNet


class ConcurrentNetworks(nn.Module):
    """A SplitNet whose networks run side by side; same numbers as one after another on the same kind of device.

    Args:
        network: its networks are moved to their devices.
        devices: network i goes to the i-th CUDA device, round and round; images come from, and logits go to, the first.
    """

    def __init__(self, network: SplitNet, devices: Sequence[torch.device]) -> None:
        super().__init__()
        self.network = network
        self.home = devices[0]
        self.devices = [devices[i % len(devices)] for i in range(len(network.models))]
        for one, device in zip(network.models, self.devices, strict=True):
            one.to(device)
        self.streams = [torch.cuda.Stream(device) for device in self.devices]

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Images [B, C, H, W] -> logits [S, B, K]."""
        here = torch.cuda.current_stream(self.home)
        ready = here.record_event()
        logits = []
        for one, device, stream in zip(self.network.models, self.devices, self.streams, strict=True):
            with torch.cuda.stream(stream):
                stream.wait_event(ready)
                logits.append(one(images_BCHW.to(device, non_blocking=True)).to(self.home, non_blocking=True))
        for stream, logits_BK in zip(self.streams, logits, strict=True):
            here.wait_stream(stream)
            logits_BK.record_stream(here)
        return torch.stack(logits)

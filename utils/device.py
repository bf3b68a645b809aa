"""The device that computes: what the host must know of one that works by itself."""

import torch


def wait_for(device: torch.device) -> None:
    """Wait until a GPU has done all that it was asked to do; a CPU has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)

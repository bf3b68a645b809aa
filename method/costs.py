"""What training costs beside what is deployed: parameters of training-only parts, multiply-adds of a training image."""

import copy
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from method import Method, Progress
from utils.errors import UserError
from utils.macs import without_batch_norm
from utils.targets import plain_targets

IMAGES = 2  # in the pass that is counted: batch norms of pooled maps need more than one


def training_params(method: Method[Any]) -> int:
    """Parameters that are trained and are none of the networks': branches, gates, attention. A teacher has none."""
    return sum(p.numel() for name, p in method.trained_parameters() if not name.startswith("network."))


def training_macs(method: Method[Any], crop_size: int) -> int | None:
    """Multiply-adds of one image of the training set in a step, forward only, through everything that is run for it.

    Nothing is computed: a copy that shares nothing with the method runs on tensors without storage. None where it
    cannot run like that, because what a step does depends on numbers that it reads.

    Args:
        method: as it trains.
        crop_size: side of the images in pixels.
    """
    # without gradients, because a parameter as an operand of `cat` breaks the counter
    memo: dict[int, Any] = {id(p): nn.Parameter(p.detach().to("meta"), False) for p in method.parameters()}
    memo |= {id(buffer): buffer.to("meta") for buffer in method.buffers()}
    num_views = 1 if method.shared_view else len(method.network.models)
    counter = FlopCounterMode(display=False)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        try:
            twin = copy.deepcopy(method, memo).train()
            dtype = next(twin.parameters()).dtype
            views = torch.empty(num_views, IMAGES, 3, crop_size, crop_size, dtype=dtype, device="meta")
            labels_B = torch.zeros(IMAGES, dtype=torch.int64, device="meta")
            progress = Progress(0, 0, 0, 1, 1, 0.0, labels_B)
            with counter, without_batch_norm():
                twin(views, plain_targets(labels_B), progress)
        except (RuntimeError, ValueError, TypeError, AttributeError, UserError):
            return None
    return counter.get_total_flops() // 2 // IMAGES

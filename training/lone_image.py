"""A batch of one image in a process, which a batch norm of maps of one pixel cannot train on: found at the start."""

import copy
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from method import Method
from utils.errors import UserError

_MESSAGE = "Expected more than 1 value per channel"  # torch's, of every batch norm


def is_lone_image(error: Exception) -> bool:
    """Whether it is the error of a batch norm that has one value a channel to normalise by."""
    return isinstance(error, ValueError) and str(error).startswith(_MESSAGE)


def lone_norm(method: Method[Any], crop_size: int) -> str | None:
    """Name of the batch norm that has one value a channel where a process has one image; None where none has.

    The networks and the method's further classifiers run in training mode on tensors without storage, in a copy that
    shares nothing with the method. Where code of a user's own cannot run like that, nothing is known: None.

    Args:
        method: as it trains.
        crop_size: side of the images in pixels.
    """
    memo: dict[int, Any] = {id(p): nn.Parameter(p.detach().to("meta"), p.requires_grad) for p in method.parameters()}
    memo |= {id(buffer): buffer.to("meta") for buffer in method.buffers()}
    began: list[str] = []
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        try:
            twin = copy.deepcopy(method, memo).train()
            for name, module in twin.named_modules():
                if isinstance(module, _BatchNorm):
                    module.register_forward_pre_hook(lambda *_, name=name: began.append(name))
            dtype = next(twin.parameters()).dtype
            images_BCHW = torch.empty(1, 3, crop_size, crop_size, dtype=dtype, device="meta")
            split = twin.network
            for network in split.models if split.num_members == split.split_factor else (split,):
                network(images_BCHW)
            twin.extra_logits(images_BCHW)
        except (RuntimeError, ValueError, TypeError, AttributeError) as error:
            return began[-1] if is_lone_image(error) and began else None
    return None


def refuse_lone_images(
    method: Method[Any], *, smallest: int, largest: int, crop_size: int, arch: str, synchronised: bool
) -> None:
    """Refuse a run in which a process will have batches of one image that its networks cannot train on.

    Args:
        method: as it trains.
        smallest, largest: images of the smallest and of the usual batch of an epoch, in the process that gets fewest.
        crop_size: side of the images in pixels.
        arch: what the user calls the networks.
        synchronised: batch norms take the images of several processes together.

    Raises:
        UserError: the line names the flag to change.
    """
    if smallest > 1 or synchronised:
        return
    name = lone_norm(method, crop_size)
    if name is None:
        return
    if largest > 1:
        which, advice = "the last batch of every epoch has", "Give --drop_last 1, or another --batch_size"
    else:
        which, advice = "every batch has", "Give a larger --batch_size (with as many images), or use fewer processes"
    raise UserError(
        f"--arch {arch} at --crop_size {crop_size} cannot train on one image, and {which} no more for a process: the "
        f"batch norm {name} would have one value a channel. {advice}."
    )

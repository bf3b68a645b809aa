"""Running statistics of batch norms, made anew for networks whose weights came from elsewhere."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from model import SplitNet
from utils.precision import Precision, autocast


@torch.no_grad()
def renew_statistics(network: SplitNet, batches: Iterable[Tensor], precision: Precision) -> int:
    """Forget the running statistics, and take the mean of those of some batches; returns how many these were.

    Dropout and other random layers are off meanwhile. Without batch norms nothing is run. Ours.

    Args:
        network: left in the modes that it was in.
        batches: views [V, B, C, H, W], V = S or 1.
        precision: of the products.
    """
    norms = [module for module in network.modules() if isinstance(module, _BatchNorm) and module.track_running_stats]
    if not norms:
        return 0
    modes = {module: module.training for module in network.modules()}
    momenta = [norm.momentum for norm in norms]
    network.eval()
    for norm in norms:
        norm.train()
        norm.reset_running_stats()
        norm.momentum = None  # the mean of all batches, each of one weight
    count = 0
    for views_VBCHW in batches:
        with autocast(views_VBCHW.device, precision.autocast):
            network(views_VBCHW)
        count += 1
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        assert norm.num_batches_tracked is not None
        norm.num_batches_tracked.zero_()
    _restore(modes)
    return count


def _restore(modes: dict[nn.Module, bool]) -> None:
    for module, training in modes.items():
        module.training = training

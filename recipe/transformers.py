"""How transformers and token mixers of libraries train from scratch where nobody says otherwise.

After DeiT (Touvron et al., arXiv:2012.12877) and Swin (Liu et al., arXiv:2103.14030); for networks without batch
normalisation, whose published recipes differ from the paper's, which has ConvNets only. Neither the rate nor the decay
is divided by S. Which parts go with which data is ours.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from recipe.datasets import DatasetRow

NAME = "transformers"  # origin of the values
_BATCH = 1024  # images of an update that the published rate is for
_WARM_UP = 15  # it is this part of a run: 20 epochs of 300
_CLIP_OF_WINDOWS = 5.0
_SMALL_PARAMETERS = 30e6  # up to here a network is called tiny or small
_DROP_PATH = 0.1  # of those

_TRAINING: Mapping[str, Any] = {
    "optimizer": "AdamW",
    "optimizer_eps": 1e-8,
    "weight_decay": 0.05,
    "is_div_wd": False,
    "no_decay": "one_dimensional",
    "lr_mode": "cos",
    "slow_start_lr": 1e-6,
    "end_lr": 1e-5,
}
_VIEWS: Mapping[str, Any] = {
    "is_label_smoothing": True,
    "is_mixup": True,
    "mix_alpha": 0.8,
    "cutmix_alpha": 1.0,
    "mix_switch_prob": 0.5,
    "is_autoaugment": False,
    "randaa": "rand-m9-mstd0.5",
    "is_cutout": False,
}
_ERASING: Mapping[str, Any] = {
    "is_cutout": True,
    "erase_p": 0.25,
    "erase_mode": "pixel",
    "erase_area": (0.02, 1 / 3),
    "erase_ratio": (0.3, 1 / 0.3),
}


@dataclass(frozen=True, kw_only=True)
class TokenMixer:
    """What the recipe wants to know of a network that mixes tokens, by attention or otherwise, without batch norm.

    Attributes:
        windows: its attention is that of Swin.
        params: P, undivided.
        drop_path: the library's own rate of stochastic depth; None: the network has no such argument.
    """

    windows: bool
    params: int
    drop_path: float | None


def transformers(
    row: DatasetRow, kind: TokenMixer, *, epochs: int | None, optimizer: str | None, alone: bool
) -> dict[str, Any]:
    """Flags by name; the rate is for the row's batch size.

    Rows that take no part in the published departures, digits and svhn, keep their own augmentation.

    Args:
        row: of the data.
        kind: of the network.
        epochs: as set, or None.
        optimizer: as set, or None; another than AdamW takes the row's training, at its own rate.
        alone: it is the run's only structure, so that its stochastic depth can be set.
    """
    flags: dict[str, Any] = {}
    if optimizer in (None, _TRAINING["optimizer"]):
        batch_size = row.training["batch_size"]
        flags |= _TRAINING
        flags |= {"batch_size": batch_size, "lr": 1e-3 * batch_size / _BATCH}
        flags["slow_start_epochs"] = round((epochs or row.training["epochs"]) / _WARM_UP)
        if kind.windows:
            flags["clip_grad"] = _CLIP_OF_WINDOWS
    if row.departures:
        flags |= _VIEWS
    if row.departures and row.is_large:
        flags |= _ERASING
    if alone and kind.drop_path == 0 and kind.params <= _SMALL_PARAMETERS:
        flags["drop_path"] = _DROP_PATH
    return flags

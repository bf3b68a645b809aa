"""What --pretrained trains with where nobody says otherwise: few epochs at a low rate, crops and flips. Ours.

Networks with layer normalisation (transformers, ConvNeXt) take AdamW, all others SGD. The rates are for the batch that
stands beside them; `recipe.scaling` has the rule for others.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from recipe.preprocessing import Preprocessing

TRAINING_NAME, IMAGES_NAME = "fine-tuning", "the weights' own images"  # origins of the values

_COMMON: Mapping[str, Any] = {
    "epochs": 15,
    "batch_size": 64,
    "lr_mode": "cos",
    "slow_start_epochs": 1,
    "slow_start_lr": 0.0,
    "end_lr": 0.0,
    "is_autoaugment": False,
    "randaa": None,
    "is_cutout": False,
    "is_mixup": False,
    "is_label_smoothing": False,
    "crop_area": (0.25, 1.0),
}

_BY_OPTIMIZER: Mapping[str, Mapping[str, Any]] = {
    "SGD": {"lr": 0.01, "momentum": 0.9, "weight_decay": 1e-4},
    "AdamW": {"lr": 1e-4, "weight_decay": 0.05, "no_decay": "norm_bias", "optimizer_eps": 1e-8},
    "Adam": {"lr": 1e-4, "weight_decay": 0.0},
    "RMSprop": {"lr": 1e-4, "momentum": 0.9, "weight_decay": 1e-5},
    "RMSpropTF": {"lr": 1e-4, "momentum": 0.9, "weight_decay": 1e-5},
}

# of methods' published recipes: what says how long and how fast is trained from scratch, and on which views
REPLACED = frozenset(_COMMON) | {name for flags in _BY_OPTIMIZER.values() for name in flags}
REPLACED |= {"optimizer", "is_nesterov", "lr_milestones", "lr_step_multiplier", "dks_fresh_optimizer", "mean", "std"}


def fine_tuning(*, layer_norm: bool, optimizer: str | None = None) -> Mapping[str, Any]:
    """Flags by name.

    Args:
        layer_norm: the network has layer normalisation.
        optimizer: as the user set it, or None.
    """
    optimizer = optimizer or ("AdamW" if layer_norm else "SGD")
    return MappingProxyType({**_COMMON, "optimizer": optimizer, **_BY_OPTIMIZER[optimizer]})


def image_flags(preprocessing: Preprocessing) -> dict[str, Any]:
    """The flags under which images are prepared so, random crops by the same interpolation."""
    return {
        "crop_size": preprocessing.crop,
        "crop_pct": preprocessing.crop / preprocessing.resize,
        "eval_interpolation": preprocessing.interpolation,
        "crop_interpolation": preprocessing.interpolation,
        "mean": preprocessing.mean,
        "std": preprocessing.std,
    }


def flags_before(config: Mapping[str, Any]) -> dict[str, Any]:
    """The same flags of a run that goes on, out of every flag's value, as its checkpoint has them."""
    names = ("crop_size", "crop_pct", "eval_interpolation", "crop_interpolation", "mean", "std")
    flags = {name: config[name] for name in names if name in config}
    return {name: tuple(value) if isinstance(value, list) else value for name, value in flags.items()}

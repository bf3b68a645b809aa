"""The published recipes (arXiv:2011.14660), and ours where nothing is published, as defaults for the flags.

A recipe only fills in what the user left open. "Published" below means the training runs of that paper; the lines
marked "ours" are choices of this project for what those runs leave open.
"""

import math
from collections.abc import Mapping
from fnmatch import fnmatchcase
from types import MappingProxyType
from typing import Any

from recipe.datasets import ROWS, DatasetRow, in_proportion

# Published; 1e-4 for all other architectures is published for some of them and ours for the rest.
_CIFAR_WEIGHT_DECAY = {
    "wide_resnet16_12": 5e-4,
    "wide_resnet28_10": 5e-4,
    "wide_resnet40_10": 5e-4,
    "wide_resnet52_8": 5e-4,
    "resnext29_*": 5e-4,
    "efficientnetb3": 5e-4,
}
_IMAGENET_WEIGHT_DECAY = {"resnet50": 5e-5, "efficientnet*": 1e-5}

# Published: input size, probability of erasing and magnitude of RandAugment on ImageNet.
_EFFICIENTNET = {
    "efficientnetb0": (224, 0.2, 4),
    "efficientnetb1": (240, 0.2, 4),
    "efficientnetb2": (260, 0.3, 5),
    "efficientnetb3": (300, 0.3, 6),
    "efficientnetb4": (380, 0.4, 6),
    "efficientnetb5": (456, 0.4, 7),
    "efficientnetb6": (528, 0.5, 8),
    "efficientnetb7": (600, 0.5, 9),
    "efficientnetb8": (672, 0.5, 9),
    "efficientnetl2": (800, 0.5, 9),
}
_RANDAUGMENT = {
    "se_resnext101_64x4d_B": 9,
    "senet113": 9,
    "resnexst101_8x32d": 9,
    "se_resnet50": 6,
    "resnexst50_*": 6,
}
# Published: no decay of a parameter whose name holds "norm" or "bias" anywhere. Only these families call their batch
# norms so, and only in the form that goes without a flag: (patterns, the flag, its value in that form).
_NAMED_NORMS = (
    (("densenet190",), "is_official_densenet", True),
    (("efficientnet*",), "is_lukemelas_efficientnet", False),
)
_LR_BY_BATCH = ("se_resnext101_64x4d_B", "senet113", "resnexst101_8x32d")

# Published (Peng et al., "Cream of the Crop", NeurIPS 2020): retraining of its networks on ImageNet.
_CREAM, _CREAM_SEARCH, _CREAM_SMALLEST = ("cream", "cream_*"), ("cream_supernet",), ("cream_14", "cream_4?")
_CREAM_RETRAINING: dict[str, Any] = {
    "batch_size": 1024,
    "eval_batch_size": 512,
    "optimizer": "RMSpropTF",
    "momentum": 0.9,
    "lr": 0.064,
    "slow_start_lr": 1e-6,
    "weight_decay": 1e-5,
    "no_decay": "norm_bias",
    "ema_decay": 0.9999,
    "is_label_smoothing": True,
    "dropout_rate": 0.2,
    "crop_area": (0.08, 1.0),
    "crop_interpolation": "random",
    "randaa": "rand-m9-mstd0.5",
    "is_autoaugment": False,
    "erase_p": 0.2,
    "erase_mode": "pixel",
    "erase_area": (0.02, 1 / 3),
    "erase_ratio": (0.3, 1 / 0.3),
    "is_mixup": False,
    "is_amp": False,
}
_CREAM_SCHEDULES: dict[Any, dict[str, Any]] = {
    mode: {"lr_mode": mode, **numbers}
    for mode, numbers in {
        "epoch_step": {"epochs": 500, "decay_epochs": 2.4, "decay_factor": 0.973, "end_lr": 0.0},
        "epoch_cos": {"epochs": 510, "decay_epochs": 500.0, "end_lr": 1e-5},
    }.items()
}

_LONG = 1800
_NO_LONG_WARM_UP = ("shake_resnet*", "pyramidnet*", "densenet*")
_LONGER_WARM_UP = ("resnext29_16x64d", "se_resnet164")

# Ours: learning rates for an optimiser that the user puts in place of the recipe's, at which it does not diverge.
_OTHER_LR = {"SGD": 0.1, "Adam": 1e-3, "AdamW": 1e-3, "RMSprop": 1e-2, "RMSpropTF": 1e-2}


def _matches(arch: str, patterns: Any) -> bool:
    return any(fnmatchcase(arch, pattern) for pattern in patterns)


def _first(arch: str, table: Mapping[str, Any], otherwise: Any) -> Any:
    """The value of the first pattern that the architecture's name matches."""
    return next((value for pattern, value in table.items() if fnmatchcase(arch, pattern)), otherwise)


def _warm_up_epochs(row: DatasetRow, arch: str, epochs: int) -> int:
    """Length of the learning rate's warm-up; ours where a length is not published."""
    if row.departures == "cifar" and epochs == _LONG and _matches(arch, _NO_LONG_WARM_UP):
        return 0
    if row.departures == "cifar" and epochs == 300 and arch in _LONGER_WARM_UP:
        return 30
    return in_proportion(row.warm_up, epochs)


def scaled_milestones(usual: tuple[int, ...], scale: float) -> tuple[int, ...]:
    """The usual milestones, in epochs, in proportion; those that fall on the start of a short run are left out."""
    return tuple(m for m in (round(epoch * scale) for epoch in usual) if m > 0)


def sgd_steps(
    epochs: int | None,
    *,
    usual: int,
    milestones: tuple[int, ...],
    batch_size: int,
    lr: float,
    weight_decay: float,
) -> dict[str, Any]:
    """The training that many methods were published with: SGD with momentum 0.9, steps by 0.1, crop and flip alone.

    Args:
        epochs: as set, or None.
        usual: epochs of the published run, which its milestones count.
        milestones: epochs, counted from 0, from which the rate is multiplied once more.
        batch_size, lr, weight_decay: of that run; everything decays.
    """
    total = usual if epochs is None else epochs
    return {
        "is_mixup": False,
        "is_autoaugment": False,
        "is_cutout": False,
        "is_label_smoothing": False,
        "epochs": total,
        "batch_size": batch_size,
        "optimizer": "SGD",
        "lr": lr,
        "momentum": 0.9,
        "is_nesterov": False,
        "lr_mode": "step",
        "lr_milestones": scaled_milestones(milestones, total / usual),
        "lr_step_multiplier": 0.1,
        "slow_start_epochs": -1,
        "end_lr": 0.0,
        "weight_decay": weight_decay,
        "is_wd_all": True,
    }


def long_steps(
    epochs: int | None,
    *,
    usual: int,
    milestones: tuple[int, ...],
    given: Mapping[str, Any] | None,
    large: bool = False,
) -> dict[str, Any]:
    """The long training of members in one network (uncertainty-baselines), by `sgd_steps` with warm-up and Nesterov.

    An L2 of λ‖w‖² there is a weight decay of 2 λ. On large images their code spares norms and decays biases; here both
    are spared.

    Args:
        epochs, usual, milestones: as there.
        given: all that was set, by flag name: on large images the rate follows the batch.
        large: ImageNet's row, else CIFAR's.
    """
    batch_size = (given or {}).get("batch_size", 256 if large else 128)
    rates = sgd_steps(
        epochs,
        usual=usual,
        milestones=milestones,
        batch_size=256 if large else 128,
        lr=0.1 * batch_size / 256 if large else 0.1,
        weight_decay=2e-4 if large else 6e-4,
    )
    warm_up = round((5 if large else 1) * rates["epochs"] / usual)
    spared = {"is_wd_all": False, "no_decay": "norm_bias"} if large else {}
    return (
        rates
        | spared
        | {
            "is_nesterov": True,
            "lr_step_multiplier": 0.1 if large else 0.2,
            "slow_start_epochs": warm_up or -1,
            "slow_start_lr": 0.0,
        }
    )


def _calls_norms_norm(arch: str, given: Mapping[str, Any]) -> bool:
    """Whether the published rule by names spares the scales of an architecture's batch norms from weight decay."""
    return any(_matches(arch, patterns) and given.get(flag, form) == form for patterns, flag, form in _NAMED_NORMS)


def _for_architecture(row: DatasetRow, arch: str, epochs: int, batch_size: int) -> dict[str, Any]:
    """Published departures of single architectures from their data set's row."""
    changes: dict[str, Any] = {}
    if row.departures == "cifar":
        changes["weight_decay"] = _first(arch, _CIFAR_WEIGHT_DECAY, 1e-4)
        if arch == "resnext29_16x64d" and epochs == 300:
            changes["lr"] = 0.05
        if fnmatchcase(arch, "shake_resnet*") and epochs == _LONG:
            changes["lr"] = 0.2
    if row.departures == "imagenet":
        changes["weight_decay"] = _first(arch, _IMAGENET_WEIGHT_DECAY, 1e-4)
        if arch in _LR_BY_BATCH:
            changes["lr"] = 0.1 * batch_size / 256
        magnitude = _first(arch, _RANDAUGMENT, None)
        if arch in _EFFICIENTNET:
            crop_size, erase_p, magnitude = _EFFICIENTNET[arch]
            changes |= {"crop_size": crop_size, "erase_p": erase_p, "is_mixup": False}
            # the warm-up starts below the floor, so the first rate is the floor's 1e-5
            changes |= {"optimizer": "RMSpropTF", "lr": 0.256, "lr_mode": "exponential", "slow_start_lr": 1e-6}
        if magnitude is not None:
            changes["randaa"] = f"rand-m{magnitude}-mstd0.5"
    return changes


def recipe_defaults(
    *,
    data_recipe: str,
    dataset: str,
    arch: str,
    split_factor: int,
    epochs: int | None,
    batch_size: int | None,
    given: Mapping[str, Any],
    own_size: int | None = None,
    instead: Mapping[str, Any] = MappingProxyType({}),
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Values by flag name: what the flags take that nobody set, and what becomes of some that were set.

    Args:
        data_recipe: name of a row of `recipe.datasets.ROWS`.
        dataset: value of --dataset; an open one (folder, synthetic) knows its image size itself and gets no crop size
            from here, unless the architecture has one of its own.
        arch: backbone; of several, the first.
        split_factor: S, by which each network is divided; 1 for a list of full networks.
        epochs, batch_size: as set, or None.
        given: what was set, by flag name, and so is not to be replaced.
        own_size: side of the architecture's own input in pixels; None: the data set's.
        instead: flags of a recipe of ours that takes the place of the data set's and the architecture's.

    Returns:
        (defaults, adjusted). `adjusted` wins over what was set: it holds a learning rate and momentum that were set
        beside --is_linear_lr 1, scaled, and a weight decay that was set beside --is_div_wd 1, divided.
    """
    row = ROWS[data_recipe]
    defaults = {**row.training, "crop_size": row.side}
    is_cream = row.departures == "imagenet" and _matches(arch, _CREAM) and not _matches(arch, _CREAM_SEARCH)
    if is_cream:
        usual_mode = "epoch_step" if _matches(arch, _CREAM_SMALLEST) else "epoch_cos"
        defaults |= _CREAM_RETRAINING | _CREAM_SCHEDULES.get(given.get("lr_mode"), _CREAM_SCHEDULES[usual_mode])
    defaults |= instead
    usual_batch, usual_epochs = defaults["batch_size"], defaults["epochs"]
    epochs = epochs or defaults["epochs"]
    batch_size = batch_size or usual_batch
    defaults |= {"epochs": epochs, "batch_size": batch_size}
    if is_cream:  # published for the usual epochs, ours for others
        defaults["decay_epochs"] *= epochs / usual_epochs
        defaults["slow_start_epochs"] = round(3 * epochs / usual_epochs)
    else:
        defaults |= _for_architecture(row, arch, epochs, batch_size)
        defaults["slow_start_epochs"] = _warm_up_epochs(row, arch, epochs)
        if _calls_norms_norm(arch, given):
            defaults["no_decay"] = "norm_bias"
    defaults |= {name: value for name, value in instead.items() if name not in ("epochs", "batch_size")}
    if own_size is not None:
        defaults["crop_size"] = own_size
    defaults["cot_weight_warm_up_epochs"] = in_proportion(row.cot_warm_up, epochs)
    if given.get("lr_mode", defaults["lr_mode"]) == "step":
        defaults["lr_milestones"] = scaled_milestones(row.milestones[1], epochs / row.milestones[0])
    if given.get("lr_mode") == "epoch_cos":
        defaults.setdefault("decay_epochs", float(epochs))
    if given.get("is_efficientnet_user_crop"):
        defaults["crop_size"] = row.side
    if dataset not in ROWS and defaults["crop_size"] == row.side:
        del defaults["crop_size"]
    if given.get("is_autoaugment"):
        defaults["randaa"] = None
    if given.get("randaa", defaults["randaa"]) is not None:
        defaults["is_autoaugment"] = False
    if given.get("optimizer", defaults["optimizer"]) != defaults["optimizer"]:
        defaults["lr"] = _OTHER_LR.get(given["optimizer"], defaults["lr"])

    values = {**defaults, **given}
    changed: dict[str, Any] = {}
    if given.get("is_linear_lr"):
        scale = batch_size / usual_batch
        scaled_already = "lr" not in given and arch in _LR_BY_BATCH and row.departures == "imagenet"
        changed["lr"] = values["lr"] * (1.0 if scaled_already else scale)
        changed["momentum"] = values["momentum"] ** scale
    divide = split_factor > 1 and values.get("is_div_wd", True)
    as_given = "weight_decay" in given and ("is_div_wd" not in given or given.get("is_wd_test"))
    if divide and not as_given:
        changed["weight_decay"] = values["weight_decay"] * math.exp(1 / split_factor - 1)  # eq. 6
    defaults |= {name: value for name, value in changed.items() if name not in given}
    adjusted = {name: value for name, value in changed.items() if name in given}

    # Ours: a rate below the published ends of the schedule would otherwise be raised by its warm-up or its floor.
    lr = {**values, **changed}["lr"]
    if lr < defaults["slow_start_lr"]:
        defaults["slow_start_lr"] = lr / 20
    if lr <= defaults["end_lr"]:
        defaults["end_lr"] = lr / 1000
    return defaults, adjusted

"""Cream's published configuration files (upper-case YAML keys and `KEY VALUE` overrides), in terms of our flags.

A file means what it meant: a key that is left out has the published code's default, not our recipe's. Keys without
effect there are accepted with a warning; keys that the code does not know, and values that cannot work, are refused.
"""

import ast
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

from utils.errors import UserError
from utils.registry import nearest_name

BOTH, SEARCH, NETWORK = "both", "search", "network"


class Published(NamedTuple):
    """flags: values by flag name, as YAML would hold them. warnings: one line each.

    overridden: names of the flags that overrides decided, which win over a command line's flags.
    """

    flags: dict[str, Any]
    warnings: list[str]
    overridden: frozenset[str]


# ---- values ----------------------------------------------------------------------------------------------------------


def _literal(value: Any) -> Any:
    """Text such as "(0.05, 0.2)" or "[[0], [3]]" as what it says; anything else as it is."""
    return ast.literal_eval(value) if isinstance(value, str) else value


def _number(value: Any) -> float:
    if isinstance(value, bool):
        raise ValueError
    return float(value)


def _integer(value: Any) -> int:
    number = _number(value)
    if number != int(number):
        raise ValueError
    return int(number)


def _truth(value: Any) -> bool:
    return {"true": True, "1": True, "false": False, "0": False}[str(value).lower()]


def _text(value: Any) -> str:
    if not isinstance(value, str | int | float):
        raise ValueError
    return str(value)


def _numbers(value: Any) -> list[float]:
    return [_number(part) for part in _literal(value)]


def _integers(value: Any) -> list[int] | None:
    return None if value is None else [_integer(part) for part in _literal(value)]


def _arch_list(value: Any) -> str | None:
    return None if value is None else str([[_integer(index) for index in stage] for stage in _literal(value)])


EXPECTED: Mapping[Callable[[Any], Any], str] = {
    _number: "a number",
    _integer: "a whole number",
    _truth: "True or False",
    _text: "a text",
    _numbers: "numbers, as (0.05, 0.2)",
    _integers: "whole numbers, as [4, 4, 5, 4, 4]",
    _arch_list: "a list of lists of whole numbers",
}


@dataclass(frozen=True)
class Key:
    """One published key.

    Attributes:
        read: turns what YAML holds into a value.
        default: of the published code; None: none.
        flag: our flag, where the value is taken as it is; None: `_translate` sees to it.
        part: where it has an effect: in a search, for one network (retraining, testing), or in both.
    """

    read: Callable[[Any], Any]
    default: Any
    flag: str | None = None
    part: str = BOTH


KEYS: Mapping[str, Key] = {
    "AUTO_RESUME": Key(_truth, True),
    "DATA_DIR": Key(_text, "./data/imagenet", "data"),
    "MODEL": Key(_text, None, "proc_name"),
    "RESUME_PATH": Key(_text, None),
    "SAVE_PATH": Key(_text, None, "model_dir"),
    "SEED": Key(_integer, 42, "seed"),
    "LOG_INTERVAL": Key(_integer, 50, "print_freq"),
    "WORKERS": Key(_integer, 4, "workers"),
    "NUM_GPU": Key(_integer, None),
    "RECOVERY_INTERVAL": Key(_integer, 0, "save_steps"),
    "EVAL_METRICS": Key(_text, "prec1"),
    "TTA": Key(_integer, 0),
    "MODEL_SELECTION": Key(_integer, None),
    "INPUT_ARCH": Key(_arch_list, None),
    "DATASET.NUM_CLASSES": Key(_integer, 1000, "num_classes"),
    "DATASET.IMAGE_SIZE": Key(_integer, 224),
    "DATASET.BATCH_SIZE": Key(_integer, 32),
    "DATASET.VAL_BATCH_MUL": Key(_integer, 4),
    "NET.SELECTION": Key(_integer, None),
    "NET.MODEL_SELECTION": Key(_integer, None),
    "NET.INPUT_ARCH": Key(_arch_list, None),
    "NET.HONOUR_SINGLE_BLOCK": Key(_truth, False, "honour_single_block", NETWORK),
    "NET.GP": Key(_text, "avg", "global_pool"),
    "NET.DROPOUT_RATE": Key(_number, 0.0, "dropout_rate"),
    "NET.EMA.USE": Key(_truth, True, part=NETWORK),
    "NET.EMA.DECAY": Key(_number, 0.9998, part=NETWORK),
    "OPT": Key(_text, "sgd"),
    "OPT_EPS": Key(_number, 1e-2),
    "MOMENTUM": Key(_number, 0.9, "momentum"),
    "WEIGHT_DECAY": Key(_number, 1e-4, "weight_decay"),
    "LR": Key(_number, 1e-2, "lr"),
    "META_LR": Key(_number, 1e-4, "meta_lr", SEARCH),
    "EPOCHS": Key(_integer, 200),
    "SCHED": Key(_text, None, part=NETWORK),
    "WARMUP_LR": Key(_number, 1e-4, "slow_start_lr", NETWORK),
    "WARMUP_EPOCHS": Key(_integer, 3, "slow_start_epochs", NETWORK),
    "MIN_LR": Key(_number, 1e-5, part=NETWORK),
    "COOLDOWN_EPOCHS": Key(_integer, 10, part=NETWORK),
    "DECAY_EPOCHS": Key(_number, 30.0, part=NETWORK),
    "DECAY_RATE": Key(_number, 0.1, part=NETWORK),
    "AUGMENTATION.AA": Key(_text, "rand-m9-mstd0.5", part=NETWORK),
    "AUGMENTATION.COLOR_JITTER": Key(_number, 0.4),
    "AUGMENTATION.RE_PROB": Key(_number, 0.2, "erase_p"),
    "AUGMENTATION.RE_MODE": Key(_text, "pixel", "erase_mode"),
    "AUGMENTATION.SMOOTHING": Key(_number, 0.1),
    "BATCHNORM.SYNC_BN": Key(_truth, False, "is_syncbn"),
    "SUPERNET.UPDATE_ITER": Key(_integer, 1300, "update_iter", SEARCH),
    "SUPERNET.SLICE": Key(_integer, 4, "slice", SEARCH),
    "SUPERNET.POOL_SIZE": Key(_integer, 10, "pool_size", SEARCH),
    "SUPERNET.FLOPS_MINIMUM": Key(_number, 0.0, "flops_minimum", SEARCH),
    "SUPERNET.FLOPS_MAXIMUM": Key(_number, 600.0, "flops_maximum", SEARCH),
    "SUPERNET.PICK_METHOD": Key(_text, "meta", "pick_method", SEARCH),
    "SUPERNET.META_STA_EPOCH": Key(_integer, 20, "meta_sta_epoch", SEARCH),
    "SUPERNET.HOW_TO_PROB": Key(_text, "pre_prob", "how_to_prob", SEARCH),
    "SUPERNET.PRE_PROB": Key(_numbers, (0.05, 0.2, 0.05, 0.5, 0.05, 0.15), "pre_prob", SEARCH),
    "SUPERNET.STA_NUM": Key(_integers, None, "sta_num", SEARCH),
    "SUPERNET.ACC_GAP": Key(_number, 5.0, "acc_gap", SEARCH),
    "SUPERNET.RESUNIT": Key(_truth, False),
    "SUPERNET.DIL_CONV": Key(_truth, False),
}

# Flags beside `Key.flag` that a key has a say in.
DECIDES: Mapping[str, tuple[str, ...]] = {
    "AUTO_RESUME": ("resume",),
    "RESUME_PATH": ("resume",),
    **dict.fromkeys(("MODEL_SELECTION", "NET.SELECTION", "NET.MODEL_SELECTION"), ("arch", "crop_size")),
    **dict.fromkeys(("INPUT_ARCH", "NET.INPUT_ARCH"), ("arch", "arch_list")),
    "DATASET.IMAGE_SIZE": ("crop_size",),
    "DATASET.BATCH_SIZE": ("batch_size", "eval_batch_size"),
    "DATASET.VAL_BATCH_MUL": ("eval_batch_size",),
    "NET.EMA.USE": ("ema_decay",),
    "NET.EMA.DECAY": ("ema_decay",),
    "OPT": ("optimizer", "is_nesterov", "optimizer_eps"),
    "OPT_EPS": ("optimizer_eps",),
    "EPOCHS": ("epochs", "decay_epochs"),
    "SCHED": ("lr_mode", "epochs", "decay_epochs", "decay_factor", "end_lr"),
    "MIN_LR": ("end_lr",),
    "COOLDOWN_EPOCHS": ("epochs",),
    "DECAY_EPOCHS": ("decay_epochs",),
    "DECAY_RATE": ("decay_factor",),
    "AUGMENTATION.AA": ("randaa", "color_jitter"),
    "AUGMENTATION.COLOR_JITTER": ("color_jitter",),
    "AUGMENTATION.RE_PROB": ("is_cutout",),
    "AUGMENTATION.SMOOTHING": ("is_label_smoothing",),
}

# Known to the published code and without effect there, or decided elsewhere by us.
WITHOUT_EFFECT = (
    "AMP",
    "OUTPUT",
    "LOCAL_RANK",
    "START_EPOCH",
    "PATIENCE_EPOCHS",
    "VERBOSE",
    "LR_NOISE*",
    "OPTIMIZER.*",
    "DATASET.NO_PREFECHTER",
    "DATASET.INTERPOLATION",
    "NET.EMA.FORCE_CPU",
    "AUGMENTATION.MIXUP*",
    "BATCHNORM.BN_*",
    "SUPERNET.UPDATE_2ND",
)

# Released models by selection: arch, input size. 112 and 42 are second names.
RELEASED: Mapping[int, tuple[str, int]] = {
    14: ("cream_14", 64),
    42: ("cream_43", 96),
    43: ("cream_43", 96),
    112: ("cream_114", 160),
    114: ("cream_114", 160),
    287: ("cream_287", 224),
    481: ("cream_481", 224),
    604: ("cream_604", 224),
}

OPTIMIZERS: Mapping[str, Mapping[str, Any]] = {
    "sgd": {"optimizer": "SGD", "is_nesterov": True},
    "nesterov": {"optimizer": "SGD", "is_nesterov": True},
    "momentum": {"optimizer": "SGD", "is_nesterov": False},
    "adam": {"optimizer": "Adam"},
    "adamw": {"optimizer": "AdamW"},
    "rmsprop": {"optimizer": "RMSprop"},
    "rmsproptf": {"optimizer": "RMSpropTF"},
}


# ---- reading ---------------------------------------------------------------------------------------------------------


def is_published_key(key: str) -> bool:
    """Whether a key is written in the published dialect, all in capitals."""
    return key.isupper()


def is_published(mapping: Mapping[str, Any]) -> bool:
    """Whether a YAML file is in the published dialect: it has top-level keys, and all are in capitals."""
    return bool(mapping) and all(is_published_key(key) for key in mapping)


def _flatten(mapping: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in mapping.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def read_published(
    mapping: Mapping[str, Any], *, where: str, overrides: Sequence[str] = (), processes: int = 1
) -> Published:
    """Our flags for a published configuration.

    A file that selects a network (or gives its arch list) is for retraining or testing that, any other for a search.

    Args:
        mapping: parsed YAML.
        where: the flag and file, for messages ("--config train.yaml").
        overrides: KEY VALUE pairs of the same keys, which come last.
        processes: on this machine; the published batch size is per process.

    Raises:
        UserError: an unknown key, an unusable value, or keys that contradict each other.
    """
    if len(overrides) % 2:
        raise UserError(f"{overrides[-1]!r}: overrides are KEY VALUE pairs; this one has no value.")
    raw = _flatten(mapping) | dict(zip(overrides[::2], overrides[1::2], strict=True))
    given: dict[str, Any] = {}
    idle = []
    for name, value in raw.items():
        if any(fnmatchcase(name, pattern) for pattern in WITHOUT_EFFECT):
            idle.append(name)
        elif name in KEYS:
            given[name] = _read(name, value, where)
        else:
            known = [*KEYS, *(pattern for pattern in WITHOUT_EFFECT if "*" not in pattern)]
            raise UserError(f"{where}: {name!r} is not a known key.{nearest_name(name, known)}")
    flags, warnings = _translate(given, idle, where, processes)
    decided = {flag for name in overrides[::2] if name in KEYS for flag in (KEYS[name].flag, *DECIDES.get(name, ()))}
    return Published(flags, warnings, frozenset(flag for flag in flags if flag in decided))


def _read(name: str, value: Any, where: str) -> Any:
    read = KEYS[name].read
    try:
        return read(value)
    except (ValueError, TypeError, KeyError, SyntaxError, OverflowError, RecursionError):
        raise UserError(f"{where}: {name}: {value!r} is not usable: expected {EXPECTED[read]}.") from None


def _one_of(names: Sequence[str], given: Mapping[str, Any], where: str) -> Any:
    """The value of a key that has several spellings, which must agree."""
    found = {name: given[name] for name in names if given.get(name) is not None}
    if len({str(value) for value in found.values()}) > 1:
        shown = " and ".join(f"{name} {value}" for name, value in found.items())
        raise UserError(f"{where}: {shown} disagree; keep one of them.")
    return next(iter(found.values()), None)


def _translate(
    given: Mapping[str, Any], idle: list[str], where: str, processes: int
) -> tuple[dict[str, Any], list[str]]:
    values = {name: key.default for name, key in KEYS.items()} | dict(given)
    selection = _one_of(("MODEL_SELECTION", "NET.SELECTION", "NET.MODEL_SELECTION"), given, where)
    arch_list = _one_of(("INPUT_ARCH", "NET.INPUT_ARCH"), given, where)
    part = SEARCH if selection is None and arch_list is None else NETWORK
    _refuse_unsupported(values, where)
    idle += [name for name in given if KEYS[name].part not in (BOTH, part)]
    warnings = []
    if given.get("NUM_GPU", processes) != processes:
        warnings.append(
            f"{where}: NUM_GPU {given['NUM_GPU']} is ignored: {processes} processes were started on this machine."
        )
    flags: dict[str, Any] = {
        key.flag: values[name]
        for name, key in KEYS.items()
        if key.flag is not None and key.part in (BOTH, part) and values[name] is not None
    }
    flags |= {
        "dataset": "imagenet",
        "epochs": values["EPOCHS"],
        "batch_size": values["DATASET.BATCH_SIZE"] * processes,
        "eval_batch_size": values["DATASET.BATCH_SIZE"] * values["DATASET.VAL_BATCH_MUL"],
        "is_label_smoothing": values["AUGMENTATION.SMOOTHING"] > 0,
        "is_cutout": values["AUGMENTATION.RE_PROB"] > 0,
        # fixed in the published code
        "crop_area": [0.08, 1.0],
        "crop_interpolation": "random",
        "crop_pct": 0.875,
        "erase_area": [0.02, 1 / 3],
        "erase_ratio": [0.3, 1 / 0.3],
        "no_decay": "norm_bias",
        "is_amp": False,
        "is_autoaugment": False,
        "is_mixup": False,
        **_optimizer(values["OPT"], where),
    }
    if flags["optimizer"] != "SGD":
        flags["optimizer_eps"] = values["OPT_EPS"]
    elif "OPT_EPS" in given:
        idle.append("OPT_EPS")
    if values["AUTO_RESUME"] and values["RESUME_PATH"] is not None:
        flags["resume"] = values["RESUME_PATH"]
    if part == SEARCH:
        flags |= _search(values)
    else:
        flags |= _network(values, given, selection, arch_list, idle, where)
    if idle:
        warnings.append(f"{where}: without effect: {', '.join(sorted(idle))}.")
    return flags, warnings


def _refuse_unsupported(values: Mapping[str, Any], where: str) -> None:
    for name in ("SUPERNET.RESUNIT", "SUPERNET.DIL_CONV"):
        if values[name]:
            raise UserError(
                f"{where}: {name} True is not supported: its operators are half-wired in the published code."
            )
    if values["TTA"]:
        raise UserError(f"{where}: TTA {values['TTA']} is not supported: only 0, no test-time augmentation.")
    if values["EVAL_METRICS"] != "prec1":
        raise UserError(f"{where}: EVAL_METRICS {values['EVAL_METRICS']!r} is not supported: only prec1.")
    if values["AUGMENTATION.SMOOTHING"] not in (0.0, 0.1):
        raise UserError(f"{where}: AUGMENTATION.SMOOTHING must be 0 or 0.1, got {values['AUGMENTATION.SMOOTHING']}.")
    if values["AUGMENTATION.RE_MODE"] not in ("pixel", "const"):
        raise UserError(
            f"{where}: AUGMENTATION.RE_MODE must be pixel or const, got {values['AUGMENTATION.RE_MODE']!r}."
        )


def _optimizer(name: str, where: str) -> Mapping[str, Any]:
    if name.lower() not in OPTIMIZERS:
        near = nearest_name(name.lower(), OPTIMIZERS)
        raise UserError(f"{where}: OPT {name!r} is not one of {', '.join(OPTIMIZERS)}.{near}")
    return OPTIMIZERS[name.lower()]


def _search(values: Mapping[str, Any]) -> dict[str, Any]:
    """Flags of a search. An image size of 224 is left to the recipe, which knows what the interval leads to."""
    flags: dict[str, Any] = {
        "method": "cream",
        "arch": "cream_supernet",
        "lr_mode": "linear",
        "slow_start_epochs": -1,
        "end_lr": 0.0,
        "ema_decay": 0.0,
        "eval_interpolation": "bilinear",
        "color_jitter": values["AUGMENTATION.COLOR_JITTER"],
    }
    if values["DATASET.IMAGE_SIZE"] != KEYS["DATASET.IMAGE_SIZE"].default:
        flags["crop_size"] = values["DATASET.IMAGE_SIZE"]
    return flags


def _network(
    values: Mapping[str, Any],
    given: Mapping[str, Any],
    selection: int | None,
    arch_list: str | None,
    idle: list[str],
    where: str,
) -> dict[str, Any]:
    """Flags of retraining or testing one network."""
    flags: dict[str, Any] = {"ema_decay": values["NET.EMA.DECAY"] if values["NET.EMA.USE"] else 0.0}
    if selection in (None, -1):
        if arch_list is None:
            raise UserError(f"{where}: MODEL_SELECTION -1 needs INPUT_ARCH, the list of the network to build.")
        flags |= {"arch": "cream", "arch_list": arch_list, "crop_size": values["DATASET.IMAGE_SIZE"]}
    elif selection in RELEASED:
        flags["arch"], flags["crop_size"] = RELEASED[selection]
        if given.get("DATASET.IMAGE_SIZE", flags["crop_size"]) != flags["crop_size"]:
            idle.append("DATASET.IMAGE_SIZE")
        idle += [name for name in ("INPUT_ARCH", "NET.INPUT_ARCH") if given.get(name) is not None]
    else:
        known = ", ".join(map(str, RELEASED))
        raise UserError(f"{where}: MODEL_SELECTION {selection} is not a released model: {known}, or -1 for INPUT_ARCH.")
    policy = values["AUGMENTATION.AA"]
    if policy and policy.lower() != "none":
        flags |= {"randaa": policy, "color_jitter": 0.0}
        idle += [name for name in ("AUGMENTATION.COLOR_JITTER",) if name in given]
    else:
        flags["color_jitter"] = values["AUGMENTATION.COLOR_JITTER"]
    return flags | _schedule(values, where)


def _schedule(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Flags of a retraining schedule; a test file names none."""
    name = values["SCHED"]
    if name is None:
        return {}
    if name == "cosine":
        return {
            "lr_mode": "epoch_cos",
            "epochs": values["EPOCHS"] + values["COOLDOWN_EPOCHS"],
            "decay_epochs": float(values["EPOCHS"]),
            "end_lr": values["MIN_LR"],
        }
    if name == "step":
        return {
            "lr_mode": "epoch_step",
            "decay_epochs": values["DECAY_EPOCHS"],
            "decay_factor": values["DECAY_RATE"],
            "end_lr": 0.0,
        }
    raise UserError(f"{where}: SCHED {name!r} is not one of cosine, step.{nearest_name(name, ('cosine', 'step'))}")

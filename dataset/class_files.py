"""Files of two columns that say something of every class: its name, its weight."""

import csv
import dataclasses
import logging
from collections import Counter
from pathlib import Path

import torch
from torch import Tensor

from dataset import DataSource
from utils.errors import UserError, reason
from utils.options import is_finite
from utils.text import escaped

logger = logging.getLogger(__name__)

BALANCED = "balanced"


def read_pairs(flag: str, path: str) -> dict[str, str]:
    """First column -> second: cut at the first tab, in a .csv at the comma, else at the first blank.

    Raises:
        UserError: it cannot be read, or a line has no second column, or says something else of a class than another.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8-sig", errors="surrogateescape").splitlines()
    except OSError as error:
        raise UserError(f"--{flag} {path}: cannot be read: {reason(error)}.") from None
    pairs: dict[str, str] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        if "\t" in line:
            cells = line.split("\t", 1)
        elif path.lower().endswith(".csv"):
            cells = next(csv.reader([line]))[:2]
        else:
            cells = line.split(None, 1)
        key, value = (escaped(cell.strip()) for cell in (*cells, "", "")[:2])
        if not key or not value:
            raise UserError(f"--{flag} {path}, line {number}: expected two columns, the class and what it gets.")
        if pairs.setdefault(key, value) != value:
            raise UserError(f"--{flag} {path}, line {number}: {key} stands there twice, with {pairs[key]} and {value}.")
    return pairs


def with_names(source: DataSource, path: str) -> DataSource:
    """The data set with the names of --class_map in place of its folders' or labels'; the order stays.

    Of two classes of one name, each gets its code behind it. A class that the file leaves out keeps its code.

    Raises:
        UserError: as `read_pairs`; the file names none of the classes.
    """
    names = read_pairs("class_map", path)
    left_out = [code for code in source.classes if code not in names]
    if len(left_out) == len(source.classes):
        raise UserError(
            f"--class_map {path} names none of the classes of the data, such as {left_out[0]}: its first column must."
        )
    if left_out:
        logger.warning("--class_map %s leaves out %d classes, such as %s.", path, len(left_out), left_out[0])
    chosen = [names.get(code, code) for code in source.classes]
    count = Counter(chosen)
    unique = tuple(
        f"{name} ({code})" if count[name] > 1 else name for name, code in zip(chosen, source.classes, strict=True)
    )
    return dataclasses.replace(source, classes=unique, codes=source.classes)


def class_weights(value: str, source: DataSource) -> Tensor:
    """--class_weights: float32 [K].

    "balanced" is N / (K · n_k) for the n_k of N training images, K counting classes that have any: the mean over the
    training images is 1. A FILE has a class (its name or code) and its weight on every line, which are taken as given.

    Raises:
        UserError: as `read_pairs`; a class is missing or unknown, a weight is no number of 0 or more, or all are 0.
    """
    counts_K = source.train.targets.bincount(minlength=len(source.classes))
    if value == BALANCED:
        used = int((counts_K > 0).sum())
        return (len(source.train) / (used * counts_K.clamp(min=1))).float()
    pairs = read_pairs("class_weights", value)
    place = {name: k for names in (source.codes, source.classes) for k, name in enumerate(names)}
    weights = torch.full((len(source.classes),), -1.0)
    for name, text in pairs.items():
        if name not in place:
            raise UserError(f"--class_weights {value}: {name} is no class of the data.")
        weights[place[name]] = _weight(text, f"--class_weights {value}: {name}")
    if (weights < 0).any():
        lacking = source.classes[int((weights < 0).nonzero()[0])]
        raise UserError(f"--class_weights {value} has no weight of the class {lacking}.")
    if not weights.any():
        raise UserError(f"--class_weights {value}: all weights are 0.")
    return weights


def _weight(text: str, where: str) -> float:
    try:
        weight = float(text)
    except ValueError:
        weight = -1.0
    if not is_finite(weight) or weight < 0:
        raise UserError(f"{where} has the weight {text}; expected a number of 0 or more.")
    return weight

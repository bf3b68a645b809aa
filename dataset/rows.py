"""Images of a user's own as rows: a name, a label and perhaps a split each, whatever file holds them."""

import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dataset import ImageSet, SourceRequest, names_hash
from dataset.own_images import Listed, draw_splits
from utils.errors import UserError
from utils.text import escaped

logger = logging.getLogger(__name__)

# what a split is called in columns and in the names of files
SPLITS = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "dev"),
    "test": ("test", "testing"),
}
_OF_NAME = {name: split for split, names in SPLITS.items() for name in names}
_FILE_NAME = re.compile(rf"^({'|'.join(_OF_NAME)})(?![a-z])", re.IGNORECASE)


def split_of(value: str) -> str | None:
    """The split that a cell names; None for no split."""
    return _OF_NAME.get(value.strip().lower())


def split_of_file(stem: str) -> str | None:
    """The split that a file's name begins with, as train-00000-of-00002; None for none."""
    match = _FILE_NAME.match(stem)
    return None if match is None else split_of(match[1])


@dataclass(frozen=True, kw_only=True)
class Rows:
    """N images, as they stand in their files.

    Attributes:
        images: all of them; the targets are of no meaning yet.
        names: of each, relative to the data set: what the parts are drawn by.
        labels: of each, as `utils.text.escaped` writes it.
        splits: of each, "train", "val" or "test"; None: the data says nothing of splits.
        classes: all labels there are, where the data says it, in their order; None: those that occur.
    """

    images: ImageSet
    names: Sequence[bytes]
    labels: Sequence[str]
    splits: Sequence[str] | None = None
    classes: tuple[str, ...] | None = None


def list_rows(rows: Rows, request: SourceRequest) -> Listed:
    """The splits that the request needs, each ordered by class, then as the rows stand.

    The rules are those of folders (`dataset.class_folders.find_folders`): without a split, `draw_splits`; test is
    reported, with val beside it to choose the best epoch on, or val where there is no test.

    Raises:
        UserError: no rows of a split that is asked for, or a label in them that the training rows lack.
    """
    given = [] if rows.splits is None else [split for split in SPLITS if split in set(rows.splits)]
    evaluated = [split for split in ("val", "test") if split in given]
    training = "train" in request.splits
    if not evaluated and (request.test_fraction is not None or (rows.splits is None and not training)):
        return _unsplit(rows, request)
    reported = request.split or (evaluated[-1] if evaluated else "test")
    needed = [split for split in ("train",) if training]
    if "test" in request.splits:
        needed += [*evaluated, *([] if evaluated else ["test"])] if training else [reported]
    lacking = [split for split in needed if split not in given]
    if lacking:
        raise UserError(
            f"--data {request.root} has no images of the split {lacking[0]}; it has {', '.join(given) or 'none'}."
        )
    where = {split: [i for i, name in enumerate(rows.splits or ()) if name == split] for split in given}
    of_split = {split: {rows.labels[i] for i in indices} for split, indices in where.items()}
    if training:
        classes = _first_known(of_split["train"], rows.classes)
    else:
        own = of_split[reported]
        classes = _first_known(own, request.classes, rows.classes, ordered(of_split.get("train", ())))
    for split in needed:
        unknown = ordered(of_split[split] - set(classes))
        if unknown:
            raise UserError(
                f"--data {request.root}: {unknown[0]} is a class of {split} that the training images lack "
                f"({len(unknown)} such in all)."
            )
    splits = {split: _subset(rows, where[split], classes) for split in needed}
    for split, images in splits.items():
        _tell_empty(split, images.targets, classes, request)
    return Listed(
        classes=classes,
        splits=splits,
        reported=reported,
        names=names_hash(splits["train"].paths) if training else "",
    )


def ordered(labels: Iterable[str]) -> tuple[str, ...]:
    """Sorted: as whole numbers where all of them are, else as text."""
    labels = set(labels)
    if all(re.fullmatch(r"-?\d+", label) for label in labels):
        return tuple(sorted(labels, key=lambda label: (int(label), label)))
    return tuple(sorted(labels))


def _unsplit(rows: Rows, request: SourceRequest) -> Listed:
    own = set(rows.labels)
    classes = _first_known(own, request.classes, rows.classes)
    if len(classes) < 2:
        raise UserError(f"--data {request.root} holds images of one class, {classes[0]!r}: two are the least.")
    order = _order(rows, range(len(rows.labels)), classes)
    images = _subset(rows, order, classes)
    if request.test_fraction is not None:
        _tell_empty("train", images.targets, classes, request)
        return draw_splits(images, [rows.names[i] for i in order], classes, request)
    if request.split is not None:
        raise UserError(f"--split {request.split}: --data {request.root} says nothing of splits. Leave the flag away.")
    logger.info("--data %s has no split: evaluated on all of its %d images.", escaped(request.root), len(images))
    return Listed(classes=classes, splits={"test": images}, reported="test", names="")


def _first_known(own: set[str], *choices: Sequence[str] | None) -> tuple[str, ...]:
    """The first choice that holds all labels; else the labels themselves."""
    return next((tuple(names) for names in choices if names and own <= set(names)), ordered(own))


def _order(rows: Rows, indices: Iterable[int], classes: Sequence[str]) -> list[int]:
    number = {name: label for label, name in enumerate(classes)}
    return sorted(indices, key=lambda i: number[rows.labels[i]])


def _subset(rows: Rows, indices: Iterable[int], classes: Sequence[str]) -> ImageSet:
    """Some rows in the order of their classes, with targets."""
    number = {name: label for label, name in enumerate(classes)}
    order = _order(rows, indices, classes)
    images = rows.images.subset(torch.tensor(order, dtype=torch.int64))
    targets = torch.tensor([number[rows.labels[i]] for i in order], dtype=torch.int64)
    return ImageSet(targets=targets, paths=images.paths, store=images.store, places=images.places)


def _tell_empty(split: str, targets_N: Tensor, classes: Sequence[str], request: SourceRequest) -> None:
    counts_K = targets_N.bincount(minlength=len(classes))
    empty = [name for name, count in zip(classes, counts_K.tolist(), strict=True) if not count]
    if empty:
        logger.warning(
            "--data %s has no image in %s of %d of the %d classes, such as %s.",
            escaped(request.root),
            split,
            len(empty),
            len(classes),
            empty[0],
        )


def guessed_column(columns: Mapping[str, str], flag: str, asked: str | None, guesses: Sequence[str]) -> str | None:
    """Which column it is: the one that the flag names, else the first guess that is there; None: neither.

    Args:
        columns: lower-case name -> name.

    Raises:
        UserError: the flag names none of them.
    """
    if asked is not None:
        if asked not in columns.values():
            raise UserError(f"--{flag} {asked}: there is no such column. There are {', '.join(columns.values())}.")
        return asked
    return next((columns[name] for name in guesses if name in columns), None)


def needed_columns(
    columns: Mapping[str, str],
    request: SourceRequest,
    *,
    images: Sequence[str],
    labels: Sequence[str],
    table: Path,
    header: Sequence[str],
) -> tuple[str, str]:
    """(column of the images, column of the labels).

    Args:
        columns: lower-case name -> name.
        images, labels: guesses, see `guessed_column`.
        table: for errors. header: the names, as these list them.

    Raises:
        UserError: as `guessed_column`, or one of the two cannot be told.
    """
    image = guessed_column(columns, "image_column", request.image_column, images)
    label = guessed_column(columns, "label_column", request.label_column, labels)
    if image is None or label is None:
        what = "image" if image is None else "label"
        raise UserError(
            f"--data {table}: which column holds the {what}s? Say it by --{what}_column: "
            f"{', '.join(map(escaped, header))}."
        )
    return image, label

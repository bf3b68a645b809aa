"""Files that hold many images each: which ones --data names, and what their names say of splits."""

import glob
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from dataset import SourceRequest
from dataset.rows import split_of, split_of_file
from utils.errors import UserError

_BRACES = re.compile(r"\{([^{}]*)\}")
_NUMBERS = re.compile(r"(\d+)\.\.(\d+)")


def find_shards(request: SourceRequest, suffixes: Sequence[str]) -> list[Path]:
    """The files of a pattern, a folder (and its subfolders), or one file; sorted, each once.

    A pattern has braces, as {000..003} or {train,test}, or the wildcards * and ?.

    Raises:
        UserError: there are none, or one that the braces name is missing.
    """
    root = request.root
    if root.is_dir():
        found = sorted(
            path
            for suffix in suffixes
            for path in root.rglob(f"*{suffix}")
            # cache-… are results of Hugging Face's operations
            if path.is_file() and not path.name.startswith((".", "cache-"))
        )
        if not found:
            raise UserError(f"--data {root} holds no {' or '.join(suffixes)} file.")
        return found
    found = []
    for name in expanded(str(root)):
        matches = [Path(path) for path in sorted(glob.glob(name))] if re.search(r"[*?]", name) else [Path(name)]
        if not matches or not matches[0].is_file():
            raise UserError(f"--data {root}: {name} does not exist. Name files that do, or a folder of them.")
        found += matches
    return list(dict.fromkeys(found))


def expanded(pattern: str) -> Iterator[str]:
    """The names that braces stand for: {a,b} each of a list, {008..011} each of a range, its zeros kept."""
    match = _BRACES.search(pattern)
    if match is None:
        yield pattern
        return
    numbers = _NUMBERS.fullmatch(match[1])
    if numbers is None:
        choices = match[1].split(",")
    else:
        width = len(numbers[1])
        choices = [f"{number:0{width}}" for number in range(int(numbers[1]), int(numbers[2]) + 1)]
    for choice in choices:
        yield from expanded(pattern[: match.start()] + choice + pattern[match.end() :])


def splits_of(files: Sequence[Path], request: SourceRequest) -> list[str] | None:
    """The split that every file is of, by how its name begins or what its folder is called; None where none says it.

    Raises:
        UserError: some do and some do not.
    """
    found = [split_of_file(file.name) or split_of(file.parent.name) for file in files]
    if not any(found):
        return None
    splits = [split for split in found if split is not None]
    if len(splits) < len(files):
        raise UserError(
            f"--data {request.root}: {files[found.index(None)].name} is of no split, and other files are. Let the "
            "names begin with train, val or test."
        )
    return splits


def common_folder(files: Sequence[Path]) -> Path:
    """The deepest folder that holds all of them."""
    folders = [file.parent for file in files]
    return next(
        folder for folder in (folders[0], *folders[0].parents) if all(f.is_relative_to(folder) for f in folders)
    )

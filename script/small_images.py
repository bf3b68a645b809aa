"""A part of a folder of images, as many of every class, and smaller where asked: SOURCE TARGET [--train N] [--test N].

For experiments on few images: the first N by name, an equal number of each class, linked; or, with --side, box-filtered
copies as PNG files, which lose nothing more. --skip N passes over as many training images first: others than those.
"""

import argparse
import shutil
import sys
from pathlib import Path

from PIL import Image

from utils.errors import UserError

SPLITS = {"train": "train", "val": "test", "test": "test"}  # which flag says how many of a split


def take(
    source: Path,
    target: Path,
    *,
    train: int,
    test: int,
    side: int,
    skip: int = 0,
    flags: tuple[str, str] = ("--train", "--test"),
) -> None:
    """Make `target`, with the splits of `source` that are there; one that is there already is kept as it is.

    Args:
        source: holds SPLIT/CLASS/IMAGE.
        target: appears when it is whole.
        train, test: images of a split, 0 for all; `test` counts for val/ and test/.
        skip: training images before those that are taken.
        side: pixels; every image becomes side x side. 0: as they are, linked.
        flags: what an error calls `train` and `test`.

    Raises:
        UserError: no class folders, or fewer images in a class than asked for.
    """
    if target.exists():
        return
    if not any((source / "train").glob("*/")):
        raise UserError(f"{source}/train holds no class folders.")
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    names = dict(zip(("train", "test"), flags, strict=True))
    for split, flag in SPLITS.items():
        classes = sorted(path for path in (source / split).glob("*/") if path.is_dir())
        first, count = (n // max(len(classes), 1) for n in {"train": (skip, train), "test": (0, test)}[flag])
        for folder in classes:
            images = sorted(path for path in folder.rglob("*") if path.is_file())
            asked = first + count
            if len(images) < asked:
                raise UserError(
                    f"{names[flag]}: {folder} holds {len(images)} images, {asked} of every class were asked for."
                )
            place = partial / split / folder.name
            place.mkdir(parents=True)
            for image in images[first : asked if count else None]:
                _put(image, place, side)
    partial.rename(target)


def _put(image: Path, folder: Path, side: int) -> None:
    if side:
        with Image.open(image) as opened:
            small = opened.convert("RGB").resize((side, side), Image.Resampling.BOX)
        small.save(folder / f"{image.stem}.png")
    else:
        (folder / image.name).symlink_to(image)


def main(argv: list[str]) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    for name in ("train", "test", "side", "skip"):
        parser.add_argument(f"--{name}", type=int, default=0)
    args = parser.parse_args(argv)
    try:
        take(args.source.resolve(), args.target, train=args.train, test=args.test, side=args.side, skip=args.skip)
    except UserError as error:
        print(f"small_images: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))

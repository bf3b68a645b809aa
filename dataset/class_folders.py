"""Image files in one folder per class: DIR/train/<class>/..., DIR/val/<class>/..., DIR/test/<class>/..."""

import contextlib
import logging
import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from dataset import ImageSet, SourceRequest
from dataset.decode import EXTENSIONS
from utils.errors import UserError
from utils.text import escaped

logger = logging.getLogger(__name__)

EVALUATED = ("val", "test")


@dataclass(frozen=True)
class ClassFolders:
    """The splits that a run takes from a folder.

    Attributes:
        classes: K names, as `utils.text.escaped` writes those of the folders; sorted.
        splits: folders of "train", "val" and "test"; those that are not needed are left out.
        reported: the split that is evaluated and reported, "test" or "val".
    """

    classes: tuple[str, ...]
    splits: Mapping[str, Path]
    reported: str

    def files(self) -> dict[str, ImageSet]:
        """The image files of every split; see `list_images`."""
        return {split: list_images(folder, self.classes, split) for split, folder in self.splits.items()}

    def roles(self, images: Mapping[str, ImageSet]) -> dict[str, ImageSet | None]:
        """Images by split as `dataset.DataSource` has them: train, val (what the best epoch is chosen on) and test."""
        nothing = ImageSet.empty()
        return {
            "train": images.get("train", nothing),
            "val": images.get("val") if self.reported == "test" else None,
            "test": images.get(self.reported, nothing),
        }


def find_folders(request: SourceRequest) -> ClassFolders:
    """What DIR holds: train/ where it is asked for, and what is evaluated.

    In training that is test/, with val/ beside it to choose the best epoch on; where there is only one of the two, that
    one. An evaluation takes the one that `request.split` names. A test/ without class folders, as ImageNet's, is none.

    The classes are those of train/ where it is asked for; else those of `request.classes`, or of train/ if it is there,
    as far as these hold all of the evaluated folder's; else that folder's own.

    Raises:
        UserError: --data or a folder that `request.splits` asks for is missing, a split has no class folders, or one
            that is evaluated has a class that train/ lacks.
    """
    root = request.root
    if not root.is_dir():
        raise UserError(f"--data {root} is not a folder. Give the one that holds train/ and val/.")
    found = {name: _class_folders(root / name) for name in ("train", *EVALUATED) if (root / name).is_dir()}
    if not found.get("test"):
        found.pop("test", None)
    evaluated = [name for name in EVALUATED if name in found]
    if "train" in request.splits and "train" not in found:
        raise UserError(f"--data {root} has no folder train/. Put the train images there, one folder per class.")
    if "test" in request.splits and not evaluated:
        raise UserError(
            f"--data {root} has no folder val/ or test/. Put the images to evaluate on there, one folder per class."
        )
    reported = evaluated[-1] if evaluated else "test"
    if request.split is not None:
        if request.split not in found:
            there = f", but {evaluated[0]}/: leave the flag away" if evaluated else ""
            raise UserError(
                f"--split {request.split}: --data {root} has no folder {request.split}/ with class folders{there}."
            )
        reported = request.split
    needed = [name for name in request.splits if name == "train"]
    if "test" in request.splits:
        needed += evaluated if needed else [reported]
    for name in needed:
        if not found[name]:
            raise UserError(
                f"{root / name} has no class folders. Put the images of each class into a folder of its own."
            )
    own = {name for split in needed if split != "train" for name in found[split]}
    if "train" in needed:
        classes = found["train"]
        for split in needed:
            _refuse_unknown(root / split, found[split], root / "train", classes)
    else:
        known: list[tuple[str, ...]] = [request.classes or (), found.get("train", ())]
        classes = next((names for names in known if own <= set(names)), tuple(sorted(own)))
    return ClassFolders(tuple(classes), {name: root / name for name in needed}, reported)


def _refuse_unknown(folder: Path, names: Sequence[str], train: Path, classes: Sequence[str]) -> None:
    unknown = sorted(set(names) - set(classes))
    if unknown:
        raise UserError(
            f"{folder / unknown[0]} is a class that {train} lacks ({len(unknown)} such in all). "
            "Give train/ the class too, or remove it."
        )


def list_images(folder: Path, classes: Sequence[str], split: str = "train") -> ImageSet:
    """Every image file of the class folders, ordered by class, then by path, each file once (see `Listing`).

    What is left out is told in one line, and so are classes without images in a split that is evaluated.

    Raises:
        UserError: a class folder of "train" holds no image file, or those of an evaluated split hold none at all.
    """
    by_name = {escaped(name): name for name in os.listdir(folder)}
    roots = [folder / by_name.get(name, name) for name in classes]
    listing = Listing(roots)
    listing.tell(folder)
    empty = [i for i, files in enumerate(listing.files) if not files]
    if empty and (split == "train" or len(empty) == len(classes)):
        raise UserError(
            f"{roots[empty[0]]} holds no image file (.jpg, .png, .webp, .bmp, .gif, .tif, .ppm, …) of its own. "
            "Put images of the class there, or remove the folder in every split."
        )
    if empty:
        logger.warning(
            "%s has no image of %d of the %d classes, such as %s: evaluated on the others.",
            escaped(folder),
            len(empty),
            len(classes),
            classes[empty[0]],
        )
    targets = [label for label, files in enumerate(listing.files) for _ in files]
    return ImageSet(
        targets=torch.tensor(targets, dtype=torch.int64),
        paths=tuple(path for files in listing.files for path in files),
    )


def iterate_images(folder: Path) -> Iterator[Path]:
    """Image files below a folder, each once: its own in sorted order, then those of its subfolders (see `Listing`).

    What is left out is told in one line.
    """
    listing = Listing([folder])
    listing.tell(folder)
    yield from listing.files[0]


@dataclass
class Listing:
    """The image files below some folders, by their extension (any case), each file once, by device and inode.

    Links are followed, also into folders outside, and loops of them end. A file belongs where it lies: only what no
    folder holds itself is taken where a link leads to it, the first link counting. Hidden files and folders (".…") and
    what is neither a file nor a link to one (a pipe, a device) are left out.

    Attributes:
        roots: the folders.
        files: of each root, in the order of a walk: a folder's own in sorted order, then those of its subfolders.
        left_out: why -> how many, and the first.
    """

    roots: Sequence[Path]
    files: list[list[Path]] = field(init=False)
    left_out: dict[str, tuple[int, Path]] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self._seen: set[tuple[int, int]] = set()
        links: list[list[Path]] = []
        self.files = []
        for root in self.roots:
            found, linked = self._walk(root)
            self.files.append(found)
            links.append(linked)
        for root, files, waiting in zip(self.roots, self.files, links, strict=True):
            if not waiting:
                continue
            while waiting:
                found, linked = self._follow(waiting.pop(0))
                files += found
                waiting += linked
            files.sort(key=lambda path, root=root: _walk_order(path, root))  # type: ignore[misc]

    def _walk(self, root: Path) -> tuple[list[Path], list[Path]]:
        """Image files below a folder that no walk met before, and the links there, which it does not follow."""
        files: list[Path] = []
        links: list[Path] = []
        folders = [root]
        while folders:
            folder = folders.pop()
            try:
                if not self._is_new(os.stat(folder)):
                    self._leave_out("met before through links", folder)
                    continue
                with os.scandir(folder) as entries:
                    names = sorted((entry for entry in entries if not entry.name.startswith(".")), key=_name)
            except FileNotFoundError:  # a class that this split lacks
                continue
            except OSError:
                self._leave_out("cannot be read", folder)
                continue
            below = []
            for entry in names:
                path = folder / entry.name
                if entry.is_symlink():
                    links.append(path)
                elif entry.is_dir():
                    below.append(path)
                elif _is_image(entry.name):
                    self._add(path, files)
            folders += reversed(below)
        return files, links

    def _follow(self, link: Path) -> tuple[list[Path], list[Path]]:
        if link.is_dir():
            return self._walk(link)
        files: list[Path] = []
        if _is_image(link.name):
            self._add(link, files)
        return files, []

    def _add(self, path: Path, files: list[Path]) -> None:
        try:
            status = os.stat(path)
        except OSError:  # a link that leads nowhere; whoever opens it says so
            files.append(path)
            return
        if not stat.S_ISREG(status.st_mode):
            self._leave_out("neither file nor folder", path)
        elif self._is_new(status):
            files.append(path)
        else:
            self._leave_out("met before through links", path)

    def _is_new(self, status: os.stat_result) -> bool:
        key = (status.st_dev, status.st_ino)
        is_new = key not in self._seen
        self._seen.add(key)
        return is_new

    def _leave_out(self, why: str, path: Path) -> None:
        count, first = self.left_out.get(why, (0, path))
        self.left_out[why] = (count + 1, first)

    def tell(self, folder: Path) -> None:
        """Say in one line what was left out, if anything."""
        if self.left_out:
            parts = [f"{count} {why}, such as {escaped(first)}" for why, (count, first) in self.left_out.items()]
            logger.warning("%s: left out: %s.", escaped(folder), "; ".join(parts))


def _name(entry: "os.DirEntry[str]") -> str:
    return entry.name


def _is_image(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in EXTENSIONS


def _walk_order(path: Path, root: Path) -> tuple[tuple[bool, str], ...]:
    """Sorts a folder's files before its subfolders."""
    *folders, name = path.relative_to(root).parts
    return (*((True, folder) for folder in folders), (False, name))


def _class_folders(folder: Path) -> tuple[str, ...]:
    """Sorted names of the class folders, as they are written."""
    with contextlib.suppress(PermissionError), os.scandir(folder) as entries:
        return tuple(sorted(escaped(e.name) for e in entries if e.is_dir() and not e.name.startswith(".")))
    return ()

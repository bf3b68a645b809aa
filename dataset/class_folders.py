"""Image files in one folder per class: DIR/<class>/..., or DIR/train/<class>/... and the other splits beside it."""

import contextlib
import logging
import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from dataset import ImageSet, SourceRequest, names_hash
from dataset.decode import EXTENSIONS
from dataset.own_images import Listed, draw_splits
from utils.errors import UserError
from utils.text import escaped

logger = logging.getLogger(__name__)

EVALUATED = ("val", "test")
# names of a split's folder, the first that is there counting
FOLDERS = {"train": ("train",), "val": ("val", "valid", "validation"), "test": ("test",)}


def find_folders(request: SourceRequest) -> Listed:
    """The images below DIR, by class folders: of the splits that it has, or drawn where it has none.

    In training that is train/ and test/, with val/ beside it to choose the best epoch on; where there is only one of
    the two, that one. An evaluation takes the one that `request.split` names. A test/ without class folders, as
    ImageNet's, is none. valid/ and validation/ are other names of val/.

    With `request.test_fraction`, DIR/<class>/*, or train/ alone, is split by `dataset.own_images.draw_splits`; an
    evaluation without it takes all of DIR/<class>/*.

    The classes are those of train/ where it is asked for; else those of `request.classes`, or of train/ if it is there,
    as far as these hold all of the evaluated folder's; else that folder's own.

    Raises:
        UserError: --data or a folder that `request.splits` asks for is missing, a split has no class folders, or one
            that is evaluated has a class that train/ lacks; as `list_images`; as `draw_splits`.
    """
    root = request.root
    if not root.is_dir():
        raise UserError(f"--data {root} is not a folder. Give the one that holds train/ and val/.")
    folders = split_folders(root)
    found = {name: _class_folders(folder) for name, folder in folders.items()}
    if not found.get("test"):
        found.pop("test", None)
    evaluated = [name for name in EVALUATED if name in found]
    if not any(found.values()):
        unsplit = _find_unsplit(request, root)
        if unsplit is not None:
            return unsplit
    if found.get("train") and not evaluated and request.test_fraction is not None:
        classes = _with_known(found["train"], request)
        images = list_images(folders["train"], classes, "train" if "train" in request.splits else "test")
        return draw_splits(images, _names(images, folders["train"]), classes, request)
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
                f"{folders[name]} has no class folders. Put the images of each class into a folder of its own."
            )
    own = {name for split in needed if split != "train" for name in found[split]}
    if "train" in needed:
        classes = found["train"]
        for split in needed:
            _refuse_unknown(folders[split], found[split], folders["train"], classes)
    else:
        known: list[tuple[str, ...]] = [request.classes or (), found.get("train", ())]
        classes = next((names for names in known if own <= set(names)), tuple(sorted(own)))
    splits = {name: list_images(folders[name], classes, name) for name in needed}
    return Listed(
        classes=tuple(classes),
        splits=splits,
        reported=reported,
        names=names_hash(splits["train"].paths) if "train" in splits else "",
    )


def split_folders(root: Path) -> dict[str, Path]:
    """The folders of "train", "val" and "test" below a folder, those that are there."""
    candidates = {split: [root / name for name in names] for split, names in FOLDERS.items()}
    found = {split: next((path for path in paths if path.is_dir()), None) for split, paths in candidates.items()}
    return {split: path for split, path in found.items() if path is not None}


def _find_unsplit(request: SourceRequest, root: Path) -> Listed | None:
    """DIR/<class>/* without a split, or None where DIR holds no such classes.

    Folders without an image are named and left out, unless the networks know them as classes.
    """
    if request.test_fraction is None and "train" in request.splits:
        return None
    names = [name for name in _class_folders(root) if name not in sum(FOLDERS.values(), ())]
    if not names:
        return None
    names = list(_class_folders(root))  # beside others, a folder train/ without class folders is one itself
    roots = _roots(root, names)
    listing = Listing(roots)
    listing.tell(root)
    empty = [name for name, files in zip(names, listing.files, strict=True) if not files]
    if empty:
        logger.warning(
            "%s: %d folders hold no image of their own and are no classes, such as %s.",
            escaped(root),
            len(empty),
            empty[0],
        )
    own = tuple(name for name in names if name not in empty)
    if len(own) < 2:
        raise UserError(
            f"--data {root} holds images in {len(own)} class folders. Put the images of each class into a folder of "
            "its own; two classes are the least."
        )
    classes = _with_known(own, request)
    files = dict(zip(names, listing.files, strict=True))
    images = _image_set([files.get(name, []) for name in classes])
    if request.test_fraction is not None:
        return draw_splits(images, _names(images, root), classes, request)
    if request.split is not None:
        return None
    logger.info("--data %s has no split: evaluated on all of its %d images.", escaped(root), len(images))
    return Listed(classes=classes, splits={"test": images}, reported="test", names="")


def _with_known(own: tuple[str, ...], request: SourceRequest) -> tuple[str, ...]:
    """The classes that the networks know, where these hold the data's own; else the data's."""
    known = request.classes or ()
    return known if set(own) <= set(known) else own


def _names(images: ImageSet, folder: Path) -> list[bytes]:
    """Of every image, from its class folder on."""
    return [os.fsencode(path.relative_to(folder).as_posix()) for path in images.paths]


def _image_set(files: Sequence[Sequence[Path]]) -> ImageSet:
    """Of the files of every class."""
    targets = [label for label, of_class in enumerate(files) for _ in of_class]
    return ImageSet(
        targets=torch.tensor(targets, dtype=torch.int64), paths=tuple(path for of_class in files for path in of_class)
    )


def _roots(folder: Path, classes: Sequence[str]) -> list[Path]:
    """The class folders by the names as `utils.text.escaped` writes them."""
    by_name = {escaped(name): name for name in os.listdir(folder)}
    return [folder / by_name.get(name, name) for name in classes]


def _refuse_unknown(folder: Path, names: Sequence[str], train: Path, classes: Sequence[str]) -> None:
    unknown = sorted(set(names) - set(classes))
    if unknown:
        raise UserError(
            f"{folder / unknown[0]} is a class that {train} lacks ({len(unknown)} such in all). "
            "Give train/ the class too, or remove it."
        )


def labelled_folder(folder: Path, classes: Sequence[str], flag: str) -> ImageSet:
    """The images of DIR/<class>/*, which may lack some of the classes.

    Args:
        classes: K names that are known.
        flag: that named the folder, for errors.

    Raises:
        UserError: no such folder, no class folder, or one that is none of the classes; no image.
    """
    names = _class_folders(folder) if folder.is_dir() else ()
    if not names:
        raise UserError(f"{flag} {folder}: expected a folder of labelled images, DIR/<class>/*.")
    unknown = sorted(set(names) - set(classes))
    if unknown:
        raise UserError(
            f"{flag} {folder}: the networks of --resume do not know the class {unknown[0]!r} ({len(unknown)} in all)."
        )
    return list_images(folder, classes, "test")


def list_images(folder: Path, classes: Sequence[str], split: str = "train") -> ImageSet:
    """Every image file of the class folders, ordered by class, then by path, each file once (see `Listing`).

    What is left out is told in one line, and so are classes without images in a split that is evaluated.

    Raises:
        UserError: a class folder of "train" holds no image file, or those of an evaluated split hold none at all.
    """
    roots = _roots(folder, classes)
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
    return _image_set(listing.files)


def iterate_images(folder: Path) -> Iterator[Path]:
    """Image files below a folder, each once: its own in sorted order, then those of its subfolders (see `Listing`).

    What is left out is told in one line.
    """
    listing = Listing([folder])
    listing.tell(folder)
    yield from listing.files[0]


def first_image(folder: Path) -> Path | None:
    """Some image file below a folder, by its extension; None where there is none. Links to folders are not followed."""
    for path, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in names:
            if _is_image(name) and not name.startswith("."):
                return Path(path, name)
    return None


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

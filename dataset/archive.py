"""Published data-set files: where they may lie below --data, and fetching one that is missing."""

import hashlib
import logging
import os
import urllib.request
from pathlib import Path

from dataset import SourceRequest
from utils.errors import UserError, reason

logger = logging.getLogger(__name__)

TIMEOUT = 30.0  # seconds without a byte before a download is given up


def data_folders(root: Path) -> tuple[Path, ...]:
    """Where the files of a data set are looked for: DIR, and DIR/train and DIR/val as the published code has them."""
    return (root, root / "train", root / "val")


def find_or_fetch(request: SourceRequest, name: str, url: str, md5: str, *, instead: str = "") -> Path:
    """The file `name` below --data, downloaded to it if it is missing and `request.download` allows.

    Only a fresh download is held against `md5`: a file that is there already is the user's.

    Args:
        instead: what else would do, for the error message (" or the folder cifar-10-batches-py").

    Raises:
        UserError: the file is missing and could not be fetched.
    """
    for folder in data_folders(request.root):
        if (folder / name).is_file():
            return folder / name
    missing = f"--data {request.root} has no {name} for --dataset {request.dataset}"
    advice = f"Put {name}{instead} into {request.root} (source: {url})."
    if not request.download:
        raise UserError(f"{missing}. {advice}")
    try:
        return _download(url, request.root / name, md5)
    except OSError as error:  # URLError is one
        raise UserError(f"{missing}, and fetching {url} failed ({reason(error)}). {advice}") from None


def _download(url: str, path: Path, md5: str) -> Path:
    logger.info("downloading %s to %s", url, path)
    digest = hashlib.md5(usedforsecurity=False)
    partial = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT) as response:
            path.parent.mkdir(parents=True, exist_ok=True)
            with partial.open("wb") as file:
                while block := response.read(1 << 20):
                    digest.update(block)
                    file.write(block)
        if digest.hexdigest() != md5:
            raise OSError(f"what came has MD5 {digest.hexdigest()}, expected {md5}")
        return partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)

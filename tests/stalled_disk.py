"""A disk that answers no more, for the decoding processes of a run: their fork server imports this."""

import time
from pathlib import Path
from typing import Any

from PIL import Image

from tests.kills import STALLED

_open = Image.open


def _open_or_wait(path: Any, *args: Any, **kwargs: Any) -> Image.Image:
    while any((folder / STALLED).exists() for folder in Path(path).parents):
        time.sleep(1)
    return _open(path, *args, **kwargs)


Image.open = _open_or_wait

"""A project of somebody else's, whose modules are called as ours are, and a process in it."""

import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

from PIL import Image
from sklearn.datasets import load_sample_image

ROOT = Path(__file__).parent.parent
NAMES = ("utils.py", "dataset.py", "loss.py", "eval.py", "model/__init__.py")


def make_project(folder: Path) -> Path:
    """The folder, filled; whatever took its modules for ours would break. `photo.jpg` is a real photograph."""
    (folder / "model").mkdir(parents=True)
    for place in NAMES:
        (folder / place).write_text("MINE = True\n")
    Image.fromarray(load_sample_image("china.jpg")).save(folder / "photo.jpg")
    return folder


def call(words: Sequence[object], folder: Path, *, expected: int = 0, **settings: str) -> subprocess.CompletedProcess:
    """Run a command there, without this project on the path unless `settings` say so."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [*map(str, words)],
        cwd=folder,
        env={**environment, "OMP_NUM_THREADS": "1", **settings},
        check=False,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == expected, done.stderr
    return done

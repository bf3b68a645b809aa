"""The ensemble of a checkpoint as one file: `python script/export.py CHECKPOINT [--out FILE.pt2|.onnx]`."""

import sys
from pathlib import Path

# the project's root, where this file is run by its path
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from evaluation.export_flags import PROGRAM, read
from utils.program import read_flags

if __name__ == "__main__":
    FLAGS = read_flags(PROGRAM, read)
    from evaluation.exporting import main  # imports torch, which takes seconds: --help and a wrong flag are answered

    raise SystemExit(main(flags=FLAGS))

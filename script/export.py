"""The ensemble of a checkpoint as one file: `python script/export.py CHECKPOINT [--out FILE.pt2|.onnx]`."""

import sys
from pathlib import Path

# the project's root, where this file is run by its path
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from evaluation.exporting import main

if __name__ == "__main__":
    raise SystemExit(main())

"""Evaluate a checkpoint, or classify images with it: `python eval.py --resume CHECKPOINT [--predict PATH]`.

Backbone, S, classes and normalisation come from the checkpoint; flags fill in what a released one does not say. The
last line of stdout is one JSON object, also in results.json of --model_dir, by default `eval/` beside the checkpoint.
"""

from evaluation.run import PROGRAM, SAVES_MEMORY, evaluate_arguments
from utils.program import run_program


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code: 0 done, 1 failed, 2 the user's mistake, 130 SIGINT, 143 SIGTERM."""
    return run_program(PROGRAM, evaluate_arguments, argv, saves_memory=SAVES_MEMORY)


if __name__ == "__main__":
    raise SystemExit(main())

"""Evaluate a checkpoint, or classify images with it: `python eval.py --resume CHECKPOINT [--predict PATH]`.

Backbone, S, classes and normalisation come from the checkpoint; flags fill in what a released one does not say. The
last line of stdout is one JSON object, also in results.json of --model_dir, by default `eval/` beside the checkpoint.
"""

from typing import Any

from evaluation.options import SAVES_MEMORY, EvalOptions
from parser_params import parse_config
from utils.program import program_name, run_program

PROGRAM = program_name("eval.py", "eval")


def evaluate_arguments(argv: list[str]) -> dict[str, Any]:
    """Evaluate as a command line says; returns what the JSON line shows.

    Raises:
        UserError, RunError: as `evaluation.run.run`.
    """
    config = parse_config(argv, program=PROGRAM, extra=EvalOptions)
    from evaluation import run  # imports torch, which takes seconds: --help and a wrong flag are answered before

    return run.evaluate_arguments(argv, config)


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code: 0 done, 1 failed, 2 the user's mistake, 130 SIGINT, 143 SIGTERM."""
    return run_program(PROGRAM, evaluate_arguments, argv, saves_memory=SAVES_MEMORY)


if __name__ == "__main__":
    raise SystemExit(main())

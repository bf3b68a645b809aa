"""Evaluate a run's best checkpoint, or classify images with it: `python eval.py RUN_DIR [--predict PATH]`.

A checkpoint, a released one too, takes the place of RUN_DIR. Backbone, S, classes and normalisation come from it; flags
fill in what a released one does not say. The last line of stdout is one JSON object. An evaluation keeps it as
results.json of --model_dir, by default `eval/` beside the checkpoint; a prediction as predictions.json of
`predict_<name of PATH>/` below --model_dir, by default beside the checkpoint.
"""

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from evaluation.options import PROGRAM, SAVES_MEMORY, EvalOptions
from parser_params import Config, answer_at_once, parse_config
from utils.command_line import with_underscores
from utils.errors import UserError
from utils.program import Output, read_flags, run_program, show

CHECKPOINT_FLAGS = ("--resume", "--resume_checkpoint", "--evaluate_checkpoint")


def with_checkpoint_flag(argv: Sequence[str]) -> list[str]:
    """A command line that begins with a run directory or a checkpoint, with that as the value of --resume.

    An even number of words before the first flag is none, or KEY VALUE overrides.

    Raises:
        UserError: --resume names a checkpoint too, or a second path stands behind the first.
    """
    count = next((place for place, word in enumerate(argv) if word.startswith("-")), len(argv))
    if count % 2 == 0:
        if count and Path(argv[0]).exists():
            raise UserError(f"{argv[1]}: unexpected behind {argv[0]}; to classify images: --predict {argv[1]}.")
        return list(argv)
    for word in argv[count:]:
        if with_underscores(word).partition("=")[0] in CHECKPOINT_FLAGS:
            raise UserError(f"{argv[0]} stands for --resume {argv[0]}, and {word} is there too: leave one away.")
    return ["--resume", *argv]


def read(argv: Sequence[str] | None = None, program: str = PROGRAM) -> Config:
    """What a command line says, its arguments without the program's name; None takes those of this process.

    Raises:
        UserError: as `with_checkpoint_flag` and `parse_config`.
    """
    words = with_checkpoint_flag(sys.argv[1:] if argv is None else argv)
    return parse_config(words, program=program, extra=EvalOptions)


def evaluate_arguments(argv: list[str], config: Config | None = None) -> Output | None:
    """Evaluate as a command line says; returns what the program ends with, None where there is nothing to evaluate.

    Args:
        argv: the command line.
        config: what it says, where it has been read already.

    Raises:
        UserError, RunError: as `evaluation.run.run`.
    """
    config = config or read(argv)
    if (text := answer_at_once(config)) is not None:
        show(text)
        return None
    from evaluation import run  # imports torch, which takes seconds: --help and a wrong flag are answered before

    results = run.evaluate_arguments(with_checkpoint_flag(argv), config)
    return run.output(results, as_json=config.json)


def main(argv: list[str] | None = None, config: Config | None = None) -> int:
    """The command line; returns the exit code: 0 done, 1 failed, 2 the user's mistake, 130 SIGINT, 143 SIGTERM.

    Args:
        argv: the arguments without the program's name; None takes those of this process.
        config: what they say, where they have been read already.
    """
    return run_program(PROGRAM, partial(evaluate_arguments, config=config), argv, saves_memory=SAVES_MEMORY)


if __name__ == "__main__":
    raise SystemExit(main(config=read_flags(PROGRAM, read)))

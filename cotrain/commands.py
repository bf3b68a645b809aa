"""The command `cotrain`: train, eval, export and predict, each the program of the repository with the same flags."""

import sys
from collections.abc import Callable, Sequence

from parser_params import parse_config
from utils.errors import UserError
from utils.program import program_name, read_flags

HELP = """usage: cotrain COMMAND [...]

  cotrain train --data photos --model_dir runs/a ...     train; `cotrain train --help` is the manual of all flags
  cotrain eval MODEL [--data DIR] ...                    figures of every network and of the ensemble
  cotrain predict MODEL IMAGES ...                       classify an image, the images of a folder, or a .npy array
  cotrain export MODEL [--out FILE.pt2|FILE.onnx] ...    the whole ensemble as one file that runs without this package

MODEL is a run directory (its best checkpoint is taken) or a checkpoint.
"""


def _train(arguments: list[str]) -> int:
    program = program_name("train_split.py", "train")
    config = read_flags(program, lambda: parse_config(arguments, program=program))
    from train_split import main  # imports torch, which takes seconds: --help and a wrong flag are answered before

    return main(arguments, config)


def _eval(arguments: list[str]) -> int:
    from eval import main, read
    from evaluation.options import PROGRAM

    return main(arguments, read_flags(PROGRAM, lambda: read(arguments)))


def _predict(arguments: list[str]) -> int:
    if arguments and arguments[0] in ("-h", "--help"):
        return _eval(["--help"])
    if len(arguments) < 2 or any(word.startswith("-") for word in arguments[:2]):
        raise UserError("predict: expected MODEL IMAGES, and then flags: a run directory or checkpoint, and images.")
    return _eval([arguments[0], "--predict", *arguments[1:]])


def _export(arguments: list[str]) -> int:
    from evaluation.export_flags import PROGRAM, read

    flags = read_flags(PROGRAM, lambda: read(arguments))
    from evaluation.exporting import main  # imports torch

    return main(arguments, flags)


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "train": _train,
    "eval": _eval,
    "predict": _predict,
    "export": _export,
}


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code of the program, 2 where no such command is there."""
    name, *arguments = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in ("-h", "--help", "help"):
        sys.stdout.write(HELP)
        return 0
    try:
        if name not in COMMANDS:
            raise UserError(f"{name!r} is no command: expected one of {', '.join(COMMANDS)}.")
        return COMMANDS[name](arguments)
    except UserError as error:
        sys.stderr.write(f"cotrain: {error}\n")
        return error.exit_code

"""The main function of an entry point: exit codes, one line for a failure, one JSON line for the results."""

import json
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any

from utils.errors import RunError, Stopped, UserError
from utils.plain_json import plain_json
from utils.text import fit_streams

INTERRUPTED = 130


def show(text: str) -> None:
    """A table or a list for whoever started the program, on stdout, before the JSON line."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def run_program(name: str, work: Callable[[list[str]], Mapping[str, Any] | None], argv: list[str] | None = None) -> int:
    """Do what a command line says; process 0 ends with a JSON object on the last line of stdout.

    Args:
        name: of the program, before its error line.
        work: of the arguments; returns the JSON object, or None where another process prints it.
        argv: the arguments without the program's name; None takes those of this process.

    Returns:
        the exit code: 0 done or stopped by SIGTERM, 1 failed while running, 2 the user's mistake, 130 interrupted.
    """
    fit_streams()
    try:
        results = work(sys.argv[1:] if argv is None else argv)
    except (UserError, RunError, Stopped) as error:
        sys.stderr.write(f"{name}: {error}\n")
        return error.exit_code
    except KeyboardInterrupt:
        return INTERRUPTED
    if results is not None and int(os.environ.get("RANK", "0")) == 0:
        show(json.dumps(plain_json(results)))
    return 0

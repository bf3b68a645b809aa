"""The main function of an entry point: exit codes, one line for a failure, one JSON line for the results."""

import json
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any

from utils.errors import Incomplete, Interrupted, RunError, Stopped, UserError
from utils.memory import is_out_of_memory, what_did_not_fit
from utils.plain_json import plain_json
from utils.signals import Interruption
from utils.text import fit_streams, one_line


def program_name(script: str, command: str) -> str:
    """What a user calls a program: its file in the repository, a command of `cotrain` where that is installed."""
    return script if __package__ == "utils" else f"{str(__package__).split('.')[0]} {command}"


def show(text: str) -> None:
    """A table or a list for whoever started the program, on stdout, before the JSON line."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def run_program(
    name: str,
    work: Callable[[list[str]], Mapping[str, Any] | None],
    argv: list[str] | None = None,
    *,
    saves_memory: str,
) -> int:
    """Do what a command line says; process 0 ends with a JSON object on the last line of stdout.

    Args:
        name: of the program, before its error line.
        work: of the arguments; returns the JSON object, or None where another process prints it.
        argv: the arguments without the program's name; None takes those of this process.
        saves_memory: the flags that make a run need less memory, as the end of a sentence.

    Returns:
        the exit code: 0 done, or training stopped by SIGTERM; 1 failed while running; 2 the user's mistake; 130 and 143
        interrupted by SIGINT and SIGTERM.
    """
    fit_streams()
    with Interruption() as signals:
        try:
            signals.release()
            try:
                results = work(sys.argv[1:] if argv is None else argv)
            except Incomplete as error:
                _show_results(error.results)
                return _failed(name, error, error.exit_code)
            except (UserError, RunError, Stopped) as error:
                return _failed(name, error, error.exit_code)
            except (MemoryError, OSError, RuntimeError) as error:
                if signals.number or not is_out_of_memory(error):
                    raise
                line = f"{what_did_not_fit(error)}. Try {saves_memory}. What was written before is whole."
                return _failed(name, line, RunError.exit_code)
            if results is not None:
                _show_results(results)
            return 0
        except SystemExit:
            raise
        except BaseException:  # Interrupted, or what broke because of it, here or in another process
            if not signals.number:
                raise
            interrupted = Interrupted(signals.number)
            return _failed(name, interrupted, interrupted.exit_code)


def _show_results(results: Mapping[str, Any]) -> None:
    if int(os.environ.get("RANK", "0")) == 0:
        show(json.dumps(plain_json(results)))


def _failed(name: str, why: BaseException | str, code: int) -> int:
    sys.stderr.write(f"{name}: {one_line(str(why))}\n")
    return code

"""The main function of an entry point: exit codes, one line for a failure, one JSON line for the results."""

import itertools
import json
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from utils.errors import Incomplete, Interrupted, RunError, Stopped, UserError
from utils.plain_json import plain_json
from utils.signals import Interruption, hold
from utils.text import fit_streams, one_line

T = TypeVar("T")


@dataclass(frozen=True)
class Output:
    """What a program ends with, on stdout: one line of JSON, or at a terminal what somebody can read.

    Attributes:
        results: the JSON object.
        text: what a terminal shows in its place, besides what was shown before; "": nothing.
        as_json: the JSON line at a terminal too.
    """

    results: Mapping[str, Any]
    text: str
    as_json: bool = False

    def shown(self) -> str:
        """What to show."""
        if self.as_json or not sys.stdout.isatty():
            return json.dumps(plain_json(self.results))
        return self.text


def program_name(script: str, command: str) -> str:
    """What a user calls a program: its file in the repository, a command of `cotrain` where that is installed."""
    return script if __package__ == "utils" else f"{str(__package__).split('.')[0]} {command}"


def show(text: str) -> None:
    """A table or a list for whoever started the program, on stdout before the JSON line; a terminal has it aligned."""
    try:
        sys.stdout.write((aligned(text) if sys.stdout.isatty() else text) + "\n")
        sys.stdout.flush()
    except BrokenPipeError:  # `| head` has what it wanted; what is still unwritten would fail again at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def aligned(text: str) -> str:
    """A text whose Markdown tables have columns of one width."""
    lines = text.split("\n")
    shown: list[str] = []
    for is_table, group in itertools.groupby(lines, lambda line: line.startswith("|")):
        rows = [*group]
        shown += _aligned_rows(rows) if is_table else rows
    return "\n".join(shown)


def _aligned_rows(lines: list[str]) -> list[str]:
    rows = [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in lines]
    if len({len(row) for row in rows}) != 1 or len(rows) < 2:
        return lines
    rules = rows[1]
    widths = [max(len(row[i]) for row in rows if row is not rules) for i in range(len(rules))]
    aligns = [str.rjust if rule.endswith(":") else str.ljust for rule in rules]
    cells = [[align(cell, width) for align, cell, width in zip(aligns, row, widths, strict=True)] for row in rows]
    cells[1] = ["-" * width for width in widths]
    return ["  ".join(row).rstrip() for row in cells]


def read_flags(name: str, read: Callable[[], T]) -> T:
    """What the command line says; wrong flags, and --help, end the program here.

    SIGTERM and SIGINT wait from here until `run_program` releases them: the imports between the two take seconds.

    Args:
        name: of the program, before its error line.
        read: parses the arguments of this process.

    Raises:
        SystemExit: 2 after the line that says what is wrong, 0 after the help.
    """
    fit_streams()
    hold()
    try:
        return read()
    except UserError as error:
        raise SystemExit(_failed(name, error, error.exit_code)) from None


def run_program(
    name: str,
    work: Callable[[list[str]], Output | None],
    argv: list[str] | None = None,
    *,
    saves_memory: str,
    signalled: Callable[[int], Stopped | Interrupted] = Interrupted,
) -> int:
    """Do what a command line says; process 0 ends with a JSON object on the last line of stdout, see `Output`.

    Args:
        name: of the program, before its error line.
        work: of the arguments; None where another process prints it.
        argv: the arguments without the program's name; None takes those of this process.
        saves_memory: the flags that make a run need less memory, as the end of a sentence.
        signalled: what a signal of this number means that came before the work, or broke it.

    Returns:
        the exit code: 0 done, or training stopped by SIGTERM; 1 failed while running; 2 the user's mistake; 130 and 143
        interrupted by SIGINT and SIGTERM.
    """
    fit_streams()
    begun = False
    with Interruption() as signals:
        try:
            signals.release()
            begun = True
            try:
                output = work(sys.argv[1:] if argv is None else argv)
            except Incomplete as error:
                _show_output(Output(error.results, ""))
                return _failed(name, error, error.exit_code)
            except (UserError, RunError, Stopped) as error:
                return _failed(name, error, error.exit_code)
            except (MemoryError, OSError, RuntimeError) as error:
                from utils.memory import is_out_of_memory, what_did_not_fit  # it knows torch's errors

                if signals.number or not is_out_of_memory(error):
                    raise
                line = f"{what_did_not_fit(error)}. Try {saves_memory}. What was written before is whole."
                return _failed(name, line, RunError.exit_code)
            if output is not None:
                _show_output(output)
            return 0
        except SystemExit:
            raise
        except BaseException as error:  # Interrupted, or what broke because of it, here or in another process
            if not signals.number:
                raise
            why = error if begun and isinstance(error, Interrupted) else signalled(signals.number)
            return _failed(name, why, why.exit_code)


def set_process_title(name: str) -> None:
    """Show the run under this name in process lists, where setproctitle is installed."""
    try:
        import setproctitle
    except ImportError:
        return
    setproctitle.setproctitle(name)


def _show_output(output: Output) -> None:
    if int(os.environ.get("RANK", "0")) == 0 and (text := output.shown()):
        show(text)


def _failed(name: str, why: BaseException | str, code: int) -> int:
    sys.stderr.write(f"{name}: {one_line(str(why))}\n")
    return code

"""How a program ends early: the two kinds of failure that a user sees as one line, and a signal."""

import signal
from collections.abc import Mapping
from typing import Any

from utils.text import one_line


class _OneLine(Exception):
    """What it says is one line that can be written anywhere, whatever the names in it hold."""

    def __str__(self) -> str:
        return one_line(super().__str__())


class UserError(_OneLine, ValueError):
    """Something the user gave is wrong (flag, YAML, data, checkpoint, GPU id); entry points exit with code 2.

    The message is one line: what was wrong, what was expected, what to do; it names the flag or the file.
    """

    exit_code = 2


class RunError(_OneLine, RuntimeError):
    """Something happened while running (bad image, port in use, disk full, non-finite loss); exit code 1."""

    exit_code = 1


class WriteError(RunError):
    """A file of the run could not be written (full disk, read-only folder); what its name held before is whole."""


class Incomplete(RunError):
    """The run came to its end, and not everything of it could be written.

    Attributes:
        results: the final figures.
    """

    def __init__(self, message: str, results: Mapping[str, Any]) -> None:
        super().__init__(message)
        self.results = results


class Stopped(Exception):
    """Training was asked to stop by a signal.

    Attributes:
        number: of the signal.
        exit_code: 130 after SIGINT, as a shell has it, and 0 after SIGTERM.
    """

    def __init__(self, number: int, what: str = "a checkpoint was saved") -> None:
        super().__init__(f"stopped; {what}. Go on with --resume auto.")
        self.number = number
        self.exit_code = 130 if number == signal.SIGINT else 0


class Interrupted(KeyboardInterrupt):
    """A signal came while there was nothing to save; a KeyboardInterrupt, because libraries let that pass.

    Attributes:
        number: of the signal.
        exit_code: as a shell has it: 130 after SIGINT, 143 after SIGTERM.
    """

    def __init__(self, number: int) -> None:
        super().__init__(f"interrupted by {signal.Signals(number).name}; no results were written.")
        self.number = number
        self.exit_code = 128 + number


def reason(error: BaseException) -> str:
    """What an exception of a library says, on one line, for the inside of a message of ours."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(text.split()) or type(error).__name__

"""The two kinds of failure that a user sees as one line instead of a traceback."""


class UserError(ValueError):
    """Something the user gave is wrong (flag, YAML, data, checkpoint, GPU id); entry points exit with code 2.

    The message is one line: what was wrong, what was expected, what to do; it names the flag or the file.
    """

    exit_code = 2


class RunError(RuntimeError):
    """Something happened while running (bad image, port in use, disk full, non-finite loss); exit code 1."""

    exit_code = 1

"""What several test files share, and what the suite says at its end: how many killed runs recovered."""

import logging
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def logging_restored() -> Iterator[None]:
    """Runs in the test's own process set up logging; the next test finds it as it was."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    for handler in set(root.handlers) - set(handlers):
        handler.close()
    root.handlers[:] = handlers
    root.setLevel(level)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Adds up the properties `kills` and `identical` that tests record; with xdist they come from its workers."""
    sums = {"kills": 0, "identical": 0}
    for outcome in ("passed", "failed"):
        for report in terminalreporter.getreports(outcome):
            for name, value in report.user_properties:
                if name in sums:
                    sums[name] += int(value)
    if sums["kills"]:
        terminalreporter.write_line(f"fault campaign: {sums['kills']} kills, {sums['identical']} bit-identical")

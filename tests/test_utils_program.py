"""How a program ends: its exit code, its one line, and the figures that it has."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest

from script.draw_screens import Terminal, lines_of
from tests.kills import cpu_out_of_memory
from utils.errors import Incomplete, Interrupted, RunError, Stopped, UserError
from utils.program import Output, run_program, show

NUMBERS = (signal.SIGTERM, signal.SIGINT)


@pytest.fixture(autouse=True)
def handlers_restored() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in NUMBERS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def run(work: Callable[[], object]) -> int:
    def called(argv: list[str]) -> None:
        work()

    return run_program("program.py", called, [], saves_memory="a smaller --batch_size")


def raising(error: BaseException) -> Callable[[], object]:
    def work() -> None:
        raise error

    return work


def test_the_end_is_json_through_a_pipe_and_text_at_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    with open(terminal.name, "w") as stream:
        monkeypatch.setattr("sys.stdout", stream)
        for output in (Output({"a": 1}, "a table"), Output({"b": 2}, "a table", as_json=True), Output({"c": 3}, "")):
            assert run_program("program.py", lambda _, output=output: output, [], saves_memory="") == 0  # type: ignore[misc]
    terminal.close()
    assert lines_of(terminal.screen()) == ["a table", '{"b": 2}']


def test_a_reader_that_has_gone_is_no_failure() -> None:
    """As `| head -1` goes after the first line."""
    code = (
        "from utils.program import Output, run_program, show\n"
        "def work(argv):\n show('a table')\n show('another')\n return Output({'a': 1}, '')\n"
        "raise SystemExit(run_program('program.py', work, [], saves_memory=''))"
    )
    reading, writing = os.pipe()
    os.close(reading)
    ended = subprocess.run([sys.executable, "-c", code], stdout=writing, stderr=subprocess.PIPE, check=False)
    os.close(writing)
    assert (ended.returncode, ended.stderr) == (0, b"")


def test_tables_are_aligned_at_a_terminal_only(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = "before\n| | top-1 % |\n|---|---:|\n| network 1 | 7.5 |\n| mean | 100.00 |\n\nafter | all"
    show(text)
    assert capsys.readouterr().out == f"{text}\n"
    terminal = Terminal()
    with open(terminal.name, "w") as stream:
        monkeypatch.setattr("sys.stdout", stream)
        show(text)
    terminal.close()
    assert lines_of(terminal.screen()) == [
        "before",
        "           top-1 %",
        "---------  -------",
        "network 1      7.5",
        "mean        100.00",
        "",
        "after | all",
    ]


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (UserError("--x: wrong."), 2),
        (RunError("bad."), 1),
        (Stopped(signal.SIGTERM), 0),
        (Stopped(signal.SIGINT), 130),
    ],
)
def test_what_a_user_can_mend_is_one_line(error: Exception, code: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(raising(error)) == code
    assert capsys.readouterr() == ("", f"program.py: {error}\n")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_is_one_line_whatever_it_breaks(number: int, code: int, capsys: pytest.CaptureFixture[str]) -> None:
    def broken() -> None:
        try:
            os.kill(os.getpid(), number)
        except Interrupted:
            os.kill(os.getpid(), number)  # its echo, which is none
            raise RuntimeError("connection closed by peer") from None

    for work in (lambda: os.kill(os.getpid(), number), broken):
        assert run(work) == code
        assert (
            capsys.readouterr().err == f"program.py: interrupted by {signal.Signals(number).name}; no results were "
            "written.\n"
        )


def test_signals_that_were_held_come_when_the_program_begins(capsys: pytest.CaptureFixture[str]) -> None:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, NUMBERS)
    try:
        signal.raise_signal(signal.SIGTERM)  # to this thread: another of the test runner would not hold it
        assert run(lambda: None) == 143
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def test_a_program_may_say_itself_what_a_signal_means_that_breaks_it(capsys: pytest.CaptureFixture[str]) -> None:
    def broken(argv: list[str]) -> None:
        try:
            os.kill(os.getpid(), signal.SIGINT)
        except Interrupted:  # as the import of a C extension does
            raise ImportError("initialization failed") from None

    def training(argv: list[str]) -> None:
        os.kill(os.getpid(), signal.SIGINT)

    def stopped(number: int) -> Stopped:
        return Stopped(number, "nothing was under way")

    for work, line in ((broken, "stopped; nothing was under way."), (training, "interrupted by SIGINT;")):
        assert run_program("program.py", work, [], saves_memory="", signalled=stopped) == 130
        assert capsys.readouterr().err.startswith(f"program.py: {line}")


def test_without_a_signal_everything_is_as_before() -> None:
    before = [signal.getsignal(number) for number in NUMBERS]
    assert run(lambda: None) == 0
    assert [signal.getsignal(number) for number in NUMBERS] == before
    with pytest.raises(ZeroDivisionError):
        run(lambda: 1 / 0)


def test_too_little_memory_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(cpu_out_of_memory) == 1
    line = capsys.readouterr().err
    assert line.startswith("program.py: out of memory: 3,725,290.3 GiB more did not fit. Try a smaller --batch_size.")
    assert line.count("\n") == 1


def test_a_run_that_could_not_write_everything_still_shows_its_figures(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(raising(Incomplete("not all.", {"acc1": 1.5}))) == 1
    out, err = capsys.readouterr()
    assert json.loads(out) == {"acc1": 1.5}
    assert err == "program.py: not all.\n"

"""What somebody at a terminal sees, and that nobody else does: bars, and one line an epoch that does not wrap."""

import csv
import functools
import logging
import os
import re
import sys
import termios
from collections.abc import Iterator
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from record.allowance import Allowance
from record.epoch_line import EpochLine, TimeLeft, duration
from record.screen import Bar, Screen, bar_text, terminal_columns, watched
from script.draw_screens import Terminal, lines_of
from tests.runs import TINY, Run

EPOCH = re.compile(
    r"epoch (\d)/2  loss \d\.\d\d .*\| val [\d.]+ % \(best [\d.]+( at \d)?\)  test [\d.]+ %.* \| .*(left|s)$"
)


def on_terminal(name: str) -> None:
    """In a child: stdout and stderr are this terminal."""
    device = os.open(name, os.O_RDWR | os.O_NOCTTY)
    for number in (1, 2):
        os.dup2(device, number)
    sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)


@pytest.fixture
def terminal(request: pytest.FixtureRequest) -> Iterator[Terminal]:
    """A pseudo-terminal of so many columns."""
    opened = Terminal(getattr(request, "param", 80))
    yield opened
    opened.close()


ARGV = [*TINY, "--split_factor", 2, "--epochs", 2, "--seed", 3, "--print_freq", 4, "--val_fraction", 0.1]


@pytest.mark.parametrize("terminal", [80, 0], indirect=True)
def test_a_training_at_a_terminal_has_bars_and_lines_of_80_columns(terminal: Terminal, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    environment = {"TERM": "xterm", "COLUMNS": "300"}  # what a shell says of itself is not how wide the terminal is
    run = Run(
        [*ARGV, "--model_dir", folder],
        tmp_path,
        before=functools.partial(on_terminal, terminal.name),
        environment=environment,
    )
    done = run.wait()
    terminal.close()
    assert done.code == 0, terminal.raw
    drawn = terminal.raw.decode().split("\r\x1b[K")
    bars = [text.partition("\r\n")[0] for text in drawn if "░" in text or "█" in text]
    assert all(len(bar) < 80 for bar in bars)
    assert any(re.match(r"epoch [12]/2 █*░* +\d+ %  loss \d\.\d{4} \(per network\), \d+ images/s", bar) for bar in bars)
    assert any(bar.startswith("evaluating test ") for bar in bars)
    assert any(bar.endswith(" left") for bar in bars)

    shown = lines_of(terminal.screen())
    assert not [line for line in shown if "█" in line or "░" in line or "step 4/" in line]
    lines = [line for line in shown if re.match(r"epoch \d/2  ", line)]
    assert [EPOCH.match(line)[1] for line in lines] == ["1", "2"]  # type: ignore[index]
    assert all(len(line) < 80 for line in lines)

    title = next(i for i, line in enumerate(shown) if line.startswith("test images"))
    assert re.fullmatch(r"test images +last, epoch 2  best, epoch [12]", shown[title])
    assert re.fullmatch(r"ensemble top-1 % +[\d.]+ +[\d.]+", shown[title + 2])
    assert {line[:10] for line in shown[title + 3 : title + 5]} == {"network 1 ", "network 2 "}
    assert not any(line.startswith("{") for line in shown)

    log = (folder / "train.log").read_text()
    assert not re.search("[█░\x1b\r]", log)
    whole = re.findall(
        r"epoch \d/2  loss \d\.\d\d \(per network\)  lr [\d.]+ \| val .*\(networks .*NLL \d.* \| .*", log
    )
    assert len(whole) == 2
    assert log.count("images/s") == 2 * 4  # what the bar had in its place


def test_where_stderr_is_no_terminal_there_is_no_bar(tmp_path: Path) -> None:
    done = Run([*ARGV, "--epochs", 1, "--model_dir", tmp_path / "m"], tmp_path).wait()
    assert done.code == 0
    assert not re.search("[█░\x1b\r]", done.stderr)
    assert done.stderr.count("images/s") == 4
    with (tmp_path / "m" / "summary.csv").open(newline="") as file:
        (row,) = csv.DictReader(file)
    board = EventAccumulator(str(tmp_path / "m" / "val"))
    board.Reload()
    for name in ("val_ensemble_acc1", "val_ensemble_nll", "val_ensemble_ece", "val_loss"):
        assert float(row[name]) == pytest.approx(done.result[name], rel=1e-5)
        assert board.Scalars(f"eval/{name}")[0].value == pytest.approx(done.result[name], rel=1e-5)
    assert re.search(r"^epoch 1/1  loss .* lr .* \| val .* test .* NLL", done.stderr, flags=re.MULTILINE)


def line_of(**values: object) -> EpochLine:
    evaluated = {"acc1": [33.0, 32.0], "ensemble_acc1": 34.7, "criterion": 34.7, "ensemble_nll": 2.06, "extra": {}}
    usual = {
        "title": "epoch 3/300",
        "loss": 2.12,
        "several": True,
        "rate": 0.089,
        "evaluated": evaluated,
        "best": evaluated | {"epoch": 3},
        "reported": "test",
        "chosen_on": "test",
        "seconds": "12 s",
        "left": "58 min left",
    }
    return EpochLine(**usual | values)  # type: ignore[arg-type]


def test_the_line_of_an_epoch_is_the_promised_one() -> None:
    forms = line_of().forms()
    assert forms[1] == (
        "epoch 3/300  loss 2.12 (per network)  lr 0.089 | test 34.7 % (best 34.7 at 3)  NLL 2.06 | 12 s, 58 min left"
    )
    assert "test 34.7 % (networks 33.0 32.0, best 34.7 at 3)" in forms[0]
    assert [len(form) for form in forms] == sorted(map(len, forms), reverse=True)
    assert next(form for form in forms if len(form) < 80) == (
        "epoch 3/300  loss 2.12 | test 34.7 % (best 34.7 at 3)  NLL 2.06 | 58 min left"
    )


def test_one_network_is_spoken_of_once() -> None:
    alone = {"acc1": [34.7], "ensemble_acc1": 34.7, "criterion": 34.7, "ensemble_nll": None, "extra": {}}
    (text, *_) = line_of(several=False, evaluated=alone, best=alone | {"epoch": 3}, left="").forms()
    assert text == "epoch 3/300  loss 2.12  lr 0.089 | test 34.7 % (best 34.7 at 3)  NLL not finite | 12 s"


def test_an_epoch_without_an_evaluation_has_its_line() -> None:
    assert line_of(evaluated=None).forms()[0] == "epoch 3/300  loss 2.12 (per network)  lr 0.089 | 12 s, 58 min left"


@pytest.mark.parametrize(("seconds", "text"), [(12.4, "12 s"), (3500, "58 min"), (12600, "3.5 h"), (2e5, "2.3 d")])
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_the_time_left_is_that_of_the_steps_left(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    time_left = TimeLeft(40)
    assert time_left.text() == ""
    now[0], time_left.left = 120.0, 30
    assert (time_left.text(), time_left.lap(), time_left.lap()) == ("60 s left", 20.0, 0.0)


@pytest.mark.parametrize("columns", [20, 40, 79, 200])
def test_a_bar_fits_its_terminal(columns: int) -> None:
    text = bar_text("epoch 3/300", 0.5, "loss 2.1234 (per network), 12 images/s, 58 min left", columns, blocks=True)
    assert len(text) <= columns
    assert text.startswith("epoch 3/300")
    assert " 50 %" in text
    assert ("58 min left" in text) == (columns > 78)
    assert bar_text("x", 1.0, "", 20, blocks=False) == f"x {'#' * 12} 100 %"


def test_a_record_that_comes_while_a_bar_is_drawn_stands_above_it(
    monkeypatch: pytest.MonkeyPatch, terminal: Terminal
) -> None:
    with open(terminal.name, "w", buffering=1) as stream:
        monkeypatch.setattr("sys.stderr", stream)
        monkeypatch.setenv("TERM", "xterm")
        assert terminal_columns() == 80
        termios.tcsetwinsize(terminal.follower, (24, 0))
        assert terminal_columns() == 80  # unknown
        handler, root = Screen(), logging.getLogger()
        before = root.handlers[:]
        root.handlers[:] = [handler]
        try:
            items = watched([1, 2, 3], 3, "evaluating test")
            assert next(items) == 1
            logging.getLogger("x").warning("left out: 3.png")
            logging.getLogger("x").warning("shown by the bar", extra={"in_bar": True})
            assert list(items) == [2, 3]
            assert Bar(visible=False).is_due() is False
        finally:
            root.handlers[:] = before
    terminal.close()
    assert lines_of(terminal.screen())[:1] == ["left out: 3.png"]


def test_drawing_may_take_a_share_of_the_time_and_no_more() -> None:
    now = [0.0]
    allowance = Allowance(0.02, 1.0, lambda: now[0])
    drawn, cost = [], 3.0
    for _ in range(1000):
        now[0] += 5.0  # an epoch
        if allowance.allows():
            with allowance.spending():
                now[0] += cost
            drawn.append(now[0])
    assert drawn[0] < 60
    assert 0.01 < cost * len(drawn) / now[0] <= 0.02
    quick = Allowance(0.02, 1.0, lambda: now[0])
    now[0] += 60.0
    with quick.spending():
        now[0] += 0.05
    for _ in range(100):
        now[0] += 5.0
        assert quick.allows()  # every epoch
        with quick.spending():
            now[0] += 0.05

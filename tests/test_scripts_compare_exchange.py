"""A comparison of exchanging networks with others: mistakes, figures that are there already, signals."""

import functools
import json
import signal
import sys
from pathlib import Path

import pytest

from script import compare_exchange
from script.compare_exchange import FIGURES, main, run_together
from tests.runs import Run
from tests.test_train_split import folder_of_images
from tests.waits import wait_until
from utils.errors import RunError


@pytest.mark.parametrize(
    "flags", [["--seeds", "1,x"], ["--seeds", "-1"], ["--epochs", "0"], ["--images", "many"], ["--split_factor", "1"]]
)
def test_numbers_that_are_none_are_one_line(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        main([str(tmp_path), "--out", str(tmp_path / "out"), *flags])
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert flags[0] in error
    assert error.count("\n") == 1


def test_an_out_that_is_a_file_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out").touch()
    assert main([str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"compare_exchange: --out {tmp_path / 'out'}: cannot be made: ")
    assert error.count("\n") == 1


def test_runs_that_are_complete_are_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "data_2000_2000_side16").mkdir()
    for seed in (1, 2):
        folder = tmp_path / f"independent_seed{seed}"
        folder.mkdir()
        (folder / "figures.json").write_text(json.dumps(dict.fromkeys(FIGURES, 1000.0 * seed)))
    assert main(["no", "--out", str(tmp_path), "--ways", "independent", "--seeds", "1, 2"]) == 0
    row = "| independent | 1,500.00 ± 707.11 | 1,500.00 ± 707.11 | 1,500.000 ± 707.107 | 1,500.00 ± 707.11 "
    shown = capsys.readouterr().out
    assert shown.splitlines()[-1] == row + "| 1,500 ± 707 | 1,500 | 2 |"
    assert (tmp_path / "table.md").read_text() == shown


def test_the_first_of_several_jobs_is_heard_and_one_that_failed_is_named(tmp_path: Path) -> None:
    words = [[sys.executable, "-c", f"print({number})"] for number in range(2)]
    assert run_together(words, tmp_path / "log") == "0\n"
    with pytest.raises(RunError, match=r"log: job 1 ended with 3: why$"):
        run_together(
            [words[0], [sys.executable, "-c", "import os; os.write(2, b'so\\nwhy\\n'); os._exit(3)"]], tmp_path / "log"
        )


def wait_forever(started: Path) -> None:
    """Every program of the comparison writes its number into a folder and waits."""
    code = "import os, pathlib, sys, time; pathlib.Path(sys.argv[1], str(os.getpid())).touch(); time.sleep(600)"
    compare_exchange.program = lambda *_: [sys.executable, "-c", code, str(started)]


def test_a_signal_ends_the_jobs_too_in_one_line(tmp_path: Path) -> None:
    data, started = folder_of_images(tmp_path / "data", 8), tmp_path / "started"
    started.mkdir()
    argv = [data, "--out", tmp_path / "out", "--ways", "exchange_2", "--images", 4, "--test_images", 2]
    hook = functools.partial(wait_forever, started)
    run = Run(argv, tmp_path / "streams", module="script.compare_exchange", before=hook)
    wait_until(lambda: len([*started.iterdir()]) == 2, "both jobs have started", seconds=100)
    run.signal(signal.SIGTERM)
    ended = run.wait()
    assert ended.code == 128 + signal.SIGTERM
    assert ended.stderr == "compare_exchange: interrupted by SIGTERM; no results were written.\n"
    assert not any(Path("/proc", job.name).exists() for job in started.iterdir())

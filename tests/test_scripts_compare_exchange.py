"""A comparison of exchanging networks with others: mistakes, figures that are there already, the whole way, signals."""

import functools
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from record.run_folder import alone_in, holders, read_results
from script import compare_exchange
from script.compare_exchange import FIGURES, main, run_together
from tests.runs import Run
from tests.test_train_exchange import killed_in_step, records
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


def test_more_images_than_there_are_is_one_line_that_names_the_flag(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [str(folder_of_images(tmp_path / "data", 8)), "--out", str(tmp_path / "out")]
    for flags in (["--images", "39"], ["--images", "3", "--test_images", "39"]):
        assert main([*argv, *flags]) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"compare_exchange: {flags[-2]}: ")
        assert error.endswith("holds 12 images, 13 of every class were asked for.\n")


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
    """Every program of the comparison lets signals through, writes its number into a folder and waits."""
    code = "import os, pathlib, signal, sys, time; signal.pthread_sigmask(signal.SIG_SETMASK, []); "
    code += "pathlib.Path(sys.argv[1], str(os.getpid())).touch(); time.sleep(600)"
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


def test_jobs_that_a_killed_comparison_leaves_refuse_the_same_command_until_they_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, started = folder_of_images(tmp_path / "data", 8), tmp_path / "started"
    started.mkdir()
    argv = [str(data), "--out", str(tmp_path / "out"), "--ways", "independent", "--images", "4", "--test_images", "2"]
    hook = functools.partial(wait_forever, started)
    run = Run(argv, tmp_path / "streams", module="script.compare_exchange", before=hook)
    wait_until(lambda: len([*started.iterdir()]) == 1, "the job has started", seconds=100)
    (job,) = (int(file.name) for file in started.iterdir())
    try:
        run.signal(signal.SIGKILL)
        run.wait()
        assert main(argv) == 2
        error = capsys.readouterr().err
        folder = tmp_path / "out" / "independent_seed1"
        assert f"is at work in {folder} (process {job}). Wait for its end, or end it; " in error
        assert error.count("\n") == 1
    finally:
        os.kill(job, signal.SIGKILL)
    wait_until(lambda: holders(folder) == [], "the job has ended")
    with alone_in(folder, str):
        pass


class Forked:
    """What the comparison starts, as a fork of the tests' server; the second job of an exchange may be killed."""

    is_killing = True

    def __init__(self, command: list[str], *, stdout: Any, stderr: Any, **_: Any) -> None:
        self.files = Path(stdout.name), Path(stderr.name)
        model = Path(command[command.index("--model_dir") + 1]) if "--model_dir" in command else None
        is_killed = self.is_killing and model is not None and model.name == "net1"
        hook = killed_in_step(6, model) if is_killed and model is not None else None
        self.run = Run(command[2:], self.files[0].parent / "streams", module=Path(command[1]).stem, before=hook)

    def wait(self, timeout: float | None = None) -> int:
        ended = self.run.wait()
        for file, text in zip(self.files, (ended.stdout, ended.stderr), strict=True):
            file.write_text(text)
        return ended.code


@pytest.mark.slow
def test_the_whole_way_goes_on_after_a_kill(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(compare_exchange.subprocess, "Popen", Forked)
    data, out = folder_of_images(tmp_path / "data", 48), tmp_path / "out"
    argv = [str(data), "--out", str(out), "--ways", "independent,exchange_2", "--seeds", "3", "--epochs", "2"]
    argv += ["--images", "36", "--test_images", "0", "--batch_size", "9", "--side", "8"]
    assert main(argv) == 1
    folder = out / "exchange_2_seed3"
    assert capsys.readouterr().err.startswith(f"compare_exchange: {folder / 'log'}: job 1 ended with -9")
    first = (out / "independent_seed3" / "figures.json").stat().st_mtime_ns
    assert not (folder / "figures.json").exists()
    monkeypatch.setattr(Forked, "is_killing", False)
    assert main(argv) == 0
    assert (out / "independent_seed3" / "figures.json").stat().st_mtime_ns == first
    assert "Going on from" in (folder / "log" / "1.err").read_text()

    joint = read_results(out / "independent_seed3" / "joint") or {}
    figures = {
        way: json.loads((out / f"{way}_seed3" / "figures.json").read_text()) for way in ("independent", "exchange_2")
    }
    assert figures["independent"]["ensemble_acc1"] == pytest.approx(joint["ensemble_acc1"])
    assert figures["independent"]["bytes"] == 0
    jobs = [read_results(folder / f"net{i}") or {} for i in range(2)]
    assert figures["exchange_2"]["single_acc1"] == pytest.approx(sum(job["ensemble_acc1"] for job in jobs) / 2)
    logs = [*folder.glob("net*/exchange.jsonl")]
    taken = sum(len(records(file.parent)) for file in logs)
    size = next((folder / "x" / "network_0").glob("step_*.safetensors")).stat().st_size
    assert taken >= 1
    assert figures["exchange_2"]["bytes"] == pytest.approx((2 * 4 + taken) * size, rel=0.01)
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]
    assert [row[0] for row in rows] == ["| independent", "| exchange_2"]
    for row, way in zip(rows, figures, strict=True):
        assert row[1] == f"{figures[way]['ensemble_acc1']:.2f}"
        assert row[-1] == "1 |"

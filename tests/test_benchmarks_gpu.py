"""The runner for turns on a GPU: what it runs, when it stops, what it keeps, and what it calls wrong."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu, own
from benchmarks.__main__ import build_parser as subjects
from benchmarks.gpu import PARTS, Part, arguments_of, goals_of, gpu_tests, main, run_limited
from benchmarks.gpu_check import CHECKS
from parser_params import parse_config
from tests.waits import wait_until
from utils.errors import Interrupted

ROOT = Path(__file__).parent.parent


class Machine:
    """Stands for what the runner starts: a clock that moves by what a part takes, and the part's end."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **parts: dict[str, Any]) -> None:
        self.now, self.ran, self.limits = 0.0, list[str](), list[float]()
        self.takes = {name: part.pop("takes", 5) for name, part in parts.items()}
        self.codes = {name: part.pop("code", 0) for name, part in parts.items()}
        self.rows = {name: part.pop("rows", []) for name, part in parts.items()}
        same = {"settles": "", "limit": 60, "usual": 5}
        table = [
            Part(name, commands=[f"bench {name}"], tiny=[f"bench {name}"], **same | p) for name, p in parts.items()
        ]
        monkeypatch.setattr(gpu, "PARTS", table)
        monkeypatch.setattr(gpu, "ALL", [*parts])
        monkeypatch.setattr(gpu, "run_limited", self.run)
        monkeypatch.setattr(gpu.time, "monotonic", lambda: self.now)

    def run(self, command: list[str], log: Path, seconds: float, environment: dict[str, str]) -> int | None:
        name = command[2]
        # what compilers make is there in the next turn
        assert {Path(folder).parent for folder in environment.values()} == {log.parent / "cache"}
        self.ran.append(name)
        self.limits.append(seconds)
        self.now += min(self.takes[name], seconds)
        Path(command[command.index("--json") + 1]).write_text(json.dumps(self.rows[name]))
        return self.codes[name] if self.takes[name] <= seconds else None


def turn(out: Path, *flags: str) -> int:
    return main(["--device", "cpu", "--out", str(out), *flags])


def test_what_does_not_fit_is_left_and_the_next_turn_goes_on_with_it(tmp_path, monkeypatch, capsys):
    machine = Machine(monkeypatch, a={"takes": 20}, long={"usual": 50, "takes": 30}, b={})
    assert turn(tmp_path, "--minutes", "1") == 0
    assert machine.ran == ["a", "b"]
    assert "not reached: long. The same command goes on." in capsys.readouterr().out
    assert turn(tmp_path, "--minutes", "1") == 0
    assert machine.ran == ["a", "b", "long"]
    assert turn(tmp_path) == 0
    assert len(machine.ran) == 3


def test_a_part_that_is_cut_off_keeps_its_rows_and_goes_on_in_the_next_turn(tmp_path, monkeypatch, capsys):
    row = {"goal": "G1", "subject": "s", "baseline": "b", "ratio": 6.0, "commit": 5.0, "met": True}
    row["hardware"] = {"device": "a GPU"}
    machine = Machine(monkeypatch, slow={"limit": 30, "takes": 40, "rows": [row], "judges": True}, b={})
    assert turn(tmp_path) == 0  # not done is not wrong
    assert machine.limits == [30, 60]
    assert "slow           not done after 30 s: goes on in the next turn" in capsys.readouterr().out
    goals = json.loads((tmp_path / "goals.json").read_text())
    measured = {"value": [6.0], "promises": [5.0], "met": True, "file": "00_slow.json", "on": "a GPU"}
    assert goals["G1"] == {"promise": "≥ 5×", **measured}
    assert goals["G2"]["value"] is None
    assert "| G1 | ≥ 5× | [6.0] | yes | a GPU | 00_slow.json |" in (tmp_path / "summary.md").read_text()
    assert "| slow |  | not done after 30 s" in (tmp_path / "summary.md").read_text()
    machine.takes["slow"] = 1
    assert turn(tmp_path) == 0
    assert machine.ran == ["slow", "b", "slow"]


def test_what_failed_is_done_again_where_it_is_asked_for_by_name(tmp_path, monkeypatch):
    machine = Machine(monkeypatch, a={}, b={"code": 1})
    for flags, ran in (([], ["a", "b"]), ([], []), (["--only", "a,b"], ["b"])):
        machine.ran.clear()
        turn(tmp_path, *flags)
        assert machine.ran == ran


@pytest.mark.parametrize(
    ("part", "code"),
    [
        ({"judges": True, "code": 1}, 1),
        ({"judges": True, "rows": [{"met": False}]}, 1),
        ({"judges": True, "rows": [{"error": "out of memory"}]}, 1),
        ({"judges": True, "rows": [{"met": True}, {"met": None}]}, 0),
        ({"code": 1, "rows": [{"met": False}]}, 0),  # slow, or missing, but not wrong
    ],
)
def test_only_wrong_results_are_a_failure(tmp_path, monkeypatch, capsys, part, code):
    machine = Machine(monkeypatch, first=part, second={})
    assert turn(tmp_path) == code
    assert machine.ran == ["first", "second"]
    assert ("WRONG RESULTS: first" in capsys.readouterr().out) == bool(code)
    assert turn(tmp_path) == code  # and is not forgotten


def test_parts_without_what_they_need_are_left_out_and_named(tmp_path, monkeypatch, capsys):
    machine = Machine(monkeypatch, tests={"needs": "no_such_package"}, run={"needs": "data"}, ddp={"needs": "two GPUs"})
    monkeypatch.setattr(gpu, "JPEGS", tmp_path / "nowhere")
    assert turn(tmp_path / "out", "--tiny") == 0
    # at the smallest size it trains on what is always there, and a CPU has room for two processes
    assert machine.ran == ["run", "ddp"]
    assert "left out: needs no_such_package" in capsys.readouterr().out
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    for count, ran in ((1, []), (2, ["ddp"])):
        machine.ran.clear()
        monkeypatch.setattr(torch.cuda, "device_count", lambda count=count: count)
        assert turn(tmp_path / f"of {count}", "--device", "cuda") == 0
        assert machine.ran == ran
        out = capsys.readouterr().out
        assert "left out: needs --data" in out
        assert ("left out: needs two GPUs" in out) == (count == 1)


def test_results_of_two_machines_do_not_mix(tmp_path, monkeypatch, capsys):
    Machine(monkeypatch, a={})
    assert turn(tmp_path, "--tiny") == 0
    assert turn(tmp_path) == 2
    assert "holds parts that ran on cpu, tiny, and this is cpu: give another folder" in capsys.readouterr().err


def test_mistakes_are_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(gpu, "unused_gpu", lambda: "")
    file = tmp_path / "file"
    file.write_text("")
    for flags, line, code in (
        (["--only", "g1,gx"], "--only gx: there is no such part", 2),
        ([], "there is no GPU here", 2),
        (["--device", "cpu", "--data", str(file)], f"--data {file}: there is no such folder", 2),
        (["--device", "cpu", "--out", str(file / "below")], "cannot be written", 1),
    ):
        assert main(["--out", str(tmp_path), *flags]) == code
        error = capsys.readouterr().err
        assert line in error
        assert error.count("\n") == 1
    for minutes in ("0", "-1", "nan", "ten"):
        with pytest.raises(SystemExit) as ended:
            main(["--minutes", minutes])
        assert ended.value.code == 2
        assert f"--minutes: expected a number above 0, got '{minutes}'" in capsys.readouterr().err
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert main(["--device", "cuda:1", "--out", str(tmp_path)]) == 2
    assert "--device cuda:1: cuda:1 is none of this machine's 1 GPUs" in capsys.readouterr().err


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"place": "cpu"'])
def test_what_an_earlier_turn_left_unreadable_is_done_again(tmp_path, monkeypatch, content):
    machine = Machine(monkeypatch, a={})
    (tmp_path / "state.json").write_text(content)
    assert turn(tmp_path) == 0
    assert machine.ran == ["a"]


def test_an_interrupted_turn_is_one_line_and_goes_on(tmp_path, monkeypatch, capsys):
    machine = Machine(monkeypatch, a={}, b={}, c={})
    real = machine.run

    def interrupted(command: list[str], *args: Any) -> int | None:
        if command[2] == "b" and "b" not in machine.ran:
            machine.ran.append("b")
            raise Interrupted(signal.SIGINT)
        return real(command, *args)

    monkeypatch.setattr(gpu, "run_limited", interrupted)
    assert turn(tmp_path) == 130
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "the same command goes on" in error
    assert turn(tmp_path) == 0
    assert machine.ran == ["a", "b", "b", "c"]


def test_the_best_of_every_promise_counts_and_all_of_a_goal_must_be_kept():
    def row(goal: str, subject: str, ratio: float, commit: float, met: bool | None = None) -> dict[str, Any]:
        met = ratio >= commit if met is None else met
        names = {"goal": goal, "subject": subject, "baseline": "b", "file": subject, "hardware": {"device": "a GPU"}}
        return {**names, "ratio": ratio, "commit": commit, "met": met}

    rows = [row("G1", "step", 4.0, 5.0), row("G1", "step", 6.0, 5.0), row("G9", "1", 6.0, 5.0)]
    rows += [row("G9", "128", 1.0, 1.3)]
    rows += [{"goal": None, "ratio": 9.0}, {"goal": "G3", "error": "failed", "ratio": None}]
    found = goals_of(rows)
    assert found["G1"] == {"value": [6.0], "promises": [5.0], "met": True, "file": "step", "on": "a GPU"}
    assert (found["G9"]["value"], found["G9"]["met"], found["G9"]["file"]) == ([6.0, 1.0], False, "1, 128")
    assert "G3" not in found
    assert goals_of([{**row("G1", "step", 6.0, 5.0), "met": None}])["G1"]["met"] is None  # not on an H200


def test_waits_are_counted_by_the_tests_that_look_for_them(tmp_path, monkeypatch):
    Machine(monkeypatch, a={})
    report = '<testsuites><testsuite><testcase name="test_a_gpu_is_not_waited_for_either[s1]"{}><testcase name="other">'
    report += "<failure/></testcase></testsuite></testsuites>"
    for inside, goal in (
        ("/", (0, True)),
        ("><failure/></testcase", (1, False)),
        ("><skipped/></testcase", (None, None)),
    ):
        (tmp_path / "tests.xml").write_text(report.replace("{}", inside))
        turn(tmp_path)
        found = json.loads((tmp_path / "goals.json").read_text())["G8"]
        assert (found["value"], found["met"]) == goal


# ---- the parts -------------------------------------------------------------------------------------------------------


def every_command() -> list[tuple[str, bool, list[str]]]:
    """Name of the part, whether at its smallest, and the arguments of Python."""
    found = []
    for part in PARTS:
        for tiny, commands in ((False, part.commands), (True, part.tiny)):
            for command in commands:
                words = arguments_of(
                    command,
                    device="cpu" if tiny else "cuda",
                    tiny=tiny,
                    out=Path("/out"),
                    rows=Path("/out/rows.json"),
                    data=Path("/data/jpeg of cifar"),
                )
                found.append((part.name, tiny, words))
    return found


@pytest.mark.parametrize(("name", "tiny", "words"), every_command())
def test_every_command_is_one_that_its_program_knows(name, tiny, words):
    if words[0] == "train_split.py":
        config = parse_config(words[1:], program="train_split.py")
        assert config.model_dir == "/out/g12"
        assert config.data == ("/data/jpeg of cifar" if not tiny else config.data)
    elif words[1] == "benchmarks":
        options = subjects().parse_args(words[2:])
        assert str(options.json) == "/out/rows.json"
        for case in (getattr(options, "cases", None) or "bf16+loop").split(","):
            assert own.case_flags(case)
    elif words[1] == "benchmarks.gpu_check":
        assert set(words[words.index("--only") + 1].split(",")) <= set(CHECKS)
        assert ("--tiny" in words) == tiny
    else:
        assert words[1] == "pytest"
        assert all((ROOT / word).is_file() for word in words if word.startswith("tests/"))


def test_the_first_turn_reaches_the_parts_that_say_whether_results_are_right():
    assert [part.name for part in PARTS if part.judges] == [part.name for part in PARTS[:5]]
    on_one_gpu = [part for part in PARTS[:10] if part.needs != "two GPUs"]
    assert sum(part.usual for part in on_one_gpu) <= 8 * 60


def test_files_with_gpu_tests_are_found():
    found = gpu_tests()
    assert {"tests/test_training_step.py", "tests/test_dataset_loader.py", "tests/test_train_execution.py"} <= set(
        found
    )
    assert "tests/test_loss_agreement.py" not in found


# ---- processes -------------------------------------------------------------------------------------------------------


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize(
    "because", [subprocess.TimeoutExpired("", 7), Interrupted(signal.SIGTERM)], ids=["late", "told"]
)
def test_a_process_is_asked_to_end_and_what_it_started_ends_with_it(tmp_path, monkeypatch, because):
    log, grandchild = tmp_path / "log", tmp_path / "pid"
    code = "import signal, subprocess, sys, time; child = subprocess.Popen(['sleep', '600']);"
    code += f"open({str(grandchild)!r}, 'w').write(str(child.pid));"
    code += "signal.signal(signal.SIGTERM, lambda *_: sys.exit(print('saved', flush=True)));"
    code += "print('began', flush=True); time.sleep(600)"
    real = subprocess.Popen.wait

    def wait(process: subprocess.Popen[bytes], timeout: float | None = None) -> int:
        if timeout == 7:  # the limit is over when the process has come so far
            wait_until(lambda: log.read_text() != "", "it has started its child")
            raise because
        return real(process, timeout)

    monkeypatch.setattr(subprocess.Popen, "wait", wait)
    with contextlib.nullcontext() if isinstance(because, subprocess.TimeoutExpired) else pytest.raises(Interrupted):
        assert run_limited(["-c", code], log, 7, {}) is None
    assert log.read_text().split() == ["began", "saved"]
    wait_until(lambda: not alive(int(grandchild.read_text())), "the child of the child has ended")


def test_exit_codes_words_and_environment_are_passed_on(tmp_path):
    code = "import os, sys; print(os.environ['MARK'], file=sys.stderr); sys.exit(3)"
    assert run_limited(["-c", code], tmp_path / "log", 60, {"MARK": "here"}) == 3
    assert (tmp_path / "log").read_text() == "here\n"


@pytest.mark.long
def test_all_parts_at_their_smallest_on_a_cpu(tmp_path):
    command = [str(ROOT / "script" / "gpu.sh"), "--device", "cpu", "--tiny", "--minutes", "20", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHON": sys.executable})
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert [line.split()[1] for line in lines] == [part.name for part in PARTS]
    assert all(" done in " in line for line in lines), done.stdout
    state = json.loads((tmp_path / "state.json").read_text())
    assert all(one["ok"] for one in state["done"].values())
    names = {path.name for path in tmp_path.iterdir()}
    assert {"05_g1.json", "05_g1_2.json", "08_g9.json", "summary.md", "goals.json"} <= names
    assert (tmp_path / "g12" / "results.json").exists()

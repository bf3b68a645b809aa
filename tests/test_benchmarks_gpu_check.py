"""The checks before a GPU is trusted: each can fail, a failure costs no other one, and without a GPU it is one line."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import gpu_check
from benchmarks.gpu_check import CHECKS, Place, main
from dataset.views import ViewMaker
from utils import launch
from utils.errors import RunError

CPU = Place(torch.device("cpu"), tiny=True)


def test_without_the_gpu_it_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for line, code in (("", 0), ("This machine seems to have a GPU, but torch is built without CUDA.", 1)):
        monkeypatch.setattr(gpu_check, "unused_gpu", lambda line=line: line)
        assert main([]) == code
        out = capsys.readouterr().out
        assert out.count("\n") == 1
        assert (line or "no GPU here: nothing to check") in out
    assert main(["--only", "machine,kernels"]) == 2
    assert "--only kernels: expected machine, kernel" in capsys.readouterr().err
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert main(["--device", "cuda:1"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_every_check_has_its_line_and_one_that_fails_is_no_end(monkeypatch, capsys):
    def wrong(place):
        raise RunError("7 views differ from those")

    def broken(place):
        raise ZeroDivisionError("of a\nlibrary")

    checks = {"a": lambda place: "as it should be", "wrong": wrong, "broken": broken, "b": lambda place: "too"}
    monkeypatch.setattr(gpu_check, "CHECKS", checks)
    assert main(["--device", "cpu"]) == 1
    lines = [line.rsplit(" (", 1)[0] for line in capsys.readouterr().out.splitlines()]
    assert lines == [
        "a           ok      as it should be",
        "wrong       FAILED  7 views differ from those",
        "broken      FAILED  of a library",
        "b           ok      too",
    ]
    assert main(["--device", "cpu", "--only", "b,a"]) == 0
    assert [line[0] for line in capsys.readouterr().out.splitlines()] == ["b", "a"]
    assert main(["--device", "cpu", "--only", "c"]) == 2
    assert "--only c: expected a, wrong, broken, b" in capsys.readouterr().err


def test_the_machine_is_described(monkeypatch):
    told = ["550.54.15, 1980 MHz, 700.00 W\n550.54.15, 1980 MHz, 500.00 W\n"]
    monkeypatch.setattr(gpu_check.subprocess, "run", lambda *_, **__: SimpleNamespace(stdout=told[0]))
    assert "cores, driver 550.54.15, 1980 MHz, 700.00 W, python" in CHECKS["machine"](CPU)
    told[0] = ""
    assert "cores, driver unknown, python" in CHECKS["machine"](CPU)


@pytest.mark.parametrize("fault", [None, "machine", "half"])
def test_wrong_arithmetic_is_found(monkeypatch, fault):
    real = torch.nn.functional.conv2d
    if fault == "half":
        monkeypatch.setattr(
            torch.nn.functional,
            "conv2d",
            lambda images, *args, **more: real(images, *args, **more) * (2 if images.dtype is torch.bfloat16 else 1),
        )
    if fault == "machine":
        monkeypatch.setattr(torch, "equal", lambda *_: False)
    if fault is None:
        CHECKS["machine"](CPU)
        return
    with pytest.raises(RunError, match="arrives changed" if fault == "machine" else "bfloat16 is wrong"):
        CHECKS["machine"](CPU)


def test_wrong_views_are_found(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(gpu_check, "HAS_TRITON", True)
    monkeypatch.setattr(ViewMaker, "_fill_by_kernel", ViewMaker._fill)
    others: list[int] = []

    def draw(maker, views, images, epoch, positions, first_view):
        parameters = maker.draw(epoch, positions + len(others), len(views), images.shape[-2:])
        maker._fill(views, images, parameters, slice(0, len(images)))

    monkeypatch.setattr(ViewMaker, "_draw_and_fill", draw)
    assert "8 px, drawn on the host or by a kernel, equal those" in CHECKS["kernel"](CPU)
    others.append(1)
    with pytest.raises(RunError, match="2 views of 8 px that a kernel draws differ"):
        CHECKS["kernel"](CPU)
    others.clear()

    def wrong(maker, views, images, parameters, part):
        maker._fill(views, images, parameters, part)
        if len(images) == 3:
            views[-1, -1, -1, -1, -1] += 1e-7

    monkeypatch.setattr(ViewMaker, "_fill_by_kernel", wrong)
    with pytest.raises(RunError, match="6 views of 8 px differ"):
        CHECKS["kernel"](CPU)


@pytest.mark.parametrize(("fault", "size"), [("loop", 1e-15), ("parallel", 1e-8), ("stacked", 1e-8), (None, 1e-12)])
def test_wrong_steps_are_found(monkeypatch, fault, size):
    calls = []

    def state(flags, place, *, replayed):
        calls.append(flags[1])
        is_other = flags[1] == fault and not (fault == "loop" and len(calls) == 1)
        is_near = fault is None and flags[1] != "loop"  # to rounding
        return {"weight": torch.ones(3, dtype=torch.float64) + size * (is_other or is_near)}

    monkeypatch.setattr(gpu_check, "_state", state)
    if fault is None:
        assert "agree with the loop" in CHECKS["graphs"](CPU)
        return
    with pytest.raises(RunError, match=f"{fault}.*: weight is "):
        CHECKS["graphs"](CPU)


@pytest.mark.parametrize(
    ("losses", "line"),
    [
        ([2.3, 2.1], None),
        ([2.36, 2.1], "bf16: its first loss of 12 is 2.6% away"),
        ([2.3, 2.4], "bf16: its last loss of 12 is 14.3% away"),
        ([2.3, float("nan")], "bf16: a loss is not finite"),
    ],
)
def test_wrong_half_precision_is_found(monkeypatch, losses, line):
    def trainer(flags, place, folder):
        ending = SimpleNamespace(close=lambda: None)
        return SimpleNamespace(losses=losses if "bf16" in flags else [2.3, 2.1], log=ending, saver=ending)

    monkeypatch.setattr(gpu_check, "has_fast_bf16", lambda device: True)
    monkeypatch.setattr(gpu_check, "_trainer", trainer)
    monkeypatch.setattr(gpu_check, "_losses", lambda trainer: trainer.losses)
    if line is None:
        assert "losses of fp32, bf16 are within" in CHECKS["precisions"](CPU)
        return
    with pytest.raises(RunError, match=line):
        CHECKS["precisions"](CPU)


@pytest.mark.parametrize("same", [True, False])
def test_a_resume_that_ends_elsewhere_is_found(monkeypatch, same):
    monkeypatch.setattr(gpu_check, "start", lambda folder, place, flags: folder.name + ("auto" in flags) * " again")
    monkeypatch.setattr(gpu_check, "kill_once_saved", lambda run: None)
    monkeypatch.setattr(gpu_check, "finished", lambda run: "abc" if same or run == "straight" else "def")
    if same:
        assert "bit for bit" in CHECKS["resume"](CPU)
        return
    with pytest.raises(RunError, match="other weights"):
        CHECKS["resume"](CPU)


def test_two_processes_need_two_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert CHECKS["processes"](Place(torch.device("cuda"), tiny=True)) == "left out: it needs two GPUs"


@pytest.mark.parametrize(("distance", "line"), [(0.0, None), (1e-8, "two processes: w is 1.0e-08 away from one")])
def test_processes_that_train_to_other_weights_are_found(monkeypatch, distance, line):
    monkeypatch.setattr(gpu_check, "start", lambda folder, place, flags: folder)
    monkeypatch.setattr(gpu_check, "start_two", lambda folder, place, flags: [folder, folder])
    monkeypatch.setattr(gpu_check, "finished", lambda run: "")
    monkeypatch.setattr(gpu_check, "end_together", lambda runs, *, within: None)
    monkeypatch.setattr(
        gpu_check,
        "_weights",
        lambda folder: {"w": torch.ones(1, dtype=torch.float64) + distance * (folder.name == "two")},
    )
    if line is None:
        assert "to the weights of one" in CHECKS["processes"](CPU)
        return
    with pytest.raises(RunError, match=line):
        CHECKS["processes"](CPU)


NAMES_IT = "process 0 failed; stopping."


@pytest.mark.parametrize(
    ("other", "line"),
    [
        (f"sys.exit({NAMES_IT!r})", None),
        ("time.sleep(600)", "another had not ended 1 s later"),
        (f"print({NAMES_IT!r}, file=sys.stderr)", r"exit codes are \[1, 0\]"),
        ("sys.exit('out of memory')", "no process names the one that has failed"),
    ],
)
def test_a_process_that_outlives_a_failure_is_found(other, line):
    runs = [
        gpu_check.Run(
            subprocess.Popen([sys.executable, "-c", f"import sys, time; {code}"], stderr=subprocess.PIPE, text=True),
            Path(),
        )
        for code in ("sys.exit(1)", other)
    ]
    within = 1 if "sleep" in other else 60
    if line is None:
        gpu_check.end_together(runs, within=within)
    else:
        with pytest.raises(RunError, match=line):
            gpu_check.end_together(runs, within=within)
    assert all(run.process.returncode is not None for run in runs)


def test_a_gpu_that_torch_cannot_use_is_noticed(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(Path, "exists", lambda path: False)
    monkeypatch.setattr(launch.shutil, "which", lambda name: None)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert launch.unused_gpu() == ""
    monkeypatch.setattr(launch.shutil, "which", lambda name: f"/usr/bin/{name}")
    for version, why in ((None, "is built without CUDA"), ("13.0", "for CUDA 13.0 finds no driver for it")):
        monkeypatch.setattr(torch.version, "cuda", version)
        assert f"{why}: the CPU computes" in launch.unused_gpu()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert launch.unused_gpu() == ""  # hidden on purpose
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert launch.unused_gpu() == ""

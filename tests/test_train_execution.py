"""--execution on the command line: any strategy, any number of processes, also when resumed."""

import signal
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import train_split
import training.state
import utils.cpus
from record import checkpoint as ckpt
from tests.kills import at_call
from tests.runs import TINY, Run, train
from tests.test_train_distributed import train_together
from tests.waits import needs_gpu, requires_gpu
from utils.launch import World

BASE = [*TINY, "--split_factor", 2, "--seed", 5, "--print_freq", 2, "--eval_batch_size", 200]


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> tuple[list, Path]:
    folder = tmp_path_factory.mktemp("loop")
    argv = [*BASE, "--amp_dtype", "fp64", "--batch_size", 51, "--max_steps", 4, "--is_syncbn", 1, "--is_mixup", 1]
    argv += ["--iters_to_accumulate", 2, "--clip_grad", 1.0, "--ema_decay", 0.5]
    result = train([*argv, "--model_dir", folder / "m"], folder)
    assert result.code == 0, result.stderr
    return argv, folder / "m"


@pytest.mark.slow
@pytest.mark.parametrize("execution", ["stacked", "parallel"])
def test_two_processes_train_as_one_loop(execution: str, expected: tuple[list, Path], tmp_path: Path) -> None:
    argv = [*expected[0], "--execution", execution, "--model_dir", tmp_path / "m"]
    results = train_together(argv, tmp_path, 2)
    assert "execution" not in results[0].stderr  # no line says that it gave way
    states = [ckpt.load_checkpoint(ckpt.list_checkpoints(folder)[0]) for folder in (tmp_path / "m", expected[1])]
    assert states[0]["environment"]["execution"] == execution
    assert states[0].keys() == states[1].keys()
    for kind in ("state_dict", "ema"):
        assert list(states[0][kind]) == list(states[1][kind])
        for name, value in states[1][kind].items():
            torch.testing.assert_close(states[0][kind][name], value, rtol=0, atol=1e-10, msg=f"{kind} {name}")
    assert states[0]["optimizer"]["state"].keys() == states[1]["optimizer"]["state"].keys()


@pytest.mark.slow
def test_a_resumed_run_keeps_its_strategy_and_its_bits(tmp_path: Path) -> None:
    argv = [*BASE, "--amp_dtype", "bf16", "--save_steps", 3]
    unbroken = train([*argv, "--execution", "stacked", "--max_steps", 6, "--model_dir", tmp_path / "u"], tmp_path)
    train([*argv, "--execution", "stacked", "--max_steps", 3, "--model_dir", tmp_path / "m"], tmp_path)
    resumed = train([*argv, "--max_steps", 6, "--model_dir", tmp_path / "m", "--resume", "auto"], tmp_path)
    assert resumed.result["state_sha256"] == unbroken.result["state_sha256"]
    newest = ckpt.load_checkpoint(ckpt.list_checkpoints(tmp_path / "m")[0])
    assert newest["environment"]["execution"] == "stacked"
    assert newest["environment"]["threads"] == 1


@pytest.mark.slow
def test_auto_says_what_it_chose_in_training_and_in_evaluation(tmp_path: Path) -> None:
    result = train([*BASE, "--execution", "auto", "--max_steps", 2, "--model_dir", tmp_path / "m"], tmp_path)
    assert "for a training pass: " in result.stderr
    checkpoint = ckpt.list_checkpoints(tmp_path / "m")[0]
    chosen = ckpt.load_checkpoint(checkpoint)["environment"]["execution"]
    assert f"for a training pass: {chosen}." in result.stderr
    argv = ["--resume", checkpoint, "--no_cuda", "--execution", "auto", "--eval_batch_size", 200]
    evaluated = train(argv, tmp_path, module="eval")
    assert evaluated.code == 0, evaluated.stderr
    assert "for a forward pass: " in evaluated.stderr
    assert evaluated.result["acc1"] == pytest.approx(result.result["acc1"], abs=0.3)


def test_a_method_that_runs_its_networks_itself_says_so(tmp_path: Path) -> None:
    argv = [*BASE, "--method", "dks", "--execution", "stacked", "--max_steps", 1, "--model_dir", tmp_path / "m"]
    result = train(argv, tmp_path)
    assert result.code == 0, result.stderr
    assert result.stderr.count("keeps to loop") == 1


@pytest.mark.parametrize(
    ("device", "execution", "is_synchronised", "said"),
    [
        ("cuda", "parallel", True, True),
        ("cuda", "parallel", False, False),
        ("cuda", "loop", True, False),
        ("cpu", "parallel", True, False),  # threads exchange in groups of their own
    ],
)
def test_that_synchronised_norms_make_parallel_networks_a_sequence_is_said(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    device: str,
    execution: str,
    is_synchronised: bool,
    said: bool,
) -> None:
    for name in ("lay_out", "synchronise_batchnorm"):
        monkeypatch.setattr(train_split, name, lambda *_: None)
    trainer: Any = SimpleNamespace(
        method=SimpleNamespace(to=lambda *_: None),
        world=World(0, 2, 0, 2, torch.device(device)),
        precision=SimpleNamespace(weights=torch.float32, memory_format=torch.channels_last),
        is_synchronised=is_synchronised,
        network=SimpleNamespace(),
    )
    with caplog.at_level("INFO"):
        train_split.Trainer._place(trainer, execution, None)
    assert ("every exchange waits for the one before" in caplog.text) == said


def _allow(cpus: int) -> None:
    training.state.allowed_cpus = utils.cpus.allowed_cpus = lambda: cpus


@pytest.mark.slow
def test_threads_are_said_and_kept_and_where_they_cannot_be_a_line_says_so(tmp_path: Path) -> None:
    argv = [*BASE, "--max_ckpt_nums", 9, "--model_dir", tmp_path / "m"]
    first = train([*argv, "--threads", 2, "--max_steps", 1], tmp_path, before=partial(_allow, 2))
    assert "2 thread(s) of the CPU (--threads)" in first.stderr
    cannot = "So far threads was 2, now it is 1: the last bits will differ."
    for steps, (flags, cpus, line) in enumerate(
        (
            ([], 2, "2 thread(s) of the CPU, as the run had before"),
            ([], 1, cannot),
            (["--threads", 1], 2, cannot),
        ),
        start=2,
    ):
        place = ["--resume", tmp_path / "m" / "checkpoint_0_1.pth.tar"]
        resumed = train([*argv, *flags, *place, "--max_steps", steps], tmp_path, before=partial(_allow, cpus))
        assert line in resumed.stderr
        newest = ckpt.load_checkpoint(ckpt.list_checkpoints(tmp_path / "m")[0])
        assert newest["environment"]["threads"] == (1 if line is cannot else 2)


@needs_gpu
@pytest.mark.parametrize("deterministic", [0, 1])
def test_a_run_on_a_gpu_that_is_killed_goes_on(tmp_path: Path, deterministic: int) -> None:
    """Bit for bit where that is asked for."""
    argv = ["--dataset", "digits", "--arch", "resnet20", "--split_factor", 2, "--seed", 1, "--workers", 0]
    argv += ["--amp_dtype", "bf16", "--cuda_graph", 1, "--execution", "parallel", "--save_steps", 5]
    argv += ["--max_steps", 30, "--deterministic", deterministic]
    straight = train([*argv, "--model_dir", tmp_path / "s"], tmp_path)
    run = Run([*argv, "--model_dir", tmp_path / "k"], tmp_path / "killed", before=at_call("checkpoint", 3))
    assert run.wait().code == -signal.SIGKILL
    resumed = train([*argv, "--model_dir", tmp_path / "k", "--resume", "auto"], tmp_path)
    assert (straight.code, resumed.code) == (0, 0), resumed.stderr
    assert resumed.result["steps"] == 30
    if deterministic:
        assert resumed.result["state_sha256"] == straight.result["state_sha256"]


@pytest.mark.parametrize("processes", [pytest.param(n, marks=requires_gpu(n)) for n in (1, 2)])
def test_processes_train_over_nccl_as_one_alone(tmp_path: Path, processes: int) -> None:
    argv = [word for word in BASE if word != "--no_cuda"]
    argv += ["--amp_dtype", "fp64", "--max_steps", 4, "--is_syncbn", 1, "--deterministic", 1]
    alone = train([*argv, "--model_dir", tmp_path / "a"], tmp_path)
    train_together([*argv, "--model_dir", tmp_path / "t"], tmp_path, processes)
    states = [ckpt.load_checkpoint(ckpt.list_checkpoints(tmp_path / name)[0])["state_dict"] for name in ("a", "t")]
    assert alone.code == 0, alone.stderr
    for name, value in states[0].items():
        torch.testing.assert_close(states[1][name], value, rtol=0, atol=1e-9, msg=name)

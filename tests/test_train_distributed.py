"""Several processes train as one, survive what one survives, and say who died."""

import re
import signal
import time
from pathlib import Path

import pytest
import torch

from tests.runs import TINY, Finished, Run, without_times
from utils import checkpoint as ckpt
from utils.distributed import free_port

SYNCED = ["--is_syncbn", 1, "--is_mixup", 1, "--split_factor", 2, "--seed", 5, "--print_freq", 2]


def start_together(argv: list, folder: Path, world_size: int) -> list[Run]:
    """One run per process, with the environment that torchrun gives."""
    port = str(free_port())
    runs = []
    for rank in range(world_size):
        environment = {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(world_size),
            "LOCAL_WORLD_SIZE": str(world_size),
        }
        runs.append(Run(argv, folder / f"rank{rank}", environment=environment))
    return runs


def train_together(argv: list, folder: Path, world_size: int) -> list[Finished]:
    results = [run.wait() for run in start_together(argv, folder, world_size)]
    for result in results:
        assert result.code == 0, result.stderr
    return results


def state_of(folder: Path) -> dict[str, torch.Tensor]:
    return ckpt.load_checkpoint(ckpt.list_checkpoints(folder)[0])["state_dict"]


@pytest.mark.parametrize("world_size", [2, 3])
def test_any_number_of_processes_gives_the_weights_and_metrics_of_one(world_size: int, tmp_path: Path) -> None:
    # 50 images a step divide by neither 3 nor the shards of 359 test images
    argv = [*TINY, *SYNCED, "--amp_dtype", "fp64", "--batch_size", 50, "--max_steps", 4]
    argv += ["--iters_to_accumulate", 2, "--clip_grad", 1.0, "--ema_decay", 0.5]
    alone = train_together([*argv, "--model_dir", tmp_path / "1"], tmp_path / "alone", 1)[0].result
    together = train_together([*argv, "--model_dir", tmp_path / "n"], tmp_path / "many", world_size)
    assert together[0].result["acc1"] == alone["acc1"]
    assert together[0].result["ensemble_acc1"] == alone["ensemble_acc1"]
    assert all(other.stdout == "" for other in together[1:])
    expected = state_of(tmp_path / "1")
    for name, value in state_of(tmp_path / "n").items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-10, msg=name)
    lines = [without_times(tmp_path / name / "metrics.jsonl") for name in ("1", "n")]
    for one, many in zip(*lines, strict=True):
        if one["kind"] == "train":
            assert many["loss"] == pytest.approx(one["loss"], abs=1e-10)
            assert many["acc1"] == pytest.approx(one["acc1"], abs=1e-9)


def test_two_processes_resume_bit_for_bit(tmp_path: Path) -> None:
    argv = [*TINY, *SYNCED, "--epochs", 2, "--save_steps", 4]
    unbroken = train_together([*argv, "--model_dir", tmp_path / "u"], tmp_path / "s", 2)[0].result
    again = [*argv, "--model_dir", tmp_path / "m", "--resume", "auto"]
    runs = start_together(again, tmp_path / "k", 2)
    while not ckpt.list_checkpoints(tmp_path / "m"):
        time.sleep(0.05)
        assert all(run.process.is_alive() for run in runs), runs[0].text()
    for run in runs:
        run.signal(signal.SIGKILL)
    for run in runs:
        run.wait()
    resumed = train_together(again, tmp_path / "r", 2)[0].result
    assert resumed["state_sha256"] == unbroken["state_sha256"]
    assert without_times(tmp_path / "m" / "metrics.jsonl") == without_times(tmp_path / "u" / "metrics.jsonl")


def wait_for_steps(runs: list[Run]) -> None:
    while runs[0].text().count("images/s") < 2:
        time.sleep(0.05)
        assert all(run.process.is_alive() for run in runs), "\n".join(run.text() for run in runs)


def test_one_signalled_process_stops_all_of_them(tmp_path: Path) -> None:
    argv = [*TINY, *SYNCED, "--epochs", 50, "--model_dir", tmp_path / "m"]
    runs = start_together(argv, tmp_path / "s", 2)
    wait_for_steps(runs)
    runs[1].signal(signal.SIGTERM)
    results = [run.wait(60) for run in runs]
    assert [result.code for result in results] == [0, 0], results[0].stderr
    assert len(ckpt.list_checkpoints(tmp_path / "m")) >= 1


def test_a_process_that_dies_ends_the_others_and_is_named(tmp_path: Path) -> None:
    argv = [*TINY, *SYNCED, "--epochs", 50, "--model_dir", tmp_path / "m"]
    runs = start_together(argv, tmp_path / "s", 3)
    wait_for_steps(runs)
    runs[2].signal(signal.SIGKILL)
    killed = time.monotonic()
    results = [run.wait(120) for run in runs]
    assert time.monotonic() - killed < 90
    assert [result.code for result in results] == [1, 1, -signal.SIGKILL]
    for result in results[:2]:
        assert re.search(r"process 2 (died|has not answered)", result.stderr), result.stderr
        assert "Traceback" not in result.stderr

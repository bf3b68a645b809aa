"""Several processes train as one, survive what one survives, and say who died."""

import functools
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from PIL import Image

from record import checkpoint as ckpt
from tests.kills import Hook, at_call, do_at_call, fail, get_stuck, no_space_from_call
from tests.runs import ROOT, TINY, Finished, Run, same_ending, without_times
from utils.launch import free_port

SYNCED = ["--is_syncbn", 1, "--is_mixup", 1, "--split_factor", 2, "--seed", 5, "--print_freq", 2]


def start_together(argv: list, folder: Path, world_size: int, before: Mapping[int, Hook] | None = None) -> list[Run]:
    """One run per process, with the environment that torchrun gives; `before` by rank."""
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
        hook = (before or {}).get(rank)
        runs.append(Run(argv, folder / f"rank{rank}", environment=environment, before=hook))
    return runs


def train_together(argv: list, folder: Path, world_size: int) -> list[Finished]:
    results = [run.wait() for run in start_together(argv, folder, world_size)]
    for result in results:
        assert result.code == 0, result.stderr
    return results


def state_of(folder: Path) -> dict[str, torch.Tensor]:
    return ckpt.load_checkpoint(ckpt.list_checkpoints(folder)[0])["state_dict"]


@pytest.mark.parametrize("world_size", [2, pytest.param(3, marks=pytest.mark.slow)])
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


@pytest.mark.slow
def test_an_optimiser_is_made_anew_in_two_processes_as_in_one(tmp_path: Path) -> None:
    argv = [*TINY, *SYNCED, "--method", "dks", "--split_factor", 1, "--arch", "wrn_16_1", "--amp_dtype", "fp64"]
    argv += ["--val_fraction", 0.7, "--epochs", 3, "--max_steps", 7, "--iters_to_accumulate", 3, "--lr", 0.05]
    argv += ["--lr_mode", "step", "--lr_milestones", 1, "--dks_fresh_optimizer", 1, "--dks_branches", 1]
    train_together([*argv, "--model_dir", tmp_path / "1"], tmp_path / "alone", 1)
    train_together([*argv, "--model_dir", tmp_path / "2"], tmp_path / "many", 2)
    expected = state_of(tmp_path / "1")
    for name, value in state_of(tmp_path / "2").items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-9, msg=name)


@pytest.mark.slow
def test_two_processes_stop_within_an_evaluation_and_resume_bit_for_bit(
    tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    # 180 and 179 test images: two batches for the one process, one for the other. Each has batch statistics, and sums
    # within an interval, of its own.
    argv = [*TINY, *SYNCED, "--is_syncbn", 0, "--ema_decay", 0.9, "--epochs", 2]
    argv += ["--print_freq", 3, "--save_steps", 4, "--eval_batch_size", 179]
    unbroken = train_together([*argv, "--model_dir", tmp_path / "u"], tmp_path / "s", 2)[0]
    folder = tmp_path / "m"
    again = [*argv, "--model_dir", folder, "--resume", "auto"]

    asked = at_call("batch of an evaluation", 1, signal.SIGTERM)
    stopped = [run.wait(60) for run in start_together(again, tmp_path / "t", 2, before={1: asked})]
    assert [result.code for result in stopped] == [0, 0], stopped[0].stderr
    assert not (folder / "summary.csv").exists()  # no process ended the evaluation
    assert ckpt.list_checkpoints(folder)[0].name == "checkpoint_0_14.pth.tar"

    killed = start_together(again, tmp_path / "k", 2, before={0: at_call("flush to the disk", 6)})
    assert killed[0].wait().code == -signal.SIGKILL
    killed[1].signal(signal.SIGKILL)
    killed[1].wait()
    record_property("kills", 1)
    resumed = train_together(again, tmp_path / "r", 2)[0]
    same_ending(folder, tmp_path / "u", resumed, unbroken)
    record_property("identical", 1)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds the process through /proc")
@pytest.mark.parametrize(("placement", "killed"), [("data", 1), ("networks", 0)])
def test_torchrun_starts_all_anew_when_one_is_killed(
    placement: str, killed: int, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    argv = [*TINY, *SYNCED, "--epochs", 3, "--placement", placement]
    unbroken = train_together([*argv, "--model_dir", tmp_path / "u"], tmp_path / "s", 2)[0]
    folder = tmp_path / "m"
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2, "--max_restarts", 2]
    command += ["train_split.py", *argv, "--model_dir", folder, "--resume", "auto"]
    with (
        (tmp_path / "err").open("w") as err,
        subprocess.Popen(
            [sys.executable, *map(str, command)], cwd=ROOT, stdout=subprocess.PIPE, stderr=err, text=True
        ) as agent,
    ):
        try:
            while not ckpt.list_checkpoints(folder):
                time.sleep(0.02)
                assert agent.poll() is None, (tmp_path / "err").read_text()
            os.kill(process_of(agent.pid, rank=killed), signal.SIGKILL)
            record_property("kills", 1)
            stdout, _ = agent.communicate(timeout=240)
        finally:
            agent.terminate()  # it ends its processes then
    stderr = (tmp_path / "err").read_text()
    assert "Going on from" in stderr
    same_ending(folder, tmp_path / "u", Finished(agent.returncode, stdout, stderr), unbroken)
    record_property("identical", 1)


def process_of(agent: int, rank: int) -> int:
    """The process that torchrun started as a rank."""
    for number in Path(f"/proc/{agent}/task/{agent}/children").read_text().split():
        if f"RANK={rank}" in Path(f"/proc/{number}/environ").read_text().split("\0"):
            return int(number)
    raise AssertionError(f"no process has rank {rank}")


@pytest.mark.slow
def test_one_process_that_stops_with_an_error_stops_the_others(tmp_path: Path) -> None:
    argv = [*TINY, *SYNCED, "--epochs", 50, "--model_dir", tmp_path / "m", "--on_save_error", "stop"]
    runs = start_together(argv, tmp_path / "s", 2, before={0: functools.partial(no_space_from_call, 2)})
    results = [run.wait(60) for run in runs]
    assert [result.code for result in results] == [1, 1]
    assert "No space left on device" in results[0].stderr
    assert re.search(r"process 0 (failed|died); process 1 stops", results[1].stderr), results[1].stderr
    for result in results:
        assert "Traceback" not in result.stderr


def test_one_that_fails_ends_another_that_hears_of_no_exchange(tmp_path: Path) -> None:
    argv = [*TINY, *SYNCED, "--epochs", 50, "--model_dir", tmp_path / "m"]
    for failing in (0, 1):
        hooks = {
            failing: do_at_call("training step", 3, fail),
            1 - failing: do_at_call("training step", 3, get_stuck),  # over NCCL the GPU waits, and nothing is raised
        }
        runs = start_together(argv, tmp_path / f"s{failing}", 2, before=hooks)
        assert runs[failing].wait(100).code == 1
        failed = time.monotonic()
        other = runs[1 - failing].wait(30)
        assert time.monotonic() - failed < 10
        assert other.code == 1
        assert f"process {failing} failed; stopping. Go on with --resume auto." in other.stderr
        shutil.rmtree(tmp_path / "m")


def test_the_published_launcher_hands_a_signal_on_and_waits_for_the_checkpoint(tmp_path: Path) -> None:
    argv = [*TINY, *SYNCED, "--epochs", 50, "--model_dir", tmp_path / "m", "--resume", "auto"]
    argv += ["--multiprocessing_distributed", "--nproc_per_node", 2]
    for number, code, to_all in ((signal.SIGTERM, 0, False), (signal.SIGINT, 130, True)):
        run = Run(argv, tmp_path / f"s{number}", own_group=True)
        wait_for_steps([run])
        (run.signal_group if to_all else run.signal)(number)
        signalled = time.monotonic()
        stopped = run.wait(60)
        assert time.monotonic() - signalled < 30
        assert stopped.code == code, stopped.stderr
        assert "a checkpoint was saved" in stopped.stderr
        assert "Traceback" not in stopped.stderr
        assert ckpt.list_checkpoints(tmp_path / "m")


def test_torchrun_stops_with_a_checkpoint(tmp_path: Path) -> None:
    data = tmp_path / "data"
    for i in range(24):
        for part in ("train/a", "train/b", "val/a", "val/b"):
            (data / part).mkdir(parents=True, exist_ok=True)
            Image.linear_gradient("L").convert("RGB").resize((70, 70)).save(data / part / f"{i}.png")
    argv = [*TINY, *SYNCED, "--epochs", 50, "--model_dir", tmp_path / "m", "--dataset", "folder", "--data", data]
    argv += ["--workers", 1, "--crop_size", 16, "--batch_size", 8, "--iters_to_accumulate", 2]
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2, "train_split.py", *argv]
    with (tmp_path / "err").open("w") as err:
        agent = subprocess.Popen(
            [sys.executable, *map(str, command)], cwd=ROOT, stdout=err, stderr=err, start_new_session=True
        )
        try:
            while (tmp_path / "err").read_text().count("images/s") < 2:
                time.sleep(0.05)
                assert agent.poll() is None, (tmp_path / "err").read_text()
            os.killpg(agent.pid, signal.SIGINT)
            agent.wait(60)
        finally:
            agent.kill()
    text = (tmp_path / "err").read_text()
    assert text.count("train_split.py: stopped; a checkpoint was saved. Go on with --resume auto.") == 2, text
    assert "decoding process" not in text
    assert ckpt.list_checkpoints(tmp_path / "m")


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


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [[], ["--placement", "networks", "--split_factor", 3, "--arch", "resnet20,resnet20,resnet20"]],
    ids=["data", "networks"],
)
def test_a_process_that_dies_ends_the_others_and_is_named(flags: list, tmp_path: Path) -> None:
    argv = [*TINY, *SYNCED, "--epochs", 50, "--model_dir", tmp_path / "m", *flags]
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

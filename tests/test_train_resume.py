"""A run that is killed anywhere and resumed ends as the run that was never killed."""

import functools
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest

from tests.runs import TINY, Finished, Run, train, without_times
from utils import checkpoint as ckpt

BASE = [*TINY, "--split_factor", 2, "--epochs", 2, "--seed", 11, "--print_freq", 4, "--save_steps", 5]
CASES = {
    "plain": [],
    "everything": ["--is_mixup", 1, "--ema_decay", 0.9, "--iters_to_accumulate", 2, "--clip_grad", 1.0],
    "bf16": ["--amp_dtype", "bf16", "--optimizer", "AdamW"],
    "rmsprop": ["--optimizer", "RMSpropTF", "--val_fraction", 0.1, "--lr_mode", "step"],
}


def kill_at_call(module: str, name: str, number: int) -> None:
    """Kill this process at the `number`-th call of a function, before the call."""
    import importlib

    owner = importlib.import_module(module)
    original = getattr(owner, name)
    calls = 0

    def wrapped(*args: object, **kwargs: object) -> object:
        nonlocal calls
        calls += 1
        if calls == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)

    setattr(owner, name, wrapped)


def same_ending(folder: Path, expected: Path, result: Finished, reference: Finished) -> None:
    assert result.code == 0, result.stderr
    assert result.result["state_sha256"] == reference.result["state_sha256"]
    for name in ("metrics.jsonl", "summary.csv"):
        assert without_times(folder / name) == without_times(expected / name)
    best, other = (ckpt.load_checkpoint(f / ckpt.BEST) for f in (folder, expected))
    assert ckpt.state_sha256(best["state_dict"]) == ckpt.state_sha256(other["state_dict"])
    assert (best["epoch"], best["best_acc1"]) == (other["epoch"], other["best_acc1"])
    for key in ("last", "best", "epochs", "steps"):
        assert result.result[key] == reference.result[key]


@pytest.fixture(scope="module", params=sorted(CASES))
def unbroken(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[list, Path, Finished]:
    folder = tmp_path_factory.mktemp(request.param) / "m"
    argv = [*BASE, *CASES[request.param]]
    result = train([*argv, "--model_dir", folder], folder.parent)
    assert result.code == 0, result.stderr
    return argv, folder, result


POINTS = [
    ("os", "fsync", 1),
    ("os", "replace", 4),
    ("utils.checkpoint", "prune_checkpoints", 2),
    ("torch", "save", 3),
    ("utils.evaluation", "EvaluationCounts", 2),
]


@pytest.mark.parametrize("point", POINTS, ids=lambda p: f"{p[1]}{p[2]}")
def test_killed_at_a_chosen_point(unbroken: tuple[list, Path, Finished], point: tuple, tmp_path: Path) -> None:
    argv, expected, reference = unbroken
    argv = [*argv, "--model_dir", tmp_path / "m"]
    killed = train(argv, tmp_path, before=functools.partial(kill_at_call, *point))
    assert killed.code == -signal.SIGKILL
    result = train([*argv, "--resume", "auto"], tmp_path)
    same_ending(tmp_path / "m", expected, result, reference)


def test_killed_again_and_again_at_random_moments(unbroken: tuple[list, Path, Finished], tmp_path: Path) -> None:
    argv, expected, reference = unbroken
    argv = [*argv, "--model_dir", tmp_path / "m", "--resume", "auto"]
    chance = random.Random(str(CASES))
    began = time.monotonic()
    kills = 0
    # a run that is killed too early makes no progress, so each attempt may live longer than the one before
    for attempt in range(4):
        run = Run(argv, tmp_path / "streams")
        time.sleep(chance.uniform(0.3, 1.5) * (1 + attempt))
        run.signal(signal.SIGKILL)
        kills += run.wait().code == -signal.SIGKILL
    assert kills, f"never killed within {time.monotonic() - began:.0f} s"
    same_ending(tmp_path / "m", expected, train(argv, tmp_path), reference)


def test_sigterm_and_sigint_save_and_say_how_to_go_on(tmp_path: Path) -> None:
    argv = [*TINY, "--split_factor", 2, "--epochs", 3, "--seed", 11, "--print_freq", 1]
    reference = train([*argv, "--model_dir", tmp_path / "u"], tmp_path)
    folder = tmp_path / "m"
    for number, code in ((signal.SIGTERM, 0), (signal.SIGINT, 130)):
        run = Run([*argv, "--model_dir", folder, "--resume", "auto"], tmp_path / "streams")
        lines = 0
        while run.text().count("images/s") < 3 + lines:
            time.sleep(0.05)
            assert run.process.is_alive(), run.text()
        run.signal(number)
        stopped = run.wait(60)
        assert stopped.code == code, stopped.stderr
        assert "--resume auto" in stopped.stderr
        assert "Traceback" not in stopped.stderr
    result = train([*argv, "--model_dir", folder, "--resume", "auto"], tmp_path)
    assert result.result["state_sha256"] == reference.result["state_sha256"]
    assert without_times(folder / "metrics.jsonl") == without_times(tmp_path / "u" / "metrics.jsonl")


def test_a_damaged_newest_checkpoint_is_stepped_over(tmp_path: Path) -> None:
    argv = [*BASE, "--model_dir", tmp_path / "m"]
    first = train(argv, tmp_path)
    shutil.copytree(tmp_path / "m", tmp_path / "n")
    newest = ckpt.list_checkpoints(tmp_path / "n")[0]
    newest.write_bytes(newest.read_bytes()[:1000])
    result = train([*BASE, "--model_dir", tmp_path / "n", "--resume", "auto"], tmp_path)
    assert newest.name in result.stderr
    assert result.result["state_sha256"] == first.result["state_sha256"]


def test_resuming_with_other_networks_is_refused(tmp_path: Path) -> None:
    train([*BASE, "--max_steps", 2, "--model_dir", tmp_path / "m"], tmp_path)
    argv = [*TINY, "--split_factor", 4, "--model_dir", tmp_path / "m", "--resume", "auto"]
    result = train(argv, tmp_path)
    assert result.code == 2
    assert "--split_factor 2, and this one has --split_factor 4" in result.stderr

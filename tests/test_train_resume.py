"""A run that is killed anywhere and resumed ends as the run that was never killed."""

import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
from PIL import Image

from record import checkpoint as ckpt
from tests.kills import at_call, at_group_call, within_board, within_checkpoint, within_line
from tests.runs import TINY, Finished, Run, same_ending, train, without_times

BASE = [*TINY, "--split_factor", 2, "--epochs", 2, "--seed", 11, "--print_freq", 4, "--save_steps", 5]
# 14 steps and 4 batches of evaluation an epoch, as BASE has, but small ones: there are many runs
QUICK = [*BASE, "--dataset", "folder", "--batch_size", 4, "--eval_batch_size", 6]
CASES = {
    "plain": [],
    "everything": ["--is_mixup", 1, "--ema_decay", 0.9, "--iters_to_accumulate", 2, "--clip_grad", 1.0],
    "bf16": ["--amp_dtype", "bf16", "--optimizer", "AdamW"],
    "rmsprop": ["--optimizer", "RMSpropTF", "--val_fraction", 0.1, "--lr_mode", "step"],
    "files": ["--crop_size", 16, "--workers", 1],
    "workers": ["--crop_size", 16, "--workers", 2, "--iters_to_accumulate", 3, "--val_fraction", 0.2],
}

POINTS = {
    "before a flush to the disk": at_call("flush to the disk", 1),
    "before a rename": at_call("rename", 4),
    "before old checkpoints are dropped": at_call("dropping old checkpoints", 2),
    "before a checkpoint": at_call("checkpoint", 3),
    "within an evaluation": at_call("batch of an evaluation", 6),
    "within a checkpoint": within_checkpoint(4),
    "within a line of metrics.jsonl": within_line("metrics.jsonl", 3),
    "within a line of summary.csv": within_line("summary.csv", 2),
    "within a record of TensorBoard": within_board(60),
}
# every point with the flags that have most to restore, every set of flags with some of the points
CHOSEN = {
    "plain": ["before a flush to the disk", "within an evaluation"],
    "everything": list(POINTS),
    "bf16": ["before a rename", "within a checkpoint"],
    "rmsprop": ["before old checkpoints are dropped", "within an evaluation", "within a line of metrics.jsonl"],
    "files": ["before a checkpoint", "within a record of TensorBoard"],
    "workers": ["before a rename"],
}
SIGNALLED = {
    "within an accumulation group": at_group_call("training step", 2, signal.SIGINT),
    "while waiting for images": at_group_call("wait for images", 5, signal.SIGTERM),
    "within an evaluation": at_group_call("batch of an evaluation", 2, signal.SIGINT),
}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of JPEG and PNG files: in `large` too large to be kept decoded, in `small` not."""
    root = tmp_path_factory.mktemp("images")
    for data, side in (("large", 66), ("small", 16)):
        for split, count in (("train", 28), ("val", 12)):
            for label, name in enumerate(("ant", "bee")):
                folder = root / data / split / name
                folder.mkdir(parents=True)
                for i in range(count):
                    image = Image.linear_gradient("L").resize((side, side + i % 3)).rotate(90 * label + 7 * i)
                    image.convert("RGB").save(folder / f"{i}.{'jpg' if i % 2 else 'png'}")
    return root


def only(suite: pytest.MarkDecorator, *, but: tuple[str, ...]) -> pytest.MarkDecorator:
    """All sets of flags; those that are not in `but` carry the marker."""
    cases = [pytest.param(case, marks=() if case in but else suite) for case in sorted(CASES)]
    return pytest.mark.parametrize("unbroken", cases, indirect=True)


class Unbroken(NamedTuple):
    """A run that nothing stopped: its case, command line, folder and result, and the seconds it took."""

    case: str
    argv: list
    folder: Path
    result: Finished
    seconds: float


@pytest.fixture(scope="module")
def unbroken(request: pytest.FixtureRequest, images: Path, tmp_path_factory: pytest.TempPathFactory) -> Unbroken:
    folder = tmp_path_factory.mktemp(request.param) / "m"
    data = images / ("large" if "--workers" in CASES[request.param] else "small")
    argv = [*QUICK, *CASES[request.param], "--data", data]
    began = time.monotonic()
    result = train([*argv, "--model_dir", folder], folder.parent)
    assert result.code == 0, result.stderr
    return Unbroken(request.param, argv, folder, result, time.monotonic() - began)


@only(pytest.mark.slow, but=("plain",))
def test_killed_at_chosen_points(
    unbroken: Unbroken, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    case, argv, expected, reference, _ = unbroken
    for number, point in enumerate(CHOSEN[case]):
        folder = tmp_path / str(number)
        here = [*argv, "--model_dir", folder / "m"]
        assert train(here, folder, before=POINTS[point]).code == -signal.SIGKILL, point
        record_property("kills", 1)
        same_ending(folder / "m", expected, train([*here, "--resume", "auto"], folder), reference)
        record_property("identical", 1)


@pytest.mark.slow
@only(pytest.mark.long, but=("everything", "files"))
def test_killed_again_and_again_at_random_moments(
    unbroken: Unbroken, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    case, argv, expected, reference, seconds = unbroken
    argv = [*argv, "--model_dir", tmp_path / "m", "--resume", "auto"]
    chance = random.Random(case)
    kills = 0
    # a run that is killed too early makes no progress, so each attempt may live longer than the one before
    for attempt in range(3):
        run = Run(argv, tmp_path / "streams")
        time.sleep(chance.uniform(0.1, 0.3) * (1 + attempt) * seconds)
        run.signal(signal.SIGKILL)
        kills += run.wait().code == -signal.SIGKILL
    assert kills, f"never killed, although a whole run took {seconds:.1f} s"
    record_property("kills", kills)
    same_ending(tmp_path / "m", expected, train(argv, tmp_path), reference)
    record_property("identical", kills)


def obeyed(run: Run, number: int | None) -> bool:
    """Whether a run that all its processes were signalled in stopped as it should; False: it had come to its end."""
    began = time.monotonic()
    stopped = run.wait(60)
    assert time.monotonic() - began < 30
    assert "Traceback" not in stopped.stderr
    assert "decoding process" not in stopped.stderr
    if stopped.code == 0 and stopped.stdout:
        return False
    last = stopped.stderr.strip().splitlines()[-1]
    assert last.startswith("train_split.py: stopped; "), stopped.stderr
    assert last.endswith("Go on with --resume auto.")
    assert stopped.code == {signal.SIGTERM: 0, signal.SIGINT: 130}.get(number, stopped.code), stopped.stderr
    return True


@pytest.mark.slow
@only(pytest.mark.long, but=("workers",))
def test_signals_to_all_processes_at_random_moments(
    unbroken: Unbroken, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    case, argv, expected, reference, seconds = unbroken
    argv = [*argv, "--model_dir", tmp_path / "m", "--resume", "auto"]
    chance = random.Random(case)
    kills = 0
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGINT, signal.SIGTERM):
        run = Run(argv, tmp_path / "streams", own_group=True)
        time.sleep(chance.uniform(0.1, 0.7) * seconds)
        run.signal_group(number)
        kills += obeyed(run, number)
    assert kills, f"never stopped, although a whole run took {seconds:.1f} s"
    record_property("kills", kills)
    same_ending(tmp_path / "m", expected, train(argv, tmp_path), reference)
    record_property("identical", kills)


@pytest.mark.slow
@pytest.mark.parametrize("unbroken", ["workers"], indirect=True)
def test_signals_to_all_processes_at_chosen_points(
    unbroken: Unbroken, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    _, argv, expected, reference, _ = unbroken
    for number, (point, hook) in enumerate(SIGNALLED.items()):
        folder = tmp_path / str(number)
        here = [*argv, "--model_dir", folder / "m"]
        run = Run(here, folder / "streams", before=hook, own_group=True)
        assert obeyed(run, None), point
        assert "a checkpoint was saved" in run.text(), point
        record_property("kills", 1)
        same_ending(folder / "m", expected, train([*here, "--resume", "auto"], folder), reference)
        record_property("identical", 1)


@pytest.mark.slow
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


@pytest.mark.slow
def test_a_damaged_newest_checkpoint_is_stepped_over(tmp_path: Path) -> None:
    argv = [*BASE, "--model_dir", tmp_path / "m"]
    first = train(argv, tmp_path)
    shutil.copytree(tmp_path / "m", tmp_path / "n")
    newest = ckpt.list_checkpoints(tmp_path / "n")[0]
    newest.write_bytes(newest.read_bytes()[:1000])
    result = train([*BASE, "--model_dir", tmp_path / "n", "--resume", "auto"], tmp_path)
    assert newest.name in result.stderr
    assert result.result["state_sha256"] == first.result["state_sha256"]


@pytest.mark.slow
def test_resuming_with_other_networks_is_refused(tmp_path: Path) -> None:
    train([*BASE, "--max_steps", 2, "--model_dir", tmp_path / "m"], tmp_path)
    argv = [*TINY, "--split_factor", 4, "--model_dir", tmp_path / "m", "--resume", "auto"]
    result = train(argv, tmp_path)
    assert result.code == 2
    assert "--split_factor 2, and this one has --split_factor 4" in result.stderr

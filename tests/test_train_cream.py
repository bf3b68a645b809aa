"""A Cream search through the command line: resumed exactly, its files and pictures, and what becomes of its result."""

import functools
import json
import signal

import pytest
import yaml
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.runs import Run, train, without_times
from tests.test_train_resume import kill_at_call
from utils import checkpoint as ckpt

# 14 steps an epoch; the board opens with the second epoch, and the meta layer learns twice in it and in the third
SEARCH = [
    *("--config", "script/cream/tiny.yaml", "--epochs", 3, "--meta_sta_epoch", 0, "--update_iter", 5),
    *("--batch_size", 96, "--seed", 7, "--no_cuda", "--workers", 0, "--save_steps", 10),
]


@pytest.fixture(scope="module")
def searched(tmp_path_factory):
    folder = tmp_path_factory.mktemp("search") / "m"
    result = train([*SEARCH, "--model_dir", folder], folder.parent)
    assert result.code == 0, result.stderr
    return folder, result


def test_a_search_killed_in_its_middle_ends_as_if_it_had_not_been(searched, tmp_path):
    expected, reference = searched
    argv = [*SEARCH, "--model_dir", tmp_path / "m"]
    # step 25: behind the checkpoint of step 20, with teachers, a meta update and a board that has to come back
    before = functools.partial(kill_at_call, "train_split", "train_step", 25)
    assert train(argv, tmp_path, before=before).code == -signal.SIGKILL
    assert json.loads((tmp_path / "m" / "board.json").read_text())["board"] == []
    result = train([*argv, "--resume", "auto"], tmp_path)
    assert result.code == 0, result.stderr
    assert result.result["state_sha256"] == reference.result["state_sha256"]
    for name in ("board.json", "found.yaml", "board.png", "found.png"):
        assert (tmp_path / "m" / name).read_bytes() == (expected / name).read_bytes(), name
    for name in ("metrics.jsonl", "summary.csv"):
        assert without_times(tmp_path / "m" / name) == without_times(expected / name)
    ours, theirs = (
        ckpt.load_checkpoint(folder / "checkpoint_3.pth.tar")["method"] for folder in (tmp_path / "m", expected)
    )
    assert ckpt.state_sha256(_tensors(ours)) == ckpt.state_sha256(_tensors(theirs))
    assert len(ours["board"]) == 5


def _tensors(value, name=""):
    """Every tensor of a nested state by its path."""
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return {k: v for key, part in items for k, v in _tensors(part, f"{name}/{key}").items()}
    return {name: value} if hasattr(value, "shape") else {}


def test_the_search_writes_its_board_and_pictures(searched):
    folder, _ = searched
    board = json.loads((folder / "board.json").read_text())
    assert [snapshot["epoch"] for snapshot in board["history"]] == [1, 2]
    assert board["history"][-1]["entries"] == board["board"]
    flags = yaml.safe_load((folder / "found.yaml").read_text())
    assert json.loads(flags["arch_list"]) == board["board"][0]["arch"]
    events = EventAccumulator(str(folder / "val"))
    events.Reload()
    for tag in ("board", "found"):
        with Image.open(folder / f"{tag}.png") as picture:
            shown = events.Images(tag)[-1]
            assert (shown.width, shown.height) == picture.size
        assert [event.step for event in events.Images(tag)][:2] == [2, 3]


def test_what_was_found_is_retrained_divided_and_evaluated(searched, tmp_path):
    folder, _ = searched
    argv = ["--config", folder / "found.yaml", "--dataset", "digits", "--no_cuda", "--workers", 0, "--epochs", 1]
    argv += ["--seed", 1, "--batch_size", 96, "--ema_decay", 0.5]
    one = train([*argv, "--model_dir", tmp_path / "one"], tmp_path)
    assert one.code == 0, one.stderr
    two = train([*argv, "--split_factor", 2, "--model_dir", tmp_path / "two"], tmp_path)
    assert two.code == 0, two.stderr
    assert len(two.result["acc1"]) == 2
    assert two.result["params_one"] < one.result["params_one"]
    argv = ["--resume", tmp_path / "two" / "checkpoint_1.pth.tar", "--weights", "ema", "--no_cuda", "--workers", 0]
    tested = Run(argv, tmp_path / "streams", module="eval").wait()
    assert tested.code == 0, tested.stderr
    assert tested.result["weights"] == "ema"
    assert tested.result["ensemble_acc1"] == two.result["ensemble_acc1"]

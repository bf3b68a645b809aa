"""A Cream search through the command line: resumed exactly, its files and pictures, and what becomes of its result."""

import argparse
import json
import signal

import pytest
import torch
import yaml
from PIL import Image
from scipy.stats import kendalltau
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import train_split
from benchmarks import cream_rank
from model.backbone.cream import CreamNet
from model.search.supernet import Supernet
from record import checkpoint as ckpt
from tests import kills
from tests.runs import Run, train, without_times
from utils.errors import UserError

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


@pytest.mark.slow
def test_a_search_killed_in_its_middle_ends_as_if_it_had_not_been(searched, tmp_path):
    expected, reference = searched
    argv = [*SEARCH, "--model_dir", tmp_path / "m"]
    # step 25: behind the checkpoint of step 20, with teachers, a meta update and a board that has to come back
    before = kills.at_call("training step", 25)
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


@pytest.mark.parametrize(
    ("kind", "argv"),
    [
        (CreamNet, ["--arch", "cream_14", "--method", "independent", "--dataset", "digits"]),
        (Supernet, ["--config", "script/cream/tiny.yaml", "--meta_sta_epoch", 0, "--update_iter", 1]),
    ],
    ids=["network", "supernet"],
)
def test_a_run_begun_with_the_parts_in_the_old_order_goes_on(kind, argv, tmp_path, monkeypatch, capsys):
    """Until the order became the released files', the blocks stood behind head and classifier."""
    argv = [*argv, "--epochs", 2, "--optimizer", "SGD", "--seed", 3, "--no_cuda", "--workers", 0, "--batch_size", 96]
    build = kind.__init__

    def build_in_old_order(self, *arguments, **named):
        build(self, *arguments, **named)
        for name in ("blocks", "meta_layer"):
            if name in self._modules:
                self._modules[name] = self._modules.pop(name)

    def run(folder, steps, *more):
        flags = [*argv, "--model_dir", tmp_path / folder, "--max_steps", steps, *more]
        assert train_split.main([str(flag) for flag in flags]) == 0, capsys.readouterr().err
        return ckpt.load_checkpoint(ckpt.list_checkpoints(tmp_path / folder)[0])

    with monkeypatch.context() as old:
        old.setattr(kind, "__init__", build_in_old_order)
        expected = run("whole", 5)
        half = run("half", 3)
    keys = [key.split(".")[3] for key in half["state_dict"]]
    assert keys.index("classifier") < keys.index("blocks")
    found = run("half", 5, "--resume", "auto")
    keys = [key.split(".")[3] for key in found["state_dict"]]
    assert keys.index("blocks") < keys.index("conv_head") < keys.index("classifier")
    assert found["state_dict"].keys() == expected["state_dict"].keys()
    for key, value in found["state_dict"].items():
        assert torch.equal(value, expected["state_dict"][key]), key
    assert list(found["state_dict"]) != list(expected["state_dict"])
    assert ckpt.state_sha256(_tensors(found["method"])) == ckpt.state_sha256(_tensors(expected["method"]))


def _tensors(value, name=""):
    """Every tensor of a nested state by its path."""
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return {k: v for key, part in items for k, v in _tensors(part, f"{name}/{key}").items()}
    return {name: value} if hasattr(value, "shape") else {}


@pytest.mark.slow
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


@pytest.mark.slow
def test_what_was_found_is_retrained_divided_and_evaluated(searched, tmp_path):
    folder, _ = searched
    argv = ["--config", folder / "found.yaml", "--dataset", "digits", "--no_cuda", "--workers", 0, "--epochs", 1]
    argv += ["--seed", 1, "--batch_size", 96, "--ema_decay", 0.5, "--is_amp", 0]  # eval.py computes in float32
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


# ---- shared-weight and stand-alone accuracy (benchmarks/cream_rank.py) -----------------------------------------------


@pytest.mark.parametrize(
    ("first", "second"),
    [([1, 2, 3, 4], [1, 3, 2, 4]), ([1, 2, 2, 5, 0], [3, 3, 1, 9, 2]), ([4, 3, 2, 1], [1, 2, 3, 4])],
)
def test_kendall_tau_is_tau_b(first, second):
    assert cream_rank.kendall_tau(first, second) == pytest.approx(kendalltau(first, second).statistic, abs=1e-12)
    assert cream_rank.kendall_tau(first, [1.0] * len(first)) is None


@pytest.mark.slow
def test_paths_are_ranked_by_shared_weights_and_alone(searched, tmp_path, monkeypatch):
    folder, _ = searched
    (tmp_path / "search").symlink_to(folder)
    runs = []

    def trained(flags):
        runs.append(flags)
        return {"ensemble_acc1": float(len(runs)), "steps": 3}

    monkeypatch.setattr(cream_rank, "train", trained)
    options = argparse.Namespace(config="c.yaml", out=str(tmp_path), paths=3, epochs=2, seed=5, like_found=0.1)
    result = cream_rank.compare(options, ["--workers", "0"])
    rows = result["paths"]
    assert [row["found"] for row in rows] == [True, False, False, False]
    assert json.dumps(rows[0]["arch"]) == yaml.safe_load((folder / "found.yaml").read_text())["arch_list"]
    assert len({json.dumps(row["arch"]) for row in rows}) == 4
    assert all(abs(row["macs"] / rows[0]["macs"] - 1) <= 0.1 for row in rows)
    assert len({row["shared_acc1"] for row in rows}) > 1
    assert [row["alone_acc1"] for row in rows] == [2.0, 3.0, 4.0, 5.0]  # the first run was the search
    assert result["tau"] == cream_rank.kendall_tau([row["shared_acc1"] for row in rows], [2.0, 3.0, 4.0, 5.0])
    assert json.loads((tmp_path / "cream_rank.json").read_text())["paths"] == rows
    for row, flags in zip(rows, runs[1:], strict=True):
        assert json.loads(flags[flags.index("--arch_list") + 1]) == row["arch"]
        assert {"--dataset=digits", "--crop_size=16", "--workers"} < set(flags)
    again = cream_rank.compare(argparse.Namespace(**{**vars(options), "like_found": None}), [])
    assert [row["found"] for row in again["paths"]] == [False] * 3
    # the newest checkpoint's own path, evaluated as training evaluated it
    session, supernet = cream_rank.open_supernet(folder)
    last = json.loads((folder / "results.json").read_text())["ensemble_acc1"]
    assert cream_rank.shared_accuracies(session, supernet, [supernet.default_path]) == [last]
    monkeypatch.setattr(cream_rank, "TRIES", 1000)
    with pytest.raises(UserError, match="--paths 9999"):
        cream_rank.draw_paths(supernet, 9999, 0, found=None, tolerance=0.0)

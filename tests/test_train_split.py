"""The training command from flags to files: what it prints, what it writes, what it refuses."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import train_split
from model.restore import published_keys
from parser_params import parse_config
from record.checkpoint import load_checkpoint, save_checkpoint, state_sha256
from record.plots import read_curves
from tests.runs import TINY, Finished, train


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Finished]:
    """A short S = 2 run that the tests below look at."""
    folder = tmp_path_factory.mktemp("run") / "model"
    argv = [*TINY, "--split_factor", 2, "--epochs", 2, "--model_dir", folder, "--seed", 3, "--print_freq", 4]
    result = train(argv, folder.parent)
    assert result.code == 0, result.stderr
    return folder, result


def test_last_line_is_the_json_of_results(finished: tuple[Path, Finished]) -> None:
    folder, run = finished
    result = run.result
    assert json.loads((folder / "results.json").read_text()) == result
    assert run.stdout.count("\n") == 1
    for key in ("params_one", "params_total", "macs_total", "seconds", "images_per_second", "state_sha256"):
        assert result[key]
    assert result["epochs"] == 2
    assert len(result["acc1"]) == 2
    assert result["params_total"] == 2 * result["params_one"]
    assert result["last"]["ensemble_acc1"] == result["ensemble_acc1"]
    assert result["best"]["ensemble_acc1"] == result["best_ensemble_acc1"] >= result["ensemble_acc1"]
    assert 0 <= result["ensemble_acc1"] <= 100


def test_run_directory_is_complete(finished: tuple[Path, Finished]) -> None:
    folder, _ = finished
    names = {path.name for path in folder.iterdir()}
    assert {
        "hparams_train.json",
        "metrics.jsonl",
        "summary.csv",
        "results.json",
        "env.json",
        "train.log",
        "val",
        "checkpoint_1.pth.tar",
        "checkpoint_2.pth.tar",
        "model_best.pth.tar",
        "curves.png",
    } <= names
    with Image.open(folder / "curves.png") as curves:
        assert curves.size[0] > 400
    hparams = json.loads((folder / "hparams_train.json").read_text())
    assert hparams["epochs"] == {"value": 2, "origin": "flag"}
    assert hparams["momentum"] == {"value": 0.9, "origin": "recipe"}
    assert hparams["cot_weight"]["value"] == 0.5


def test_checkpoint_is_published_and_self_contained(finished: tuple[Path, Finished]) -> None:
    folder, run = finished
    content = load_checkpoint(folder / "checkpoint_2.pth.tar")
    assert {"epoch", "arch", "state_dict", "best_acc1", "optimizer"} <= set(content)
    assert (content["epoch"], content["arch"]) == (2, "resnet20")
    assert all(key.startswith("module.models.") for key in content["state_dict"])
    assert content["classes"] == [str(i) for i in range(10)]
    assert len(content["mean"]) == len(content["std"]) == 3
    assert content["crop_size"] == 16
    assert state_sha256(content["state_dict"]) == run.result["state_sha256"]
    assert published_keys({}) == {}


def test_logs_agree_with_each_other(finished: tuple[Path, Finished]) -> None:
    folder, run = finished
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [r["step"] for r in records if r["kind"] == "train"]
    assert steps == [3, 7, 11, 13, 17, 21, 25, 27]  # every fourth step, and the last of each epoch of 14
    evaluations = [r for r in records if r["kind"] == "eval"]
    rows = list(csv.DictReader((folder / "summary.csv").read_text().splitlines()))
    assert [int(row["epoch"]) for row in rows] == [r["epoch"] for r in evaluations] == [1, 2]
    assert float(rows[1]["ensemble_acc1"]) == pytest.approx(run.result["ensemble_acc1"], rel=1e-5)
    assert evaluations[1]["test"]["ensemble_acc1"] == run.result["ensemble_acc1"]
    assert {"nll", "brier", "ece", "disagreement"} <= set(evaluations[0]["test"])
    assert all(0 <= r["data_wait"] <= 1 for r in records if r["kind"] == "train")


def test_tensorboard_has_the_published_tags(finished: tuple[Path, Finished]) -> None:
    folder, run = finished
    board = EventAccumulator(str(folder / "val"))
    board.Reload()
    tags = board.Tags()
    published = {"avg_acc1", "avg_acc5", "1_acc1", "2_acc1", "best_acc1", "learning_rate"}
    assert published | {"train_loss", "train_loss_ce", "train_loss_cot"} <= set(tags["scalars"])
    assert "views" in tags["images"]
    assert [event.step for event in board.Scalars("avg_acc1")] == [1, 2]
    assert board.Scalars("avg_acc1")[1].value == pytest.approx(run.result["ensemble_acc1"], rel=1e-5)


def test_the_logs_have_the_names_of_results_json(finished: tuple[Path, Finished]) -> None:
    folder, run = finished
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [r["epoch"] for r in records if r["kind"] == "train"] == [1] * 4 + [2] * 4  # as every other count of epochs
    assert all(r["loss_per_network"] == r["loss"] / 2 for r in records if r["kind"] == "train")
    board = EventAccumulator(str(folder / "val"))
    board.Reload()
    row = list(csv.DictReader((folder / "summary.csv").read_text().splitlines()))[-1]
    for name in ("ensemble_acc1", "ensemble_nll", "ensemble_ece", "disagreement", "loss"):
        found = [records[-1]["test"][name], float(row[name]), board.Scalars(f"eval/{name}")[-1].value]
        assert found == pytest.approx([run.result[name]] * 3, rel=1e-5), name
    for name in ("train_loss", "train_loss_per_network"):
        found = [records[-1][name], float(row[name]), board.Scalars(name)[-1].value]
        assert found == pytest.approx([run.result[name]] * 3, rel=1e-5), name
    assert run.result["train_loss"] == 2 * run.result["train_loss_per_network"]
    assert run.result["loss"] == pytest.approx(sum(records[-1]["test"]["nll"]) / 2)


def test_the_same_seed_gives_the_same_weights_and_another_does_not(
    finished: tuple[Path, Finished], tmp_path: Path
) -> None:
    argv = [*TINY, "--split_factor", 2, "--epochs", 2, "--print_freq", 9]
    same = train([*argv, "--model_dir", tmp_path / "a", "--seed", 3, "--workers", 0], tmp_path)
    other = train([*argv, "--model_dir", tmp_path / "b"], tmp_path)
    assert same.result["state_sha256"] == finished[1].result["state_sha256"]
    assert other.result["state_sha256"] != same.result["state_sha256"]
    assert isinstance(other.result["seed"], int)


def test_a_used_run_directory_is_refused(finished: tuple[Path, Finished]) -> None:
    folder, _ = finished
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    again = train([*TINY, "--epochs", 1, "--model_dir", folder], folder.parent)
    assert again.code == 2
    assert "already holds a run" in again.stderr
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before


def test_resume_auto_of_a_finished_run_prints_its_results(finished: tuple[Path, Finished]) -> None:
    folder, run = finished
    argv = [*TINY, "--split_factor", 2, "--epochs", 2, "--model_dir", folder, "--print_freq", 4, "--resume", "auto"]
    again = train(argv, folder.parent)
    assert (again.code, again.result) == (0, run.result)


OLDER_COLUMNS = "epoch step learning_rate ensemble_acc1 ensemble_acc5 acc1_1 acc1_2 best_acc1 train_loss train_acc1"


def as_an_earlier_version(folder: Path) -> None:
    """Make of a run directory what a version left that counted epochs from 0 and knew no loss per network."""
    metrics, summary = folder / "metrics.jsonl", folder / "summary.csv"
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    for line in lines:
        if line["kind"] == "train":
            line["epoch"] -= 1
            del line["loss_per_network"]
    metrics.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    rows = list(csv.DictReader(summary.read_text().splitlines()))
    columns = [*OLDER_COLUMNS.split(), "seconds"]
    table = [columns, *([row[name] for name in columns] for row in rows)]
    summary.write_text("".join(f"{','.join(row)}\n" for row in table))
    for path in folder.glob("*.pth.tar"):
        content = load_checkpoint(path)
        for which in ("last", "best"):
            known = ("epoch", "step", "ensemble_acc1", "ensemble_acc5", "acc1", "extra", "criterion")
            content["report"][which] = {name: content["report"][which][name] for name in known}
        save_checkpoint(content, path)


def test_a_folder_of_an_earlier_version_goes_on_with_its_columns_and_its_count(
    finished: tuple[Path, Finished], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(finished[0], tmp_path / "m"))
    as_an_earlier_version(folder)
    argv = [*TINY, "--split_factor", 2, "--epochs", 3, "--model_dir", folder, "--print_freq", 9, "--resume", "auto"]
    run = train(argv, tmp_path)
    assert run.code == 0, run.stderr
    rows = list(csv.DictReader((folder / "summary.csv").read_text().splitlines()))
    assert [(row["epoch"], len(row), None in row) for row in rows] == [(str(i), 11, False) for i in (1, 2, 3)]
    assert float(rows[2]["train_loss"]) == pytest.approx(run.result["train_loss"], rel=1e-5)
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [r["epoch"] for r in records if r["kind"] == "train"] == [0] * 4 + [1] * 4 + [2] * 2
    curves = read_curves(folder)
    assert (curves.trained[-1], len(curves.losses["loss_per_network"])) == (3.0, 10)
    assert run.result["ensemble_nll"] == records[-1]["test"]["ensemble_nll"]


def test_pretrained_with_a_head_of_another_size(finished: tuple[Path, Finished], tmp_path: Path) -> None:
    folder, _ = finished
    argv = ["--dataset", "synthetic", "--num_classes", 3, "--crop_size", 16, "--arch", "resnet20", "--split_factor", 2]
    argv += ["--max_steps", 1, "--lr_multiplier", 10, "--pretrained", folder / "model_best.pth.tar", "--lr", "1e-12"]
    run = train(
        [*argv, "--slow_start_lr", "1e-12", "--end_lr", 0, "--model_dir", tmp_path / "m", "--no_cuda"], tmp_path
    )
    assert run.code == 0, run.stderr
    assert "models.0.fc" in run.stderr
    before = load_checkpoint(folder / "model_best.pth.tar")["state_dict"]
    after = load_checkpoint(tmp_path / "m" / "model_best.pth.tar")["state_dict"]
    assert after["module.models.1.fc.weight"].shape[0] == 3
    key = "module.models.1.layer2.0.conv1.weight"
    torch.testing.assert_close(after[key], before[key], rtol=0, atol=1e-6)


def folder_of_images(root: Path, size: int, per_class: int = 12) -> Path:
    generator = np.random.default_rng(0)
    for split in ("train", "val"):
        for number, name in enumerate(("ant", "bee", "cat")):
            target = root / split / name
            target.mkdir(parents=True)
            for i in range(per_class):
                pixels = generator.integers(0, 80, (size, size, 3), dtype=np.uint8)
                pixels[..., number] += 120
                Image.fromarray(pixels).save(target / f"{i}.png")
    return root


def test_a_folder_of_small_images_trains_in_memory(tmp_path: Path) -> None:
    data = folder_of_images(tmp_path / "data", 24)
    argv = ["--dataset", "folder", "--data", data, "--arch", "resnet20", "--split_factor", 2, "--batch_size", 12]
    run = train([*argv, "--epochs", 1, "--model_dir", tmp_path / "m", "--seed", 1, "--no_cuda"], tmp_path)
    assert run.code == 0, run.stderr
    content = load_checkpoint(tmp_path / "m" / "checkpoint_1.pth.tar")
    assert content["classes"] == ["ant", "bee", "cat"]
    assert (content["crop_size"], content["data_recipe"]) == (24, "cifar10")


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_folder_of_large_images_trains_through_workers(tmp_path: Path, workers: int) -> None:
    data = folder_of_images(tmp_path / "data", 80, per_class=6)
    argv = ["--dataset", "folder", "--data", data, "--arch", "resnet20", "--split_factor", 2, "--batch_size", 9]
    argv += ["--crop_size", 32, "--workers", workers, "--max_steps", 2, "--seed", 1, "--amp_dtype", "fp32", "--no_cuda"]
    run = train([*argv, "--model_dir", tmp_path / "m"], tmp_path)
    assert run.code == 0, run.stderr
    # the same numbers for any number of workers; the pictures are the same, so one value serves both cases
    reference = train([*argv, "--workers", 1, "--model_dir", tmp_path / "n"], tmp_path)
    assert run.result["state_sha256"] == reference.result["state_sha256"]


def test_an_incomplete_accumulation_group_still_updates_the_weights(tmp_path: Path) -> None:
    argv = [*TINY, "--iters_to_accumulate", 3, "--max_steps", 4, "--optimizer", "AdamW", "--ema_decay", 0.9]
    run = train([*argv, "--model_dir", tmp_path / "m"], tmp_path)
    assert run.result["steps"] == 4
    content = load_checkpoint(tmp_path / "m" / "checkpoint_0_4.pth.tar")
    assert {int(state["step"]) for state in content["optimizer"]["state"].values()} == {2}
    assert set(content["ema"]) == set(content["state_dict"])
    key = "module.models.0.fc.weight"
    assert not torch.equal(content["ema"][key], content["state_dict"][key])


@pytest.mark.parametrize(("drop_last", "steps"), [(1, 14), (0, 15)])
def test_the_images_that_fill_no_batch_are_left_out_or_not(drop_last: int, steps: int, tmp_path: Path) -> None:
    argv = [*TINY, "--epochs", 1, "--print_freq", 1, "--drop_last", drop_last]
    run = train([*argv, "--model_dir", tmp_path / "m"], tmp_path)
    assert run.result["steps"] == steps == -(-1438 // 96) - drop_last
    assert load_checkpoint(tmp_path / "m" / "checkpoint_1.pth.tar")["clock"]["images"] == (
        1438 if not drop_last else 1344
    )


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--dataset", "digits", "--arch", "resnet21"], "--arch 'resnet21' is not a known backbone. Did you mean"),
        (["--dataset", "digits", "--arch", "resnet20", "--split_factor", 3], "--split_factor 3 is not possible"),
        (["--dataset", "folder", "--arch", "resnet20", "--data", "/nowhere"], "/nowhere"),
        (["--dataset", "imagenet", "--arch", "resnet50", "--data", "/nowhere"], "/nowhere"),
        (["--dataset", "imagenet", "--arch", "resnet20"], "--data data_dir is not a folder"),
        (["--dataset", "synthetic", "--arch", "resnet20"], "--num_classes"),
        (["--dataset", "digits", "--arch", "resnet20", "--num_classes", 7], "--num_classes"),
        (
            ["--dataset", "digits", "--method", "l_mcl", "--arch", "lmcl_resnet20_cifar", "--drop_last", 0],
            "--drop_last 0",
        ),
        (
            [
                "--is_summary",
                "1",
                "--dataset",
                "digits",
                "--method",
                "l_mcl",
                "--arch",
                "lmcl_resnet20_cifar",
                "--split_factor",
                "3",
            ],
            "--split_factor 3 cannot go with the 2 full networks",
        ),
        (["--dataset", "digits", "--arch", "resnet20", "--gpu", 7], "--gpu 7: no such GPU"),
        (["--dataset", "digits", "--arch", "resnet20", "--resume", "/nowhere.pth.tar"], "--resume /nowhere.pth.tar"),
        (["--dataset", "digits", "--arch", "resnet20", "--pretrained", "/nowhere.pth.tar"], "--pretrained /nowhere"),
        (["--dataset", "digits", "--arch", "resnet20", "--pretrained"], "--pretrained library takes"),
        (
            ["--dataset", "digits", "--arch", "resnet20", "--amp_dtype", "fp16", "--no_cuda"],
            "--amp_dtype fp16 needs a GPU",
        ),
    ],
)
def test_mistakes_are_one_line_and_exit_2(argv: list[object], message: str, tmp_path: Path) -> None:
    run = train([*argv, "--model_dir", tmp_path / "m", "--epochs", 1], tmp_path)
    assert run.code == 2, run.stderr
    last = run.stderr.strip().splitlines()[-1]
    assert last.startswith("train_split.py: ")
    assert message in last
    assert "Traceback" not in run.stderr
    assert run.stdout == ""


def test_a_name_with_two_forms_says_that_small_images_have_the_small_one(tmp_path: Path) -> None:
    argv = ["--dataset", "synthetic", "--num_classes", 3, "--crop_size", 16, "--split_factor", 4, "--no_cuda"]
    argv += ["--max_steps", 1, "--batch_size", 4, "--seed", 1]
    lines = []
    for arch in ("resnet50", "resnet20"):
        run = train([*argv, "--arch", arch, "--model_dir", tmp_path / arch], tmp_path)
        assert run.code == 0, run.stderr
        lines += [line for line in run.stderr.splitlines() if "CIFAR form" in line]
    assert len(lines) == 1
    assert lines[0].startswith("resnet50: the CIFAR form, for images of 16 pixels")


@pytest.mark.slow
def test_ablations_and_ensemble_loss_run(tmp_path: Path) -> None:
    common = [*TINY, "--split_factor", 2, "--max_steps", 2, "--seed", 1]
    alone = train([*common, "--is_train_sep", 1, "--model_dir", tmp_path / "a"], tmp_path)
    assert alone.result["split_factor"] == 1
    assert alone.result["params_one"] == alone.result["params_total"]
    same = [*common, "--is_identical_init", 1, "--is_diff_data_train", 0, "--is_ensembled_loss", 1]
    equal = train([*same, "--model_dir", tmp_path / "b"], tmp_path)
    assert equal.result["acc1"][0] == equal.result["acc1"][1] == equal.result["ensemble_acc1"]
    for choice in ("kl_separate", "kl_mean", "mse_seperate", "smooth_l1_mean"):
        run = train([*common, "--cot_loss_choose", choice, "--model_dir", tmp_path / choice], tmp_path)
        assert run.code == 0, run.stderr


def test_summary_needs_no_data(tmp_path: Path) -> None:
    argv = ["--is_summary", 1, "--arch", "wide_resnet28_10", "--dataset", "cifar100", "--split_factor", 2]
    run = train([*argv, "--data", "/nowhere", "--model_dir", tmp_path / "m"], tmp_path)
    assert run.code == 0, run.stderr
    assert {k: run.result[k] for k in ("params_one", "params_total", "macs_total", "crop")} == {
        "params_one": 17927508,
        "params_total": 35855016,
        "macs_total": 5150006784,
        "crop": 32,
    }
    assert json.loads((tmp_path / "m" / "results.json").read_text()) == run.result


def test_nonfinite_loss_stops_the_run_and_names_step_and_network(tmp_path: Path) -> None:
    argv = [*TINY, "--split_factor", 2, "--epochs", 3, "--model_dir", tmp_path / "m", "--seed", 1, "--print_freq", 1]
    run = train([*argv, "--lr", "1e30", "--slow_start_lr", "1e30"], tmp_path)
    assert run.code == 1
    assert "non-finite loss or gradient at step" in run.stderr
    assert "Traceback" not in run.stderr
    skipping = [*argv, "--lr", "1e30", "--slow_start_lr", "1e30", "--on_nonfinite", "skip", "--nonfinite_limit", 3]
    run = train([*skipping, "--model_dir", tmp_path / "n"], tmp_path)
    assert run.code == 1
    assert "more than --nonfinite_limit 3" in run.stderr


@pytest.mark.parametrize(("flags", "said"), [([], True), (["--no_cuda"], False)])
def test_a_gpu_that_stays_idle_is_said_to(monkeypatch, caplog, flags, said):
    monkeypatch.setattr(train_split.launch, "unused_gpu", lambda: "This machine seems to have a GPU, but …")
    monkeypatch.setattr(train_split, "set_up_text_log", lambda *_, **__: None)
    monkeypatch.setattr(train_split, "run_in", lambda world, config: {})
    config = parse_config(["--dataset", "digits", "--arch", "resnet20", *flags], program="train_split.py")
    with caplog.at_level("WARNING"):
        train_split.run(config)
    assert ("This machine seems to have a GPU" in caplog.text) == said

"""Images as people have them: from a folder without a split, and no further flag, to a prediction."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.runs import train
from tests.test_dataset_shards import samples, write_parquet, write_tar
from tests.test_train_distributed import train_together

FLAGS = ["--no_cuda", "--workers", 0, "--seed", 1, "--amp_dtype", "fp32", "--batch_size", 8, "--print_freq", 2]


def photos(root: Path, *, count: int = 16, side: int = 16) -> Path:
    """Two classes, one bright and one dark."""
    for label, level in (("bright", 200), ("dark", 40)):
        (root / label).mkdir(parents=True)
        for i in range(count):
            noise = np.random.default_rng(i).integers(-30, 30, (side, side, 3))
            Image.fromarray((level + noise).astype(np.uint8)).save(root / label / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(images, run directory) of two epochs without a --dataset and an --arch."""
    root = tmp_path_factory.mktemp("own")
    folder = photos(root / "photos")
    finished = train([*FLAGS, "--data", folder, "--epochs", 2, "--model_dir", root / "m"], root)
    assert finished.code == 0, finished.stderr
    assert "has no split: " in finished.stderr
    assert "lr 0.05 of the recipe is for 32 images an update: scaled to 0.0125 for 8" in finished.stderr
    return folder, root / "m"


def test_an_unsplit_folder_trains_a_small_network_and_its_split_is_stored(run: tuple[Path, Path]) -> None:
    folder, model_dir = run
    flags = json.loads((model_dir / "hparams_train.json").read_text())
    assert (flags["dataset"]["value"], flags["arch"]["value"]) == ("folder", "resnet20")
    assert flags["arch"]["origin"] == "recipe: own images up to 64 pixels"
    with (model_dir / "split.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert sorted(row["path"] for row in rows) == sorted(str(p.relative_to(folder)) for p in folder.rglob("*.png"))
    assert {row["split"] for row in rows} == {"train", "test"}


def test_the_same_images_are_evaluated_and_new_ones_classified(run: tuple[Path, Path], tmp_path: Path) -> None:
    folder, model_dir = run
    with (model_dir / "split.csv").open(newline="") as file:
        tested = sum(row["split"] == "test" for row in csv.DictReader(file))
    arguments = ["--resume", model_dir / "model_best.pth.tar", "--no_cuda", "--workers", 0]
    evaluated = train([*arguments, "--model_dir", tmp_path / "e"], tmp_path, module="eval")
    assert evaluated.code == 0, evaluated.stderr
    assert (evaluated.result["images"], evaluated.result["split"]) == (tested, "test")
    (tmp_path / "new").mkdir()
    shutil.copy(folder / "dark" / "3.png", tmp_path / "new" / "one.png")
    predicted = train([*arguments, "--predict", tmp_path / "new"], tmp_path, module="eval")
    assert predicted.code == 0, predicted.stderr
    assert predicted.result["images"] == 1


def test_two_processes_test_each_image_once(run: tuple[Path, Path], tmp_path: Path) -> None:
    folder, model_dir = run
    argv = [*FLAGS, "--data", folder, "--epochs", 1, "--model_dir", tmp_path / "m"]
    results = train_together(argv, tmp_path, 2)
    assert (tmp_path / "m" / "split.csv").read_text() == (model_dir / "split.csv").read_text()
    assert results[0].result["epochs"] == 1


def test_a_stopped_run_goes_on_and_grown_data_keeps_its_parts(run: tuple[Path, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(run[0], tmp_path / "photos"))
    argv = [*FLAGS, "--data", folder, "--val_fraction", 0.2]
    expected, half = tmp_path / "whole", tmp_path / "half"
    reference = train([*argv, "--epochs", 2, "--model_dir", expected], tmp_path)
    assert train([*argv, "--epochs", 2, "--max_steps", 1, "--model_dir", half], tmp_path).code == 0
    result = train([*argv, "--epochs", 2, "--model_dir", half, "--resume", "auto"], tmp_path)
    assert result.code == 0, result.stderr
    assert result.result["state_sha256"] == reference.result["state_sha256"]

    before = (half / "split.csv").read_text().splitlines()
    shutil.copy(folder / "dark" / "0.png", folder / "dark" / "more.png")
    grown = train([*argv, "--epochs", 3, "--model_dir", half, "--resume", "auto"], tmp_path)
    assert grown.code == 0, grown.stderr
    assert set(before) < set((half / "split.csv").read_text().splitlines())
    other = [*argv, "--epochs", 4, "--test_fraction", 0.5, "--model_dir", half, "--resume", "auto"]
    refused = train(other, tmp_path)
    assert refused.code == 2
    assert "--test_fraction: the run before tested on 0.2 of the images by a hash" in refused.stderr


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["csv", "parquet", "webdataset"])
def test_tables_and_shards_train_are_resumed_and_evaluated_as_folders_are(tmp_path: Path, kind: str) -> None:
    """Large ones, so that the decoding processes read them from their places."""
    if kind == "csv":
        folder = photos(tmp_path / "photos", count=12, side=70)
        rows = [f"{path.relative_to(tmp_path)},{path.parent.name}" for path in folder.rglob("*.png")]
        data = tmp_path / "labels.csv"
        data.write_text("\n".join(["path,label", *rows]))
    elif kind == "parquet":
        data = tmp_path / "t.parquet"
        write_parquet(data, 0, 24, side=70)
    else:
        write_tar(tmp_path / "x-0.tar", samples(0, 14, 70))
        write_tar(tmp_path / "x-1.tar", samples(14, 10, 70))
        data = tmp_path / "x-{0..1}.tar"
    argv = [*FLAGS, "--data", data, "--arch", "resnet18_imagenet", "--crop_size", 66, "--workers", 1, "--is_mixup", 0]
    argv += ["--batch_size", 4, "--epochs", 2, "--is_autoaugment", 0]
    reference = train([*argv, "--model_dir", tmp_path / "whole"], tmp_path)
    assert reference.code == 0, reference.stderr
    assert reference.result["dataset"] == kind
    assert train([*argv, "--max_steps", 2, "--model_dir", tmp_path / "half"], tmp_path).code == 0
    resumed = train([*argv, "--model_dir", tmp_path / "half", "--resume", "auto"], tmp_path)
    assert resumed.result["state_sha256"] == reference.result["state_sha256"]
    checkpoint = tmp_path / "whole" / "checkpoint_2.pth.tar"
    evaluated = train(["--resume", checkpoint, "--no_cuda", "--workers", 0], tmp_path, module="eval")
    assert evaluated.code == 0, evaluated.stderr
    assert evaluated.result["ensemble_acc1"] == reference.result["ensemble_acc1"]
    with (tmp_path / "whole" / "split.csv").open(newline="") as file:
        assert evaluated.result["images"] == sum(row["split"] == "test" for row in csv.DictReader(file))


def test_classes_get_names_and_weights_and_equal_draws(run: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_text("bright day\ndark night\n")
    argv = [*FLAGS, "--data", run[0], "--epochs", 1, "--model_dir", tmp_path / "m", "--class_weights", "balanced"]
    argv += ["--class_map", tmp_path / "names.txt", "--sampler", "balanced"]
    finished = train(argv, tmp_path)
    assert finished.code == 0, finished.stderr
    (tmp_path / "names.txt").unlink()  # the checkpoint knows
    arguments = ["--resume", tmp_path / "m" / "model_best.pth.tar", "--no_cuda", "--workers", 0]
    evaluated = train(arguments, tmp_path, module="eval")
    assert evaluated.code == 0, evaluated.stderr
    assert list(evaluated.result["per_class_acc"]) == ["day", "night"]
    l_mcl = ["--sampler", "balanced", "--method", "l_mcl", "--split_factor", 2, "--model_dir", tmp_path / "l"]
    refused = train([*FLAGS, "--data", run[0], *l_mcl], tmp_path)
    assert refused.code == 2
    assert "--sampler balanced: this method" in refused.stderr
    both = train([*FLAGS, "--data", run[0], "--class_weights", "balanced", "--class_loss", "bce"], tmp_path)
    assert both.code == 2
    assert "--class_weights is for the cross-entropy" in both.stderr


def test_a_split_of_its_own_refuses_a_test_fraction(tmp_path: Path) -> None:
    photos(tmp_path / "d" / "train", count=3)
    photos(tmp_path / "d" / "valid", count=2)
    argv = [*FLAGS, "--data", tmp_path / "d", "--test_fraction", 0.3, "--model_dir", tmp_path / "m"]
    refused = train(argv, tmp_path)
    assert (refused.code, refused.stdout) == (2, "")
    assert "--test_fraction 0.3" in refused.stderr

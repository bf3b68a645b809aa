"""Shift, foreign images and the report of uncertainty; predictions by a cascade, as a user runs them."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import eval as program
import train_split
from dataset import ImageSet
from dataset.source.corrupted import CORRUPTIONS, open_corrupted
from evaluation import uncertainty
from evaluation.answer_plots import short_names
from evaluation.answers import read_answers_file
from evaluation.session import Session
from evaluation.shift import ALEXNET, mean_name, shift_figures
from tests.answer_cases import GOLDEN
from tests.tuned_run import digits, fitted_network, prepared, write_run
from utils.errors import UserError

CLASSES = tuple(map(str, range(10)))


def near(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: near(one) for key, one in value.items()}
    return [near(one) for one in value] if isinstance(value, list) else pytest.approx(value, rel=1e-6)


def errors_of(wrong: dict[str, list[int]], images: int) -> dict[str, dict[int, float]]:
    return {name: {s + 1: 100 * count / images for s, count in enumerate(row)} for name, row in wrong.items()}


def test_golden_shift() -> None:
    golden = GOLDEN["corruption"]
    images = golden["images"]
    found = shift_figures(
        errors_of(golden["wrong"], images),
        100 * golden["clean_wrong"] / images,
        errors_of(golden["reference_wrong"], images),
        100 * golden["reference_clean_wrong"] / images,
    )
    for key in golden.keys() & found.keys():
        assert found[key] == near(golden[key]), key
    assert mean_name(found) == "mean of 3 corruptions"


def test_extra_corruptions_are_in_no_mean_and_denominators_of_nothing_have_no_value() -> None:
    errors = {"fog": {1: 10.0, 2: 20.0}, "spatter": {1: 90.0}, "odd": {1: 80.0}}
    found = shift_figures(errors, 5.0, {"fog": {1: 5.0, 2: 5.0}}, 5.0)
    assert found["mean_corruption_error"] == 15
    assert found["accuracy_by_severity"] == [90, 80]
    assert found["error_by_corruption"] == {"fog": 15, "spatter": 90, "odd": 80}
    assert found["normalised_mce"] == 300
    assert found["relative_mce"] is None
    whole = {name: dict.fromkeys(range(1, 6), ALEXNET[name] / 2) for name in CORRUPTIONS}
    found = shift_figures(whole, 5.0, reference_means=ALEXNET)
    assert found["normalised_mce"] == pytest.approx(50)
    assert mean_name(found) == "mCE"
    assert shift_figures(errors, 5.0, reference_means=ALEXNET)["normalised_mce"] is None


def arrays(folder: Path, images: np.ndarray, labels: np.ndarray, names: tuple[str, ...] = ("fog",)) -> Path:
    folder.mkdir(exist_ok=True)
    np.save(folder / "labels.npy", labels)
    for name in names:
        np.save(folder / f"{name}.npy", images)
    return folder


@pytest.mark.parametrize("repeated", [True, False])
def test_arrays_are_blocks_of_severities(repeated: bool, tmp_path: Path) -> None:
    images = np.arange(10, dtype=np.uint8)[:, None, None, None] * np.ones((1, 4, 4, 3), dtype=np.uint8)
    labels = np.array([3, 7] * 5 if repeated else [3, 7])
    sets = open_corrupted(arrays(tmp_path, images, labels, ("zoom_blur", "snow", "odd")), CLASSES)
    assert [row.name for row in sets.rows] == ["zoom_blur", "snow", "odd"]
    assert len(sets.missing) == 13
    for severity, part in sets.images(sets.rows[0]):
        assert part.targets.tolist() == [3, 7]
        assert part.images[:, 0, 0, 0].tolist() == [2 * severity - 2, 2 * severity - 1]


@pytest.mark.parametrize(
    ("shape", "dtype", "labels", "named"),
    [
        ((10, 4, 4), "uint8", [0] * 10, "fog.npy: expected uint8 images"),
        ((10, 4, 4, 3), "float32", [0] * 10, "fog.npy: expected uint8 images"),
        ((9, 4, 4, 3), "uint8", [0] * 9, "fog.npy: expected uint8 images"),
        ((10, 4, 4, 3), "uint8", [0] * 7, "labels.npy: 7 labels for the 10 images"),
        ((10, 4, 4, 3), "uint8", [10] * 10, "labels from 10 to 10, and the networks have 10 classes"),
        ((10, 4, 4, 3), "uint8", [0.5] * 10, "labels.npy: expected whole numbers"),
    ],
)
def test_bad_arrays_are_named(shape: tuple, dtype: str, labels: list, named: str, tmp_path: Path) -> None:
    arrays(tmp_path, np.zeros(shape, dtype=dtype), np.array(labels))
    with pytest.raises(UserError, match=named):
        open_corrupted(tmp_path, CLASSES)


@pytest.mark.parametrize("place", ["snow/1/7", "weather/snow/5/7"])
def test_two_layouts_in_one_folder_are_refused(place: str, tmp_path: Path) -> None:
    """Folders beside labels.npy would count for nothing."""
    arrays(tmp_path, np.zeros((10, 4, 4, 3), dtype=np.uint8), np.array([0] * 10))
    (tmp_path / "notes").mkdir()
    assert len(open_corrupted(tmp_path, CLASSES).rows) == 1
    (tmp_path / place).mkdir(parents=True)
    with pytest.raises(UserError, match=r"holds labels.npy and a folder of a corruption too, \S+snow: give"):
        open_corrupted(tmp_path, CLASSES)


def test_folders_also_in_groups(tmp_path: Path) -> None:
    for place in ("noise/gaussian_noise/1", "noise/gaussian_noise/3", "fog/2"):
        folder = tmp_path / place / "7"
        folder.mkdir(parents=True)
        Image.new("RGB", (5, 5)).save(folder / "a.png")
    sets = open_corrupted(tmp_path, CLASSES)
    assert [(row.name, row.severities) for row in sets.rows] == [("gaussian_noise", (1, 3)), ("fog", (2,))]
    ((severity, images),) = sets.images(sets.rows[1])
    assert (severity, images.targets.tolist()) == (2, [7])
    (tmp_path / "noise" / "fog").symlink_to(tmp_path / "fog")
    with pytest.raises(UserError, match="the corruption fog is there twice"):
        open_corrupted(tmp_path, CLASSES)
    (tmp_path / "noise" / "fog").rename(tmp_path / "frost")
    with pytest.raises(UserError, match="fog and frost are the same images, through a link: remove one"):
        open_corrupted(tmp_path, CLASSES)
    (tmp_path / "frost").unlink()
    (tmp_path / "snow" / "7").mkdir(parents=True)
    with pytest.raises(UserError, match="snow: has no severity folder"):
        open_corrupted(tmp_path, CLASSES)
    with pytest.raises(UserError, match="nowhere: is not a folder"):
        open_corrupted(tmp_path / "nowhere", CLASSES)


def test_foreign_sets_are_called_by_what_tells_them_apart() -> None:
    assert short_names(["/data/a/noise.npy", "svhn:/data/svhn"]) == ["noise.npy", "svhn"]
    assert short_names(["/data/a/val", "/data/b/val/"]) == ["a/val", "b/val"]
    assert short_names(["turned"]) == ["turned"]


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def run(*argv: Any) -> int:
    return program.main(["--no_cuda", "--workers", "0", *map(str, argv)])


@pytest.mark.slow
def test_everything_from_one_command_and_predictions_by_the_cascade(tmp_path: Path) -> None:
    """Report, pictures, and a folder classified by the cascade as the arithmetic on stored logits says."""
    network = fitted_network()
    checkpoint, source = write_run(tmp_path, network), digits()
    test = source.test.images[:60].permute(0, 2, 3, 1).numpy()
    noisy = [np.clip(test.astype(int) + 15 * s, 0, 255).astype(np.uint8) for s in range(1, 6)]
    arrays(tmp_path / "c", np.concatenate(noisy), source.test.targets[:60].numpy(), ("brightness", "spatter"))
    np.save(tmp_path / "turned.npy", np.rot90(test, axes=(1, 2)).copy())
    folder = tmp_path / "tuned"
    flags = ("--tune", "all", "--conformal", "0.1", "--uncertainty", 1, "--ood", tmp_path / "turned.npy")
    assert run("--resume", checkpoint, *flags, "--shift", tmp_path / "c", "--model_dir", folder) == 0
    found = read(folder / "uncertainty.json")
    assert found == read(folder / "results.json")["uncertainty"]
    assert found["selective"].keys() == {"ensemble", "network 1", "network 2", "cascade"}
    foreign = found["ood"][str(tmp_path / "turned.npy")]
    assert foreign["images"] == 60
    assert foreign["rows"]["network 1"]["mutual_information"] is None
    assert foreign["rows"]["ensemble"]["mutual_information"]["auroc"] > 0.6
    assert [row["severity"] for row in found["shift"]["rows"]] == [1, 2, 3, 4, 5] * 2
    assert found["shift"]["corruptions"] == 1
    assert found["shift"]["reference"] is None
    assert [row["kind"] for row in found["conformal"]] == ["thr", "aps", "raps"]
    for name in ("risk_coverage", "ood", "shift", "diversity"):
        assert (folder / f"{name}.png").stat().st_size > 5000

    photos = tmp_path / "photos"
    photos.mkdir()
    for n, image in enumerate(test):
        Image.fromarray(image).save(photos / f"{n:02}.png")
    tuned, out = folder / "model_best.tuned.pth.tar", tmp_path / "out"
    assert run("--resume", tuned, "--predict", photos, "--answer", "cascade", "--model_dir", out) == 0
    with torch.inference_mode():
        logits = network(prepared(source.test.images[:60]))
    answers = read_answers_file(folder / "answers.json", 2)
    assert answers.cascade is not None
    stage = answers.cascade.leave(answers.stages(logits).confidence_SN)
    (csv_path,) = out.rglob("predictions.csv")
    with csv_path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["networks_used"]) for row in rows] == (stage + 1).tolist()
    assert 0 < int((stage == 0).sum()) < 60
    assert {row["mutual_information"] == "" for row in rows if row["networks_used"] == "1"} == {True}
    with np.load(csv_path.parent / "logits.npz") as stored:
        assert stored["networks_used"].tolist() == (stage + 1).tolist()
        missing = np.isnan(stored["logits"]).any(axis=-1)
        assert missing.sum() == int((stage == 0).sum())
        np.testing.assert_allclose(stored["ensemble"].argmax(axis=1), [int(row["class_1"]) for row in rows])
    assert run("--resume", tuned, "--predict", photos, "--model_dir", tmp_path / "full") == 0
    (csv_path,) = (tmp_path / "full").rglob("predictions.csv")
    with csv_path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert all(row["class_1"] in row["set"].split("|") for row in rows)
    assert {row["networks_used"] for row in rows} == {"2"}


@pytest.mark.slow
def test_the_undivided_network_sees_images_of_its_own_size(
    tmp_path: Path, logging_restored: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its figures beside the divided networks' are those of its own evaluation."""
    real, seen = uncertainty.collect_logits, []

    def noted(session: Session, images: ImageSet, **others: Any) -> Any:
        assert images.images is not None
        seen.append((session.info.num_networks, session.info.crop_size, images.images.shape[-1]))
        return real(session, images, **others)

    monkeypatch.setattr(uncertainty, "collect_logits", noted)
    rng = np.random.default_rng(0)
    for split, count in (("train", 4), ("test", 30), ("held", 60)):
        for label in "ab":
            (tmp_path / split / label).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 256, (24, 24, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / split / label / f"{split}{i}.png")
    arrays(tmp_path / "c", rng.integers(0, 256, (50, 24, 24, 3), dtype=np.uint8), np.array([0, 1] * 25))
    flags = ["--dataset", "folder", "--data", tmp_path, "--arch", "resnet20", "--seed", 1, "--batch_size", 4]
    for name, split_factor, crop_size in (("undivided", 1, 16), ("divided", 2, 24)):
        flags_of_one = ["--split_factor", split_factor, "--crop_size", crop_size, "--model_dir", tmp_path / name]
        words = map(str, [*flags, *flags_of_one, "--max_steps", 1, "--no_cuda", "--workers", 0])
        assert train_split.main([*words]) == 0
    large = tmp_path / "undivided"
    beside = ["--large", large, "--uncertainty", 1, "--shift", tmp_path / "c", "--model_dir", tmp_path / "tuned"]
    held = ["--tune", "cascade", "--tune_on", tmp_path / "held"]
    assert run("--resume", tmp_path / "divided", *held, *beside) == 0
    assert run("--resume", large, "--model_dir", tmp_path / "alone") == 0
    with (tmp_path / "tuned" / "cascade.csv").open(newline="") as file:
        (row,) = (row for row in csv.DictReader(file) if row["kind"] == "undivided")
    own = read(tmp_path / "alone" / "results.json")
    assert float(row["nll"]) == pytest.approx(own["ensemble_nll"], rel=1e-6)
    assert float(row["test_macs"]) == read(large / "results.json")["macs_total"]
    assert len(seen) == 10
    assert {*seen} == {(2, 24, 24), (1, 16, 16)}

"""Pictures exist, are readable files of a sensible size, and survive what runs leave behind."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from record.logger import RunLog
from record.plots import plot_confusion, plot_curves, read_curves


def write_run(folder: Path, *, networks: int, epochs: int) -> Path:
    folder.mkdir()
    log = RunLog(folder, networks, active=True)
    for epoch in range(epochs):
        for step in (10 * epoch, 10 * epoch + 5):
            losses = {"loss": 2.0 / (step + 1), "loss_ce": 1.5 / (step + 1), "cot_weight": 0.5}
            log.write_metrics({"kind": "train", "epoch": epoch, "step": step, "learning_rate": 0.1, **losses})
        log.write_metrics({"kind": "eval", "epoch": epoch + 1, "step": 10 * epoch, "test": {}})
        accuracies = {f"acc1_{i + 1}": 50.0 + epoch + i for i in range(networks)}
        log.write_summary({"epoch": epoch + 1, "step": 10, "ensemble_acc1": 60.0 + epoch, **accuracies})
    log.close()
    return folder


def ink(path: Path) -> float:
    """Part of the pixels that are not white; checks that the file is a whole picture."""
    with Image.open(path) as picture:
        picture.load()
        assert picture.size[0] > 300
        return float((np.asarray(picture.convert("L")) < 250).mean())


def test_curves_are_read_as_written(tmp_path):
    curves = read_curves(write_run(tmp_path / "run", networks=2, epochs=3))
    assert curves.epochs.tolist() == [1, 2, 3]
    assert curves.ensemble.tolist() == [60, 61, 62]
    assert curves.networks.tolist() == [[50, 51], [51, 52], [52, 53]]
    assert curves.steps.tolist() == [0, 5, 10, 15, 20, 25]
    assert sorted(curves.losses) == ["loss", "loss_ce", "loss_per_network"]
    assert curves.losses["loss"][1] == pytest.approx(2 / 6)
    assert curves.learning_rate.tolist() == [0.1] * 6
    assert curves.losses["loss_per_network"].tolist() == (curves.losses["loss"] / 2).tolist()  # it has none of its own


def test_steps_are_shown_in_epochs_also_where_the_batch_size_changed(tmp_path):
    log = RunLog(tmp_path, 1, active=True)
    for epoch, done in ((1, 10), (2, 20), (3, 40)):
        log.write_summary({"epoch": epoch, "step": done, "ensemble_acc1": 1.0})
    for step in (4, 9, 29, 39, 49):
        log.write_metrics({"kind": "train", "epoch": 1, "step": step, "loss": 4.0, "loss_per_network": 2.0})
    log.close()
    curves = read_curves(tmp_path)
    assert curves.trained.tolist() == [0.5, 1.0, 2.5, 3.0, 3.5]
    assert curves.losses["loss_per_network"].tolist() == [2.0] * 5


@pytest.mark.parametrize(("networks", "epochs"), [(1, 5), (4, 5), (2, 1), (2, 0)])
def test_curves_of_one_run(networks, epochs, tmp_path):
    folder = write_run(tmp_path / "run", networks=networks, epochs=epochs)
    path = plot_curves(folder)
    assert path == folder / "curves.png"
    assert ink(path) > 0.005


def test_curves_of_a_folder_without_a_run(tmp_path):
    assert ink(plot_curves(tmp_path)) > 0.005


def test_a_broken_last_line_and_gaps_do_not_matter(tmp_path):
    folder = write_run(tmp_path / "run", networks=2, epochs=2)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"kind": "train", "epoch": 2, "step": 30, "loss": None}) + "\n" + '{"kind": "tra')
    curves = read_curves(folder)
    assert curves.steps.tolist() == [0, 5, 10, 15, 30]
    assert np.isnan(curves.losses["loss"][-1])
    plot_curves(folder)


def test_two_runs_in_one_picture(tmp_path):
    runs = [(f"S = {s} $x", write_run(tmp_path / str(s), networks=s, epochs=4)) for s in (2, 1)]
    path = plot_curves(runs, tmp_path / "both.png")
    assert path == tmp_path / "both.png"
    assert not (tmp_path / "2" / "curves.png").exists()
    assert ink(path) > 0.005


@pytest.mark.parametrize("num_classes", [2, 30, 31, 100, 1000])
def test_confusion_of_any_number_of_classes(num_classes, tmp_path):
    counts = np.eye(num_classes, dtype=np.int64) * 9
    counts[0, -1] = 5
    counts[1] = 0  # a class without images
    names = [f"class $_{k} with a long name" for k in range(num_classes)]
    path = plot_confusion(counts, names, tmp_path / "confusion.png")
    assert ink(path) > 0.005
    with Image.open(path) as picture:
        assert max(picture.size) < 3000


def test_a_single_confusion_is_visible_among_1000_classes(tmp_path):
    counts = np.eye(1000, dtype=np.int64) * 50
    names = [str(k) for k in range(1000)]
    with Image.open(plot_confusion(counts, names, tmp_path / "a.png")) as picture:
        without = np.asarray(picture.convert("L"))
    counts[700, 100] = 25
    with Image.open(plot_confusion(counts, names, tmp_path / "b.png")) as picture:
        pixels = np.asarray(picture.convert("L"))
    # the cell lies in the left part of the matrix, away from the list of pairs
    assert (pixels != without)[:, : pixels.shape[1] // 2].sum() >= 9

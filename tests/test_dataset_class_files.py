"""Names and weights of classes from files, and draws in which every class is equally likely."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from dataset import DataSource, ImageSet
from dataset.class_files import class_weights, with_names
from dataset.sampler import EquallyLikelyClasses
from utils.errors import UserError

TARGETS = torch.tensor([0] * 6 + [1] * 2 + [3] * 4)


@pytest.fixture
def source() -> DataSource:
    return DataSource(
        name="folder",
        recipe="cifar10",
        classes=("n01", "n02", "n03", "n04"),
        mean=(0.5,) * 3,
        std=(0.2,) * 3,
        crop_size=8,
        train=ImageSet(targets=TARGETS),
        test=ImageSet.empty(),
    )


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("m.txt", "n01 tench, Tinca tinca\n\nn02 crane\nn03 crane\n"),
        ("m.tsv", "code\tname\nn01\ttench, Tinca tinca\nn02\tcrane\nn03\tcrane\n"),
        ("m.csv", '\ufeffn01,"tench, Tinca tinca"\nn02,crane\nn03,crane,bird\n'),
    ],
)
def test_names_take_the_place_of_codes(source: DataSource, tmp_path: Path, name: str, text: str, caplog) -> None:
    (tmp_path / name).write_text(text)
    named = with_names(source, str(tmp_path / name))
    assert named.classes == ("tench, Tinca tinca", "crane (n02)", "crane (n03)", "n04")
    assert named.codes == source.classes
    assert "leaves out 1 classes, such as n04" in caplog.text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("n01\n", "line 1: expected two columns"),
        ("n01 a\nn01 b\n", "n01 stands there twice, with a and b"),
        ("x a\n", "names none of the classes of the data, such as n01"),
        (None, "cannot be read"),
    ],
)
def test_files_that_are_no_maps(source: DataSource, tmp_path: Path, text: str | None, expected: str) -> None:
    if text is not None:
        (tmp_path / "m.txt").write_text(text)
    with pytest.raises(UserError, match=expected):
        with_names(source, str(tmp_path / "m.txt"))


def test_balanced_weights_average_to_one_over_the_images(source: DataSource) -> None:
    weights_K = class_weights("balanced", source)
    assert weights_K[[0, 1, 3]].tolist() == pytest.approx([12 / (3 * n) for n in (6, 2, 4)])
    assert weights_K[TARGETS].mean().item() == pytest.approx(1)
    assert weights_K.isfinite().all()


def test_weights_of_a_file_are_taken_as_they_are_by_name_or_code(source: DataSource, tmp_path: Path) -> None:
    (tmp_path / "w.csv").write_text("cat,2\nn02,0\nn03,0.5\nn04,1e1\n")
    named = replace(source, classes=("cat", "dog", "cow", "ape"), codes=source.classes)
    assert class_weights(str(tmp_path / "w.csv"), named).tolist() == [2, 0, 0.5, 10]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("n01 1\nn02 1\nn03 1\n", "no weight of the class n04"),
        ("n01 1\nx 1\n", "x is no class"),
        ("n01 -1\n", "n01 has the weight -1"),
        ("n01 nan\n", "n01 has the weight nan"),
        ("n01 0\nn02 0\nn03 0\nn04 0\n", "all weights are 0"),
    ],
)
def test_files_that_are_no_weights(source: DataSource, tmp_path: Path, text: str, expected: str) -> None:
    (tmp_path / "w.txt").write_text(text)
    with pytest.raises(UserError, match=expected):
        class_weights(str(tmp_path / "w.txt"), source)


def test_every_class_is_drawn_alike_and_every_image_of_it() -> None:
    targets = TARGETS[torch.from_numpy(np.random.default_rng(0).permutation(12))]
    sampler = EquallyLikelyClasses(targets, seed=3)
    orders = np.concatenate([sampler(epoch) for epoch in range(3000)])
    assert len(orders) == 3000 * 12
    share_K = targets[orders].bincount(minlength=4) / len(orders)
    deviation = 5 * (1 / 3 * 2 / 3 / len(orders)) ** 0.5
    assert share_K.tolist() == pytest.approx([1 / 3, 1 / 3, 0, 1 / 3], abs=deviation)
    share_N = np.bincount(orders, minlength=12) / len(orders)
    expected_N = 1 / 3 / np.array([6, 2, 0, 4])[targets]
    assert share_N == pytest.approx(expected_N, abs=5 * (1 / 6 / len(orders)) ** 0.5)


def test_the_draws_are_a_function_of_seed_and_epoch() -> None:
    one, same, other = (EquallyLikelyClasses(TARGETS, seed) for seed in (1, 1, 2))
    assert (one(4) == same(4)).all()
    assert (one(4) != one(5)).any()
    assert (one(4) != other(4)).any()

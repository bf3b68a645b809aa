"""Predicting: every image once and in order however many processes there are, and files that say what the rule says."""

import csv
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dataset.sampler import shard
from evaluation.ensemble import RULES, ensemble_log_probs, ensemble_scores
from evaluation.prediction import SHOWN, TOP, Prediction, predict, write_prediction
from tests.processes import run_processes
from utils.errors import RunError, WriteError

S, K, N = 3, 7, 25
CPU = torch.device("cpu")
NAMES = [f"photo_{n}.png" for n in range(N)]
CLASSES = [f"class {k}" for k in range(K)]
WEIGHT_SK3 = torch.randn(S, K, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
IMAGES = torch.rand(N, 3, 4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def network(images: Tensor) -> Tensor:
    """S linear classifiers of the mean colour."""
    return images.mean(dim=(2, 3)) @ WEIGHT_SK3.to(images.dtype).transpose(1, 2)


def batches(rows: slice = slice(None), *, unreadable: tuple[int, ...] = ()) -> Iterator[tuple[Tensor, Tensor]]:
    indices = [n for n in range(N)[rows] if n not in unreadable]
    for indices_B in torch.tensor(indices, dtype=torch.int64).split(4):
        if len(indices_B):
            yield indices_B, IMAGES[indices_B]


def run(given: Iterator[tuple[Tensor, Tensor]], **options: Any) -> Prediction:
    fixed = {"num_networks": S, "num_classes": K, "rule": "mean_softmax", "device": CPU, "dtype": torch.float64}
    fixed |= {"autocast_dtype": None, "source": "--predict photos", "network": network}
    return predict(names=NAMES, batches=given, **fixed | options)


def test_every_image_has_the_logits_of_every_network() -> None:
    found = run(batches())
    assert (found.names, found.rule) == (NAMES, "mean_softmax")
    torch.testing.assert_close(found.logits_SNK, network(IMAGES), rtol=1e-12, atol=0)


def predicted_part(rank: int, world_size: int, count: int) -> dict[str, Any]:
    """A process's prediction of the first images; with more processes than images, some have none."""
    mine = shard(count, rank, world_size)
    found = run(batches(mine, unreadable=(1,)))
    return {"names": list(found.names), "logits": found.logits_SNK}


@pytest.mark.parametrize("count", [pytest.param(2, marks=pytest.mark.slow), 11])
def test_several_processes_predict_as_one_does(tmp_path: Path, count: int) -> None:
    alone = run(batches(slice(count), unreadable=(1,)))
    for result in run_processes(3, predicted_part, tmp_path / "r", count):
        assert result["names"] == alone.names == [name for n, name in enumerate(NAMES[:count]) if n != 1]
        torch.testing.assert_close(result["logits"], alone.logits_SNK, rtol=1e-12, atol=0)


def test_images_that_cannot_be_read_are_left_out() -> None:
    found = run(batches(unreadable=(0, 7, N - 1)))
    assert found.names == NAMES[1:7] + NAMES[8 : N - 1]
    kept = [n for n in range(N) if n not in (0, 7, N - 1)]
    torch.testing.assert_close(found.logits_SNK, network(IMAGES[kept]), rtol=1e-12, atol=0)


def test_no_image_that_can_be_read_is_an_error_that_names_the_flag() -> None:
    with pytest.raises(RunError, match=r"^--predict photos: .*not one image"):
        run(batches(unreadable=tuple(range(N))))


def test_what_the_networks_cannot_take_is_one_line_with_the_size_of_the_batch() -> None:
    def too_deep(images: Tensor) -> Tensor:
        return torch.nn.functional.max_pool2d(images, 5)

    with pytest.raises(RunError, match=r"^--predict photos: .*fail on a batch 4 x 3 x 4 x 4: .*too small") as caught:
        run(batches(), network=too_deep)
    assert "\n" not in str(caught.value)


def test_logits_are_kept_in_float32_or_better() -> None:
    for dtype, kept in (
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ):
        found = run(((n, images.to(dtype)) for n, images in batches()), dtype=dtype)
        assert found.logits_SNK.dtype == kept


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_products_are_computed_in_the_type_that_was_asked_for(dtype: torch.dtype | None) -> None:
    seen = []

    def watched(images: Tensor) -> Tensor:
        seen.append(torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None)
        return network(images)

    run(batches(), network=watched, autocast_dtype=dtype)
    assert set(seen) == {dtype}
    assert not torch.is_autocast_enabled("cpu")


def test_networks_compute_no_gradient() -> None:
    def watched(images: Tensor) -> Tensor:
        assert not torch.is_grad_enabled()
        return network(images)

    run(batches(), network=watched)


def chosen(*choices_SN: list[int]) -> Tensor:
    """Logits with which network s chooses class `choices_SN[s][n]` for image n."""
    return torch.nn.functional.one_hot(torch.tensor(choices_SN), K).float()


def test_disagreement_is_the_part_of_pairs_that_choose_differently() -> None:
    logits_SNK = chosen([0, 0, 0, 4], [0, 0, 1, 4], [0, 3, 2, 4])
    assert Prediction(NAMES[:4], logits_SNK, "mean_logits").disagreement_N().tolist() == pytest.approx([0, 2 / 3, 1, 0])


def test_one_network_agrees_with_itself() -> None:
    assert Prediction(NAMES[:2], chosen([0, 5]), "mean_logits").disagreement_N().tolist() == [0, 0]


def written(folder: Path) -> tuple[list[dict[str, str]], dict[str, np.ndarray]]:
    with (folder / "predictions.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    with np.load(folder / "logits.npz") as arrays:
        return rows, dict(arrays)


@pytest.mark.parametrize("rule", RULES)
def test_files_hold_what_the_rule_makes_of_the_logits(rule: str, tmp_path: Path) -> None:
    prediction = run(batches(), rule=rule)
    shown = write_prediction(prediction, CLASSES, tmp_path)
    rows, arrays = written(tmp_path)
    np.testing.assert_array_equal(arrays["logits"], prediction.logits_SNK)
    np.testing.assert_array_equal(arrays["ensemble"], ensemble_scores(prediction.logits_SNK, rule))
    assert sorted(os.listdir(tmp_path)) == ["logits.npz", "predictions.csv"]
    probs_NK = ensemble_log_probs(prediction.logits_SNK, rule).exp()
    assert [row["file"] for row in rows] == NAMES
    for n, row in enumerate(rows):
        expected = sorted(range(K), key=lambda k: -probs_NK[n, k].item())[:TOP]
        assert [int(row[f"class_{place}"]) for place in range(1, TOP + 1)] == expected
        for place, k in enumerate(expected, 1):
            assert row[f"name_{place}"] == CLASSES[k]
            assert row[f"probability_{place}"] == f"{probs_NK[n, k].item():.6f}"
        assert row["disagreement"] == f"{prediction.disagreement_N()[n].item():.4f}"
    best = probs_NK.max(dim=1)
    assert shown[:SHOWN] == [
        f"{name}: {CLASSES[k]} ({100 * p:.1f} %)"
        for name, k, p in zip(NAMES[:SHOWN], best.indices.tolist(), best.values.tolist(), strict=False)
    ]
    assert shown[SHOWN:] == [f"… and {N - SHOWN} more in {tmp_path / 'predictions.csv'}"]


def test_the_rule_decides_which_class_comes_first(tmp_path: Path) -> None:
    # one network is sure of class 0; two lean to class 1
    logits_SNK = torch.tensor([[[4.0, 0.0]], [[0.0, 1.5]], [[0.0, 1.5]]])
    first = {}
    for rule in ("mean_logits", "mean_softmax"):
        write_prediction(Prediction(["a"], logits_SNK, rule), ["no", "yes"], tmp_path)
        first[rule] = written(tmp_path)[0][0]["name_1"]
    assert first == {"mean_logits": "no", "mean_softmax": "yes"}


def test_fewer_classes_than_columns(tmp_path: Path) -> None:
    shown = write_prediction(Prediction(["a"], torch.tensor([[[0.0, 2.0]]]), "mean_logits"), ["no", "yes"], tmp_path)
    (row,), _ = written(tmp_path)
    titles = [f"{what}_{place}" for place in (1, 2) for what in ("class", "name", "probability")]
    assert list(row) == ["file", *titles, "disagreement"]
    assert (row["class_1"], row["name_1"], row["name_2"]) == ("1", "yes", "no")
    assert shown == ["a: yes (88.1 %)"]


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(WriteError, match=r"gone/predictions\.csv: could not be written"):
        write_prediction(Prediction(["a"], chosen([1]), "mean_logits"), CLASSES, tmp_path / "gone")

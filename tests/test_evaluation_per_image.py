"""The table of what the ensemble says of every image."""

import csv
import io
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from dataset import ImageSet
from dataset.loader import Batch
from evaluation.per_image import ImageAnswers, image_table

CPU = torch.device("cpu")
LOGITS_SNK = torch.tensor([[[2.0, 0.0, 0.0], [0.0, 1.0, 5.0]], [[0.0, 1.0, 0.0], [0.0, 0.0, 3.0]]])
LABELS_N = torch.tensor([0, 1])


def gathered(rule: str = "mean_logits") -> torch.Tensor:
    """The second image comes in a batch of its own; the one at place 1 could not be read."""
    answers = ImageAnswers(rule, CPU)
    for n, place in ((0, 0), (1, 2)):
        index = torch.tensor([place])
        batch = Batch(torch.empty(1, 3, 4, 4), LABELS_N[n : n + 1], index, np.array([place]), 1)
        answers.add(batch, LOGITS_SNK[:, n : n + 1])
    return answers.gather(lambda rows: rows)


def rows_of(split: ImageSet, root: Path, rule: str = "mean_logits") -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(image_table(gathered(rule), split, ("a", "b", "c"), root))))


@pytest.mark.parametrize("rule", ["mean_logits", "max_softmax"])
def test_rows_say_what_the_rule_says_of_each_image(rule: str) -> None:
    rows = rows_of(ImageSet(targets=torch.zeros(3, dtype=torch.int64)), Path("data"), rule)
    scores_NK = LOGITS_SNK.mean(0) if rule == "mean_logits" else LOGITS_SNK.softmax(-1).amax(0).log()
    probs_N2 = scores_NK.softmax(-1).topk(2).values
    assert [(row["index"], row["class"], row["name"]) for row in rows] == [("0", "0", "a"), ("2", "1", "b")]
    assert [(row["predicted"], row["predicted_name"], row["correct"]) for row in rows] == [
        ("0", "a", "1"),
        ("2", "c", "0"),
    ]
    assert [row["file"] for row in rows] == ["", ""]
    assert [float(row["probability"]) for row in rows] == pytest.approx(probs_N2[:, 0].tolist(), abs=1e-6)
    assert [float(row["margin"]) for row in rows] == pytest.approx((probs_N2[:, 0] - probs_N2[:, 1]).tolist(), abs=1e-6)
    assert [float(row["disagreement"]) for row in rows] == [1, 0]


def test_files_are_named_from_the_data_on(tmp_path: Path) -> None:
    paths = (tmp_path / "d" / "test" / "a" / "1.png", Path("never_read.png"), Path(os.fsdecode(b"/other/\xf1.png")))
    rows = rows_of(ImageSet(targets=torch.zeros(3, dtype=torch.int64), paths=paths), tmp_path / "d")
    assert [row["file"] for row in rows] == ["test/a/1.png", r"/other/\xf1.png"]


def test_a_process_without_images_has_no_rows() -> None:
    assert ImageAnswers("mean_logits", CPU).gather(lambda rows: rows).shape == (0, 6)

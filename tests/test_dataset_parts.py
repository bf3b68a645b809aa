"""Which part an image is in, where nobody says: a hash of its name."""

import hashlib
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dataset import SourceRequest, open_source
from dataset.parts import draw_parts
from utils.errors import UserError
from utils.text import escaped


def hash_of(part: str, name: bytes) -> float:
    """The rule in other words: a number in [0, 1)."""
    return int(hashlib.sha256(part.encode() + b"\0" + name).hexdigest()[:16], 16) / 2**64


def names_of(*counts: int) -> tuple[list[bytes], torch.Tensor]:
    names = [f"class{label}/{i}.png".encode() for label, count in enumerate(counts) for i in range(count)]
    return names, torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))


def test_an_image_is_in_the_test_iff_its_hash_is_below_the_fraction_and_val_is_drawn_from_the_rest():
    names, targets = names_of(300, 200)
    parts = draw_parts(names, targets, {"test": 0.2, "val": 0.25})
    test = [i for i, name in enumerate(names) if hash_of("test", name) < 0.2]
    val = [i for i, name in enumerate(names) if hash_of("val", name) < 0.25 and i not in test]
    assert (parts["test"].tolist(), parts["val"].tolist()) == (test, val)
    assert sorted(torch.cat(list(parts.values())).tolist()) == list(range(500))
    assert 0.15 < len(test) / 500 < 0.25


def test_images_stay_where_they_are_when_others_come_and_in_any_order():
    names, targets = names_of(100, 100)
    before = draw_parts(names, targets, {"test": 0.2, "val": 0.1})
    of_name = {names[i]: part for part, indices in before.items() for i in indices.tolist()}
    more, more_targets = names_of(150, 180)
    order = torch.from_numpy(np.random.default_rng(0).permutation(len(more)))
    after = draw_parts([more[i] for i in order.tolist()], more_targets[order], {"test": 0.2, "val": 0.1})
    now = {more[order[i]]: part for part, indices in after.items() for i in indices.tolist()}
    assert all(now[name] == part for name, part in of_name.items())


def test_a_class_that_would_give_none_gives_the_one_of_the_lowest_hash_and_never_all():
    names, targets = names_of(2, 3, 1, 8)
    hashes = [hash_of("test", name) for name in names]
    few = draw_parts(names, targets, {"test": 1e-9})["test"].tolist()
    expected = [min(range(start, end), key=hashes.__getitem__) for start, end in ((0, 2), (2, 5), (6, 14))]
    assert few == expected  # the class of one image keeps it
    most = draw_parts(names, targets, {"test": 1 - 1e-9})
    kept = [max(range(start, end), key=hashes.__getitem__) for start, end in ((0, 2), (2, 5), (6, 14))]
    assert most["train"].tolist() == sorted([*kept, 5])


def test_what_no_class_can_give_is_refused():
    with pytest.raises(UserError, match="No image can be held out for test"):
        draw_parts(*names_of(1, 1), {"test": 0.2})
    with pytest.raises(UserError, match="for val"):  # the test takes one of two
        draw_parts(*names_of(2, 2), {"test": 0.2, "val": 0.5})


def test_the_parts_are_frozen():
    """Everybody's runs depend on it."""
    names, targets = names_of(20)
    parts = draw_parts(names, targets, {"test": 0.2, "val": 0.2})
    assert (parts["test"].tolist(), parts["val"].tolist()) == ([5, 14], [15, 16, 17])


# --- folders


def write(folder: Path, count: int, *, side: int = 8) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        pixels = np.random.default_rng(i).integers(0, 256, (side, side, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")


def opened(root: Path, **rest):
    return open_source(SourceRequest(dataset="folder", root=root, **{"test_fraction": 0.2, **rest}))


@pytest.mark.parametrize("below", ["", "train"])
@pytest.mark.parametrize("side", [8, 70])
def test_class_folders_without_a_split_are_drawn_by_their_paths(tmp_path, below, side, caplog):
    caplog.set_level("INFO")
    write(tmp_path / below / "b", 12, side=side)
    write(tmp_path / below / "a", 9, side=side)
    write(tmp_path / below / "a" / "deep", 5, side=side)
    source = opened(tmp_path, val_fraction=0.2)
    names = [*(f"a/{i}.png" for i in range(9)), *(f"a/deep/{i}.png" for i in range(5))]
    names += [f"b/{i}.png" for i in range(12)]
    test = [name for name in names if hash_of("test", name.encode()) < 0.2]
    assert list(source.membership["test"]) == test
    assert source.classes == ("a", "b")
    assert [len(split) for split in (source.train, source.val, source.test)] == [
        len(source.membership[part]) for part in ("train", "val", "test")
    ]
    assert sum(map(len, source.membership.values())) == 26
    assert source.test.targets.tolist() == [int(name.startswith("b")) for name in test]
    assert (source.reported, dict(source.fractions)) == ("test", {"test": 0.2, "val": 0.2})
    (line,) = [record.getMessage() for record in caplog.records if "no split" in record.getMessage()]
    assert f"{len(source.train)} training, {len(source.val)} validation, {len(test)} test images by a hash" in line
    # an evaluation finds the same images, and --split val the held-out ones
    evaluated = opened(tmp_path, val_fraction=0.2, splits=("test",), classes=("a", "b"))
    assert list(evaluated.membership["test"]) == test
    assert evaluated.test.targets.tolist() == source.test.targets.tolist()
    assert len(evaluated.train) == 0
    val = opened(tmp_path, val_fraction=0.2, splits=("test",), split="val")
    assert (val.reported, len(val.test)) == ("val", len(source.val))


def test_val_that_was_not_held_out_cannot_be_evaluated(tmp_path):
    write(tmp_path / "a", 5)
    write(tmp_path / "b", 5)
    with pytest.raises(UserError, match="--split val"):
        opened(tmp_path, splits=("test",), split="val")


def test_the_seed_and_the_place_of_the_folder_do_not_matter(tmp_path):
    for root in ("one", "two"):
        write(tmp_path / root / "a", 9)
        write(tmp_path / root / "b", 9)
    one, two = (opened(tmp_path / root, seed=seed, val_fraction=0.3) for root, seed in (("one", 1), ("two", 2)))
    assert one.membership == two.membership


@pytest.mark.parametrize("name", ["val", "valid", "validation"])
def test_validation_has_three_names(tmp_path, name):
    write(tmp_path / "train" / "a", 4, side=70)
    write(tmp_path / name / "a", 2, side=70)
    source = opened(tmp_path)
    assert (source.reported, len(source.train), len(source.test), dict(source.fractions)) == ("val", 4, 2, {})
    write(tmp_path / "test" / "a", 3, side=70)
    source = opened(tmp_path)
    assert (source.reported, len(source.val), len(source.test)) == ("test", 2, 3)


def test_of_two_folders_for_validation_the_first_name_counts_as_before(tmp_path):
    write(tmp_path / "train" / "a", 4, side=70)
    write(tmp_path / "validation" / "a", 3, side=70)
    write(tmp_path / "val" / "a", 2, side=70)
    assert len(opened(tmp_path).test) == 2


def test_folders_without_images_are_no_classes_and_said(tmp_path, caplog):
    write(tmp_path / "a", 4)
    write(tmp_path / "b", 4)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "readme.txt").write_text("none")
    assert opened(tmp_path).classes == ("a", "b")
    assert "1 folders hold no image of their own and are no classes, such as notes" in caplog.text


def test_one_class_folder_is_refused(tmp_path):
    write(tmp_path / "a", 4)
    with pytest.raises(UserError, match="images in 1 class folders"):
        opened(tmp_path)


def test_a_class_may_be_called_train(tmp_path):
    write(tmp_path / "train", 4)
    write(tmp_path / "car", 4)
    assert opened(tmp_path).classes == ("car", "train")


def test_names_of_any_bytes_are_drawn(tmp_path):
    odd = os.fsdecode(b"se\xf1al")
    write(tmp_path / odd, 6)
    write(tmp_path / "b", 6)
    source = opened(tmp_path)
    expected = [i for i in range(6) if hash_of("test", b"se\xf1al/" + f"{i}.png".encode()) < 0.2]
    found = [name for name in source.membership["test"] if name.startswith(escaped(odd))]
    assert found == [f"{escaped(odd)}/{i}.png" for i in expected] or (not expected and len(found) == 1)


def test_an_evaluation_of_a_run_with_its_own_split_takes_all_images_without_one(tmp_path):
    write(tmp_path / "a", 4)
    write(tmp_path / "b", 5)
    source = opened(tmp_path, test_fraction=None, splits=("test",), classes=("a", "b", "c"))
    assert (source.classes, source.test.targets.tolist()) == (("a", "b", "c"), [0] * 4 + [1] * 5)


def test_imagenet_keeps_its_published_split(tmp_path):
    write(tmp_path / "train" / "a", 4, side=70)
    with pytest.raises(UserError, match="no folder val/"):
        open_source(SourceRequest(dataset="imagenet", root=tmp_path, test_fraction=0.2))

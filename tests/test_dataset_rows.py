"""Tables of images: columns, lists, splits, and what is wrong with them in one line."""

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dataset import DataSource, SourceRequest, open_source
from dataset.detect import kind_of
from dataset.rows import ordered, split_of_file
from utils.errors import UserError


def write_images(root: Path, names: list[str], *, side: int = 70) -> None:
    for i, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(i).integers(0, 256, (side, side, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / name)


def opened(path: Path, **rest) -> DataSource:
    return open_source(SourceRequest(dataset="csv", root=path, **{"test_fraction": 0.2, **rest}))


def read(source: DataSource, root: Path) -> dict[str, list[tuple[str, str]]]:
    """(path, class) of every image by split."""
    splits = {"train": source.train, "val": source.val, "test": source.test}
    return {
        name: [
            (str(path.relative_to(root)), source.classes[label])
            for path, label in zip(split.paths, split.targets.tolist(), strict=True)
        ]
        for name, split in splits.items()
        if split
    }


SPLIT = {
    "train": [("b.png", "cat"), ("x/a.png", "dog")],
    "val": [("c.png", "cat")],
    "test": [("d.png", "dog")],
}
TABLES = {
    "comma": "path,label,split\nb.png,cat,train\nx/a.png,dog,train\nc.png,cat,val\nd.png,dog,test\n",
    "bom": "\ufeffImage,Class,Split\nb.png,cat,Train\nx/a.png,dog,TRAINING\nc.png,cat,valid\nd.png,dog,test\n",
    "order": "split;label;filename\ntest;dog;d.png\ntrain;dog;x/a.png\nvalidation;cat;c.png\ntrain;cat;b.png\n",
    "tabs": "file\ttarget\tsubset\nb.png\tcat\ttrain\nx/a.png\tdog\ttrain\nc.png\tcat\tdev\nd.png\tdog\ttest\n",
    "no header": "b.png,cat,train\nx/a.png,dog,train\nc.png,cat,val\nd.png,dog,test\n",
    "again": "path,label,split\nb.png,cat,train\n"
    "b.png,cat,train\nx/a.png,dog,train\nx/../c.png,cat,val\nd.png,dog,test\n",
    "crlf": "path,label,split\r\nb.png,cat,train\r\n\r\nx/a.png,dog,train\r\nc.png,cat,val\r\nd.png,dog,test\r\n",
}


@pytest.mark.parametrize("kind", TABLES)
@pytest.mark.parametrize("beside", [False, True])
def test_tables_with_splits(tmp_path: Path, kind: str, beside: bool) -> None:
    root = tmp_path / "pictures" if beside else tmp_path
    write_images(root, ["b.png", "x/a.png", "c.png", "d.png"])
    (tmp_path / "labels.csv").write_bytes(TABLES[kind].encode())
    for data in (tmp_path / "labels.csv", tmp_path):
        assert kind_of(str(data)) == "csv"
        source = opened(data)
        assert read(source, root) == SPLIT
        assert (source.classes, source.reported, source.fractions) == (("cat", "dog"), "test", {})
    test = opened(tmp_path / "labels.csv", splits=("test",), classes=("cat", "cow", "dog"))
    assert (test.test.targets.tolist(), test.reported) == ([2], "test")
    val = opened(tmp_path / "labels.csv", splits=("test",), split="val")
    assert (len(val.test), val.reported) == (1, "val")


def test_a_list_without_splits_is_drawn_and_sorted(tmp_path: Path) -> None:
    names = [f"im ages/{i}.png" for i in range(20)]
    write_images(tmp_path, names, side=8)
    lines = [f"{tmp_path / name if i % 3 else name} {i % 2 + 9}" for i, name in enumerate(names)]
    (tmp_path / "list.txt").write_text("\n".join(reversed(lines)))
    source = opened(tmp_path / "list.txt")
    assert source.classes == ("9", "10")
    assert sorted(name for part in source.membership.values() for name in part) == sorted(names)
    assert (len(source.train), len(source.test)) == tuple(len(source.membership[part]) for part in ("train", "test"))
    (tmp_path / "list.txt").write_text("\n".join(lines))
    assert opened(tmp_path / "list.txt").membership == source.membership
    every = opened(tmp_path / "list.txt", test_fraction=None, splits=("test",))
    assert len(every.test) == 20


def test_columns_may_have_any_name(tmp_path: Path) -> None:
    write_images(tmp_path, ["a.png", "b.png", "c.png", "d.png"])
    (tmp_path / "t.csv").write_text("wo,was,wohin\na.png,x,train\nb.png,y,train\nc.png,x,test\nd.png,y,test\n")
    columns = {"image_column": "wo", "label_column": "was", "split_column": "wohin"}
    assert len(opened(tmp_path / "t.csv", **columns).test) == 2
    with pytest.raises(UserError, match="--image_column: wo, was, wohin"):
        opened(tmp_path / "t.csv")
    with pytest.raises(UserError, match="--label_column wem: there is no such column"):
        opened(tmp_path / "t.csv", **columns | {"label_column": "wem"})


def test_names_of_any_bytes(tmp_path: Path) -> None:
    odd = os.fsdecode(b"se\xf1al.png")
    write_images(tmp_path, [odd, "b.png", "c.png", "d.png"])
    (tmp_path / "t.csv").write_bytes(b"path,label\nse\xf1al.png,gl\xfcck\nb.png,x\nc.png,x\nd.png,gl\xfcck\n")
    source = opened(tmp_path / "t.csv")
    assert source.classes == (r"gl\xfcck", "x")
    assert {path.name for split in (source.train, source.test) for path in split.paths} == {
        odd,
        "b.png",
        "c.png",
        "d.png",
    }


MISTAKES = {
    "": "is empty",
    "path,label\n": "no rows",
    "path,label\na.png,x\nb.png\n": "line 3: expected 2 columns, found 1",
    "path,label\na.png,\nb.png,x\n": "line 2: a path or a label is missing",
    "path,label\na.png,x\na.png,y\n": "a.png has two labels, 'x' in line 2 and 'y' in line 3",
    "path,label,split\na.png,x,train\nb.png,y,trian\n": "line 3: 'trian' is no split",
    "path,label,split\na.png,x,train\nb.png,y,\n": "line 3: '' is no split",
    "path,label,split\na.png,x,train\nb.png,y,test\n": "y is a class of test that the training images lack",
    "path,label,split\na.png,x,val\nb.png,x,test\n": "no images of the split train; it has val, test",
    "path,label\na.png,x\nb.png,x\n": "one class, 'x'",
    "path,label\na.png,x\nb.png,y\n": "No image can be held out for test",
    "path,label\n" + "".join(f"gone{i}.png,x\n" for i in range(12)) + "a.png,y\n": "12 of 13 files are missing",
}


@pytest.mark.parametrize("text", MISTAKES)
def test_mistakes_are_one_line(tmp_path: Path, text: str) -> None:
    write_images(tmp_path, ["a.png", "b.png"])
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(UserError) as error:
        opened(tmp_path / "t.csv")
    line = str(error.value)
    assert MISTAKES[text] in line
    assert "\n" not in line
    if "missing below" in line:
        assert "gone9.png and 2 more" in line
        assert "gone10.png" not in line


def test_labels_are_ordered_as_numbers_where_they_are_numbers() -> None:
    assert ordered({"10", "9", "-1"}) == ("-1", "9", "10")
    assert ordered({"10", "9", "a"}) == ("10", "9", "a")


@pytest.mark.parametrize(
    ("stem", "split"),
    [
        ("train-00000-of-00002", "train"),
        ("Validation_3", "val"),
        ("test", "test"),
        ("testimony", None),
        ("trainer-1", None),
        ("part-train", None),
        ("dev.v2", "val"),
    ],
)
def test_the_split_that_a_file_is_of(stem: str, split: str | None) -> None:
    assert split_of_file(stem) == split

"""Parquet, Arrow and tar shards: the images and labels of their rows, by the rules of folders."""

import io
import json
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dataset import DataSource, SourceRequest, open_source
from dataset.detect import kind_of
from dataset.pipeline import build_eval_loader
from dataset.shards import expanded
from parser_params import Config
from utils.errors import RunError, UserError
from utils.launch import World

NAMES = ("ant", "bee")


def png(seed: int, side: int = 8) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, "png")
    return buffer.getvalue()


def pixels_of(content: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(content))).transpose(2, 0, 1)


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def samples(first: int, count: int, side: int = 8) -> list[tuple[str, bytes]]:
    """`count` images of classes 0 and 1 in turn, from number `first` on."""
    return [
        member
        for i in range(first, first + count)
        for member in (
            (f"d/{i:04}.png", png(i, side)),
            (f"d/{i:04}.cls", f"{i % 2}\n".encode()),
            (f"d/{i}.json", b"{}"),
        )
    ]


def write_parquet(
    path: Path, first: int, count: int, *, struct: bool = True, side: int = 8, arrow: bool = False
) -> None:
    """The same images as `samples`, in groups of 3 rows."""
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    path.parent.mkdir(parents=True, exist_ok=True)
    contents = [png(i, side) for i in range(first, first + count)]
    images = [{"bytes": content, "path": None} for content in contents] if struct else contents
    table = pa.table({"image": images, "label": [i % 2 for i in range(first, first + count)]})
    features = {"label": {"names": list(NAMES), "_type": "ClassLabel"}, "image": {"_type": "Image"}}
    table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    if arrow:
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=3)
    else:
        pq.write_table(table, path, row_group_size=3)


def opened(path: Path, kind: str, **rest) -> DataSource:
    return open_source(SourceRequest(dataset=kind, root=path, **{"test_fraction": 0.2, **rest}))


@pytest.mark.parametrize("kind", ["webdataset", "parquet", "bytes", "arrow"])
def test_files_with_splits_in_their_names(tmp_path: Path, kind: str) -> None:
    parts = {"train-000": (0, 7), "train-001": (7, 4), "validation-000": (20, 3), "test-000": (30, 4)}
    for name, (first, count) in parts.items():
        if kind == "webdataset":
            write_tar(tmp_path / f"{name}.tar", samples(first, count))
        else:
            suffix = "arrow" if kind == "arrow" else "parquet"
            write_parquet(
                tmp_path / "data" / f"{name}.{suffix}", first, count, struct=kind != "bytes", arrow=kind == "arrow"
            )
    dataset = "webdataset" if kind == "webdataset" else "parquet"
    assert kind_of(str(tmp_path)) == dataset
    source = opened(tmp_path, dataset)
    assert source.classes == (("0", "1") if kind == "webdataset" else NAMES)
    numbers = {"train": range(11), "val": range(20, 23), "test": range(30, 34)}
    for split, images in (("train", source.train), ("val", source.val), ("test", source.test)):
        order = [i for label in (0, 1) for i in numbers[split] if i % 2 == label]
        assert images.targets.tolist() == [i % 2 for i in order]
        assert (images.images.numpy() == np.stack([pixels_of(png(i)) for i in order])).all()
    assert (source.recipe, source.reported, source.crop_size) == ("cifar10", "test", 8)
    evaluated = opened(tmp_path, dataset, splits=("test",), classes=source.classes)
    assert (evaluated.test.images == source.test.images).all()


@pytest.mark.parametrize("kind", ["webdataset", "parquet"])
def test_large_images_are_read_from_their_places_and_drawn_by_their_names(tmp_path: Path, kind: str) -> None:
    if kind == "webdataset":
        for shard in range(3):
            write_tar(tmp_path / f"x-{shard:03}.tar", samples(10 * shard, 10, 70))
        data = tmp_path / "x-{000..002}.tar"
    else:
        for shard in range(3):
            write_parquet(tmp_path / f"x-{shard:03}.parquet", 10 * shard, 10, side=70)
        data = tmp_path / "x-*.parquet"
    assert kind_of(str(data)) == kind
    source = opened(data, kind)
    assert source.recipe == "imagenet"
    assert (len(source.train) + len(source.test), dict(source.fractions)) == (30, {"test": 0.2})
    for split in (source.train, source.test):
        copy = pickle.loads(pickle.dumps(split.store))  # as it travels to a decoding process
        for i, path in enumerate(split.paths):
            if kind == "webdataset":
                number = int(path.stem)
            else:
                number = int(path.parent.stem[-3:]) * 10 + int(path.name)
            assert split.content(i) == copy.read(int(split.places[i])) == png(number, 70)
            assert split.targets[i] == number % 2
    # two processes evaluate each image once
    config = Config(workers=0, eval_batch_size=2, crop_size=70)
    seen = []
    for rank in (0, 1):
        world = World(rank=rank, world_size=2, local_rank=rank, local_size=2, device=source.train.targets.device)
        for batch in build_eval_loader(source.test, config, world):
            seen += batch.indices_B.tolist()
            assert batch.labels_B.tolist() == source.test.targets[batch.indices_B].tolist()
    assert sorted(seen) == list(range(len(source.test)))


def test_parts_stay_when_shards_come(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", samples(0, 20))
    before = opened(tmp_path, "webdataset").membership
    write_tar(tmp_path / "b.tar", samples(20, 20))
    after = opened(tmp_path, "webdataset").membership
    assert all(set(names) <= set(after[part]) for part, names in before.items())


def test_braces() -> None:
    assert list(expanded("{train,test}-{08..10}.tar")) == [
        *(f"train-{n}.tar" for n in ("08", "09", "10")),
        *(f"test-{n}.tar" for n in ("08", "09", "10")),
    ]
    assert list(expanded("plain.tar")) == ["plain.tar"]


def test_labels_of_shards_may_be_names_and_keys_may_have_folders(tmp_path: Path) -> None:
    members = [
        ("a/x.png", png(0)),
        ("a/x.cls", b"zebra"),
        ("b/x.PNG", png(1)),
        ("b/x.cls", b"ape"),
        ("b/x.seg.png", b""),
    ]
    write_tar(tmp_path / "s.tar", members)
    source = opened(tmp_path / "s.tar", "webdataset", test_fraction=None, splits=("test",))
    assert (source.classes, source.test.targets.tolist()) == (("ape", "zebra"), [0, 1])


SHARDS = {
    "no label": ([("x.png", b""), ("y.png", b""), ("y.cls", b"1")], "1 keys have an image or a label"),
    "no image": ([("x.cls", b"0"), ("y.png", b""), ("y.cls", b"1")], "1 keys have an image or a label"),
    "twice": ([("x.png", b""), ("x.jpg", b""), ("x.cls", b"0")], "x.jpg: a second jpg of this key"),
    "nothing": ([("x.txt", b"")], "holds no image"),
}


@pytest.mark.parametrize("case", SHARDS)
def test_shards_that_are_no_data_set(tmp_path: Path, case: str) -> None:
    members, expected = SHARDS[case]
    write_tar(tmp_path / "s.tar", members)
    with pytest.raises(UserError, match=expected) as error:
        opened(tmp_path / "s.tar", "webdataset")
    assert "\n" not in str(error.value)


def test_damaged_and_missing_shards(tmp_path: Path) -> None:
    write_tar(tmp_path / "s-0.tar", samples(0, 4))
    with pytest.raises(UserError, match=r"s-1\.tar does not exist"):
        opened(tmp_path / "s-{0..1}.tar", "webdataset")
    (tmp_path / "s-1.tar").write_bytes(b"no tar")
    with pytest.raises(UserError, match=r"s-1\.tar is no readable tar file"):
        opened(tmp_path / "s-{0..1}.tar", "webdataset")
    write_tar(tmp_path / "test-2.tar", samples(0, 4))
    (tmp_path / "s-1.tar").unlink()
    with pytest.raises(UserError, match=r"s-0\.tar is of no split"):
        opened(tmp_path, "webdataset")


def test_a_bad_image_in_a_shard_is_named(tmp_path: Path) -> None:
    members = samples(0, 12)
    write_tar(tmp_path / "s.tar", [(n, b"junk" if n == "d/0003.png" else content) for n, content in members])
    with pytest.raises(RunError, match=r"s\.tar/d/0003\.png: not an image"):
        opened(tmp_path, "webdataset")
    source = opened(tmp_path, "webdataset", on_bad_image="skip")
    assert len(source.train) + len(source.test) == 11


def test_parquet_without_names_and_with_columns_of_other_names(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    table = pa.table(
        {
            "bild": [png(i) for i in range(6)],
            "art": ["b", "a", "b", "a", "b", "a"],
            "teil": ["train"] * 4 + ["test", "validation"],
            "text": ["x"] * 6,
        }
    )
    pq.write_table(table, tmp_path / "t.parquet")
    columns = {"image_column": "bild", "label_column": "art", "split_column": "teil"}
    source = opened(tmp_path / "t.parquet", "parquet", **columns)
    assert (source.classes, len(source.train), len(source.val), len(source.test)) == (("a", "b"), 4, 1, 1)
    with pytest.raises(UserError, match="--image_column: bild, art, teil, text"):
        opened(tmp_path / "t.parquet", "parquet")
    with pytest.raises(UserError, match="the column text holds string"):
        opened(tmp_path / "t.parquet", "parquet", **{**columns, "image_column": "text"})
    (tmp_path / "t.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match="no readable Parquet file"):
        opened(tmp_path / "t.parquet", "parquet")


def test_pyarrow_is_asked_for_where_it_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dataset.columns.importlib.util.find_spec", lambda name: None)
    (tmp_path / "t.parquet").touch()
    with pytest.raises(UserError, match="pip install 'pyarrow>=15'"):
        opened(tmp_path / "t.parquet", "parquet")


def test_large_groups_of_rows_are_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog) -> None:
    write_parquet(tmp_path / "t.parquet", 0, 12)
    opened(tmp_path, "parquet")
    assert "a group of" not in caplog.text
    monkeypatch.setattr("dataset.source.parquet.LARGE_GROUP", 100)
    opened(tmp_path, "parquet")
    assert "a group of t.parquet has 0 MB" in caplog.text

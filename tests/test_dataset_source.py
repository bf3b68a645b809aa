import io
import json
import logging
import os
import pickle
import struct
import tarfile
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import scipy.io
import torch
from PIL import Image
from sklearn.datasets import load_digits

from dataset import ImageSet, SourceRequest, open_source, sources
from dataset.archive import find_or_fetch
from dataset.class_folders import iterate_images
from dataset.decode import EXTENSIONS, resize_crop
from dataset.holdout import split_indices
from dataset.own_images import STATISTICS_FILE
from dataset.statistics import pixel_statistics
from utils.errors import RunError, UserError


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """Nothing here may reach out; the test of a download puts its own opener in place."""

    def refuse(*args, **kwargs):
        raise urllib.error.URLError(OSError("no network in tests"))

    monkeypatch.setattr(urllib.request, "urlopen", refuse)


def request(dataset, root, **rest):
    return SourceRequest(dataset=dataset, root=Path(root), **rest)


def message_of(error):
    text = str(error.value)
    assert "\n" not in text
    return text


def noise(seed, *shape):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


# --- registry, digits


def test_every_data_set_of_the_command_line_is_registered():
    assert {"cifar10", "cifar100", "digits", "folder", "imagenet", "svhn", "synthetic"} <= set(sources.names())


def test_an_unknown_name_is_answered_with_the_nearest(tmp_path):
    with pytest.raises(UserError) as error:
        open_source(request("cifar-10", tmp_path))
    assert "--dataset" in message_of(error)
    assert "'cifar10'" in message_of(error)


def test_digits_are_split_by_index_and_upscaled_bilinearly(tmp_path):
    source = open_source(request("digits", tmp_path))
    bunch = load_digits()
    is_test = np.arange(1797) % 5 == 4
    assert (len(source.train), len(source.test)) == (1438, 359)
    assert source.test.targets.tolist() == bunch.target[is_test].tolist()
    assert source.train.targets.tolist() == bunch.target[~is_test].tolist()
    assert (source.recipe, source.crop_size, source.classes) == ("digits", 16, tuple("0123456789"))

    # output pixel 2i reads 3/4 of pixel i and 1/4 of pixel i - 1, output 2i + 1 the mirror of it, edges repeated
    def double(rows):
        padded = np.pad(rows, ((1, 1), (0, 0)), mode="edge")
        result = np.empty((16, rows.shape[1]))
        result[0::2] = 0.75 * rows + 0.25 * padded[:-2]
        result[1::2] = 0.75 * rows + 0.25 * padded[2:]
        return result

    for position, index in enumerate(np.flatnonzero(is_test)[:20]):
        expected = np.round(double(double(bunch.images[index] * 255 / 16).T).T)
        assert (source.test.images[position].numpy() == expected).all()
    pixels = source.train.images[:, 0].double() / 255
    assert source.mean == pytest.approx([pixels.mean().item()] * 3, abs=1e-12)
    assert source.std == pytest.approx([pixels.std(correction=0).item()] * 3, abs=1e-12)


def test_a_class_count_that_does_not_fit_is_refused(tmp_path):
    open_source(request("digits", tmp_path, num_classes=10))
    with pytest.raises(UserError) as error:
        open_source(request("digits", tmp_path, num_classes=11))
    assert "--num_classes 11" in message_of(error)
    assert "10 classes" in message_of(error)


# --- CIFAR


def cifar_batches(dataset, count=4):
    """Names and contents of every file of a tiny CIFAR."""
    if dataset == "cifar10":
        names = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
        keys, num_classes = ("labels",), 10
    else:
        names, keys, num_classes = ["train", "test"], ("coarse_labels", "fine_labels"), 100
    files = {}
    for seed, name in enumerate(names):
        labels = np.random.default_rng(seed).integers(0, num_classes, count).tolist()
        files[name] = {
            "data": noise(seed, count, 3072),
            **{key: labels if "coarse" not in key else [0] * count for key in keys},
            "filenames": [b"x.png"] * count,
        }
    return files


def meta_of(dataset):
    if dataset == "cifar10":
        return "batches.meta", {"label_names": [f"name{i}" for i in range(10)]}
    return "meta", {"fine_label_names": [f"name{i}" for i in range(100)], "coarse_label_names": ["c"] * 20}


def write_cifar(folder, dataset, files, dumps=pickle.dumps, packed=True):
    """The files as the official archive (or as its unpacked folder) below `folder`."""
    inside, archive = {
        "cifar10": ("cifar-10-batches-py", "cifar-10-python.tar.gz"),
        "cifar100": ("cifar-100-python", "cifar-100-python.tar.gz"),
    }[dataset]
    folder.mkdir(parents=True, exist_ok=True)
    contents = {name: content if isinstance(content, bytes) else dumps(content) for name, content in files.items()}
    if packed:
        with tarfile.open(folder / archive, "w:gz") as tar:
            for name, content in contents.items():
                member = tarfile.TarInfo(f"{inside}/{name}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
        return folder / archive
    for name, content in contents.items():
        (folder / inside).mkdir(exist_ok=True)
        (folder / inside / name).write_bytes(content)
    return folder / inside


@pytest.mark.parametrize("dataset", ["cifar10", "cifar100"])
@pytest.mark.parametrize("place", ["", "train", "val"])
@pytest.mark.parametrize("packed", [True, False])
def test_cifar_is_read_packed_or_not_below_the_folder_or_its_splits(tmp_path, dataset, place, packed):
    files = cifar_batches(dataset)
    meta, names = meta_of(dataset)
    write_cifar(tmp_path / place, dataset, {**files, meta: names}, packed=packed)
    source = open_source(request(dataset, tmp_path, download=False))
    *train, test = files.values()
    key = "labels" if dataset == "cifar10" else "fine_labels"
    assert source.train.targets.tolist() == [label for batch in train for label in batch[key]]
    assert source.test.targets.tolist() == test[key]
    assert (source.train.images.numpy() == np.concatenate([b["data"] for b in train]).reshape(-1, 3, 32, 32)).all()
    assert (source.test.images.numpy() == test["data"].reshape(-1, 3, 32, 32)).all()
    assert source.classes[:2] == ("name0", "name1")
    assert len(source.classes) == (10 if dataset == "cifar10" else 100)
    assert (source.recipe, source.crop_size) == (dataset, 32)


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
@pytest.mark.parametrize("as_bytes", [True, False])
def test_cifar_pickles_of_every_protocol_are_plain(tmp_path, protocol, as_bytes):
    def dumps(content):
        if as_bytes:
            content = {key.encode(): value for key, value in content.items()}
        return pickle.dumps(content, protocol=protocol)

    files = cifar_batches("cifar10")
    files["test_batch"]["labels"] = [np.int64(3)] * 4  # a number of NumPy's
    meta, names = meta_of("cifar10")
    names["label_names"] = [name.encode() if as_bytes else name for name in names["label_names"]]
    write_cifar(tmp_path, "cifar10", {**files, meta: names}, dumps=dumps)
    source = open_source(request("cifar10", tmp_path))
    assert source.test.targets.tolist() == [3] * 4
    assert (source.test.images.numpy().reshape(-1, 3072) == files["test_batch"]["data"]).all()
    assert source.classes[0] == "name0"


def python2_pickle(pixels, labels):
    """What Python 2 and NumPy 1 wrote in 2009: byte strings for text, numpy.core."""
    dtype = b"cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    array = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R(K\x01"
    array += b"K" + bytes([len(pixels)]) + b"M" + struct.pack("<H", pixels.shape[1]) + b"\x86"
    array += dtype + b"\x89T" + struct.pack("<i", pixels.nbytes) + pixels.tobytes() + b"tb"
    listed = b"](" + b"".join(b"K" + bytes([label]) for label in labels) + b"e"
    return b"\x80\x02}(U\x04data" + array + b"U\x06labels" + listed + b"u."


def test_cifar_pickles_of_python_2_are_read(tmp_path):
    pixels = noise(0, 3, 3072)
    write_cifar(tmp_path, "cifar10", {"test_batch": python2_pickle(pixels, [7, 0, 9])})
    source = open_source(request("cifar10", tmp_path, splits=("test",)))
    assert source.test.targets.tolist() == [7, 0, 9]
    assert (source.test.images.numpy().reshape(-1, 3072) == pixels).all()
    assert len(source.train) == 0
    assert source.classes == tuple("0123456789")


class Attack:
    def __init__(self, function, *arguments):
        self.reduced = function, arguments

    def __reduce__(self):
        return self.reduced


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("call", ["system", "eval", "numpy", "codec"])
def test_a_cifar_file_cannot_run_code(tmp_path, packed, call):
    import codecs

    proof = tmp_path / "proof"
    attack = {
        "system": Attack(os.system, f"touch {proof}"),
        "eval": Attack(eval, f"open({str(proof)!r}, 'w')"),
        "numpy": Attack(np.save, str(proof), 1),
        "codec": Attack(codecs.encode, "text", "rot13"),
    }[call]
    files = cifar_batches("cifar10")
    files["data_batch_3"]["extra"] = attack
    write_cifar(tmp_path, "cifar10", files, packed=packed)
    with pytest.raises(UserError) as error:
        open_source(request("cifar10", tmp_path))
    assert "data_batch_3" in message_of(error)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cifar-10-python.tar.gz" if packed else "cifar-10-batches-py"]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"no pickle",
        pickle.dumps([1, 2]),
        pickle.dumps({"labels": [1]}),
        pickle.dumps({"data": np.zeros((2, 3071), np.uint8), "labels": [1, 2]}),
        pickle.dumps({"data": np.zeros((2, 3072), np.float32), "labels": [1, 2]}),
        pickle.dumps({"data": np.zeros((2, 3072), np.uint8), "labels": [1]}),
        pickle.dumps({"data": np.zeros((2, 3072), np.uint8), "labels": [1, 10]}),
        pickle.dumps({"data": np.zeros((2, 3072), np.uint8), "labels": [-1, 1]}),
        pickle.dumps({"data": np.zeros((2, 3072), np.uint8), "labels": ["a", "b"]}),
        pickle.dumps({"data": np.zeros((0, 3072), np.uint8), "labels": []}),
        pickle.dumps(cifar_batches("cifar10")["test_batch"])[:-3000],
    ],
)
def test_a_cifar_file_of_another_kind_is_refused_by_name(tmp_path, content):
    write_cifar(tmp_path, "cifar10", {"test_batch": content}, packed=False)
    with pytest.raises(UserError) as error:
        open_source(request("cifar10", tmp_path, splits=("test",)))
    assert str(tmp_path / "cifar-10-batches-py" / "test_batch") in message_of(error)


def test_a_damaged_or_incomplete_cifar_archive_is_refused_by_name(tmp_path):
    archive = write_cifar(tmp_path, "cifar10", cifar_batches("cifar10"))
    whole = archive.read_bytes()
    for content in (whole[: len(whole) // 2], whole[:5], b"", b"<html>not here</html>", whole[:1000] + bytes(2000)):
        archive.write_bytes(content)
        with pytest.raises(UserError) as error:
            open_source(request("cifar10", tmp_path))
        assert str(archive) in message_of(error)
        assert "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz" in message_of(error)
    files = cifar_batches("cifar10")
    del files["data_batch_4"]
    write_cifar(tmp_path, "cifar10", files)
    with pytest.raises(UserError, match="lacks data_batch_4"):
        open_source(request("cifar10", tmp_path))
    assert len(open_source(request("cifar10", tmp_path, splits=("test",))).test) == 4


def test_an_incomplete_cifar_folder_gives_way_to_the_archive(tmp_path):
    write_cifar(tmp_path, "cifar10", {"data_batch_1": b"half"}, packed=False)
    write_cifar(tmp_path, "cifar10", cifar_batches("cifar10"))
    assert len(open_source(request("cifar10", tmp_path)).train) == 20


# --- download and SVHN


@pytest.mark.parametrize(
    ("dataset", "file"),
    [
        ("cifar10", "cifar-10-python.tar.gz"),
        ("cifar100", "cifar-100-python.tar.gz"),
        ("svhn", "train_32x32.mat"),
    ],
)
@pytest.mark.parametrize("download", [True, False])
def test_missing_files_are_named_with_the_folder_and_the_address(tmp_path, dataset, file, download):
    root = tmp_path / "data"
    with pytest.raises(UserError) as error:
        open_source(request(dataset, root, download=download))
    text = message_of(error)
    assert str(root) in text
    assert file in text
    assert "://" in text
    assert ("no network in tests" in text) == download
    assert not root.exists()


def test_a_download_is_checked_and_leaves_nothing_half_done(tmp_path, monkeypatch):
    class Response(io.BytesIO):
        pass

    monkeypatch.setattr(urllib.request, "urlopen", lambda url, timeout: Response(b"the official file"))
    asked = request("svhn", tmp_path / "new")
    right = "0e8ab1adf6bb9ce1a6d1eb2d3d1d4d2c"
    with pytest.raises(UserError, match="MD5"):
        find_or_fetch(asked, "a.mat", "http://host/a.mat", right)
    assert list((tmp_path / "new").iterdir()) == []
    import hashlib

    path = find_or_fetch(asked, "a.mat", "http://host/a.mat", hashlib.md5(b"the official file").hexdigest())
    assert path == tmp_path / "new" / "a.mat"
    assert path.read_bytes() == b"the official file"
    assert [p.name for p in path.parent.iterdir()] == ["a.mat"]


def write_svhn(folder, part, labels, seed):
    pixels = noise(seed, 32, 32, 3, len(labels))
    folder.mkdir(exist_ok=True)
    scipy.io.savemat(folder / f"{part}_32x32.mat", {"X": pixels, "y": np.array(labels, np.uint8)[:, None]})
    return pixels


def test_svhn_is_train_then_extra_and_ten_is_zero(tmp_path):
    pixels = write_svhn(tmp_path, "train", [10, 1, 2], 0)
    more = write_svhn(tmp_path / "train", "extra", [9, 10], 1)
    test = write_svhn(tmp_path / "val", "test", [5, 10], 2)
    source = open_source(request("svhn", tmp_path))
    assert source.train.targets.tolist() == [0, 1, 2, 9, 0]
    assert source.test.targets.tolist() == [5, 0]
    assert (source.train.images[1].numpy() == pixels[..., 1].transpose(2, 0, 1)).all()
    assert (source.train.images[4].numpy() == more[..., 1].transpose(2, 0, 1)).all()
    assert (source.test.images[0].numpy() == test[..., 0].transpose(2, 0, 1)).all()
    assert source.train.images.is_contiguous()
    (tmp_path / "train_32x32.mat").unlink()
    assert len(open_source(request("svhn", tmp_path, splits=("test",))).test) == 2
    with pytest.raises(UserError, match="train_32x32"):
        open_source(request("svhn", tmp_path))


def test_a_damaged_or_foreign_svhn_file_is_refused_by_name(tmp_path):
    path = tmp_path / "test_32x32.mat"
    write_svhn(tmp_path, "test", [1] * 20, 0)
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], whole[:100], b"", b"<html>"):
        path.write_bytes(content)
        with pytest.raises(UserError) as error:
            open_source(request("svhn", tmp_path, splits=("test",)))
        assert str(path) in message_of(error)
    for bad in ({"X": noise(0, 32, 32, 3, 2)}, {"X": noise(0, 32, 32, 3, 2), "y": [[1]]}, {"X": 1, "y": 1}):
        scipy.io.savemat(path, bad)
        with pytest.raises(UserError) as error:
            open_source(request("svhn", tmp_path, splits=("test",)))
        assert str(path) in message_of(error)
    for labels in ([0, 1], [1, 11]):
        write_svhn(tmp_path, "test", labels, 0)
        with pytest.raises(UserError, match=r"outside 1\.\.10"):
            open_source(request("svhn", tmp_path, splits=("test",)))


# --- class folders


def write_images(root, layout, size=(40, 30)):
    """`layout`: {"train/cat": 3, ...}; returns the paths."""
    paths = []
    for seed, (folder, count) in enumerate(layout.items()):
        (root / folder).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            paths.append(root / folder / f"{i}.png")
            Image.fromarray(noise(100 * seed + i, size[1], size[0], 3)).save(paths[-1])
    return paths


@pytest.mark.parametrize("dataset", ["imagenet", "folder"])
def test_class_folders_are_listed_in_sorted_order(tmp_path, dataset):
    write_images(tmp_path, {"train/b": 2, "train/a": 3, "val/a": 1, "val/b": 1}, size=(100, 80))
    (tmp_path / "train" / "a" / "readme.txt").write_text("no image")
    (tmp_path / "train" / ".hidden").mkdir()
    (tmp_path / "train" / "a" / "._0.png").write_text("metadata of some file manager")
    source = open_source(request(dataset, tmp_path))
    assert source.classes == ("a", "b")
    assert [str(p.relative_to(tmp_path)) for p in source.train.paths] == [
        *(f"train/a/{i}.png" for i in range(3)),
        *(f"train/b/{i}.png" for i in range(2)),
    ]
    assert source.train.targets.tolist() == [0, 0, 0, 1, 1]
    assert source.test.targets.tolist() == [0, 1]
    assert source.train.images is None
    assert (source.recipe, source.crop_size) == ("imagenet", 224)
    if dataset == "imagenet":
        assert (source.mean, source.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def test_files_are_found_by_any_extension_that_is_read_in_any_case_and_in_subfolders(tmp_path):
    (tmp_path / "sub").mkdir()
    names = [
        "a.JPG",
        "b.Jpeg",
        "c.png",
        "d.PPM",
        "e.webp",
        "f.TIF",
        "g.bmp",
        "h.gif",
        "i.pgm",
        "sub/j.tiff",
        "sub/k.JPE",
    ]
    for name in [*names, "x.txt", "y", "z.eps", "z.h5", ".a.png"]:
        (tmp_path / name).touch()
    assert [str(p.relative_to(tmp_path)) for p in iterate_images(tmp_path)] == names
    assert {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pbm"} <= EXTENSIONS


@pytest.mark.parametrize("dataset", ["imagenet", "folder"])
@pytest.mark.parametrize(
    ("layout", "expected"),
    [
        (None, "{root} is not a folder"),
        ({}, "{root} has no folder train/"),
        ({"train/a": 1}, "{root} has no folder val/"),
        ({"val/a": 1}, "{root} has no folder train/"),
        ({"train": 1, "val/a": 1}, "{root}/train has no class folders"),
        ({"train/a": 1, "val": 1}, "{root}/val has no class folders"),
        ({"train/a": 1, "train/b": 0, "val/a": 1, "val/b": 1}, "{root}/train/b holds no image"),
        ({"train/a": 1, "train/b": 1, "val/a": 0, "val/b": 0}, "{root}/val/a holds no image"),
        ({"train/a": 1, "val/a": 1, "val/c": 1}, "{root}/val/c"),
        ({"train/a": 1, "val/a": 1, "test/c": 1}, "{root}/test/c"),
        ({"train/a": 1, "test": 1}, "{root} has no folder val/ or test/"),
    ],
)
def test_mistakes_in_the_folders_are_told_in_one_line_with_the_path(tmp_path, dataset, layout, expected):
    root = tmp_path / "data"
    if layout is not None:
        root.mkdir()
        write_images(root, layout)
    with pytest.raises(UserError) as error:
        open_source(request(dataset, root))
    assert expected.format(root=root) in message_of(error)


def test_a_split_that_is_not_needed_may_be_missing(tmp_path):
    write_images(tmp_path, {"val/a": 1, "val/b": 2})
    for dataset in ("imagenet", "folder"):
        source = open_source(request(dataset, tmp_path, splits=("test",)))
        assert (len(source.train), len(source.test)) == (0, 3)


def test_a_split_that_is_not_needed_may_be_of_any_kind(tmp_path):
    write_images(tmp_path, {"train/c": 1, "val/a": 1, "val/b": 2})
    (tmp_path / "train" / "c" / "0.png").write_bytes(b"")
    for dataset in ("imagenet", "folder"):
        assert open_source(request(dataset, tmp_path, splits=("test",))).classes == ("a", "b")


def splits_of(source):
    """The folders that the images of val and of test come from."""
    folders = [{p.parts[-3] for p in split.paths} if split else set() for split in (source.val, source.test)]
    return (*folders, source.reported)


@pytest.mark.parametrize("dataset", ["imagenet", "folder"])
@pytest.mark.parametrize(
    ("layout", "expected"),
    [
        ({"val/a": 2}, (set(), {"val"}, "val")),
        ({"test/a": 2}, (set(), {"test"}, "test")),
        ({"val/a": 1, "test/a": 2}, ({"val"}, {"test"}, "test")),
        ({"val/a": 1, "test": 2}, (set(), {"val"}, "val")),  # ImageNet's test/ has no class folders
    ],
)
def test_val_is_chosen_on_and_test_is_reported_under_their_own_names(tmp_path, dataset, layout, expected):
    write_images(tmp_path, {"train/a": 4, **layout}, size=(100, 100))
    assert splits_of(open_source(request(dataset, tmp_path))) == expected
    evaluated = open_source(request(dataset, tmp_path, splits=("test",)))
    assert splits_of(evaluated) == (set(), *expected[1:])
    for split in ("val", "test"):
        asked = request(dataset, tmp_path, splits=("test",), split=split)
        if split in expected[0] | expected[1]:
            assert splits_of(open_source(asked)) == (set(), {split}, split)
        else:
            with pytest.raises(UserError, match=f"--split {split}: ") as error:
                open_source(asked)
            message_of(error)


def test_other_data_sets_have_a_test_split_only(tmp_path):
    assert open_source(request("digits", tmp_path, splits=("test",), split="test")).reported == "test"
    with pytest.raises(UserError, match="--split val: --dataset digits has test images only"):
        open_source(request("digits", tmp_path, splits=("test",), split="val"))


def test_val_fraction_beside_a_val_that_is_chosen_on_is_refused(tmp_path):
    write_images(tmp_path, {"train/a": 4, "val/a": 2, "test/a": 2}, size=(100, 100))
    for dataset in ("imagenet", "folder"):
        with pytest.raises(UserError, match=r"--val_fraction 0\.5: .* chosen on val/") as error:
            open_source(request(dataset, tmp_path, val_fraction=0.5))
        message_of(error)


@pytest.mark.parametrize("side", [20, 100])
@pytest.mark.parametrize("layout", [{"val/a": 2}, {"val/a": 2, "val/b": 0}])
def test_a_class_without_validation_images_is_told_and_the_others_are_evaluated(tmp_path, side, layout, caplog):
    write_images(tmp_path, {"train/a": 3, "train/b": 3, **layout}, size=(side, side))
    source = open_source(request("folder", tmp_path))
    assert (source.classes, source.test.targets.tolist()) == (("a", "b"), [0, 0])
    (line,) = [record.getMessage() for record in caplog.records if "has no image of" in record.getMessage()]
    assert line == f"{tmp_path / 'val'} has no image of 1 of the 2 classes, such as b: evaluated on the others."
    # an evaluation knows the classes from its checkpoint, or from train/
    for classes in (("a", "b", "c"), None):
        known = open_source(request("folder", tmp_path, splits=("test",), classes=classes))
        assert known.classes == (classes or ("a", "b"))
        assert known.test.targets.tolist() == [0, 0]
    other = open_source(request("folder", tmp_path, splits=("test",), classes=("x",)))
    assert other.classes == ("a", "b")  # which whoever has the checkpoint refuses


def test_a_class_whose_validation_images_cannot_be_read_is_no_obstacle(tmp_path, caplog):
    paths = write_images(tmp_path, {"train/a": 2, "train/b": 2, "val/a": 1, "val/b": 1}, size=(20, 20))
    paths[-1].write_bytes(b"")
    source = open_source(request("folder", tmp_path, on_bad_image="skip"))
    assert source.test.targets.tolist() == [0]
    assert "such as b: evaluated on the others" in caplog.text


def test_the_number_of_classes_is_held_against_the_flag(tmp_path):
    write_images(tmp_path, {"train/a": 1, "val/a": 1}, size=(100, 100))
    with pytest.raises(UserError, match="--num_classes 3 "):
        open_source(request("folder", tmp_path, num_classes=3))


def test_each_file_counts_once_and_loops_end(tmp_path, caplog):
    write_images(tmp_path, {"train/a": 3, "train/b": 2, "val/a": 1, "val/b": 1}, size=(100, 100))
    a, b = tmp_path / "train" / "a", tmp_path / "train" / "b"
    (a / "loop").symlink_to(a)
    (a / "up").symlink_to("..")
    (a / "zz.png").symlink_to("0.png")
    (a / "hard.png").hardlink_to(a / "1.png")
    (a / "of_b.png").symlink_to(b / "0.png")
    files = open_source(request("imagenet", tmp_path)).train
    assert [str(p.relative_to(tmp_path / "train")) for p in files.paths] == [
        "a/0.png",
        "a/1.png",
        "a/2.png",
        "b/0.png",
        "b/1.png",
    ]
    assert files.targets.tolist() == [0, 0, 0, 1, 1]
    (line,) = [record.getMessage() for record in caplog.records if "left out" in record.getMessage()]
    assert line.startswith(f"{tmp_path / 'train'}: left out: ")
    assert "met before through links" in line
    assert list(iterate_images(a)) == [*(a / f"{i}.png" for i in range(3)), a / "of_b.png", *[a / "up" / "b" / "1.png"]]


def test_links_to_folders_and_files_elsewhere_are_followed_in_the_usual_order(tmp_path):
    store = tmp_path / "store"
    write_images(store, {"x": 2, "y/deep": 1, "z": 1}, size=(100, 100))
    (tmp_path / "train" / "a").mkdir(parents=True)
    (tmp_path / "train" / "a" / "m").symlink_to(store / "y")
    (tmp_path / "train" / "a" / "n.png").symlink_to(store / "x" / "1.png")
    (tmp_path / "train" / "a" / "b.png").symlink_to(store / "x" / "0.png")
    (tmp_path / "train" / "a" / "gone.png").symlink_to("nowhere")
    (tmp_path / "train" / "b").symlink_to(store / "z")
    names = ["a/b.png", "a/gone.png", "a/n.png", "a/m/deep/0.png", "b/0.png"]
    paths = open_source(request("imagenet", tmp_path, splits=("train",))).train.paths
    assert [str(p.relative_to(tmp_path / "train")) for p in paths] == names


def test_two_classes_that_are_one_folder_are_refused(tmp_path):
    write_images(tmp_path, {"train/a": 2}, size=(100, 100))
    (tmp_path / "train" / "b").symlink_to("a")
    with pytest.raises(UserError, match=r"train/b holds no image file .* of its own"):
        open_source(request("imagenet", tmp_path, splits=("train",)))


def test_pipes_are_no_images(tmp_path, caplog):
    write_images(tmp_path, {"train/a": 1}, size=(100, 100))
    os.mkfifo(tmp_path / "train" / "a" / "pipe.png")
    assert len(open_source(request("imagenet", tmp_path, splits=("train",))).train) == 1
    assert "1 neither file nor folder" in caplog.text


def test_whether_images_are_small_is_decided_over_all_classes_and_told(tmp_path, caplog):
    write_images(tmp_path, {"train/a": 101}, size=(20, 20))
    write_images(tmp_path, {"train/b": 4, "train/c": 4}, size=(100, 90))
    with caplog.at_level(logging.INFO):
        source = open_source(request("folder", tmp_path, splits=("train",)))
    # 34 of a, and the 4 of each other class
    assert source.recipe == "cifar10"
    assert f"--data {tmp_path}: images of 20 pixels (median" in caplog.text
    assert "small, kept in memory" in caplog.text
    write_images(tmp_path, {"train/b": 30, "train/c": 30}, size=(100, 90))
    caplog.clear()
    with caplog.at_level(logging.INFO):
        assert open_source(request("folder", tmp_path, splits=("train",))).recipe == "imagenet"
    assert "images of 90 pixels (median" in caplog.text
    assert "large, read as files" in caplog.text
    assert (
        open_source(request("folder", tmp_path, splits=("train",), recipe="cifar10", crop_size=32)).recipe == "cifar10"
    )


def test_the_sample_takes_every_class_alike(tmp_path, monkeypatch):
    looked_at = []
    monkeypatch.setattr("dataset.own_images.read_size", lambda path, _: looked_at.append(path) or (100, 100))
    for number in range(150):
        folder = tmp_path / "train" / f"{number:03}"
        folder.mkdir(parents=True)
        for name in ("a.png", "b.png"):
            (folder / name).touch()
    monkeypatch.setattr("dataset.own_images._measure", lambda *_: ((0.5,) * 3, (0.5,) * 3))
    open_source(request("folder", tmp_path, splits=("train",)))
    assert [path.parts[-2:] for path in looked_at] == [(f"{number:03}", "a.png") for number in range(150)]


def test_small_folders_live_in_memory_as_they_are(tmp_path):
    paths = write_images(tmp_path, {"train/a": 3, "train/b": 2, "val/a": 1, "val/b": 1}, size=(20, 20))
    source = open_source(request("folder", tmp_path))
    assert (source.recipe, source.crop_size, source.train.paths) == ("cifar10", 20, ())
    expected = np.stack([np.asarray(Image.open(p)) for p in paths]).transpose(0, 3, 1, 2)
    assert (source.train.images.numpy() == expected[:5]).all()
    assert (source.test.images.numpy() == expected[5:]).all()
    assert source.train.targets.tolist() == [0, 0, 0, 1, 1]
    pixels = expected[:5].transpose(1, 0, 2, 3).reshape(3, -1) / 255
    assert source.mean == pytest.approx(pixels.mean(axis=1), abs=1e-12)
    assert source.std == pytest.approx(pixels.std(axis=1), abs=1e-12)


def test_small_folders_are_brought_to_the_median_or_the_crop_size(tmp_path):
    sizes = [(30, 50), (60, 40), (64, 90), (44, 44), (200, 300)]  # median of the short sides: 44
    (tmp_path / "train" / "a").mkdir(parents=True)
    for i, (width, height) in enumerate(sizes):
        Image.fromarray(noise(i, height, width, 3)).save(tmp_path / "train" / "a" / f"{i}.png")
    source = open_source(request("folder", tmp_path, splits=("train",)))
    assert source.train.images.shape == (5, 3, 44, 44)
    for i in range(5):
        square = resize_crop(Image.open(tmp_path / "train" / "a" / f"{i}.png"), 44, 44)
        assert (source.train.images[i].numpy() == np.asarray(square).transpose(2, 0, 1)).all()
    source = open_source(request("folder", tmp_path, splits=("train",), crop_size=28))
    assert (source.train.images.shape, source.crop_size) == ((5, 3, 28, 28), 28)
    source = open_source(request("folder", tmp_path, splits=("train",), crop_size=96))
    assert (source.train.images, source.crop_size, source.recipe) == (None, 96, "imagenet")


def test_of_two_middle_sides_the_lower_counts(tmp_path):
    write_images(tmp_path, {"train/a": 1}, size=(30, 40))
    write_images(tmp_path, {"train/b": 1}, size=(50, 45))
    assert open_source(request("folder", tmp_path, splits=("train",))).crop_size == 30


@pytest.mark.parametrize(("side", "recipe"), [(64, "cifar10"), (65, "imagenet")])
def test_sixty_four_pixels_are_the_last_small_ones(tmp_path, side, recipe):
    write_images(tmp_path, {"train/a": 2, "val/a": 1}, size=(side + 20, side))
    assert open_source(request("folder", tmp_path)).recipe == recipe


def test_statistics_of_large_images_are_measured_once_and_kept_out_of_the_data(tmp_path):
    data, cache = tmp_path / "data", tmp_path / "runs" / "one"
    paths = write_images(data, {"train/a": 3, "train/b": 4, "val/a": 1, "val/b": 1}, size=(90, 70))
    before = sorted(data.rglob("*"))
    first = open_source(request("folder", data, cache_dir=cache, crop_size=66))
    cut = np.stack([np.asarray(resize_crop(Image.open(p), int(1.15 * 66), 66)) for p in paths[:7]])
    pixels = cut.reshape(-1, 3) / 255
    assert first.mean == pytest.approx(pixels.mean(axis=0), abs=1e-12)
    assert first.std == pytest.approx(pixels.std(axis=0), abs=1e-12)
    assert sorted(data.rglob("*")) == before
    assert [p.name for p in cache.iterdir()] == [STATISTICS_FILE]

    known = json.loads((cache / STATISTICS_FILE).read_text())
    (cache / STATISTICS_FILE).write_text(json.dumps({**known, "mean": [0.1, 0.2, 0.3]}))
    again = open_source(request("folder", data, cache_dir=cache, crop_size=66))
    assert again.mean == (0.1, 0.2, 0.3)  # proof that the file was used
    assert again.std == first.std
    other = open_source(request("folder", data, cache_dir=cache, crop_size=70))
    assert other.mean not in (first.mean, again.mean)  # another cut of the same files

    Image.fromarray(noise(99, 70, 90, 3)).save(paths[0])  # same name, other pixels
    changed = open_source(request("folder", data, cache_dir=cache, crop_size=66))
    assert changed.mean not in (first.mean, again.mean)
    for content in ("", "[]", "{}", "{", json.dumps({**known, "fingerprint": 1}), json.dumps({**known, "mean": 1})):
        (cache / STATISTICS_FILE).write_text(content)
        assert open_source(request("folder", data, cache_dir=cache, crop_size=66)).mean == changed.mean


def test_statistics_come_from_at_most_two_thousand_evenly_spaced_files(tmp_path, monkeypatch):
    monkeypatch.setattr("dataset.own_images.SAMPLE", 3)
    paths = write_images(tmp_path, {"train/a": 9}, size=(90, 70))
    source = open_source(request("folder", tmp_path, splits=("train",), crop_size=66))
    cut = np.stack([np.asarray(resize_crop(Image.open(paths[i]), 75, 66)) for i in (0, 4, 8)])
    assert source.mean == pytest.approx(cut.reshape(-1, 3).mean(axis=0) / 255, abs=1e-12)


def test_a_cache_that_cannot_be_written_is_no_failure(tmp_path):
    write_images(tmp_path, {"train/a": 2}, size=(20, 20))
    (tmp_path / "file").touch()
    source = open_source(request("folder", tmp_path, splits=("train",), cache_dir=tmp_path / "file"))
    assert len(source.train) == 2


def test_constant_images_do_not_give_a_zero_deviation():
    mean, std = pixel_statistics([torch.full((2, 3, 4, 4), 51, dtype=torch.uint8)])
    assert mean == pytest.approx((0.2, 0.2, 0.2))
    assert std == (1 / 255,) * 3
    with pytest.raises(UserError, match="No training image"):
        pixel_statistics([])


@pytest.mark.parametrize("side", [20, 100])
def test_bad_images_stop_the_opening_or_are_left_out(tmp_path, side, caplog):
    paths = write_images(tmp_path, {"train/a": 3, "train/b": 2, "val/a": 1, "val/b": 1}, size=(side, side))
    paths[1].write_bytes(b"")
    with pytest.raises(RunError) as error:
        open_source(request("folder", tmp_path))
    assert str(paths[1]) in message_of(error)
    assert "--on_bad_image skip" in message_of(error)
    assert error.value.exit_code == 1
    with caplog.at_level(logging.WARNING):
        source = open_source(request("folder", tmp_path, on_bad_image="skip"))
    if side == 20:
        assert source.train.targets.tolist() == [0, 0, 1, 1]
        assert (source.train.images[1].numpy() == np.asarray(Image.open(paths[2])).transpose(2, 0, 1)).all()
        assert str(paths[1]) in caplog.text
        for path in (paths[0], paths[2]):
            path.write_bytes(b"")
        with pytest.raises(UserError, match="class 'a'"):
            open_source(request("folder", tmp_path, on_bad_image="skip"))
    for path in paths:
        path.write_bytes(b"")
    with pytest.raises(UserError, match="no readable image"):
        open_source(request("folder", tmp_path, on_bad_image="skip"))


# --- synthetic and hold-out


def test_synthetic_is_a_function_of_its_seed(tmp_path):
    one, same, other = (open_source(request("synthetic", tmp_path, num_classes=7, seed=s)) for s in (3, 3, 4))
    assert torch.equal(one.train.images, same.train.images)
    assert not torch.equal(one.train.images, other.train.images)
    assert (len(one.train), len(one.test), len(one.classes)) == (1024, 256, 7)
    assert one.train.images.shape[1:] == (3, 32, 32)
    assert set(one.train.targets.tolist()) == set(range(7))


def test_synthetic_comes_in_any_size_and_every_class(tmp_path):
    source = open_source(request("synthetic", tmp_path, num_classes=600, crop_size=9))
    assert source.train.images.shape == (1200, 3, 9, 9)
    assert source.test.targets.bincount().tolist() == [1] * 600
    assert source.recipe == "cifar10"
    assert open_source(request("synthetic", tmp_path, num_classes=2, crop_size=65)).recipe == "imagenet"
    for num_classes in (None, 1):
        with pytest.raises(UserError, match="--num_classes"):
            open_source(request("synthetic", tmp_path, num_classes=num_classes))


def test_synthetic_classes_can_be_told_apart(tmp_path):
    source = open_source(request("synthetic", tmp_path, num_classes=10))
    train, test = source.train.images.float().flatten(1), source.test.images.float().flatten(1)
    centres = torch.stack([train[source.train.targets == label].mean(dim=0) for label in range(10)])
    assert (torch.cdist(test, centres).argmin(dim=1) == source.test.targets).float().mean() > 0.95


@pytest.mark.parametrize("fraction", [0.001, 0.1, 0.25, 0.5, 0.9, 0.999])
def test_the_hold_out_is_class_balanced_and_complete(fraction):
    targets = torch.tensor([0] * 40 + [1] * 20 + [2] * 7 + [3] + [4] * 2)[torch.randperm(70)]
    kept, held = split_indices(targets, fraction, np.random.default_rng(0))
    assert sorted(kept.tolist() + held.tolist()) == list(range(70))
    assert kept.tolist() == sorted(kept.tolist())
    assert held.tolist() == sorted(held.tolist())
    counts = targets[held].bincount(minlength=5).tolist()
    assert counts == [min(max(round(fraction * n), 1), n - 1) for n in (40, 20, 7, 1, 2)]


def test_val_fraction_is_a_function_of_the_seed_and_keeps_images_with_labels(tmp_path):
    whole = open_source(request("digits", tmp_path))
    one, same, other = (open_source(request("digits", tmp_path, val_fraction=0.1, seed=s)) for s in (1, 1, 2))
    assert torch.equal(one.val.images, same.val.images)
    assert not torch.equal(one.val.targets, other.val.targets)
    assert len(one.train) + len(one.val) == 1438
    assert whole.val is None
    both = {
        image.numpy().tobytes(): label for image, label in zip(whole.train.images, whole.train.targets, strict=True)
    }
    for part in (one.train, one.val):
        assert all(both[i.numpy().tobytes()] == t for i, t in zip(part.images[:50], part.targets[:50], strict=True))
    assert torch.equal(one.test.images, whole.test.images)


def test_val_fraction_of_files_takes_paths_along(tmp_path):
    write_images(tmp_path, {"train/a": 4, "train/b": 6, "val/a": 1, "val/b": 1}, size=(70, 70))
    source = open_source(request("imagenet", tmp_path, val_fraction=0.5))
    assert [p.parts[-2] for p in source.val.paths] == ["a"] * 2 + ["b"] * 3
    assert source.val.targets.tolist() == [0, 0, 1, 1, 1]
    assert not set(source.val.paths) & set(source.train.paths)


def test_a_val_fraction_that_cannot_be_held_out_is_refused(tmp_path):
    write_images(tmp_path, {"train/a": 1, "train/b": 1, "val/a": 1, "val/b": 1})
    with pytest.raises(UserError, match="--val_fraction"):
        open_source(request("folder", tmp_path, val_fraction=0.5))
    assert len(ImageSet.empty()) == 0

"""What --data is, where no --dataset says it."""

from pathlib import Path

import pytest

from dataset.detect import kind_of

FOLDERS = [
    (["a/1.jpg", "b/deep/2.PNG"], "folder"),
    (["train/a/1.jpg"], "folder"),
    (["valid/a/1.jpg"], "folder"),
    (["cifar-10-python.tar.gz"], "cifar10"),
    (["train/cifar-10-batches-py/test_batch"], "cifar10"),
    (["cifar-100-python/test"], "cifar100"),
    (["cifar-10-python.tar.gz", "cifar-100-python.tar.gz"], "cifar10"),  # as before there was a choice
    (["test_32x32.mat"], "svhn"),
    (["cifar-10-python.tar.gz", "a/1.jpg", "b/2.jpg"], "cifar10"),
    (["a/train/x/1.jpg", "b/train/x/1.jpg"], None),  # two data sets
    (["a/1.jpg"], None),
    (["1.jpg", "2.jpg"], None),
    (["a/notes.txt", "b/notes.txt"], None),
    ([".a/1.jpg", ".b/2.jpg"], None),
    ([], None),
]


@pytest.mark.parametrize(("files", "kind"), FOLDERS)
def test_folders(tmp_path: Path, files: list[str], kind: str | None) -> None:
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert kind_of(str(tmp_path)) == kind


def test_a_folder_that_nobody_named_is_looked_at_for_published_data_sets_only(tmp_path: Path) -> None:
    for name in ("a/1.jpg", "b/2.jpg"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).touch()
    assert kind_of(str(tmp_path), is_chosen=False) is None
    (tmp_path / "cifar-100-python.tar.gz").touch()
    assert kind_of(str(tmp_path), is_chosen=False) == "cifar100"


@pytest.mark.parametrize(
    ("name", "kind"),
    [("l.csv", "csv"), ("l.TXT", "csv"), ("a.tar", "webdataset"), ("a.pq", "parquet"), ("a.jpg", None)],
)
def test_files(tmp_path: Path, name: str, kind: str | None) -> None:
    assert kind_of(str(tmp_path / name)) == kind  # of one that is not there too, which then is missed by its name
    (tmp_path / name).touch()
    assert kind_of(str(tmp_path / name)) == kind


def test_what_is_not_there_is_nothing(tmp_path: Path) -> None:
    assert kind_of(str(tmp_path / "gone")) is None

"""Names of any bytes: escaped without loss, and every file and stream that has them takes them."""

import csv
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from record.checkpoint import load_checkpoint
from record.events import EventFile  # noqa: F401 - TensorBoard is there before a run's own warnings count
from utils.text import ESCAPE, escaped, fit_streams, one_line

ROOT = Path(__file__).parent.parent
BYTES = [
    b"se\xf1al",
    b"\xff\xfe",
    b"a\nb",
    b"tab\there",
    b"\xc2\x85next",
    b"back\\slash",
    b"\\xf1",
    b"caf\xc3\xa9",
    b"\xe2\x80\xa8",
]
NAMES = [os.fsdecode(name) for name in BYTES]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("plain name.jpg", "plain name.jpg"),
        ("café 日本.jpg", "café 日本.jpg"),
        (os.fsdecode(b"se\xf1al.jpg"), r"se\xf1al.jpg"),
        ("a\nb", r"a\x0ab"),
        ("\x85", r"\u0085"),
        ("\u2028", r"\u2028"),
        (r"back\slash", r"back\slash"),
        (r"\xf1", r"\\xf1"),
        (os.fsdecode(b"\\\xf1"), r"\\\xf1"),
        (Path("a/b"), "a/b"),
    ],
)
def test_a_name_is_shown_so(name: Any, expected: str) -> None:
    assert escaped(name) == expected


@given(st.binary(max_size=12), st.binary(max_size=12))
def test_no_two_names_become_one(one: bytes, other: bytes) -> None:
    first, second = escaped(os.fsdecode(one)), escaped(os.fsdecode(other))
    assert (first == second) == (one == other)
    for text in (first, second):
        assert text.encode().decode() == text
        assert len(text.splitlines()) <= 1
        assert one_line(text) == text


def test_an_encoding_gets_what_it_can_say() -> None:
    assert os.fsdecode(b"se\xf1al").encode(errors=ESCAPE) == rb"se\xf1al"
    assert "é日😀".encode("ascii", ESCAPE) == rb"\u00e9\u65e5\U0001f600"
    with pytest.raises(UnicodeDecodeError):
        b"\xff".decode(errors=ESCAPE)


def test_streams_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    fit_streams()
    stream.write(os.fsdecode(b"caf\xc3\xa9 \xf1"))
    stream.flush()
    assert stream.buffer.getvalue() == rb"caf\u00e9 \xf1"
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    fit_streams()  # what a test or a notebook puts there need not know how


# --- the contract: odd names x everything that writes


def write_images(folder: Path, count: int, size: int) -> None:
    folder.mkdir(parents=True)
    generator = np.random.default_rng(len(folder.name))
    for i in range(count):
        Image.fromarray(generator.integers(0, 256, (size, size, 3), dtype=np.uint8)).save(folder / f"{i}.png")


def program(argv: list[object], encoding: str) -> str:
    """Runs a program under LC_ALL=C or an encoding that cannot say much; returns its output, which fits."""
    plain = {k: v for k, v in os.environ.items() if k not in ("LC_ALL", "LANG", "PYTHONIOENCODING", "PYTHONUTF8")}
    changes = {"LC_ALL": "C"} if encoding == "C" else {"PYTHONIOENCODING": encoding}
    words = [word if isinstance(word, bytes) else os.fsencode(str(word)) for word in argv]
    done = subprocess.run(
        [sys.executable, *words],
        cwd=ROOT,
        env={**plain, **changes, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        check=False,
    )
    output = (done.stdout + done.stderr).decode("utf-8" if encoding == "C" else encoding)  # or this raises
    assert "Traceback" not in output, output
    assert done.returncode == 0, output
    return output


TWO = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


@pytest.mark.parametrize(
    ("size", "encoding", "launcher"),
    [(16, "ascii", []), (70, "C", []), pytest.param(16, "ascii", TWO, marks=pytest.mark.slow)],
)
def test_whatever_is_written_or_printed_takes_every_name(
    tmp_path: Path, size: int, encoding: str, launcher: list[object]
) -> None:
    base = tmp_path / os.fsdecode(b"b\xe5se\n")
    data, run = base / os.fsdecode(b"d\xe4ta"), base / os.fsdecode(b"r\xfcn")
    for split, count in (("train", 3), ("val", 2), ("test", 2)):
        for name in NAMES:
            write_images(data / split / name, count, size)
            (data / split / name / os.fsdecode(b"br\xf6ken\n.png")).write_bytes(b"none")
    classes = sorted(map(escaped, NAMES))
    flags = ["--dataset", "folder", "--data", data, "--arch", "resnet20", "--split_factor", 2, "--workers", 0]
    flags += ["--epochs", 1, "--batch_size", 9, "--on_bad_image", "skip", "--no_cuda", "--seed", 1]
    flags += (
        ["--is_autoaugment", 0, "--crop_size", 16]
        if size == 16
        else ["--arch", "torchvision/resnet18", "--max_steps", 2, "--crop_size", 66]
    )
    program([*launcher, "train_split.py", *flags, "--model_dir", run], encoding)

    left_out = (run / "bad_images.txt").read_bytes().decode()
    assert left_out.count("\n") >= 2 * len(NAMES)
    assert all(r"br\xf6ken\x0a.png: not an image" in line for line in left_out.splitlines())
    assert r"br\xf6ken" in (run / "train.log").read_bytes().decode()
    assert not list(run.glob("*.partial"))
    for name in ("hparams_train.json", "env.json", "results.json"):
        text = (run / name).read_bytes().decode()
        assert r"\ud" not in text  # half of a surrogate pair: not every reader of JSON takes it
        json.loads(text)
    assert any(r"d\xe4ta" in word for word in json.loads((run / "env.json").read_text())["command"])
    checkpoint = load_checkpoint(run / "model_best.pth.tar")
    assert checkpoint["classes"] == classes
    assert checkpoint["config"]["data"] == str(data)  # the place itself, which eval.py goes to

    best = run / "model_best.pth.tar"
    readers = ["--on_bad_image", "skip", "--workers", 0, "--no_cuda"]
    output = program([*launcher, "eval.py", "--resume", best, *readers], encoding)
    results = json.loads(output[output.index('{"checkpoint"') :].splitlines()[0])
    assert list(results["per_class_acc"]) == classes
    assert (results["split"], results["images"], results["skipped"]) == ("test", 2 * len(NAMES), results["skipped"])
    with (run / "eval" / "per_class.csv").open(encoding="utf-8", newline="") as file:
        assert [row["name"] for row in csv.DictReader(file)] == classes
    with Image.open(run / "eval" / "confusion.png") as picture:
        assert picture.width > 100

    out = base / os.fsdecode(b"\xf6ut")
    predict = ["--predict", data / "test", "--model_dir", out]
    program([*launcher, "eval.py", "--resume", best, *predict, *readers], encoding)
    with (out / "predict_test" / "predictions.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert sorted(row["file"] for row in rows) == sorted(
        f"{escaped(f'{name}/{i}.png')}" for name in NAMES for i in range(2)
    )
    assert {row["name_1"] for row in rows} <= set(classes)
    if size == 16 and not launcher:
        program(["script/export.py", best, "--out", out / os.fsdecode(b"n\xe9t.pt2"), "--data", data], encoding)
        program(["script/convert_checkpoint.py", best, out / os.fsdecode(b"n\xe9t.pth.tar")], encoding)
        program(["-m", "utils.compare", run, "--out", out / os.fsdecode(b"v\xe9rsus")], encoding)
        program(["script/quickstart_table.py", run, run], encoding)
        assert torch.load(out / os.fsdecode(b"n\xe9t.pth.tar"), weights_only=True)["classes"] == classes

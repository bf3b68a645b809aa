"""Files damaged at random bytes, and folders of any shape, work or one line says what is wrong: no crash, no hang."""

import contextlib
import io
import itertools
import os
import random
import re
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from dataset import SourceRequest, open_source
from dataset.decode import BadImage, read_rgb
from dataset.options import DataOptions
from dataset.pipeline import build_eval_loader, build_train_loader
from dataset.unlabelled import file_inputs
from model import BackboneRequest, build_splitnet
from model.restore import published_keys, restore_splitnet
from parser_params import Config, parse_config
from record.checkpoint import load_checkpoint, save_checkpoint
from record.logger import LineFile
from utils.errors import RunError, UserError
from utils.launch import World

CASES = {"checkpoint": 150, "image": 240, "config": 120, "log": 60}  # 570 damaged files


def damage(content: bytes, chance: random.Random) -> bytes:
    """Flipped bytes, a cut, a hole, a doubled or a foreign piece."""
    data = bytearray(content)
    kind = chance.randrange(5)
    place = chance.randrange(len(data))
    length = chance.randint(1, max(1, len(data) // 4))
    if kind == 0:
        for _ in range(chance.randint(1, 20)):
            data[chance.randrange(len(data))] = chance.randrange(256)
    elif kind == 1:
        del data[place:]
    elif kind == 2:
        data[place : place + length] = bytes(len(data[place : place + length]))
    elif kind == 3:
        data[place:place] = data[place : place + length]
    else:
        data[place : place + length] = chance.randbytes(length)
    return bytes(data)


def survives(action: Callable[[], Any], allowed: tuple[type[Exception], ...], what: str) -> bool:
    """Run; True if it worked, False if it was refused in one line. Anything else fails the test."""
    try:
        action()
    except allowed as error:
        text = str(error)
        if "\n" in text.strip() or not text:
            pytest.fail(f"{what}: not one line: {text!r}")
        return False
    return True


@pytest.fixture(scope="module")
def checkpoint() -> bytes:
    network = build_splitnet(BackboneRequest(arch="resnet20", split_factor=8, crop_size=16), seed=0)
    state = {
        "epoch": 1,
        "arch": "resnet20",
        "state_dict": published_keys(network.state_dict()),
        "best_acc1": 1.0,
        "config": {"arch": "resnet20", "dataset": "digits", "split_factor": 8, "crop_size": 16},
        "classes": [str(i) for i in range(10)],
        "mean": [0.5, 0.5, 0.5],
        "std": [0.2, 0.2, 0.2],
        "crop_size": 16,
    }
    file = io.BytesIO()
    torch.save(state, file)
    return file.getvalue()


@pytest.mark.slow
def test_checkpoints(checkpoint: bytes, tmp_path: Path) -> None:
    path, refused = tmp_path / "c.pth.tar", 0
    for seed in range(CASES["checkpoint"]):
        # the index and the pickle are small beside the tensors: damage them as often
        chance = random.Random(seed)
        content = checkpoint
        if seed % 2:
            head, tail = content[:4000], content[-30000:]
            content = damage(head, chance) + content[4000:-30000] + damage(tail, chance)
        else:
            content = damage(content, chance)
        path.write_bytes(content)
        refused += not survives(lambda: restore_splitnet(load_checkpoint(path)), (UserError,), f"checkpoint {seed}")
    assert refused > CASES["checkpoint"] // 4


def image_files() -> list[tuple[str, bytes]]:
    pixels = np.random.default_rng(0).integers(0, 256, (24, 20, 3), dtype=np.uint8)
    files = []
    for kind, mode, options in (
        ("jpeg", "RGB", {}),
        ("jpeg", "CMYK", {}),
        ("png", "RGBA", {}),
        ("png", "P", {}),
        ("png", "I;16", {}),
        ("bmp", "RGB", {}),
        ("gif", "P", {}),
        ("tiff", "RGB", {"compression": "tiff_lzw"}),
    ):
        image = Image.fromarray(pixels)
        image = Image.fromarray(pixels[..., 0].astype(np.uint16) * 257) if mode == "I;16" else image.convert(mode)
        file = io.BytesIO()
        image.save(file, kind, **options)
        files.append((kind, file.getvalue()))
    return files


def test_images(tmp_path: Path) -> None:
    files, refused = image_files(), 0
    for seed in range(CASES["image"]):
        kind, content = files[seed % len(files)]
        path = tmp_path / f"i.{kind}"
        path.write_bytes(damage(content, random.Random(seed)))
        refused += not survives(lambda path=path: np.array(read_rgb(path)), (BadImage,), f"{kind} {seed}")
    assert 0 < refused < CASES["image"]


def test_configs(tmp_path: Path) -> None:
    content = yaml.safe_dump(
        {"lr": 0.1, "epochs": 3, "arch": "resnet20", "is_mixup": 1, "lr_milestones": [1, 2], "resume": None}
    ).encode()
    path, refused = tmp_path / "c.yaml", 0
    for seed in range(CASES["config"]):
        path.write_bytes(damage(content, random.Random(seed)))

        def parse() -> Config:
            return parse_config(["--config", str(path)])

        refused += not survives(parse, (UserError,), f"config {seed}: {path.read_bytes()!r}")
    assert refused > 10


def test_logs(tmp_path: Path) -> None:
    content = b"".join(b'{"kind": "train", "step": %d}\n' % i for i in range(30))
    path = tmp_path / "metrics.jsonl"
    for seed in range(CASES["log"]):
        path.write_bytes(damage(content, random.Random(seed)))
        log = LineFile(path)
        log.rewind(12)
        log.write("next")
        log.close()
        lines = path.read_bytes().split(b"\n")
        assert len(lines) <= 14, f"log {seed}"
        assert lines[-2:] == [b"next", b""], f"log {seed}"


# --- folders

FOLDERS = 300
FOLDER_SECONDS = 30  # for one case
FOLDER_MIB = 200  # more than before the first case; the largest picture in them has 200,000 pixels


def pictures() -> list[tuple[str, bytes]]:
    """Name's ending and content of files of many shapes, and of some that are no pictures."""
    found = []
    for width, height in ((20, 20), (33, 17), (70, 90), (130, 60), (1, 1), (2, 300), (200_000, 1), (1, 30_000)):
        for kind, mode in (("png", "RGB"), ("jpg", "RGB"), ("png", "LA"), ("webp", "RGBA"), ("tif", "I;16")):
            if max(width, height) < 16_000 or kind == "png":
                file = io.BytesIO()
                Image.new(mode, (width, height)).save(file, {"jpg": "jpeg", "tif": "tiff"}.get(kind, kind))
                found.append((kind, file.getvalue()))
    return [
        *found,
        ("png", b""),
        ("jpg", b"no picture"),
        ("PNG", found[0][1]),
        ("txt", b"text"),
        ("png", found[0][1][:30]),
    ]


def random_name(chance: random.Random) -> str:
    return os.fsdecode(
        chance.choice((b"a", b"b", b"c", b"se\xf1al", b"new\nline", b".hidden", b"caf\xc3\xa9", b"\\xf1"))
    )


def build_folder(root: Path, chance: random.Random, files: list[tuple[str, bytes]]) -> None:
    """Splits and classes as people, scripts and broken copies leave them."""
    classes = [random_name(chance) for _ in range(chance.randint(1, 4))]
    root.mkdir()
    made = [root]
    for split in ("train", "val", "test"):
        if chance.random() < (0.1 if split == "train" else 0.35):
            continue
        (root / split).mkdir()
        made.append(root / split)
        for name in {*classes, *([random_name(chance)] if chance.random() < 0.15 else [])}:
            if chance.random() < 0.1:
                continue
            folder = root / split / name / ("deep/er" if chance.random() < 0.15 else "")
            folder.mkdir(parents=True, exist_ok=True)
            made.append(folder)
            for number in range(chance.choice((0, 1, 2, 3, 5))):
                kind, content = chance.choice(files)
                (folder / f"{random_name(chance)}{number}.{kind}").write_bytes(content)
    for number in range(chance.choice((0, 0, 1, 3, 6))):
        there = chance.choice(made)
        target = chance.choice(["..", ".", "nowhere", "/dev/zero", *map(str, made), *map(str, root.rglob("*.png"))])
        (there / f"link{number}{chance.choice(('', '.png'))}").symlink_to(target)
    if chance.random() < 0.1:
        os.mkfifo(chance.choice(made) / "pipe.png")


def use_folder(root: Path, chance: random.Random) -> None:
    """What training, evaluation and prediction do with a folder before any network sees it."""
    world = World(0, 1, 0, 1, torch.device("cpu"))
    skip = chance.choice(("skip", "skip", "fail"))
    crop_size = chance.choice((None, 24, 70))
    asked = SourceRequest(
        dataset=chance.choice(("folder", "imagenet")),
        root=root,
        crop_size=crop_size,
        on_bad_image=skip,
        val_fraction=chance.choice((0.0, 0.0, 0.3)),
    )
    options = DataOptions(crop_size=crop_size or 32, batch_size=2, workers=0, on_bad_image=skip)
    evaluation = replace(asked, splits=("test",), split=chance.choice((None, None, "val", "test")), val_fraction=0.0)

    def train() -> None:
        source = open_source(asked)
        loader = build_train_loader(source, options, world, num_views=2, seed=1)
        for batch in itertools.islice(loader.epoch(0), 4):
            assert batch.images.dtype == torch.uint8
        for split in filter(None, (source.val, source.test)):
            assert sum(len(batch.labels_B) for batch in build_eval_loader(split, options, world)) <= len(split)

    def evaluate() -> None:
        source = open_source(evaluation)
        assert set(source.test.targets.tolist()) <= set(range(len(source.classes)))
        for name in source.classes:
            assert name.isprintable()
            name.encode()

    def predict() -> None:
        inputs = file_inputs(root, load=lambda files: build_eval_loader(files, options, world), prepare=lambda x: x)
        for indices_B, images in inputs.batches:
            assert len(indices_B) == len(images)
        assert all(name.encode() and name.isprintable() for name in inputs.names)

    for action in (train, evaluate, predict):
        survives(action, (UserError, RunError), f"{action.__name__} {root}")


def peak_mib() -> float:
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024  # type: ignore[index]


def test_folders(tmp_path: Path) -> None:
    files = pictures()
    watched = os.access("/proc/self/clear_refs", os.W_OK)
    if watched:
        Path("/proc/self/clear_refs").write_text("5")  # the peak is now what is in use
    before = peak_mib() if watched else 0.0

    def too_long(number: int, frame: Any) -> None:
        pytest.fail(f"a case takes more than {FOLDER_SECONDS} s")

    usual = signal.signal(signal.SIGALRM, too_long)
    try:
        for seed in range(FOLDERS):
            chance, root = random.Random(seed), tmp_path / str(seed)
            build_folder(root, chance, files)
            signal.alarm(FOLDER_SECONDS)
            use_folder(root, chance)
            signal.alarm(0)
            shutil.rmtree(root, ignore_errors=True)
            if watched:
                assert peak_mib() - before < FOLDER_MIB, f"case {seed}"
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, usual)


def test_damage_is_counted() -> None:
    assert sum(CASES.values()) >= 500


def test_saving_over_a_damaged_file_heals_it(checkpoint: bytes, tmp_path: Path) -> None:
    path = tmp_path / "c.pth.tar"
    path.write_bytes(checkpoint[:100])
    with contextlib.suppress(UserError):
        load_checkpoint(path)
    save_checkpoint(torch.load(io.BytesIO(checkpoint), weights_only=True), path)
    assert load_checkpoint(path)["epoch"] == 1

"""Files damaged at random bytes either still work, or one line says what is wrong: no code run, no crash, no hang."""

import contextlib
import io
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from dataset.decode import BadImage, read_rgb
from model import BackboneRequest, build_splitnet
from model.restore import published_keys, restore_splitnet
from parser_params import Config, parse_config
from record.checkpoint import load_checkpoint, save_checkpoint
from record.logger import LineFile
from utils.errors import UserError

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


def test_damage_is_counted() -> None:
    assert sum(CASES.values()) >= 500


def test_saving_over_a_damaged_file_heals_it(checkpoint: bytes, tmp_path: Path) -> None:
    path = tmp_path / "c.pth.tar"
    path.write_bytes(checkpoint[:100])
    with contextlib.suppress(UserError):
        load_checkpoint(path)
    save_checkpoint(torch.load(io.BytesIO(checkpoint), weights_only=True), path)
    assert load_checkpoint(path)["epoch"] == 1

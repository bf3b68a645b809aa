"""eval.py in several processes of a machine: each set of images is decoded once, and the figures are those of one."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dataset import own_images
from evaluation import foreign
from tests.runs import Finished, Run
from tests.tuned_run import SEED, digits, fitted_network, write_run
from utils import neighbours
from utils.launch import free_port

pytestmark = pytest.mark.skipif(not neighbours.BOOT.exists(), reason="files are opened through /proc")
SIZES = {"train": 400, "test": 150}
OWN = {"seconds", "images_per_second", "results_dir", "tuned_checkpoint"}  # of each evaluation


def save(pixels_HWC: np.ndarray, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels_HWC).save(path)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on a folder of digits, with images of other sizes for --ood and --shift beside it."""
    folder, source, draw = tmp_path_factory.mktemp("place"), digits(), np.random.default_rng(0)
    for split, count in SIZES.items():
        images = {"train": source.train, "test": source.test}[split].subset(slice(count))
        assert images.images is not None
        for number, (pixels_CHW, label) in enumerate(zip(images.images, images.targets.tolist(), strict=True)):
            path = folder / "data" / split / source.classes[label] / f"{number}.png"
            save(pixels_CHW.permute(1, 2, 0).numpy(), path)
    for number in range(12):
        save(draw.integers(0, 256, (20, 20, 3), dtype=np.uint8), folder / "other" / "test" / "a" / f"{number}.png")
    (folder / "shift").mkdir()
    np.save(folder / "shift" / "snow.npy", draw.integers(0, 256, (50, 12, 12, 3), dtype=np.uint8))
    np.save(folder / "shift" / "labels.npy", np.arange(10))
    known = {"dataset": "folder", "data": str(folder / "data"), "val_fraction": 0.3, "seed": SEED}
    config = {"arch": "resnet20", "split_factor": 2, "method": "co_training", **known}
    write_run(folder, fitted_network(), config=config, held_out_sha256=None, data_recipe="cifar10")
    return folder


def counted(file: str) -> None:
    """Notes how many images this process decodes, and resizes, at a time."""

    def note(real: Callable[..., Any], work: str, images: Any, *rest: Any) -> Any:
        with open(file, "a", encoding="ascii") as log:
            log.write(f"{work} {len(images)}\n")
        return real(images, *rest)

    own_images._read = partial(note, own_images._read, "decode")
    foreign._resized = partial(note, foreign._resized, "resize")


def job(world_size: int, folder: Path, *argv: object) -> tuple[list[Finished], list[str]]:
    """eval.py in so many processes, as a launcher starts it; how they ended, and what `counted` noted of all."""
    places = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    sizes = {"WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size)}
    command = ["--no_cuda", "--workers", "0", "--amp_dtype", "fp32", "--model_dir", folder, *argv]
    runs = [
        Run(
            command,
            folder / f"process{rank}",
            module="eval",
            before=partial(counted, f"{folder}.log"),
            environment={**places, **sizes, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(world_size)
    ]
    return [run.wait() for run in runs], sorted(Path(f"{folder}.log").read_text().splitlines())


def figures(folder: Path, number: Callable[[str], Any]) -> dict[str, Any]:
    """results.json without times and paths; `number` reads a figure."""
    results = json.loads((folder / "results.json").read_text(), parse_float=number)
    return {name: results[name] for name in results.keys() - OWN}


@pytest.mark.slow
def test_two_processes_decode_every_set_once_with_the_figures_of_one(place: Path, tmp_path: Path) -> None:
    flags = ["--resume", place, "--tune", "calibration", "--tune_on", "val", "--ood"]
    flags += [f"folder:{place / 'other'}", "--shift", place / "shift"]
    # of --ood; the run's, with the test images; the test images that are reported; and what has another size
    once = ["decode 12", "decode 150", "decode 150", "decode 400"] + ["resize 10"] * 5 + ["resize 12"]
    for name, world_size in {"one": 1, "two": 2}.items():
        ended, done = job(world_size, tmp_path / name, *flags)
        assert [process.code for process in ended] == [0] * world_size, ended[-1].stderr
        assert done == once
    nearly = partial(pytest.approx, rel=1e-6, abs=1e-9)  # sums are in another order
    assert figures(tmp_path / "two", float) == figures(tmp_path / "one", lambda text: nearly(float(text)))


def test_a_bad_image_ends_every_process_with_a_line(place: Path, tmp_path: Path) -> None:
    bad = tmp_path / "data" / "test" / "0" / "bad.png"
    bad.parent.mkdir(parents=True)
    bad.write_bytes(b"no image")
    (first, second), done = job(2, tmp_path / "eval", "--resume", place, "--data", tmp_path / "data")
    assert (first.code, second.code) == (1, 1)
    assert f"{bad}" in first.stderr.splitlines()[-1]
    assert second.stderr.splitlines()[-1].startswith("eval.py: process 0 failed; ")
    assert "Traceback" not in first.stderr + second.stderr
    assert done == ["decode 1"]  # in the first process

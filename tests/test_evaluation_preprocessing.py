"""What travels with a model: ten lines of Pillow and NumPy, without this project, give what eval.py gives."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_image

from evaluation import exporting
from evaluation.options import EvalOptions
from evaluation.session import open_session, preprocessing
from model import LARGE, BackboneRequest, build_splitnet
from model.restore import published_keys
from parser_params import parse_config
from record.checkpoint import load_checkpoint, save_checkpoint
from tests import runs
from utils.launch import join

PAGE = Path(__file__).parent.parent / "miscs" / "checkpoints.md"
CROP = 96
OLD_CONFIG = {"arch": "resnet18_imagenet,resnet18_imagenet", "dataset": "folder"}


def preprocessed_by(page: Path) -> list[str]:
    """The Python blocks of the page that do not speak of ONNX."""
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    return [block for block in blocks if "onnx" not in block]


def save_large(folder: Path, **entries: object) -> Path:
    """A checkpoint of two networks that take files, with weights that make their logits differ."""
    request = BackboneRequest(arch="resnet18_imagenet", num_classes=5, shape=LARGE, crop_size=CROP, dataset="folder")
    network = build_splitnet(request, seed=0, archs=["resnet18_imagenet"] * 2)
    for one in network.models:
        torch.nn.init.normal_(one.fc.weight, std=0.05, generator=torch.Generator().manual_seed(7))
    path = folder / "model_best.pth.tar"
    content = {
        "epoch": 1,
        "arch": "resnet18_imagenet,resnet18_imagenet",
        "state_dict": published_keys(network.state_dict()),
        "config": OLD_CONFIG,
        "classes": ["a", "b", "c", "d", "e"],
        "mean": [0.48, 0.45, 0.40],
        "std": [0.22, 0.23, 0.24],
        "crop_size": CROP,
        "data_recipe": "imagenet",
        **entries,
    }
    save_checkpoint(content, path)
    return path


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    """A real photograph, lying on its side as cameras save them."""
    image = Image.fromarray(load_sample_image("china.jpg")).transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "photo.jpg", quality=95, exif=exif)
    return tmp_path / "photo.jpg"


def probabilities_of_eval(checkpoint: Path, photo: Path, folder: Path) -> np.ndarray:
    words = ["--resume", checkpoint, "--predict", photo, "--model_dir", folder / "eval", "--no_cuda"]
    done = runs.Run(words, folder / "streams", module="eval").wait()
    assert done.code == 0, done.stderr
    (logits,) = (folder / "eval").rglob("logits.npz")
    return torch.from_numpy(np.load(logits)["ensemble"]).softmax(dim=-1).numpy()


STORED = {
    "resize": 101,
    "interpolation": "bilinear",
    "crop": CROP,
    "color_order": "RGB",
    "value_range": [0.0, 1.0],
    "mean": [0.48, 0.45, 0.40],
    "std": [0.22, 0.23, 0.24],
}


@pytest.mark.parametrize(
    ("entries", "flags", "expected"),
    [
        ({}, (), (110, "bicubic")),
        ({"config": {**OLD_CONFIG, "crop_pct": 0.875, "eval_interpolation": "bilinear"}}, (), (109, "bilinear")),
        ({"data_recipe": "cifar10"}, (), (96, "bicubic")),
        ({"preprocessing": STORED}, (), (101, "bilinear")),
        ({"preprocessing": STORED}, ("--crop_pct", "0.8", "--eval_interpolation", "bicubic"), (120, "bicubic")),
        ({"preprocessing": STORED}, ("--crop_size", "64"), (73, "bicubic")),
    ],
    ids=["older", "older with flags", "older of small images", "stored", "flags win", "another size"],
)
def test_what_a_checkpoint_says_or_means(entries, flags, expected, tmp_path):
    words = ["--resume", str(save_large(tmp_path, **entries)), "--no_cuda", *flags]
    session = open_session(parse_config(words, extra=EvalOptions), join([]), [])
    steps = preprocessing(session)
    assert (steps.resize, steps.interpolation) == expected
    assert (steps.mean, steps.std) == ((0.48, 0.45, 0.40), (0.22, 0.23, 0.24))
    assert steps.crop == session.info.crop_size


@pytest.mark.slow
def test_ten_lines_without_this_project_give_what_eval_gives(photo, tmp_path):
    checkpoint = save_large(tmp_path, preprocessing=STORED)
    assert exporting.main([str(checkpoint)]) == 0
    code = "\n".join([*preprocessed_by(PAGE), "np.save('found.npy', probabilities_BK.detach().numpy())"])
    # -I: neither the current folder nor PYTHONPATH can bring this project in
    subprocess.run([sys.executable, "-I", "-W", "ignore", "-c", code], cwd=tmp_path, check=True)
    expected_BK = probabilities_of_eval(checkpoint, photo, tmp_path)
    assert expected_BK.max() - expected_BK.min() > 0.1  # a guess at the preprocessing would show
    np.testing.assert_allclose(np.load(tmp_path / "found.npy"), expected_BK, rtol=0, atol=1e-6)


@pytest.mark.slow
def test_a_file_that_takes_pixels_normalises_inside(photo, tmp_path, capsys):
    checkpoint = save_large(tmp_path)
    words = [str(checkpoint), "--input", "uint8", "--predict", str(photo), "--out", str(tmp_path / "model_best.pt2")]
    assert exporting.main(words) == 0
    opening, steps, _ = preprocessed_by(PAGE)
    code = f"""{opening}{steps}
assert metadata["input_dtype"] == "uint8"
pixels_BCHW = torch.from_numpy(np.ascontiguousarray(pixels_HWC.transpose(2, 0, 1)[None]))
ensemble_BK, _ = model(pixels_BCHW)
np.save("found.npy", ensemble_BK.softmax(dim=-1).detach().numpy())
try:
    model.eval()
except NotImplementedError:
    pass
else:
    raise AssertionError("the page says that .eval() raises")
"""
    subprocess.run([sys.executable, "-I", "-W", "ignore", "-c", code], cwd=tmp_path, check=True)
    expected_BK = probabilities_of_eval(checkpoint, photo, tmp_path)
    np.testing.assert_allclose(np.load(tmp_path / "found.npy"), expected_BK, rtol=0, atol=1e-6)
    np.save(tmp_path / "floats.npy", np.zeros((1, 3, CROP, CROP), np.float32))
    assert exporting.main([*words[:4], str(tmp_path / "floats.npy")]) == 2
    assert "--input uint8 takes images" in capsys.readouterr().err


def test_a_run_stores_what_its_evaluation_does(tmp_path):
    done = runs.train([*runs.TINY, "--max_steps", 1, "--crop_size", 12, "--model_dir", tmp_path / "run"], tmp_path)
    assert done.code == 0, done.stderr
    content = load_checkpoint(tmp_path / "run" / "model_best.pth.tar")
    steps = content["preprocessing"]
    assert (steps["resize"], steps["crop"], steps["interpolation"]) == (12, 12, "bicubic")
    assert (steps["mean"], steps["std"]) == (content["mean"], content["std"])

"""`load`: a model says in somebody else's program what eval.py says, whatever form the file and the image have."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_image

from dataset.decode import BadImage
from evaluation import exporting
from evaluation.loading import Loaded, load
from model import BackboneRequest, build_splitnet
from model.restore import published_keys
from recipe.preprocessing import Preprocessing
from record.checkpoint import load_checkpoint, save_checkpoint
from tests import runs
from utils.errors import UserError


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run's folder, photos of several kinds beside it, and the probabilities of `eval.py --predict` for them."""
    folder = tmp_path_factory.mktemp("load")
    flags = ("--split_factor", 2, "--max_steps", 2, "--seed", 1, "--lr", 1, "--model_dir", folder / "run")
    done = runs.train([*runs.TINY, *flags], folder)
    assert done.code == 0, done.stderr
    photo = Image.fromarray(load_sample_image("flower.jpg"))
    (folder / "photos").mkdir()
    photo.save(folder / "photos" / "a.jpg")
    photo.convert("L").save(folder / "photos" / "b.png")
    exif = Image.Exif()
    exif[0x0112] = 8
    photo.crop((0, 0, 300, 90)).save(folder / "photos" / "c.jpg", exif=exif)
    words = ["--resume", folder / "run" / "model_best.pth.tar", "--predict", folder / "photos", "--no_cuda"]
    done = runs.Run([*words, "--model_dir", folder / "eval"], folder / "streams", module="eval").wait()
    assert done.code == 0, done.stderr
    (logits,) = (folder / "eval").rglob("logits.npz")
    return folder, torch.from_numpy(np.load(logits)["ensemble"]).softmax(dim=-1), done.result["disagreement"]


def test_a_run_directory_predicts_as_eval_does(run):
    folder, expected_BK, disagreement = run
    paths = sorted((folder / "photos").iterdir())
    loaded = load(folder / "run")
    found = loaded.predict(paths)
    torch.testing.assert_close(found.probabilities_BK, expected_BK, rtol=0, atol=1e-6)
    assert float(found.disagreement_B.mean()) == pytest.approx(disagreement)
    assert loaded.classes == tuple(map(str, range(10)))
    content = load_checkpoint(folder / "run" / "model_best.pth.tar")
    assert loaded.preprocessing == content["preprocessing"]
    images_BCHW = torch.stack([loaded.preprocess(path) for path in paths])
    assert images_BCHW.shape == (3, 3, 16, 16)
    assert loaded.network(images_BCHW).shape == (2, 3, 10)
    assert not loaded.network.training
    torch.testing.assert_close(loaded.predict(images_BCHW).probabilities_BK, expected_BK, rtol=0, atol=1e-6)


def test_one_image_in_every_form(run):
    folder, expected_BK, _ = run
    loaded = load(str(folder / "run" / "model_best.pth.tar"))
    for place, name in enumerate(("a.jpg", "b.png", "c.jpg")):
        path = folder / "photos" / name
        with Image.open(path) as image:
            forms = [path, str(path), image, *([] if name == "c.jpg" else [np.asarray(image)])]
            for form in forms:
                found_BK = loaded.predict(form).probabilities_BK
                torch.testing.assert_close(found_BK, expected_BK[place : place + 1], rtol=0, atol=1e-6)


def test_flags_are_those_of_eval(run):
    folder, _, _ = run
    paths = sorted((folder / "photos").iterdir())
    plain, other = load(folder / "run"), load(folder / "run", is_ensembled_after_softmax=True, crop_pct=1.0)
    assert (plain.rule, other.rule) == ("mean_logits", "mean_softmax")
    logits_SBK = other.network(torch.stack([other.preprocess(path) for path in paths]))
    expected_BK = logits_SBK.softmax(dim=-1).mean(dim=0)
    torch.testing.assert_close(other.predict(paths).probabilities_BK, expected_BK, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "uint8"])
def test_an_exported_file_predicts_the_same(dtype, run, tmp_path):
    folder, expected_BK, disagreement = run
    out = tmp_path / "ensemble.pt2"
    words = [folder / "run" / "model_best.pth.tar", "--out", out, "--input", dtype, "--batch_sizes", 2]
    assert exporting.main([*map(str, words)]) == 0
    loaded = load(out)
    assert loaded.preprocess(folder / "photos" / "a.jpg").dtype == getattr(torch, dtype)
    found = loaded.predict(sorted((folder / "photos").iterdir()))
    torch.testing.assert_close(found.probabilities_BK, expected_BK, rtol=0, atol=1e-6)
    assert float(found.disagreement_B.mean()) == pytest.approx(disagreement)
    assert loaded.classes == tuple(map(str, range(10)))
    with pytest.raises(UserError, match="fixed in an exported file: leave weights away"):
        load(out, weights="raw")


def test_a_released_checkpoint_with_its_data_set_named(tmp_path):
    request = BackboneRequest(arch="resnet20", split_factor=2, num_classes=100, dataset="cifar100")
    state = published_keys(build_splitnet(request, seed=0).state_dict())
    save_checkpoint({"arch": "resnet20", "state_dict": state}, tmp_path / "released.pth.tar")
    with pytest.raises(UserError, match="does not say what its networks were trained on"):
        load(tmp_path / "released.pth.tar", data=str(tmp_path))
    loaded = load(tmp_path / "released.pth.tar", dataset="cifar100", data=tmp_path)
    assert len(loaded.classes) == 100
    assert loaded.preprocessing["mean"] == [0.5071, 0.4865, 0.4409]
    assert loaded.predict(np.zeros((40, 30, 3), np.uint8)).probabilities_BK.shape == (1, 100)


def test_mistakes_are_one_line(run, tmp_path):
    folder, _, _ = run
    loaded = load(folder / "run")
    (tmp_path / "a.pt2").write_bytes(b"no program")
    (tmp_path / "text.jpg").write_text(json.dumps("no image"))
    for call, message in (
        (lambda: load(tmp_path), "holds no run"),
        (lambda: load(tmp_path / "none.pth.tar"), "does not exist"),
        (lambda: load(tmp_path / "none.pt2"), "does not exist"),
        (lambda: load(tmp_path / "a.pt2"), "is damaged, or not written by"),
        (lambda: load(folder / "run", wieghts="raw"), "Did you mean 'weights'"),
        (lambda: loaded.preprocess(np.zeros((3, 8, 8), np.uint8)), r"uint8 \[H, W, 3\], found uint8 \[3, 8, 8\]"),
        (lambda: loaded.preprocess(np.zeros((8, 8, 3))), "found float64"),
        (lambda: loaded.predict([]), "at least one image"),
    ):
        with pytest.raises(UserError, match=message) as error:
            call()
        assert "\n" not in str(error.value)
    with pytest.raises(BadImage, match="not an image"):
        loaded.predict(tmp_path / "text.jpg")


class _Says(torch.nn.Module):
    """Networks whose logits are known: network s gives every image the row that its first pixel names."""

    def __init__(self, logits_SRK: torch.Tensor) -> None:
        super().__init__()
        self.logits_SRK = logits_SRK

    def forward(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        return self.logits_SRK[:, images_BCHW[:, 0, 0, 0].round().long()]


def test_worked_numbers():
    logits_SRK = torch.tensor([[[0.0, 2.0], [4.0, 0.0]], [[2.0, 0.0], [2.0, 0.0]], [[1.0, 4.0], [0.0, 9.0]]])
    steps = Preprocessing(resize=2, interpolation="bicubic", crop=2, mean=(0, 0, 0), std=(1 / 255,) * 3)
    loaded = Loaded(
        network=_Says(logits_SRK), classes=("a", "b"), rule="mean_logits", steps=steps, device=torch.device("cpu")
    )
    images = [np.full((2, 2, 3), row, np.uint8) for row in (1, 0, 1)] * 30  # more than go through at a time
    found = loaded.predict(images)
    expected_3K = torch.stack([torch.tensor([2.0, 3.0]), torch.tensor([1.0, 2.0]), torch.tensor([2.0, 3.0])]).softmax(
        -1
    )
    torch.testing.assert_close(found.probabilities_BK, expected_3K.repeat(30, 1))
    assert found.disagreement_B.tolist() == pytest.approx([2 / 3] * 90)  # one of three networks against two
    single = loaded.predict(images[0])
    assert single.probabilities_BK.shape == (1, 2)

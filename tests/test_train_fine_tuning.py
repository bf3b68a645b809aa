"""Fine-tuning from a file of weights to a trained ensemble: recipe, images, frozen parts, rates by layer, resuming."""

from pathlib import Path

import pytest
import torch
from torchvision.models import get_model

from record.checkpoint import load_checkpoint
from tests.runs import Finished, train
from tests.test_train_split import folder_of_images

TUNED = ["--dataset", "folder", "--arch", "torchvision/resnet18,torchvision/resnet18", "--crop_size", 32, "--seed", 1]
TUNED += ["--epochs", 2, "--batch_size", 18, "--workers", 0, "--amp_dtype", "fp32", "--no_cuda"]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folder_of_images(tmp_path_factory.mktemp("images"), 70)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file as torchvision releases them, of random weights."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "resnet18-f37072fd.pth"
    torch.save(get_model("resnet18").state_dict(), path)
    return path


def tune(folder: Path, images: Path, weights: object, *flags: object) -> Finished:
    argv = [*TUNED, "--data", images, "--pretrained", weights, "--model_dir", folder, *flags]
    return train(argv, folder.parent)


@pytest.mark.slow
@pytest.mark.parametrize(
    "what", [pytest.param("stem", marks=pytest.mark.long), "stages:2", pytest.param("backbone", marks=pytest.mark.long)]
)
def test_an_ensemble_from_one_file_with_frozen_parts_goes_on_bit_for_bit(
    tmp_path: Path, images: Path, weights: Path, what: str
) -> None:
    flags = ["--freeze", what, "--layer_decay", 0.8, "--lr_multiplier", 5, "--ema_decay", 0.9]
    whole = tune(tmp_path / "whole", images, weights, *flags)
    assert whole.code == 0, whole.stderr
    for line in (
        "lr 0.01 of the recipe is for 64 images an update: scaled to 0.0028125 for 18",
        "the head models.1.fc has another size there and starts anew",
        "from the recipe: the weights' own images: crop_interpolation bilinear, eval_interpolation bilinear, crop_pct",
        "from the recipe: fine-tuning: ",
        f"--freeze {what}: ",
        "learning rates of torchvision/resnet18: stem 0.000377, layer1.0 0.000472, ",
    ):
        assert line in whole.stderr
    saved = load_checkpoint(tmp_path / "whole" / "checkpoint_2.pth.tar")
    assert saved["preprocessing"]["resize"] == 36  # 32 / 0.875
    assert saved["mean"] == [0.485, 0.456, 0.406]
    file = load_checkpoint(weights)
    frozen = {"stem": ("conv1", "bn1"), "stages:2": ("conv1", "bn1", "layer1", "layer2")}
    prefixes = tuple(f"{name}." for name in frozen.get(what, ("conv1", "bn1", "layer")))
    for key, tensor in file.items():
        for state in (saved["state_dict"], saved["ema"]):
            for i in (0, 1):
                mine = state[f"module.models.{i}.{key}"]
                is_frozen = key.startswith(prefixes) or (what == "backbone" and key.startswith("layer"))
                assert (mine.shape == tensor.shape and torch.equal(mine, tensor)) == is_frozen, key
    rates = {group["lr_multiplier"] for group in saved["optimizer"]["param_groups"]}
    assert 5.0 in rates

    broken = tmp_path / "broken"
    assert tune(broken, images, weights, *flags, "--max_steps", 3).code == 0
    gone = tmp_path / "gone.pth"  # the checkpoint's weights take its place, and say what they want to see
    resumed = tune(broken, images, gone, *flags, "--resume", "auto")
    assert resumed.code == 0, resumed.stderr
    assert resumed.result["state_sha256"] == whole.result["state_sha256"]
    average = load_checkpoint(broken / "checkpoint_2.pth.tar")["ema"]
    assert all(torch.equal(tensor, saved["ema"][key]) for key, tensor in average.items())
    assert "changed on resume: crop" not in resumed.stderr


@pytest.mark.slow
def test_what_is_frozen_does_not_change_within_a_run(tmp_path: Path, images: Path, weights: Path) -> None:
    assert tune(tmp_path / "m", images, weights, "--max_steps", 1).code == 0
    other = tune(tmp_path / "m", images, weights, "--resume", "auto", "--freeze", "stem")
    assert other.code == 2
    assert "--freeze none, and this one has --freeze stem" in other.stderr
    rates = tune(tmp_path / "m", images, weights, "--resume", "auto", "--layer_decay", 0.5)
    assert rates.code == 0, rates.stderr
    assert "layer_decay 1 → 0.5 (flag)" in rates.stderr


def test_a_file_of_another_network_is_refused_in_one_line(tmp_path: Path, images: Path, weights: Path) -> None:
    result = tune(tmp_path / "m", images, weights, "--arch", "torchvision/resnet34,torchvision/resnet34")
    assert result.code == 2
    line = result.stderr.splitlines()[-1]
    assert "not the weights of these 2 networks: models.0.layer1.2.conv1.weight is missing" in line


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "flags"),
    [
        ("mimo", ()),
        pytest.param("batch_ensemble", ("--be_norm", "member"), marks=pytest.mark.long),
        pytest.param("one", ("--one_deploy", "gated"), marks=pytest.mark.long),
    ],
)
def test_members_of_one_network_start_from_its_file_and_go_on(
    tmp_path: Path, images: Path, weights: Path, method: str, flags: tuple
) -> None:
    one = ["--arch", "torchvision/resnet18", "--method", method, *flags, "--lr_multiplier", 5, "--epochs", 1]
    whole = tune(tmp_path / "whole", images, weights, *one)
    assert whole.code == 0, whole.stderr
    assert "the head models.0.fc has another size there and starts anew" in whole.stderr
    broken = tmp_path / "broken"
    assert tune(broken, images, weights, *one, "--max_steps", 1).code == 0
    resumed = tune(broken, images, tmp_path / "gone.pth", *one, "--resume", "auto")
    assert resumed.code == 0, resumed.stderr
    assert resumed.result["state_sha256"] == whole.result["state_sha256"]

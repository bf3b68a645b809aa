"""Networks of other libraries and of users, from the command line: trained, resumed, evaluated, counted."""

from pathlib import Path

import pytest
import torch
import torchvision

from dataset import SourceRequest, open_source
from dataset.views import ViewMaker, plain_spec
from record import checkpoint as ckpt
from tests.runs import train

BASE = ["--dataset", "digits", "--batch_size", 96, "--amp_dtype", "fp32", "--no_cuda", "--seed", 5]
ARCH = "torchvision/mobilenet_v3_small"
FACTORY = """
from torch import nn

def tiny(width, num_classes):
    c = round(200 * width)
    return nn.Sequential(nn.Conv2d(3, c, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                         nn.Linear(c, c), nn.ReLU(), nn.Linear(c, num_classes))
"""


def evaluate(folder, *argv):
    return train(["--no_cuda", "--model_dir", folder / "eval", *argv], folder, module="eval")


@pytest.mark.slow
def test_a_divided_network_trains_resumes_and_evaluates(tmp_path):
    argv = [*BASE, "--arch", ARCH, "--split_factor", 2, "--divide_by", "macs", "--max_steps", 3, "--save_steps", 1]
    whole = train([*argv, "--model_dir", tmp_path / "whole"], tmp_path)
    assert whole.code == 0, whole.stderr
    assert f"{ARCH} divided by 2 (macs): 2 x " in whole.stderr
    content = ckpt.load_checkpoint(tmp_path / "whole" / "checkpoint_0_2.pth.tar")
    assert len(content["widths"]) == 7

    # the widths are those of the file
    resumed = train(
        [*argv, "--model_dir", tmp_path / "again", "--resume", tmp_path / "whole" / "checkpoint_0_2.pth.tar"], tmp_path
    )
    assert resumed.code == 0, resumed.stderr
    assert resumed.result["state_sha256"] == whole.result["state_sha256"]
    assert "divided by 2" not in resumed.stderr  # nothing was solved again
    other = train(
        [
            *(*BASE, "--arch", ARCH, "--split_factor", 2, "--model_dir", tmp_path / "other"),
            *("--resume", tmp_path / "whole" / "checkpoint_0_2.pth.tar"),
        ],
        tmp_path,
    )
    assert other.code == 2
    assert "a run with --divide_by macs, and this one has --divide_by none" in other.stderr

    found = evaluate(tmp_path, "--resume", tmp_path / "whole" / "checkpoint_0_3.pth.tar")
    assert found.code == 0, found.stderr
    assert found.result["ensemble_acc1"] == whole.result["ensemble_acc1"]
    assert found.result["arch"] == ARCH


@pytest.mark.slow
def test_a_users_factory(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(FACTORY)
    argv = [*BASE, "--arch", f"{file}:tiny", "--split_factor", 2, "--max_steps", 1, "--model_dir", tmp_path / "m"]
    result = train(argv, tmp_path)
    assert result.code == 0, result.stderr
    checkpoint = tmp_path / "m" / "checkpoint_0_1.pth.tar"
    file.write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n" + FACTORY)
    refused = evaluate(tmp_path, "--resume", checkpoint)
    assert refused.code == 2
    assert "only you can choose to run: add --arch" in refused.stderr
    assert not (tmp_path / "ran").exists()
    found = evaluate(tmp_path, "--resume", checkpoint, "--arch", f"{file}:tiny")
    assert found.code == 0, found.stderr
    assert (tmp_path / "ran").exists()
    assert found.result["ensemble_acc1"] == result.result["ensemble_acc1"]
    summary = train(["--is_summary", 1, *argv], tmp_path)
    assert summary.code == 0, summary.stderr
    assert summary.result["params_total"] == result.result["params_total"]
    assert summary.result["division"]["widths"] == ckpt.load_checkpoint(checkpoint)["widths"]


@pytest.mark.parametrize("library", ["torchvision", "timm"])
def test_a_librarys_state_dict_evaluates(tmp_path, library):
    if library == "timm":
        theirs = pytest.importorskip("timm").create_model("resnet18", num_classes=10)
    else:
        theirs = torchvision.models.resnet18(num_classes=10)
    prefix = "module." if library == "timm" else ""
    torch.save({prefix + key: value for key, value in theirs.state_dict().items()}, tmp_path / "plain.pth")
    found = evaluate(
        tmp_path, "--resume", tmp_path / "plain.pth", "--arch", f"{library}/resnet18", "--dataset", "digits",
        "--crop_size", 16,
    )  # fmt: skip
    assert found.code == 0, found.stderr
    source = open_source(SourceRequest(dataset="digits", root=Path(), splits=("test",)))
    assert source.test.images is not None
    views = ViewMaker(plain_spec(16, source.mean, source.std), seed=0)
    with torch.no_grad():
        logits_BK = theirs.eval()(views.evaluate(source.test.images, torch.float32))
    hits = (logits_BK.argmax(dim=1) == source.test.targets).double().mean()
    assert found.result["ensemble_acc1"] == pytest.approx(100.0 * float(hits))
    loss = torch.nn.functional.cross_entropy(logits_BK, source.test.targets)
    assert found.result["ensemble_nll"] == pytest.approx(float(loss), rel=1e-4)

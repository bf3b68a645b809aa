"""Networks of libraries divided by 2, through a whole life: a step, resume, evaluation, export, summary."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import eval as evaluation
import train_split
from evaluation.export import load_exported
from evaluation.exporting import main as export
from model import SplitNet
from model.library import Library
from model.restore import restore_splitnet
from record.checkpoint import load_checkpoint
from record.run_folder import read_results
from utils.macs import count_macs, count_params

pytest.importorskip("timm")

BASE = "--dataset synthetic --num_classes 10 --batch_size 16 --workers 0 --seed 1 --no_cuda --amp_dtype fp32"
# one of a class, with the smallest of a few usual sizes that it takes
OTHERS = {
    "timm/swin_tiny_patch4_window7_224": 32,
    "timm/mixer_s16_224": 32,
    "timm/resmlp_12_224": 32,
    "timm/poolformer_s12": 32,
    "timm/levit_128": 64,
    "timm/cait_xxs24_224": 32,
    "timm/convnext_atto": 32,
    "timm/regnetx_002": 32,
    "timm/mobilevit_xs": 64,
    "timm/ghostnet_100": 32,
    "torchvision/vit_b_32": 32,
    "torchvision/squeezenet1_1": 32,
    "torchvision/shufflenet_v2_x0_5": 32,
}


def train(arch: str, folder: Path, crop_size: int, *flags: str) -> dict[str, object]:
    words = [
        *BASE.split(),
        "--arch",
        arch,
        "--split_factor",
        "2",
        "--crop_size",
        str(crop_size),
        "--model_dir",
        str(folder),
    ]
    assert train_split.main([*words, *flags]) == 0
    return read_results(folder) or {}


def live(arch: str, crop_size: int, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two steps in one go or two are the same; evaluation, export and summary are those of the trained network."""
    whole = train(arch, folder / "whole", crop_size, "--max_steps", "2")
    train(arch, folder / "halves", crop_size, "--max_steps", "1")
    assert (
        train(arch, folder / "halves", crop_size, "--max_steps", "2", "--resume", "auto")["state_sha256"]
        == (whole["state_sha256"])
    )
    content = load_checkpoint(folder / "whole" / "checkpoint_0_2.pth.tar")
    assert content["widths"]
    network, _ = restore_splitnet(content)
    network.eval()
    images_BCHW = torch.randn(3, 3, crop_size, crop_size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits_SBK = network(images_BCHW)
    assert gradients_are_missing(network, crop_size) == set()  # after the logits: it moves batch statistics

    capsys.readouterr()
    checkpoint = str(folder / "whole" / "checkpoint_0_2.pth.tar")
    assert evaluation.main(["--resume", checkpoint, "--workers", "0", "--no_cuda", "--json"]) == 0
    evaluated = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert evaluated["ensemble_acc1"] == whole["ensemble_acc1"]
    assert evaluated["ensemble_nll"] == pytest.approx(whole["ensemble_nll"], rel=1e-5)

    assert export([checkpoint, "--out", str(folder / "all.pt2")]) == 0
    run, _ = load_exported(folder / "all.pt2")
    for size in (1, 3):
        _, found_SBK = run(images_BCHW[:size])
        torch.testing.assert_close(found_SBK, logits_SBK[:, :size], rtol=1e-3, atol=1e-4)

    capsys.readouterr()
    train(arch, folder / "summary", crop_size, "--is_summary", "1", "--json")
    summary = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    one = network.models[0]
    assert summary["params_one"] == count_params(one)
    assert summary["macs_one"] == count_macs(one, (3, crop_size, crop_size))


def gradients_are_missing(network: SplitNet, crop_size: int) -> set[str]:
    """Names of parameters that one pass there and back leaves without a gradient."""
    network.train()
    views_SBCHW = torch.randn(2, 2, 3, crop_size, crop_size, generator=torch.Generator().manual_seed(2))
    network(views_SBCHW).square().sum().backward()
    found = {name for name, parameter in network.named_parameters() if parameter.grad is None}
    network.zero_grad()
    network.eval()
    return found


@pytest.mark.slow
def test_a_divided_transformer_lives(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], logging_restored: None
) -> None:
    live("timm/test_vit", 32, tmp_path, capsys)


@pytest.mark.long
@pytest.mark.parametrize("arch", OTHERS)
def test_one_of_a_class_lives(
    arch: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], logging_restored: None
) -> None:
    live(arch, OTHERS[arch], tmp_path, capsys)


def without(content: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in content.items() if name not in names}


@pytest.mark.slow
def test_a_damaged_plan_is_one_line_of_every_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], logging_restored: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is solved again in place of what is missing, and nothing is built of numbers that cannot be."""
    train("timm/test_vit", tmp_path / "run", 32, "--max_steps", "1")
    checkpoint = tmp_path / "run" / "checkpoint_0_1.pth.tar"
    whole = load_checkpoint(checkpoint)
    names, widths = whole["width_names"], whole["widths"]
    damaged = {
        "0 'widths' and 4 'width_names'": without(whole, "widths"),
        "4 'widths' and 0 'width_names'": without(whole, "width_names"),
        "way ''": without(whole, "way"),
        "expected positive numbers": whole | {"widths": [-widths[0], *widths[1:]]},
        "'widths' is damaged": whole | {"widths": "48"},
        "of 1e+09 cannot be": whole | {"widths": [10**9, *widths[1:]]},
        "positive numbers.": whole | {"widths": [10**400, *widths[1:]]},
        "no argument dims.0 there": whole | {"width_names": ["dims.0", *names[1:]]},
    }
    bad = tmp_path / "bad.pth.tar"
    words = [*BASE.split(), "--arch", "timm/test_vit", "--split_factor", "2", "--crop_size", "32", "--max_steps", "2"]
    commands: dict[str, Callable[[], int]] = {
        "eval.py": lambda: evaluation.main(["--resume", str(bad), "--workers", "0", "--no_cuda"]),
        "export.py": lambda: export([str(bad), "--out", str(tmp_path / "all.pt2")]),
        "train_split.py": lambda: train_split.main(
            [*words, "--model_dir", str(tmp_path / "again"), "--resume", str(bad)]
        ),
    }
    monkeypatch.setattr(Library, "plan", None)  # nothing is solved
    for line, content in damaged.items():
        torch.save(content, bad)
        for name, command in commands.items():
            capsys.readouterr()
            assert command() == 2, (name, line)
            *_, last = capsys.readouterr().err.strip().splitlines()
            assert last.startswith(f"{name}: ")
            assert line in last
    assert not (tmp_path / "all.pt2").exists()

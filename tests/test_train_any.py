"""Networks of libraries, undivided and by 2, through a whole life: a step, resume, evaluation, export, summary."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import eval as evaluation
import train_split
from dataset.source import synthetic
from evaluation.export import load_exported
from evaluation.exporting import main as export
from model import SplitNet
from model.library import Library
from model.restore import network_state, restore_splitnet
from record.checkpoint import load_checkpoint
from record.run_folder import read_results
from utils.macs import count_macs, count_params

timm = pytest.importorskip("timm")

BASE = "--dataset synthetic --num_classes 10 --batch_size 4 --workers 0 --seed 1 --no_cuda --amp_dtype fp32"
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
    "torchvision/swin_v2_t": 32,
    "timm/eva02_tiny_patch14_224": 32,
    "timm/maxvit_rmlp_pico_rw_256": 64,
    "timm/coatnet_pico_rw_224": 32,
    "timm/pvt_v2_b0": 32,
    "timm/davit_tiny": 32,
}
# as they begin, their answer hardly depends on the image: layer scales of 1e-5, and features below the head's biases
NEARLY_CONSTANT = ("timm/cait_xxs24_224", "torchvision/squeezenet1_1")


@pytest.fixture(autouse=True)
def few_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """The libraries' networks are large: ten images to test, not 256."""
    monkeypatch.setattr(synthetic, "TRAIN_SIZE", 20)
    monkeypatch.setattr(synthetic, "TEST_SIZE", 10)


def words_of(arch: str, split_factor: int, crop_size: int) -> list[str]:
    return [*BASE.split(), "--arch", arch, "--split_factor", str(split_factor), "--crop_size", str(crop_size)]


def train(words: list[str], folder: Path, *flags: str) -> dict[str, object]:
    assert train_split.main([*words, "--model_dir", str(folder), *flags]) == 0
    return read_results(folder) or {}


def live(arch: str, split_factor: int, crop_size: int, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two steps in one go or two are the same; evaluation, export and summary are those of the trained network."""
    words = words_of(arch, split_factor, crop_size)
    whole = train(words, folder / "whole", "--max_steps", "2")
    train(words, folder / "halves", "--max_steps", "1")
    again = train(words, folder / "halves", "--max_steps", "2", "--resume", "auto")
    assert again["state_sha256"] == whole["state_sha256"]
    content = load_checkpoint(folder / "whole" / "checkpoint_0_2.pth.tar")
    assert split_factor == 1 or content["widths"]
    network, _ = restore_splitnet(content)
    network.eval()
    images_BCHW = torch.randn(3, 3, crop_size, crop_size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits_SBK = network(images_BCHW)
    range_of_logits = float(logits_SBK.abs().max())  # libraries begin heads near zero: a fixed tolerance hides all
    are_alike = torch.allclose(logits_SBK[:, 0], logits_SBK[:, 1], rtol=0, atol=1e-3 * range_of_logits)
    assert are_alike == (arch in NEARLY_CONSTANT)
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
        torch.testing.assert_close(found_SBK, logits_SBK[:, :size], rtol=0, atol=1e-4 * range_of_logits)

    capsys.readouterr()
    train(words, folder / "summary", "--is_summary", "1", "--json")
    summary = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    one = network.models[0]
    assert summary["params_one"] == count_params(one)
    assert summary["macs_one"] == count_macs(one, (3, crop_size, crop_size))


def gradients_are_missing(network: SplitNet, crop_size: int) -> set[str]:
    """Names of parameters that one pass there and back leaves without a gradient."""
    network.train()
    views_SBCHW = torch.randn(
        len(network.models), 2, 3, crop_size, crop_size, generator=torch.Generator().manual_seed(2)
    )
    network(views_SBCHW).square().sum().backward()
    found = {name for name, parameter in network.named_parameters() if parameter.grad is None}
    network.zero_grad()
    network.eval()
    return found


@pytest.mark.slow
def test_a_divided_transformer_lives(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], logging_restored: None
) -> None:
    live("timm/test_vit", 2, 32, tmp_path, capsys)


@pytest.mark.long
@pytest.mark.parametrize("arch", OTHERS)
def test_one_of_a_class_lives(
    arch: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], logging_restored: None
) -> None:
    live(arch, 2, OTHERS[arch], tmp_path, capsys)


@pytest.mark.long
def test_an_undivided_one_lives(tmp_path: Path, capsys: pytest.CaptureFixture[str], logging_restored: None) -> None:
    live("timm/pvt_v2_b0", 1, 32, tmp_path, capsys)


@pytest.mark.slow
def test_weights_of_a_fitted_network_start_fitted_ones(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], logging_restored: None
) -> None:
    """Patches of 4 at 32 pixels, undivided, in slices and divided; the library's weights want its own patches."""
    for split_factor in (1, 2):
        train(words_of("timm/test_vit", split_factor, 32), tmp_path / f"S{split_factor}", "--max_steps", "1")
    for split_factor, parent in ((1, "S1"), (2, "S1"), (2, "S2")):
        weights = load_checkpoint(tmp_path / parent / "checkpoint_0_1.pth.tar")
        folder = tmp_path / f"{parent}_starts_{split_factor}"
        flags = ("--pretrained", str(tmp_path / parent / "checkpoint_0_1.pth.tar"), "--lr", "0")
        train(words_of("timm/test_vit", split_factor, 32), folder, "--max_steps", "1", *flags)
        content = load_checkpoint(folder / "checkpoint_0_1.pth.tar")
        assert dict(zip(content["width_names"], content["widths"], strict=True))["patch_size"] == 4
        own, given = (network_state(one, "raw", "")[0]["models.0.pos_embed"] for one in (content, weights))
        if parent == f"S{split_factor}":
            assert torch.equal(own, given)
        else:
            assert set(own.flatten().tolist()) < set(given.flatten().tolist())


@pytest.mark.slow
def test_full_networks_side_by_side_have_the_patches_of_their_weights(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], logging_restored: None
) -> None:
    """A library's own patches of 16 stay, also when the run is gone on with and evaluated; new ones are fitted."""
    weights = str(tmp_path / "library.pth")
    torch.save(timm.create_model("test_vit", img_size=32, num_classes=10).state_dict(), weights)
    tokens = {(): 1 + 64, ("--pretrained", weights): 1 + 4}
    for flags, expected in tokens.items():
        folder = tmp_path / f"tokens{expected}"
        words = words_of("timm/test_vit,timm/test_vit", 1, 32)
        train(words, folder, "--max_steps", "1", *flags)
        train(words, folder, "--max_steps", "2", "--resume", "auto", *flags)
        content = load_checkpoint(folder / "checkpoint_0_2.pth.tar")
        state, _ = network_state(content, "raw", "")
        assert {state[f"models.{i}.pos_embed"].shape[1] for i in range(2)} == {expected}
        checkpoint = str(folder / "checkpoint_0_2.pth.tar")
        assert evaluation.main(["--resume", checkpoint, "--workers", "0", "--no_cuda"]) == 0


def without(content: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in content.items() if name not in names}


@pytest.mark.slow
def test_a_damaged_plan_is_one_line_of_every_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], logging_restored: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is solved again in place of what is missing, and nothing is built of numbers that cannot be."""
    words = words_of("timm/test_vit", 2, 32)
    train(words, tmp_path / "run", "--max_steps", "1")
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
    commands: dict[str, Callable[[], int]] = {
        "eval.py": lambda: evaluation.main(["--resume", str(bad), "--workers", "0", "--no_cuda"]),
        "export.py": lambda: export([str(bad), "--out", str(tmp_path / "all.pt2")]),
        "train_split.py": lambda: train_split.main(
            [*words, "--max_steps", "2", "--model_dir", str(tmp_path / "again"), "--resume", str(bad)]
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

"""Every family as one graph: exported with its ensemble rule for any batch size, compiled without a break."""

import copy
import importlib.util
import json
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch._inductor.config
from torch import Tensor, nn

from evaluation import exporting
from evaluation.ensemble import ensemble_scores
from evaluation.export import export_ensemble, load_exported, program_bytes
from model import LARGE, SMALL, BackboneRequest, backbones, build_network, build_splitnet
from model.backbone.densenet import DenseNet
from model.backbone.hcgnet import HybridUnit, Transition
from model.backbone.pyramidnet import PyramidNet
from model.backbone.resnest import ResNeSt
from model.backbone.shake_resnet import ShakeResNet
from model.registry import MemberForm
from model.splitnet import SplitNet
from record.checkpoint import load_checkpoint
from tests import runs
from training.compiling import compile_modules
from utils.errors import UserError

HAS_ONNX = all(importlib.util.find_spec(name) for name in ("onnx", "onnxscript", "onnxruntime"))
SIZE = 32


def member(arch: str, split_factor: int, shape: str = SMALL, **options: object) -> Callable[[], nn.Module]:
    request = BackboneRequest(
        arch=arch, split_factor=split_factor, num_classes=5, shape=shape, crop_size=SIZE, options=options
    )
    return lambda: build_network(request)


# the smallest of each family; where all are deep, its class with fewer blocks
MEMBERS: dict[str, Callable[[], nn.Module]] = {
    "cifar_resnet": member("resnet20_cifar", 1),
    "cream": member("cream_14", 4),
    "densenet": lambda: DenseNet(4, [[0.5, 0.5]] * 3, 5, official=True, recompute=False),
    "efficientnet": member("efficientnetb0", 4),
    "efficientnet, lukemelas": member("efficientnetb0", 4, LARGE, is_lukemelas_efficientnet=True),
    "hcgnet": lambda: nn.Sequential(
        nn.Conv2d(3, 8, 3), HybridUnit(8, 4), Transition(12), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5)
    ),
    "imagenet_resnet": member("resnet18_imagenet", 1, LARGE),
    "pyramidnet": lambda: PyramidNet([18, 20, 24], [0.1, 0.2, 0.3], 5),
    "resnest": lambda: ResNeSt((1, 2, 1, 1), 5),
    "resnet": member("resnet20", 16),
    "resnexst": member("resnexst50_4x16d", 4, LARGE),
    "resnext": member("resnext29_8x64d", 8),
    "senet": member("se_resnet50_B", 8, LARGE),
    "shake_resnet": lambda: ShakeResNet(2, 8, 5),
    "shufflenetv2": member("ShuffleNetV2_05x_cifar", 1),
    "wide_resnet": member("wide_resnet16_8", 16),
    "wrn": member("wrn_10_1", 1),
}


def scrambled(network: nn.Module) -> nn.Module:
    """In float64, with statistics as after training, so that no branch is switched off."""
    generator = torch.Generator().manual_seed(0)
    for module in network.double().modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.data.uniform_(0.5, 1.5, generator=generator)
            module.running_mean.normal_(std=0.1, generator=generator)
            module.running_var.uniform_(0.5, 1.5, generator=generator)
    return network.eval()


def images(batch: int, size: int = SIZE) -> Tensor:
    return torch.randn(batch, 3, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


FAMILIES = sorted({entry.family for _, entry in backbones.items()} | MEMBERS.keys())


def member_of(family: str) -> nn.Module:
    """The one above, or the first registered name of a family that is not there."""
    if family in MEMBERS:
        return MEMBERS[family]()
    name, entry = next((name, entry) for name, entry in backbones.items() if entry.family == family)
    shape, splits = next(iter(entry.split_factors.items()))
    return member(name, splits[-1], shape)()


@pytest.mark.parametrize("family", FAMILIES)
def test_family_exports_with_any_batch(family):
    torch.manual_seed(0)
    network = SplitNet([scrambled(member_of(family))])
    program = export_ensemble(network, "mean_softmax", (3, SIZE, SIZE)).module()
    with torch.inference_mode():
        for batch in (1, 3):
            logits_SBK = network(images(batch))
            ensemble_BK, exported_SBK = program(images(batch))
            scale = float(logits_SBK.abs().max())
            torch.testing.assert_close(exported_SBK, logits_SBK, rtol=0, atol=1e-9 * scale)
            torch.testing.assert_close(ensemble_BK, ensemble_scores(logits_SBK, "mean_softmax"), rtol=0, atol=1e-8)


# cifar_resnet and resnext consist of the blocks of imagenet_resnet and resnet; test_model_families.py has the others
@pytest.mark.slow
@pytest.mark.parametrize(
    "family", ["cream", "hcgnet", "imagenet_resnet", "resnet", "shufflenetv2", "wide_resnet", "wrn"]
)
def test_family_trains_compiled_as_one_graph(family):
    torch.manual_seed(0)
    eager = scrambled(MEMBERS[family]()).train()
    other = copy.deepcopy(eager)
    torch._dynamo.reset()
    compiled = torch.compile(other, backend="aot_eager", fullgraph=True)
    for network in (eager, compiled):
        network(images(2)).square().mean().backward()
    for (name, ours), theirs in zip(other.named_parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-7, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.slow
@torch._inductor.config.patch(compile_threads=1)  # no pool of processes for one small network
def test_one_family_trains_the_same_under_inductor():
    torch.manual_seed(0)
    request = BackboneRequest(arch="resnet20", split_factor=16, num_classes=5, crop_size=16)
    eager = SplitNet([scrambled(build_network(request)).float(), scrambled(build_network(request)).float()]).train()
    other = copy.deepcopy(eager)
    torch._dynamo.reset()
    try:
        compile_modules([*other.models], "default", torch.device("cpu"))
    except UserError as error:
        pytest.skip(str(error))
    found = [network(images(4, 16).float()) for network in (other, eager)]
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-4 * float(found[1].detach().abs().max()))
    for logits_SBK in found:
        logits_SBK.square().mean().backward()
    for (name, ours), theirs in zip(other.named_parameters(), eager.parameters(), strict=True):
        scale = float(theirs.grad.abs().max())
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=1e-3 * scale, msg=lambda m, n=name: f"{n}: {m}")
    for ours, theirs in zip(other.buffers(), eager.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rule", ["max_softmax", "geometric_mean"])
def test_every_rule_is_inside_the_file(rule, tmp_path):
    request = BackboneRequest(arch="resnet20", split_factor=2, num_classes=4, crop_size=8)
    network = build_splitnet(request, seed=0).eval()
    path = tmp_path / "ensemble.pt2"
    path.write_bytes(program_bytes(export_ensemble(network, rule, (3, 8, 8)), {"classes": ["a", "ü"]}))
    run, metadata = load_exported(path)
    assert metadata == {"classes": ["a", "ü"]}
    images_BCHW = images(5, 8).float()
    with torch.inference_mode():
        expected_BK = ensemble_scores(network(images_BCHW), rule)
        torch.testing.assert_close(run(images_BCHW)[0], expected_BK, rtol=1e-5, atol=1e-6)


FORMS = {
    "mimo": {},
    "batch_ensemble": {"norm": "shared", "init": -0.5},
    "mc_dropout": {"place": "stages", "rate": 0.1, "mask_seed": 1},
    "packed": {"alpha": "2", "gamma": 1, "min_channels": 64},
}


@pytest.mark.parametrize("kind", FORMS)
def test_members_that_share_a_network_export(kind):
    """All of them in one file; those of a BatchEnsemble as networks of their own."""
    form = MemberForm(kind=kind, members=3, numbers=FORMS[kind])
    request = BackboneRequest(arch="resnet20", num_classes=4, dataset="digits", crop_size=8, form=form)
    network = scrambled(build_splitnet(request, seed=0))
    program = export_ensemble(network, "mean_softmax", (3, 8, 8))
    images_BCHW = images(5, 8)
    with torch.inference_mode():
        logits_MBK = network(images_BCHW)
        torch.testing.assert_close(program.module()(images_BCHW)[1], logits_MBK, rtol=1e-6, atol=1e-8)
    assert logits_MBK.shape == (3, 5, 4)
    assert not torch.allclose(logits_MBK[0], logits_MBK[1])
    names = {name.split(".")[2] for name in program.state_dict if name.startswith("network.models.")}
    assert len(names) == (3 if kind in ("packed", "batch_ensemble") else 1)


# ---- script/export.py ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    flags = ("--split_factor", 2, "--max_steps", 2, "--ema_decay", 0.5, "--seed", 1, "--model_dir", folder / "run")
    done = runs.train([*runs.TINY, *flags], folder)
    assert done.code == 0, done.stderr
    return folder / "run" / "model_best.pth.tar"


def call(*argv: object, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    code = exporting.main([str(word) for word in argv])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.mark.parametrize(
    ("suffix", "flags", "weights"),
    [
        ("pt2", (), "ema"),
        ("pt2", ("--is_max_ensemble", 1, "--is_ensembled_after_softmax", 1, "--weights", "raw"), "raw"),
        pytest.param("onnx", (), "ema", marks=pytest.mark.skipif(not HAS_ONNX, reason="needs onnx, onnxruntime")),
    ],
)
def test_the_file_predicts_as_eval_does(suffix, flags, weights, checkpoint, tmp_path, capsys):
    out = tmp_path / f"ensemble.{suffix}"
    code, stdout, stderr = call(checkpoint, "--out", out, *flags, capsys=capsys)
    assert code == 0, stderr
    lines = stdout.splitlines()
    assert [line.split(" random")[0] for line in lines[:-2]] == ["1", "2", "7"]
    result = json.loads(lines[-1])
    assert lines[-2] == f"preprocessing: {json.dumps(result['preprocessing'])}"
    assert result["weights"] == weights
    assert 0 < result["largest_relative_difference"] < 1e-5

    # beside what eval.py writes about the same images
    array = np.random.default_rng(0).standard_normal((5, 3, 16, 16), dtype=np.float32)
    np.save(tmp_path / "images.npy", array)
    command = ["--resume", checkpoint, "--predict", tmp_path / "images.npy", "--model_dir", tmp_path / "eval", *flags]
    done = runs.Run([*command, "--no_cuda"], tmp_path / "streams", module="eval").wait()
    assert done.code == 0, done.stderr
    expected = np.load(tmp_path / "eval" / "predict_images.npy" / "logits.npz")
    run, metadata = load_exported(out)
    ensemble_BK, logits_SBK = run(torch.from_numpy(array))
    np.testing.assert_allclose(logits_SBK.numpy(), expected["logits"], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(ensemble_BK.numpy(), expected["ensemble"], rtol=1e-4, atol=1e-6)
    assert metadata["classes"] == [str(digit) for digit in range(10)]
    assert (metadata["crop_size"], metadata["networks"]) == (16, 2)
    assert len(metadata["mean"]) == len(metadata["std"]) == 3
    assert metadata["preprocessing"] == load_checkpoint(checkpoint)["preprocessing"] == result["preprocessing"]


@pytest.mark.parametrize("flags", [("--json",), ("--json=1",), ("--json", 0)], ids=str)
def test_a_terminal_sees_the_line_of_json_where_it_is_asked_for(flags, checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    out = tmp_path / "a.pt2"
    code, stdout, stderr = call(checkpoint, "--out", out, "--batch_sizes", 1, *flags, capsys=capsys)
    assert code == 0, stderr
    last = stdout.splitlines()[-1]
    if flags == ("--json", 0):
        assert last == f"written: {out}"
    else:
        assert json.loads(last)["out"] == str(out)


def test_a_file_that_differs_is_not_kept(checkpoint, tmp_path, capsys):
    (tmp_path / "old.pt2").write_text("an older file")
    code, stdout, stderr = call(checkpoint, "--out", tmp_path / "old.pt2", "--tolerance", 0, capsys=capsys)
    assert code == 1
    assert "beyond the tolerance" in stderr
    assert json.loads(stdout.splitlines()[-1])["out"] is None
    assert [path.name for path in tmp_path.iterdir()] == ["old.pt2"]
    assert (tmp_path / "old.pt2").read_text() == "an older file"


def test_mistakes(checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for flags, message in (
        (("--out", tmp_path / "a.onnx"), "ONNX needs the package onnx: pip install"),
        (("--out", tmp_path / "a.zip"), "expected a name that ends in .onnx or .pt2"),
        (("--out", tmp_path / "no" / "a.pt2"), "does not exist"),
        (("--batch_sizes", 0), "--batch_sizes"),
        (("--wieghts", "raw"), "Did you mean 'weights'?"),
    ):
        code, stdout, stderr = call(checkpoint, *flags, capsys=capsys)
        assert (code, stdout) == (2, "")
        assert message in stderr
        assert stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())

"""A cascade as one file answers as the running one does, image by image."""

import hashlib
import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from evaluation import run_cascade
from evaluation.answers import read_answers
from evaluation.calibration import scores_of
from evaluation.ensemble import RULES
from evaluation.export import load_exported, onnx_bytes, program_bytes
from evaluation.export_cascade import CASCADE_OUTPUTS, export_cascade, load_cascade
from evaluation.exporting import main
from evaluation.options import CONFIDENCES
from evaluation.selective import confidence_of
from evaluation.tuning import tuned_path
from model.splitnet import SplitNet
from record.checkpoint import save_checkpoint, state_sha256
from tests.test_evaluation_answers import answers_of
from tests.tuned_run import content_of, digits, fitted_network, prepared

HAS_ONNX = all(importlib.util.find_spec(name) for name in ("onnx", "onnxscript", "onnxruntime"))
needs_onnx = pytest.mark.skipif(not HAS_ONNX, reason="onnx, onnxscript and onnxruntime are not installed")
SUFFIXES = [".pt2", pytest.param(".onnx", marks=needs_onnx)]


@pytest.fixture(scope="module")
def three() -> SplitNet:
    return SplitNet(list(fitted_network(4, images=150).models)[:3]).eval()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize(("rule", "confidence"), [("mean_logits", "margin"), ("mean_softmax", "entropy")])
def test_the_same_networks_for_every_image(
    rule: str, confidence: str, suffix: str, three: SplitNet, tmp_path: Path
) -> None:
    window = rule == "mean_softmax"
    answers = answers_of(((0.2, 0.6), (0.2, 0.5)), "window") if window else answers_of(((0.5,), (0.4,)))
    assert answers.cascade is not None
    answers = replace(answers, rule=rule, cascade=replace(answers.cascade, confidence=confidence))
    images = prepared(digits().test.images[:40])
    program = export_cascade(three, answers, (3, 16, 16))
    path = tmp_path / f"cascade{suffix}"
    is_onnx = suffix == ".onnx"
    path.write_bytes(onnx_bytes(program, {}, CASCADE_OUTPUTS) if is_onnx else program_bytes(program, {}))
    run = load_cascade(path)
    with torch.inference_mode():
        expected = answers.running_cascade(list(three.models))(images)
        scores, used = run(images)
    assert len(expected.stage_B.unique()) > 1
    assert torch.equal(used, expected.stage_B + 1)
    assert torch.allclose(scores.double(), expected.scores_BK, rtol=1e-4, atol=1e-3)


def write_tuned(folder: Path, network: SplitNet, **changed: Any) -> Path:
    """A tuned checkpoint of two networks, the second of which runs first."""
    values: dict[str, Any] = answers_of().as_dict()
    values["weights_sha256"] = state_sha256(network.state_dict())
    values["rule"] = "mean_logits"
    values["cascade"] |= {"order": [2, 1], "thresholds": [0.4], "macs": [5, 5]}
    path = tuned_path(Path("model_best.pth.tar"), folder)
    save_checkpoint(content_of(network, answers=values | changed), path)
    return path


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_command_compares_with_images_of_the_data_set(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_tuned(tmp_path, fitted_network(), calibration=None)
    assert main([str(path), "--answer", "cascade", "--out", str(tmp_path / "cascade.pt2")]) == 0
    results = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (results["compared"] + len(results["too_close"]), results["other_networks"]) == (100, 0)
    assert (tmp_path / "cascade.pt2").exists()
    flags = ["--answer", "cascade", "--input", "uint8", "--out", str(tmp_path / "other.pt2")]
    assert main([str(path), *flags]) == 2
    assert "--input uint8 is for the whole ensemble" in capsys.readouterr().err
    assert not (tmp_path / "other.pt2").exists()


WITHOUT_THE_PROJECT = """
import runpy, sys
rooms = {rooms!r}
class Refused:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in rooms:
            raise AssertionError(name + " is of the project")
sys.meta_path.insert(0, Refused())
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
ROOMS = {"cotrain", "dataset", "evaluation", "loss", "method", "model", "record", "recipe", "training", "utils"}


def run_alone(*words: object) -> subprocess.CompletedProcess[str]:
    """A script in a Python that has no way to the project."""
    command = [sys.executable, "-I", "-c", WITHOUT_THE_PROJECT.format(rooms=ROOMS), *map(str, words)]
    return subprocess.run(command, cwd="/", env={"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_folder_answers_without_the_project(suffix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    network = fitted_network()
    calibration = {"mode": "both", "ensemble": 1.1, "networks": [1.2, 0.9], "both": 0.8, "stages": [1.3, 0.7]}
    path = write_tuned(tmp_path, network, calibration=calibration)
    out = tmp_path / "cascade"
    flags = [str(path), "--answer", "cascade", "--out", f"{out}/", "--format", suffix[1:]]
    assert main(flags) == 0, capsys.readouterr().err
    results = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (results["compared"] + len(results["too_close"]), results["other_networks"]) == (100, 0)
    networks = [f"network_{s}{suffix}" for s in (1, 2)]
    assert sorted(os.listdir(out)) == ["manifest.json", *networks, "run_cascade.py"]
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["files"] == {name: hashlib.sha256((out / name).read_bytes()).hexdigest() for name in networks}
    assert manifest["answers"]["calibration"] == calibration
    assert manifest["walk"]["networks"] == networks[::-1]

    images = prepared(digits().test.images[:50])
    np.save(tmp_path / "images.npy", images.numpy())
    done = run_alone(out / "run_cascade.py", tmp_path / "images.npy", tmp_path / "answers.npz", 7)
    assert done.returncode == 0, done.stderr
    found = np.load(tmp_path / "answers.npz")
    answers = read_answers(manifest["answers"], 2, "manifest")
    with torch.inference_mode():
        expected = answers.running_cascade(list(network.models))(images)
    assert len(expected.stage_B.unique()) == 2
    assert found["networks"].tolist() == (expected.stage_B + 1).tolist()
    np.testing.assert_allclose(found["ensemble"], expected.scores_BK, rtol=1e-4, atol=1e-4)
    log_probs = answers.stage_log_probs(expected.scores_BK, expected.stage_B)
    np.testing.assert_allclose(found["probabilities"], log_probs.exp(), rtol=1e-3, atol=1e-5)

    assert main(flags) == 2
    assert "holds something already" in capsys.readouterr().err
    (out / networks[0]).write_bytes(b"another")
    done = run_alone(out / "run_cascade.py", tmp_path / "images.npy", tmp_path / "answers.npz")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert f"{networks[0]} is not the file that manifest.json names" in done.stderr


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("kind", CONFIDENCES)
def test_the_arithmetic_of_the_runner_is_that_of_the_project(rule: str, kind: str) -> None:
    logits = 30 * torch.randn(3, 20, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    scores = scores_of(logits, rule)
    ours = run_cascade.joined(logits.numpy(), rule)
    np.testing.assert_allclose(ours, scores, rtol=1e-12)
    np.testing.assert_allclose(
        run_cascade.confidence_of(run_cascade.log_softmax(ours), kind), confidence_of(scores, kind), atol=1e-12
    )
    nothing = torch.full((1, 4), torch.nan, dtype=torch.float64)
    for bounds in ([0.5], [0.2, 0.4]):
        lost = run_cascade.confidence_of(run_cascade.log_softmax(nothing.numpy()), kind)
        assert not run_cascade.leaves(lost, bounds).any()


def test_mistakes_of_folders_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_tuned(tmp_path, fitted_network(images=20), calibration=None)
    for flags, named in (
        (["--out", f"{tmp_path / 'a'}/", "--format", "pt2"], "a folder is for --answer cascade"),
        (["--out", str(tmp_path / "a.pt2"), "--format", "pt2"], "--format pt2: is for a folder"),
        (["--answer", "cascade", "--out", str(tmp_path)], "holds something already"),
    ):
        assert main([str(path), *flags]) == 2
        printed = capsys.readouterr().err
        assert named in printed
        assert "Traceback" not in printed
    assert os.listdir(tmp_path) == [path.name]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_tuned_ensemble_gives_calibrated_probabilities(
    suffix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    network = fitted_network()
    calibration = {"mode": "both", "ensemble": 1.1, "networks": [1.2, 0.9], "both": 0.8, "stages": []}
    conformal = [
        {"kind": "thr", "alpha": 0.1, "q": 0.4, "lambda": 0.0, "k_reg": 0, "randomised": False},
    ]
    path = write_tuned(tmp_path, network, calibration=calibration, conformal=conformal, cascade=None)
    out = tmp_path / f"ensemble{suffix}"
    assert main([str(path), "--out", str(out)]) == 0, capsys.readouterr().err
    results = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert results["outputs"] == ["ensemble", "logits", "probabilities"]
    run, metadata = load_exported(out)
    assert metadata["answers"]["calibration"] == calibration
    assert metadata["answers"]["conformal"] == conformal
    assert metadata["outputs"].keys() == {"ensemble", "logits", "probabilities"}
    images = prepared(digits().test.images[:5])
    with torch.inference_mode():
        scores, _, probabilities = run(images)
        expected = network(images)
    torch.testing.assert_close(scores, expected.mean(dim=0), rtol=1e-4, atol=1e-4)
    own = expected / torch.tensor([1.2, 0.9])[:, None, None]
    torch.testing.assert_close(probabilities, (own.mean(dim=0) / 0.8).softmax(dim=-1), rtol=1e-3, atol=1e-5)
    assert main([str(path), "--out", str(tmp_path / f"raw{suffix}"), "--calibrate", "none"]) == 0
    assert len(load_exported(tmp_path / f"raw{suffix}")[0](images)) == 2

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

import eval as program
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
from tests.tuned_run import content_of, digits, fitted_network, prepared, write_run

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
    exported = export_cascade(three, answers, (3, 16, 16))
    path = tmp_path / f"cascade{suffix}"
    is_onnx = suffix == ".onnx"
    path.write_bytes(onnx_bytes(exported, {}, CASCADE_OUTPUTS) if is_onnx else program_bytes(exported, {}))
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


# answers of every form by what a user has of each; argv: the folder of the exports, images, where the counts go
EVERY_FORM = """
import json, subprocess, sys
from pathlib import Path
import numpy as np, onnxruntime, torch
exports, images_path, out = map(Path, sys.argv[1:])
images = np.load(images_path)
session = onnxruntime.InferenceSession(str(exports / "cascade.onnx"), providers=["CPUExecutionProvider"])
program = torch.export.load(str(exports / "cascade.pt2")).module()
found = {
    "onnx": [int(session.run(["networks"], {"images": image[None]})[0][0]) for image in images],
    "pt2": [int(program(torch.from_numpy(image[None]))[1]) for image in images],
}
out.write_text(json.dumps(found))
"""


@pytest.mark.slow
@pytest.mark.skipif(not HAS_ONNX, reason="onnx, onnxscript and onnxruntime are not installed")
@pytest.mark.filterwarnings("ignore")
def test_every_form_of_a_tuned_cascade_takes_the_same_networks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """From a run to its tuned checkpoint, prediction, both files and the folder, run where the project is not."""
    run_folder, exports = tmp_path / "run", tmp_path / "exports"
    run_folder.mkdir()
    exports.mkdir()
    best = write_run(run_folder, fitted_network())
    assert program.main(["--resume", str(best), "--tune", "calibration,cascade", "--no_cuda", "--workers", "0"]) == 0
    tuned = run_folder / "eval" / "model_best.tuned.pth.tar"
    np.save(tmp_path / "images.npy", prepared(digits().test.images[:60]).numpy())
    flags = ["--predict", str(tmp_path / "images.npy"), "--model_dir", str(tmp_path / "out"), "--no_cuda"]
    assert program.main(["--resume", str(tuned), "--answer", "cascade", *flags]) == 0
    for name in ("cascade.onnx", "cascade.pt2", "folder/"):
        assert main([str(tuned), "--answer", "cascade", "--out", f"{exports}/{name}"]) == 0, capsys.readouterr().err
    with np.load(tmp_path / "out" / "predict_images.npy" / "logits.npz") as stored:
        expected = stored["networks_used"].tolist()
    assert set(expected) == {1, 2}

    (tmp_path / "every_form.py").write_text(EVERY_FORM)
    done = run_alone(tmp_path / "every_form.py", exports, tmp_path / "images.npy", tmp_path / "counts.json")
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "counts.json").read_text())
    runner = exports / "folder" / "run_cascade.py"
    for batch in (1, 7, 128):
        done = run_alone(runner, tmp_path / "images.npy", tmp_path / "answers.npz", batch)
        assert done.returncode == 0, done.stderr
        with np.load(tmp_path / "answers.npz") as answered:
            found[f"folder, batch {batch}"] = answered["networks"].tolist()
    assert found == dict.fromkeys(("onnx", "pt2", "folder, batch 1", "folder, batch 7", "folder, batch 128"), expected)

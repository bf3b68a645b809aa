"""A cascade as one file answers as the running one does, image by image."""

import importlib.util
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from evaluation.export import onnx_bytes, program_bytes
from evaluation.export_cascade import CASCADE_OUTPUTS, export_cascade, load_cascade
from evaluation.exporting import main
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
        found = [run(image[None]) for image in images]
    assert len(expected.stage_B.unique()) > 1
    assert [count for _, count in found] == (expected.stage_B + 1).tolist()
    scores = torch.cat([one for one, _ in found]).double()
    assert torch.allclose(scores, expected.scores_BK, rtol=1e-4, atol=1e-3)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_command_compares_with_images_of_the_data_set(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    network = fitted_network()
    values: dict[str, Any] = answers_of().as_dict()
    values["weights_sha256"] = state_sha256(network.state_dict())
    values["rule"] = "mean_logits"
    values["calibration"] = None
    values["cascade"] |= {"order": [2, 1], "thresholds": [0.4], "macs": [5, 5]}
    path = tuned_path(Path("model_best.pth.tar"), tmp_path)
    save_checkpoint(content_of(network, answers=values), path)
    assert main([str(path), "--answer", "cascade", "--out", str(tmp_path / "cascade.pt2")]) == 0
    results = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (results["compared"] + len(results["too_close"]), results["other_networks"]) == (100, 0)
    assert (tmp_path / "cascade.pt2").exists()
    flags = ["--answer", "cascade", "--input", "uint8", "--out", str(tmp_path / "other.pt2")]
    assert main([str(path), *flags]) == 2
    assert "--input uint8 is for the whole ensemble" in capsys.readouterr().err
    assert not (tmp_path / "other.pt2").exists()

"""Methods that spend one budget otherwise, by the ways of a run: compiled, in fp16, timed, exported, in a graph."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import eval as evaluation
import train_split
from evaluation import contenders, latency
from evaluation.exporting import main as export
from method import methods
from record.checkpoint import load_checkpoint
from record.run_folder import read_results
from tests.test_method_contract import make, optimizer_of, step
from training import replay
from training.replay import choose_recorder
from utils.errors import UserError
from utils.launch import World
from utils.precision import Precision

FP16 = Precision("fp16", torch.float32, torch.float16, scaler=False, memory_format=torch.contiguous_format)
# two batches of 96 images an epoch
BASE = "--dataset digits --arch resnet20 --batch_size 96 --workers 0 --seed 1 --no_cuda --val_fraction 0.8"
METHODS = {
    "packed": "--num_members 2",
    "batch_ensemble": "--num_members 2",
    "mimo": "--num_members 2",
    "mc_dropout": "--num_members 2",
    "snapshot": "--num_members 2",
    "one": "",
    "okddip": "",
    "byot": "",
    "kdcl": "--split_factor 2",
    "kd": "",
}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("teacher")
    words = [*BASE.split(), "--max_steps", "1", "--amp_dtype", "fp32", "--method", "independent"]
    assert train_split.main([*words, "--model_dir", str(folder)]) == 0
    return folder / "model_best.pth.tar"


def words_of(name: str, teacher: Path) -> list[str]:
    own = ["--teacher", str(teacher)] if name == "kd" else []
    return [*BASE.split(), "--method", name, *METHODS[name].split(), *own]


def train(name: str, folder: Path, teacher: Path, *flags: str) -> Path:
    """A run of the method; its best checkpoint."""
    assert train_split.main([*words_of(name, teacher), *flags, "--model_dir", str(folder)]) == 0
    return folder / "model_best.pth.tar"


def losses(folder: Path) -> list[float]:
    """Of every line about training; none is absent, and absent is what a number that is not finite leaves."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    found = [record["loss"] for record in records if record["kind"] == "train"]
    assert found
    assert None not in found
    return found


@pytest.mark.long
@pytest.mark.parametrize("name", METHODS)
def test_a_compiled_run_learns_the_same_and_is_evaluated_timed_and_exported(
    name: str,
    teacher: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    logging_restored: None,
) -> None:
    flags = ["--max_steps", "2", "--print_freq", "1", "--amp_dtype", "fp32"]
    checkpoint = train(name, tmp_path / "compiled", teacher, *flags, "--compile", "aot_eager")
    train(name, tmp_path / "plain", teacher, *flags)
    assert losses(tmp_path / "compiled") == pytest.approx(losses(tmp_path / "plain"), rel=1e-3)
    monkeypatch.setattr(latency, "WARMUP_SECONDS", -1)
    monkeypatch.setattr(latency, "LEAST", 1)
    monkeypatch.setattr(contenders, "measure", partial(latency.measure, seconds=0.0, batch_sizes=(1, 4)))
    capsys.readouterr()
    assert evaluation.main(["--resume", str(checkpoint), "--workers", "0", "--no_cuda", "--benchmark", "--json"]) == 0
    result = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert {row["batch_size"] for row in result["latency"]} == {1, 4}
    assert all(row["p50_ms"] > 0 for row in result["latency"])
    assert export([str(checkpoint), "--out", str(tmp_path / "all.pt2")]) == 0
    assert (tmp_path / "all.pt2").stat().st_size > 0


@pytest.mark.parametrize("name", METHODS)
def test_a_step_in_half_precision_is_near_that_in_single(name: str) -> None:
    """Without the scaler, which multiplies and divides by the same number; softmax, KL and gates stay in float32."""
    method = make(name)
    output = step(method, 1, optimizer_of(method))
    low = make(name)
    rough = step(low, 1, optimizer_of(low), precision=FP16)
    assert rough.loss.dtype == torch.float32
    torch.testing.assert_close(rough.loss, output.loss, rtol=0.01, atol=0)
    assert not torch.equal(rough.logits_SBK.float(), output.logits_SBK)
    for (key, parameter), (_, fine) in zip(low.named_parameters(), method.named_parameters(), strict=True):
        if fine.grad is not None:
            assert parameter.grad.isfinite().all(), key


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", METHODS)
def test_half_precision_trains(name: str, teacher: Path, tmp_path: Path, logging_restored: None) -> None:
    words = [word for word in words_of(name, teacher) if word != "--no_cuda"]
    words += ["--max_steps", "2", "--print_freq", "1", "--amp_dtype", "fp16", "--model_dir", str(tmp_path)]
    assert train_split.main(words) == 0
    assert all(loss > 0 for loss in losses(tmp_path))


def test_half_precision_is_refused_on_a_cpu(
    teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], logging_restored: None
) -> None:
    words = [*words_of("packed", teacher), "--amp_dtype", "fp16", "--model_dir", str(tmp_path)]
    assert train_split.main(words) == UserError.exit_code
    *_, error = capsys.readouterr().err.splitlines()
    assert "--amp_dtype fp16 needs a GPU" in error


@pytest.mark.long
@pytest.mark.parametrize("name", METHODS)
def test_two_epochs_in_one_go_or_in_two_give_the_same_weights(
    name: str, teacher: Path, tmp_path: Path, logging_restored: None
) -> None:
    flags = ["--epochs", "2", "--amp_dtype", "fp32", "--slow_start_epochs", "0"]
    flags = flags[:4] if name == "snapshot" else flags  # its schedule has no warm-up
    train(name, tmp_path / "whole", teacher, *flags)
    train(name, tmp_path / "halves", teacher, *flags, "--max_steps", "3")
    train(name, tmp_path / "halves", teacher, *flags, "--resume", "auto")
    whole, halves = (read_results(tmp_path / part) or {} for part in ("whole", "halves"))
    assert whole["steps"] == halves["steps"] > 3
    assert whole["state_sha256"] == halves["state_sha256"]
    assert load_checkpoint(tmp_path / "halves" / "checkpoint_2.pth.tar")["epoch"] == 2


@pytest.mark.parametrize("name", METHODS)
def test_a_graph_needs_a_gpu(
    name: str, teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], logging_restored: None
) -> None:
    words = [*words_of(name, teacher), "--cuda_graph", "1", "--model_dir", str(tmp_path)]
    assert train_split.main(words) == UserError.exit_code
    *_, error = capsys.readouterr().err.splitlines()
    assert "--cuda_graph 1 needs a GPU: leave it out on a CPU." in error
    assert not [*tmp_path.glob("*.pth.tar")]


@pytest.mark.parametrize("scaler", [False, True])
@pytest.mark.parametrize("name", METHODS)
def test_one_line_says_whether_its_steps_are_replayed(
    name: str, scaler: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """All ten may be: what they draw for a step is made before it. With fp16 no step is."""
    monkeypatch.setattr(replay, "CudaRecorder", lambda device: device)
    method: Any = methods.get(name)  # what is asked for are traits of the class
    with caplog.at_level("INFO"):
        recorder = choose_recorder(
            "auto",
            method,
            name=name,
            has_exchange=False,
            iters_to_accumulate=1,
            scaler=scaler,
            world=World(0, 1, 0, 1, torch.device("cuda")),
            before=None,
        )
    assert (recorder is None) == scaler
    (line,) = caplog.messages
    assert line == (
        "--cuda_graph auto: steps are not replayed. --cuda_graph 1 does not go with fp16, whose scaler changes between "
        "steps: use --amp_dtype bf16 or fp32."
        if scaler
        else "--cuda_graph auto: steps are replayed as one CUDA graph."
    )

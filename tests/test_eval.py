"""eval.py as a user runs it: evaluation, prediction, released checkpoints, and what is refused."""

import csv
import functools
import gzip
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import eval as program
import evaluation.run
import train_split
from dataset import SourceRequest, open_source
from dataset.views import ViewMaker, plain_spec
from evaluation import contenders as inference
from evaluation import latency, passes, session
from evaluation.counts import EvaluationCounts
from evaluation.files import write_latencies
from evaluation.session import Session
from model import BackboneRequest, build_splitnet
from model.restore import published_keys
from model.splitnet import SplitNet
from parser_params import parse_config
from record.checkpoint import FORMAT_VERSION, save_checkpoint
from tests.golden.fill import fill, image
from tests.recorders import Recorder
from tests.waits import needs_gpu
from utils.errors import WriteError
from utils.recording import WARM_UP

ROOT = Path(__file__).parent.parent
GOLDEN = Path(__file__).parent / "golden"
REQUEST = BackboneRequest(arch="resnet20", split_factor=2, num_classes=10, dataset="digits", crop_size=16)
DIGITS = open_source(SourceRequest(dataset="digits", root=Path()))


def digits_network() -> Any:
    """Two networks whose weights are large enough that predictions differ between images and networks."""
    network = build_splitnet(REQUEST, seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return network.eval()


def normalised(images: torch.Tensor) -> torch.Tensor:
    spec = plain_spec(16, DIGITS.mean, DIGITS.std)
    return ViewMaker(spec, seed=0).evaluate(images)


def content_of(network: Any) -> dict[str, Any]:
    config = {"arch": "resnet20", "split_factor": 2, "dataset": "digits", "method": "co_training", "seed": 1}
    return {
        "epoch": 1,
        "arch": "resnet20",
        "state_dict": published_keys(network.state_dict()),
        "best_acc1": 50.0,
        "config": config,
        "classes": list(DIGITS.classes),
        "mean": list(DIGITS.mean),
        "std": list(DIGITS.std),
        "crop_size": 16,
        "data_recipe": "digits",
        "format_version": FORMAT_VERSION,
    }


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory with one checkpoint."""
    folder = tmp_path_factory.mktemp("run")
    save_checkpoint(content_of(digits_network()), folder / "checkpoint_1.pth.tar")
    (folder / "hparams_train.json").write_text("{}")
    (folder / "results.json").write_text("of the training run")
    return folder


@pytest.fixture(scope="module")
def test_logits_SNK(run_dir: Path) -> torch.Tensor:
    network = build_splitnet(REQUEST, seed=0).eval()
    state = torch.load(run_dir / "checkpoint_1.pth.tar", weights_only=True)["state_dict"]
    network.load_state_dict({key.removeprefix("module."): value for key, value in state.items()})
    with torch.inference_mode():
        return network(normalised(DIGITS.test.images))


@pytest.fixture
def one_image(tmp_path: Path) -> Path:
    """A .npy file of one normalised image."""
    np.save(tmp_path / "one.npy", normalised(DIGITS.test.images[:1]).numpy())
    return tmp_path / "one.npy"


def run(*argv: Any, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of eval.py in this process."""
    code = program.main(["--no_cuda", "--workers", "0", *map(str, argv)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def succeed(*argv: Any, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    code, out, err = run(*argv, capsys=capsys)
    assert code == 0, err
    return json.loads(out.splitlines()[-1])


def refuse(*argv: Any, capsys: pytest.CaptureFixture[str], code: int = 2) -> str:
    got, out, err = run(*argv, capsys=capsys)
    assert got == code
    assert out == ""
    line = err.splitlines()[-1]
    assert line.startswith("eval.py: ")
    assert "Traceback" not in err
    return line


def command_line(*argv: Any, launcher: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    """eval.py in a process of its own."""
    command = [sys.executable, *launcher, "eval.py", "--no_cuda", "--workers", "0", *map(str, argv)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


# ---- evaluation ------------------------------------------------------------------------------------------------------


def test_evaluation(run_dir, test_logits_SNK, tmp_path, capsys):
    code, out, err = run("--resume", run_dir / "checkpoint_1.pth.tar", "--model_dir", tmp_path, capsys=capsys)
    assert code == 0, err
    results = json.loads(out.splitlines()[-1])
    assert results == json.loads((tmp_path / "results.json").read_text())
    correct_SN = test_logits_SNK.argmax(-1) == DIGITS.test.targets
    assert results["acc1"] == pytest.approx((100 * correct_SN.double().mean(1)).tolist(), abs=1e-9)
    assert [row["acc1"] for row in results["networks"]] == results["acc1"]
    ensemble_N = test_logits_SNK.mean(0).argmax(-1) == DIGITS.test.targets
    assert results["ensemble_acc1"] == pytest.approx(100 * float(ensemble_N.double().mean()), abs=1e-9)
    assert results["ensembles"]["mean_logits"]["acc1"] == results["ensemble_acc1"]
    assert set(results["ensembles"]) == {"mean_logits", "mean_softmax", "max_logits", "max_softmax", "geometric_mean"}
    differ = (test_logits_SNK[0].argmax(-1) != test_logits_SNK[1].argmax(-1)).double().mean()
    assert results["disagreement"] == pytest.approx(float(differ), abs=1e-9)
    threes = DIGITS.test.targets == 3
    assert results["per_class_acc"]["3"] == pytest.approx(100 * float(ensemble_N[threes].double().mean()), abs=1e-9)
    assert (results["images"], results["skipped"], results["precision"]) == (359, 0, "fp32")
    assert "network 2" in out
    assert "mean_logits (reported)" in (tmp_path / "table.md").read_text()
    assert sum(int(row["images"]) for row in read_csv(tmp_path / "per_class.csv")) == 359
    rows = read_csv(tmp_path / "test_predictions.csv")
    probs_NK = test_logits_SNK.mean(0).softmax(-1)
    assert [int(row["index"]) for row in rows] == list(range(359))
    assert [int(row["predicted"]) for row in rows] == probs_NK.argmax(-1).tolist()
    assert [row["name"] for row in rows] == [DIGITS.classes[k] for k in DIGITS.test.targets.tolist()]
    assert 100 * sum(int(row["correct"]) for row in rows) / 359 == pytest.approx(results["ensemble_acc1"])
    best_N2 = probs_NK.topk(2).values
    assert [float(row["probability"]) for row in rows] == pytest.approx(best_N2[:, 0].tolist(), abs=1e-5)
    assert [float(row["margin"]) for row in rows] == pytest.approx((best_N2[:, 0] - best_N2[:, 1]).tolist(), abs=1e-5)
    assert sum(float(row["disagreement"]) for row in rows) / 359 == pytest.approx(results["disagreement"])
    with Image.open(tmp_path / "confusion.png") as confusion:
        assert confusion.size[0] > 300


@pytest.mark.parametrize(
    ("asked", "device", "spread", "batches", "line"),
    [
        ("0", "cuda", False, 100, None),
        ("1", "cuda", False, 100, "1: passes over images are replayed as one CUDA graph."),
        ("auto", "cuda", False, 3, "auto: passes over images are not replayed: 3 batches are too few."),
        ("1", "cuda", True, 100, "1: passes over images are not replayed: the networks are on several GPUs."),
        ("1", "cpu", False, 100, "1: passes over images are not replayed: there is no GPU."),
    ],
)
def test_passes_are_replayed_where_that_is_asked_for_and_can_be(
    monkeypatch, caplog, asked, device, spread, batches, line
):
    caplog.set_level("INFO")
    monkeypatch.setattr(passes, "CudaRecorder", lambda device, refusal: "recorder")
    session: Any = SimpleNamespace(
        config=SimpleNamespace(cuda_graph=asked, is_test_on_multigpus=spread),
        world=SimpleNamespace(device=torch.device(device)),
    )
    found = Session.recorder(session, batches)
    assert (found == "recorder") == (line is not None and line.endswith("graph."))
    assert caplog.messages == ([] if line is None else [f"--cuda_graph {line}"])


def test_a_replayed_evaluation_finds_what_another_finds(run_dir, tmp_path, monkeypatch, capsys):
    """As on a GPU: with a recorder of its passes, in 18 batches of which the last is smaller."""
    argv = ["--resume", run_dir / "checkpoint_1.pth.tar", "--eval_batch_size", 20]
    plain = succeed(*argv, "--model_dir", tmp_path / "plain", capsys=capsys)
    made: list[EvaluationCounts] = []
    calls: list[str] = []

    class Kept(EvaluationCounts):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            made.append(self)

    def recorder(session: Session, batches: int) -> Recorder:
        return Recorder(calls, changed=lambda: made[-1].tensors())

    monkeypatch.setattr(passes, "EvaluationCounts", Kept)
    monkeypatch.setattr(Session, "recorder", recorder)
    replayed = succeed(*argv, "--model_dir", tmp_path / "replayed", capsys=capsys)
    assert calls.count("replay") == 18 - 1 - WARM_UP
    for name in ("acc1", "networks", "ensembles", "disagreement", "per_class_acc"):
        assert replayed[name] == plain[name]
    tables = [(tmp_path / name / "test_predictions.csv").read_text() for name in ("plain", "replayed")]
    assert tables[0] == tables[1]


@needs_gpu
@pytest.mark.parametrize("execution", ["loop", "parallel", "stacked"])
def test_an_evaluation_as_one_graph_finds_what_another_finds(run_dir, tmp_path, capsys, execution):
    found = []
    for replayed in ("0", "1"):
        argv = ["--resume", str(run_dir / "checkpoint_1.pth.tar"), "--workers", "0", "--eval_batch_size", "20"]
        argv += ["--execution", execution, "--model_dir", str(tmp_path / replayed), "--cuda_graph", replayed]
        assert program.main([*argv, "--deterministic", "1"]) == 0
        captured = capsys.readouterr()
        assert ("replayed as one CUDA graph" in captured.err) == (replayed == "1")
        assert "cannot be captured" not in captured.err
        found.append(json.loads(captured.out.splitlines()[-1]))
    assert found[0]["acc1"] == found[1]["acc1"]
    nll = [one["ensembles"]["mean_logits"]["nll"] for one in found]
    assert nll[0] == pytest.approx(nll[1], rel=1e-6)


def test_flips_at_test_time_answer_for_the_mean_of_both(run_dir, test_logits_SNK, tmp_path, capsys):
    checkpoint = run_dir / "checkpoint_1.pth.tar"
    results = succeed("--resume", checkpoint, "--tta", "flip", "--model_dir", tmp_path, capsys=capsys)
    network, images = digits_network(), normalised(DIGITS.test.images)
    with torch.inference_mode():
        logits_SNK = (network(images) + network(images.flip(-1))) / 2

    def nll_S(logits_SNK: torch.Tensor) -> list[float]:
        log_probs_SNK = logits_SNK.double().log_softmax(dim=-1)
        return [-float(one[range(len(one)), DIGITS.test.targets].mean()) for one in log_probs_SNK]

    found = [one["nll"] for one in results["networks"]]
    assert found == pytest.approx(nll_S(logits_SNK), abs=1e-6)
    assert found != pytest.approx(nll_S(test_logits_SNK), abs=1e-4)
    assert results["tta"] == "flip"


def test_flips_at_test_time_reach_predictions(run_dir, one_image, tmp_path, capsys):
    mirrored = tmp_path / "mirrored.npy"
    np.save(mirrored, np.load(one_image)[..., ::-1])
    found = []
    cases = ((one_image, "none"), (mirrored, "none"), (one_image, "flip"))
    for number, (path, tta) in enumerate(cases):
        folder, checkpoint = tmp_path / str(number), run_dir / "checkpoint_1.pth.tar"
        succeed("--resume", checkpoint, "--predict", path, "--tta", tta, "--model_dir", folder, capsys=capsys)
        found.append(np.load(next(folder.rglob("logits.npz")))["logits"])
    np.testing.assert_allclose(found[2], (found[0] + found[1]) / 2, rtol=1e-5, atol=1e-5)
    assert not np.allclose(found[0], found[1])


def test_pictures_that_cannot_be_written_are_one_line(run_dir, tmp_path, capsys):
    for name in ("confusion.png", "latency.png"):
        (tmp_path / name).mkdir()
    line = refuse("--resume", run_dir / "checkpoint_1.pth.tar", "--model_dir", tmp_path, capsys=capsys, code=1)
    assert line == f"eval.py: {tmp_path / 'confusion.png'}: could not be written: Is a directory."
    times = dict.fromkeys(("p50_ms", "p95_ms", "p99_ms", "mean_ms"), 1.0)
    figures = {**times, "images_per_second": 1.0, "rounds": 1, "accuracy": 50.0}
    row = latency.Latency(name="a", strategy="loop", batch_size=1, **figures)
    with pytest.raises(WriteError, match=r"latency.png: could not be written: Is a directory\."):
        write_latencies([row], tmp_path)


@pytest.mark.slow
def test_benchmark_times_every_strategy_beside_the_undivided_network(run_dir, tmp_path, monkeypatch, capsys):
    quick = functools.partial(latency.measure, batch_sizes=(1, 3), seconds=0)
    monkeypatch.setattr(inference, "measure", quick)
    monkeypatch.setattr(latency, "LEAST", 2)
    argv = ("--resume", run_dir / "checkpoint_1.pth.tar", "--model_dir", tmp_path)
    code, out, err = run(*argv, "--benchmark", capsys=capsys)
    assert code == 0, err
    results = json.loads(out.splitlines()[-1])
    assert results == json.loads((tmp_path / "results.json").read_text())
    rows = results["latency"]
    assert rows == json.loads((tmp_path / "latency.json").read_text())
    ensemble = [("resnet20, S = 2", name) for name in ("loop", "parallel", "stacked")]
    assert [(row["name"], row["strategy"]) for row in rows] == [("undivided", "one network"), *ensemble] * 2
    assert [row["batch_size"] for row in rows] == [1] * 4 + [3] * 4
    # random weights have no accuracy to show
    assert {row["accuracy"] for row in rows if row["name"] == "undivided"} == {None}
    assert {row["accuracy"] for row in rows if row["name"] != "undivided"} == {results["ensemble_acc1"]}
    assert (tmp_path / "latency.md").read_text() in out
    assert (tmp_path / "latency.png").stat().st_size > 10_000
    monkeypatch.setattr(inference, "measure", lambda *_, **__: pytest.fail("nothing is timed"))
    line = refuse(*argv, "--benchmark", "--large", argv[1], capsys=capsys)
    assert line == f"eval.py: --large {argv[1]}: expected one network for 10 classes."
    line = refuse(*argv, "--benchmark", "--large", tmp_path / "none.pth.tar", capsys=capsys)
    assert line == f"eval.py: --large {tmp_path / 'none.pth.tar'}: does not exist."
    line = refuse(*argv, "--benchmark", "--predict", tmp_path, capsys=capsys)
    assert line == "eval.py: --benchmark follows an evaluation, and --predict takes its place: use one of them."
    line = refuse(*argv, "--benchmark", "--devices", "cuda:97", capsys=capsys)
    assert "--devices cuda:97: cuda:97 is none of this machine's" in line
    assert "are for --benchmark" in refuse(*argv, "--devices", "cuda:0", capsys=capsys)


def test_results_of_a_training_run_stay(run_dir, one_image, capsys):
    for arguments in ((), ("--model_dir", run_dir)):
        command = ("--resume", run_dir / "checkpoint_1.pth.tar", *arguments)
        assert succeed(*command, capsys=capsys)["results_dir"] == str(run_dir / "eval")
        evaluated = (run_dir / "eval" / "results.json").read_text()
        assert succeed(*command, "--predict", one_image, capsys=capsys)["results_dir"] == str(
            run_dir / "predict_one.npy"
        )
        assert (run_dir / "results.json").read_text() == "of the training run"
        assert (run_dir / "eval" / "results.json").read_text() == evaluated
    auto = succeed("--resume", "auto", "--model_dir", run_dir, "--predict", one_image, capsys=capsys)
    assert auto["checkpoint"] == str(run_dir / "checkpoint_1.pth.tar")


@pytest.fixture
def best_dir(run_dir: Path, tmp_path: Path) -> Path:
    """A run directory whose best checkpoint is not the newest one."""
    folder = tmp_path / "best"
    folder.mkdir()
    (folder / "model_best.pth.tar").hardlink_to(run_dir / "checkpoint_1.pth.tar")
    (folder / "checkpoint_2.pth.tar").write_text("not the best one")
    return folder


def test_a_run_directory_means_its_best_checkpoint(best_dir, one_image, tmp_path, capsys):
    best = best_dir / "model_best.pth.tar"
    expected = succeed("--resume", best, "--predict", one_image, "--model_dir", tmp_path / "a", capsys=capsys)
    for argv in ((best_dir,), (best,), ("--resume", best_dir)):
        code = program.main([*map(str, argv), "--no_cuda", "--predict", str(one_image)])
        out, err = capsys.readouterr()
        assert code == 0, err
        found = json.loads(out.splitlines()[-1])
        assert found["checkpoint"] == str(best)
        assert found["disagreement"] == expected["disagreement"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("empty",), "eval.py: empty: holds no run: expected a directory of train_split.py, or a checkpoint."),
        (("begun",), "its run has no model_best.pth.tar yet"),
        (("nowhere",), "nowhere: does not exist"),
        (("empty", "new_photos"), "new_photos: unexpected behind empty; to classify images: --predict new_photos."),
        (("empty", "--resume", "x.pth.tar"), "stands for --resume empty, and --resume is there too"),
        (("empty", "--evaluate-checkpoint=x"), "and --evaluate-checkpoint=x is there too"),
        (("a.pt2",), "is an exported file"),
    ],
)
def test_a_run_that_is_none_is_one_line(argv, message, tmp_path, monkeypatch, capsys):
    for name in ("empty", "begun"):
        (tmp_path / name).mkdir()
    (tmp_path / "begun" / "checkpoint_0_5.pth.tar").touch()
    monkeypatch.chdir(tmp_path)
    assert program.main(list(argv)) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err.splitlines()[-1]
    assert "Traceback" not in err


def test_overrides_alone_are_no_run_directory(best_dir, one_image, capsys):
    assert program.main(["resume", str(best_dir), "predict", str(one_image), "no_cuda", "1"]) == 0
    capsys.readouterr()
    assert program.with_checkpoint_flag(["a", "predict", "b"]) == ["--resume", "a", "predict", "b"]


def test_every_input_has_a_folder_of_its_own(best_dir, one_image, tmp_path, capsys):
    other = tmp_path / "more" / "one.npy"
    other.parent.mkdir()
    np.save(other, np.load(one_image) * 2)
    (best_dir / "predict_one.npy_2").mkdir()
    (best_dir / "predict_one.npy_2" / "mine.txt").write_text("of the user")
    places = []
    for path in (one_image, other, one_image, other):
        results = succeed("--resume", best_dir, "--predict", path, capsys=capsys)
        folder = Path(results["results_dir"])
        assert sorted(os.listdir(folder)) == ["logits.npz", "predictions.csv", "predictions.json"]
        assert json.loads((folder / "predictions.json").read_text()) == results
        assert results["input"] == str(path)
        places.append(folder.name)
    assert places == ["predict_one.npy", "predict_one.npy_3"] * 2
    assert os.listdir(best_dir / "predict_one.npy_2") == ["mine.txt"]
    assert not (best_dir / "eval").exists()


def test_names_for_classes_that_an_evaluation_does_not_take_cost_a_line(best_dir, one_image, tmp_path, capsys):
    names = tmp_path / "names.txt"
    names.write_text("0 zero\n")
    code, _, err = run("--resume", best_dir, "--predict", one_image, "--class_map", names, capsys=capsys)
    assert code == 0
    assert [line for line in err.splitlines() if "class_map" in line] == [
        f"--class_map {names} is for training, and has no effect here: classes are named as the checkpoint names them."
    ]


def test_a_folder_that_cannot_be_looked_into_is_left_to_whom_it_belongs(tmp_path, monkeypatch):
    """As of another user's; whoever runs this as root would be let in."""

    def refused(folder: Path) -> Any:
        raise PermissionError(13, "Permission denied", str(folder))

    folder = tmp_path / "predict_photos"
    folder.mkdir()
    assert session._may_hold(folder, tmp_path / "photos")
    monkeypatch.setattr(Path, "iterdir", refused)
    assert not session._may_hold(folder, tmp_path / "photos")


@pytest.mark.parametrize("after_softmax", [0, 1])
def test_reported_rule(after_softmax, run_dir, one_image, tmp_path, capsys):
    flags = ("--is_ensembled_after_softmax", after_softmax, "--is_max_ensemble", 1, "--model_dir", tmp_path)
    results = succeed("--resume", run_dir / "checkpoint_1.pth.tar", "--predict", one_image, *flags, capsys=capsys)
    assert results["rule"] == ("max_softmax" if after_softmax else "max_logits")
    arrays = np.load(tmp_path / "predict_one.npy" / "logits.npz")
    logits_SNK = torch.from_numpy(arrays["logits"])
    expected_NK = (logits_SNK.log_softmax(-1) if after_softmax else logits_SNK).amax(0)
    np.testing.assert_allclose(arrays["ensemble"], expected_NK, rtol=1e-6)


def test_moving_average_is_said(run_dir, one_image, tmp_path, capsys):
    content = torch.load(run_dir / "checkpoint_1.pth.tar", weights_only=True)
    content["ema"] = published_keys(build_splitnet(REQUEST, seed=5).state_dict())
    save_checkpoint(content, tmp_path / "both.pth.tar")
    logits = {}
    for weights, taken in (("auto", "ema"), ("ema", "ema"), ("raw", "raw")):
        command = ("--resume", tmp_path / "both.pth.tar", "--weights", weights, "--predict", one_image)
        assert succeed(*command, capsys=capsys)["weights"] == taken
        logits[weights] = np.load(tmp_path / "predict_one.npy" / "logits.npz")["logits"]
    assert (logits["auto"] == logits["ema"]).all()
    assert (logits["auto"] != logits["raw"]).any()


@pytest.mark.slow
def test_torchrun_agrees_with_one_process(run_dir, tmp_path, capsys):
    resume = ("--resume", run_dir / "checkpoint_1.pth.tar")
    alone = succeed(*resume, "--model_dir", tmp_path / "one", capsys=capsys)
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    done = command_line(*resume, "--model_dir", tmp_path / "two", launcher=torchrun)
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout.splitlines()[-1])
    for name in ("acc1", "ensemble_acc1", "images", "disagreement", "per_class_acc"):
        assert results[name] == alone[name]
    one, two = (read_csv(tmp_path / name / "test_predictions.csv") for name in ("one", "two"))
    assert [(row["index"], row["predicted"]) for row in two] == [(row["index"], row["predicted"]) for row in one]
    assert results["ensemble_nll"] == pytest.approx(alone["ensemble_nll"], rel=1e-6)


# ---- prediction ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "flags"),
    [
        ("resnet110_s2_cifar100", ()),
        ("efficientnetb0_s2_cifar100", ("--is_efficientnet_user_crop", 1)),
    ],
)
def test_released_checkpoints_give_the_published_logits(name, flags, tmp_path, capsys):
    golden = json.loads(gzip.decompress((GOLDEN / "checkpoints" / f"{name}.json.gz").read_bytes()))
    state = {key: torch.from_numpy(fill(key, shape, golden["fill_rules"])) for key, shape, _ in golden["state"]}
    released = {"epoch": 300, "arch": golden["arch"], "state_dict": state, "best_acc1": 80.0, "optimizer": {}}
    torch.save(released, tmp_path / "released.pth.tar")
    np.save(tmp_path / "images.npy", image(golden["input_shape"], golden["input_key"]))
    command = ("--resume", tmp_path / "released.pth.tar", "--predict", tmp_path / "images.npy")
    command += ("--dataset", golden["dataset"], "--crop_size", golden["image_size"], *flags)
    for precision, tolerance, key in (("", 1e-5, "f32"), ("fp64", 1e-8, "f64")):
        chosen = ("--amp_dtype", precision) if precision else ()
        results = succeed(*command, *chosen, "--model_dir", tmp_path / "out", capsys=capsys)
        assert (results["arch"], results["split_factor"]) == (golden["arch"], golden["split_factor"])
        arrays = np.load(tmp_path / "out" / "predict_images.npy" / "logits.npz")
        scale = tolerance * golden["logits_abs_max_f64"]
        assert arrays["logits"].shape == (golden["split_factor"], len(arrays["ensemble"]), golden["num_classes"])
        assert np.abs(arrays["logits"][..., :10] - np.array(golden[f"logits_{key}"])).max() <= scale
        assert np.abs(arrays["ensemble"][..., :10] - np.array(golden[f"ensemble_{key}"])).max() <= scale
        assert arrays["ensemble"].argmax(-1).tolist() == golden["ensemble_argmax_f64"]


def write_digits(folder: Path, count: int) -> None:
    folder.mkdir()
    for i in range(count):
        pixels = DIGITS.test.images[i].permute(1, 2, 0).numpy()
        target = folder / ("sub" if i % 2 else ".") / f"{i:02d}.png"
        target.parent.mkdir(exist_ok=True)
        Image.fromarray(pixels).save(target)


@pytest.mark.slow
def test_prediction_of_a_folder_equals_evaluation(run_dir, test_logits_SNK, tmp_path, capsys):
    write_digits(tmp_path / "images", 6)
    resume = ("--resume", run_dir / "checkpoint_1.pth.tar", "--predict", tmp_path / "images")
    results = succeed(*resume, "--model_dir", tmp_path / "out", capsys=capsys)
    order = [0, 2, 4, 1, 3, 5]
    logits = np.load(tmp_path / "out" / "predict_images" / "logits.npz")["logits"]
    np.testing.assert_allclose(logits, test_logits_SNK[:, order].numpy(), rtol=1e-4, atol=1e-5)
    assert results["images"] == 6
    rows = read_csv(tmp_path / "out" / "predict_images" / "predictions.csv")
    assert [row["file"] for row in rows] == ["00.png", "02.png", "04.png", "sub/01.png", "sub/03.png", "sub/05.png"]
    probs_NK = test_logits_SNK[:, order].mean(0).softmax(-1)
    for row, probs_K, choices_S in zip(rows, probs_NK, test_logits_SNK[:, order].argmax(-1).T, strict=True):
        best = probs_K.topk(5)
        assert [int(row[f"class_{k}"]) for k in range(1, 6)] == best.indices.tolist()
        assert [row[f"name_{k}"] for k in range(1, 6)] == [DIGITS.classes[i] for i in best.indices]
        assert [float(row[f"probability_{k}"]) for k in range(1, 6)] == pytest.approx(best.values.tolist(), abs=1e-5)
        assert float(row["disagreement"]) == float(choices_S[0] != choices_S[1])
    shares = [float(row["disagreement"]) for row in rows]
    assert results["disagreement"] == pytest.approx(sum(shares) / len(shares))

    done = command_line(
        *resume, "--model_dir", tmp_path / "two", "--multiprocessing_distributed", "--nproc_per_node", 2
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["images"] == 6
    two = tmp_path / "two" / "predict_images"
    np.testing.assert_allclose(np.load(two / "logits.npz")["logits"], logits, rtol=1e-4, atol=1e-4)
    assert [row["file"] for row in read_csv(two / "predictions.csv")] == [row["file"] for row in rows]


def test_prediction_of_one_image_of_another_size(run_dir, tmp_path, capsys):
    grey = Image.fromarray(np.arange(40 * 60, dtype=np.uint8).reshape(40, 60))
    grey.save(tmp_path / "wide.png")
    expected = grey.resize((24, 16), Image.Resampling.BICUBIC).crop((4, 0, 20, 16)).convert("RGB")
    command = ("--resume", run_dir / "checkpoint_1.pth.tar", "--model_dir", tmp_path / "out")
    succeed(*command, "--predict", tmp_path / "wide.png", capsys=capsys)
    from_file = np.load(tmp_path / "out" / "predict_wide.png" / "logits.npz")["logits"]
    np.save(tmp_path / "wide.npy", normalised(torch.from_numpy(np.array(expected)).permute(2, 0, 1)[None]).numpy())
    succeed(*command, "--predict", tmp_path / "wide.npy", capsys=capsys)
    from_array = np.load(tmp_path / "out" / "predict_wide.npy" / "logits.npz")["logits"]
    np.testing.assert_allclose(from_array, from_file, rtol=1e-4, atol=1e-2)


def test_unreadable_images(run_dir, tmp_path, capsys):
    write_digits(tmp_path / "images", 3)
    (tmp_path / "images" / "01broken.png").write_bytes(b"no image")
    command = (
        "--resume",
        run_dir / "checkpoint_1.pth.tar",
        "--predict",
        tmp_path / "images",
        "--model_dir",
        tmp_path / "out",
    )
    assert "01broken.png" in refuse(*command, capsys=capsys, code=1)
    results = succeed(*command, "--on_bad_image", "skip", capsys=capsys)
    assert (results["images"], results["skipped"]) == (3, 1)
    rows = read_csv(tmp_path / "out" / "predict_images" / "predictions.csv")
    assert [row["file"] for row in rows] == ["00.png", "02.png", "sub/01.png"]
    for file in (tmp_path / "images").rglob("*.png"):
        file.write_bytes(b"")
    assert "not one image" in refuse(*command, "--on_bad_image", "skip", capsys=capsys, code=1)


def test_few_classes_and_one_network(tmp_path, capsys):
    request = BackboneRequest(arch="resnet20", num_classes=3, dataset="synthetic", crop_size=8)
    torch.save({"arch": "resnet20", "state_dict": build_splitnet(request, seed=0).state_dict()}, tmp_path / "x.pth.tar")
    command = (
        "--resume",
        tmp_path / "x.pth.tar",
        "--dataset",
        "synthetic",
        "--crop_size",
        8,
        "--model_dir",
        tmp_path / "out",
    )
    results = succeed(*command, capsys=capsys)
    assert results["disagreement"] == 0
    assert results["ensemble_acc5"] == 100
    np.save(tmp_path / "x.npy", np.zeros((2, 3, 32, 32), dtype=np.float16))
    succeed(*command, "--predict", tmp_path / "x.npy", capsys=capsys)
    rows = read_csv(tmp_path / "out" / "predict_x.npy" / "predictions.csv")
    assert [name for name in rows[0] if name.startswith("name")] == ["name_1", "name_2", "name_3"]


def test_names_that_a_method_has_for_several_backbones(one_image, tmp_path, capsys):
    """`--arch lmcl_resnet32_cifar --number_net 3` is three networks, which only the method knows."""
    request = BackboneRequest(arch="resnet32_cifar", num_classes=10, dataset="digits", crop_size=16)
    content = content_of(build_splitnet(request, seed=0, archs=["resnet32_cifar"] * 3))
    content["arch"] = "lmcl_resnet32_cifar"
    content["config"] |= {"arch": content["arch"], "split_factor": 1, "method": "l_mcl", "number_net": 3}
    save_checkpoint(content, tmp_path / "x.pth.tar")
    results = succeed("--resume", tmp_path / "x.pth.tar", "--predict", one_image, capsys=capsys)
    assert results["arch"] == "resnet32_cifar,resnet32_cifar,resnet32_cifar"
    assert np.load(tmp_path / "predict_one.npy" / "logits.npz")["logits"].shape == (3, 1, 10)


# ---- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("array", "found"),
    [
        (np.zeros((2, 3, 8, 8), dtype=np.uint8), "found uint8 [2, 3, 8, 8]"),
        (np.zeros((2, 1, 8, 8), dtype=np.float32), "found float32 [2, 1, 8, 8]"),
        (np.zeros((3, 8, 8), dtype=np.float32), "found float32 [3, 8, 8]"),
        (np.zeros((0, 3, 8, 8), dtype=np.float32), "found float32 [0, 3, 8, 8]"),
        (np.array([{"a": 1}]), "expected a .npy array"),
        (b"\x93NUMPY\x01\x00", "expected a .npy array"),
        (None, "does not exist"),
    ],
)
def test_arrays_of_another_kind(array, found, run_dir, tmp_path, capsys):
    path = tmp_path / "x.npy"
    if isinstance(array, bytes):
        path.write_bytes(array)
    elif array is not None:
        np.save(path, array, allow_pickle=True)
    line = refuse("--resume", run_dir / "checkpoint_1.pth.tar", "--predict", path, capsys=capsys)
    assert str(path) in line
    assert found in line


def test_wrong_input(run_dir, tmp_path, capsys):
    good = run_dir / "checkpoint_1.pth.tar"
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.pth.tar").write_text("no checkpoint")
    cases = {
        (): "nothing to evaluate: name a run directory or a checkpoint",
        ("--resume", tmp_path / "none.pth.tar"): "does not exist",
        ("--resume", tmp_path / "text.pth.tar"): "text.pth.tar",
        ("--resume", "auto", "--model_dir", tmp_path / "empty"): "holds no checkpoint",
        ("--resume", good, "--split_factor", 3): "--split_factor 3 contradicts",
        ("--resume", good, "--arch", "resnet32"): "--arch resnet32 contradicts",
        ("--resume", good, "--num_classes", 7): "--num_classes 7 contradicts",
        ("--resume", good, "--weights", "ema"): "no moving average",
        ("--resume", good, "--weights", "best"): "--weights",
        ("--resume", good, "--dataset", "cifar10", "--data", tmp_path / "empty"): str(tmp_path / "empty"),
        ("--resume", good, "--predict", tmp_path / "none"): "does not exist",
        ("--resume", good, "--predict", tmp_path / "empty"): "holds no image",
        ("--resume", good, "--execution", "stacked", "--is_test_on_multigpus", 1): "--execution and --is_test_on_multi",
        ("--resume", good, "--is_test_on_multigpus", 1): "--is_test_on_multigpus 1 needs a GPU",
        ("--resume", good, "--is_test_with_multistreams", 1): "--is_test_with_multistreams 1 needs a GPU",
        ("--resume", good, "--amp_dtype", "fp16"): "--amp_dtype fp16",
        ("--resume", good, "--predit", "x"): "Did you mean 'predict'?",
    }
    for arguments, expected in cases.items():
        assert expected in refuse(*arguments, capsys=capsys)


def test_data_with_other_classes(run_dir, tmp_path, capsys):
    for name in "0123456789"[:9] + "a":
        (tmp_path / "val" / name).mkdir(parents=True)
        Image.new("RGB", (16, 16)).save(tmp_path / "val" / name / "1.png")
    command = ("--resume", run_dir / "checkpoint_1.pth.tar", "--dataset", "folder", "--data", tmp_path)
    line = refuse(*command, capsys=capsys)
    assert "class 9 is 'a' in the data and '9' in the checkpoint" in line
    (tmp_path / "val" / "a").rename(tmp_path / "val" / "9")
    assert succeed(*command, "--model_dir", tmp_path / "out", capsys=capsys)["images"] == 10
    (tmp_path / "val" / "9").rename(tmp_path / "9")  # the others are evaluated
    assert succeed(*command, "--model_dir", tmp_path / "out", capsys=capsys)["images"] == 9
    with (tmp_path / "out" / "per_class.csv").open(newline="") as file:
        assert [(row["images"], row["acc1"] == "") for row in csv.DictReader(file)] == [("1", False)] * 9 + [
            ("0", True)
        ]
    for name in ("9", "x"):
        (tmp_path / "val" / name).mkdir()
        Image.new("RGB", (16, 16)).save(tmp_path / "val" / name / "1.png")
    assert "a class that the networks of --resume do not know: 'x' (1 in all)" in refuse(*command, capsys=capsys)


def test_images_that_the_networks_cannot_take(run_dir, one_image, monkeypatch, capsys):
    def too_small(self: SplitNet, images: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("kernel larger than input\nsecond line")

    monkeypatch.setattr(SplitNet, "forward", too_small)
    line = refuse("--resume", run_dir / "checkpoint_1.pth.tar", "--predict", one_image, capsys=capsys, code=1)
    assert "the networks fail on a batch 1 x 3 x 16 x 16: kernel larger than input second line" in line


def test_folders_with_val_and_test_are_chosen_on_one_and_reported_on_the_other(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, folder = tmp_path / "data", tmp_path / "run"
    generator = np.random.default_rng(0)
    for split, sizes in (("train", (9, 9, 9)), ("val", (5, 0, 4)), ("test", (3, 4, 5))):
        for name, count in zip("abc", sizes, strict=True):
            (data / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = generator.integers(0, 256, (20, 20, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(data / split / name / f"{i}.png")
    flags = ["--dataset", "folder", "--data", data, "--model_dir", folder, "--arch", "resnet20", "--split_factor", "2"]
    flags += [
        "--epochs",
        "2",
        "--batch_size",
        "9",
        "--seed",
        "1",
        "--is_autoaugment",
        "0",
        "--workers",
        "0",
        "--no_cuda",
    ]
    assert train_split.main([str(flag) for flag in flags]) == 0
    captured = capsys.readouterr()
    assert "27 training, 9 validation, 12 test images" in captured.err
    assert "best epoch chosen on the validation images" in captured.err
    assert "has no image of 1 of the 3 classes, such as b: evaluated on the others." in captured.err
    trained = json.loads(captured.out.splitlines()[-1])
    assert (trained["best_chosen_on"], trained["reported_on"]) == ("val", "test")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    seen = [(line["val"]["seen"], line["test"]["seen"]) for line in lines if line["kind"] == "eval"]
    assert seen == [(9, 12)] * 2
    last = next(line for line in reversed(lines) if line["kind"] == "eval")
    assert trained["ensemble_acc1"] == trained["last"]["ensemble_acc1"] == last["test"]["ensemble_acc1"]
    assert trained["last"]["criterion"] == last["val"]["ensemble_acc1"]

    found = {}
    for split in (None, "val", "test"):
        asked = [] if split is None else ["--split", split]
        code, out, err = run("--resume", folder / "checkpoint_2.pth.tar", *asked, capsys=capsys)
        assert code == 0, err
        found[split] = json.loads(out.splitlines()[-1])
        with (folder / "eval" / "per_class.csv").open(newline="") as file:
            rows = [(row["name"], row["images"], bool(row["acc1"])) for row in csv.DictReader(file)]
        sizes = (5, 0, 4) if split == "val" else (3, 4, 5)
        assert rows == [(name, str(size), size > 0) for name, size in zip("abc", sizes, strict=True)]
        assert f"{sum(sizes)} {'validation' if split == 'val' else 'test'} images" in out
    assert [result["split"] for result in found.values()] == ["test", "val", "test"]
    assert found[None]["ensemble_acc1"] == found["test"]["ensemble_acc1"] == last["test"]["ensemble_acc1"]
    assert found["val"]["ensemble_acc1"] == last["val"]["ensemble_acc1"]
    assert found["val"]["per_class_acc"]["b"] is None

    flags += ["--val_fraction", "0.2", "--model_dir", tmp_path / "other"]
    assert train_split.main([str(flag) for flag in flags]) == 2
    assert "--val_fraction 0.2: " in capsys.readouterr().err
    (data / "test" / "d").mkdir()
    code, _, err = run("--resume", folder / "checkpoint_2.pth.tar", capsys=capsys)
    assert (code, "do not know: 'd'" in err.splitlines()[-1]) == (2, True)


def test_a_data_set_without_validation_images_has_none_to_evaluate_on(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = run("--resume", run_dir / "checkpoint_1.pth.tar", "--split", "val", capsys=capsys)
    assert (code, "--split val: --dataset digits has test images only" in err) == (2, True)


def test_how_evaluation_resizes_files_is_that_of_the_training_run(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    content = content_of(digits_network())
    content["config"]["eval_interpolation"] = "bilinear"
    save_checkpoint(content, tmp_path / "checkpoint_1.pth.tar")
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 40, 3), dtype=np.uint8)).save(tmp_path / "i.png")
    logits = {}
    for path, *flags in (
        (tmp_path, "--eval_interpolation", "bicubic"),
        (tmp_path,),
        (run_dir,),
        (run_dir, "--eval_interpolation", "bilinear"),
    ):
        words = ("--resume", path / "checkpoint_1.pth.tar", "--predict", tmp_path / "i.png", *flags)
        assert run(*words, "--model_dir", tmp_path / "out", capsys=capsys)[0] == 0
        logits[(path == run_dir, *flags[1:])] = np.load(tmp_path / "out" / "predict_i.png" / "logits.npz")["logits"]
    assert (logits[False, "bicubic"] == logits[(True,)]).all()
    assert (logits[(False,)] == logits[True, "bilinear"]).all()
    assert (logits[(False,)] != logits[(True,)]).any()


@pytest.mark.parametrize(("trained", "said"), [("bf16", True), ("fp32", False), (None, False)])
def test_figures_in_another_precision_than_training_had_are_said_to_be(tmp_path, capsys, trained, said):
    content = content_of(digits_network()) | ({"environment": {"precision": trained}} if trained else {})
    save_checkpoint(content, tmp_path / "checkpoint_1.pth.tar")
    code, _, err = run("--resume", tmp_path / "checkpoint_1.pth.tar", capsys=capsys)
    assert code == 0, err
    line = "evaluated in fp32; training had its figures in bf16, which may differ from these in the second decimal"
    assert (line in err) == said


@pytest.mark.parametrize(("flags", "said"), [([], True), (["--no_cuda"], False)])
def test_a_gpu_that_stays_idle_is_said_to(monkeypatch, caplog, tmp_path, flags, said):
    monkeypatch.setattr(evaluation.run.launch, "unused_gpu", lambda: "This machine seems to have a GPU, but …")
    monkeypatch.setattr(evaluation.run, "set_up_text_log", lambda *_, **__: None)
    monkeypatch.setattr(evaluation.run, "settle_threads", lambda asked, *, processes: f"asked for {asked}")
    monkeypatch.setattr(evaluation.run, "open_session", lambda *_: None)
    monkeypatch.setattr(evaluation.run, "_run", lambda session: {})
    config = parse_config(["--resume", str(tmp_path), "--threads", "3", *flags], program="eval.py")
    with caplog.at_level("INFO"):
        evaluation.run.run(config)
    assert ("This machine seems to have a GPU" in caplog.text) == said
    assert "asked for 3" in caplog.messages


@needs_gpu
def test_latencies_on_a_gpu(run_dir, tmp_path, capsys):
    code = program.main(["--resume", str(run_dir / "checkpoint_1.pth.tar"), "--workers", "0", "--benchmark"])
    captured = capsys.readouterr()
    assert code == 0, captured.err
    rows = json.loads(captured.out.splitlines()[-1])["latency"]
    assert {row["strategy"] for row in rows} >= {"one network", "loop", "parallel", "stacked"}
    assert all(row["p50_ms"] > 0 for row in rows)

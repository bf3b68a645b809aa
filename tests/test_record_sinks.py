"""Sinks: what they are told, that they go on with their run, and that a run survives whatever they do."""

import json
import logging
import sys
import threading
import tomllib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import train_split
from parser_params import parse_config
from record import sinks
from record.logger import RunLog
from record.sinks import SINKS, SinkRun, open_sink
from tests.runs import ROOT, TINY
from utils import packages
from utils.errors import UserError
from utils.packages import SINK_PACKAGES


class Memory:
    """A sink that remembers, or fails, as it is asked to."""

    def __init__(self) -> None:
        self.begun: list[SinkRun] = []
        self.logged: list[tuple[str, dict[str, float], int]] = []
        self.ended: list[bool] = []
        self.known = {"run-0", "run-1"}
        self.fails: list[bool] = []

    def begin(self, run: SinkRun) -> str:
        self.begun.append(run)
        if run.run_id is not None and run.run_id not in self.known:
            raise RuntimeError("no such run")
        return run.run_id or f"run-{len(self.begun) - 1}"

    def log(self, kind: str, values: Any, index: int) -> None:
        if self.fails and self.fails.pop(0):
            raise ConnectionError("the network is\ngone")
        self.logged.append((kind, dict(values), index))

    def end(self, *, complete: bool) -> None:
        self.ended.append(complete)


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> Memory:
    found = Memory()
    monkeypatch.setitem(sinks.SINKS, "mlflow", lambda: found)
    monkeypatch.setattr(packages, "find_spec", lambda name: object())
    return found


def kept_in(folder: Path) -> Any:
    return json.loads((folder / "sinks.json").read_text())


def test_a_run_tells_its_figures_and_a_resumed_one_goes_on(
    memory: Memory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    argv = [*TINY, "--sink", "mlflow", "--model_dir", str(tmp_path / "run"), "--seed", "1", "--print_freq", "1"]
    assert train_split.main([*argv, "--max_steps", "2"]) == 0
    assert kept_in(tmp_path / "run") == {"mlflow": {"run": "run-0", "had": {}}}
    assert (memory.begun[0].name, memory.begun[0].run_id) == ("run", None)
    assert (memory.begun[0].flags["seed"], memory.begun[0].flags["max_steps"]) == (1, 2)
    steps = [(index, values) for kind, values, index in memory.logged if kind == "train"]
    assert [index for index, _ in steps] == [0, 1]
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [values["train/loss"] for _, values in steps] == [one["loss"] for one in lines if one["kind"] == "train"]
    (evaluated,) = [values for kind, values, _ in memory.logged if kind == "val"]
    assert evaluated["eval/ensemble_acc1"] == evaluated["avg_acc1"]
    assert memory.ended == [True]

    assert train_split.main([*argv, "--max_steps", "3", "--resume", "auto"]) == 0
    assert [run.run_id for run in memory.begun] == [None, "run-0"]
    assert max(index for kind, _, index in memory.logged if kind == "train") == 2
    assert memory.ended == [True, True]


def test_a_run_that_goes_back_sends_nothing_twice(memory: Memory, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    argv = [*TINY, "--sink", "mlflow", "--model_dir", str(folder), "--seed", "1", "--print_freq", "1"]
    assert train_split.main([*argv, "--max_steps", "4", "--save_steps", "2"]) == 0
    early = str(folder / "checkpoint_0_2.pth.tar")
    assert train_split.main([*argv, "--max_steps", "3", "--resume", early]) == 0
    assert train_split.main([*argv, "--max_steps", "6", "--resume", "auto"]) == 0
    assert [run.run_id for run in memory.begun] == [None, "run-0", "run-0"]
    assert [index for kind, _, index in memory.logged if kind == "train"] == [0, 1, 2, 3, 4, 5]
    assert [index for kind, _, index in memory.logged if kind == "val"] == [0]
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["kind"] == "train"] == [0, 1, 2, 3, 4, 5]


def test_what_an_earlier_version_kept_is_the_name_of_the_run(memory: Memory, tmp_path: Path) -> None:
    (tmp_path / "sinks.json").write_text('{"mlflow": "run-0"}')
    sink = open_sink("mlflow", tmp_path, {}, {"train": 3})
    assert sink is not None
    for index in (3, 4):
        sink.log("train", {"train/loss": 1.0}, index)
    sink.log("val", {"eval/loss": 1.0}, 0)
    sink.end(complete=True)
    assert memory.logged == [("train", {"train/loss": 1.0}, 4), ("val", {"eval/loss": 1.0}, 0)]
    assert kept_in(tmp_path) == {"mlflow": {"run": "run-0", "had": {"train": 3, "val": -1}}}


def test_a_run_whose_sink_always_fails_is_the_same_run(
    memory: Memory, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    memory.fails = [True] * 100
    argv = [*TINY, "--max_steps", "6", "--seed", "1", "--print_freq", "1", "--json"]
    results = []
    for more in (["--sink", "mlflow", "--model_dir", str(tmp_path / "a")], ["--model_dir", str(tmp_path / "b")]):
        assert train_split.main([*argv, *more]) == 0
        out, err = capfd.readouterr()
        results.append(json.loads(out.splitlines()[-1])["state_sha256"])
        lost = [line for line in err.splitlines() if "figures were lost" in line]
        assert len(lost) == (3 if "--sink" in more else 0)
        if lost:
            assert lost[-1] == "--sink mlflow: figures were lost; going on without it: the network is gone"
    assert results[0] == results[1]
    assert not memory.logged


def test_one_failure_costs_one_record(memory: Memory, tmp_path: Path) -> None:
    memory.fails = [False, True, True, False]
    sink = open_sink("mlflow", tmp_path, {})
    assert sink is not None
    for index in range(5):
        sink.log("train", {"train/loss": 1.0, "train/nan": float("nan")}, index)
    sink.end(complete=False)
    assert memory.logged == [("train", {"train/loss": 1.0}, index) for index in (0, 3, 4)]
    assert memory.ended == [False]


def test_a_run_that_the_sink_has_forgotten_is_begun_anew(
    memory: Memory, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "sinks.json").write_text('{"mlflow": "gone", "wandb": "other"}')
    sink = open_sink("mlflow", tmp_path, {})
    assert sink is not None
    sink.end(complete=True)
    assert [run.run_id for run in memory.begun] == ["gone", None]
    assert kept_in(tmp_path) == {"mlflow": {"run": "run-1", "had": {}}, "wandb": "other"}
    assert "--sink mlflow: beginning a new run: no such run" in caplog.text


@pytest.mark.parametrize("content", ["no json", "[1]", '{"mlflow": 7}'])
def test_a_damaged_file_of_names_is_no_name(memory: Memory, tmp_path: Path, content: str) -> None:
    (tmp_path / "sinks.json").write_text(content)
    sink = open_sink("mlflow", tmp_path, {})
    assert sink is not None
    sink.end(complete=True)
    assert memory.begun[0].run_id is None


def test_a_sink_that_cannot_begin_costs_a_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Broken(Memory):
        def begin(self, run: SinkRun) -> str:
            raise RuntimeError("no key")

    monkeypatch.setitem(sinks.SINKS, "wandb", Broken)
    assert open_sink("wandb", tmp_path, {}) is None
    assert caplog.record_tuples == [("record.sinks", logging.WARNING, "--sink wandb: going on without it: no key")]
    assert not list(tmp_path.iterdir())


def test_a_sink_that_hangs_delays_nothing(
    memory: Memory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sinks, "WAITING", 3)
    monkeypatch.setattr(sinks, "PATIENCE", 0.05)
    go_on = threading.Event()
    monkeypatch.setattr(memory, "log", lambda *_: go_on.wait(30))
    sink = open_sink("mlflow", tmp_path, {})
    assert sink is not None
    for index in range(10):
        sink.log("train", {"loss": 1.0}, index)
    sink.end(complete=True)
    go_on.set()
    assert caplog.text.count("it is too slow for all figures") == 1
    assert caplog.text.count("has not taken everything") == 1


def test_without_tensorboard_a_sink_still_gets_scalars(memory: Memory, tmp_path: Path) -> None:
    log = RunLog(tmp_path, 2, active=False)
    log.scalars("train", {"loss": 1.0}, 0)
    log.sink = open_sink("mlflow", tmp_path, {})
    assert log.sink is not None
    log.scalars("train", {"loss": 1.0, "acc1": [1.0, 2.0], "name": "x"}, 4)
    log.sink.end(complete=True)
    assert memory.logged == [("train", {"train/loss": 1.0, "train/1_acc1": 1.0, "train/2_acc1": 2.0}, 4)]
    assert [path.name for path in tmp_path.iterdir()] == ["sinks.json"]


@pytest.mark.parametrize("name", SINK_PACKAGES)
def test_a_missing_package_is_refused_with_the_line_that_installs_it(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packages, "find_spec", lambda module: None)
    with pytest.raises(UserError) as error:
        parse_config(["--dataset", "digits", "--sink", name])
    module, requirement = SINK_PACKAGES[name]
    assert str(error.value).endswith(
        f"needs the package {module}, which is not installed: pip install '{requirement}'."
    )
    with pytest.raises(UserError, match=r"'mlflw' is not one of wandb, mlflow\. Did you mean 'mlflow'"):
        parse_config(["--dataset", "digits", "--sink", "mlflw"])


def test_what_pip_installs_is_what_the_project_says() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert SINK_PACKAGES.keys() == SINKS.keys()
    for name, (_, requirement) in SINK_PACKAGES.items():
        assert extras[name] == [requirement]


# ---- the packages, as modules that remember what they were asked for -------------------------------------------------


class Calls:
    """Answers to any name with a function that remembers its call."""

    def __init__(self, log: list[Any], answers: dict[str, Any]) -> None:
        self._log, self._answers = log, answers

    def __getattr__(self, name: str) -> Any:
        def called(*args: Any, **kwargs: Any) -> Any:
            self._log.append((name, *args, kwargs))
            return self._answers.get(name)

        return called


def test_wandb_is_asked_for_the_same_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[Any] = []
    run = Calls(log, {})
    run.config = Calls(log, {})  # type: ignore[attr-defined]
    module: Any = ModuleType("wandb")
    module.Settings = lambda **settings: settings
    module.init = lambda **given: log.append(("init", given)) or run
    monkeypatch.setitem(sys.modules, "wandb", module)
    for complete in (False, True):
        sink = open_sink("wandb", tmp_path, {"lr": 0.1})
        assert sink is not None
        sink.log("train", {"train/loss": 2.0}, 7)
        sink.log("val", {"eval/ensemble_acc1": 50.0}, 3)
        sink.end(complete=complete)
    ids = [entry[1]["id"] for entry in log if entry[0] == "init"]
    assert ids[0] == ids[1] == kept_in(tmp_path)["wandb"]["run"]
    given = log[0][1]
    assert (given["resume"], given["name"], given["dir"]) == ("allow", tmp_path.name, str(tmp_path))
    assert given["settings"] == {"console": "off"}
    logged = [entry[1] for entry in log if entry[0] == "log"]
    assert logged[:2] == [{"train/loss": 2.0, "step": 7}, {"eval/ensemble_acc1": 50.0, "epoch": 3}]
    assert ("update", {"lr": 0.1}, {"allow_val_change": True}) in log
    assert [entry[1]["exit_code"] for entry in log if entry[0] == "finish"] == [1, 0]


def test_mlflow_is_asked_for_the_same_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[Any] = []
    created: Any = ModuleType("run")
    created.info = ModuleType("info")
    created.info.run_id = "abc"
    client = Calls(log, {"create_run": created, "create_experiment": "5"})
    module, entities = ModuleType("mlflow"), ModuleType("mlflow.entities")
    module.MlflowClient = lambda: client  # type: ignore[attr-defined]
    entities.Param = entities.Metric = lambda *values: values  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "mlflow", module)
    monkeypatch.setitem(sys.modules, "mlflow.entities", entities)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "photos")
    flags = {f"flag_{i}": i for i in range(150)}
    for complete in (False, True):
        sink = open_sink("mlflow", tmp_path, flags)
        assert sink is not None
        sink.log("train", {"train/acc@1": 2.0}, 7)
        sink.end(complete=complete)
    names = [entry[0] for entry in log]
    assert names.count("create_run") == 1
    assert ("create_run", "5", {"run_name": tmp_path.name}) in log
    assert ("update_run", "abc", {"status": "RUNNING"}) in log
    params = [entry[2]["params"] for entry in log if entry[0] == "log_batch" and "params" in entry[2]]
    assert [len(part) for part in params] == [100, 50]
    metrics = [entry[2]["metrics"] for entry in log if entry[0] == "log_batch" and "metrics" in entry[2]]
    assert [(part[0][0], part[0][1], part[0][3]) for part in metrics] == [("train/acc_1", 2.0, 7)] * 2
    assert [entry[2] for entry in log if entry[0] == "set_terminated"] == ["KILLED", "FINISHED"]

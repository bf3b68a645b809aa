"""script/distill.py: a run's settings as those of its student, and the table."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from model import BackboneRequest, build_splitnet
from parser_params import parse_config, resolve_config
from record.checkpoint import save_checkpoint
from record.run_folder import HPARAMS
from script.distill import main, student_settings, table
from utils.errors import UserError

TEACHER = ["--dataset", "digits", "--arch", "resnet20", "--split_factor", "4", "--seed", "5", "--epochs", "30"]


def finished_run(folder: Path, *words: str) -> Path:
    """What a run leaves that teaches: its flags, and its best checkpoint."""
    config = resolve_config(parse_config([*TEACHER, *words]), data_recipe="digits")
    folder.mkdir()
    (folder / HPARAMS).write_text(json.dumps(config.described()))
    network = build_splitnet(BackboneRequest(arch="resnet20", split_factor=4, dataset="digits", crop_size=16), seed=5)
    state = {"state_dict": network.state_dict(), "config": config.values(), "data_recipe": "digits"}
    save_checkpoint(state, folder / "model_best.pth.tar")
    return folder


def student_of(folder: Path, settings: dict[str, Any]) -> Any:
    """The configuration that the settings stand for."""
    path = folder / "distill.yaml"
    path.write_text(yaml.safe_dump({k: list(v) if isinstance(v, tuple) else v for k, v in settings.items()}))
    return resolve_config(parse_config(["--config", str(path)]), data_recipe="digits")


def test_the_student_has_the_data_recipe_and_seed_of_the_run(tmp_path: Path) -> None:
    run = finished_run(tmp_path / "run", "--lr", "0.3", "--cot_weight", "0.1", "--is_mixup", "1")
    plain = resolve_config(parse_config(["--dataset", "digits", "--arch", "resnet20"]), data_recipe="digits")
    found = student_of(tmp_path, student_settings(run, 7, "undivided"))
    assert (found.method, found.arch, found.split_factor, found.epochs) == ("kd", "resnet20", 1, 7)
    assert (found.lr, found.seed, found.is_mixup, found.method_options.kd_temperature) == (0.3, 5, True, 4.0)
    assert found.weight_decay == plain.weight_decay  # not that of one of four
    assert "test_fraction" not in found.given  # digits have a split of their own, and refuse it

    one = student_of(tmp_path, student_settings(run, None, "one"))
    taught = json.loads((run / HPARAMS).read_text())
    assert (one.split_factor, one.is_train_sep, one.epochs) == (4, True, 30)
    assert one.weight_decay == pytest.approx(taught["weight_decay"]["value"])


def test_what_is_no_run_or_no_student_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match="is no run directory"):
        student_settings(tmp_path, None, "undivided")
    assert main(["plan", str(tmp_path), str(tmp_path / "out"), "", "half"]) == 2
    assert "STUDENT half: expected undivided or one" in capsys.readouterr().err


def test_the_table_has_a_row_for_each_run(tmp_path: Path) -> None:
    entries = {}
    for label, networks, accuracy in (("teacher", 2, 91.0), ("student", 1, 90.25)):
        run, evaluation = tmp_path / label, tmp_path / f"{label}_eval"
        for folder in (run, evaluation):
            folder.mkdir()
        (run / "results.json").write_text(json.dumps({"params_total": 1234, "macs_total": 56, "seconds": 7.6}))
        rows = [{"name": "undivided", "batch_size": 1, "p50_ms": 0.1}, {"name": "x", "batch_size": 1, "p50_ms": 2.34}]
        rows += [{"name": "x", "batch_size": 1, "p50_ms": 1.234}, {"name": "x", "batch_size": 8, "p50_ms": 0.2}]
        figures = {"ensemble_acc1": accuracy, "ensemble_nll": 0.5, "ensemble_ece": 0.02, "disagreement": 0.125}
        figures |= {"split_factor": networks, "latency": rows}
        (evaluation / "results.json").write_text(json.dumps(figures))
        entries[label] = (run, evaluation)
    lines = table(entries).splitlines()
    assert lines[2] == "| teacher | 91.00 | 0.5000 | 0.0200 | 0.1250 | 1,234 | 56 | 1.23 | 8 |"
    assert lines[3] == "| student | 90.25 | 0.5000 | 0.0200 |  | 1,234 | 56 | 1.23 | 8 |"


def test_an_evaluation_killed_before_its_times_is_made_again(tmp_path: Path) -> None:
    run, log, python = tmp_path / "run", tmp_path / "log", tmp_path / "python"
    python.write_text(f'#!/bin/sh\n[ "$1" = -c ] || echo "$*" >> "{log}"\n')
    python.chmod(0o755)
    for name in ("eval_teacher", "eval_student"):
        (run / "distill" / name).mkdir(parents=True)
        (run / "distill" / name / "results.json").touch()
    (run / "distill" / "eval_teacher" / "latency.json").touch()
    command = [Path(__file__).parent.parent / "script" / "distill.sh", run]
    subprocess.run(command, env={**os.environ, "PYTHON": str(python)}, check=True, capture_output=True)
    evaluated = [line.split() for line in log.read_text().splitlines() if "--benchmark" in line]
    assert [words[words.index("--model_dir") + 1] for words in evaluated] == [str(run / "distill" / "eval_student")]

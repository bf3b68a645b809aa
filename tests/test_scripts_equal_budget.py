"""The comparison at equal budget as a script: entries become command lines whose networks cost the same."""

import csv
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from model.restore import restore_splitnet
from parser_params import parse_config
from record.checkpoint import load_checkpoint
from script.equal_budget import DEFAULT, Entry, main
from tests.test_scripts import ROOT, call
from utils.errors import UserError
from utils.macs import count_macs, count_params

COMMON = ["--", "--dataset", "digits", "--epochs", "6", "--lr", "0.1", "--lr_mode", "cos", "--"]


def planned(
    capsys: pytest.CaptureFixture[str], out: Path, methods: str, *flags: str, more: str = ""
) -> list[list[str]]:
    """The lines of a plan, by fields."""
    words = ["--methods", methods, "--arch", "resnet20", "--seeds", "1 2", "--out", str(out), *flags, *COMMON]
    assert main([*words, *more.split()]) == 0
    return [line.split("\t") for line in capsys.readouterr().out.splitlines()]


def of_kind(lines: list[list[str]], kind: str) -> list[list[str]]:
    return [fields[1:] for fields in lines if fields[0] == kind]


def refused(capsys: pytest.CaptureFixture[str], out: Path, methods: str, *flags: str, more: str = "") -> str:
    words = ["--methods", methods, "--arch", "resnet20", "--seeds", "1", "--out", str(out), *flags, *COMMON]
    assert main([*words, *more.split()]) == 2
    error = capsys.readouterr().err
    assert error.startswith("compare_methods.sh: ")
    assert error.count("\n") == 1
    return error


def test_an_entry_says_method_number_rule_and_flags() -> None:
    entry = Entry.read("mimo:3@macs+mimo_batch_repetition=2+member_loss=mean", "both")
    assert (entry.method, entry.count, entry.rule) == ("mimo", 3, "macs")
    assert entry.flags == {"mimo_batch_repetition": "2", "member_loss": "mean"}
    assert entry.text == entry.asked == "mimo:3@macs+mimo_batch_repetition=2+member_loss=mean"
    assert Entry.read("one", "params").rule == "params"
    assert Entry.read("co_training:4@both", "both").text == "co_training:4"
    for text in DEFAULT.split():
        Entry.read(text, "both")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("mimo:", "expected METHOD"),
        ("nothing:4", "'nothing' is not a known"),
        ("mimo:0", "expected 1 or more"),
        ("mimo@some", "@some is no rule"),
        ("mimo+lr=0.2", "--lr is none of the flags"),
        ("mimo+num_members=2", "--num_members is none of the flags"),
        ("kd+teacher=x", "--teacher is none of the flags"),
        ("packed:4+packed_alpha=2", "--packed_alpha says the widths"),
    ],
)
def test_what_is_no_entry_is_refused(text: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        Entry.read(text, "both")
    assert Entry.read("packed:4@asis+packed_alpha=2", "both").rule == "asis"


def test_rows_become_command_lines_with_solved_widths(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = planned(capsys, tmp_path, "independent:1 co_training:4@both packed:2@asis kd", more="--batch_size 50")
    runs = of_kind(lines, "run")
    assert [name for name, *_ in runs] == ["independent:1", "co_training:4@both", "packed:2@asis", "kd"] * 2
    words = [shlex.split(flags) for *_, flags in runs]
    assert all(one[-2:] == ["--batch_size", "50"] for one in words)
    plain, divided, packed, student = (parse_config(one) for one in words[:4])
    assert (plain.split_factor, plain.stage_widths) == (1, ())
    assert (divided.split_factor, divided.stage_widths) == (4, (8.0, 16.0, 32.0))
    assert packed.stage_widths == ()
    # one recipe for all: what a method's recipe says of training is replaced, its members add up as networks do
    assert packed.method_options.member_loss == "sum"
    assert packed.is_ensembled_after_softmax is False
    folders = [Path(folder) for _, folder, _ in runs]
    assert folders[1].name.startswith("digits_resnet20_co_training:4_")
    assert folders[1].name.endswith("_seed1")
    assert len(set(folders)) == len(folders)
    # the undivided network's run of the same seed teaches
    assert student.method_options.teacher == str(folders[0] / "checkpoint_6.pth.tar")
    assert str(folders[4] / "checkpoint_6.pth.tar") in words[7]
    shown = [text for (text,) in of_kind(lines, "plan")]
    assert shown[0] == "the budget: resnet20, 272,474 parameters, 10,203,776 MACs"
    assert "co_training:4@both: widths 8 16 32; 275,144 parameters (1.010), 10,315,008 MACs (1.011), equal" in shown[2]
    (compare,) = (shlex.split(flags) for (flags,) in of_kind(lines, "compare"))
    assert compare[compare.index("--reference") + 1] == "272474,10203776"
    assert compare[-8:] == [str(folder) for folder in folders]
    assert len(of_kind(lines, "time")) == 4


def test_snapshots_keep_their_cycles_and_a_teacher_is_made_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = of_kind(planned(capsys, tmp_path, "kd snapshot:2"), "run")
    assert [name for name, *_ in runs] == ["independent:1", "kd", "snapshot:2"] * 2
    words = shlex.split(runs[2][2])
    assert "--lr_mode" not in words
    config = parse_config(words)
    assert (config.method_options.num_members, len(config.stage_widths)) == (2, 3)


def test_equal_training_scales_the_epochs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = planned(capsys, tmp_path, "independent:1 mimo snapshot:2", "--equal_training", "macs")
    epochs = [parse_config(shlex.split(flags)).epochs for *_, flags in of_kind(lines, "run")[:3]]
    # four rows of a slightly narrower network for an image, and one of two halves
    assert epochs == [6, 2, 12]
    assert "--equal_training macs" in of_kind(lines, "compare")[0][0]


def test_finished_runs_of_the_same_settings_are_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = of_kind(planned(capsys, tmp_path, "independent:1 independent:2"), "run")
    known = tmp_path / Path(first[1][1]).name.replace("independent:2", "independent:2@params")
    known.mkdir()
    (known / "results.json").write_text("{}")
    again = of_kind(planned(capsys, tmp_path, "one independent:2"), "run")
    assert again[1][1] == str(known)
    other = of_kind(planned(capsys, tmp_path, "one independent:2@macs", more="--batch_size 50"), "run")
    assert other[1][1] != again[1][1]


def test_what_all_rows_share_is_refused_in_a_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "makes the same runs" in refused(capsys, tmp_path, "independent:2 independent:2@both")
    assert "--seed cannot go" in refused(capsys, tmp_path, "independent:1", more="--seed 4")
    assert "--split_factor" in refused(capsys, tmp_path, "independent:1", more="--split_factor 4")
    assert "--methods" in refused(capsys, tmp_path, " ")


def test_a_dry_run_prints_commands_and_widths(tmp_path: Path) -> None:
    done = call(
        *("compare_methods.sh", "--budget", "equal", "--methods", "independent:1 co_training:4", "--seeds", "3"),
        *("--out", str(tmp_path / "a b"), "--latency", "0", "--gpus", "cpu", "--", "--batch_size", "50"),
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line[:2] for line in lines] == ["# "] * 3 + [sys.executable[:2]] * 3
    words = shlex.split(lines[4])
    assert words[1:3] == [f"{ROOT}/train_split.py", "--no_cuda"]
    assert words.count("--batch_size") == 1
    assert parse_config(words[2:]).stage_widths == (8.0, 16.0, 32.0)
    compare = shlex.split(lines[5])
    assert compare[1:5] == ["-m", "utils.compare", "--budget", "equal"]
    assert all(Path(folder).parent == tmp_path / "a b" for folder in compare[-2:])
    wrong = call("compare_methods.sh", "--budget", "equal", "--methods", "mimo@some")
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert wrong.stderr.count("\n") == 1


@pytest.mark.long
def test_a_comparison_from_end_to_end(tmp_path: Path) -> None:
    """Four entries and three seeds on digits; every equal row is within 2 % by a count of what was saved."""
    environment = os.environ | {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    command = [ROOT / "script" / "compare_methods.sh", "--budget", "equal", "--seeds", "1 2 3", "--epochs", "2"]
    command += ["--methods", "independent:1 co_training:4 mimo kd", "--latency", "0", "--gpus", "cpu"]
    command += ["--out", tmp_path, "--", "--val_fraction", "0.8", "--batch_size", "64", "--workers", "0"]
    subprocess.run(command, env=environment, check=True, capture_output=True)
    rows = [*csv.DictReader((tmp_path / "compare.csv").read_text().splitlines())]
    assert [row["method"] for row in rows] == ["independent:1", "co_training:4", "mimo", "kd"]
    assert all(row["seeds"] == "1 2 3" for row in rows)
    assert all(row["equal"] == "1" for row in rows)
    budget = None
    for folder in sorted(tmp_path.glob("digits_*_seed1"), key=lambda path: "independent" not in path.name):
        network, info = restore_splitnet(load_checkpoint(folder / "checkpoint_2.pth.tar"), source=str(folder))
        sizes = count_params(network), count_macs(network, (3, info.crop_size, info.crop_size))
        budget = budget or sizes
        assert all(abs(size / whole - 1) <= 0.02 for size, whole in zip(sizes, budget, strict=True)), folder
        results = json.loads((folder / "results.json").read_text())
        assert sizes == (results["params_total"], results["macs_total"])
    assert (tmp_path / "compare.png").is_file()
    again = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    assert again.stderr.count("finished already") == 12

"""script/claim.sh: which runs it starts, which it keeps, and what its table says."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from record.paired import PairedDifference
from script import small_images
from script.claim_table import main, spread
from tests.stub_python import StubPython

ROOT = Path(__file__).parent.parent
# Stands for Python: notes its arguments, and leaves what the real programs would leave.
STUB = """#!{python}
import json, os, pathlib, sys
words = sys.argv[1:]
if words[0] == "-c":  # whether there is a torch
    sys.exit(0)
if words[1] == "script.small_images":
    os.execv(sys.executable, [sys.executable, *words])
with open({log!r}, "a") as file:
    file.write(json.dumps(words) + "\\n")
if words[0].endswith("train_split.py"):
    folder = pathlib.Path(words[words.index("--model_dir") + 1])
    (folder / "results.json").write_text("{{}}")
elif words[0].endswith("eval.py"):
    folder = pathlib.Path(words[words.index("--resume") + 1]).parent / "eval"
    folder.mkdir()
    (folder / "results.json").write_text("{{}}")
"""


@pytest.fixture
def claim(tmp_path):
    """Runs the script with the stub; returns the commands it started and the finished process."""
    for label in "ab":
        for split, count in (("train", 5), ("test", 1)):
            folder = tmp_path / "data" / split / label
            folder.mkdir(parents=True)
            for i in range(count):
                (folder / f"{i}.jpg").touch()

    names = ("DATA", "EPOCHS", "SEEDS", "DATASET", "ARCH", "SPLIT_FACTORS", "IMAGES", "OUT", "JOBS", "RUNS", "SIDE")
    return StubPython.write("claim.sh", tmp_path, names, STUB)


def test_every_s_and_seed_is_trained_evaluated_and_tabled_once(claim, tmp_path):
    commands, done = claim("data", "3", "7,8", "--split_factors", "1,2", "--out", "runs", "--", "--is_mixup", "0")
    assert done.returncode == 0, done.stderr
    trained = [words for words in commands if words[0].endswith("train_split.py")]
    assert [(words[words.index("--seed") + 1], words[words.index("--split_factor") + 1]) for words in trained] == [
        ("7", "1"),
        ("7", "2"),
        ("8", "1"),
        ("8", "2"),
    ]
    assert trained[0][-2:] == ["--is_mixup", "0"]
    assert "--resume auto" in " ".join(trained[0])
    evaluated = [words for words in commands if words[0].endswith("eval.py")]
    assert evaluated[0][1:] == ["--resume", f"{tmp_path}/runs/S1-seed7/checkpoint_3.pth.tar"]
    folders = [f"{tmp_path}/runs/S{s}-seed{seed}" for seed in (7, 8) for s in (1, 2)]
    assert commands[-1] == ["-m", "script.claim_table", f"{tmp_path}/runs", *folders]

    again, done = claim("data", "3", "7,8,9", "--split_factors", "1,2", "--out", "runs")
    assert done.returncode == 0, done.stderr
    seeds = [words[words.index("--seed") + 1] for words in again if "--seed" in words]
    assert seeds == ["9", "9"]


def test_runs_of_another_machine_are_in_the_table_and_not_run(claim, tmp_path):
    rows = tmp_path / "elsewhere.csv"
    rows.write_text("split_factor,method,arch,seed,steps\n1,co_training,resnet20,7,3\n2,independent,resnet20,7,3\n")
    flags = ("data", "3", "7", "--split_factors", "1,2,independent:2", "--out", "runs")
    commands, done = claim(*flags, "--runs", "elsewhere.csv")
    assert done.returncode == 0, done.stderr
    assert [words[words.index("--method") + 1] for words in commands if "--method" in words] == ["co_training"]
    runs = ["1,co_training,resnet20,7", f"{tmp_path}/runs/S2-seed7", "2,independent,resnet20,7"]
    assert commands[-1] == ["-m", "script.claim_table", f"{tmp_path}/runs", str(rows), *runs]
    commands, done = claim(*flags, "--runs", "nowhere.csv")
    assert (commands, done.returncode) == ([], 2)
    assert done.stderr == "claim.sh: --runs nowhere.csv: there is no such file.\n"


def test_a_part_of_the_images_is_the_same_number_of_each_class(claim, tmp_path):
    commands, done = claim("data", "--images", "4", "--seeds", "1", "--split_factors", "1", "--out", "runs")
    assert done.returncode == 0, done.stderr
    data = Path(commands[0][commands[0].index("--data") + 1])
    assert sorted(str(path.relative_to(data)) for path in data.glob("train/*/*")) == [
        "train/a/0.jpg",
        "train/a/1.jpg",
        "train/b/0.jpg",
        "train/b/1.jpg",
    ]
    assert (data / "train" / "a" / "0.jpg").is_file()
    assert len(list((data / "test").glob("*/*"))) == 2


def test_a_side_makes_box_filtered_copies(tmp_path):
    for split in ("train", "test"):
        for label in "ab":
            folder = tmp_path / "data" / split / label
            folder.mkdir(parents=True)
            for i in range(3):
                pixels = np.random.default_rng(i).integers(0, 256, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.png")
    small_images.take(tmp_path / "data", tmp_path / "small", train=4, test=0, side=16)
    assert {split: len(list((tmp_path / "small" / split).glob("*/*"))) for split in ("train", "test")} == {
        "train": 4,
        "test": 6,
    }
    pixels = np.asarray(Image.open(tmp_path / "small" / "train" / "a" / "0.png"))
    whole = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8).astype(float)
    mean = whole.reshape(16, 2, 16, 2, 3).mean((1, 3))
    assert np.abs(pixels - mean).max() <= 1  # rounded after each direction
    small_images.take(tmp_path / "data", tmp_path / "next", train=2, test=2, side=0, skip=4)
    names = sorted(str(path.relative_to(tmp_path / "next")) for path in (tmp_path / "next").glob("*/*/*"))
    assert names == ["test/a/0.png", "test/b/0.png", "train/a/2.png", "train/b/2.png"]
    arguments = [str(tmp_path / "data"), str(tmp_path / "other"), "--train", "4", "--skip", "4"]
    assert small_images.main(arguments) == 2
    assert not (tmp_path / "other").exists()


def test_digits_have_defaults_and_need_no_data(claim):
    commands, done = claim("--dataset", "digits", "--seeds", "1,2", "--split_factors", "1,independent:4,resnet32:2")
    assert done.returncode == 0, done.stderr
    trained = [words for words in commands if words[0].endswith("train_split.py")]
    lines = sorted(" ".join(words) for words in trained)
    assert len(lines) == 6
    assert not any("--data " in line for line in lines)
    assert all("--epochs 80 --eval_per_epoch 80" in line and "--val_fraction 0.8" in line for line in lines)
    assert sum("--arch resnet32 --method co_training --split_factor 2" in line for line in lines) == 2
    assert sum("--arch resnet20 --method independent --split_factor 4" in line for line in lines) == 2
    folders = [Path(folder).name for folder in commands[-1][3:]]
    assert folders[:3] == ["S1-seed1", "independent-S4-seed1", "resnet32-S2-seed1"]


def test_bad_numbers_are_refused(claim):
    for arguments in (["--jobs", "0"], ["--split_factors", "1,independent:x"], ["--epochs", "two"]):
        commands, done = claim("--dataset", "digits", *arguments)
        assert done.returncode == 2
        assert not [words for words in commands if words[0].endswith("train_split.py")]
        assert len(done.stderr.splitlines()) == 1


def test_a_failed_run_ends_the_comparison(claim, tmp_path):
    (tmp_path / "runs" / "S1-seed1").mkdir(parents=True)
    (tmp_path / "runs" / "S1-seed1" / "eval").touch()  # what the evaluation cannot write into
    commands, done = claim("data", "3", "1,2", "--split_factors", "1,2", "--out", "runs")
    assert done.returncode == 2
    assert "a run failed" in done.stderr
    assert commands[-1][0] != "-m"


def test_data_is_needed(claim):
    commands, done = claim()
    assert (commands, done.returncode) == ([], 2)
    assert done.stderr == "claim.sh: which data? Give the folder: claim.sh DATA.\n"


def test_table_has_means_and_deviations_over_seeds(tmp_path, capsys):
    folders = []
    for s in (1, 2):
        for seed in (1, 2):
            folder = tmp_path / f"S{s}-seed{seed}"
            (folder / "eval").mkdir(parents=True)
            training = {"split_factor": s, "params_one": 1000 // s, "macs_total": 4_000_000, "seconds": 60.0 * seed}
            training |= {"seed": seed, "method": "co_training", "arch": "resnet20", "params_total": 1000 + 20 * s}
            training |= {"steps": 80}
            networks = [{"acc1": 50.0 + seed + i, "nll": 1.0, "ece": 0.5} for i in range(s)]
            evaluation = {
                "ensemble_acc1": 60.0 + seed * s,
                "ensemble_nll": 0.5,
                "ensemble_ece": 0.25,
                "networks": networks,
            }
            (folder / "results.json").write_text(json.dumps(training))
            (folder / "eval" / "results.json").write_text(json.dumps(evaluation | {"disagreement": 0.125}))
            folders.append(str(folder))
    assert main([str(tmp_path), *folders]) == 0
    text = capsys.readouterr().out
    # single networks of S = 2: 51.5 and 52.5
    assert (
        "| 2 | its single networks | 52.00 ± 0.71 | 1.000 ± 0.000 | 0.5000 ± 0.0000 |  | 500 | 2.0 M |  | 2 |" in text
    )
    figures = "63.00 ± 1.41 | 0.500 ± 0.000 | 0.2500 ± 0.0000 | 12.5 ± 0.0"
    assert f"| 2 | ensemble of 2 | {figures} | 1,000 | 4.0 M | 1.5 ± 0.7 | 2 |" in text
    assert "| 1 | undivided | 61.50 ± 0.71 |" in text
    # differences of 1 and 2 points: a mean of 1.5, and an interval of 12.706 * 0.7071 / sqrt(2) to both sides
    assert "| minus undivided | top-1, points | NLL | ECE | parameters | MACs | pairs | |" in text
    assert "| ensemble of 2 | +1.50 [-4.85, +7.85] | +0.000 [+0.000, +0.000] |" in text
    assert "| +2.0 % | +0.0 % | 2 | no difference seen |" in text
    assert (tmp_path / "claim.md").read_text() == text.split("\n\nPicture")[0] + "\n"
    assert (tmp_path / "claim.png").stat().st_size > 10_000
    assert spread([2.0], 1) == "2.0"

    rows = tmp_path / "claim.csv"  # what another table goes on with
    (tmp_path / "again").mkdir()
    keys = ["1,co_training,resnet20,1", *folders[1:3], "2,co_training,resnet20,2"]
    assert main([str(tmp_path / "again"), str(rows), *keys]) == 0
    for name in ("claim.md", "claim.csv"):
        assert (tmp_path / "again" / name).read_text() == (tmp_path / name).read_text()
    assert rows.read_text().splitlines()[1].startswith("1,co_training,resnet20,1,")
    for damaged, complaint in (
        (rows.read_text().replace(",80,", ",81,", 1), "a run of 80 steps (1,co_training,resnet20,2) beside one of 81"),
        (rows.read_text().replace(",80,", ",many,", 1), "expected a claim.csv"),
        ("S,seed\n1,2\n", "expected a claim.csv"),
    ):
        rows.write_text(damaged)
        assert main([str(tmp_path / "again"), str(rows), keys[0], folders[1]]) == 2
        line = capsys.readouterr().err
        assert complaint in line
        assert line.count("\n") == 1


def test_paired_differences_are_of_common_seeds():
    found = PairedDifference.of({1: 5.0, 2: 7.0, 3: 9.0, 9: 0.0}, {1: 4.0, 2: 4.0, 3: 4.0, 8: 0.0})
    assert found is not None
    assert (found.mean, found.std, found.pairs) == (3.0, 2.0, 3)
    assert found.high == pytest.approx(3.0 + 4.302652729749464 * 2.0 / 3**0.5)
    assert (found.text(2), found.is_seen) == ("+3.00 [-1.97, +7.97]", False)
    alone = PairedDifference.of({1: 5.0}, {1: 4.0})
    assert alone is not None
    assert (alone.text(1), alone.is_seen, alone.std) == ("+1.0", False, None)
    assert PairedDifference.of({1: 5.0}, {2: 4.0}) is None
    sure = PairedDifference.of({1: 5.0, 2: 5.1}, {1: 4.0, 2: 4.1})
    assert sure is not None
    assert sure.is_seen


def is_alive(pid: int) -> bool:
    """Not so what has ended and nobody has asked about."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes() != b""
    except FileNotFoundError:
        return False


def test_a_stopped_comparison_stops_what_it_has_started(tmp_path):
    """The runs get the signal too, save and end; nothing is left that writes on."""
    stub = tmp_path / "python"
    stub.write_text(
        f"#!{sys.executable}\n"
        "import os, pathlib, sys, time\n"
        'if sys.argv[1] != "-c":\n'
        f"    pathlib.Path({str(tmp_path)!r}, str(os.getpid())).with_suffix('.pid').touch()\n"
        "    time.sleep(300)\n"
    )
    stub.chmod(0o755)
    words = ["--dataset", "digits", "--seeds", "1", "--split_factors", "1,2", "--jobs", "2", "--out", "runs"]
    script = subprocess.Popen(
        [ROOT / "script" / "claim.sh", *words],
        env=os.environ | {"PYTHON": str(stub)},
        cwd=tmp_path,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )

    def until(condition) -> None:
        for _ in range(600):
            if condition():
                return
            time.sleep(0.05)
        raise AssertionError("waited for half a minute")

    until(lambda: len(list(tmp_path.glob("*.pid"))) == 2)
    started = [int(path.stem) for path in tmp_path.glob("*.pid")]
    script.terminate()
    assert script.wait(timeout=30) == 143
    until(lambda: not any(map(is_alive, started)))

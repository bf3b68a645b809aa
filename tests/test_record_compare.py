"""Finished runs side by side: grouped by all but the seed, means and spreads by hand, mistakes in one line."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from record.compare import compare_runs, csv_table
from record.runs import read_run
from tests.run_folders import write_run
from utils.compare.__main__ import main


def make_run(parent: Path, method: str, seed: int, acc1: list[float], ensemble: float, **settings: Any) -> Path:
    """What train_split.py leaves of a run, as far as it is read."""
    folder = parent / f"{method}_{seed}_{len(list(parent.iterdir()))}"
    values = {"method": method, "arch": "resnet20,resnet20", "seed": seed, "lr": 0.1, "workers": seed} | settings
    write_run(folder, values, acc1, ensemble, {"params_total": 2000, "macs_total": 4_000_000})
    (folder / "summary.csv").write_text(
        f"epoch,ensemble_nll,eval/ensemble_ece,seconds\n1,9,9,9\n2,0.5,0.0{seed},{seed}\n"
    )
    return folder


def stop_short(folder: Path, epochs: int, **last: Any) -> None:
    """Make a finished run one that has come so far, with an evaluation after every epoch."""
    (folder / "results.json").unlink()
    records = [
        {"kind": "eval", "epoch": i + 1, "test": {"acc1": [50.0 + i], "ensemble_acc1": 50.0 + i}} for i in range(epochs)
    ]
    if records:
        records[-1]["test"] |= last
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(record)}\n" for record in records) + '{"kind": "ev')


def test_rows_are_means_over_the_seeds(tmp_path: Path) -> None:
    folders = [
        make_run(tmp_path, "dml", 1, [60.0, 62.0], 64.0),
        make_run(tmp_path, "independent", 1, [50.0, 50.0], 55.0),
        make_run(tmp_path, "dml", 2, [62.0, 66.0], 68.0),
    ]
    dml, independent = compare_runs([read_run(folder) for folder in folders])
    assert (dml.label, dml.networks, dml.seeds, dml.num_networks) == ("dml, S = 2", "2 x resnet20", (1, 2), 2)
    assert dml.single_last.mean == 62.5  # of 61 and 64
    assert dml.single_last.std == pytest.approx(4.5**0.5)
    assert (dml.single_best.mean, dml.ensemble_last.mean, dml.ensemble_best.mean) == (63.5, 66.0, 68.0)
    assert dml.ensemble_last.std == pytest.approx(8**0.5)
    assert (dml.nll_last.mean, dml.ece_last.mean) == (0.5, pytest.approx(0.015))
    assert (dml.params, dml.macs, dml.seconds.mean) == (2000, 4_000_000, 101.5)
    assert independent.ensemble_last.std is None
    assert independent.ensemble_last.text(1) == "55.0"


def test_rows_of_one_method_are_told_apart_by_their_flags(tmp_path: Path) -> None:
    folders = [
        make_run(tmp_path, "dml", 1, [60.0, 62.0], 64.0),
        make_run(tmp_path, "dml", 1, [60.0, 62.0], 64.0, lr=0.2),
        make_run(tmp_path, "independent", 1, [60.0], 60.0, arch="resnet110", lr=0.3),
        make_run(tmp_path, "co_training", 1, [60.0, 61.0], 60.0, arch="resnet110"),
        make_run(tmp_path, "l_mcl", 1, [60.0, 61.0], 60.0, arch="resnet20, wrn_16_1"),
    ]
    rows = compare_runs([read_run(folder) for folder in folders])
    assert [row.label for row in rows] == [
        "dml, S = 2 (lr 0.1)",
        "dml, S = 2 (lr 0.2)",
        "independent, S = 1",
        "co_training, S = 2",
        "l_mcl, S = 2",
    ]
    assert [row.networks for row in rows[2:]] == ["resnet110", "resnet110, S = 2", "resnet20 + wrn_16_1"]


def test_table_csv_and_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [
        make_run(tmp_path, "dml", 2, [62.0, 66.0], 68.0),
        make_run(tmp_path, "dml", 1, [60.0, 62.0], 64.0),
        make_run(tmp_path, "dks", 1, [61.0], 61.0, arch="resnet20"),
    ]
    prefix = tmp_path / "new" / "table.v1"
    assert main([*map(str, runs), "--out", str(prefix)]) == 0
    text = (tmp_path / "new" / "table.v1.md").read_text()
    assert text in capsys.readouterr().out
    assert text.splitlines()[2:4] == [
        "| dml, S = 2 | 2 x resnet20 | 2 | 62.50 ± 2.12 | 63.50 ± 2.12 | 66.00 ± 2.83 | 68.00 ± 2.83 "
        "| 0.5000 ± 0.0000 | 0.0150 ± 0.0071 | 2,000 | 4,000,000 | 102 ± 1 |",
        "| dks, S = 1 | resnet20 | 1 | 61.00 | 62.00 | 61.00 | 63.00 | 0.5000 | 0.0100 | 2,000 | 4,000,000 | 101 |",
    ]
    assert "best epoch chosen on the test images" in text
    rows = [*csv.DictReader((tmp_path / "new" / "table.v1.csv").read_text().splitlines())]
    assert (rows[0]["seeds"], rows[0]["single_last_std"], rows[1]["seconds_std"]) == ("1 2", "2.1213", "")
    assert (
        csv_table(compare_runs([read_run(run) for run in runs]))
        .splitlines()[1]
        .startswith('"dml, S = 2",2 x resnet20,2,1 2')
    )
    latex = (tmp_path / "new" / "table.v1.tex").read_text()
    assert latex.startswith("\\begin{tabular}{llrrrrrrrrrr}\n\\hline\nmethod & networks & seeds")
    assert r"dml, S = 2 & 2 x resnet20 & 2 & 62.50 $\pm$ 2.12" in latex
    with Image.open(tmp_path / "new" / "table.v1.png") as picture:
        assert picture.width > picture.height


def test_a_run_that_has_not_ended_is_a_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With what it has come to: nothing, where it has not been evaluated."""
    going = make_run(tmp_path, "dks", 1, [60.0], 64.0, arch="resnet20", epochs=9)
    begun = make_run(tmp_path, "dml", 2, [60.0, 61.0], 64.0, epochs=9)
    stop_short(going, 3, ensemble_nll=0.7)
    stop_short(begun, 0)
    (begun / "summary.csv").unlink()
    runs = [going, make_run(tmp_path, "dks", 2, [60.0], 64.0, arch="resnet20", epochs=9), begun]
    assert main([*map(str, runs), "--out", str(tmp_path / "c")]) == 0
    rows = capsys.readouterr().out.splitlines()[2:5]
    assert rows == [
        "| dks, S = 1 | resnet20 | 1 | 60.00 | 61.00 | 64.00 | 66.00 | 0.5000 | 0.0200 | 2,000 | 4,000,000 | 102 |",
        "| dks, S = 1 (unfinished: 3 of 9 epochs) | resnet20 | 1 | 52.00 | 52.00 | 52.00 | 52.00 | 0.7000 | 0.0100 "
        "|  |  | 1 |",
        "| dml, S = 2 (unfinished: 0 of 9 epochs) | 2 x resnet20 | 1 |  |  |  |  |  |  |  |  |  |",
    ]
    table = [*csv.DictReader((tmp_path / "c.csv").read_text().splitlines())]
    assert [row["finished"] for row in table] == ["1", "0", "0"]


def test_without_an_evaluation_no_best_epoch_is_spoken_of(tmp_path: Path) -> None:
    begun = make_run(tmp_path, "dml", 2, [60.0, 61.0], 64.0, epochs=9)
    stop_short(begun, 0)
    assert main([str(begun), "--out", str(tmp_path / "c")]) == 0
    text = (tmp_path / "c.md").read_text()
    assert "\nTop-1 in %, mean ± standard deviation over the seeds.\n" in text


def test_what_is_no_finished_run_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = make_run(tmp_path, "dml", 1, [60.0, 62.0], 64.0)
    again = make_run(tmp_path, "dml", 1, [60.0, 62.0], 64.0)
    foreign = make_run(tmp_path, "dks", 1, [60.0], 64.0)
    (foreign / "hparams_train.json").write_text("[1]")
    summary = make_run(tmp_path, "dks", 1, [60.0], 64.0)
    (summary / "results.json").write_text('{"arch": "resnet20"}')
    for folders, message in (
        ([tmp_path / "none"], "is not a folder"),
        ([tmp_path], "is no run directory"),
        ([foreign], "is no run directory"),
        ([summary], "is not that of a training run: no acc1"),
        ([good, again], "have the same configuration and seed"),
    ):
        assert main([*map(str, folders), "--out", str(tmp_path / "c")]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert str(folders[-1]) in error
        assert error.count("\n") == 1
    assert main([str(good), "--out", str(good / "results.json" / "c")]) == 2
    assert "--out" in capsys.readouterr().err


def test_the_same_folder_twice_is_one_run(tmp_path: Path) -> None:
    good = make_run(tmp_path, "dml", 1, [60.0, 62.0], 64.0)
    (tmp_path / "link").symlink_to(good)
    for again in (good, tmp_path / "link"):
        (row,) = compare_runs([read_run(good), read_run(again)])
        assert (row.seeds, row.single_last.std) == ((1,), None)


@pytest.mark.parametrize(
    ("name", "value"),
    [("acc1", 5), ("acc1", []), ("best_acc1", [None, 1.0]), ("ensemble_acc1", None), ("seconds", "x"), ("arch", 5),
     ("seed", None), ("macs_total", True)],
)  # fmt: skip
def test_figures_that_are_none_are_one_line(
    name: str, value: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path, "dml", 1, [60.0, 62.0], 64.0)
    results = json.loads((run / "results.json").read_text())
    (run / "results.json").write_text(json.dumps(results | {name: value}))
    assert main([str(run), "--out", str(tmp_path / "c")]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"compare: {run}: results.json has {name}")
    assert error.count("\n") == 1

"""A comparison of exchanging networks with others: mistakes in one line, and figures that are there already."""

import json
from pathlib import Path

import pytest

from script.compare_exchange import FIGURES, main


@pytest.mark.parametrize(
    "flags", [["--seeds", "1,x"], ["--seeds", "-1"], ["--epochs", "0"], ["--images", "many"], ["--split_factor", "0"]]
)
def test_numbers_that_are_none_are_one_line(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        main([str(tmp_path), "--out", str(tmp_path / "out"), *flags])
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert flags[0] in error
    assert error.count("\n") == 1


def test_an_out_that_is_a_file_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out").touch()
    assert main([str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"compare_exchange: --out {tmp_path / 'out'}: cannot be made: ")
    assert error.count("\n") == 1


def test_runs_that_are_complete_are_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "data_2000_2000_side16").mkdir()
    for seed in (1, 2):
        folder = tmp_path / f"independent_seed{seed}"
        folder.mkdir()
        (folder / "figures.json").write_text(json.dumps(dict.fromkeys(FIGURES, 1000.0 * seed)))
    assert main(["no", "--out", str(tmp_path), "--ways", "independent", "--seeds", "1, 2"]) == 0
    row = "| independent | 1,500.00 ± 707.11 | 1,500.00 ± 707.11 | 1,500.000 ± 707.107 | 1,500.00 ± 707.11 "
    shown = capsys.readouterr().out
    assert shown.splitlines()[-1] == row + "| 1,500 ± 707 | 1,500 | 2 |"
    assert (tmp_path / "table.md").read_text() == shown

"""What processes tell each other: rows and counts of all of them, in the order of their ranks."""

from pathlib import Path
from typing import Any

import torch

from tests.processes import run_processes
from utils import distributed


def gathered(rank: int, world_size: int) -> dict[str, Any]:
    rows = torch.full((rank + 1, 2), float(rank))
    return {
        "rows": distributed.all_gather_rows(rows),
        "counts": distributed.gather_counts(rank + 1, torch.device("cpu")),
    }


def test_rows_and_counts_of_uneven_processes(tmp_path: Path) -> None:
    for result in run_processes(3, gathered, tmp_path / "r"):
        assert result["rows"][:, 0].tolist() == [0, 1, 1, 2, 2, 2]
        assert result["counts"] == [1, 2, 3]

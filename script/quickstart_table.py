"""Prints the results of several runs as one table and draws their curves into one picture: RUN_DIR ..."""

import json
import sys
from pathlib import Path
from typing import Any

from record.plots import plot_curves
from utils.text import fit_streams


def table(results: list[dict[str, Any]]) -> str:
    """Top-1 of every network and of the ensemble, sizes and time, one row per network and ensemble."""
    lines = [
        "| arch | S | network | top-1 % | parameters | MACs | training s |",
        "| --- | ---: | --- | ---: | ---: | ---: | ---: |",
    ]
    for run in results:
        count = len(run["acc1"])
        start = f"| {run['arch']} | {run['split_factor']} |"
        macs_one = run["macs_total"] // count
        if count > 1:
            for i, acc1 in enumerate(run["acc1"]):
                lines.append(f"{start} {i + 1} | {acc1:.2f} | {run['params_one']:,} | {macs_one:,} | |")
        name = "ensemble" if count > 1 else "1"
        lines.append(
            f"{start} {name} | {run['ensemble_acc1']:.2f} | {run['params_total']:,} | {run['macs_total']:,} | "
            f"{run['seconds']:.0f} |"
        )
    return "\n".join(lines)


def main(folders: list[str]) -> int:
    """The command line; returns the exit code."""
    fit_streams()
    runs = [Path(folder) for folder in folders]
    results = [json.loads((run / "results.json").read_text(encoding="utf-8")) for run in runs]
    picture = plot_curves([(run.name, run) for run in runs], runs[0].parent / "curves.png")
    print(table(results))
    print(f"\nCurves: {picture}")
    print(f"TensorBoard logs: {runs[0].parent} (script/tensorboard.sh {runs[0].parent})")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))

"""Who is where in an exchange of networks: `python -m script.exchange_status DIR`.

One row a network: what its job does, its last step and epoch, seconds since its last sign of life and since its newest
weights, the step of these, its loss and classification loss over the last interval, how many peers it learnt from, and
the share of images on which it and a peer said the same class.
"""

import argparse
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from record.exchange import JOB, RUNNING, SILENCE, ExchangeFolder, Refused
from utils.command_line import OneLineParser
from utils.errors import UserError, WriteError, reason
from utils.text import fit_streams, one_line

COLUMNS = (
    "network",
    "job",
    "step",
    "epoch",
    "seen",
    "weights",
    "of step",
    "loss",
    "loss_ce",
    "peers",
    "agreement",
    "host",
)


def row(folder: ExchangeFolder, network: int, now: float) -> list[str]:
    """A row of the table.

    Args:
        folder: of the exchange.
        network: its number.
        now: the time by the clock of the folder's file system.
    """
    try:
        job: Mapping[str, Any] = folder.job(network) or {}
    except (OSError, Refused):
        job = {}
    seen = _age(folder.place(network) / JOB, now)
    steps = folder.steps(network)
    published = folder.weights_path(network, steps[0]) if steps else None
    state = str(job.get("state", "none"))
    if state == RUNNING and seen is not None and seen > SILENCE:
        state = "silent"
    share = job.get("agreement")
    values = [
        str(network),
        state,
        _shown(job.get("step")),
        _shown(job.get("epoch")),
        _seconds(seen),
        _seconds(None if published is None else _age(published, now)),
        str(steps[0]) if steps else "-",
        _shown(job.get("loss")),
        _shown(job.get("loss_ce")),
        _shown(job.get("peers")),
        f"{100 * share:.1f} %" if isinstance(share, float) else "-",
        str(job.get("host", "-")),
    ]
    return [one_line(value)[:40] for value in values]


def _age(path: Path, now: float) -> float | None:
    try:
        return max(0.0, now - path.stat().st_mtime)
    except OSError:
        return None


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f} s"


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value) if isinstance(value, int) else "-"


def status(folder: ExchangeFolder) -> str:
    """The table.

    Raises:
        UserError: there are no networks in the folder.
    """
    try:
        numbers = folder.networks()
        try:
            now = folder.now()
        except WriteError:  # it may be looked at from where it cannot be written
            now = time.time()
        rows = [list(COLUMNS), *(row(folder, number, now) for number in numbers)]
    except OSError as error:
        raise UserError(f"{folder.folder}: cannot be read: {reason(error)}.") from None
    if not numbers:
        raise UserError(f"{folder.folder}: holds no networks: expected network_0, network_1, …")
    sizes = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(text.rjust(size) for text, size in zip(line, sizes, strict=True)) for line in rows)


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    fit_streams()
    parser = OneLineParser(
        prog="python -m script.exchange_status",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", metavar="DIR", type=Path, help="what --exchange was")
    given = parser.parse_args(argv)
    try:
        print(status(ExchangeFolder(given.folder)))
    except UserError as error:
        print(f"exchange_status: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

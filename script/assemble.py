"""The S networks of an exchange as one checkpoint for eval.py: `python -m script.assemble DIR --out FILE`.

Of every network, the newest weights in DIR that are whole are taken, whether its job has finished or not.
"""

import argparse
import logging
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from model.restore import published_keys, restore_splitnet
from record.checkpoint import FORMAT_VERSION, save_checkpoint
from record.exchange import ExchangeFolder, Refused, check_alike, check_tensors
from utils.command_line import OneLineParser
from utils.errors import RunError, UserError, reason
from utils.text import fit_streams

OF_ALL = (
    "arch",
    "widths",
    "way",
    "width_names",
    "library",
    "classes",
    "codes",
    "mean",
    "std",
    "crop_size",
    "data_recipe",
    "preprocessing",
)

logger = logging.getLogger("assemble")


def newest_weights(folder: ExchangeFolder, network: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Facts and weights of a network, of the newest step that is whole; damaged ones are named in a warning.

    Raises:
        UserError: there are none.
    """
    try:
        for step in folder.steps(network):
            try:
                facts = folder.facts(network, step)
                return facts, folder.weights(facts)
            except (OSError, Refused) as error:
                logger.warning("%s Falling back to the one before it.", error)
    except OSError as error:
        raise UserError(f"{folder.place(network)}: cannot be read: {reason(error)}.") from None
    raise UserError(f"{folder.folder}: holds no weights of network {network} that can be read.")


def assemble(folder: ExchangeFolder, arch: str | None = None) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The checkpoint of all networks, and the facts of each.

    Args:
        folder: of the exchange.
        arch: what the user says the networks are; needed where that is a program, FILE.py:FACTORY.

    Raises:
        UserError: a network is missing, or they are no networks of one division.
    """
    try:
        numbers = folder.networks()
    except OSError as error:
        raise UserError(f"{folder.folder}: is no folder of an exchange: {reason(error)}.") from None
    if not numbers:
        raise UserError(f"{folder.folder}: holds no networks: expected network_0, network_1, …")
    first, expected = newest_weights(folder, numbers[0])
    found = {numbers[0]: (first, expected)}
    for number in range(first["split_factor"]):
        if number not in found:
            found[number] = newest_weights(folder, number)
        facts, state = found[number]
        path = folder.weights_path(number, facts["step"])
        try:
            check_alike(facts, first, path)
            check_tensors(state, expected, path)
        except Refused as error:
            raise UserError(str(error)) from None
    parts = [found[number] for number in sorted(found)]
    weights = {f"models.{i}.{name}": value for i, (_, state) in enumerate(parts) for name, value in state.items()}
    content: dict[str, Any] = {
        "epoch": min(facts["epoch"] for facts, _ in parts),
        "form": None,
        "state_dict": published_keys(weights),
        "config": {**first["config"], "network": None},
        "format_version": FORMAT_VERSION,
        **{name: first[name] for name in OF_ALL if name in first},
    }
    restore_splitnet(content, arch=arch, source=str(folder.folder))  # what eval.py will do
    return content, [facts for facts, _ in parts]


def write(content: Mapping[str, Any], target: Path) -> None:
    """Write the checkpoint, as `save_checkpoint` does, into a folder that is made if it is not there.

    Raises:
        RunError: it cannot be written.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"{target}: cannot be written: {reason(error)}.") from None
    save_checkpoint(content, target)


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    fit_streams()
    logging.basicConfig(format="%(message)s")
    parser = OneLineParser(
        prog="python -m script.assemble",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", metavar="DIR", type=Path, help="what --exchange was")
    parser.add_argument("--out", metavar="FILE", type=Path, required=True, help="*.safetensors, or any other name")
    parser.add_argument("--arch", help="the networks, where they come from a program: FILE.py:FACTORY")
    given = parser.parse_args(argv)
    try:
        content, networks = assemble(ExchangeFolder(given.folder), given.arch)
        write(content, given.out)
    except (UserError, RunError) as error:
        print(f"assemble: {error}", file=sys.stderr)
        return error.exit_code
    steps = ", ".join(f"{facts['step']}{'' if facts['finished'] else ' (not finished)'}" for facts in networks)
    print(f"{given.out}: {len(networks)} x {content['arch']}, of steps {steps}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

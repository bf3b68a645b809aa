"""How well shared weights of a Cream search rank paths: `python -m benchmarks.cream_rank --config FILE --out DIR`.

Runs the search of --config, draws paths from the seed, takes each path's test accuracy with the shared weights, trains
each alone from scratch, and writes cream_rank.json and cream_rank.md with Kendall's tau between the two accuracies.
With --like_found X the found network comes first, beside paths whose MACs differ from its own by X at most. Flags after
`--` go to train_split.py, for every run. A run that ended is not repeated and one that was stopped goes on.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import yaml

from evaluation.passes import evaluate
from evaluation.session import Session, open_session, open_test_split
from method.cream.board import PathSampler
from model.search.space import Arch
from model.search.supernet import Supernet
from parser_params import parse_config
from record.checkpoint import write_file
from utils.command_line import OneLineParser
from utils.errors import RunError, UserError
from utils.launch import join
from utils.seed import STREAM_METHOD, fold_in
from utils.text import fit_streams

ROOT = Path(__file__).resolve().parent.parent
TRIES = 20_000  # draws before a search space is said to hold too few paths


def kendall_tau(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Kendall's tau-b of two rankings of the same things, in [-1, 1]; None where one of them has ties only."""
    signs = [
        (_sign(a - b), _sign(c - d)) for (a, c), (b, d) in combinations(zip(first, second, strict=True), 2)
    ]  # of every pair
    untied = sum(x != 0 for x, _ in signs) * sum(y != 0 for _, y in signs)
    return sum(x * y for x, y in signs) / untied**0.5 if untied else None


def _sign(value: float) -> int:
    return (value > 0) - (value < 0)


def draw_paths(supernet: Supernet, count: int, seed: int, *, found: Arch | None, tolerance: float) -> list[Arch]:
    """`count` different paths, each equally likely; with `found`, those of about its MACs, behind it.

    Raises:
        UserError: the search space does not hold so many.
    """
    sampler = PathSampler(supernet.depths, len(supernet.space.operators), fold_in(seed, STREAM_METHOD))
    paths: list[Arch] = [] if found is None else [found]
    wanted = None if found is None else path_macs(supernet, found)
    for _ in range(TRIES):
        if len(paths) == count + (found is not None):
            return paths
        path = sampler.draw()
        if path not in paths and (wanted is None or abs(path_macs(supernet, path) - wanted) <= tolerance * wanted):
            paths.append(path)
    raise UserError(f"--paths {count}: the search space holds fewer of these paths.")


def path_macs(supernet: Supernet, path: Arch) -> int:
    """Multiply-adds of a path as a network of its own, at the search space's resolution."""
    space = supernet.space
    return space.plan(path, supernet.classifier.out_features, honour_single_block=True).cost(space.resolution).macs


def open_supernet(run: Path) -> tuple[Session, Supernet]:
    """The newest weights of a search, on the CPU."""
    session = open_session(parse_config(["--resume", "auto", "--model_dir", str(run), "--no_cuda"]), join([]), [])
    supernet = session.network.get_submodule("models.0")
    assert isinstance(supernet, Supernet)
    return session, supernet


def shared_accuracies(session: Session, supernet: Supernet, paths: Sequence[Arch]) -> list[float]:
    """Top-1 in percent of every path on the test split, with the shared weights."""
    source, info = open_test_split(session), session.info
    accuracies = []
    for path in paths:
        supernet.default_path = path
        figures = evaluate(
            session.network,
            session.loader(source.test, info.data_recipe or source.recipe),
            prepare=session.prepare(info.mean or source.mean, info.std or source.std),
            num_networks=1,
            num_classes=info.num_classes,
            rule=session.rule,
            device=session.world.device,
            autocast_dtype=None,
        ).figures
        accuracies.append(float(figures["ensemble_acc1"]))
    return accuracies


def train(flags: Sequence[str]) -> dict[str, Any]:
    """Run train_split.py, or go on with it; returns its results.

    Raises:
        RunError: it failed.
    """
    command = [sys.executable, "train_split.py", *flags, "--resume", "auto"]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise RunError(f"train_split.py ended with {done.returncode}; its last lines above say why.")
    results: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return results


def table(rows: Sequence[Mapping[str, Any]], tau: float | None) -> str:
    """The rows as Markdown, best stand-alone accuracy first."""
    lines = ["| path | MACs | shared weights, top-1 % | trained alone, top-1 % |", "|---|---:|---:|---:|"]
    for row in sorted(rows, key=lambda row: -row["alone_acc1"]):
        name = json.dumps(row["arch"]) + (" (found)" if row["found"] else "")
        lines.append(f"| {name} | {row['macs'] / 1e6:.3f} M | {row['shared_acc1']:.2f} | {row['alone_acc1']:.2f} |")
    shown = "undefined" if tau is None else f"{tau:.3f}"
    return "\n".join([*lines, "", f"Kendall's tau-b over {len(rows)} paths: {shown}.", ""])


def compare(options: argparse.Namespace, flags: Sequence[str]) -> dict[str, Any]:
    """Search, draw, evaluate, train alone, write; returns what cream_rank.json holds.

    Raises:
        UserError, RunError: as the runs, `draw_paths`.
    """
    out, seed = Path(options.out).resolve(), options.seed
    run = out / "search"
    train(["--config", options.config, "--seed", str(seed), "--model_dir", str(run), *flags])
    found, tolerance = None, 0.0
    if options.like_found is not None:
        if not (run / "found.yaml").exists():
            raise RunError(f"{run}: the search found nothing that paths could be like.")
        tolerance = options.like_found
        found = json.loads(yaml.safe_load((run / "found.yaml").read_text(encoding="utf-8"))["arch_list"])
    session, supernet = open_supernet(run)
    paths = draw_paths(supernet, options.paths, seed, found=found, tolerance=tolerance)
    shared = shared_accuracies(session, supernet, paths)
    trained = json.loads((run / "hparams_train.json").read_text(encoding="utf-8"))
    common = [f"--{name}={trained[name]['value']}" for name in ("dataset", "data", "crop_size")]
    common += ["--arch", "cream", "--honour_single_block", "1", "--epochs", str(options.epochs), "--seed", str(seed)]
    if trained["search_space"]["value"]:
        common += ["--search_space", trained["search_space"]["value"]]
    rows = []
    for path, accuracy in zip(paths, shared, strict=True):
        name = "-".join("".join(map(str, stage)) for stage in path[1:-1])
        alone = train([*common, "--arch_list", json.dumps(path), "--model_dir", str(out / name), *flags])
        row = {"arch": path, "found": path == found, "macs": path_macs(supernet, path), "shared_acc1": accuracy}
        rows.append({**row, "alone_acc1": alone["ensemble_acc1"], "steps": alone["steps"]})
    tau = kendall_tau(shared, [row["alone_acc1"] for row in rows])
    result = {"config": options.config, "seed": seed, "epochs": options.epochs, "tau": tau, "paths": rows}
    write_file(out / "cream_rank.json", json.dumps(result, indent=1) + "\n")
    write_file(out / "cream_rank.md", table(rows, tau))
    return result


def main(argv: list[str] | None = None) -> int:
    """The command line; the exit code is 2 for the user's mistake and 1 for a failed run."""
    fit_streams()
    arguments = sys.argv[1:] if argv is None else argv
    own = arguments[: arguments.index("--")] if "--" in arguments else arguments
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="YAML file of a search", metavar="FILE")
    parser.add_argument("--out", required=True, help="where runs and results go", metavar="DIR")
    parser.add_argument("--paths", type=int, default=8, help="how many are drawn [default: 8]")
    parser.add_argument("--epochs", type=int, default=30, help="length of training a path alone [default: 30]")
    parser.add_argument("--seed", type=int, default=1, help="of the draw and of all runs [default: 1]")
    parser.add_argument("--like_found", type=float, help="part by which MACs may differ from the found network's")
    options = parser.parse_args(own)
    try:
        result = compare(options, arguments[len(own) + 1 :])
    except (UserError, RunError) as error:
        print(f"cream_rank: {error}", file=sys.stderr)
        return error.exit_code
    print(table(result["paths"], result["tau"]), end="")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

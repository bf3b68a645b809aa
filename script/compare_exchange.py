"""S networks trained four ways, several seeds each, in one table: `python -m script.compare_exchange DATA --out DIR`.

independent and co_training are one job of S networks; exchange_N is S jobs of one network each, side by side, that
exchange weights every N steps. DATA is a folder of images with train/ and test/; a part of it, of smaller images, is
made once. Runs that are complete are kept and a killed one goes on, so the same command can be given again; while jobs
of a killed comparison are still at work it is refused. Every figure is of the last epoch, on the test images;
DIR/table.md has mean and standard deviation over the seeds.
"""

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from record.checkpoint import write_file
from record.exchange import ExchangeFolder
from record.run_folder import alone_in, read_results
from script import assemble
from script.small_images import take
from training.exchange import LOG
from utils.command_line import OneLineParser, at_least, several_at_least
from utils.errors import Interrupted, RunError, UserError, reason
from utils.signals import Interruption, held
from utils.text import fit_streams

ROOT = Path(__file__).resolve().parent.parent
PATIENCE = 60.0  # seconds that a stopped job has to write its checkpoint
FIGURES = ("ensemble_acc1", "single_acc1", "ensemble_nll", "disagreement", "seconds", "bytes")
TITLES = (
    "| | ensemble top-1 % | single top-1 % | ensemble NLL | disagreement % | wall time s | bytes in files | seeds |\n"
    "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |"
)


def program(name: str, *arguments: object) -> list[str]:
    """A command line of one of the project's programs."""
    return [sys.executable, str(ROOT / name), *map(str, arguments)]


def wait_for(process: subprocess.Popen[bytes]) -> int:
    """Its exit code. Waits in short turns: a signal that comes just before a long one would be seen at its end."""
    while True:
        with contextlib.suppress(subprocess.TimeoutExpired):
            return process.wait(timeout=1.0)


def refusal(folder: Path, who: str) -> str:
    """What keeps a comparison out of a folder: another one, or jobs of one, which hold it on after that is killed."""
    return (
        f"--out: another comparison, or a job of one that was killed, is at work in {folder} ({who}). Wait for its "
        "end, or end it; then give the same command again."
    )


def run_together(commands: Sequence[list[str]], folder: Path, lock: int | None = None) -> str:
    """Run command lines side by side, their output below `folder`; returns what the first wrote to stdout.

    Args:
        commands: at least one.
        folder: of their output.
        lock: descriptor that they inherit.

    Raises:
        RunError: one of them failed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    started: list[subprocess.Popen[bytes]] = []
    try:
        for number, command in enumerate(commands):
            out, err = folder / f"{number}.out", folder / f"{number}.err"
            # held: a signal while one starts would leave it out of the list of those to stop
            with out.open("w") as stdout, err.open("w") as stderr, held():
                started.append(
                    subprocess.Popen(
                        command, cwd=ROOT, stdout=stdout, stderr=stderr, pass_fds=() if lock is None else (lock,)
                    )
                )
        codes = [wait_for(process) for process in started]
    except BaseException:  # a job that went on alone would be in the way of the same command, given again
        for process in started:
            process.terminate()
        for process in started:
            try:
                process.wait(timeout=PATIENCE)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        raise
    if any(codes):
        number = next(i for i, code in enumerate(codes) if code)
        last = (folder / f"{number}.err").read_text().strip().splitlines()[-1:]
        raise RunError(f"{folder}: job {number} ended with {codes[number]}: {' '.join(last)}")
    return (folder / "0.out").read_text()


def finished(model: Path) -> dict[str, Any]:
    """The results of a training.

    Raises:
        RunError: it has not come to its end; a signal that stops a training alone makes it end as if all were well.
    """
    results = read_results(model)
    if results is None:
        raise RunError(f"{model}: its training was stopped before its end. Give the same command again.")
    return results


def train_and_evaluate(
    way: str, seed: int, folder: Path, common: Sequence[object], networks: int, lock: int | None
) -> dict[str, Any]:
    """Train S networks one way and evaluate their last weights; the figures by name.

    Args:
        way: independent, co_training or exchange_N.
        seed: of the run, or of all its jobs.
        folder: of the way and seed.
        common: flags of every run.
        networks: S.
        lock: descriptor that its jobs inherit.

    Raises:
        RunError: a training or the evaluation failed, or was stopped.
    """
    flags = [*common, "--seed", seed, "--resume", "auto"]
    volume = 0
    if way.startswith("exchange_"):
        every, shared = way.removeprefix("exchange_"), folder / "x"
        models = [folder / f"net{i}" for i in range(networks)]
        flags += ["--method", "co_training", "--exchange", shared, "--exchange_every", every]
        jobs = [program("train_split.py", *flags, "--network", i, "--model_dir", models[i]) for i in range(networks)]
        run_together(jobs, folder / "log", lock)
        results = [finished(model) for model in models]
        checkpoint = folder / "ensemble.pth.tar"
        content, facts = assemble.assemble(ExchangeFolder(shared))
        assemble.write(content, checkpoint)
        for model, of_network in zip(models, facts, strict=True):  # what it wrote and what it read
            log = model / LOG  # not there where a job has never heard of another
            taken = len(log.read_text().splitlines()) if log.exists() else 0
            written = of_network["step"] // int(every) + bool(of_network["step"] % int(every))
            volume += of_network["bytes"] * (written + taken)
    else:
        models = [folder / "joint"]
        job = program("train_split.py", *flags, "--method", way, "--model_dir", models[0])
        run_together([job], folder / "log", lock)
        results = [finished(models[0])]
        checkpoint = models[0] / f"checkpoint_{results[0]['epochs']}.pth.tar"
    data = common[list(common).index("--data") + 1]
    evaluation = program("eval.py", "--resume", checkpoint, "--data", data, "--no_cuda")
    shown = run_together([evaluation], folder / "eval", lock)
    figures = json.loads(shown.strip().splitlines()[-1])
    return {
        "ensemble_acc1": figures["ensemble_acc1"],
        "single_acc1": statistics.mean(figures["acc1"]),
        "ensemble_nll": figures["ensemble_nll"],
        "disagreement": 100 * figures["disagreement"],
        "seconds": max(of_model["seconds"] for of_model in results),
        "bytes": volume,
    }


def table(found: dict[str, list[dict[str, Any]]]) -> str:
    """The table of all ways, mean ± standard deviation over their seeds."""
    rows = [TITLES]
    for way, of_seeds in found.items():
        cells = [way]
        for name in FIGURES:
            values = [figures[name] for figures in of_seeds]
            digits = {"ensemble_nll": 3, "bytes": 0, "seconds": 0}.get(name, 2)
            spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 and name != "bytes" else ""
            cells.append(f"{statistics.mean(values):,.{digits}f}{spread}" if values else "open")
        rows.append(f"| {' | '.join([*cells, str(len(of_seeds))])} |")
    return "\n".join(rows) + "\n"


def make_out(folder: Path) -> None:
    """Make the folder of a comparison.

    Raises:
        UserError: it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {folder}: cannot be made: {reason(error)}.") from None


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    fit_streams()
    parser = OneLineParser(
        prog="python -m script.compare_exchange",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("data", metavar="DATA", type=Path)
    parser.add_argument("--out", metavar="DIR", type=Path, required=True)
    parser.add_argument("--ways", default="independent,co_training,exchange_50,exchange_400")
    parser.add_argument("--seeds", type=several_at_least(0), default="1,2,3")
    parser.add_argument("--split_factor", type=at_least(2), default=2, metavar="S")
    parser.add_argument("--arch", default="resnet20")
    parser.add_argument("--images", type=at_least(0), default=2000, help="training images; 0: all")
    parser.add_argument("--test_images", type=at_least(0), default=2000, help="0: all")
    parser.add_argument("--side", type=at_least(1), default=16, metavar="PIXELS")
    parser.add_argument("--epochs", type=at_least(1), default=16)
    parser.add_argument("--batch_size", type=at_least(1), default=32)
    given = parser.parse_args(argv)
    part = given.out / f"data_{given.images}_{given.test_images}_side{given.side}"
    common: list[object] = ["--dataset", "folder", "--data", part.resolve(), "--arch", given.arch, "--no_cuda"]
    common += ["--split_factor", given.split_factor, "--epochs", given.epochs, "--batch_size", given.batch_size]
    common += ["--crop_size", given.side, "--padding", 2, "--amp_dtype", "fp32", "--eval_per_epoch", given.epochs]
    found: dict[str, list[dict[str, Any]]] = {way: [] for way in given.ways.split(",")}
    try:
        with Interruption() as signals:
            signals.release()  # what started this may have held them
            make_out(given.out)
            flags = ("--images", "--test_images")
            take(given.data, part, train=given.images, test=given.test_images, side=given.side, flags=flags)
            for seed in given.seeds:
                for way, of_seeds in found.items():
                    folder = given.out.resolve() / f"{way}_seed{seed}"
                    done = folder / "figures.json"
                    if not done.exists():
                        make_out(folder)
                        with alone_in(folder, partial(refusal, folder)) as lock:
                            figures = train_and_evaluate(way, seed, folder, common, given.split_factor, lock)
                            write_file(done, json.dumps(figures, indent=1) + "\n")
                    of_seeds.append(json.loads(done.read_text()))
                    write_file(given.out / "table.md", table(found))
    except (UserError, RunError, Interrupted) as error:
        print(f"compare_exchange: {error}", file=sys.stderr)
        return error.exit_code
    print(table(found), end="")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

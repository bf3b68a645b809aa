"""Runs an entry point in a process of its own, without paying for the imports each time.

A server process imports everything once; each run is a fork of it, so it can be killed, damaged and measured.
"""

import contextlib
import json
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from record import checkpoint as ckpt
from utils.signals import NUMBERS, hold

ROOT = Path(__file__).parent.parent
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    ["train_split", "eval", "torch.utils.tensorboard", "matplotlib.pyplot", "sklearn.datasets"]
)

TINY = ["--dataset", "digits", "--arch", "resnet20", "--batch_size", "96", "--amp_dtype", "fp32", "--no_cuda"]


@dataclass(frozen=True)
class Finished:
    """How a run ended."""

    code: int
    stdout: str
    stderr: str

    @property
    def result(self) -> dict[str, Any]:
        """The JSON object on the last line of stdout."""
        return json.loads(self.stdout.strip().splitlines()[-1])


def _child(
    module: str,
    argv: list[str],
    out: str,
    err: str,
    environment: dict[str, str],
    before: Callable[..., None] | None,
    own_group: bool,
) -> None:
    import importlib

    import torch

    hold()  # as the programs do before their imports, until they let signals through
    if own_group:
        os.setsid()
    os.chdir(ROOT)
    os.environ.update(environment)
    for number, path in ((1, out), (2, err)):
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(fd, number)
    sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
    torch.set_num_threads(1)
    if before is not None:
        before()
    try:
        code = importlib.import_module(module).main(argv)
    finally:
        with contextlib.suppress(ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
    os._exit(code)


class Run:
    """A started run of `train_split.py` or `eval.py`.

    Args:
        argv: the command line.
        folder: where its output is kept.
        module: the entry point.
        before: called in the child first; a module-level function or a partial of one.
        environment: variables to set.
        own_group: it leads a session and a process group of its own, as a job of a terminal or a launcher does.
    """

    def __init__(
        self,
        argv: Sequence[object],
        folder: Path,
        *,
        module: str = "train_split",
        before: Callable[..., None] | None = None,
        environment: dict[str, str] | None = None,
        own_group: bool = False,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        number = len(list(folder.glob("out*")))
        self.out, self.err = folder / f"out{number}", folder / f"err{number}"
        self.process = _CONTEXT.Process(
            target=_child,
            args=(module, [str(a) for a in argv], str(self.out), str(self.err), environment or {}, before, own_group),
        )
        self.process.start()

    def signal(self, number: int) -> None:
        """Send a signal."""
        assert self.process.pid is not None
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.process.pid, number)

    def signal_group(self, number: int) -> None:
        """Send a signal to the run and to every process that it has started; it has a group of its own."""
        assert self.process.pid is not None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)

    def wait(self, timeout: float = 300) -> Finished:
        """Wait for the end."""
        self.process.join(timeout)
        if self.process.exitcode is None:
            self.signal(signal.SIGKILL)
            self.process.join()
            raise AssertionError(f"still running after {timeout} s:\n{self.text()}")
        return Finished(
            self.process.exitcode, *(p.read_text(errors="replace") if p.exists() else "" for p in (self.out, self.err))
        )

    def text(self) -> str:
        """What it wrote to stderr so far."""
        return self.err.read_text(errors="replace") if self.err.exists() else ""


def in_fork(function: Callable[..., Any], *arguments: Any) -> Any:
    """What a module-level function returns, called in a fork of the server: a process with one thread."""
    # where decoding workers have started the server it holds SIGTERM, by which a pool ends its processes
    with _CONTEXT.Pool(1, signal.pthread_sigmask, (signal.SIG_UNBLOCK, NUMBERS)) as pool:
        return pool.apply(function, arguments)


def train(argv: Sequence[object], folder: Path, **options: Any) -> Finished:
    """Run train_split.py to its end; its output is kept in `folder`/streams."""
    return Run(argv, folder / "streams", **options).wait()


def without_times(path: Path) -> list[Any]:
    """The lines of metrics.jsonl or summary.csv without their time fields."""
    lines = path.read_text().splitlines()
    if path.suffix == ".csv":
        return [line.rsplit(",", 1)[0] for line in lines]
    records = [json.loads(line) for line in lines]
    return [{k: v for k, v in r.items() if k not in ("images_per_second", "data_wait")} for r in records]


def same_ending(folder: Path, expected: Path, result: Finished, reference: Finished) -> None:
    """Check that a run that was interrupted left what one that was not left, time fields aside."""
    assert result.code == 0, result.stderr
    assert result.result["state_sha256"] == reference.result["state_sha256"]
    for name in ("metrics.jsonl", "summary.csv"):
        assert without_times(folder / name) == without_times(expected / name)
    best, other = (ckpt.load_checkpoint(f / ckpt.BEST) for f in (folder, expected))
    assert ckpt.state_sha256(best["state_dict"]) == ckpt.state_sha256(other["state_dict"])
    assert (best["epoch"], best["best_acc1"]) == (other["epoch"], other["best_acc1"])
    for key in ("last", "best", "epochs", "steps"):
        assert result.result[key] == reference.result[key]
    assert board(folder) == board(expected)
    assert not list(folder.glob("*.partial"))


def board(folder: Path) -> dict[int, float]:
    """TensorBoard's value of each epoch; of two that a killed and a resumed run wrote, the later one."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "val"))
    events.Reload()
    return {event.step: event.value for event in events.Scalars("avg_acc1")}

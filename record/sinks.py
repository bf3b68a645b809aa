"""Where the figures of a run go besides its folder: Weights & Biases or MLflow, both optional packages.

A run waits for none of it: a thread hands the figures over, and what fails costs a line of the log.
"""

import json
import logging
import math
import os
import queue
import re
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

from record.checkpoint import write_file
from utils.errors import WriteError, reason
from utils.text import escaped

logger = logging.getLogger(__name__)

RUNS = "sinks.json"  # in the run folder, by sink: its own name of the run, and the places up to which it has figures
AXES = {"train": "step", "val": "epoch"}  # what the axis of a kind of figures counts
WAITING = 10_000  # records that may wait for a slow sink
FAILURES = 3  # in a row, after which a sink is left alone
PATIENCE = 60.0  # seconds at the end of a run


@dataclass(frozen=True, kw_only=True)
class SinkRun:
    """What a sink is told of a run.

    Attributes:
        name: as a person calls it.
        folder: of the run, for what the sink keeps on the disk.
        flags: every flag's value.
        run_id: the sink's name of the run, where a resumed run goes on; None: a new one.
    """

    name: str
    folder: Path
    flags: Mapping[str, Any]
    run_id: str | None


class Sink(Protocol):
    """What takes the figures of one run; anything may raise, and costs a line of the log."""

    def begin(self, run: SinkRun) -> str:
        """Begin a run, or go on with the one of `run.run_id`; returns the sink's name of it."""

    def log(self, kind: str, values: Mapping[str, float], index: int) -> None:
        """Finite figures by tag, of a kind of AXES, at a place of its axis."""

    def end(self, *, complete: bool) -> None:
        """The run is over, or stopped before its end."""


class Wandb:
    """Weights & Biases; its own environment variables say where to (WANDB_PROJECT, WANDB_MODE, WANDB_API_KEY, …)."""

    def begin(self, run: SinkRun) -> str:
        import wandb

        run_id = run.run_id or uuid.uuid4().hex[:8]
        settings = wandb.Settings(console="off")  # stdout and stderr stay the program's
        self._run = wandb.init(id=run_id, resume="allow", name=run.name, dir=str(run.folder), settings=settings)
        self._run.config.update(dict(run.flags), allow_val_change=True)
        self._run.define_metric("*", step_metric=AXES["val"])
        self._run.define_metric("train/*", step_metric=AXES["train"])
        return run_id

    def log(self, kind: str, values: Mapping[str, float], index: int) -> None:
        self._run.log({**values, AXES[kind]: index})

    def end(self, *, complete: bool) -> None:
        self._run.finish(exit_code=0 if complete else 1)


class Mlflow:
    """MLflow; its own environment variables say where to (MLFLOW_TRACKING_URI, MLFLOW_EXPERIMENT_NAME)."""

    def begin(self, run: SinkRun) -> str:
        from mlflow import MlflowClient

        self._client = MlflowClient()
        if run.run_id is not None:
            self._client.update_run(run.run_id, status="RUNNING")
            self._run_id = run.run_id
            return run.run_id
        self._run_id = self._client.create_run(self._experiment(), run_name=run.name).info.run_id
        self._tell_flags(run.flags)
        return self._run_id

    def _experiment(self) -> str:
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "Default")
        found = self._client.get_experiment_by_name(name)
        return str(self._client.create_experiment(name) if found is None else found.experiment_id)

    def _tell_flags(self, flags: Mapping[str, Any]) -> None:
        from mlflow.entities import Param

        params = [Param(name, escaped(str(value))[:500]) for name, value in flags.items()]
        for start in range(0, len(params), 100):  # as many as it takes at once
            self._client.log_batch(self._run_id, params=params[start : start + 100])

    def log(self, kind: str, values: Mapping[str, float], index: int) -> None:
        from mlflow.entities import Metric

        now = int(1000 * time.time())
        found = [Metric(re.sub(r"[^\w\-. /]", "_", tag), value, now, index) for tag, value in values.items()]
        self._client.log_batch(self._run_id, metrics=found)

    def end(self, *, complete: bool) -> None:
        self._client.set_terminated(self._run_id, "FINISHED" if complete else "KILLED")


SINKS: dict[str, Callable[[], Sink]] = {"wandb": Wandb, "mlflow": Mlflow}


class SinkThread:
    """Hands figures to a sink that has begun, one after another, in a thread of its own.

    Args:
        name: of the sink, for the log.
        sink: what takes them.
        had: place of the last figures of each kind that it has from before; it gets none up to there again.
    """

    def __init__(self, name: str, sink: Sink, had: Mapping[str, int]) -> None:
        self.name, self.sink = name, sink
        self._had = dict(had)
        self._failures = 0
        self._is_complete = False
        self._queue: queue.Queue[tuple[str, Mapping[str, float], int] | None] = queue.Queue(WAITING)
        self._is_late = False
        self._thread = threading.Thread(target=self._work, name=f"sink {name}", daemon=True)
        self._thread.start()

    def log(self, kind: str, values: Mapping[str, float], index: int) -> None:
        """Figures by tag, of a kind of AXES; returns at once. What is not finite is left out.

        A place of an axis has its figures once: what a resumed run does again is not sent again.
        """
        if index <= self._had.get(kind, -1):
            return
        self._had[kind] = index
        try:
            self._queue.put_nowait((kind, {tag: v for tag, v in values.items() if math.isfinite(v)}, index))
        except queue.Full:
            if not self._is_late:
                logger.warning("--sink %s: it is too slow for all figures; metrics.jsonl has them.", self.name)
            self._is_late = True

    def end(self, *, complete: bool) -> None:
        """Hand over what is left and end the sink's run; waits PATIENCE seconds at most."""
        self._is_complete = complete
        try:
            self._queue.put(None, timeout=PATIENCE)
            self._thread.join(PATIENCE)
        except queue.Full:
            pass
        if self._thread.is_alive():
            logger.warning(
                "--sink %s: it has not taken everything in %.0f s; metrics.jsonl has it.", self.name, PATIENCE
            )

    def _work(self) -> None:
        while (record := self._queue.get()) is not None:
            if self._failures < FAILURES:
                self._try(partial(self.sink.log, *record))
        self._try(partial(self.sink.end, complete=self._is_complete))

    def _try(self, work: Callable[[], None]) -> None:
        try:
            work()
            self._failures = 0
        except Exception as error:  # of a library, of its network: whatever it is, the run goes on
            self._failures += 1
            after = "; going on without it" if self._failures == FAILURES else ""
            logger.warning("--sink %s: figures were lost%s: %s", self.name, after, reason(error)[:300])


def open_sink(
    name: str, folder: Path, flags: Mapping[str, Any], reached: Mapping[str, int] = MappingProxyType({})
) -> SinkThread | None:
    """Begin a sink's run, or go on with the one that the run folder names; None, and a line, where that fails.

    Args:
        name: one of SINKS.
        folder: of the run.
        flags: every flag's value, as plain data.
        reached: place of the last figures of each kind in the run folder, before the run went back to a checkpoint.
    """
    runs = _runs_before(folder)
    before, had = _run_before(runs.get(name))
    for run_id in _tries(before):
        run = SinkRun(name=folder.resolve().name, folder=folder, flags=flags, run_id=run_id)
        sink = SINKS[name]()
        try:
            begun = sink.begin(run)
        except Exception as error:  # as above
            again = "beginning a new run" if run_id is not None else "going on without it"
            logger.warning("--sink %s: %s: %s", name, again, reason(error)[:300])
            continue
        if run_id is None:
            had = {}
        else:
            had = {kind: max(had.get(kind, -1), reached.get(kind, -1)) for kind in AXES}
        _keep(folder, {**runs, name: {"run": begun, "had": had}})
        return SinkThread(name, sink, had)
    return None


def _tries(run_id: str | None) -> Sequence[str | None]:
    """A run that the sink does not know any more is begun anew."""
    return (None,) if run_id is None else (run_id, None)


def _runs_before(folder: Path) -> dict[str, Any]:
    try:
        found = json.loads((folder / RUNS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _run_before(entry: object) -> tuple[str | None, dict[str, int]]:
    """(the sink's name of the run, up to where it has figures) of an entry in RUNS; earlier versions kept the name."""
    if isinstance(entry, str):
        return entry, {}
    if not isinstance(entry, dict) or not isinstance(entry.get("run"), str):
        return None, {}
    had = entry.get("had")
    return entry["run"], {k: v for k, v in had.items() if isinstance(v, int)} if isinstance(had, dict) else {}


def _keep(folder: Path, runs: Mapping[str, Any]) -> None:
    try:
        write_file(folder / RUNS, json.dumps(runs, indent=2) + "\n")
    except WriteError as error:
        logger.warning("%s A resumed run will be another one there.", error)

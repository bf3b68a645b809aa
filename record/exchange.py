"""The folder through which jobs exchange networks: weights as tensors only, plain facts beside them, and a lock.

    DIR/network_<i>/step_<step>.safetensors   the weights of network i, by the network's own names
    DIR/network_<i>/step_<step>.json          what they are; written after them, so that what has it is complete
    DIR/network_<i>/job.json                  who trains network i, and how far it is; rewritten every BEAT seconds

Every file is written aside, flushed and renamed. Nothing that is read can run code. The layout is ours; what it serves
is codistillation through files, Anil et al., arXiv:1804.03235.
"""

import contextlib
import hashlib
import json
import os
import re
import secrets
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from record import safe_tensors
from record.checkpoint import PARTIAL, write_file
from utils.errors import UserError, WriteError, reason
from utils.plain_json import plain_json

FORMAT_VERSION = 1
KEPT = 2  # sets of weights that a network leaves in the folder
BEAT = 3.0  # seconds between two signs of life of a job
SILENCE = 30.0  # seconds without one after which another job may train the network
JOB = "job.json"
RUNNING, FINISHED, STOPPED = "running", "finished", "stopped"
_NAME = re.compile(r"step_(\d{8,18})\.json")
_PLACE = re.compile(r"network_(\d{1,6})")
_OURS = re.compile(rf"step_(\d{{8,18}})\.(?:json|safetensors)(?:{re.escape(PARTIAL)})?")
_MOST_JSON = 2**24  # bytes; the names of 22,000 classes are half a million
_KINDS: Mapping[str, Any] = {
    **dict.fromkeys(("network", "split_factor", "step", "epoch", "seed", "crop_size", "bytes"), int),
    **dict.fromkeys(("arch", "way", "library", "data_recipe", "config_sha256", "sha256"), str),
    **dict.fromkeys(("widths", "width_names", "classes", "mean", "std"), list),
    **dict.fromkeys(("preprocessing", "config"), dict),
    **dict.fromkeys(("finished", "average"), bool),
}
# of which all networks of an exchange are the same, with the words of a refusal
ALIKE: Mapping[str, str] = {
    "split_factor": "--split_factor",
    "arch": "--arch",
    **dict.fromkeys(("widths", "way", "width_names"), "widths"),
    "classes": "classes",
    **dict.fromkeys(("mean", "std"), "normalisation"),
}


class Refused(ValueError):
    """A file of the folder that cannot be used; one line that names it."""


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of the folder.

    Raises:
        OSError: it is not there, or cannot be read.
        Refused: it is damaged.
    """
    try:
        with path.open("rb") as file:
            content = json.loads(file.read(_MOST_JSON))
    except (ValueError, RecursionError):
        raise Refused(f"{path}: is damaged or no JSON.") from None
    if not isinstance(content, dict):
        raise Refused(f"{path}: is damaged: expected an object.")
    return content


def check_alike(facts: Mapping[str, Any], others: Mapping[str, Any], path: Path) -> None:
    """Refuse weights that cannot learn together, or stand in one ensemble, with others.

    Args:
        facts, others: of the two sets of weights.
        path: where the first come from.

    Raises:
        Refused: the line says what differs.
    """
    for name, words in ALIKE.items():
        if facts[name] != others[name]:
            theirs, ours = (str(side[name])[:60] for side in (facts, others))
            raise Refused(f"{path}: is of another {words}: {theirs}, expected {ours}.")


def check_tensors(state: Mapping[str, Tensor], expected: Mapping[str, Tensor], path: Path) -> None:
    """Refuse weights of other names, shapes or kinds of number, and those that are not finite.

    Raises:
        Refused: the line names the first tensor that differs.
    """
    for name in sorted(expected.keys() ^ state.keys()):
        raise Refused(f"{path}: is of another network: {name[:100]} is {'unknown' if name in state else 'missing'}.")
    for name, value in state.items():
        own = expected[name]
        if value.shape != own.shape or value.is_floating_point() != own.is_floating_point():
            raise Refused(f"{path}: is of another network: {name} is {list(value.shape)}, expected {list(own.shape)}.")
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise Refused(f"{path}: holds numbers that are not finite, in {name}.")


class ExchangeFolder:
    """What the networks of one exchange have published.

    Args:
        folder: DIR; made when something is first written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def place(self, network: int) -> Path:
        """The folder of one network."""
        return self.folder / f"network_{network}"

    def weights_path(self, network: int, step: int) -> Path:
        """Where the weights of a step lie."""
        return self.place(network) / f"step_{step:08d}{safe_tensors.SUFFIX}"

    def steps(self, network: int) -> list[int]:
        """The steps of which a network has published complete weights, newest first.

        Raises:
            OSError: the folder cannot be read; one that is not there has none.
        """
        try:
            names = os.listdir(self.place(network))
        except (FileNotFoundError, NotADirectoryError):
            return []
        return sorted((int(match[1]) for match in map(_NAME.fullmatch, names) if match), reverse=True)

    def facts(self, network: int, step: int) -> dict[str, Any]:
        """What the weights of a step are.

        Raises:
            OSError: nothing is there any more, or it cannot be read.
            Refused: it is damaged, or of something else.
        """
        path = self.weights_path(network, step).with_suffix(".json")
        facts = read_json(path)
        for name, kind in _KINDS.items():
            if type(facts.get(name)) is not kind:  # JSON knows no subclasses, and a bool is no number here
                raise Refused(f"{path}: is damaged or of another program: {name}.")
        if (facts.get("format_version"), facts["network"], facts["step"]) != (FORMAT_VERSION, network, step):
            raise Refused(f"{path}: is of another version, network or step than its name says.")
        return facts

    def weights(self, facts: Mapping[str, Any], *, most: int | None = None) -> dict[str, Tensor]:
        """The weights that `facts` are about, read whole and held against their hash before they are looked at.

        Args:
            facts: from `facts`.
            most: bytes that a file of such networks has at most; None: any number.

        Raises:
            OSError: they are not there any more, or cannot be read.
            Refused: they are damaged.
        """
        path = self.weights_path(facts["network"], facts["step"])
        size = path.stat().st_size
        if size != facts["bytes"] or (most is not None and size > most):
            raise Refused(f"{path}: has {size} bytes: it is damaged, or of other networks.")
        data = path.read_bytes()
        if hashlib.sha256(data).hexdigest() != facts["sha256"]:
            raise Refused(f"{path}: is damaged: its contents are not those that its JSON was written for.")
        try:
            return safe_tensors.unpack(data)
        except ValueError as error:
            raise Refused(f"{path}: is damaged: {error}.") from None

    def publish(self, facts: Mapping[str, Any], state: Mapping[str, Tensor]) -> dict[str, Any]:
        """Write weights and then their facts; older ones than the newest KEPT go, and those of later steps.

        Later steps are there where a killed job goes on from a checkpoint before its last publication.

        Args:
            facts: all of them but `bytes`, `sha256` and `format_version`.
            state: on the CPU.

        Returns:
            the facts as they were written.

        Raises:
            WriteError: the disk is full or the folder cannot be written; what was there is whole.
        """
        network, step = facts["network"], facts["step"]
        path = self.weights_path(network, step)
        data = safe_tensors.pack({"state_dict": state})
        digest = hashlib.sha256(data).hexdigest()
        whole = {**facts, "bytes": len(data), "sha256": digest, "format_version": FORMAT_VERSION}
        make_place(path.parent)
        if not self._has(network, step, digest):
            with contextlib.suppress(OSError):  # first, or it would be about other weights than those that come
                path.with_suffix(".json").unlink()
            write_file(path, data)
        write_file(path.with_suffix(".json"), json.dumps(plain_json(whole), indent=1) + "\n")
        with contextlib.suppress(OSError):  # the next publication tries again
            self._prune(network, step)
        return whole

    def _has(self, network: int, step: int, digest: str) -> bool:
        try:
            return bool(self.facts(network, step)["sha256"] == digest and self.weights_path(network, step).exists())
        except (OSError, Refused):
            return False

    def _prune(self, network: int, newest: int) -> None:
        kept = [step for step in self.steps(network) if step <= newest][:KEPT]
        # .json sorts before .safetensors, so that no reader is promised what is not there
        for name in sorted(os.listdir(self.place(network))):
            match = _OURS.fullmatch(name)
            if match is not None and int(match[1]) not in kept:
                (self.place(network) / name).unlink(missing_ok=True)

    def job(self, network: int) -> dict[str, Any] | None:
        """What the job that trains a network says of itself; None where there is none.

        Raises:
            OSError: it cannot be read.
            Refused: it is damaged.
        """
        try:
            return read_json(self.place(network) / JOB)
        except (FileNotFoundError, NotADirectoryError):
            return None

    def now(self) -> float:
        """The time by the clock of the file system, which is that of the other files' times.

        Raises:
            WriteError: the folder cannot be written.
        """
        probe = self.folder / f".clock_{secrets.token_hex(4)}"
        try:
            write_file(probe, b"")
            return probe.stat().st_mtime
        finally:
            with contextlib.suppress(OSError):
                probe.unlink()

    def networks(self) -> list[int]:
        """The numbers of the networks of which there is a folder.

        Raises:
            OSError: the folder cannot be read.
        """
        return sorted(int(match[1]) for match in map(_PLACE.fullmatch, os.listdir(self.folder)) if match)


def make_place(folder: Path) -> None:
    """Make a folder of the exchange.

    Raises:
        WriteError: it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise WriteError(f"--exchange: {folder} cannot be made: {reason(error)}.") from None


class Lock:
    """One job's hold on its network: a sign of life in job.json, because network file systems lose other locks.

    Args:
        folder: of the exchange.
        network: its number.
    """

    def __init__(self, folder: ExchangeFolder, network: int) -> None:
        self.folder, self.network = folder, network
        self.token = secrets.token_hex(8)
        self._beats = 0
        self._started = time.time()

    def claim(self, *, is_fresh: bool, wait: Callable[[float], object] = time.sleep) -> None:
        """Take hold of the network; where another job has held it until just now, wait until that one is silent.

        Args:
            is_fresh: the run begins, and is not one that may have published before.
            wait: for so many seconds.

        Raises:
            UserError: another job trains the network, or the folder holds that of another run.
            WriteError: the folder cannot be written.
        """
        place = self.folder.place(self.network)
        if self.folder.folder.exists() and not self.folder.folder.is_dir():
            raise UserError(f"--exchange {self.folder.folder}: is a file; expected a folder.")
        make_place(place)
        first = None
        while (job := self._other()) is not None:
            first = first or job
            if job.get("beat") != first.get("beat") or job.get("token") != first.get("token"):
                raise UserError(self._held(job))
            age = self.folder.now() - _time_of(place / JOB)
            if _is_dead(job) or age > SILENCE:
                break
            wait(BEAT / 2)
        if is_fresh and (steps := self.folder.steps(self.network)):
            raise UserError(
                f"--exchange {self.folder.folder} already holds network {self.network} of another run, at step "
                f"{steps[0]}: go on with --resume auto, or choose another folder."
            )
        self.beat({})
        wait(0.2)  # of two jobs that begin at once, one has overwritten the other
        if (job := self._other()) is not None:
            raise UserError(self._held(job))

    def _other(self) -> dict[str, Any] | None:
        """What another job that is under way says of itself."""
        try:
            job = self.folder.job(self.network)
        except (OSError, Refused):
            return None
        return job if job and job.get("state") == RUNNING and job.get("token") != self.token else None

    def _held(self, job: Mapping[str, Any]) -> str:
        return (
            f"--network {self.network} of --exchange {self.folder.folder} is trained by another job that is alive: "
            f"process {job.get('pid')} on {job.get('host')}, at step {job.get('step')}. Give another --network, or end "
            "that job."
        )

    def taken_by(self) -> str:
        """The line about another job that has taken hold of the network meanwhile; "" where none has."""
        job = self._other()
        return "" if job is None else self._held(job)

    def beat(self, progress: Mapping[str, Any], state: str = RUNNING) -> None:
        """A sign of life.

        Args:
            progress: what else the file says.
            state: RUNNING, or how the job has ended.

        Raises:
            WriteError: it cannot be written.
        """
        self._beats += 1
        pid = os.getpid()
        job = {
            "network": self.network,
            "state": state,
            "token": self.token,
            "beat": self._beats,
            "host": socket.gethostname(),
            "machine": _machine(),
            "pid": pid,
            "birth": _birth(pid),
            "started": self._started,
            "time": time.time(),
            **progress,
        }
        write_file(self.folder.place(self.network) / JOB, json.dumps(plain_json(job), indent=1) + "\n")


def _time_of(path: Path) -> float:
    """When a file was last written; 0 where it is not there."""
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _machine() -> str:
    """What process numbers are unique in."""
    parts: Sequence[str] = (socket.gethostname(), _read("/proc/sys/kernel/random/boot_id"))
    with contextlib.suppress(OSError):
        parts = (*parts, os.readlink("/proc/self/ns/pid"))
    return " ".join(parts)


def _birth(pid: int) -> str:
    """When a process of this machine was started, in ticks; "" where it is not there, has ended, or nothing says it."""
    fields = _read(f"/proc/{pid}/stat").rpartition(")")[2].split()
    return fields[19] if len(fields) > 19 and fields[0] not in "ZX" else ""


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


def _is_dead(job: Mapping[str, Any]) -> bool:
    """Whether a job was one of this machine that is not there any more; False where that cannot be known."""
    pid, birth = job.get("pid"), job.get("birth")
    if not isinstance(pid, int) or not birth or job.get("machine") != _machine():
        return False
    return _birth(pid) != birth

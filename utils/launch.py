"""Who this process is, which device it computes on, and how other processes are started.

The device is decided here, once (`join`), and passed down.
"""

import contextlib
import datetime
import itertools
import logging
import os
import shutil
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from utils.errors import Incomplete, Interrupted, RunError, Stopped, UserError, reason
from utils.heartbeat import GO_ON, Heartbeat
from utils.meeting import fresh_store
from utils.memory import is_out_of_memory
from utils.mesh import Mesh
from utils.signals import held

TIMEOUT = datetime.timedelta(minutes=10)


@dataclass(frozen=True)
class World:
    """One process among all of a job.

    Attributes:
        rank, world_size: number of this process and how many there are.
        local_rank, local_size: the same on this machine.
        device: where this process computes.
        heartbeat: watches the other processes; None where there is only one.
        store: what all processes can read and write; None where there is only one.
        waits: numbers what they wait for, in the same order in all of them.
        mesh: how the networks are spread over the processes (--placement networks); None: every process holds all.
    """

    rank: int
    world_size: int
    local_rank: int
    local_size: int
    device: torch.device
    heartbeat: Heartbeat | None = None
    store: dist.Store | None = None
    waits: Iterator[int] = field(default_factory=itertools.count, repr=False, compare=False)
    mesh: Mesh | None = None

    @property
    def is_main(self) -> bool:
        """True in the one process that writes files."""
        return self.rank == 0

    @property
    def num_nodes(self) -> int:
        """How many machines the processes with the same networks run on, which cut a batch among themselves.

        Without a mesh, how many the job runs on.
        """
        if self.mesh is not None:
            return -(-self.mesh.replicas // self.local_size)
        return max(1, self.world_size // self.local_size)

    @property
    def shard(self) -> int:
        """Which part of every batch this process takes."""
        return self.rank if self.mesh is None else self.mesh.replica

    @property
    def num_shards(self) -> int:
        """Into how many parts a batch is cut."""
        return self.world_size if self.mesh is None else self.mesh.replicas

    @property
    def sharers(self) -> dist.ProcessGroup | None:
        """The processes that cut a batch among themselves; None: all of the job."""
        return None if self.mesh is None else self.mesh.data_dim


def under_launcher() -> bool:
    """True where torchrun (or an equal launcher) has set this process's place in its environment."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def processes_on_this_machine() -> int:
    """How many processes a launcher has started beside this one, itself included; 1 without a launcher."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"])) if under_launcher() else 1


def unused_gpu() -> str:
    """One line where this machine seems to have a GPU that torch cannot use; "" where it has none, or torch does."""
    seems_there = Path("/dev/nvidia0").exists() or shutil.which("nvidia-smi") is not None
    if not seems_there or torch.cuda.is_available():
        return ""
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return ""  # hidden on purpose
    why = (
        "is built without CUDA"
        if torch.version.cuda is None
        else f"for CUDA {torch.version.cuda} finds no driver for it"
    )
    return (
        f"This machine seems to have a GPU, but torch {torch.__version__} {why}: the CPU computes. Install a torch for "
        "the driver that nvidia-smi shows, or give --no_cuda."
    )


def visible_gpus(*, no_cuda: bool, gpu: int | None, gpu_ids: str | None) -> list[int]:
    """Numbers of the GPUs that a run may use; empty means the CPU.

    Raises:
        UserError: an id that is no number or does not exist.
    """
    if no_cuda:
        return []
    present = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if gpu is not None:
        chosen, flag = [gpu], "--gpu"
    elif gpu_ids is not None:
        flag = "--gpu_ids"
        try:
            chosen = [int(part) for part in gpu_ids.replace(" ", ",").split(",") if part]
        except ValueError:
            raise UserError(f"--gpu_ids {gpu_ids!r}: expected numbers, as in 0,1.") from None
    else:
        return list(range(present))
    unknown = [number for number in chosen if not 0 <= number < present]
    if unknown or not chosen:
        there = f"0 to {present - 1}" if present else "none"
        raise UserError(f"{flag} {gpu if gpu is not None else gpu_ids}: no such GPU; this machine has {there}.")
    return chosen


def named_gpus(flag: str, names: str | None) -> list[torch.device]:
    """The GPUs of a comma list such as cuda:0,cuda:1.

    Raises:
        UserError: a name that is no GPU of this machine, or one twice; the line names `flag`.
    """
    devices, present = [], torch.cuda.device_count()
    for name in (part.strip() for part in (names or "").split(",") if part.strip()):
        kind, _, number = name.partition(":")
        if kind != "cuda" or not (number or "0").isdecimal() or int(number or "0") >= present:
            raise UserError(
                f"{flag} {names}: {name} is none of this machine's {present} GPUs; name them cuda:0,cuda:1."
            )
        devices.append(torch.device("cuda", int(number or "0")))
    if len(set(devices)) < len(devices):
        raise UserError(f"{flag} {names}: names a GPU twice; name each once.")
    return devices


def one_gpu(flag: str, name: str) -> torch.device:
    """The GPU of a name such as cuda:0.

    Raises:
        UserError: as `named_gpus`, or it names none, or several.
    """
    devices = named_gpus(flag, name)
    if len(devices) != 1:
        raise UserError(f"{flag} {name}: name one GPU, as cuda:0.")
    return devices[0]


def join(gpus: list[int], *, backend: str = "auto") -> World:
    """This process's place in the job; starts the process group where a launcher has set one up.

    Args:
        gpus: from `visible_gpus`; process i of a machine takes the i-th.
        backend: auto, nccl or gloo.

    Raises:
        UserError: fewer GPUs than processes.
        RunError: the meeting point cannot be reached, or its port is taken.
    """
    if not under_launcher():
        device = torch.device("cuda", gpus[0]) if gpus else torch.device("cpu")
        if gpus:
            torch.cuda.set_device(device)
        return World(0, 1, 0, 1, device)
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    local_rank = int(os.environ.get("LOCAL_RANK", rank))
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
    if gpus and local_size > len(gpus):
        raise UserError(f"{local_size} processes on a machine with {len(gpus)} GPUs: start one per GPU, or --no_cuda.")
    device = torch.device("cuda", gpus[local_rank]) if gpus else torch.device("cpu")
    if gpus:
        torch.cuda.set_device(device)
    chosen = ("nccl" if gpus and dist.is_nccl_available() else "gloo") if backend == "auto" else backend
    if chosen == "nccl" and not gpus:
        raise UserError("--dist_backend nccl needs GPUs; use gloo on a CPU.")
    try:
        store, _, _ = next(dist.rendezvous("env://", timeout=TIMEOUT))
        store = fresh_store(store, rank, world_size, TIMEOUT.total_seconds())
        dist.init_process_group(
            chosen,
            store=store,
            rank=rank,
            world_size=world_size,
            timeout=TIMEOUT,
            device_id=device if chosen == "nccl" else None,
        )
    except (RuntimeError, ValueError) as error:
        place = f"{os.environ.get('MASTER_ADDR', '?')}:{os.environ.get('MASTER_PORT', '?')}"
        raise RunError(
            f"--dist_url: no meeting at {place} (port in use, or host down): {reason(error)[:200]}"
        ) from None
    heartbeat = Heartbeat(store, rank, world_size) if world_size > 1 else None
    return World(rank, world_size, local_rank, local_size, device, heartbeat, store)


def leave(world: World) -> None:
    """End the process group, if there is one."""
    if world.heartbeat is not None:
        world.heartbeat.close()
    if dist.is_initialized():
        dist.destroy_process_group()


@contextlib.contextmanager
def naming_lost_processes(world: World, advice: str = GO_ON) -> Iterator[None]:
    """Share the fate of the other processes: tell them where this one fails, and name the one that failed before.

    Args:
        advice: a sentence at the end of the error.

    Raises:
        RunError: in place of the backend's error, where an exchange failed because another process is gone.
    """
    heartbeat = world.heartbeat
    if heartbeat is None:
        yield
        return
    heartbeat.advice = advice
    try:
        yield
    except (Stopped, Incomplete):  # the others have done all that they had to do with this one
        raise
    except RuntimeError as error:
        # said at once, and not only when the last checkpoint is written
        gone = "" if isinstance(error, RunError) or is_out_of_memory(error) else heartbeat.who_is_gone()
        heartbeat.fail(follows=bool(gone))
        if not gone:
            raise
        raise RunError(f"{gone}; process {world.rank} stops. {advice}") from None
    except BaseException:
        heartbeat.fail()
        raise


def free_port() -> int:
    """A TCP port of this machine that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _spawned(
    local_rank: int, target: Callable[..., None], arguments: tuple[Any, ...], settings: dict[str, str]
) -> None:
    os.environ.update(settings)
    rank = int(settings["FIRST_RANK"]) + local_rank
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(local_rank))
    target(*arguments)


def spawn(
    target: Callable[..., None], arguments: tuple[Any, ...], *, processes: int, nodes: int, node: int, url: str
) -> None:
    """The published launcher: `processes` processes on this node, each with torchrun's environment.

    Args:
        target: called as `target(*arguments)` in every process.
        processes: on this node. nodes, node: how many there are, and which this is.
        url: tcp://HOST:PORT of node 0, or env:// (MASTER_ADDR and MASTER_PORT; a free local port where they are unset).

    Raises:
        UserError: several nodes without a meeting point.
        SystemExit: with the first failed process's exit code; after a signal, with the largest once all have ended.
    """
    if url.startswith("tcp://") and url.count(":") == 2:
        host, port = url.removeprefix("tcp://").split(":")
    elif url == "env://":
        host = os.environ.get("MASTER_ADDR", "127.0.0.1")
        port = os.environ.get("MASTER_PORT", "")
    else:
        raise UserError(f"--dist_url {url}: expected tcp://HOST:PORT or env://.")
    if not port.isdigit():
        if nodes > 1 or port:
            raise UserError(f"--dist_url {url}: several nodes need a meeting point: tcp://HOST:PORT of node 0.")
        port = str(free_port())
    settings = {
        "MASTER_ADDR": host,
        "MASTER_PORT": port,
        "WORLD_SIZE": str(nodes * processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "FIRST_RANK": str(node * processes),
    }
    # it would warn of ending the others, when the one that failed has said why
    logging.getLogger("torch.multiprocessing.spawn").setLevel(logging.ERROR)
    with held():  # until the program in them knows what to do with a signal
        context = torch.multiprocessing.spawn(
            _spawned, args=(target, arguments, settings), nprocs=processes, join=False, start_method="spawn"
        )
    try:
        while not context.join():
            pass
    except torch.multiprocessing.ProcessExitedException as failure:
        raise SystemExit(failure.exit_code if failure.exit_code > 0 else 1) from None
    except Interrupted as interrupted:
        raise SystemExit(_stopped(context.processes, interrupted.number)) from None


def _stopped(processes: list[Any], number: int) -> int:
    """Hand a signal on to started processes, and wait for what they still do; the largest of their exit codes."""
    for process in processes:
        if process.is_alive():  # where it has come to the whole group, they take this for an echo
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, number)
    for process in processes:
        process.join()
    return max(abs(process.exitcode) for process in processes)

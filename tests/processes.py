"""Runs a function in several gloo processes on this machine and brings back what each returned."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests import runs  # noqa: F401  # its server of forks has torch imported: each process saves that time
from utils.launch import free_port


def _worker(rank: int, world_size: int, port: int, folder: str, function: Callable[..., Any], arguments: Any) -> None:
    os.environ.update(
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_RANK=str(rank),
        LOCAL_WORLD_SIZE=str(world_size),
    )
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    try:
        torch.save(function(rank, world_size, *arguments), Path(folder) / f"{rank}.pt")
    finally:
        dist.destroy_process_group()


def run_processes(world_size: int, function: Callable[..., Any], folder: Path, *arguments: Any) -> list[Any]:
    """`function(rank, world_size, *arguments)` in every process; its results (plain values and tensors) by rank."""
    folder.mkdir(exist_ok=True)
    torch.multiprocessing.start_processes(
        _worker,
        args=(world_size, free_port(), str(folder), function, arguments),
        nprocs=world_size,
        start_method="forkserver",
    )
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(world_size)]

"""One process of `python -m benchmarks placement`: the same steps under both placements, in turns."""

import argparse
import contextlib
import json
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import own
from train_split import Trainer
from utils import launch
from utils.mesh import build_mesh, choose_groups

CPU = torch.device("cpu")
FLAGS = ["--amp_dtype", "fp32", "--ema_decay", "0.99", "--workers", "0"]


class CollectiveBytes(TorchDispatchMode):
    """Counts the bytes that this process hands to collectives, DDP's among them, by the collective's name."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, int] = {}

    def __torch_dispatch__(
        self, func: Any, types: Sequence[Any], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func.namespace == "c10d":
            name = func.overloadpacket.__name__.strip("_")
            # of a gather, the second argument is what is sent
            sent = args[1] if name.startswith("allgather") else args[0]
            self.found[name] = self.found.get(name, 0) + sum(_bytes(sent))
        return func(*args, **(kwargs or {}))


def _bytes(value: Any) -> list[int]:
    if isinstance(value, Tensor):
        return [value.nbytes]
    return [size for item in value for size in _bytes(item)] if isinstance(value, list | tuple) else []


def link_bytes(interface: str) -> int:
    """Bytes that an interface has received and sent so far; 0 where the system does not tell."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/net/dev").read_text().splitlines():
            name, _, numbers = line.partition(":")
            if name.strip() == interface:
                counts = numbers.split()
                return int(counts[0]) + int(counts[8])
    return 0


def state_bytes(trainer: Trainer) -> Callable[[], int]:
    """Bytes of weights, buffers, gradients, optimiser state and moving average at the last update, once each."""
    found: list[int] = []

    def count(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        tensors = [*trainer.method.parameters(), *trainer.method.buffers()]
        tensors += [p.grad for p in trainer.method.parameters() if p.grad is not None]
        tensors += [
            value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)
        ]
        if trainer.average is not None:
            tensors += [*trainer.average.state_dict().values()]
        storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
        found.append(sum(storages.values()))

    trainer.training_step.update.optimizer.register_step_pre_hook(count)
    return lambda: found[-1]


def main() -> None:
    """Take the steps and write the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("split_factor", "batch_size", "rounds", "warmup"):
        parser.add_argument(f"--{name}", type=int, required=True)
    for name in ("arch", "interface", "out"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--seconds", type=float, required=True)
    options = parser.parse_args()
    world = launch.join([], backend="gloo")
    flags = ["--arch", options.arch, "--split_factor", str(options.split_factor)]
    flags += ["--batch_size", str(options.batch_size), *FLAGS]
    mesh = build_mesh(choose_groups(options.split_factor, world.world_size, None), CPU)
    worlds = {"data": world, "networks": replace(world, mesh=mesh)}
    steps: dict[str, Callable[[], None]] = {}
    memory: dict[str, Callable[[], int]] = {}
    report: dict[str, dict[str, Any]] = {name: {"seconds": [], "wire": [], "calls": {}} for name in worlds}
    with tempfile.TemporaryDirectory() as folder:
        for name, place in worlds.items():
            trainer = own.open_trainer([*flags, "--placement", name], Path(folder, name), CPU, world=place)
            steps[name], memory[name] = own.training_step(trainer), state_bytes(trainer)
        for call in steps.values():
            for _ in range(options.warmup):
                call()
        began = time.perf_counter()
        for number in range(options.rounds):
            elapsed = torch.tensor(time.perf_counter() - began)
            dist.all_reduce(elapsed, op=dist.ReduceOp.MAX)  # all stop after the same round
            if number >= 3 and float(elapsed) > options.seconds:
                break
            for name in sorted(steps, reverse=bool(number % 2)):
                dist.barrier()
                before, started = link_bytes(options.interface), time.perf_counter()
                steps[name]()
                report[name]["seconds"].append(time.perf_counter() - started)
                time.sleep(0.1)  # the last packets' acknowledgements
                report[name]["wire"].append(link_bytes(options.interface) - before)
        for name, call in steps.items():
            with CollectiveBytes() as counted:
                call()
            report[name] |= {"calls": counted.found, "memory": memory[name]()}
    Path(options.out).write_text(json.dumps(report))
    launch.leave(world)


if __name__ == "__main__":
    main()

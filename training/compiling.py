"""Compiling networks with torch, for training alone."""

import importlib.util
import os
import shutil
import sysconfig
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

from utils.errors import UserError


def compile_modules(modules: Iterable[nn.Module], mode: str, device: torch.device, execution: str = "loop") -> None:
    """Let torch compile each module at its first call; keys of state dicts and hooks stay as they are.

    Args:
        modules: networks, or what holds them.
        mode: one of `training.options.COMPILE_MODES`; "aot_eager" traces forward and backward and generates no code.
        device: where they run.
        execution: how the networks run; those that become one function, or run in threads, cannot be compiled singly.

    Raises:
        UserError: nothing to compile, no compiler, or another way of execution.
    """
    modules = list(modules)
    if execution != "loop" and not (execution == "parallel" and device.type == "cuda"):
        raise UserError(f"--compile does not go with --execution {execution}: leave one of them out.")
    if not modules:
        raise UserError("--compile: this --method decides on the host what a step computes; leave the flag out.")
    if mode != "aot_eager":
        missing = missing_for_triton() if device.type == "cuda" else None
        if missing is not None:
            raise UserError(f"--compile {mode} needs {missing} on a GPU; install it or leave the flag out.")
        if device.type == "cpu" and not any(map(shutil.which, ("g++", "clang++", "c++"))):
            raise UserError(f"--compile {mode} needs a C++ compiler such as g++ on a CPU; leave the flag out.")
    # networks of one class share a limit that is meant for one network
    limits = torch._dynamo.config
    limits.recompile_limit = max(limits.recompile_limit, 8 * len(modules))
    # DDP exchanges gradients from hooks of the parameters, outside of these modules: no graph has to end at its buckets
    torch._dynamo.config.optimize_ddp = False
    how = {"backend": mode} if mode == "aot_eager" else {"mode": mode}
    for module in modules:
        # a smaller last batch gets a graph of its own; else all batches would share one for every size
        module.compile(**how, dynamic=False)


def missing_for_triton() -> str | None:
    """What Triton needs to build and start a kernel and does not find here; None where nothing is missing."""
    if importlib.util.find_spec("triton") is None:
        return "the package triton"
    if "CC" not in os.environ and not any(map(shutil.which, ("gcc", "clang"))):
        return "a C compiler such as gcc (or one named by CC)"
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    return None if header.is_file() else f"Python's headers ({header}; Debian and Ubuntu: python3-dev)"


def as_written(compiled: bool) -> AbstractContextManager[Any]:
    """Context in which modules run as they are written, compiled or not: the numbers of a program without --compile."""
    return torch.compiler.set_stance("force_eager") if compiled else nullcontext()

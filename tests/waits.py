"""Tests that need a GPU, and what must not wait for it; and waiting until something is so."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import pytest
import torch

Test = TypeVar("Test", bound=Callable[..., Any])


def requires_gpu(count: int = 1) -> tuple[pytest.MarkDecorator, pytest.MarkDecorator]:
    """Marks of a test that needs so many GPUs, and skips itself where there are fewer."""
    there = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return pytest.mark.gpu, pytest.mark.skipif(there < count, reason=f"needs {count} CUDA device(s)")


def needs_gpu(test: Test) -> Test:
    """The same as a decorator."""
    for mark in requires_gpu():
        test = mark(test)
    return test


@contextmanager
def nothing_waits() -> Iterator[None]:
    """Inside, a call that makes the host wait for the GPU raises RuntimeError. Needs a GPU."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def wait_until(condition: Callable[[], bool], what: str, *, seconds: float = 20) -> None:
    """Wait, for so long at most, until something is so that other threads or processes do."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"never happened: {what}"
        time.sleep(0.002)

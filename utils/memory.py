"""Running out of memory, on a GPU or a CPU: how it is recognised, and what of it is worth a line."""

import errno
import re

import torch

from utils.errors import RunError, UserError

# what the CPU's allocator, CUDA and the libraries on it say; only the GPU's allocator has a class of its own for it
_SIGNS = (
    "out of memory",
    "not enough memory",
    "can't allocate memory",
    "cannot allocate memory",
    "std::bad_alloc",
    "_STATUS_ALLOC_FAILED",
)
_AMOUNT = re.compile(r"allocate ([\d.]+) ?(bytes|[KMGTP]i?B)")
_GPU = re.compile(r"GPU (\d+) has a total capacity of ([\d.]+ \w+) of which ([\d.]+ \w+) is free")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception means that memory did not suffice, whoever asked for it."""
    if isinstance(error, UserError | RunError):
        return False
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _SIGNS)


def is_more_than_memory(error: BaseException, size: int) -> bool:
    """Whether reading a file of `size` bytes met the end of memory; one that asks for more than it holds is damaged."""
    if not is_out_of_memory(error):
        return False
    amount = _amount(str(error))
    return amount is not None and amount <= size


def _amount(text: str) -> float | None:
    """The bytes that an allocator could not give, None where it does not say."""
    found = _AMOUNT.search(text)
    if found is None:
        return None
    number, unit = float(found[1]), found[2]
    return number if unit == "bytes" else number * 1024 ** ("KMGTP".index(unit[0]) + 1)


def what_did_not_fit(error: BaseException) -> str:
    """One clause: where memory did not suffice, and for how much, as far as the exception tells."""
    text = str(error)
    gpu, amount = _GPU.search(text), _AMOUNT.search(text)
    where = "out of memory"
    if gpu is not None:
        where = f"out of memory on GPU {gpu[1]} ({gpu[3]} of {gpu[2]} are free)"
    elif isinstance(error, torch.OutOfMemoryError) or "CUDA" in text:
        where = "out of memory on a GPU"
    if amount is None:
        return where
    number, unit = float(amount[1]), amount[2]
    if unit == "bytes":
        number, unit = number / 2**30, "GiB"
    return f"{where}: {number:,.1f} {unit} more did not fit"

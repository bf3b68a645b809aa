"""Large new tensors on a CPU without a page fault for every 4 KiB of them."""

import ctypes
import functools
import sys
from collections.abc import Callable

from torch import Tensor

HUGE_PAGE = 1 << 21  # bytes
MADV_HUGEPAGE = 14  # Linux
# C libraries take larger blocks from the system and give them back at once, so each one is new memory; smaller ones are
# used again, and gain nothing.
FRESH_FROM = 32 << 20  # bytes


@functools.cache
def _madvise() -> Callable[[ctypes.c_void_p, ctypes.c_size_t, int], int] | None:
    if sys.platform != "linux":
        return None
    return getattr(ctypes.CDLL(None), "madvise", None)


def advise_huge_pages(fresh: Tensor) -> Tensor:
    """Ask Linux for huge pages behind a tensor that nothing was written to yet, if it is large and on the CPU.

    Advice only: where it is refused, or there is no Linux, nothing changes. Returns the tensor.
    """
    madvise = _madvise()
    if madvise is None or fresh.device.type != "cpu" or fresh.nbytes < FRESH_FROM:
        return fresh
    start = -(-fresh.data_ptr() // HUGE_PAGE) * HUGE_PAGE
    end = (fresh.data_ptr() + fresh.nbytes) // HUGE_PAGE * HUGE_PAGE
    madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), MADV_HUGEPAGE)
    return fresh

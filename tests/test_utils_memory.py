"""Whose memory did not suffice, and for how much."""

import pytest
import torch

from tests.kills import cpu_out_of_memory, gpu_out_of_memory
from utils.errors import RunError
from utils.memory import is_more_than_memory, is_out_of_memory, what_did_not_fit


def test_a_full_gpu_is_named_with_what_was_asked_for() -> None:
    with pytest.raises(torch.OutOfMemoryError) as caught:
        gpu_out_of_memory()
    assert is_out_of_memory(caught.value)
    line = "out of memory on GPU 0 (3.50 GiB of 139.80 GiB are free): 20.0 GiB more did not fit"
    assert what_did_not_fit(caught.value) == line


def test_the_allocator_of_the_cpu_is_understood() -> None:
    with pytest.raises(RuntimeError) as caught:
        cpu_out_of_memory()
    assert is_out_of_memory(caught.value)
    assert what_did_not_fit(caught.value) == "out of memory: 3,725,290.3 GiB more did not fit"


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        OSError(12, "Cannot allocate memory"),
        RuntimeError("not enough memory: you tried to allocate 8 bytes"),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
)
def test_every_way_to_say_it_counts(error: Exception) -> None:
    assert is_out_of_memory(error)
    assert what_did_not_fit(error).startswith("out of memory")


@pytest.mark.parametrize(
    "error", [RuntimeError("shape mismatch"), RunError("out of memory"), OSError(28, "No space left on device")]
)
def test_other_errors_do_not(error: Exception) -> None:
    assert not is_out_of_memory(error)


def test_a_file_that_asks_for_more_than_it_holds_is_not_out_of_memory() -> None:
    error = RuntimeError("can't allocate memory: you tried to allocate 4000 bytes")
    assert is_more_than_memory(error, 4000)
    assert not is_more_than_memory(error, 3999)
    assert is_more_than_memory(RuntimeError("CUDA out of memory. Tried to allocate 2.00 MiB"), 2 * 2**20)
    assert not is_more_than_memory(RuntimeError("shape mismatch"), 4000)

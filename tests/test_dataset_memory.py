"""Advice about memory: given for large CPU tensors only, inside them, and without any effect on what they hold."""

import sys

import pytest
import torch

from dataset import memory
from dataset.memory import FRESH_FROM, HUGE_PAGE, MADV_HUGEPAGE, advise_huge_pages


@pytest.fixture
def asked(monkeypatch):
    calls = []
    monkeypatch.setattr(
        memory, "_madvise", lambda: lambda start, size, advice: calls.append((start.value, size.value, advice))
    )
    return calls


def test_a_large_tensor_is_asked_for_in_whole_pages_inside_it(asked):
    tensor = torch.empty(FRESH_FROM + 12345, dtype=torch.uint8)
    assert advise_huge_pages(tensor) is tensor
    ((start, size, advice),) = asked
    assert advice == MADV_HUGEPAGE
    assert start % HUGE_PAGE == size % HUGE_PAGE == 0
    first, last = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
    assert first <= start < first + HUGE_PAGE
    assert last - HUGE_PAGE < start + size <= last


def test_others_are_left_alone(asked):
    advise_huge_pages(torch.empty(FRESH_FROM - 1, dtype=torch.uint8))
    advise_huge_pages(torch.empty(FRESH_FROM, dtype=torch.uint8, device="meta"))
    assert not asked


@pytest.mark.skipif(sys.platform != "linux", reason="Linux's own call")
def test_the_real_call_changes_no_content():
    tensor = advise_huge_pages(torch.empty(FRESH_FROM, dtype=torch.uint8)).fill_(7)
    assert int(tensor.sum(dtype=torch.int64)) == 7 * FRESH_FROM

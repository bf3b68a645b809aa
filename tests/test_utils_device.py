"""The device that computes: waiting for it, equal bits, and what they depend on."""

import itertools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import train_split
from parser_params import parse_config
from utils.device import Fetched, Uploads, ask_for_determinism, gpu_facts, wait_for

CPU, GPU = torch.device("cpu"), torch.device("cuda", 1)


@pytest.fixture(autouse=True)
def _settings_as_before(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", torch.backends.cudnn.benchmark)
    fills = torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.utils.deterministic.fill_uninitialized_memory = fills
    torch.use_deterministic_algorithms(False)


def test_only_a_gpu_is_waited_for(monkeypatch):
    waited = []
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    wait_for(CPU)
    wait_for(GPU)
    assert waited == [GPU]


def test_determinism_is_asked_of_all_libraries_and_of_none_without_it(monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    ask_for_determinism(False)
    assert torch.backends.cudnn.benchmark
    assert not torch.are_deterministic_algorithms_enabled()
    assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ
    ask_for_determinism(True)
    assert not torch.backends.cudnn.benchmark
    assert torch.are_deterministic_algorithms_enabled()
    assert torch.is_deterministic_algorithms_warn_only_enabled()
    assert not torch.utils.deterministic.fill_uninitialized_memory
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    ask_for_determinism(True)
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"  # the user's own


def test_it_is_asked_for_before_a_process_finds_its_gpu(monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)

    def join(*_, **__):
        raise ZeroDivisionError(os.environ.get("CUBLAS_WORKSPACE_CONFIG"))

    monkeypatch.setattr(train_split.launch, "join", join)
    flags = ["--dataset", "digits", "--arch", "resnet20", "--no_cuda", "--deterministic", "1"]
    with pytest.raises(ZeroDivisionError, match=":4096:8"):
        train_split.run(parse_config(flags, program="train_split.py"))


def test_a_checkpoint_knows_the_gpu_and_its_library(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"GPU {device.index}")
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 92000)
    assert gpu_facts(CPU) == {}
    assert gpu_facts(GPU) == {"gpu": "GPU 1", "cudnn": "92000"}


class Recorded:
    """Stands for torch's streams and events: what each stream is asked for, in order, and what the host waits for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.compute, self.copies = self.stream("compute"), self.stream("copies")
        self.current, self.host, self.events = self.compute, list[Any](), itertools.count()
        monkeypatch.setattr(torch.cuda, "Stream", lambda device: self.copies)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: self.current)
        monkeypatch.setattr(torch.cuda, "stream", self.on)
        monkeypatch.setattr(torch.cuda, "Event", self.event)

    def stream(self, name: str) -> SimpleNamespace:
        stream = SimpleNamespace(name=name, asked=[])
        stream.wait_event = lambda event: stream.asked.append(("wait", event.number))
        return stream

    def event(self) -> SimpleNamespace:
        event = SimpleNamespace(number=next(self.events))
        event.record = lambda stream: stream.asked.append(("record", event.number))
        event.synchronize = lambda: self.host.append(event.number)
        return event

    @contextmanager
    def on(self, stream: SimpleNamespace) -> Iterator[None]:
        before, self.current = self.current, stream
        yield
        self.current = before

    def pinned(self, name: str) -> SimpleNamespace:
        """A tensor whose copies know the streams that use them."""

        def to(device: torch.device, non_blocking: bool) -> SimpleNamespace:
            assert (device, non_blocking) == (GPU, True)
            self.current.asked.append(("copy", name))
            copy = SimpleNamespace(name=name, used_by=[])
            copy.record_stream = lambda stream: copy.used_by.append(stream.name)
            return copy

        return SimpleNamespace(to=to)


def test_a_copy_waits_for_no_step_and_the_next_step_for_its_copy(monkeypatch):
    recorded = Recorded(monkeypatch)
    uploads = Uploads(GPU)
    for name in "abcd":
        copy = uploads.send(recorded.pinned(name))
        recorded.compute.asked.append(("step", name))
        assert copy.used_by == ["compute"]
    assert [what for what, _ in recorded.copies.asked] == ["copy", "record"] * 4  # and no wait
    ready = [number for what, number in recorded.copies.asked if what == "record"]
    used = [number for what, number in recorded.compute.asked if what == "record"]
    assert recorded.compute.asked == [
        one
        for name, before, event in zip("abcd", used, ready, strict=True)
        for one in (("record", before), ("wait", event), ("step", name))
    ]
    # no more than two copies are ahead of the steps: the third waits for what came before the first, and so on
    assert recorded.host == used[:2]


def test_a_value_is_fetched_behind_what_makes_it_and_waited_for_by_itself(monkeypatch):
    assert Fetched(torch.tensor([3.0])).is_here()
    recorded = Recorded(monkeypatch)
    host = SimpleNamespace(
        copy_=lambda value, non_blocking: recorded.current.asked.append(("copy", non_blocking)) or host
    )
    monkeypatch.setattr(torch, "empty_like", lambda value, device, pin_memory: host)
    recorded.compute.asked.append(("step", 1))
    fetched = Fetched(SimpleNamespace(device=GPU))
    recorded.compute.asked.append(("step", 2))
    assert recorded.host == []
    assert fetched.get() is host
    assert recorded.compute.asked == [("step", 1), ("copy", True), ("record", 0), ("step", 2)]
    assert recorded.host == [0]

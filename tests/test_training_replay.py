"""Replaying a step on buffers, and what is refused before a run starts."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from tests.recorders import Recorder
from training.replay import ReplayedStep, check_replayable
from utils.errors import RunError, UserError
from utils.recording import WARM_UP, CudaRecorder


def test_a_form_is_recorded_after_its_warm_up_and_only_once() -> None:
    recorder = Recorder()
    step = ReplayedStep(recorder)
    for number in range(WARM_UP + 3):
        result = step(lambda x, y: x + 10 * y, torch.full((4,), number), torch.ones(4))
        assert torch.equal(result, torch.full((4,), number + 10.0))
    assert recorder.calls == ["warm-up"] * WARM_UP + ["record"] + ["replay"] * 3


def test_another_form_is_computed_as_it_is() -> None:
    recorder = Recorder()
    step = ReplayedStep(recorder)
    for size in (4, 4, 2, 4, 2, 4, 2, 4):  # only its fourth batch of 4 images is recorded
        result = step(lambda x: 2 * x, torch.full((size,), float(size)))
        assert torch.equal(result, torch.full((size,), 2.0 * size))
    assert recorder.calls == ["warm-up"] * 5 + ["record", "replay"] + ["replay"]


def test_one_tensor_given_twice_stays_one() -> None:
    step = ReplayedStep(Recorder())
    labels_B = torch.arange(3)
    for _ in range(WARM_UP + 2):
        assert step(lambda x, y: torch.tensor(x is y), labels_B, labels_B)
    assert not step(lambda x, y: torch.tensor(x is y), labels_B, labels_B.clone())


def test_what_was_recorded_is_replayed_whatever_function_comes() -> None:
    step = ReplayedStep(Recorder())

    def call(factor: float) -> Tensor:
        return step(lambda x: factor * x, torch.ones(2)).clone()

    assert [call(float(n))[0].item() for n in range(WARM_UP + 3)] == [0, 1, 2, 3, 3, 3]


FITS = {
    "device": torch.device("cuda"),
    "world_size": 1,
    "scaler": False,
    "iters_to_accumulate": 1,
    "decides_on_host": False,
}


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"device": torch.device("cpu")}, "--cuda_graph.*GPU"),
        ({"world_size": 2}, "single process"),
        ({"scaler": True}, "--amp_dtype bf16"),
        ({"iters_to_accumulate": 2}, "--iters_to_accumulate"),
        ({"decides_on_host": True}, "this --method"),
    ],
)
def test_what_no_graph_holds_is_refused(change: dict, line: str) -> None:
    check_replayable(**FITS)
    with pytest.raises(UserError, match=line) as caught:
        check_replayable(**FITS | change)
    assert "\n" not in str(caught.value)


def test_nothing_is_collected_while_a_graph_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is left of an older graph goes before; freed in the middle, it would break the new one."""
    events: list[str] = []

    class Old:
        """Refers to itself, as a trainer does that holds a graph."""

        def __init__(self) -> None:
            self.own = self

        def __del__(self) -> None:
            events.append("freed")

    @contextmanager
    def graph(*_: object, **__: object) -> Iterator[None]:
        events.append("begins")
        yield
        events.append("ends")

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: None)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay=lambda: None))
    monkeypatch.setattr(torch.cuda, "graph", graph)
    gc.collect()
    Old()

    def step() -> None:
        Old()
        assert not gc.isenabled()

    CudaRecorder(torch.device("cuda")).record(step)
    assert events == ["freed", "begins", "ends"]
    assert gc.isenabled()
    with pytest.raises(RunError, match="cannot be captured"):
        CudaRecorder(torch.device("cuda")).record(lambda: torch.ones(2) @ torch.ones(3))
    assert gc.isenabled()

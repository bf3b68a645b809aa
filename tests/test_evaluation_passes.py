"""An evaluation counts every image once, however the images are spread over batches and processes."""

import itertools
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from evaluation import passes
from evaluation.counts import EvaluationCounts
from evaluation.passes import REPLAYED_FROM, evaluate
from tests.recorders import Recorder
from utils.recording import WARM_UP

S, K, N = 3, 7, 40
CPU = torch.device("cpu")


class Labelled(NamedTuple):
    images: Tensor
    labels_B: Tensor


class Linear(torch.nn.Module):
    """S linear classifiers of the mean colour."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = torch.nn.Parameter(torch.randn(S, K, 3, generator=generator, dtype=torch.float64))

    def forward(self, images_BCHW: Tensor) -> Tensor:
        return images_BCHW.mean(dim=(2, 3)) @ self.weight.transpose(1, 2)


NETWORK = Linear()
GENERATOR = torch.Generator().manual_seed(1)
IMAGES = torch.randint(0, 256, (N, 3, 4, 4), dtype=torch.uint8, generator=GENERATOR)
LABELS = torch.randint(0, K, (N,), generator=GENERATOR)


def prepare(images: Tensor) -> Tensor:
    return images.double() / 25 - 5


def exits(images: Tensor) -> dict[str, Tensor]:
    return {"second exit": NETWORK(images)[1], "first exit": NETWORK(images)[0]}


def batches(rows: slice, size: int) -> list[Labelled]:
    images, labels = IMAGES[rows], LABELS[rows]
    return [Labelled(*pair) for pair in zip(images.split(size), labels.split(size), strict=True) if len(pair[1])]


def assert_same(found: Any, expected: Any) -> None:
    """Equal up to the order of summation, for nested dicts and lists of numbers."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert_same(found[name], value)
    else:
        assert found == (expected if isinstance(expected, str) else pytest.approx(expected, rel=1e-12))


def run(loader, **options):
    fixed = {"num_networks": S, "num_classes": K, "rule": "mean_softmax", "device": CPU}
    return evaluate(NETWORK, loader, prepare=prepare, **fixed | options)


def test_figures_are_those_of_the_counts():
    found = run(batches(slice(None), 16), extra=exits)
    logits_SNK = NETWORK(prepare(IMAGES)).detach()
    counts = EvaluationCounts(S, K, "mean_softmax")
    counts.update(logits_SNK, LABELS)
    expected = counts.result()
    assert_same({name: found.figures[name] for name in expected}, expected)
    assert torch.equal(found.confusion, counts.confusion_KK)
    first, second = found.figures["acc1"][:2]
    assert found.figures["extra"] == pytest.approx({"first exit": first, "second exit": second})
    assert list(found.figures["extra"]) == ["first exit", "second exit"]


class Meeting:
    """Sums over processes, played one after another: the first round learns the parts, the second hears the total."""

    def __init__(self) -> None:
        self.sums: list[Tensor] = []

    def process(self):
        self.at = 0
        return self

    def __call__(self, value: Tensor) -> Tensor:
        if self.at == len(self.sums):
            self.sums.append(torch.zeros_like(value))
        assert self.sums[self.at].shape == value.shape, "processes disagree on what they add"
        total = self.sums[self.at]
        total += value
        value.copy_(total)
        self.at += 1
        return value


@given(cuts=st.lists(st.integers(0, N), min_size=1, max_size=4), size=st.integers(1, N))
@settings(max_examples=10, deadline=None)
def test_any_shards_give_what_one_process_gives(cuts, size):
    """The last process to arrive at each sum has heard all the others."""
    whole = run(batches(slice(None), N))
    meeting = Meeting()
    edges = [0, *sorted(cuts), N]
    for begin, end in itertools.pairwise(edges):
        last = run(batches(slice(begin, end), size), all_reduce=meeting.process())
    assert torch.equal(last.confusion, whole.confusion)
    assert_same(last.figures, whole.figures)
    assert last.figures["acc1"] == whole.figures["acc1"]


def test_a_process_without_images_takes_part_in_the_sums():
    """One process hears what the other adds, sum by sum; both must add tensors of the same shapes."""
    recorded: list[Tensor] = []

    def record(value: Tensor) -> Tensor:
        recorded.append(value.clone())
        return value

    run(batches(slice(None), 16), extra=exits, all_reduce=record)
    heard = iter(recorded)

    def add_the_other(value: Tensor) -> Tensor:
        other = next(heard)
        assert other.shape == value.shape
        return value.add_(other)

    empty = run([], extra=exits, all_reduce=add_the_other)
    assert next(heard, None) is None
    assert empty.figures["seen"] == N


def test_autocast_reaches_the_network_and_spares_the_counts():
    seen = []

    class Spy(Linear):
        def forward(self, images_BCHW: Tensor) -> Tensor:
            logits_SBK = images_BCHW.float().mean(dim=(2, 3)) @ self.weight.float().transpose(1, 2)
            seen.append(logits_SBK.dtype)
            return logits_SBK

    fixed = {"num_networks": S, "num_classes": K, "rule": "mean_logits", "device": CPU, "prepare": prepare}
    found = evaluate(Spy(), batches(slice(None), N), autocast_dtype=torch.bfloat16, **fixed)
    assert seen == [torch.bfloat16]
    exact = evaluate(NETWORK, batches(slice(None), N), **fixed)
    assert found.figures["ensemble_nll"] == pytest.approx(exact.figures["ensemble_nll"], rel=0.02)


# ---- replayed --------------------------------------------------------------------------------------------------------


@pytest.fixture
def recorder(monkeypatch):
    """Makes recorders that leave the counts alone while they record, as a CUDA graph does."""
    made: list[EvaluationCounts] = []

    class Kept(EvaluationCounts):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            made.append(self)

    monkeypatch.setattr(passes, "EvaluationCounts", Kept)
    return partial(Recorder, changed=lambda: made[-1].tensors())


@pytest.mark.parametrize("fails", [False, True])
def test_replayed_passes_find_what_others_find(recorder, caplog, fails):
    """Five batches of 7 images, and a last one of 5 that is no replay; or none, where recording fails."""
    caplog.set_level("INFO")
    shown: list[list[Tensor]] = []

    def keep(batch: Labelled, logits_SBK: Tensor) -> None:
        shown[-1].append(logits_SBK.clone())

    calls: list[str] = []
    found = []
    for one in (None, recorder(calls, fails=fails)):
        shown.append([])
        found.append(run(batches(slice(None), 7), extra=exits, keep_logits=True, each=keep, recorder=one))
    assert found[1].figures == found[0].figures
    assert torch.equal(found[1].confusion, found[0].confusion)
    assert torch.equal(found[1].logits_SNK, found[0].logits_SNK)
    assert all(torch.equal(*pair) for pair in zip(*shown, strict=True))
    assert calls == WARM_UP * ["warm-up"] + ([] if fails else ["record", "replay", "replay"])
    assert [message for message in caplog.messages if "captured" in message] == ["cannot be captured"] * fails


def test_a_short_evaluation_is_not_worth_a_graph(monkeypatch):
    monkeypatch.setattr(passes, "CudaRecorder", lambda device, refusal: refusal.format("why"))
    places = (("cuda", REPLAYED_FROM - 1), ("cpu", REPLAYED_FROM), ("cuda", REPLAYED_FROM))
    found = [passes.recorder_of_passes(torch.device(device), batches) for device, batches in places]
    line = "a pass over images cannot be captured as a CUDA graph (why): passes are not replayed."
    assert found == [None, None, line]

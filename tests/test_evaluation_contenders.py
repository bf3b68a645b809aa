"""Networks prepared for answering: the bits of autocast, few operations, one recording for each form of images."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from evaluation.contenders import (
    CascadeContender,
    Contender,
    Graphs,
    candidates_of,
    cascade_candidates,
    undivided,
)
from evaluation.latency import Candidate
from model import BackboneRequest, build_splitnet
from model.casting import CastWatch
from model.fold import fold_batch_norm
from model.splitnet import SplitNet
from tests.recorders import Recorder
from tests.test_evaluation_answers import answers_of
from utils.precision import Precision
from utils.recording import WARM_UP

BF16 = Precision("bf16", torch.float32, torch.bfloat16, scaler=False, memory_format=torch.channels_last)
STRATEGIES = ("loop", "parallel", "stacked")


def some_images(count: int = 2) -> Tensor:
    images = torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(count))
    return images.to(torch.bfloat16, memory_format=torch.channels_last)


@contextmanager
def answering() -> Iterator[None]:
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        yield


def contender(arch: str, split_factor: int) -> Contender:
    request = BackboneRequest(arch=arch, split_factor=split_factor)
    network = undivided(request) if split_factor == 1 else build_splitnet(request, seed=0).eval()
    return Contender("some", network, None)


def operations(candidate: Candidate, images: Tensor) -> int:
    """Dispatched in one pass, views, copies and casts included."""
    network: Any = candidate.forward
    watch = CastWatch(network, torch.bfloat16)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), watch:
        network(images)
    return watch.operations


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_candidates_give_the_bits_of_autocast(strategy: str) -> None:
    one, images = contender("resnet20", 2), some_images()
    folded: Any = fold_batch_norm(one.network, (3, 32, 32)).to(memory_format=torch.channels_last)
    folded.execution = strategy
    (candidate,) = candidates_of(one, images, BF16, (strategy,))
    assert candidate.strategy == strategy
    with answering():
        assert torch.equal(candidate.forward(images), folded(images))


@pytest.mark.parametrize("arch", ["wide_resnet16_8", pytest.param("wide_resnet28_10", marks=pytest.mark.slow)])
def test_half_the_operations_of_two_networks_are_those_of_the_undivided_one(arch: str) -> None:
    """At batch 1, where a GPU waits for launches; what is cast in every pass would more than double them."""
    images = some_images(1)
    (large,), (two,) = (
        candidates_of(contender(arch, split_factor), images, BF16, ("loop",)) for split_factor in (1, 2)
    )
    assert operations(two, images) / 2 <= 1.1 * operations(large, images)
    # one layer after another: each convolution, activation, addition and the like is one operation
    assert operations(large, images) < 100


def test_each_form_is_one_graph_that_follows_its_images() -> None:
    events: list[str] = []
    graphs = Graphs(torch.nn.Flatten(), lambda: Recorder(events))
    for size in (1, 8, 1, 8, 8):
        images = torch.rand(size, 2, 3)
        assert torch.equal(graphs(images), images.flatten(1))
    first = ["warm-up"] * WARM_UP + ["record", "replay", "replay"]
    assert events == 2 * first + ["replay"] * 3


def test_the_loop_and_parallel_networks_are_timed_in_graphs_too(caplog: pytest.LogCaptureFixture) -> None:
    images = some_images()

    def names(split_factor: int, strategies: Sequence[str], *, fails: bool = False) -> list[str]:
        found = candidates_of(
            contender("resnet20", split_factor), images, BF16, strategies, recorder=lambda: Recorder(fails=fails)
        )
        with answering():
            plain = found[0].forward(images)
            for one in found:  # logits of a graph are valid until its next call
                torch.testing.assert_close(one.forward(images), plain, rtol=0.1, atol=0.02)
        return [one.strategy for one in found]

    assert names(1, ("loop",)) == ["one network", "one network + graph"]
    assert names(2, STRATEGIES) == ["loop", "loop + graph", "parallel", "parallel + graph", "stacked"]
    with caplog.at_level(logging.INFO):
        assert names(2, ("loop",), fails=True) == ["loop"]
    assert caplog.messages == ["some, loop: cannot be captured"]


def test_a_cascade_is_timed_over_folded_networks_with_its_first_one() -> None:
    four = build_splitnet(BackboneRequest(arch="resnet20", split_factor=4), seed=0).eval()
    network = SplitNet(list(four.models)[:3]).eval()
    images = torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    answers = answers_of()
    assert answers.cascade is not None
    with torch.inference_mode():
        sure = answers.stages(network(images)).confidence_SN[0].sort().values
        between = float((sure[2] + sure[3]) / 2)
        answers = replace(answers, cascade=replace(answers.cascade, bounds=((between,), (0.0,))))
        expected = answers.running_cascade(list(network.models))(images)
    assert expected.stage_B.bincount().tolist() == [3, 3]
    order = answers.cascade.order
    cascade = CascadeContender(answers.running_cascade, order[0], images, 91.0, 88.0)
    precision = Precision("fp32", torch.float32, None, scaler=False, memory_format=torch.contiguous_format)
    first, together = cascade_candidates(cascade, Contender("three", network, 92.0), images, precision)
    assert (first.name, first.strategy, first.accuracy) == ("first network", "one network", 88.0)
    assert (together.name, together.strategy, together.accuracy) == ("three", "cascade", 91.0)
    with torch.inference_mode():
        torch.testing.assert_close(together.forward(images), expected.scores_BK, rtol=1e-4, atol=1e-4)
        alone = network.models[order[0]](images)
        torch.testing.assert_close(first.forward(images)[0], alone, rtol=1e-4, atol=1e-4)

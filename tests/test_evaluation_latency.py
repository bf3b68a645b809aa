"""Latencies: every candidate answers every batch size in turns; table and picture say what was measured."""

from dataclasses import replace
from unittest.mock import Mock

import pytest
import torch

from evaluation import latency
from evaluation.latency import Candidate, Latency, format_latencies, measure, plot_accuracy_latency


def rows():
    common = {"p95_ms": 8.0, "p99_ms": 9.0, "mean_ms": 7.0, "images_per_second": 1234.5, "rounds": 10}
    return [
        Latency(name="large", strategy="one network", batch_size=1, p50_ms=2.0, accuracy=None, **common),
        Latency(name="S = 2", strategy="loop", batch_size=1, p50_ms=3.0, accuracy=50.0, **common),
        Latency(name="large", strategy="one network", batch_size=8, p50_ms=5.0, accuracy=None, **common),
        Latency(name="S = 2", strategy="loop", batch_size=8, p50_ms=4.0, accuracy=50.0, **common),
    ]


def test_candidates_answer_in_turns_and_fill_every_batch(monkeypatch):
    asked = []
    clock = iter(range(10**6))
    monkeypatch.setattr(latency.time, "perf_counter", lambda: float(next(clock)))

    def candidate(name):
        def forward(images):
            assert torch.is_inference_mode_enabled()
            assert torch.equal(images[0], images[-1]) == (len(images) in (1, 4))  # 3 images repeat every 3
            assert images.is_contiguous(memory_format=torch.channels_last)
            asked.append((name, len(images), images.dtype))
            return images

        return Candidate(name=name, strategy="loop", forward=forward, accuracy=12.5)

    images = torch.randn(3, 2, 4, 4).contiguous(memory_format=torch.channels_last)
    found = measure([candidate("a"), candidate("b")], images, batch_sizes=(1, 4, 5), seconds=1)
    assert [(one.name, one.batch_size) for one in found] == [(n, size) for size in (1, 4, 5) for n in "ab"]
    # the clock moves by one second each time it is read, so that every answer takes one
    assert {(one.p50_ms, one.p99_ms, one.accuracy) for one in found} == {(1000.0, 1000.0, 12.5)}
    assert [one.images_per_second for one in found] == [1, 1, 4, 4, 5, 5]
    assert all(one.rounds == latency.LEAST for one in found)
    timed = [name for name, size, _ in asked if size == 5][-2 * latency.LEAST :]
    assert "".join(timed) == "abba" * (latency.LEAST // 2)


def test_autocast_reaches_the_candidates():
    seen = []
    linear = torch.nn.Linear(4, 2)
    candidate = Candidate(
        name="a", strategy="loop", forward=lambda images: seen.append(linear(images.flatten(1)).dtype) or images
    )
    measure([candidate], torch.ones(1, 1, 2, 2), autocast_dtype=torch.bfloat16, batch_sizes=(1,), seconds=0)
    assert set(seen) == {torch.bfloat16}


def test_the_slowest_of_a_few_rounds_is_the_99th_percentile(monkeypatch):
    durations = iter([0.0] * 3 + [1.0] * 9 + [7.0])
    monkeypatch.setattr(latency, "_seconds", lambda *_: next(durations))
    monkeypatch.setattr(latency, "WARMUP_SECONDS", -1)
    (found,) = measure(
        [Candidate(name="a", strategy="loop", forward=torch.neg)], torch.ones(1, 1, 1, 1), batch_sizes=(2,), seconds=-1
    )
    assert (found.p50_ms, found.p95_ms, found.p99_ms, found.images_per_second) == (1000.0, 7000.0, 7000.0, 2.0)
    assert found.mean_ms == 1600.0


def test_the_95th_of_100_rounds_is_no_other(monkeypatch):
    durations = iter([0.0] * 3 + [float(n) for n in range(100, 0, -1)])
    monkeypatch.setattr(latency, "_seconds", lambda *_: next(durations))
    monkeypatch.setattr(latency, "WARMUP_SECONDS", -1)
    monkeypatch.setattr(latency, "LEAST", 100)
    candidate = Candidate(name="a", strategy="loop", forward=torch.neg)
    (found,) = measure([candidate], torch.ones(1, 1, 1, 1), batch_sizes=(1,), seconds=-1)
    assert (found.p95_ms, found.p99_ms, found.mean_ms) == (95_000.0, 99_000.0, 50_500.0)


@pytest.mark.parametrize("size", [1, 4, 16])
def test_every_image_is_timed_as_often_as_the_others(size, monkeypatch):
    seen = []
    monkeypatch.setattr(latency, "WARMUP_SECONDS", -1)
    images = torch.arange(12.0)[:, None, None, None]
    candidate = Candidate(name="a", strategy="cascade", forward=lambda batch: seen.append(batch.flatten()) or batch)
    (found,) = measure([candidate], images, batch_sizes=(size,), seconds=-1, each_image=True)
    timed = torch.cat(seen[-found.rounds :]).long().bincount()
    expected = {1: [1] * 12, 4: [4] * 12, 16: [20] * 4 + [10] * 8}  # 16 are 12 and the first 4 of them again
    assert timed.tolist() == expected[size]
    assert found.rounds >= latency.LEAST


def test_an_answer_is_waited_for_on_the_gpu_where_it_comes(monkeypatch):
    waits = []
    monkeypatch.setattr(torch.cuda, "synchronize", waits.append)
    asked, answered = torch.device("cuda", 0), torch.device("cuda", 1)
    candidate = Candidate(name="a", strategy="2 devices", forward=lambda images: Mock(device=answered))
    latency._seconds(candidate, Mock(device=asked))
    assert waits == [asked, answered]


def test_table_marks_the_fastest_of_each_size_whoever_it_is():
    table = format_latencies(rows())
    assert "| 1 | large | one network | **2.00** | 8.00 | 9.00 | 7.00 | 1,234 |" in table
    assert "| 1 | S = 2 | loop | 3.00 | 8.00 | 9.00 | 7.00 | 1,234 |" in table
    assert "| 8 | S = 2 | loop | **4.00** | 8.00 |" in table
    assert "cascade" not in table
    assert "it cannot be parallel or stacked" in format_latencies([replace(rows()[0], strategy="cascade")])


@pytest.mark.parametrize("sizes", [1, 2])
def test_picture(tmp_path, sizes):
    path = plot_accuracy_latency(rows()[: 2 * sizes], tmp_path / "latency.png")
    assert path.read_bytes()[:4] == b"\x89PNG"

"""What the benchmarks share: turns, ratios of pairs, and what a row and its table say. Nothing here judges a time."""

import json
import math

import pytest
import torch

from benchmarks import report
from benchmarks.report import Side, describe, failure, interleave, judged, markdown, measure, quantile, row, write

CPU = torch.device("cpu")


def side(name, seconds, **more):
    return Side(name=name, dtype="float32", layout="NCHW", seconds=seconds, **more)


def test_cases_take_turns_and_every_round_begins_with_another_one():
    calls = []
    cases = {name: (lambda name=name: calls.append(name)) for name in "abc"}
    times = interleave(cases, CPU, warmup=1, rounds=4)
    assert "".join(calls) == "abc" + "abc" + "bca" + "cab" + "abc"
    assert {name: len(values) for name, values in times.items()} == dict.fromkeys("abc", 4)
    assert all(value >= 0 for values in times.values() for value in values)


class Clock:
    """A clock on which only what is timed takes time."""

    now = 0.0

    def __call__(self):
        return self.now

    def spend(self, seconds):
        self.now += seconds


def test_every_call_is_timed_alone():
    clock = Clock()
    cases = {"slow": lambda: clock.spend(4), "fast": lambda: clock.spend(0.5)}
    assert interleave(cases, CPU, rounds=2, clock=clock) == {"slow": [4, 4], "fast": [0.5, 0.5]}


@pytest.mark.parametrize(("seconds", "rounds"), [(0, 3), (8, 5), (8.5, 5), (100, 50)])
def test_no_round_begins_after_the_budget_of_seconds_but_there_are_three(seconds, rounds):
    clock = Clock()
    times = interleave({"a": lambda: clock.spend(2)}, CPU, warmup=9, rounds=50, seconds=seconds, clock=clock)
    assert times == {"a": [2] * rounds}


def test_several_calls_of_a_sample_are_timed_together_and_shared():
    clock, calls = Clock(), []

    def call():
        calls.append(clock.now)
        clock.spend(2)

    assert interleave({"a": call}, CPU, warmup=0, rounds=2, clock=clock, calls=5) == {"a": [2, 2]}
    assert len(calls) == 10


def test_several_calls_on_a_gpu_lie_between_two_events_and_are_shared(monkeypatch):
    events = []

    class Event:
        def __init__(self, enable_timing):
            self.record = lambda: events.append("record")
            self.synchronize = lambda: events.append("wait")

        def elapsed_time(self, end):
            return 50.0  # ms

    monkeypatch.setattr(torch.cuda, "Event", Event)
    assert report.seconds_of(lambda: events.append("call"), torch.device("cuda"), calls=5) == 0.01
    assert events == ["record", *["call"] * 5, "record", "wait"]


def test_a_case_that_cannot_be_built_costs_no_other_one():
    clock = Clock()

    def broken():
        raise RuntimeError("CUDA out of\nmemory")

    builders = {"a": lambda: lambda: clock.spend(1), "broken": broken, "late": lambda: broken}
    builders["b"] = lambda: lambda: clock.spend(3)
    found = measure(builders, CPU, warmup=1, rounds=2, clock=clock)
    assert found.seconds == {"a": [1, 1], "b": [3, 3]}
    assert found.errors == {"broken": "CUDA out of memory", "late": "CUDA out of memory"}
    assert found.memory_mib == {"a": None, "b": None}
    one = failure("G1", "step", "broken", "bfloat16", found.errors["broken"])
    assert (one["met"], one["ratio"]) == (None, None)
    assert "| G1 | step | broken, bfloat16 | failed: CUDA out of memory | – | – | – | – | – |" in markdown([one])
    assert measure({"broken": broken}, CPU).seconds == {}


class Allocator:
    """torch.cuda's counters of memory; what is built stays, what a call takes is given back."""

    def __init__(self, monkeypatch):
        self.now = self.peak = 0
        monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: None)
        monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: setattr(self, "peak", self.now))
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: self.now)
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: self.peak)
        monkeypatch.setattr(report, "seconds_of", lambda call, *_, **__: (call(), 1.0)[1])

    def take(self, mib, *, keep):
        self.now += mib << 20
        self.peak = max(self.peak, self.now)
        self.now -= 0 if keep else mib << 20


def test_the_memory_of_a_case_is_its_own(monkeypatch):
    memory = Allocator(monkeypatch)

    def eager():
        memory.take(100, keep=True)
        return lambda: memory.take(50, keep=False)

    def graph():
        memory.take(10, keep=True)
        calls = iter(range(9))
        # the first call records and keeps what it took; replays take nothing
        return lambda: memory.take(7, keep=True) if next(calls) == 0 else None

    found = measure({"eager": eager, "graph": graph}, torch.device("cuda"), warmup=2, rounds=2)
    assert found.memory_mib == {"eager": 150, "graph": 17}


def test_a_promise_for_an_h200_is_judged_on_an_h200(monkeypatch):
    gpu, name = torch.device("cuda"), ["NVIDIA L4"]
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name[0])
    one = row("G1", "step", side("ours", [1.0]), side("published", [6.0]), commit=5.0)
    found = judged(one, gpu)
    assert (found["device"], found["met"]) == ("NVIDIA L4", None)
    assert "≥ 5: for an H200" in markdown([found])
    name[0] = "NVIDIA H200"
    assert judged(one, gpu)["met"] is True
    assert judged({**one, "goal": "G5"}, CPU)["met"] is True  # of any machine
    assert judged({"goal": None}, CPU) == {"goal": None, "device": "cpu"}


def test_quantiles_are_numpys():
    values = [3.0, 1.0, 7.0, 4.0]
    for part in (0, 0.1, 0.5, 0.9, 1):
        assert quantile(values, part) == pytest.approx(torch.tensor(values).quantile(part).item())
    assert quantile([2.0], 0.9) == 2.0


def test_the_ratio_is_the_median_of_pairs_per_unit_of_work():
    # pairs: 4, 1, 3; the ratio of medians would be 3
    result = row("G5", "views", side("ours", [1.0, 4.0, 2.0]), side("PIL", [4.0, 4.0, 6.0]), work=10, commit=3.5)
    assert (result["ratio"], result["ratio_min"], result["ratio_max"]) == (3.0, 1.0, 4.0)
    assert (result["met"], result["baseline_dtype"], result["seconds"], result["per_second"]) == (
        False,
        "float32",
        2.0,
        5.0,
    )
    # the baseline made a tenth of the views in a call
    scaled = row("G5", "views", side("ours", [2.0]), side("PIL", [1.0]), work=100, baseline_work=10, commit=5.0)
    assert (scaled["ratio"], scaled["met"]) == (5.0, True)


def test_a_row_without_a_baseline_has_no_ratio_and_meets_nothing():
    result = row(None, "matmul", side("bf16", [0.5, 0.5]), None, work=3.0)
    assert result["ratio"] is None
    assert result["baseline"] is None
    assert "met" not in result
    assert "| – | matmul | bf16, float32 NCHW | – | – | – | 500 (500 – 500) | 6 | – |" in markdown([result])


def test_table_and_json_hold_every_side(tmp_path):
    rows = [
        row("G5", "v", side("ours", [0.5, 0.5], memory_mib=1234.4), side("PIL", [1.0, 2.0]), work=8, commit=2, extra=7)
    ]
    table = markdown(rows)
    assert (
        "| G5 | v | ours, float32 NCHW | PIL, float32 NCHW | 3.00 (2.00 – 4.00) | ≥ 2: met | 500 (500 – 500) "
        "| 16 | 1,234 |" in table
    )
    rows[0]["seconds_p90"] = math.nan
    write(tmp_path / "r.json", rows, device=CPU, command="python -m benchmarks views")
    (found,) = json.loads((tmp_path / "r.json").read_text())
    assert found["goal"] == "G5"
    assert found["extra"] == 7
    assert found["seconds_p90"] is None
    assert found["hardware"]["cores"] >= 1
    assert found["versions"]["torch"] == torch.__version__.split("+")[0] or "torch" in found["versions"]
    assert found["command"] == "python -m benchmarks views"
    assert describe(CPU, "some command").startswith("`some command`,\n20")

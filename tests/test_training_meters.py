"""Means over uneven batches, read once; state that survives a checkpoint."""

import pytest
import torch

from benchmarks.dispatched import CountedOperations
from training.meters import MeanMeter

CPU = torch.device("cpu")


def test_means_are_weighted_by_images() -> None:
    meter = MeanMeter(CPU)
    meter.update({"loss": torch.tensor(1.0), "acc1": torch.tensor([10.0, 20.0])}, 3)
    meter.update({"loss": torch.tensor(5.0), "acc1": torch.tensor([50.0, 60.0])}, 1)
    assert meter.read() == {"acc1": pytest.approx([20.0, 30.0]), "loss": pytest.approx(2.0)}


def test_reading_twice_is_the_same_and_reset_forgets() -> None:
    meter = MeanMeter(CPU)
    meter.update({"loss": torch.tensor(2.0)}, 4)
    assert meter.read() == meter.read() == {"loss": 2.0}
    meter.reset()
    assert meter.read() == {}


def test_sums_over_processes_weigh_their_images() -> None:
    other = torch.tensor([9.0 * 2, 2.0], dtype=torch.float64)  # another process: mean 9 over 2 images
    meter = MeanMeter(CPU)
    meter.update({"loss": torch.tensor(3.0)}, 4)
    assert meter.read(lambda flat: flat + other) == {"loss": pytest.approx((3 * 4 + 9 * 2) / 6)}


def test_state_round_trip() -> None:
    meter, again = MeanMeter(CPU), MeanMeter(CPU)
    meter.update({"loss": torch.tensor(0.1)}, 7)
    again.load_state_dict(meter.state_dict())
    for one in (meter, again):
        one.update({"loss": torch.tensor(0.7)}, 2)
    assert meter.read() == again.read()
    again.load_state_dict()
    assert again.read() == {}
    again.load_state_dict(meter.state_dict(), meter.state_dict())
    assert again.read() == {"loss": pytest.approx((0.1 * 7 + 0.7 * 2) / 9)}
    assert again.count == 18


def test_a_nonfinite_loss_shows() -> None:
    meter = MeanMeter(CPU)
    meter.update({"loss": torch.tensor(float("nan"))}, 1)
    assert meter.read()["loss"] != meter.read()["loss"]


def test_all_means_are_one_sum_and_a_name_that_comes_later_is_counted_too() -> None:
    meter, first = MeanMeter(CPU), {"loss": torch.tensor(2.0), "acc1": torch.tensor([1.0, 3.0], dtype=torch.float64)}
    meter.update(first, 2)
    with CountedOperations() as counted:
        meter.update(first, 2)
    assert counted.calls[torch.ops.aten.add_.Tensor] == 1
    before = meter.state_dict()
    meter.update({**first, "loss_cot": torch.tensor(8.0)}, 4)
    assert before["sums"]["loss"] == 8.0  # a state is a copy
    assert meter.read() == {"loss": 2.0, "acc1": [1.0, 3.0], "loss_cot": 4.0}


def test_what_is_begun_to_be_read_does_not_change() -> None:
    meter = MeanMeter(CPU)
    meter.update({"loss": torch.tensor(2.0)}, 4)
    reading = meter.reading()
    meter.update({"loss": torch.tensor(8.0)}, 4)
    meter.reset()
    assert reading.get() == {"loss": 2.0}

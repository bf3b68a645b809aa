"""The learning rate of every iteration."""

import itertools
import json
import math
from pathlib import Path

import pytest

from training.options import EPOCH_MODES, ITERATION_MODES, OptimizerOptions
from training.schedule import Schedule
from utils.errors import UserError

FOLDER = Path(__file__).parent / "golden"
GOLDEN = json.loads((FOLDER / "lr.json").read_text())["cases"]
CREAM = json.loads((FOLDER / "cream.json").read_text())["retrain_schedule"]
OUR_NAMES = {
    "mode": "lr_mode",
    "init_lr": "lr",
    "num_epochs": "epochs",
    "iters_per_epoch": "steps_per_epoch",
}


@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: f"{case['config']['mode']}-{case['config']['num_epochs']}")
def test_published_learning_rates(case: dict) -> None:
    settings = {OUR_NAMES.get(name, name): value for name, value in case["config"].items()}
    schedule = make(**{"end_lr": 0.0} | settings)
    for epoch, batch, expected in case["points"]:
        step = epoch * case["config"]["iters_per_epoch"] + batch
        assert schedule(step) == pytest.approx(expected, rel=1e-9), (epoch, batch)


def make(lr_mode: str, *, steps_per_epoch: int = 7, staircase: bool = True, **flags: object) -> Schedule:
    options = OptimizerOptions(**{"lr_mode": lr_mode, "epochs": 10, "end_lr": 0.0, **flags})
    return Schedule(options, steps_per_epoch, staircase)


@pytest.mark.parametrize("mode", ITERATION_MODES)
def test_warm_up_rises_to_the_base_rate_and_what_follows_never_rises(mode: str) -> None:
    schedule = make(mode, slow_start_epochs=2, slow_start_lr=0.01, lr_milestones=(3, 5), end_lr=1e-3)
    rates = [schedule(step) for step in range(71)]
    assert rates[:15] == pytest.approx([0.01 + 0.09 * step / 14 for step in range(15)])
    assert all(after <= before for before, after in itertools.pairwise(rates[14:]))
    assert min(rates) >= 1e-3
    assert rates[-1] == schedule(1000) or mode == "exponential"


@pytest.mark.parametrize("mode", ITERATION_MODES)
@pytest.mark.parametrize("slow_start_epochs", [0, -1])
def test_no_warm_up(mode: str, slow_start_epochs: int) -> None:
    schedule = make(mode, slow_start_epochs=slow_start_epochs, slow_start_lr=0.01)
    assert schedule(0) == pytest.approx(0.1, rel=1e-4)
    assert schedule(1) == pytest.approx(0.1, rel=0.05)


def test_floor_holds_in_the_warm_up_too() -> None:
    schedule = make("cos", slow_start_epochs=2, slow_start_lr=0.0, end_lr=0.02)
    assert schedule(0) == 0.02
    assert schedule(14) == 0.1
    assert schedule(69) == 0.02


def test_milestones_count_from_epoch_zero_and_wait_for_the_warm_up() -> None:
    schedule = make("step", slow_start_epochs=2, slow_start_lr=0.01, lr_milestones=(1, 4), lr_step_multiplier=0.5)
    assert schedule(7) == pytest.approx(0.055)
    assert schedule(14) == 0.1
    assert schedule(15) == pytest.approx(0.05)
    assert schedule(27) == pytest.approx(0.05)
    assert schedule(28) == pytest.approx(0.025)


def test_exponential_with_and_without_staircase() -> None:
    stairs = make("exponential", decay_factor=0.5, decay_epochs=2.0)
    slope = make("exponential", decay_factor=0.5, decay_epochs=2.0, staircase=False)
    assert [stairs(step) for step in (0, 13, 14, 27, 28)] == pytest.approx([0.1, 0.1, 0.05, 0.05, 0.025])
    assert slope(7) == pytest.approx(0.1 * math.sqrt(0.5))


def test_linear_ends_at_zero() -> None:
    schedule = make("linear")
    assert [schedule(step) for step in (0, 35, 70, 71)] == pytest.approx([0.1, 0.05, 0.0, 0.0])


@pytest.mark.parametrize("selection", CREAM)
def test_published_retraining_of_cream(selection: str) -> None:
    row = CREAM[selection]
    decay = {"decay_factor": 0.973, "decay_epochs": 2.4} if row["sched"] == "step" else {"decay_epochs": 500.0}
    schedule = make(
        {"step": "epoch_step", "cosine": "epoch_cos"}[row["sched"]],
        lr=0.064,
        epochs=row["total_epochs"],
        slow_start_epochs=3,
        slow_start_lr=1e-6,
        end_lr=0.0 if row["sched"] == "step" else 1e-5,
        **decay,
    )
    for epoch, rate in row["lr_by_epoch"].items():
        for batch in (0, 6):
            assert schedule(7 * int(epoch) + batch) == pytest.approx(rate, rel=1e-9), epoch


@pytest.mark.parametrize("mode", EPOCH_MODES)
def test_epoch_modes_need_no_warm_up_and_never_fall_below_the_floor(mode: str) -> None:
    schedule = make(mode, slow_start_epochs=-1, decay_factor=0.1, decay_epochs=2.0, end_lr=1e-3)
    rates = [schedule(step) for step in range(0, 700, 7)]
    assert rates[0] == pytest.approx(0.1)
    assert all(after <= before for before, after in itertools.pairwise(rates))
    assert rates[-1] == 1e-3


def test_a_warm_up_as_long_as_training_is_no_error() -> None:
    schedule = make("cos", slow_start_epochs=10, slow_start_lr=0.0)
    assert schedule(69) == pytest.approx(0.1 * 69 / 70)
    assert schedule(71) == 0.0
    assert make("poly", slow_start_epochs=12, slow_start_lr=0.0)(70) == pytest.approx(0.1 * 70 / 84)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr_mode": "cosine"}, "--lr_mode: 'cosine' is not one of"),
        ({"epochs": 0}, "--epochs must be 1 or more"),
        ({"decay_epochs": 0.0}, "--decay_epochs must be above 0"),
    ],
)
def test_unusable_settings_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make(**{"lr_mode": "cos", **settings})

"""Going on: flags that changed, and where a run goes on when epochs have other numbers of steps."""

import dataclasses

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from training.resume import Pace, Position, changed_flags, check_classes, position_now
from utils.errors import UserError
from utils.options import SAME, TAKES


def test_flags_that_one_run_does_not_know_are_passed_over() -> None:
    assert changed_flags({"old": 1}, {"new": 2}, {"new": SAME}, {}) == []


@pytest.mark.parametrize(("before", "now", "is_change"), [(True, "1", False), (False, "0", False), (False, "1", True)])
def test_a_switch_that_takes_auto_today_means_what_it_meant(before: bool, now: str, is_change: bool) -> None:
    assert len(changed_flags({"graph": before}, {"graph": now}, {"graph": TAKES}, {})) == is_change


PLACES = st.fixed_dictionaries({"epoch": st.integers(0, 50), "batch": st.integers(0, 40)})


@given(PLACES, st.integers(1, 400), st.integers(1, 64), st.integers(1, 64))
def test_the_share_of_training_stays(place: dict, images: int, size_before: int, size_now: int) -> None:
    assume(min(size_before, size_now) <= images)
    before, now = (
        Pace(steps_per_epoch=max(1, images // size), global_batch=size, images=images)
        for size in (size_before, size_now)
    )
    place["batch"] = min(place["batch"], before.steps_per_epoch)
    place["step"] = place["epoch"] * before.steps_per_epoch + place["batch"]
    try:
        found = position_now(place, before, now, order_follows_batches=False)
    except UserError as error:
        seen = place["batch"] * size_before
        assert "\n" not in str(error)  # noqa: PT017 - either outcome is right, so pytest.raises does not fit
        assert 0 < place["batch"] < before.steps_per_epoch
        assert seen % size_now or seen // size_now > now.steps_per_epoch
        return
    assert found.epoch == place["epoch"]
    assert found.step == found.epoch * now.steps_per_epoch + found.batch
    assert found.done == place["step"]
    assert 0 <= found.batch <= now.steps_per_epoch
    if 0 < place["batch"] < before.steps_per_epoch:
        assert found.batch * size_now == place["batch"] * size_before
    else:
        assert (found.batch == 0) == (place["batch"] == 0)


HUNDRED = Pace(steps_per_epoch=10, global_batch=10, images=100, names="a")


@pytest.mark.parametrize(
    ("batch", "changes", "follows", "line"),
    [
        (3, {"images": 120, "steps_per_epoch": 12}, False, "within epoch 2, after 30 images of 100.*other ones"),
        (3, {"names": "b"}, False, "the training images are other ones"),
        (3, {"global_batch": 20, "steps_per_epoch": 5}, False, "no whole batches make.*--batch_size"),
        (4, {"global_batch": 20, "steps_per_epoch": 5}, True, "order depends on the size of a batch"),
        (0, {"val_fraction": 0.2}, False, "--val_fraction 0.2: other images would be held out"),
    ],
)
def test_what_cannot_go_on_is_refused_in_one_line(batch: int, changes: dict, follows: bool, line: str) -> None:
    place = {"epoch": 1, "batch": batch, "step": 10 + batch}
    now = dataclasses.replace(HUNDRED, **changes)
    with pytest.raises(UserError, match=line) as caught:
        position_now(place, HUNDRED, now, order_follows_batches=follows)
    assert "\n" not in str(caught.value)


def test_a_grown_data_set_goes_on_at_the_next_epoch() -> None:
    now = dataclasses.replace(HUNDRED, images=120, steps_per_epoch=12, names="b")
    place = {"epoch": 2, "batch": 0, "step": 20, "done": 25}
    assert position_now(place, HUNDRED, now, order_follows_batches=True) == Position(2, 0, 24, 25)
    held = dataclasses.replace(HUNDRED, val_fraction=0.1)
    with pytest.raises(UserError, match="held out"):
        position_now(place, held, dataclasses.replace(now, val_fraction=0.1), order_follows_batches=False)


def test_an_evaluation_that_is_due_stays_due() -> None:
    now = dataclasses.replace(HUNDRED, global_batch=30, steps_per_epoch=3)
    place = {"epoch": 1, "batch": 10, "step": 20}
    assert position_now(place, HUNDRED, now, order_follows_batches=False) == Position(1, 3, 6, 20)


@pytest.mark.parametrize(
    ("config", "place", "steps", "size"),
    [
        ({"batch_size": 20}, {"epoch": 0, "batch": 3, "step": 3}, 5, 20),
        ({"batch_size": 30, "drop_last": False}, {"epoch": 0, "batch": 1, "step": 1}, 4, 30),
        ({"batch_size": 30, "drop_last": True}, {"epoch": 0, "batch": 1, "step": 1}, 3, 30),
        ({"batch_size": 20}, {"epoch": 2, "batch": 1, "step": 15}, 7, 20),  # it had other images
    ],
)
def test_older_checkpoints_tell_their_pace(config: dict, place: dict, steps: int, size: int) -> None:
    before = Pace.before({"config": config, "sampler": place}, HUNDRED)
    assert (before.steps_per_epoch, before.global_batch, before.images) == (steps, size, 100)


def test_other_classes_are_refused_by_name() -> None:
    check_classes(None, ("a", "b"))
    check_classes(["a", "b"], ("a", "b"))
    with pytest.raises(UserError, match="class 1 is 'c' in --data and 'b' in the checkpoint"):
        check_classes(["a", "b"], ("a", "c"))
    with pytest.raises(UserError, match="learnt 2 classes, and --data has 3"):
        check_classes(["a", "b"], ("a", "b", "c"))

"""Going on: flags that changed, and where a run goes on when epochs have other numbers of steps."""

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

import training.state
from training.resume import Pace, Position, changed_flags, check_classes, position_now
from training.state import RunState
from utils.errors import UserError
from utils.launch import World
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


# ---- what the bits depend on -----------------------------------------------------------------------------------------


def run_of(device: str, *, processes: int = 1, threads: int | None = None) -> Any:
    """What `RunState` asks for its environment, of a run in so many processes of one machine."""
    return SimpleNamespace(
        flags={"threads": threads},
        world=World(0, processes, 0, processes, torch.device(device)),
        method=SimpleNamespace(network=SimpleNamespace(execution="loop")),
        precision=SimpleNamespace(name="bf16"),
        is_replayed=True,
    )


def test_on_a_gpu_a_checkpoint_knows_it_and_its_library_and_whether_steps_are_replayed(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 92000)
    on_cpu, on_gpu = (RunState.environment(run_of(device)) for device in ("cpu", "cuda"))
    assert {name: value for name, value in on_gpu.items() if name not in on_cpu} == {
        "gpu": "a GPU",
        "cudnn": "92000",
        "cuda_graph": True,
    }


@pytest.mark.parametrize(
    ("before", "now", "processes", "flag", "threads", "lines"),
    [
        (4, 1, 1, None, 4, ["4 thread(s) of the CPU, as the run had before"]),
        (1, 1, 1, None, 1, []),
        (9, 1, 1, None, 1, ["So far threads was 9, now it is 1: the last bits will differ."]),
        (4, 1, 2, None, 4, ["4 thread(s) of the CPU, as the run had before"]),
        (1, 2, 16, None, 1, ["1 thread(s) of the CPU, as the run had before"]),  # fewer than now always fit
        # each of four processes would have four of eight CPUs, and wait for the others' threads
        (4, 1, 4, None, 1, ["So far threads was 4, now it is 1: the last bits will differ."]),
        (4, 1, 1, 1, 1, ["So far threads was 4, now it is 1: the last bits will differ."]),
    ],
)
def test_a_resumed_run_keeps_its_threads_where_all_its_processes_have_room(
    monkeypatch, caplog, before, now, processes, flag, threads, lines
) -> None:
    number = [now]
    monkeypatch.setattr(torch, "get_num_threads", lambda: number[0])
    monkeypatch.setattr(torch, "set_num_threads", lambda count: number.__setitem__(0, count))
    monkeypatch.setattr(training.state, "allowed_cpus", lambda: 8)
    run = run_of("cpu", processes=processes, threads=flag)
    run.environment = lambda: {"threads": number[0]}
    with caplog.at_level("INFO"):
        RunState._check_environment(run, {"threads": before})
    assert number == [threads]
    assert caplog.messages == lines

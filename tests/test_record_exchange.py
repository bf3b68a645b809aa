"""The folder of an exchange: what is read is whole, what is old goes, and a network has one job."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor

from record import safe_tensors
from record.exchange import JOB, KEPT, SILENCE, ExchangeFolder, Lock, Refused
from tests.exchanged import facts_of
from tests.runs import in_fork
from tests.waits import wait_until
from utils.errors import UserError, WriteError


def facts(step: int, **more: object) -> dict:
    return facts_of(0, step, **more)


def state(step: int) -> dict[str, Tensor]:
    """Weights that say of which step they are."""
    return {"weight": torch.full((40, 50), float(step)), "count": torch.tensor(step)}


def test_what_was_published_is_read_back_and_the_newest_two_are_kept(tmp_path):
    folder = ExchangeFolder(tmp_path / "x")
    assert folder.steps(0) == []
    for step in (5, 10, 15):
        folder.publish(facts(step), state(step))
    assert folder.steps(0) == [15, 10]
    names = sorted(path.name for path in folder.place(0).iterdir())
    assert names == sorted(f"step_{step:08d}{end}" for step in (10, 15) for end in (".json", ".safetensors"))
    assert KEPT == 2
    found = folder.facts(0, 15)
    assert found == {**facts(15), **{name: found[name] for name in ("sha256", "bytes", "format_version")}}
    for name, value in folder.weights(found).items():
        assert torch.equal(value, state(15)[name])
    assert folder.networks() == [0]


def test_a_job_that_goes_back_leaves_nothing_of_what_it_has_taken_back(tmp_path):
    folder = ExchangeFolder(tmp_path)
    for step in (10, 15):
        folder.publish(facts(step), state(step))
    folder.publish(facts(12), state(12))
    assert folder.steps(0) == [12, 10]
    folder.publish(facts(12, finished=True), state(12))  # the same weights, other facts
    assert folder.facts(0, 12)["finished"] is True
    folder.publish(facts(12), state(13))
    assert torch.equal(folder.weights(folder.facts(0, 12))["count"], torch.tensor(13))


def test_the_halves_that_a_kill_leaves_are_no_weights_and_go(tmp_path):
    folder = ExchangeFolder(tmp_path)
    folder.publish(facts(5), state(5))
    place = folder.place(0)
    for name in ("step_00000007.safetensors", "step_00000008.safetensors.partial", "step_00000003.json.partial"):
        (place / name).write_bytes(b"half")
    (place / "notes.txt").write_text("of the user")
    assert folder.steps(0) == [5]
    folder.publish(facts(6), state(6))
    left = {path.name for path in place.iterdir()}
    assert {name for name in left if not name.startswith(("step_00000005.", "step_00000006."))} == {"notes.txt"}


def test_a_full_disk_leaves_the_old_weights(tmp_path, monkeypatch):
    folder = ExchangeFolder(tmp_path)
    folder.publish(facts(5), state(5))

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(WriteError, match="No space left"):
        folder.publish(facts(6), state(6))
    monkeypatch.undo()
    assert folder.steps(0) == [5]
    assert int(folder.weights(folder.facts(0, 5))["count"]) == 5
    (tmp_path / "file").write_text("")
    with pytest.raises(WriteError, match="cannot be made"):
        ExchangeFolder(tmp_path / "file" / "x").publish(facts(5), state(5))


@pytest.mark.parametrize(
    "change", [{"step": 6}, {"network": 1}, {"step": True}, {"epoch": False}, {"classes": "ab"}, {"bytes": None}]
)
def test_facts_of_something_else_are_refused(tmp_path, change):
    folder = ExchangeFolder(tmp_path)
    whole = folder.publish(facts(5), state(5))
    path = folder.weights_path(0, 5).with_suffix(".json")
    path.write_text(json.dumps({**whole, **change}))
    with pytest.raises(Refused, match=r"step_00000005\.json"):
        folder.facts(0, 5)


def test_weights_larger_than_the_networks_are_not_read(tmp_path):
    folder = ExchangeFolder(tmp_path)
    whole = folder.publish(facts(5), state(5))
    with pytest.raises(Refused, match="of other networks"):
        folder.weights(whole, most=100)


# ---- one job a network -----------------------------------------------------------------------------------------------


def test_a_second_job_that_meets_a_living_one_ends_with_one_line(tmp_path):
    folder = ExchangeFolder(tmp_path)
    first, second = Lock(folder, 0), Lock(folder, 0)
    first.claim(is_fresh=True)
    with pytest.raises(
        UserError, match=r"--network 0 of --exchange .* is trained by another job that is alive"
    ) as line:
        second.claim(is_fresh=True, wait=lambda _: first.beat({"step": 3}))
    assert "at step 3" in str(line.value)
    assert "\n" not in str(line.value)
    Lock(folder, 1).claim(is_fresh=True)  # another network


def test_of_two_that_begin_at_once_one_goes_on(tmp_path):
    folder = ExchangeFolder(tmp_path)
    first, second = Lock(folder, 0), Lock(folder, 0)
    with pytest.raises(UserError, match="another job that is alive"):
        first.claim(is_fresh=True, wait=lambda _: second.beat({}))
    assert "another job" in first.taken_by()
    assert second.taken_by() == ""


def test_a_killed_job_of_this_machine_is_followed_at_once(tmp_path):
    folder = ExchangeFolder(tmp_path)
    code = f"from record.exchange import *; import time; Lock(ExchangeFolder(Path({str(tmp_path)!r})), 0)"
    command = [sys.executable, "-c", f"{code}.claim(is_fresh=True); print(1, flush=True); time.sleep(60)"]
    with subprocess.Popen(command, cwd=Path(__file__).parent.parent, stdout=subprocess.PIPE) as killed:
        assert killed.stdout is not None
        killed.stdout.readline()
        killed.kill()
        os.waitid(os.P_PID, killed.pid, os.WEXITED | os.WNOWAIT)  # it stays there: a zombie is dead too
        waits: list[float] = []
        Lock(folder, 0).claim(is_fresh=True, wait=waits.append)
    assert len(waits) == 1  # the look back, and none for signs of life


def test_a_job_of_another_machine_is_followed_once_it_is_silent(tmp_path):
    folder = ExchangeFolder(tmp_path)
    first = Lock(folder, 0)
    first.claim(is_fresh=True)
    path = folder.place(0) / JOB
    path.write_text(json.dumps({**json.loads(path.read_text()), "machine": "another"}))
    waits: list[float] = []

    def wait(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == 3:
            os.utime(path, (0, time.time() - SILENCE - 1))

    Lock(folder, 0).claim(is_fresh=True, wait=wait)
    assert len(waits) == 4


def test_a_job_that_has_let_go_is_followed_at_once_and_other_runs_are_not_overwritten(tmp_path):
    folder = ExchangeFolder(tmp_path)
    first = Lock(folder, 0)
    first.claim(is_fresh=True)
    folder.publish(facts(5), state(5))
    first.beat({}, "stopped")
    waits: list[float] = []
    with pytest.raises(UserError, match="already holds network 0 of another run, at step 5: go on with --resume auto"):
        Lock(folder, 0).claim(is_fresh=True, wait=waits.append)
    assert not waits
    Lock(folder, 0).claim(is_fresh=False)
    with pytest.raises(UserError, match="is a file"):
        Lock(ExchangeFolder(folder.weights_path(0, 5)), 0).claim(is_fresh=True)


# ---- kills -----------------------------------------------------------------------------------------------------------


def _publish_for_ever(folder: ExchangeFolder, step: int, begun: int) -> None:
    os.write(begun, b".")
    while True:
        folder.publish(facts(step), state(step))
        step += 1


def _kill_publishers(path: str, kills: int) -> tuple[int, int, int]:
    """Start and kill so many publishers; (sets of weights read, the last step, wrong ones among what was read)."""
    torch.set_num_threads(1)
    os.fsync = lambda _: None  # a killed process loses nothing that it has written, and this takes all the time
    folder, draws = ExchangeFolder(Path(path)), random.Random(5)
    begins, begun = os.pipe()
    newest, read, wrong = 0, 0, 0
    for _ in range(kills):
        # now and then one that goes on from before what was published last, as from a checkpoint
        publisher, start = os.fork(), max(1, newest + draws.choice((1, 1, 1, -1)))
        if publisher == 0:
            _publish_for_ever(folder, start, begun)
        os.read(begins, 1)
        wait_until(lambda: bool(folder.steps(0)), "something is published")
        for is_killed in (False, True):
            time.sleep(draws.uniform(0, 0.01))
            if is_killed:
                os.kill(publisher, signal.SIGKILL)
                os.waitpid(publisher, 0)
            for step in folder.steps(0)[:1]:
                try:
                    found = folder.weights(folder.facts(0, step))
                except FileNotFoundError:  # two newer ones have come meanwhile
                    continue
                read += 1
                wrong += int(found["count"]) != step or not bool((found["weight"] == step).all())
                newest = step
    return read, newest, wrong


@pytest.mark.parametrize("kills", [20, pytest.param(500, marks=pytest.mark.long)])
def test_no_torn_file_is_read_whenever_a_publisher_is_killed(tmp_path, kills):
    read, newest, wrong = in_fork(_kill_publishers, str(tmp_path), kills)
    assert wrong == 0  # and nothing was Refused, which would have been raised
    assert read >= kills
    assert newest > kills // 10


def test_the_same_weights_are_the_same_bytes():
    content = {"state_dict": {"weight": torch.arange(6.0).view(2, 3), "größe": torch.ones(3)}, "epoch": 3}
    packed = {safe_tensors.pack(content) for _ in range(20)}  # the library orders its header anew every time
    assert len(packed) == 1
    tensors = safe_tensors.unpack(packed.pop())
    assert sorted(tensors) == ["größe", "weight"]
    torch.testing.assert_close(tensors["weight"], content["state_dict"]["weight"], rtol=0, atol=0)

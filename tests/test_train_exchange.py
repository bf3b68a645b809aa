"""Jobs with one network each that learn from each other through files: killed, throttled, late, refused, assembled."""

import functools
import itertools
import json
import re
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import eval as evaluation_program
from model import build_splitnet
from parser_params import parse_config
from record import checkpoint as ckpt
from record.exchange import ExchangeFolder
from script import assemble, exchange_status
from tests import kills
from tests.runs import TINY, Finished, Run, train
from tests.test_train_distributed import train_together
from tests.waits import wait_until
from training.exchange import LOG
from utils.errors import UserError

S, STEPS = 4, 12
COMMON = [*TINY, "--batch_size", 32, "--split_factor", S, "--seed", 3, "--max_steps", STEPS, "--print_freq", 2]
COMMON += ["--exchange_every", 2, "--exchange_burn_in", 0]


def job(number: int, folder: Path, *flags: object) -> list[object]:
    """The command line of one of S jobs."""
    return [*COMMON, "--network", number, "--exchange", folder / "x", "--model_dir", folder / f"net{number}", *flags]


def throttled(seconds: float, awaited: Path | None = None) -> kills.Hook:
    """Every step of the run takes so much longer, and its 6th waits until there is a file in a folder."""
    return functools.partial(_throttle, seconds, awaited)


def _throttle(seconds: float, awaited: Path | None) -> None:
    count = itertools.count(1)

    def wait(*_: object, **__: object) -> None:
        time.sleep(seconds)
        if next(count) == 6 and awaited is not None:
            wait_until(lambda: any(awaited.glob("step_*.json")), "another network was published", seconds=240)

    kills.before_calls("training step", wait)


def killed_in_step(number: int, model_dir: Path) -> kills.Hook:
    """The run is killed in a step, but not before one of its checkpoints is written, which happens beside the steps."""
    return kills.do_at_call("training step", number, functools.partial(_kill_with_checkpoint, model_dir))


def _kill_with_checkpoint(model_dir: Path) -> None:
    wait_until(lambda: bool(ckpt.list_checkpoints(model_dir)), "a checkpoint was written", seconds=240)
    kills.end()


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / LOG).read_text().splitlines()]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Finished]]:
    """Four jobs: one fast, one throttled, one killed in its 8th step and started again, one started late."""
    folder = tmp_path_factory.mktemp("jobs")
    saving = ["--save_steps", 3]
    started = {
        0: Run(job(0, folder), folder / "streams0", before=throttled(0.1)),
        1: Run(job(1, folder), folder / "streams1", before=throttled(0.4, folder / "x" / "network_3")),
        2: Run(job(2, folder, *saving), folder / "streams2", before=killed_in_step(8, folder / "net2")),
    }
    assert started[2].wait().code == -9
    again = Run(job(2, folder, *saving, "--resume", "auto"), folder / "streams2", before=throttled(0.1))
    late = Run(job(3, folder), folder / "streams3", before=throttled(0.1))
    runs = [started[0], started[1], again, late]
    return folder, [run.wait() for run in runs]


@pytest.mark.slow
def test_jobs_of_different_speeds_all_end_and_account_for_what_they_took(finished):
    folder, results = finished
    exchange = ExchangeFolder(folder / "x")
    for number, run in enumerate(results):
        assert run.code == 0, run.stderr
        assert "Traceback" not in run.stderr
        assert "damaged" not in run.stderr
        assert (run.result["network"], run.result["steps"]) == (number, STEPS)
        assert exchange.steps(number)[0] == STEPS
        facts = exchange.facts(number, STEPS)
        assert facts["finished"] is True
        assert exchange.job(number)["state"] == "finished"
        weights = {f"module.models.0.{name}": value for name, value in exchange.weights(facts).items()}
        assert ckpt.state_sha256(weights) == run.result["state_sha256"]
        taken = records(folder / f"net{number}")
        assert {line["network"] for line in taken} <= set(range(S)) - {number}
        steps = [line["own_step"] for line in taken]
        assert steps == sorted(steps)
        assert all(step < STEPS for step in steps)
        for line in taken:  # one set of weights has one hash, whoever took it
            assert line["step"] % 2 == 0
            assert len(line["sha256"]) == 64
    hashes: dict[tuple[int, int], set[str]] = {}
    for number in range(S):
        for line in records(folder / f"net{number}"):
            hashes.setdefault((line["network"], line["step"]), set()).add(line["sha256"])
    # the killed one has trained some steps twice, among other peers the second time
    assert all(len(found) <= 1 + (network == 2) for (network, _), found in hashes.items())
    # the throttled one heard of all the others, and the late one found weights at its start
    assert {line["network"] for line in records(folder / "net1")} == {0, 2, 3}
    assert records(folder / "net3")[0]["own_step"] <= 4
    assert "is learnt from, by its weights of step" in results[1].stderr


@pytest.mark.slow
def test_a_killed_job_goes_on_from_its_checkpoint_and_takes_its_peers_anew(finished):
    folder, results = finished
    log = (folder / "net2" / "metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line)["step"] for line in log if '"train"' in line]
    assert steps == sorted(set(steps))
    (place,) = re.findall(r"Going on from .*/checkpoint_0_(\d+)\.pth\.tar", results[2].stderr)
    assert any(line["own_step"] == int(place) for line in records(folder / "net2"))


@pytest.mark.slow
def test_the_networks_become_one_checkpoint_that_eval_takes(finished, tmp_path, capsys):
    folder, results = finished
    out = tmp_path / "ensemble.pth.tar"
    assert assemble.main([str(folder / "x"), "--out", str(out)]) == 0
    assert f"4 x resnet20, of steps {', '.join([str(STEPS)] * S)}\n" in capsys.readouterr().out
    assert evaluation_program.main(["--resume", str(out), "--no_cuda"]) == 0
    shown = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert shown["split_factor"] == S
    for row, run in zip(shown["networks"], results, strict=True):
        assert row["acc1"] == pytest.approx(run.result["ensemble_acc1"], abs=0.3)
    content = ckpt.load_checkpoint(out)
    for number in range(S):
        own = ckpt.load_checkpoint(folder / f"net{number}" / "checkpoint_0_12.pth.tar")["state_dict"]
        for name, value in own.items():
            assert torch.equal(content["state_dict"][name.replace("models.0.", f"models.{number}.")], value)
    # a job's own checkpoint is one network of the division
    path = folder / "net1" / "checkpoint_0_12.pth.tar"
    assert evaluation_program.main(["--resume", str(path), "--no_cuda"]) == 0
    as_tensors = tmp_path / "ensemble.safetensors"
    assert assemble.main([str(folder / "x"), "--out", str(as_tensors)]) == 0
    assert ckpt.state_sha256(ckpt.load_checkpoint(as_tensors)["state_dict"]) == ckpt.state_sha256(content["state_dict"])


@pytest.mark.slow
def test_the_status_says_who_is_where(finished, tmp_path, capsys):
    folder, _ = finished
    assert exchange_status.main([str(folder / "x")]) == 0
    header, *rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert header[:4] == ["network", "job", "step", "epoch"]
    assert [row[:3] for row in rows] == [[str(i), "finished", str(STEPS)] for i in range(S)]
    assert all("%" in row for row in rows)
    assert exchange_status.main([str(tmp_path)]) == 2
    assert exchange_status.main([str(tmp_path / "no")]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 2


@pytest.mark.slow
def test_a_finished_network_is_not_trained_over_and_a_resumed_one_says_that_it_is_done(finished, tmp_path):
    folder, _ = finished
    argv = job(0, folder)
    argv[argv.index("--model_dir") + 1] = tmp_path / "other"
    run = train(argv, tmp_path)
    assert run.code == 2
    assert "already holds network 0 of another run, at step 12: go on with --resume auto" in run.stderr
    again = train([*job(0, folder), "--resume", "auto"], tmp_path)
    assert again.code == 0
    assert "already finished" in again.stderr


@pytest.mark.slow
def test_several_processes_of_a_job_train_as_one(tmp_path):
    """Both take the same peer at the same step, so that the sums of their images are those of one process."""
    argv = [*TINY, "--amp_dtype", "fp64", "--batch_size", 48, "--split_factor", 2, "--seed", 5, "--max_steps", 4]
    argv += ["--is_syncbn", 1, "--exchange_burn_in", 0, "--is_cot_weight_warm_up", 0, "--exchange_every", 2]
    peer = train([*argv, "--network", 1, "--exchange", tmp_path / "x", "--model_dir", tmp_path / "peer"], tmp_path)
    assert peer.code == 0, peer.stderr
    states = []
    for world_size in (1, 2):
        exchange, model = tmp_path / f"x{world_size}", tmp_path / f"m{world_size}"
        facts = ExchangeFolder(tmp_path / "x").facts(1, 4)
        ExchangeFolder(exchange).publish(facts, ExchangeFolder(tmp_path / "x").weights(facts))
        flags = ["--network", 0, "--exchange", exchange, "--model_dir", model]
        train_together([*argv, *flags], tmp_path / f"w{world_size}", world_size)
        assert [(line["network"], line["own_step"]) for line in records(model)] == [(1, 0)]
        states.append(ckpt.load_checkpoint(model / "checkpoint_0_4.pth.tar")["state_dict"])
    for name, value in states[0].items():
        torch.testing.assert_close(states[1][name], value, rtol=1e-9, atol=1e-9)


def test_a_folder_that_cannot_be_written_is_what_on_save_error_says(tmp_path):
    (tmp_path / "x").write_text("a file in the way of a folder")
    where = ["--exchange", tmp_path / "x" / "deeper", "--network", 0]
    argv = [*TINY, "--split_factor", 2, "--seed", 3, "--max_steps", 2, "--exchange_every", 1, "--print_freq", 1, *where]
    run = train([*argv, "--model_dir", tmp_path / "warn"], tmp_path)
    assert run.code == 0, run.stderr
    assert run.result["steps"] == 2
    assert "cannot be made" in run.stderr
    assert "going on" in run.stderr
    run = train([*argv, "--model_dir", tmp_path / "stop", "--on_save_error", "stop"], tmp_path)
    assert run.code == 1
    assert "stopped by --on_save_error stop" in run.stderr
    assert "Traceback" not in run.stderr


def test_network_i_begins_as_it_does_among_all():
    request = parse_config(["--dataset", "digits", "--arch", "resnet20", "--split_factor", "4"]).backbone_request(10)
    whole = build_splitnet(request, seed=5)
    one = build_splitnet(request, seed=5, number=2)
    assert len(one.models) == 1
    assert one.first_network == 2
    for name, value in whole.models[2].state_dict().items():
        assert torch.equal(one.models[0].state_dict()[name], value)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--exchange", "x"], r"--exchange needs --network, which of the 2 networks this job trains: 0 to 1"),
        (["--network", "1"], r"--network is for jobs that exchange their networks: add --exchange DIR"),
        (["--exchange_every", "9"], r"--exchange_every is for jobs that exchange .*: add --exchange DIR"),
        (["--exchange", "x", "--network", "2"], r"--network 2: the 2 networks of --split_factor count from 0 to 1"),
        (["--exchange", "x", "--network", "0", "--split_factor", "1"], r"--exchange needs several networks"),
        (["--exchange", "x", "--network", "0", "--method", "kd"], r"--method kd needs more .* are co_training, dml"),
        (["--exchange", "x", "--network", "0", "--is_train_sep", "1"], r"--is_train_sep 1 trains a network alone"),
        (["--exchange", "x", "--network", "0", "--cuda_graph", "1"], r"--cuda_graph 1 replays .* --exchange"),
        (["--exchange", "x", "--network", "0", "--arch", "resnet20,resnet32", "--split_factor", "2"], r"names 2"),
        (["--exchange", "x", "--network", "0", "--exchange_every", "0"], r"--exchange_every must be 1 or more"),
    ],
)
def test_flags_that_cannot_go_together_are_refused_in_one_line(flags, said):
    with pytest.raises(UserError, match=said) as error:
        parse_config(["--dataset", "digits", "--arch", "resnet20", "--split_factor", "2", *flags])
    assert "\n" not in str(error.value)

"""Snapshots: the cycles of the rate, who is taken when, what stands in the empty places, and going on in mid-cycle."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import eval as evaluation
import train_split
from method import Progress, methods
from method.snapshot import SnapshotOptions
from model import BackboneRequest, build_splitnet
from parser_params import parse_config, resolve_config
from record.checkpoint import load_checkpoint
from tests.rivals import GOLDEN, assert_number
from training.options import OptimizerOptions
from training.schedule import Schedule
from utils.errors import UserError
from utils.targets import plain_targets

REQUEST = BackboneRequest(arch="wrn_16_1", num_classes=10, dataset="digits", crop_size=8)


@pytest.mark.parametrize("row", GOLDEN["snapshot"])
def test_the_rate_is_that_of_equation_2(row: dict[str, Any]) -> None:
    options = OptimizerOptions(
        lr=row["lr"], lr_mode="cycles", lr_cycles=row["cycles"], epochs=row["epochs"], end_lr=0.0, slow_start_epochs=-1
    )
    found = Schedule(options, row["steps_per_epoch"])(row["step_counted_from_0"])
    assert_number(found, row["paper"])


def make(members: int = 3, **options: Any) -> Any:
    kind = methods.get("snapshot")
    options = SnapshotOptions(num_members=members, **options)
    names = kind.backbone_names(REQUEST.arch, options)
    network = build_splitnet(REQUEST, seed=0, archs=names if len(names) > 1 else None)
    return kind(network, options).train()


def train(method: Any, steps: range, *, epochs: int = 2, per_epoch: int = 5) -> list[dict[str, Tensor]]:
    """Plain steps of descent; the network after each of them."""
    after = []
    for step in steps:
        progress = Progress(step // per_epoch, step, step % per_epoch, per_epoch, epochs, 0.1, torch.arange(4))
        views = torch.randn(1, 4, 3, 8, 8, generator=torch.Generator().manual_seed(step))
        targets = plain_targets(torch.tensor([0, 1, 2, 3]))
        method.before_step(views, targets, progress)
        method(views, targets, progress).loss.backward()
        with torch.no_grad():
            for _, parameter in method.trained_parameters():
                parameter -= 0.1 * parameter.grad
                parameter.grad = None
        after.append({name: value.clone() for name, value in method.live.state_dict().items()})
    return after


def is_equal(network: Any, state: dict[str, Tensor]) -> bool:
    return all(torch.equal(value, state[name]) for name, value in network.state_dict().items())


def test_every_member_is_the_network_at_the_end_of_a_cycle() -> None:
    method = make(3)  # 10 steps: cycles of 4, 4 and 2
    after = train(method, range(10))
    method.synchronise()
    for member, step in zip(method.network.models, (3, 7, 9), strict=True):
        assert is_equal(member, after[step])


def test_as_given_takes_the_ends_of_the_last_epochs_and_the_newest_are_kept() -> None:
    method = make(2, snapshot_lr="as_given")
    after = train(method, range(15), epochs=3)
    method.synchronise()
    assert [is_equal(one, after[step]) for one, step in zip(method.network.models, (9, 14), strict=True)] == [
        True,
        True,
    ]

    newest = make(3, snapshot_last=2)
    after = train(newest, range(10))
    newest.synchronise()
    assert [is_equal(one, after[step]) for one, step in zip(newest.network.models, (7, 9), strict=True)] == [True, True]


def test_empty_places_hold_the_network_as_it_is() -> None:
    method = make(3)
    after = train(method, range(6))
    method.synchronise()
    assert [is_equal(one, after[step]) for one, step in zip(method.network.models, (3, 5, 5), strict=True)] == [
        True
    ] * 3


def test_what_compares_networks_has_no_value_before_there_are_two() -> None:
    method = make(3)
    figures = {"acc1": [1.0, 1.0, 1.0], "disagreement": 0.0, "mean_pairwise_js": 0.0, "js_divergence": 0.0}
    train(method, range(4))  # the first cycle's end is taken by the step behind it
    assert method.complete_figures(figures) == {**dict.fromkeys(figures), "acc1": [1.0, 1.0, 1.0]}
    train(method, range(4, 5))
    assert method.complete_figures(figures) == figures
    alone = make(1)
    assert alone.complete_figures(figures) == figures


def test_a_run_stopped_in_mid_cycle_goes_on_to_the_same_bytes() -> None:
    whole = make(3)
    train(whole, range(6))
    whole.synchronise()
    resumed = make(3)
    resumed.network.load_state_dict(whole.network.state_dict())
    resumed.load_training_state(whole.training_state())
    for method in (whole, resumed):
        train(method, range(6, 10))
        method.synchronise()
    assert is_equal(resumed.network, whole.network.state_dict())


def test_one_member_is_ordinary_training() -> None:
    method, alone = make(1), methods.get("independent")(make(1).network, methods.get("independent").Options())
    views, targets = torch.randn(1, 4, 3, 8, 8), plain_targets(torch.tensor([0, 1, 2, 3]))
    progress = Progress(0, 0, 0, 5, 2, 0.1, torch.arange(4))
    outputs = [one.double()(views.double(), targets, progress) for one in (method, alone.train())]
    assert torch.equal(outputs[0].loss, outputs[1].loss)
    for output in outputs:
        output.loss.backward()
    for ours, theirs in zip(method.parameters(), alone.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)
    flags = {"lr": 0.2, "end_lr": 0.0, "slow_start_epochs": -1, "epochs": 3}
    cycle, cosine = (Schedule(OptimizerOptions(lr_mode=mode, **flags), 7) for mode in ("cycles", "cos"))
    assert [cycle(step) for step in range(21)] == pytest.approx([cosine(step) for step in range(21)])


def test_only_the_last_network_trains() -> None:
    method = make(3)
    assert {name.split(".")[2] for name, _ in method.trained_parameters()} == {"2"}


def test_too_short_a_training_is_refused() -> None:
    for members, steps in ((11, 10), (6, 9)):
        with pytest.raises(UserError, match=rf"--num_members {members}: {steps} steps are too few"):
            train(make(members), range(1), epochs=1, per_epoch=steps)
    with pytest.raises(UserError, match=r"--num_members 3: there are 2 epochs"):
        train(make(3, snapshot_lr="as_given"), range(1))


def test_flags() -> None:
    words = ["--method", "snapshot", "--dataset", "cifar10", "--arch", "resnet20"]
    config = resolve_config(parse_config([*words, "--num_estimators", "5"]), data_recipe="cifar10")
    assert (config.lr_mode, config.lr_cycles, config.slow_start_epochs, config.end_lr) == ("cycles", 5, -1, 0.0)
    assert config.is_ensembled_after_softmax
    given = resolve_config(
        parse_config([*words, "--snapshot_lr", "as_given", "--lr_mode", "step"]), data_recipe="cifar10"
    )
    assert given.lr_mode == "step"
    for flags, said in (
        (["--lr_mode", "cos"], "--lr_mode cos: --method snapshot has cycles of its own"),
        (["--split_factor", "2"], "--split_factor 2: --method snapshot divides nothing"),
        (["--arch", "resnet20,resnet32"], "--method snapshot takes one backbone"),
        (["--snapshot_last", "5"], "--snapshot_last 5: there are 4 snapshots"),
        (["--ema_decay", "0.9"], "--ema_decay cannot go with --method snapshot"),
        (["--num_members", "0"], "--num_members must be"),
    ):
        with pytest.raises(UserError, match=said):
            parse_config([*words, *flags])


def test_a_run_keeps_all_members_and_eval_finds_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], logging_restored: None
) -> None:
    run = tmp_path / "run"
    argv = ["--method", "snapshot", "--num_members", "3", "--dataset", "digits", "--arch", "resnet20", "--no_cuda"]
    argv += ["--amp_dtype", "fp32", "--batch_size", "256", "--seed", "1", "--epochs", "1", "--model_dir", str(run)]
    assert train_split.main(argv) == 0
    results = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (results["split_factor"], results["params_total"]) == (3, 3 * results["params_one"])
    assert results["macs_total"] == 3 * results["macs_training"]
    names = load_checkpoint(run / "checkpoint_1.pth.tar")["state_dict"]
    assert {name.split(".")[2] for name in names} == {"0", "1", "2"}
    assert evaluation.main(["--resume", str(run / "checkpoint_1.pth.tar"), "--no_cuda", "--workers", "0"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["split_factor"] == 3
    assert found["ensemble_acc1"] == pytest.approx(results["ensemble_acc1"])

"""Jobs that exchange weights through files: the update is the written-out one, no step waits, peers come and go."""

import copy
import json
import logging
import math
import re
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import train_split
from dataset import SourceRequest, open_source
from dataset.views import ViewMaker, view_spec
from method import Peers
from model import BackboneRequest, build_splitnet
from parser_params import parse_config, resolve_config
from record.exchange import ExchangeFolder
from tests.exchanged import facts_of
from train_split import Trainer
from training import exchange as module
from training.exchange import LOG, Courier, Exchange
from utils.errors import RunError, WriteError
from utils.launch import World

S, ROUNDS, SEED, MOMENTUM = 4, 3, 7, 0.9
WORLD = World(0, 1, 0, 1, torch.device("cpu"))


def trainer_of(folder: Path, *flags: object) -> Trainer:
    """The trainer of a run on digits, in float64, without decay of its weights."""
    argv = [*("--dataset", "digits", "--arch", "resnet20", "--seed", SEED, "--batch_size", 8, "--epochs", 2)]
    argv += ["--amp_dtype", "fp64", "--no_cuda", "--weight_decay", 0, "--model_dir", folder, *flags]
    config = parse_config([str(word) for word in argv])
    source = open_source(SourceRequest(dataset="digits", root=folder, cache_dir=folder, seed=SEED))
    config = resolve_config(config, data_recipe=source.recipe, crop_size=source.crop_size)
    folder.mkdir()
    made = Trainer(config, WORLD, source, None)
    made.method.train()
    return made


def job(number: int, folder: Path, *flags: object, split_factor: int = S) -> Trainer:
    """The trainer of one job of S."""
    where = ["--split_factor", split_factor, "--exchange", folder / "x", "--network", number]
    return trainer_of(folder / f"{number}", *where, "--exchange_every", 1, "--exchange_burn_in", 0, *flags)


def agreement_js(logits: list[Tensor]) -> Tensor:
    """H(mean p) - mean H(p), the mean over the images."""
    probs = [one.softmax(dim=-1) for one in logits]

    def entropy(p: Tensor) -> Tensor:
        return -(p * p.log()).sum(dim=-1)

    return (entropy(sum(probs) / len(probs)) - sum(map(entropy, probs)) / len(probs)).mean()


def agreement_dml(logits: list[Tensor]) -> Tensor:
    """The part of 1 / (S - 1) sum over ordered pairs of KL(constant p_j, p_i) that depends on the one that learns."""
    own = next(one for one in logits if one.requires_grad)
    others = [one for one in logits if one is not own]
    kl = [(p.softmax(-1) * (p.log_softmax(-1) - own.log_softmax(-1))).sum(-1).mean() for p in others]
    return sum(kl) / len(others)


class WrittenOut:
    """The same training in plain torch, with nothing of the methods, the step or the exchange."""

    def __init__(self, trainer: Trainer, agreement, weight: float, *, shared_view: bool) -> None:
        self.networks = [network.double() for network in self._joint(trainer)]
        self.momenta = [[torch.zeros_like(p) for p in network.parameters()] for network in self.networks]
        self.published: dict[int, nn.Module] = {}
        self.seen: list[dict[int, nn.Module]] = [{} for _ in self.networks]
        self.agreement, self.weight, self.shared_view = agreement, weight, shared_view
        spec = view_spec("digits", trainer.config, mean=trainer.source.mean, std=trainer.source.std)
        self.views = ViewMaker(spec, SEED)

    @staticmethod
    def _joint(trainer: Trainer) -> nn.ModuleList:
        """The networks of one joint run of this seed."""
        return build_splitnet(trainer.config.backbone_request(10), seed=SEED).models

    def step(self, i: int, batch, rate: float) -> None:
        network = self.networks[i].train()
        views = self.views.make(batch.images, 0, batch.positions_B, len(self.networks), dtype=torch.float64)
        image = views[0 if self.shared_view else i]
        logits = {i: network(image)}
        with torch.no_grad():
            logits |= {j: peer.eval()(image) for j, peer in self.seen[i].items()}
        loss = -logits[i].log_softmax(-1).gather(1, batch.labels_B[:, None]).mean()
        if len(logits) > 1:
            loss = loss + self.weight * self.agreement([logits[j] for j in sorted(logits)])
        parameters = list(network.parameters())
        gradients = torch.autograd.grad(loss, parameters)
        with torch.no_grad():
            for p, g, v in zip(parameters, gradients, self.momenta[i], strict=True):
                v.mul_(MOMENTUM).add_(g)
                p.sub_(rate * (g + MOMENTUM * v))
        self.published[i] = copy.deepcopy(network)
        self.seen[i] = {j: copy.deepcopy(peer) for j, peer in self.published.items() if j != i}


@pytest.mark.parametrize(
    ("split_factor", "flags", "agreement", "weight"),
    [
        (2, ("--is_cot_weight_warm_up", 0), agreement_js, 0.5),
        pytest.param(4, ("--is_cot_weight_warm_up", 0), agreement_js, 0.5, marks=pytest.mark.slow),
        pytest.param(4, ("--method", "dml"), agreement_dml, 1.0, marks=pytest.mark.slow),
    ],
    ids=["co_training of 2", "co_training of 4", "dml of 4"],
)
def test_jobs_stepped_in_turn_make_the_written_out_update(tmp_path, split_factor, flags, agreement, weight):
    jobs = [job(i, tmp_path, *flags, split_factor=split_factor) for i in range(split_factor)]
    reference = WrittenOut(jobs[0], agreement, weight, shared_view="dml" in flags)
    for i, trainer in enumerate(jobs):  # the same seed gives network i the weights that it has in one joint run
        for key, value in reference.networks[i].state_dict().items():
            assert torch.equal(trainer.network.models[0].state_dict()[key], value)
        trainer.exchange.begin(0, 0, is_fresh=True, given_up=lambda: False)
    batches = [iter(trainer.loader.epoch(0)) for trainer in jobs]
    for _ in range(ROUNDS):
        for i, trainer in enumerate(jobs):
            batch = next(batches[i])
            progress = trainer.progress(batch)
            trainer.exchange.before_step(trainer.position.done)
            metrics = trainer.training_step(batch, progress)
            assert int(metrics["peers"]) == len(reference.seen[i])
            trainer.advance(batch, metrics)
            trainer.exchange.after_step(trainer.position.done, 0)
            assert trainer.exchange.courier.settle(60)
            reference.step(i, batch, progress.learning_rate)
    for i, trainer in enumerate(jobs):
        trainer.exchange.check()
        trainer.exchange.close()
        trainer.saver.close()
        for key, value in trainer.network.models[0].state_dict().items():
            torch.testing.assert_close(value, reference.networks[i].state_dict()[key], rtol=1e-12, atol=1e-12)
    last = split_factor - 1
    lines = [json.loads(line) for line in (tmp_path / f"{last}" / LOG).read_text().splitlines()]
    assert [(line["network"], line["step"], line["own_step"]) for line in lines] == [
        (j, step, step) for step in range(1, ROUNDS) for j in range(last)
    ]


@pytest.mark.parametrize(
    ("of", "flags"),
    [
        ("one whole network", ()),
        ("one whole network of other classes", ()),
        ("one whole network of other classes", ("--is_identical_init", 1)),
        ("all networks", ()),
        ("each network", ()),
    ],
)
def test_a_pretrained_network_i_begins_as_it_does_among_all(tmp_path, monkeypatch, of, flags):
    """Slices, statistics made anew, and heads that start anew are those of one joint run."""
    monkeypatch.setattr(train_split, "STATISTICS_BATCHES", 3)
    request = BackboneRequest(
        arch="resnet20",
        num_classes=7 if "other" in of else 10,
        split_factor=1 if "whole" in of else 2,
        dataset="digits",
        crop_size=16,
    )
    states = [build_splitnet(request, seed=1).state_dict()]
    if of == "each network":
        other = replace(request, num_classes=7)
        states = [one.models[0].state_dict() for one in (build_splitnet(r, seed=1) for r in (request, other))]
    for number, state in enumerate(states):
        torch.save(state, tmp_path / f"{number}.pth")
    files = ",".join(str(tmp_path / f"{number}.pth") for number in range(len(states)))
    pretrained = ["--pretrained", files, *flags]
    joint = trainer_of(tmp_path / "joint", "--split_factor", 2, *pretrained)
    for number in range(2):
        alone = job(number, tmp_path, *pretrained, split_factor=2)
        alone.exchange.close()
        alone.saver.close()
        expected = joint.network.models[number].state_dict()
        for name, value in alone.network.models[0].state_dict().items():
            assert torch.equal(value, expected[name]), (number, name)
        is_new = f"network.models.{number}.fc." in joint.state.new_heads
        assert alone.state.new_heads == ("network.models.0.fc.",) * is_new
    assert bool(joint.state.new_heads) == ("other" in of or of == "each network")
    joint.saver.close()


@pytest.mark.parametrize(("given", "expected"), [((), 4), (("--exchange_burn_in", 2), 2), (("--method", "dml"), 0)])
def test_without_a_flag_the_network_is_alone_as_long_as_the_weight_of_the_others_rises(tmp_path, given, expected):
    flags = ["--epochs", 30, "--split_factor", S, "--exchange", tmp_path / "x", "--network", 0, *given]
    trainer = trainer_of(tmp_path / "m", *flags)
    trainer.exchange.close()
    trainer.saver.close()
    assert trainer.exchange.peers.burn_in == expected


def test_the_moving_average_is_what_is_published(tmp_path):
    trainer = job(0, tmp_path, "--ema_decay", 0.5)
    trainer.exchange.begin(0, 0, is_fresh=True, given_up=lambda: False)
    batch = next(iter(trainer.loader.epoch(0)))
    trainer.training_step(batch, trainer.progress(batch))
    trainer.exchange.after_step(1, 0)
    assert trainer.exchange.courier.settle(60)
    trainer.exchange.close()
    trainer.saver.close()
    folder = ExchangeFolder(tmp_path / "x")
    facts = folder.facts(0, 1)
    assert facts["average"] is True
    state = folder.weights(facts)
    for name, value in trainer.average.state_dict().items():
        assert torch.equal(state[name.removeprefix("models.0.")], value)
    raw = trainer.network.models[0].state_dict()
    assert any(not torch.equal(state[name], raw[name]) for name in raw)


# ---- the policy, with a folder of tiny networks ----------------------------------------------------------------------


def tiny() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 5))


def facts(network: int, step: int, **more: object) -> dict:
    return facts_of(network, step, **{"split_factor": S, "classes": list("abcde")} | more)


def exchange_of(folder: Path, **settings: object) -> Exchange:
    """The exchange of network 0."""
    network = tiny()
    peers = Peers(network, number=0, split_factor=S, seed=0)
    own = {name: value for name, value in facts(0, 0).items() if name not in ("step", "epoch", "finished")}
    run_folder = folder / "run"
    run_folder.mkdir(exist_ok=True)

    def failed(error: WriteError) -> None:
        logging.getLogger("test").warning("%s", error)

    given = {"every": 4, "patience": 8, "failed": failed, **settings}
    courier = Courier(ExchangeFolder(folder / "x"), 0, [1, 2, 3], network.state_dict(), own)
    return Exchange(courier, peers, describe=lambda: own, state=network.state_dict, folder=run_folder, **given)


def test_old_peers_leave_the_loss_and_come_back_and_finished_ones_stay(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    folder = ExchangeFolder(tmp_path / "x")
    folder.publish(facts(1, 3), tiny().state_dict())
    folder.publish(facts(2, 3, finished=True), tiny().state_dict())
    exchange = exchange_of(tmp_path)
    exchange.begin(0, 0, is_fresh=True, given_up=lambda: False)
    present = {}
    for step in range(24):
        exchange.before_step(step)
        present[step] = list(exchange.peers.present)
        if step == 16:
            folder.publish(facts(1, 17), tiny().state_dict())
        exchange.after_step(step + 1, 0)
        assert exchange.courier.settle(30)
    exchange.close()
    assert present[0] == present[8] == [1, 2]
    assert present[12] == present[16] == [2]  # 12 - 3 > 8; the one that has finished never grows old
    assert present[20] == [1, 2]
    lines = [line for line in caplog.messages if line.startswith("network 1")]
    assert lines[0] == "network 1 is learnt from, by its weights of step 3"
    assert lines[1].startswith("network 1 is not learnt from until it is heard of again: its weights are of step 3")
    assert lines[2] == "network 1 is learnt from, by its weights of step 17"
    assert len(lines) == 3


def test_a_peer_that_is_far_ahead_and_silent_leaves_too(tmp_path):
    ExchangeFolder(tmp_path / "x").publish(facts(1, 1000), tiny().state_dict())
    exchange = exchange_of(tmp_path)
    exchange.begin(0, 0, is_fresh=True, given_up=lambda: False)
    present = []
    for step in (0, 4, 8, 12):
        exchange.before_step(step)
        present.append(list(exchange.peers.present))
    exchange.close()
    assert present == [[1], [1], [1], []]


def test_what_was_taken_is_accounted_for_and_a_resumed_run_takes_anew(tmp_path):
    folder = ExchangeFolder(tmp_path / "x")
    written = folder.publish(facts(1, 5), tiny().state_dict())
    log = tmp_path / "run" / LOG
    log.parent.mkdir()
    kept = {"network": 1, "step": 2, "sha256": "a", "finished": False, "own_step": 3}
    log.write_text(json.dumps(kept) + "\n" + json.dumps({**kept, "own_step": 7}) + '\n{"network": 1, "st')
    exchange = exchange_of(tmp_path)
    exchange.begin(6, 0, is_fresh=False, given_up=lambda: False)
    exchange.before_step(6)
    exchange.close()
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    taken = {"network": 1, "step": 5, "sha256": written["sha256"], "finished": False, "own_step": 6}
    assert lines == [kept, taken]
    for name, value in folder.weights(written).items():
        assert torch.equal(exchange.peers.network(1).state_dict()[name], value)
    assert folder.steps(0) == [6]  # what goes on now is published at once


def test_a_folder_that_does_not_answer_delays_no_step(tmp_path, monkeypatch, caplog):
    answer = threading.Event()
    exchange = exchange_of(tmp_path, every=1)
    exchange.begin(0, 0, is_fresh=True, given_up=lambda: False)
    monkeypatch.setattr(ExchangeFolder, "publish", lambda *_: answer.wait(60))
    began = time.monotonic()
    for step in range(50):
        exchange.before_step(step)
        exchange.after_step(step + 1, 0)
    exchange.check()
    assert time.monotonic() - began < 30  # of the 60 that one publication takes
    assert exchange.courier.is_busy()
    assert [line for line in caplog.messages if "the folder is slow" in line] == [caplog.messages[-1]]
    answer.set()
    assert exchange.courier.settle(30)
    exchange.close()


def test_a_folder_that_never_answers_is_gone_on_without(tmp_path, monkeypatch, caplog):
    answer = threading.Event()
    monkeypatch.setattr(module.Lock, "claim", lambda *_, **__: answer.wait(60))
    monkeypatch.setattr(module, "HOLDING", 0.1)
    monkeypatch.setattr(module, "BEAT", 0.1)
    exchange = exchange_of(tmp_path)
    exchange.begin(0, 0, is_fresh=True, given_up=lambda: False)
    exchange.before_step(0)
    assert not exchange.peers.present
    assert "does not answer" in caplog.text
    answer.set()
    exchange.close()


def test_weights_that_cannot_be_written_are_what_on_save_error_says(tmp_path, monkeypatch):
    def full(*_: object) -> None:
        raise WriteError("no space")

    def stop(error: WriteError) -> None:
        raise RunError(f"{error} stopped")

    exchange = exchange_of(tmp_path, every=1, failed=stop)
    exchange.begin(0, 0, is_fresh=True, given_up=lambda: False)
    monkeypatch.setattr(ExchangeFolder, "publish", full)
    exchange.after_step(1, 0)
    assert exchange.courier.settle(30)
    with pytest.raises(RunError, match="no space stopped"):
        exchange.check()
    exchange.check()  # said once
    exchange.close()


def test_another_job_that_takes_the_network_ends_this_one(tmp_path):
    exchange = exchange_of(tmp_path)
    exchange.begin(0, 0, is_fresh=True, given_up=lambda: False)
    other = module.Lock(ExchangeFolder(tmp_path / "x"), 0)
    other.beat({"step": 9})
    exchange.courier._last_beat = -math.inf
    exchange.courier.look()
    assert exchange.courier.settle(30)
    with pytest.raises(RunError, match=r"--network 0 of --exchange .* is trained by another job that is alive"):
        exchange.check()
    exchange.close()
    assert ExchangeFolder(tmp_path / "x").job(0)["token"] == other.token  # its file is left alone


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-9]), "bytes: it is damaged"),
        (lambda path: path.write_bytes(path.read_bytes()[:-9] + b"123456789"), "is damaged: its contents"),
        (lambda path: path.with_suffix(".json").write_text("[" * 5000), "is damaged or no JSON"),
        (lambda path: path.with_suffix(".json").write_text("{}"), "is damaged or of another program"),
    ],
    ids=["truncated", "flipped", "json", "empty"],
)
def test_damaged_files_are_refused_by_name_and_the_old_weights_stay(tmp_path, caplog, spoil, said):
    folder = ExchangeFolder(tmp_path / "x")
    good = tiny().state_dict()
    folder.publish(facts(1, 5), good)
    exchange = exchange_of(tmp_path, every=1)
    exchange.begin(0, 0, is_fresh=True, given_up=lambda: False)
    exchange.before_step(0)
    folder.publish(facts(1, 6), tiny().state_dict())
    spoil(folder.weights_path(1, 6))
    for step in (0, 1):
        exchange.after_step(step + 1, 0)
        assert exchange.courier.settle(30)
        exchange.before_step(step + 1)
    exchange.check()
    exchange.close()
    assert torch.equal(exchange.peers.network(1)[1].weight, good["1.weight"])
    found = [line for line in caplog.messages if said in line]
    assert len(found) == 1  # and not once a look
    assert "step_00000006" in found[0]
    assert "\n" not in found[0]


@pytest.mark.parametrize(
    ("change", "state", "said"),
    [
        ({"classes": list("abcdf")}, None, "of another classes"),
        ({"split_factor": 2}, None, "of another --split_factor"),
        ({"arch": "other"}, None, "of another --arch"),
        ({"widths": [1.0]}, None, "of another widths"),
        ({"mean": [0.5] * 3}, None, "of another normalisation"),
        ({}, {"1.weight": torch.zeros(5, 11), "1.bias": torch.zeros(5)}, r"1.weight is \[5, 11\], expected \[5, 12\]"),
        ({}, {"1.weight": torch.zeros(5, 12)}, "1.bias is missing"),
        ({}, {"1.weight": torch.zeros(5, 12).fill_(math.nan), "1.bias": torch.zeros(5)}, "not finite, in 1.weight"),
    ],
)
def test_weights_of_others_are_refused_by_name(tmp_path, caplog, change, state, said):
    ExchangeFolder(tmp_path / "x").publish(facts(1, 5, **change), state or tiny().state_dict())
    exchange = exchange_of(tmp_path)
    exchange.begin(0, 0, is_fresh=True, given_up=lambda: False)
    exchange.before_step(0)
    exchange.close()
    assert not exchange.peers.present
    (line,) = caplog.messages
    assert re.search(said, line)
    assert "step_00000005.safetensors" in line


def test_an_error_in_the_thread_is_raised_where_the_run_asks(tmp_path, monkeypatch):
    exchange = exchange_of(tmp_path)
    exchange.begin(0, 0, is_fresh=True, given_up=lambda: False)

    def broken(*_: object) -> list[int]:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(ExchangeFolder, "steps", broken)
    exchange.courier.look()
    exchange.courier.settle(30)
    with pytest.raises(ZeroDivisionError):
        exchange.check()
    exchange.close()

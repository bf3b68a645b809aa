"""The Cream search: teacher, gate and meta gradient against worked numbers; whole steps on a tiny space."""

import copy
import dataclasses
import json
import logging
import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
import yaml
from torch import nn

from loss.classification import ClassLoss, cross_entropy
from loss.soft_target import soft_cross_entropy
from method import Progress, methods
from method.cream import Cream
from method.cream.board import BoardEntry, PathSampler
from method.cream.meta import frozen_statistics, match_features, match_gradient, match_scores
from model import LARGE, SMALL, BackboneRequest, build_network, build_splitnet
from model.search.estimates import est_flops
from model.search.reading import read_space, space_to_text
from model.search.space import PUBLISHED, PUBLISHED_SMALL
from tests.spaces import SPACE
from training.options import OptimizerOptions
from training.schedule import Schedule
from utils.errors import UserError
from utils.launch import free_port
from utils.macs import count_macs
from utils.targets import Targets

GOLDEN = json.loads((Path(__file__).parent / "golden" / "cream.json").read_text())
K, SLICE, BATCH = 4, 2, 8
STEPS, EPOCHS = 10, 6


def tiny_method(*, seed=3, dtype=torch.float64, **options):
    settings = {"meta_sta_epoch": 0, "update_iter": 3, "how_to_prob": "even", "pool_size": 3, "meta_lr": 0.5} | options
    request = BackboneRequest(
        arch="cream_supernet",
        num_classes=K,
        shape=SMALL,
        dataset="synthetic",
        crop_size=8,
        options={"search_space": SPACE, "sta_num": (2, 2), "slice": SLICE, "flops_maximum": 0.2},
    )
    method = Cream(
        build_splitnet(request, seed=seed).to(dtype),
        Cream.Options(**settings),
        class_loss=ClassLoss(label_smoothing=0.1),
    )
    method.prepare(torch.zeros(1, dtype=torch.int64), seed)
    return method.train()


def batch(number, dtype=torch.float64, size=BATCH):
    generator = torch.Generator().manual_seed(1000 + number)
    images = torch.randn(1, size, 3, 8, 8, generator=generator, dtype=dtype)
    labels = torch.randint(K, (size,), generator=generator)
    images += labels[None, :, None, None, None]
    return images, Targets(labels, labels, torch.ones(()))


def progress_at(step, learning_rate=0.05):
    return Progress(step // STEPS, step, step % STEPS, STEPS, EPOCHS, learning_rate, torch.arange(BATCH))


def optimizer_of(method):
    parameters = [p for _, p in method.trained_parameters()]
    return torch.optim.SGD(parameters, 0.05, momentum=0.9, nesterov=True, weight_decay=1e-4)


def train(method, optimizer, steps, *, share=slice(None), dtype=torch.float64):
    """Run steps as a trainer does; returns the paths of the students."""
    paths = []
    for step in steps:
        images, targets = batch(step, dtype)
        images, targets = images[:, share], Targets(targets.labels_B[share], targets.labels_other_B[share], targets.lam)
        progress = progress_at(step)
        method.before_step(images, targets, progress)
        paths.append(method._step.path)
        output = method(images, targets, progress)
        optimizer.zero_grad(set_to_none=True)
        output.loss.backward()
        method.reduce_gradients()
        optimizer.step()
        method.after_step(images, targets, output, progress)
    return paths


def equal_states(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


# ---- worked numbers --------------------------------------------------------------------------------------------------


class Toy(nn.Module):
    """logits = (tanh(x stem^T) * block[path]) head^T, in float64."""

    def __init__(self, inputs):
        super().__init__()

        def parameter(values):
            return nn.Parameter(torch.tensor(values, dtype=torch.float64))

        self.stem, self.head = parameter(inputs["stem"]), parameter(inputs["head"])
        self.blocks = nn.ParameterList(map(parameter, inputs["blocks"]))
        self.meta_layer = nn.Linear(len(inputs["meta_weight"][0]), 1, dtype=torch.float64)
        self.meta_layer.weight, self.meta_layer.bias = parameter(inputs["meta_weight"]), parameter(inputs["meta_bias"])

    def forward(self, x, path):
        return (torch.tanh(x @ self.stem.T) * self.blocks[path[0]]) @ self.head.T

    def active_parameters(self, path):
        return [self.stem, self.head, self.blocks[path[0]]]


def make_toy():
    """Golden values, network, board entries, images, labels."""
    golden = GOLDEN["teacher_and_meta_toy"]
    inputs = golden["inputs"]

    def tensor(values):
        return torch.tensor(values, dtype=torch.float64)

    entries = [
        BoardEntry(row["prec1"], row["flops"], row["path"], tensor(row["x"]), tensor(row["probs"]))
        for row in inputs["board"]
    ]
    return golden, Toy(inputs), entries, tensor(inputs["X"]), torch.tensor(inputs["Y"])


@pytest.fixture
def toy():
    return make_toy()


def close(actual, expected):
    expected = torch.as_tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(actual.detach(), expected, rtol=0, atol=1e-10)


def test_scores_gate_and_losses_of_the_toy(toy):
    golden, network, entries, images, labels = toy
    path = golden["inputs"]["student_path"]
    features = match_features(network, path, entries)
    close(network.meta_layer(features).squeeze(1), golden["scores"])
    teacher, score = match_scores(network.meta_layer, features)
    assert teacher == golden["teacher_index"]
    assert entries[teacher].arch == golden["teacher_path"]
    gate = score.sigmoid()
    close(gate, golden["gate_intended"])

    logits_BK = network(images, path)
    ce = cross_entropy(logits_BK, labels, label_smoothing=golden["inputs"]["smoothing"]).mean()
    kd = soft_cross_entropy(logits_BK, network(images, entries[teacher].arch).softmax(1)).mean()
    close(ce, golden["main_step"]["ce"])
    close(kd, golden["main_step"]["kd"])
    close((gate * kd + (2 - gate) * ce) / 2, golden["main_step"]["loss_intended"])


def test_the_first_of_equal_scores_wins(toy):
    golden, network, entries, _, _ = toy
    features = match_features(network, golden["inputs"]["student_path"], entries)
    assert match_scores(network.meta_layer, features[[1, 0, 0]])[0] == 1


def test_meta_gradient_of_the_toy(toy):
    golden, network, entries, images, labels = toy
    inputs, expected = golden["inputs"], golden["intended_meta"]
    before = copy.deepcopy(network.state_dict())
    seen = {}

    def outer_loss(logits_BK):
        seen.update({name: value.clone() for name, value in network.state_dict().items()})
        seen["loss"] = cross_entropy(logits_BK, labels[2:4], label_smoothing=inputs["smoothing"]).mean()
        return seen["loss"]

    found = match_gradient(network, inputs["student_path"], entries, images[:2], images[2:4], outer_loss, inputs["lr"])
    close(found.gate, expected["gate"])
    close(found.kd, expected["kd"])
    close(found.dot, expected["dot"])
    close(found.weight, expected["hypergrad_weight"])
    close(found.bias, expected["hypergrad_bias"])
    close(torch.cat([found.weight.flatten(), found.bias]).norm(), expected["hypergrad_norm"])
    close(seen["loss"], expected["val_loss_after_virtual_step"])
    for name, values in expected["virtual_weights"].items():
        close(seen[{"block1": "blocks.1"}.get(name, name)], values)
    assert equal_states(network.state_dict(), before)
    assert all(parameter.grad is None for parameter in network.parameters())

    optimizer = torch.optim.SGD(network.meta_layer.parameters(), inputs["meta_lr"], momentum=0.9, nesterov=True)
    network.meta_layer.weight.grad, network.meta_layer.bias.grad = found.weight, found.bias
    optimizer.step()
    close(network.meta_layer.weight, expected["meta_weight_after_first_step"])
    close(network.meta_layer.bias, expected["meta_bias_after_first_step"])


def test_meta_gradient_matches_double_backward(toy):
    golden, network, entries, images, labels = toy
    path = golden["inputs"]["student_path"]

    def outer_loss(logits_BK):
        return cross_entropy(logits_BK, labels[2:4]).mean()

    for parameter in network.parameters():
        nn.init.normal_(parameter, generator=torch.Generator().manual_seed(parameter.numel()))
    found = match_gradient(network, path, entries, images[:2], images[2:4], outer_loss, 0.3)
    features = match_features(network, path, entries)
    scores = network.meta_layer(features).squeeze(1)
    gate = scores.max().sigmoid()
    probs = network(images[:2], entries[int(scores.argmax())].arch).softmax(1).detach()
    weights = network.active_parameters(path)
    grads = torch.autograd.grad(soft_cross_entropy(network(images[:2], path), probs).mean(), weights)
    stem, head, block = (w.detach() - 0.3 * gate * g for w, g in zip(weights, grads, strict=True))
    loss = outer_loss((torch.tanh(images[2:4] @ stem.T) * block) @ head.T)
    expected = torch.autograd.grad(loss, [network.meta_layer.weight, network.meta_layer.bias])
    torch.testing.assert_close((found.weight, found.bias), expected, rtol=1e-10, atol=1e-14)


def test_golden_losses():
    golden = GOLDEN["losses"]
    student, teacher = (torch.tensor(golden[f"{who}_logits"]) for who in ("student", "teacher"))
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-6), (torch.bfloat16, 1e-2)):
        logits_BK = student.to(dtype)
        ce = cross_entropy(logits_BK, torch.tensor(golden["targets"]), label_smoothing=golden["smoothing"]).mean()
        kd = soft_cross_entropy(logits_BK, teacher.to(dtype).softmax(1)).mean()
        assert ce.dtype == kd.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert ce.item() == pytest.approx(golden["ce_label_smooth"], rel=tolerance)
        assert kd.item() == pytest.approx(golden["kd"], rel=tolerance)
        gate = golden["gate"]
        assert ((gate * kd + (2 - gate) * ce) / 2).item() == pytest.approx(golden["total"], rel=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_soft_cross_entropy_is_finite_at_extreme_logits(dtype):
    logits_BK = torch.tensor([[1e4, -1e4, 0.0], [-1e4, -1e4, 1e4]], dtype=dtype, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        loss_B = soft_cross_entropy(logits_BK, torch.tensor([[0.2, 0.3, 0.5], [1.0, 0.0, 0.0]], dtype=dtype))
    loss_B.sum().backward()
    assert loss_B.dtype == torch.float32
    assert loss_B.isfinite().all()
    assert logits_BK.grad.isfinite().all()


def test_soft_cross_entropy_of_one_hot_labels_is_cross_entropy():
    logits_BK = torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 1, 2, 3, 3])
    one_hot = nn.functional.one_hot(labels, 4).double()
    torch.testing.assert_close(soft_cross_entropy(logits_BK, one_hot), cross_entropy(logits_BK, labels))


def test_search_schedule():
    golden = GOLDEN["search_lr"]
    options = OptimizerOptions(lr_mode="linear", lr=1.0, epochs=120, slow_start_epochs=-1, end_lr=0.0)
    schedule = Schedule(options, steps_per_epoch=1250)
    assert golden["iters"] == 120 * 1250
    for step, rate in golden["lr_1_0"].items():
        assert schedule(int(step)) == pytest.approx(rate, rel=1e-9, abs=1e-15)


# ---- steps -----------------------------------------------------------------------------------------------------------


def test_before_the_start_epoch_it_is_single_path_training():
    method = tiny_method(meta_sta_epoch=1)
    optimizer = optimizer_of(method)
    train(method, optimizer, range(2 * STEPS))
    assert len(method.board) == 0
    images, targets = batch(0)
    method.before_step(images, targets, progress_at(2 * STEPS))
    output = method(images, targets, progress_at(2 * STEPS))
    assert method._step.teacher is None
    assert (output.metrics["gate"], output.metrics["loss_kd"]) == (0, 0)
    assert output.loss == output.metrics["loss_ce"]
    method.after_step(images, targets, output, progress_at(2 * STEPS))
    assert len(method.board) == 1
    method.before_step(images, targets, progress_at(2 * STEPS + 1))
    assert method._step.teacher is not None


def test_the_loss_of_a_step_and_its_gradient():
    method = tiny_method()
    train(method, optimizer_of(method), range(STEPS, STEPS + 5))
    images, targets = batch(77)
    progress = progress_at(STEPS + 5)
    method.before_step(images, targets, progress)
    method.zero_grad(set_to_none=True)
    step, supernet = method._step, copy.deepcopy(method.supernet)
    output = method(images, targets, progress)
    output.loss.backward()

    features = match_features(supernet, step.path, method.board.entries)
    teacher, score = match_scores(supernet.meta_layer, features)
    assert step.teacher == method.board.entries[teacher].arch
    logits_BK = supernet(images[0], step.path)
    with torch.no_grad():
        probs_BK = supernet(images[0], step.teacher).softmax(1)
    ce = cross_entropy(logits_BK, targets.labels_B, label_smoothing=0.1).mean()
    kd = soft_cross_entropy(logits_BK, probs_BK).mean()
    gate = score.sigmoid()
    loss = (gate * kd + (2 - gate) * ce) / 2
    loss.backward()
    torch.testing.assert_close(output.loss, loss)
    torch.testing.assert_close(output.metrics, {"loss_ce": ce.detach(), "loss_kd": kd.detach(), "gate": gate})
    assert not any(value.requires_grad for value in output.metrics.values())
    assert torch.equal(output.logits_SBK[0], logits_BK)
    for (name, ours), theirs in zip(method.supernet.named_parameters(), supernet.parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None), name
        if ours.grad is not None:
            torch.testing.assert_close(ours.grad, theirs.grad)
    assert method.supernet.meta_layer.weight.grad is None


def test_mixed_labels_enter_the_classification_loss():
    method = tiny_method()
    images, targets = batch(5)
    other = targets.labels_B.roll(1)
    mixed = Targets(targets.labels_B, other, torch.tensor(0.3))
    method.before_step(images, mixed, progress_at(0))
    logits_BK = copy.deepcopy(method.supernet)(images[0], method._step.path)
    loss = 0.3 * cross_entropy(logits_BK, mixed.labels_B, label_smoothing=0.1).mean()
    loss += 0.7 * cross_entropy(logits_BK, other, label_smoothing=0.1).mean()
    assert method(images, mixed, progress_at(0)).loss.item() == pytest.approx(loss.item(), rel=1e-6)


def test_the_best_path_teaches_in_mode_top1():
    method = tiny_method(pick_method="top1")
    before = copy.deepcopy(method.supernet.meta_layer.state_dict())
    train(method, optimizer_of(method), range(STEPS, 2 * STEPS))
    images, targets = batch(50, size=SLICE)
    method.before_step(images, targets, progress_at(2 * STEPS + 6))
    assert method._step.teacher == method.board.entries[0].arch
    assert method._step.gate == 0.5
    assert equal_states(method.supernet.meta_layer.state_dict(), before)


def test_an_entry_keeps_its_own_images_outputs_and_score():
    method = tiny_method()
    train(method, optimizer_of(method), range(STEPS, STEPS + 2))
    images, targets = batch(60)
    progress = progress_at(STEPS + 2)
    method.before_step(images, targets, progress)
    path = method._step.path
    logits_BK = copy.deepcopy(method.supernet)(images[0], path)
    output = method(images, targets, progress)
    method.after_step(images, targets, output, progress)
    (entry,) = [e for e in method.board.entries if torch.equal(e.images, images[0, :SLICE])]
    assert entry.arch == path
    assert entry.score == pytest.approx(100 * (logits_BK.argmax(1) == targets.labels_B).double().mean().item())
    assert entry.flops == est_flops(path, read_space(SPACE)) / 1e6
    torch.testing.assert_close(entry.probs, logits_BK[:SLICE].softmax(1).detach())
    images.zero_()
    assert entry.images.abs().sum() > 0


def test_auxiliary_passes_leave_running_statistics_alone():
    method = tiny_method()
    train(method, optimizer_of(method), range(STEPS, STEPS + 4))
    images, targets = batch(70)
    progress = progress_at(STEPS + 6)
    before = {name: b.clone() for name, b in method.supernet.named_buffers()}
    method.before_step(images, targets, progress)
    assert equal_states(dict(method.supernet.named_buffers()), before)
    plain = copy.deepcopy(method.supernet)
    plain(images[0], method._step.path)
    method(images, targets, progress)
    assert equal_states(dict(method.supernet.named_buffers()), dict(plain.named_buffers()))
    with frozen_statistics(method.supernet):
        assert not method.supernet.bn1.track_running_stats
    assert method.supernet.bn1.track_running_stats


def test_meta_updates_come_when_due_and_change_the_meta_layer_only():
    method = tiny_method(update_iter=3)
    optimizer = optimizer_of(method)
    train(method, optimizer, range(STEPS, STEPS + 1))
    due = []
    for number in range(STEPS, 3 * STEPS):
        images, targets = batch(number)
        before = {name: value.clone() for name, value in method.state_dict().items()}
        method.before_step(images, targets, progress_at(number))
        after = method.state_dict()
        changed = {name for name in before if not torch.equal(before[name], after[name])}
        if changed:
            assert changed == {"network.models.0.meta_layer.weight", "network.models.0.meta_layer.bias"}
            due.append(number)
        train(method, optimizer, range(number, number + 1))
    assert due == [number for number in range(STEPS, 3 * STEPS) if number % STEPS in (3, 6, 9)]
    assert method.supernet.meta_layer.weight.grad is None


def test_the_meta_step_is_clipped_and_its_rate_decays():
    images, targets = batch(80)
    moved = []
    for step in (STEPS + 3, 4 * STEPS + 3):
        method = tiny_method(meta_lr=0.5)
        train(method, optimizer_of(method), range(STEPS, STEPS + 2))
        before = copy.deepcopy(method.supernet.meta_layer)
        method.before_step(images, targets, progress_at(step, learning_rate=1e7))
        meta_layer = method.supernet.meta_layer
        move = torch.cat([(meta_layer.weight - before.weight).flatten(), meta_layer.bias - before.bias]).norm()
        moved.append(move.item())
    steps = STEPS * EPOCHS
    expected = [1.9 * 0.5 * (1 - step / steps) for step in (STEPS + 3, 4 * STEPS + 3)]
    assert moved == pytest.approx(expected, rel=1e-5)


def test_a_non_finite_batch_does_not_reach_the_meta_layer():
    method = tiny_method()
    train(method, optimizer_of(method), range(STEPS, STEPS + 2))
    before = copy.deepcopy(method.supernet.meta_layer.state_dict())
    images, targets = batch(81)
    method.before_step(images * torch.nan, targets, progress_at(STEPS + 3))
    assert equal_states(method.supernet.meta_layer.state_dict(), before)


def test_a_non_finite_path_does_not_reach_the_board():
    """As under --on_nonfinite skip: the step is skipped, and training goes on without it."""
    method = tiny_method()
    images, targets = batch(82)
    progress = progress_at(STEPS + 1)
    method.before_step(images * torch.nan, targets, progress)
    method.after_step(images, targets, method(images * torch.nan, targets, progress), progress)
    assert len(method.board) == 0


def test_what_a_trainer_froze_learns_again():
    request = BackboneRequest(
        arch="cream_supernet", num_classes=K, shape=SMALL, options={"search_space": SPACE, "sta_num": (2, 2)}
    )
    network = build_splitnet(request, seed=0)
    for name in network.models[0].unused_parameter_names():
        network.models[0].get_parameter(name).requires_grad_(False)
    method = Cream(network, Cream.Options(how_to_prob="even"))
    assert len(method.trained_parameters()) == len(list(method.parameters())) - 2


def test_the_meta_layer_is_not_in_the_main_optimiser():
    method = tiny_method()
    names = {name for name, _ in method.trained_parameters()}
    assert {name for name, _ in method.named_parameters()} - names == {
        "network.models.0.meta_layer.weight",
        "network.models.0.meta_layer.bias",
    }


@pytest.mark.parametrize("how_to_prob", ["even", "pre_prob", "teacher"])
def test_how_paths_are_drawn(how_to_prob):
    probs = (0.1, 0.2, 0.7)
    method = tiny_method(how_to_prob=how_to_prob, pre_prob=probs)
    paths = train(method, optimizer_of(method), range(4))
    oracle = PathSampler((2, 2), 3, 3, probs if how_to_prob == "pre_prob" else None)
    assert paths == [oracle.draw() for _ in range(4)]
    train(method, optimizer_of(method), range(STEPS, STEPS + 3))
    on_board = [e.arch for e in method.board.entries]
    oracle.load_state_dict(method.path_sampler.state_dict())
    images, targets = batch(9)
    method.before_step(images, targets, progress_at(STEPS + 4))
    expected = oracle.draw(oracle.histogram(on_board) if how_to_prob == "teacher" else None)
    assert method._step.path == expected


def test_forward_needs_the_path_that_before_step_draws():
    images, targets = batch(1)
    with pytest.raises(RuntimeError, match="before_step"):
        tiny_method()(images, targets, progress_at(0))


def test_learning_on_the_tiny_space():
    method = tiny_method()
    train(method, optimizer_of(method), range(4 * STEPS))
    images, targets = batch(2)
    assert [snapshot["epoch"] for snapshot in method.history] == [1, 2, 3]
    with torch.no_grad():
        accuracy = (
            (method.supernet(images[0], method.supernet.default_path).argmax(1) == targets.labels_B).double().mean()
        )
    assert accuracy >= 0.5


# ---- evaluation, results, state --------------------------------------------------------------------------------------


def test_the_network_evaluates_the_top_board_path_and_the_random_path_is_a_row():
    method = tiny_method()
    train(method, optimizer_of(method), range(STEPS, 2 * STEPS))
    method.eval()
    images, _ = batch(3)
    assert method.supernet.default_path == method.board.entries[0].arch
    top = method.supernet(images[0], method.board.entries[0].arch)
    assert torch.equal(method.network(images)[0], top)
    before = method.path_sampler.state_dict()
    row = method.extra_logits(images[0])["random_path"]
    assert torch.equal(row, method.extra_logits(images[0])["random_path"])
    after = method.path_sampler.state_dict()
    assert torch.equal(after.pop("keys"), before.pop("keys"))
    assert after == before
    rows = set()
    for epoch in range(8):
        method._epoch = epoch
        rows.add(method.extra_logits(images[0])["random_path"].sum().item())
    assert len(rows) > 1


def test_run_files_name_a_network_that_can_be_built(caplog):
    method = tiny_method()
    assert list(method.run_files(final=False)) == ["board.json"]
    with caplog.at_level(logging.WARNING):
        method.run_files(final=True)
    assert "board stayed empty" in caplog.text
    train(method, optimizer_of(method), range(STEPS, 2 * STEPS))
    files = method.run_files(final=True)
    board = json.loads(files["board.json"])
    for entries in (board["board"], board["history"][0]["entries"]):
        assert [{k: v for k, v in row.items() if k != "macs"} for row in entries] == method.board.rows()
    assert (len(board["history"]), board["history"][0]["epoch"]) == (1, 1)
    flags = yaml.safe_load(files["found.yaml"])
    assert (flags.pop("arch"), flags.pop("crop_size")) == ("cream", 8)
    inside = [e for e in method.board.entries if e.flops <= 0.2]
    expected = inside[0] if inside else method.board.entries[0]
    assert json.loads(flags["arch_list"]) == expected.arch
    request = BackboneRequest(arch="cream", num_classes=K, shape=SMALL, options=flags)
    child = build_network(request).double().eval()
    weights = [p.shape for p in child.parameters()]
    assert sorted(weights) == sorted(p.shape for p in method.supernet.active_parameters(expected.arch))
    assert [row["macs"] for row in board["board"] if row["arch"] == expected.arch] == [
        count_macs(child.float(), (3, 8, 8)) / 1e6
    ]


def found_flags(method, arch):
    """What found.yaml says of a board with this one path."""
    size = method.supernet.slice_size
    images, probs = torch.zeros(size, 3, 8, 8), torch.full((size, K), 1 / K)
    method.board.add(BoardEntry(50.0, 0.1, arch, images, probs))
    return yaml.safe_load(method.run_files(final=False)["found.yaml"])


@pytest.mark.parametrize("pool", ["avg", "max", "avgmax"])
def test_what_was_found_keeps_the_pooling_of_the_search(pool):
    method = tiny_method()
    method.supernet.global_pool = pool
    flags = found_flags(method, [[0], [1, 2], [0, 1], [0]])
    child = build_network(BackboneRequest(arch="cream", num_classes=K, shape=SMALL, options=flags))
    assert child.global_pool == pool


@pytest.mark.parametrize("shape", [SMALL, LARGE])
@pytest.mark.parametrize("text", [None, space_to_text(PUBLISHED), space_to_text(PUBLISHED_SMALL)])
def test_what_was_found_keeps_the_space_of_the_search(shape, text):
    """Also where it is the published space, given for images that take another one by default."""
    request = BackboneRequest(arch="cream_supernet", num_classes=K, shape=shape, options={"sta_num": (1,) * 5})
    if text:
        request = dataclasses.replace(request, options={**request.options, "search_space": text})
    with torch.device("meta"):
        network = build_splitnet(request, seed=0)
    arch = [[0], *[[2]] * 5, [0]]
    flags = found_flags(Cream(network, Cream.Options()), arch)
    assert ("search_space" in flags) == (network.models[0].space != (PUBLISHED if shape == LARGE else PUBLISHED_SMALL))
    with torch.device("meta"):
        child = build_network(dataclasses.replace(request, arch="cream", options=flags))
    assert child.plan == network.models[0].space.plan(arch, K, honour_single_block=True)


def test_a_result_outside_the_interval_is_said(caplog):
    method = tiny_method()
    train(method, optimizer_of(method), range(STEPS, STEPS + 3))
    method.supernet.interval = (0.0, 1e-6)
    with caplog.at_level(logging.WARNING):
        assert "found.yaml" in method.run_files(final=False)
        assert not caplog.text
        assert json.loads(yaml.safe_load(method.run_files(final=True)["found.yaml"])["arch_list"]) == (
            method.board.entries[0].arch
        )
    assert "no path on the board" in caplog.text


def test_resume_is_exact(tmp_path):
    unbroken = tiny_method()
    optimizer = optimizer_of(unbroken)
    train(unbroken, optimizer, range(STEPS, STEPS + 7))
    torch.save(
        {
            "network": unbroken.network.state_dict(),
            "method": unbroken.training_state(),
            "optimizer": optimizer.state_dict(),
        },
        tmp_path / "state.pt",
    )
    paths = train(unbroken, optimizer, range(STEPS + 7, 3 * STEPS))

    state = torch.load(tmp_path / "state.pt", weights_only=True)
    resumed = tiny_method(seed=99)
    resumed.network.load_state_dict(state["network"])
    resumed.prepare(torch.zeros(1, dtype=torch.int64), 3)
    resumed.load_training_state(state["method"])
    optimizer = optimizer_of(resumed)
    optimizer.load_state_dict(state["optimizer"])
    assert train(resumed, optimizer, range(STEPS + 7, 3 * STEPS)) == paths
    assert resumed.board.rows() == unbroken.board.rows()
    assert resumed.history == unbroken.history
    assert equal_states(resumed.state_dict(), unbroken.state_dict())
    assert resumed.supernet.default_path == unbroken.supernet.default_path


def test_a_run_resumed_for_its_evaluation_alone_evaluates_the_same(tmp_path):
    """A run stopped within an epoch's evaluation makes no step before the next one."""
    unbroken = tiny_method()
    train(unbroken, optimizer_of(unbroken), range(STEPS, STEPS + 1))
    wide = torch.randn(1, BATCH, 3, 12, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(BATCH) % K
    targets, progress = Targets(labels, labels, torch.ones(())), progress_at(4 * STEPS - 1)
    unbroken.before_step(wide, targets, progress)
    unbroken.after_step(wide, targets, unbroken(wide, targets, progress), progress)

    torch.save({"network": unbroken.network.state_dict(), "method": unbroken.training_state()}, tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    resumed = tiny_method()
    resumed.network.load_state_dict(state["network"])
    resumed.load_training_state(state["method"])
    images, _ = batch(3)
    rows = [m.eval().extra_logits(images[0])["random_path"] for m in (unbroken, resumed, tiny_method())]
    assert torch.equal(rows[0], rows[1])
    files = resumed.run_files(final=True)
    assert files == unbroken.run_files(final=True)
    assert yaml.safe_load(files["found.yaml"])["crop_size"] == 12


def test_unused_blocks_do_not_move():
    method = tiny_method()
    optimizer = optimizer_of(method)
    train(method, optimizer, range(6))
    before = {name: p.clone() for name, p in method.supernet.named_parameters()}
    (path,) = train(method, optimizer, range(6, 7))
    active = {id(p) for p in method.supernet.active_parameters(path)}
    for name, parameter in method.supernet.named_parameters():
        assert torch.equal(parameter, before[name]) == (id(parameter) not in active), name


# ---- what the user gives ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        ({"pool_size": 0}, "--pool_size"),
        ({"update_iter": 0}, "--update_iter"),
        ({"acc_gap": -1.0}, "--acc_gap"),
        ({"meta_lr": float("nan")}, "--meta_lr"),
        ({"pick_method": "best"}, "--pick_method"),
        ({"how_to_prob": "random"}, "--how_to_prob"),
        ({"pre_prob": (0.5, 0.6)}, "--pre_prob"),
        ({"pre_prob": (1.5, -0.5)}, "--pre_prob"),
        ({"pre_prob": (0.5, float("nan"))}, "--pre_prob"),
        ({"pre_prob": (float("nan"), 0.5)}, "--pre_prob"),
        ({"pre_prob": ()}, "--pre_prob"),
    ],
)
def test_wrong_options_are_refused(options, fault):
    with pytest.raises(UserError, match=fault):
        Cream.Options(**options)


def test_what_does_not_fit_together_is_refused():
    with pytest.raises(UserError, match=r"--pre_prob.* 6 .* 3"):
        tiny_method(how_to_prob="pre_prob")
    method = tiny_method()
    images, targets = batch(0, size=2 * SLICE - 1)
    with pytest.raises(UserError, match=r"--batch_size.* 3 images"):
        method.before_step(images, targets, progress_at(0))
    request = BackboneRequest(arch="resnet20", num_classes=K, shape=SMALL)
    with pytest.raises(UserError, match="--arch cream_supernet"):
        Cream(build_splitnet(request, seed=0), Cream.Options())


def test_recipe():
    assert methods.get("cream") is Cream
    published = Cream.recipe("imagenet", None)
    wanted = {"lr": 1.0, "epochs": 120, "lr_mode": "linear", "weight_decay": 1e-4, "meta_sta_epoch": 20, "end_lr": 0.0}
    wanted |= {
        "is_label_smoothing": True,
        "is_amp": False,
        "is_mixup": False,
        "is_nesterov": True,
        "no_decay": "norm_bias",
    }
    assert {name: published[name] for name in wanted} == wanted
    assert "crop_size" not in published
    assert Cream.recipe("imagenet", 12)["meta_sta_epoch"] == 2
    assert Cream.recipe("imagenet", None, {"flops_maximum": 43.0})["crop_size"] == 160
    assert "crop_size" not in Cream.recipe("imagenet", None, {"flops_maximum": 300.0})
    assert "crop_size" not in Cream.recipe("imagenet", None, {"flops_maximum": 43.0, "sta_num": (1, 1, 1, 1, 1)})
    with pytest.raises(UserError, match="--flops_minimum"):
        Cream.recipe("imagenet", None, {"flops_minimum": 600.0, "flops_maximum": 700.0})


# ---- processes -------------------------------------------------------------------------------------------------------


def toy_gradient(rank):
    """Meta gradient of the toy where every process has its own slices, and its own images on the board."""
    golden, network, entries, images, labels = make_toy()
    entries = [dataclasses.replace(e, images=e.images * (1 + rank / 2)) for e in entries]
    own, outer = [rank], [2 + rank]
    return match_gradient(
        network,
        golden["inputs"]["student_path"],
        entries,
        images[own],
        images[outer],
        lambda logits_BK: cross_entropy(logits_BK, labels[outer]).mean(),
        golden["inputs"]["lr"],
    )


def _search_in_a_process(rank, world_size, port, folder):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=world_size)
    toy = toy_gradient(rank)
    method = tiny_method()
    size = BATCH // world_size
    steps = range(STEPS - 2, STEPS + 48)
    paths = train(method, optimizer_of(method), steps, share=slice(rank * size, (rank + 1) * size))
    running = method.supernet.bn1.running_mean.clone()
    local = {name: p.detach() for name, p in method.named_parameters()}
    method.synchronise()
    torch.save(
        {
            "toy": {"teacher": toy.teacher, "gate": toy.gate, "dot": toy.dot, "weight": toy.weight, "bias": toy.bias},
            "paths": paths,
            "parameters": local,
            "buffers": dict(method.named_buffers()),
            "running": running,
            "board": method.board.state_dict(),
            "momentum": method.meta_optimizer.state_dict()["state"],
        },
        f"{folder}/{rank}.pt",
    )
    dist.destroy_process_group()


def check_toy_of_two(first, second):
    """G, V, scores and the result are means over processes: worked out here with both processes' data at hand."""
    golden, network, entries, images, labels = make_toy()
    path, rate = golden["inputs"]["student_path"], golden["inputs"]["lr"]
    features = torch.stack(
        [
            match_features(network, path, [dataclasses.replace(e, images=e.images * (1 + share)) for e in entries])
            for share in (0.0, 0.5)
        ]
    )
    scores = network.meta_layer(features).squeeze(2).mean(0)
    teacher, gate = int(scores.argmax()), scores.max().sigmoid()
    weights = network.active_parameters(path)
    probs = network(images[:2], entries[teacher].arch).softmax(1).detach()
    inner = torch.autograd.grad(soft_cross_entropy(network(images[:2], path), probs).mean(), weights)
    with torch.no_grad():
        for weight, gradient in zip(weights, inner, strict=True):
            weight.sub_(rate * gate * gradient)
    outer = torch.autograd.grad(cross_entropy(network(images[2:4], path), labels[2:4]).mean(), weights)
    dot = sum((g * v).sum() for g, v in zip(inner, outer, strict=True))
    slope = -rate * dot * gate * (1 - gate)
    for found in (first, second):
        assert found["teacher"] == teacher
        close(found["gate"], gate.detach())
        close(found["dot"], dot.detach())
        close(found["weight"], (slope * features[:, teacher].mean(0))[None].detach())
        close(found["bias"], slope[None].detach())
        assert torch.equal(found["weight"], first["weight"])


@pytest.mark.slow
def test_two_processes_stay_one_search(tmp_path):
    torch.multiprocessing.spawn(_search_in_a_process, (2, free_port(), str(tmp_path)), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    check_toy_of_two(first["toy"], second["toy"])
    assert first["paths"] == second["paths"]
    assert len(first["paths"]) == 50
    assert equal_states(first["parameters"], second["parameters"])
    assert first["momentum"]
    assert torch.equal(first["momentum"][0]["momentum_buffer"], second["momentum"][0]["momentum_buffer"])
    assert not torch.equal(first["running"], second["running"])
    assert equal_states(first["buffers"], second["buffers"])
    mean = (first["running"] + second["running"]) / 2
    torch.testing.assert_close(first["buffers"]["network.models.0.bn1.running_mean"], mean)
    assert len(first["board"]) == 3
    for ours, theirs in zip(first["board"], second["board"], strict=True):
        assert (ours["score"], ours["flops"], ours["arch"]) == (theirs["score"], theirs["flops"], theirs["arch"])
        assert torch.equal(ours["images"], theirs["images"])
        assert torch.equal(ours["probs"], theirs["probs"])

"""What every registered method promises: a step, bf16, exact resume, several processes, every family of backbones.

A new method is picked up from the registry; it is tried with two small networks unless `SPECIAL` says otherwise.
"""

import dataclasses
import functools
import json
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import eval as evaluation
import train_split
from dataset.views import ViewMaker
from loss.classification import CROSS_ENTROPY, ClassLoss, cross_entropy
from method import Method, Progress, StepOutput, Targets, methods
from model import LARGE, SMALL, BackboneRequest, backbones, build_network, build_splitnet
from model.splitnet import SplitNet
from model.staged import StagedBackbone
from record.checkpoint import load_checkpoint, save_checkpoint
from record.run_folder import read_results
from tests.processes import run_processes
from tests.spaces import SPACE
from training.copies import WeightCopies
from training.optim import build_optimizer, parameter_groups
from training.options import OptimizerOptions
from training.step import forward_backward
from utils.errors import UserError
from utils.options import option
from utils.precision import choose_precision

K, B, SIDE = 4, 8, 8
REQUEST = BackboneRequest(arch="wrn_16_1", num_classes=K, dataset="synthetic", crop_size=SIDE)
SUPERNET = {"search_space": SPACE, "sta_num": (2, 2), "slice": 2, "flops_maximum": 0.2}
SPECIAL = {"cream": dataclasses.replace(REQUEST, arch="cream_supernet", options=SUPERNET)}
OPTIONS: dict[str, dict[str, Any]] = {
    "l_mcl": {"feat_dim": 8, "meta_freq": 2},
    "cream": {"meta_sta_epoch": 0, "update_iter": 2, "how_to_prob": "even", "pool_size": 3, "meta_lr": 0.5},
    "kd": {"teacher": "a trained network"},
}
TRAINING_LABELS = torch.arange(40) % K
FP32 = choose_precision(torch.device("cpu"), is_amp=False, amp_dtype="fp32")
BF16 = choose_precision(torch.device("cpu"), is_amp=True, amp_dtype="bf16")
every_method = pytest.mark.parametrize("name", methods.names())


@functools.cache
def trained_network() -> str:
    """A checkpoint of two small networks, for a method that asks for one."""
    path = Path(tempfile.mkdtemp()) / "teacher.pth.tar"
    network = build_splitnet(REQUEST, seed=9, archs=[REQUEST.arch] * 2)
    config = {"arch": f"{REQUEST.arch},{REQUEST.arch}", "dataset": "synthetic", "crop_size": SIDE}
    save_checkpoint({"state_dict": network.state_dict(), "config": config}, path)
    return str(path)


def options_of(name: str) -> Any:
    given = OPTIONS.get(name, {})
    if "teacher" in given:
        given = {**given, "teacher": trained_network()}
    return methods.get(name).Options(**given)


def make(name: str, *, weights: int = 3, network: SplitNet | None = None) -> Method:
    """A method on small networks, ready to train."""
    kind = methods.get(name)
    if network is None:
        archs = None if name in SPECIAL else [REQUEST.arch] * (2 if kind.networks_from_list else 1)
        request = SPECIAL.get(name, REQUEST)
        request = dataclasses.replace(request, form=kind.member_form(options_of(name), request, 3))
        network = build_splitnet(request, seed=weights, archs=archs)
    torch.manual_seed(weights)
    method = kind(network, options_of(name))
    method.prepare(TRAINING_LABELS, 3)
    return method.train()


def optimizer_of(method: Method) -> torch.optim.Optimizer:
    options = OptimizerOptions(optimizer="SGD", lr=0.05, weight_decay=1e-4)
    return build_optimizer(options, parameter_groups(method, method.trained_parameters(), options))


def batch(method: Method, number: int, rank: int = 0, *, size: int = B, side: int = SIDE) -> tuple[Tensor, Targets]:
    generator = torch.Generator().manual_seed(100 * number + rank)
    views = torch.randn(
        1 if method.shared_view else method.network.num_members, size, 3, side, side, generator=generator
    )
    labels = torch.arange(size) // 2 % K
    return views, Targets(labels, labels, torch.tensor(1.0))


def step(
    method: Method,
    number: int,
    optimizer: torch.optim.Optimizer,
    *,
    model: nn.Module | None = None,
    rank: int = 0,
    precision: Any = FP32,
    copies: WeightCopies | None = None,
    **size: int,
) -> StepOutput:
    """One step as the trainer makes it."""
    views, targets = batch(method, number, rank, **size)
    progress = Progress(0, number, number, 10, 2, 0.05, torch.arange(len(targets.labels_B)) + 8 * rank, 1e-4)
    torch.manual_seed(number)
    method.before_step(views, targets, progress)
    optimizer.zero_grad(set_to_none=True)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    output = forward_backward(
        model or method, views, targets, progress, precision=precision, scaler=scaler, scale=1.0, copies=copies
    )
    if method.reduces_own_gradients:
        method.reduce_gradients()
    optimizer.step()
    method.after_step(views, targets, output, progress)
    return output


@every_method
def test_copies_of_the_weights_change_no_bit(name: str) -> None:
    """What replayed steps compute with in bf16, wherever a method uses weights otherwise, shares or replaces them."""
    states = []
    for has_copies in (False, True):
        method = make(name)
        if method.decides_on_host or "cuda_graph" in method.incompatible:
            pytest.skip("its steps are not replayed")
        optimizer = optimizer_of(method)
        copies = WeightCopies(method, method.network, torch.bfloat16) if has_copies else None
        for number in range(4):
            step(method, number, optimizer, precision=BF16, copies=copies)
        states.append(method.state_dict())
    assert states[0].keys() == states[1].keys()
    for key, value in states[0].items():
        assert torch.equal(states[1][key], value), key


@every_method
def test_a_step_trains_and_says_what_it_did(name: str) -> None:
    method = make(name)
    before = {n: p.detach().clone() for n, p in method.trained_parameters()}
    optimizer = optimizer_of(method)
    output = step(method, 1, optimizer)
    assert output.loss.shape == ()
    assert output.loss.isfinite()
    assert output.logits_SBK.shape == (method.network.num_members, B, K)
    assert not output.logits_SBK.requires_grad
    for key, value in output.metrics.items():
        assert (value.shape, value.requires_grad) == ((), False), key
    assert "loss_ce" in output.metrics
    moved = {n for n, p in method.trained_parameters() if not torch.equal(p, before[n])}
    learning = {n for n, p in method.trained_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    # a bias that a batch norm takes away again learns nothing but rounding
    idle = {n for n in before if re.search(r"(gate\.linear|exits\.\d\.\d\.layers\.\d)\.bias$", n)}
    assert learning - idle <= moved
    if name not in SPECIAL:  # Cream trains the sampled path only
        assert learning | idle == moved | idle == before.keys()
    assert all(value.isfinite().all() for value in method.state_dict().values())
    images = torch.randn(3, 3, SIDE, SIDE)
    method.eval()
    with torch.no_grad():
        rows = method.extra_logits(images)
    assert all(row.shape == (3, K) for row in rows.values())

    low = make(name)
    rough = step(low, 1, optimizer_of(low), precision=BF16)
    torch.testing.assert_close(rough.loss.float(), output.loss, rtol=0.05, atol=0)
    assert not torch.equal(rough.logits_SBK.float(), output.logits_SBK)


@pytest.mark.parametrize(
    "name", ["independent", "co_training", "dml", "kdcl", "packed", "batch_ensemble", "mc_dropout", "snapshot"]
)
def test_the_loss_is_the_sum_of_so_many_networks(name: str) -> None:
    """Of methods that have no classifiers beside the networks: divided, it is the loss of one network."""
    method = make(name)
    assert method.network.num_members > 1
    output = step(method, 1, optimizer_of(method))
    _, targets = batch(method, 1, 0)
    one = torch.stack([cross_entropy(logits_BK, targets.labels_B).mean() for logits_BK in output.logits_SBK]).mean()
    torch.testing.assert_close(output.metrics["loss_ce"] / method.losses_in_sum(), one)


@every_method
def test_an_optimiser_made_anew_is_asked_for_at_milestones_only(name: str) -> None:
    assert set(make(name).fresh_optimizer_at((3, 5))) <= {3, 5}
    assert not make(name).fresh_optimizer_at(())


@every_method
def test_training_continues_bit_for_bit(name: str, tmp_path: Path) -> None:
    whole = make(name)
    optimizer = optimizer_of(whole)
    for number in range(3):
        step(whole, number, optimizer)
    saved = {
        "network": whole.network.state_dict(),
        "method": whole.training_state(),
        "optimizer": optimizer.state_dict(),
    }
    assert not [key for key in saved["method"] if key.startswith("network.")]
    torch.save(saved, tmp_path / "state.pt")
    resumed = make(name, weights=4)
    content = torch.load(tmp_path / "state.pt", weights_only=True)
    resumed.network.load_state_dict(content["network"])
    resumed.load_training_state(content["method"])
    own = optimizer_of(resumed)
    own.load_state_dict(content["optimizer"])
    for number in range(3, 5):
        outputs = step(whole, number, optimizer), step(resumed, number, own)
        assert torch.equal(outputs[0].loss, outputs[1].loss)
    expected = whole.state_dict()
    assert expected.keys() == resumed.state_dict().keys()
    for key, value in resumed.state_dict().items():
        assert torch.equal(value, expected[key]), key


def _train_all(rank: int, world_size: int) -> dict[str, dict[str, Tensor]]:
    """Two steps of every method, each process on images of its own."""
    found = {}
    for name in methods.names():
        method = make(name)
        model = None if method.reduces_own_gradients else DistributedDataParallel(method)
        optimizer = optimizer_of(method)
        losses = [step(method, number, optimizer, model=model, rank=rank).loss.detach() for number in range(2)]
        method.synchronise()
        found[name] = {"losses": torch.stack(losses), **method.state_dict()}
    return found


@pytest.mark.slow
def test_processes_keep_what_they_train_identical(tmp_path: Path) -> None:
    first, second = run_processes(2, _train_all, tmp_path / "results")
    assert first.keys() == second.keys() == set(methods.names())
    for name in first:
        losses = first[name].pop("losses"), second[name].pop("losses")
        assert not torch.equal(*losses), f"{name}: both processes had the same images"
        for key, value in first[name].items():
            assert torch.equal(value, second[name][key]), f"{name}: {key}"


# Cheap members to stand for their families; a family that is not here is represented by its first name.
LIGHT = ("wrn_16_1", "resnet20", "resnext29_8x64d", "wide_resnet16_8", "resnet32_cifar", "resnet18_imagenet")
LIGHT += ("se_resnet50", "resnexst50_4x16d", "cream_14")
HEAVY = {"resnest"}  # undivided; resnexst has the same parts


def one_of_each_family() -> list[str]:
    chosen: dict[str, str] = {}
    for arch, entry in backbones.items():
        if entry.family not in HEAVY and (entry.family not in chosen or arch in LIGHT):
            chosen[entry.family] = arch
    return sorted(chosen.values())


class OnePass(SplitNet):
    """Networks whose logits are computed once: methods that only call them learn as far as the logits."""

    def __init__(self, networks: list[nn.Module]) -> None:
        super().__init__(networks)
        self.leaf: Tensor | None = None
        self.called = False

    def forward(self, views_SBCHW: Tensor) -> Tensor:
        self.called = True
        if self.leaf is None:
            self.leaf = super().forward(views_SBCHW).detach().requires_grad_()
        return self.leaf


@pytest.mark.slow
@pytest.mark.parametrize("arch", one_of_each_family())
def test_methods_take_every_family_with_stages(arch: str) -> None:
    """The same networks for all methods; each parameter of theirs learns, so heads keep nothing they do not use."""
    entry = backbones.get(arch)
    shape, side = (SMALL, 16) if SMALL in entry.split_factors else (LARGE, 64)
    request = BackboneRequest(
        arch=arch,
        num_classes=K,
        shape=shape,
        dataset="synthetic",
        crop_size=side,
        split_factor=entry.split_factors[shape][-1],
    )
    networks = [build_network(request) for _ in range(2)]
    if not isinstance(networks[0], StagedBackbone):
        pytest.skip(f"{arch} has no stages")
    for one in networks:
        for name in one.unused_parameter_names():
            one.get_parameter(name).requires_grad_(False)
    shared = OnePass(networks[:1])
    for name in methods.names():
        if name in SPECIAL:
            continue
        form = methods.get(name).member_form(options_of(name), request, 3)
        if form is not None:
            check_members(name, dataclasses.replace(request, form=form), side)
            continue
        try:
            method = make(name, network=shared)
        except UserError:  # one network is not enough
            method = make(name, network=OnePass(networks))
        views, targets = batch(method, 1, size=2, side=side)
        output = method(views, targets, Progress(0, 1, 1, 10, 2, 0.05, torch.arange(2), 1e-4))
        output.loss.backward()
        assert output.logits_SBK.shape[1:] == (2, K), name
        called, leaf = method.network.called, method.network.leaf
        for n, parameter in method.trained_parameters():
            assert parameter.grad is not None or (called and n.startswith("network.")), f"{name}: {n}"
            parameter.grad = None
        if called:
            assert leaf.grad.abs().amax(dim=(1, 2)).min() > 0, name
            leaf.grad, method.network.called = None, False


def check_members(name: str, request: BackboneRequest, side: int) -> None:
    """Members that share a network, or are made of a thinner one, learn on the family too, or it is refused by name."""
    try:
        network = build_splitnet(request, seed=3)
    except UserError:  # its channels cannot be followed, or it has none of what the form needs
        return
    method = make(name, network=network)
    views, targets = batch(method, 1, size=2, side=side)
    progress = Progress(0, 1, 1, 10, 2, 0.05, torch.arange(2), 1e-4)
    method.before_step(views, targets, progress)
    output = method(views, targets, progress)
    output.loss.backward()
    assert output.logits_SBK.shape == (network.num_members, 2, K), name
    unused = {parameter for one in network.models for parameter in getattr(one, "unused_parameter_names", set)()}
    for n, parameter in method.trained_parameters():
        assert parameter.grad is not None or any(n.endswith(end) for end in unused), f"{name}: {n}"
    with torch.no_grad():
        assert method.eval().network(views[0]).shape == (network.num_members, 2, K)


# ---- a method is one new file ----------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class AnchorOptions:
    """Flags of a method that exists in this file only."""

    anchor_weight: float = option(0.01, "weight of the distance to an anchor")


class Anchor(Method):
    """Networks learn from the labels and are drawn to a learnt anchor, which is the method's own state."""

    Options = AnchorOptions
    shared_view = True
    incompatible = {"is_syncbn": "the test says so"}  # noqa: RUF012

    def __init__(self, network: SplitNet, options: Any, *, class_loss: ClassLoss = CROSS_ENTROPY) -> None:
        super().__init__(network, options, class_loss=class_loss)
        self.anchor_K = nn.Parameter(torch.zeros(10))

    @classmethod
    def recipe(cls, dataset_recipe: str, epochs: int | None, given: Any = None) -> dict[str, Any]:
        return {"padding_mode": "reflect", "mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4), "anchor_weight": 0.5}

    def forward(self, views_SBCHW: Tensor, targets: Targets, progress: Progress) -> StepOutput:
        logits_SBK = self.network(views_SBCHW)
        loss_ce = cross_entropy(logits_SBK.flatten(0, 1), targets.labels_B.repeat(len(logits_SBK))).mean()
        loss_anchor = self.options.anchor_weight * (logits_SBK - self.anchor_K).square().mean()
        metrics = {"loss_ce": loss_ce.detach(), "loss_anchor": loss_anchor.detach()}
        return StepOutput(loss_ce + loss_anchor, metrics, logits_SBK.detach())


@pytest.fixture
def anchor(monkeypatch: pytest.MonkeyPatch, logging_restored: None) -> str:
    """The method's name, while it is registered."""
    methods.load()
    monkeypatch.setitem(methods._items, "anchor", Anchor)
    return "anchor"


def test_a_method_that_registers_itself_trains_resumes_and_is_evaluated(
    anchor: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    specs = []
    original = ViewMaker.__init__
    monkeypatch.setattr(
        ViewMaker, "__init__", lambda self, spec, seed: specs.append(spec) or original(self, spec, seed)
    )
    run = tmp_path / "run"
    argv = [
        "--method",
        anchor,
        "--dataset",
        "digits",
        "--arch",
        "wrn_16_1,resnet20",
        "--no_cuda",
        "--amp_dtype",
        "fp32",
    ]
    argv += ["--batch_size", "96", "--seed", "1", "--model_dir", str(run)]
    assert train_split.main([*argv, "--max_steps", "2"]) == 0
    results = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (results["method"], results["split_factor"], results["steps"]) == (anchor, 2, 2)
    hparams = json.loads((run / "hparams_train.json").read_text())
    assert hparams["anchor_weight"] == {"value": 0.5, "origin": "recipe"}
    first = load_checkpoint(run / "checkpoint_0_2.pth.tar")
    assert list(first["method"]) == ["anchor_K"]
    assert first["method"]["anchor_K"].abs().max() > 0
    # what the recipe says of the views reaches them, and what it says of normalising the checkpoint
    assert {spec.padding_mode for spec in specs} == {"reflect"}
    assert all((spec.mean, spec.std) == ((0.5, 0.4, 0.3), (0.2, 0.3, 0.4)) for spec in specs)
    assert (first["mean"], first["std"]) == ([0.5, 0.4, 0.3], [0.2, 0.3, 0.4])

    assert train_split.main([*argv, "--max_steps", "3", "--resume", "auto", "--padding_mode", "zero"]) == 0
    assert specs[-1].padding_mode == "zero"
    results = read_results(run) or {}
    second = load_checkpoint(run / "checkpoint_0_3.pth.tar")
    assert not torch.equal(second["method"]["anchor_K"], first["method"]["anchor_K"])
    capsys.readouterr()
    assert evaluation.main(["--resume", str(run / "checkpoint_0_3.pth.tar"), "--no_cuda", "--workers", "0"]) == 0
    evaluated = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert evaluated["networks"][1]["acc1"] == pytest.approx(results["acc1"][1])

    assert train_split.main([*argv, "--is_syncbn", "1"]) == 2
    assert "--is_syncbn cannot go with --method anchor: the test says so" in capsys.readouterr().err

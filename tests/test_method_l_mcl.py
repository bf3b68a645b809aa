"""Layer-wise mutual contrastive learning: the objective, its routing, the meta round, banks, names, processes."""

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

import train_split
from loss.classification import ClassLoss
from method import Progress, Targets, methods
from method.l_mcl import LMCL, LMCLOptions, Outputs
from method.l_mcl.class_table import ClassTable
from model import BackboneRequest, build_network, build_splitnet
from model.heads import Gate, ProjectionHead
from model.splitnet import SplitNet
from parser_params import parse_config, resolve_config
from recipe.preprocessing import eval_resize
from record.checkpoint import load_checkpoint
from tests.processes import run_processes
from training.schedule import Schedule
from utils.errors import UserError
from utils.seed import counter_uniform, counter_uniform_on_device, fold_in

GOLDEN = json.loads((Path(__file__).parent / "golden" / "lmcl_loss.json").read_text())
REQUEST = BackboneRequest(arch="wrn_10_1", num_classes=4, dataset="digits", crop_size=8)
LABELS = torch.tensor([0, 1, 0, 1, 2, 3, 2, 3])
BANK = {"contrast": "bank", "pos_k": 2, "neg_k": 6}
TRAINING_LABELS = torch.arange(40) % 4


def make(archs: tuple[str, ...] = ("wrn_10_1", "wrn_10_1"), *, label_smoothing: float = 0.0, **options) -> LMCL:
    torch.manual_seed(0)
    network = build_splitnet(REQUEST, seed=0, archs=archs)
    method = LMCL(
        network, LMCLOptions(**({"feat_dim": 8} | options)), class_loss=ClassLoss(label_smoothing=label_smoothing)
    )
    method.prepare(TRAINING_LABELS, 5)
    return method


def progress_of(step: int = 0, indices: Tensor | None = None, **changes) -> Progress:
    indices = torch.tensor([0, 1, 4, 5, 2, 3, 6, 7]) if indices is None else indices
    return Progress(0, step, step, 10, 2, 0.1, indices, 5e-4)._replace(**changes)


def batch(seed: int = 1, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Targets]:
    generator = torch.Generator().manual_seed(seed)
    views = torch.randn(1, 8, 3, 8, 8, generator=generator).to(dtype)
    return views, Targets(LABELS, LABELS, torch.tensor(1.0))


def train(method: LMCL, steps: range, optimizer: torch.optim.Optimizer | None = None) -> torch.optim.Optimizer:
    """The trainer's step, without its frills."""
    optimizer = optimizer or torch.optim.SGD([p for _, p in method.trained_parameters()], lr=0.05, momentum=0.9)
    for step in steps:
        views, targets = batch(seed=step)
        progress = progress_of(step)
        method.before_step(views, targets, progress)
        output = method(views, targets, progress)
        optimizer.zero_grad()
        output.loss.backward()
        method.reduce_gradients()
        optimizer.step()
        method.after_step(views, targets, output, progress)
    return optimizer


# ---- the objective --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, {"rtol": 1e-6, "atol": 1e-8}), (torch.float32, {"rtol": 2e-4, "atol": 1e-5})],
    ids=["float64", "float32"],
)
def test_golden_objective(dtype, tolerance):
    golden, cifar = GOLDEN["objective"], GOLDEN["cifar"]
    expected = golden["expected"]

    def tensor(values) -> Tensor:
        return torch.tensor(values, dtype=dtype)

    method = make(feat_dim=8, kd_T=golden["T"], tau=cifar["tau"], **cifar["loss_weights"]).to(dtype)
    embeddings = [tensor(stage).requires_grad_() for net in cifar["embeddings"] for stage in net]
    logits = tensor(golden["logits"]).flatten(0, 1).requires_grad_()
    heads, gates = [], []
    for values in (stage for net in cifar["heads"] for stage in net):
        head = ProjectionHead(len(values["W1"][0]), 8).to(dtype)
        head.load_state_dict({f"{2 * i}.{n}": tensor(values[f"{n[0].upper() if n == 'weight' else 'b'}{i + 1}"])
                              for i in (0, 1) for n in ("weight", "bias")})  # fmt: skip
        heads.append(head)
    for values in golden["aggregator"]:
        gate = Gate(3, len(values["b1"])).to(dtype)
        gate.layers.load_state_dict({"0.weight": tensor(values["W1"]), "0.bias": tensor(values["b1"]),
                                     "2.weight": tensor(values["W2"]), "2.bias": tensor(values["b2"])})  # fmt: skip
        gates.append(gate)
    method.heads, method.gates = nn.ModuleList(heads), nn.ModuleList(gates)
    method.outputs = lambda view: Outputs(embeddings, logits)
    weights = tensor(cifar["weights"])[:9]  # the first nine ordered pairs are ours
    method.weight_net = _Constant(weights)

    labels = torch.tensor(cifar["labels_8x2"])
    outputs = Outputs(embeddings, logits)
    mixing = torch.stack([gate.weights(embeddings[own]) for gate, own in zip(gates, method.exits_of, strict=True)])
    torch.testing.assert_close(mixing, tensor(expected["mixing_weights"]), **tolerance)
    torch.testing.assert_close(method._aggregated(outputs), tensor(expected["aggregated_logits"]), **tolerance)

    targets = Targets(labels, labels, torch.tensor(1.0))
    output = method(torch.zeros(1, 16, 3, 8, 8), targets, progress_of(indices=torch.arange(16)))
    wanted = {
        "loss_ce": expected["ce_exits_sum"] + expected["ce_aggregated_sum"],
        "loss_kd": expected["kd_sum"],
        "vcl": cifar["expected"]["labels_8x2"]["total_vcl"],
        "soft_vcl": cifar["expected"]["labels_8x2"]["total_soft_vcl"],
        "icl": cifar["expected"]["labels_8x2"]["total_icl"],
        "soft_icl": cifar["expected"]["labels_8x2"]["total_soft_icl"],
        "without_positive": 0.0,
    }
    for name, value in wanted.items():
        torch.testing.assert_close(output.metrics[name].to(dtype), tensor(value), **tolerance)
    torch.testing.assert_close(output.loss, tensor(expected["total"]), **tolerance)
    outer = method._cross_entropy(logits, targets)
    torch.testing.assert_close(outer, tensor(expected["outer_objective"]), **tolerance)

    gradients = torch.autograd.grad(output.loss, [logits, *embeddings])
    torch.testing.assert_close(gradients[0], tensor(expected["grad_logits"]).flatten(0, 1), **tolerance)
    flat = [tensor(stage) for net in expected["grad_embeddings"] for stage in net]
    for found, gradient in zip(gradients[1:], flat, strict=True):
        torch.testing.assert_close(found, gradient, **tolerance)


class _Constant(nn.Module):
    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.value = value

    def forward(self, embeddings: list[Tensor], pairs_2P: Tensor) -> Tensor:
        return self.value


def test_networks_see_one_view_and_keep_their_own_logits():
    method = make().eval()
    views, targets = batch()
    output = method(views, targets, progress_of())
    for i, network in enumerate(method.network.models):
        torch.testing.assert_close(output.logits_SBK[i], network(views[0]).detach())
    with pytest.raises(ValueError, match="one and the same view"):
        method(views.expand(2, -1, -1, -1, -1), targets, progress_of())


def test_backbones_of_different_depth_and_more_than_two_networks():
    method = make(("resnet20", "wrn_10_2", "ShuffleNetV2_05x_cifar"))
    views, targets = batch()
    output = method(views, targets, progress_of())
    output.loss.backward()
    assert output.logits_SBK.shape == (3, 8, 4)
    assert method.pairs_2P.shape == (2, 27)
    assert all(p.grad is not None for _, p in method.trained_parameters())


def test_soft_temperature_is_an_option_of_its_own():
    views, targets = batch()
    values = [
        make(**options)(views, targets, progress_of()).metrics
        for options in ({}, {"kd_T": 5.0}, {"soft_T": 5.0}, {"kd_T": 5.0, "soft_T": 3.0})
    ]
    same = [[torch.equal(a[k], b[k]) for b in values] for a in values for k in ("loss_kd", "soft_icl")]
    assert same == [
        [True, False, True, False], [True, False, False, True],
        [False, True, False, True], [False, True, True, False],
        [True, False, True, False], [False, True, True, False],
        [False, True, False, True], [True, False, False, True],
    ]  # fmt: skip


def test_mixup_and_smoothing_change_the_classification_only():
    views, targets = batch()
    plain = make()(views, targets, progress_of()).metrics
    mixed_targets = Targets(LABELS, LABELS.roll(1), torch.tensor(0.3))
    for changed in (
        make()(views, mixed_targets, progress_of()).metrics,
        make(label_smoothing=0.1)(views, targets, progress_of()).metrics,
    ):
        assert changed["loss_ce"] != plain["loss_ce"]
        assert all(torch.equal(changed[k], plain[k]) for k in ("loss_kd", "vcl", "soft_vcl", "icl", "soft_icl"))


# ---- routing --------------------------------------------------------------------------------------------------------


def test_main_step_reaches_everything_but_the_pair_weights():
    method = make()
    views, targets = batch()
    method(views, targets, progress_of()).loss.backward()
    assert all(p.grad is None for p in method.weight_net.parameters())
    trained = dict(method.trained_parameters())
    assert all(p.grad is not None for p in trained.values())
    assert set(trained) == {n for n, _ in method.named_parameters() if not n.startswith("weight_net.")}


def test_gates_learn_from_labels_only_and_teachers_are_constant():
    views, targets = batch()
    gradients = []
    for options in ({}, {"alpha": 0.0, "beta": 0.0, "gamma": 0.0, "lam": 0.0, "kd_T": 7.0}):
        method = make(**options)
        method(views, targets, progress_of()).loss.backward()
        gradients.append([p.grad.clone() for p in method.gates.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)
    assert any(one.abs().max() > 0 for one in gradients[0])


def test_only_final_exits_are_distilled():
    """The distillation from the aggregated predictions moves the networks themselves, not their exits."""
    views, targets = batch()
    gradients = []
    for temperature in (3.0, 30.0):
        method = make(alpha=0.0, beta=0.0, gamma=0.0, lam=0.0, kd_T=temperature)
        method(views, targets, progress_of()).loss.backward()
        gradients.append((method.exits[0][0].rest.fc.weight.grad, method.network.models[0].fc.weight.grad))
    (exit_a, final_a), (exit_b, final_b) = gradients
    torch.testing.assert_close(exit_a, exit_b)
    assert not torch.allclose(final_a, final_b)


# ---- meta round -----------------------------------------------------------------------------------------------------


class _Objectives(nn.Module):
    """Inner and outer objective of the method as functions of its parameters."""

    def __init__(self, method: LMCL, views: Tensor, targets: Targets, progress: Progress) -> None:
        super().__init__()
        self.method, self.batch = method, (views, targets, progress)

    def forward(self, inner: bool) -> Tensor:
        method = self.method
        views, targets, progress = self.batch
        outputs = method.outputs(views[0])
        if not inner:
            return method._cross_entropy(outputs.logits_MBK, targets)
        weights = method.weight_net(outputs.embeddings, method.pairs_2P)
        return method._combined(method._contrast(method._projected(outputs), weights, targets, progress))


@pytest.mark.parametrize("options", [{}, BANK], ids=["batch", "bank"])
@pytest.mark.parametrize("times", [1, 2])
def test_meta_gradient_is_that_of_the_unrolled_chain(times, options):
    method = make(times=times, **options).double()
    views, targets = batch(dtype=torch.float64)
    progress = progress_of()
    found = method._meta_round(views[0], targets, progress)

    objectives = _Objectives(method, views, targets, progress)
    values = {
        f"method.{n}": p.detach().clone().requires_grad_()
        for n, p in method.named_parameters()
        if not n.startswith(("weight_net.", "gates."))
    }
    velocity = {name: torch.zeros_like(value) for name, value in values.items()}
    for inner in [True] * times + [False]:
        loss = functional_call(objectives, values, (inner,))
        grads = torch.autograd.grad(loss, [*values.values()], create_graph=True, allow_unused=True)
        for (name, value), g in zip([*values.items()], grads, strict=True):
            g = torch.zeros_like(value) if g is None else g
            velocity[name] = 0.9 * velocity[name] + g + progress.weight_decay * value
            values[name] = value - progress.learning_rate * velocity[name]
    outcome = functional_call(objectives, values, (False,))
    expected = torch.autograd.grad(outcome, [*method.weight_net.parameters()])
    for one, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(one, wanted, rtol=1e-6, atol=1e-12)
    assert max(one.abs().max() for one in found) > 1e-8


def around_step(method: LMCL, views: Tensor, targets: Targets, progress: Progress) -> None:
    """What the trainer calls before and after a step, without the step."""
    method.before_step(views, targets, progress)
    method.after_step(views, targets, None, progress)


@pytest.mark.parametrize("options", [{}, BANK], ids=["batch", "bank"])
def test_meta_round_changes_the_pair_weights_and_nothing_else(options):
    method = make(meta_freq=3, **options)
    optimizer = train(method, range(1))
    views, targets = batch()
    momentum = {p: state["momentum_buffer"].clone() for p, state in optimizer.state.items()}
    method.zero_grad()
    before = {name: value.clone() for name, value in method.state_dict().items()}
    for step, changes in ((1, False), (2, False), (3, True)):
        around_step(method, views, targets, progress_of(step))
        for name, value in method.state_dict().items():
            moved = not torch.equal(value, before[name])
            assert moved == (changes and name.startswith("weight_net.")), name
    assert all(p.grad is None for p in method.parameters())
    assert all(torch.equal(optimizer.state[p]["momentum_buffer"], saved) for p, saved in momentum.items())
    assert method.training


def test_a_round_that_falls_between_updates_is_made_at_the_next_one():
    method = make(meta_freq=3)
    views, targets = batch()
    before = method.weight_net.layers[0].weight.detach().clone()
    method.before_step(views, targets, progress_of(3))  # the first of two accumulated batches
    for step, changes in ((4, True), (5, False)):
        around_step(method, views, targets, progress_of(step))
        assert torch.equal(method.weight_net.layers[0].weight, before) != changes
        before = method.weight_net.layers[0].weight.detach().clone()


def test_pair_weights_step_by_nesterov_with_lasting_momentum():
    method = make(meta_freq=1)
    views, targets = batch()
    velocity = [torch.zeros_like(p) for p in method.weight_net.parameters()]
    for step, rate in ((0, 0.1), (1, 0.02)):
        progress = progress_of(step, learning_rate=rate, weight_decay=0.01)
        gradients = method._meta_round(views[0], targets, progress)
        expected = []
        for p, g, v in zip(method.weight_net.parameters(), gradients, velocity, strict=True):
            g = g + 0.01 * p.detach()
            v.mul_(0.9).add_(g)
            expected.append(p.detach() - rate * (g + 0.9 * v))
        around_step(method, views, targets, progress)
        for p, wanted in zip(method.weight_net.parameters(), expected, strict=True):
            torch.testing.assert_close(p.detach(), wanted)


def test_meta_round_is_full_precision_under_autocast():
    views, targets = batch()
    results = []
    for enabled in (False, True):
        method = make(meta_freq=1)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            around_step(method, views, targets, progress_of())
        results.append([p.detach().clone() for p in method.weight_net.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_round_that_is_not_finite_is_skipped():
    method = make(meta_freq=1)
    before = [p.detach().clone() for p in method.weight_net.parameters()]
    views, targets = batch()
    around_step(method, views * float("nan"), targets, progress_of())
    assert all(torch.equal(p, saved) for p, saved in zip(method.weight_net.parameters(), before, strict=True))


# ---- memory banks ---------------------------------------------------------------------------------------------------


def test_device_draws_equal_those_of_the_host():
    key, positions = fold_in(3, 8, 77), torch.tensor([0, 5, 1281166, 2**40])
    host = counter_uniform(key, positions.numpy(), torch.zeros(1, dtype=torch.int64).numpy(), 50)[0]
    assert (counter_uniform_on_device(key, positions, 50).numpy() == host).all()


def test_draws_come_from_the_right_classes():
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(5, (200,), generator=generator)
    labels[labels == 2] = 3  # a class without images
    table, indices = ClassTable(labels), torch.arange(200)
    columns = table.draw(9, indices, labels, pos_k=4, neg_k=30)
    assert columns.shape == (200, 35)
    assert torch.equal(columns[:, 0], indices)
    assert (labels[columns[:, :5]] == labels[:, None]).all()
    assert (labels[columns[:, 5:]] != labels[:, None]).all()
    assert all(len(set(row[:5].tolist())) == 5 for row in columns)
    part = table.draw(9, indices[[7, 3]], labels[[7, 3]], pos_k=4, neg_k=30)
    assert torch.equal(part, columns[[7, 3]])
    assert not torch.equal(table.draw(10, indices, labels, pos_k=4, neg_k=30), columns)


def test_draws_are_uniform():
    labels = torch.tensor([0, 1, 1, 2, 0, 1, 2, 1, 0, 1])
    table = ClassTable(labels)
    positives, negatives = Counter(), Counter()
    for key in range(1000):
        row = table.draw(key, torch.tensor([5]), torch.tensor([1]), pos_k=2, neg_k=3)[0].tolist()
        positives.update(row[1:3])
        negatives.update(row[3:])
    assert set(positives) == {1, 2, 7, 9}
    assert set(negatives) == {0, 3, 4, 6, 8}
    for counts, expected in ((positives, 500), (negatives, 600)):
        assert sum((n - expected) ** 2 / expected for n in counts.values()) < 20  # chi-square, 3 or 4 degrees


def test_every_other_image_of_the_class_where_there_are_no_more():
    labels = torch.tensor([0, 0, 0, 1, 1, 1])
    columns = ClassTable(labels).draw(1, torch.tensor([1]), torch.tensor([0]), pos_k=2, neg_k=1)
    assert sorted(columns[0, :3].tolist()) == [0, 1, 2]


def test_banks_start_uniform_and_follow_the_final_embeddings():
    method = make(feat_dim=48, nce_m=0.25, **BANK)
    assert method.sampler == "shuffled"
    assert make().sampler == "class_balanced"
    banks = method.banks_NRD.clone()
    assert banks.shape == (2, 40, 48)
    assert banks.dtype == torch.float32
    assert banks.abs().max() <= 0.25
    assert banks.std().item() == pytest.approx(0.25 / 3**0.5, rel=0.05)

    views, targets = batch()
    indices = torch.tensor([0, 1, 4, 5, 2, 3, 6, 7])
    projected = method._projected(method.outputs(views[0]))[method.finals_N].detach()
    method(views, targets, progress_of(indices=indices))
    expected = banks.clone()
    moved = 0.25 * banks[:, indices] + 0.75 * projected
    expected[:, indices] = moved / moved.norm(dim=-1, keepdim=True)
    torch.testing.assert_close(method.banks_NRD, expected)

    method.eval()
    after = method.banks_NRD.clone()
    method(views, targets, progress_of())
    assert torch.equal(method.banks_NRD, after)


def test_main_step_and_meta_round_use_the_same_columns(monkeypatch):
    method = make(meta_freq=1, **BANK)
    drawn = []
    draw = ClassTable.draw
    monkeypatch.setattr(ClassTable, "draw", lambda self, *a, **k: drawn.append(draw(self, *a, **k)) or drawn[-1])
    train(method, range(2))
    assert len(drawn) == 2 * (1 + 2 + 2)  # the step, the virtual steps, their replay
    assert all(torch.equal(one, drawn[0]) for one in drawn[:5])
    assert not torch.equal(drawn[5], drawn[0])


@pytest.mark.parametrize(
    ("labels", "message"),
    [([0, 0, 0, 1, 1], "--pos_k 2.* 3 images"), ([1, 1, 1, 1], "two classes")],
)
def test_training_sets_without_enough_images_are_refused(labels, message):
    method = LMCL(build_splitnet(REQUEST, seed=0, archs=["wrn_10_1"] * 2), LMCLOptions(**BANK))
    with pytest.raises(UserError, match=message):
        method.prepare(torch.tensor(labels), 0)


# ---- state ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prepare_first", [True, False], ids=["bank", "bank-late"])
def test_training_with_banks_continues_bit_for_bit(prepare_first, tmp_path):
    options = BANK
    whole = make(meta_freq=2, **options)
    optimizer = train(whole, range(3))
    torch.save(
        {"network": whole.network.state_dict(), "method": whole.training_state(), "optimizer": optimizer.state_dict()},
        tmp_path / "state.pt",
    )
    train(whole, range(3, 6), optimizer)

    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    torch.manual_seed(99)
    network = build_splitnet(REQUEST, seed=8, archs=["wrn_10_1"] * 2)
    resumed = LMCL(network, LMCLOptions(feat_dim=8, meta_freq=2, **options))
    if prepare_first:
        resumed.prepare(TRAINING_LABELS, 5)
    resumed.network.load_state_dict(saved["network"])
    resumed.load_training_state(saved["method"])
    if not prepare_first:
        resumed.prepare(TRAINING_LABELS, 5)
    optimizer = torch.optim.SGD([p for _, p in resumed.trained_parameters()], lr=0.05, momentum=0.9)
    optimizer.load_state_dict(saved["optimizer"])
    train(resumed, range(3, 6), optimizer)
    assert whole.state_dict().keys() == resumed.state_dict().keys()
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


@pytest.mark.slow
def test_a_run_that_stops_within_an_epoch_goes_on_as_if_it_had_not(tmp_path, capsys, logging_restored):
    argv = ["--method", "l_mcl", "--arch", "lmcl_wrn_10_1", "--dataset", "digits", "--batch_size", "40", "--seed", "2"]
    argv += ["--meta_freq", "2", "--no_cuda", "--model_dir"]
    for folder, parts in (("whole", ["4"]), ("parts", ["1", "3", "4"])):
        for steps in parts:
            resume = ["--resume", "auto", "--max_steps", steps]
            assert train_split.main([*argv, str(tmp_path / folder), *resume]) == 0, capsys.readouterr().err
    whole, parts = (load_checkpoint(tmp_path / folder / "checkpoint_0_4.pth.tar") for folder in ("whole", "parts"))
    for part in ("state_dict", "method", "optimizer"):
        assert same(whole[part], parts[part]), part
    assert [key for key in whole["method"] if key.startswith("weight_net.")]
    rows = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    extra = next(row["test"]["extra"] for row in rows if row["kind"] == "eval")
    assert set(extra) == {f"{i}_{name}" for i in (1, 2) for name in ("exit1", "exit2", "exit_max", "aggregated")}
    network = next(row["test"]["acc1"] for row in rows if row["kind"] == "eval")
    for i in (1, 2):
        assert extra[f"{i}_exit_max"] == max(network[i - 1], extra[f"{i}_exit1"], extra[f"{i}_exit2"])
    results = json.loads((tmp_path / "whole" / "results.json").read_text())
    assert results["last"]["extra"] == extra
    assert results["own_best"].keys() == {"1", "2"} | extra.keys()


def same(one, other) -> bool:
    """Whether two checkpoints' parts are equal, bit for bit."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    return torch.equal(one, other) if isinstance(one, Tensor) else one == other


def test_the_kept_network_is_the_plain_backbone():
    method = make(("resnet20", "wrn_10_1"))
    train(method, range(2))
    images = torch.randn(3, 3, 8, 8)
    method.eval()
    for arch, trained in zip(("resnet20", "wrn_10_1"), method.network.models, strict=True):
        plain = build_network(BackboneRequest(arch=arch, num_classes=4, dataset="digits", crop_size=8)).eval()
        plain.load_state_dict(trained.state_dict(), strict=True)
        with torch.no_grad():
            assert torch.equal(plain(images), trained(images))
    assert not any(name.startswith("network.") for name in method.training_state())


def test_the_best_exit_is_told_apart_from_the_network():
    extra = {"1_aggregated": 90.0, "1_exit1": 55.0, "2_exit1": 10.0, "10_exit1": 99.0}
    figures = {"acc1": [50.0, 60.0], "extra": extra}
    found = make().complete_figures(figures)
    assert found["acc1"] == [50.0, 60.0]
    assert found["extra"] == extra | {"1_exit_max": 55.0, "2_exit_max": 60.0}
    assert make().complete_figures({"acc1": [None, None]}) == {"acc1": [None, None], "extra": {}}


def test_extra_rows():
    method = make().eval()
    images = torch.randn(5, 3, 8, 8)
    with torch.no_grad():
        rows = method.extra_logits(images)
        outputs = method.outputs(images)
    assert list(rows) == ["1_exit1", "1_exit2", "1_aggregated", "2_exit1", "2_exit2", "2_aggregated"]
    torch.testing.assert_close(rows["2_exit1"], outputs.logits_MBK[3])
    weights = method.gates[0].weights(outputs.embeddings[:3])
    torch.testing.assert_close(rows["1_aggregated"], torch.einsum("be,ebk->bk", weights, outputs.logits_MBK[:3]))


# ---- names, options, recipes ----------------------------------------------------------------------------------------


def test_names_stand_for_their_backbones():
    def names(arch: str, **options) -> list[str]:
        return LMCL.backbone_names(arch, LMCLOptions(**options))

    assert names("lmcl_resnet32_cifar") == ["resnet32_cifar"] * 2
    assert names("lmcl_hcgnet_A1_cifar", number_net=3) == ["hcgnet_A1_cifar"] * 3
    assert names("lmcl_res50_shufflenetv2_1x_imagenet") == ["ShuffleNetV2_1x_imagenet", "resnet50_imagenet"]
    assert names("lmcl_res18_shufflenetv2_1x_imagenet") == ["resnet18_imagenet", "ShuffleNetV2_1x_imagenet"]
    assert names("lmcl_wrn_16_2_wrn_40_2_cifar") == ["wrn_16_2_cifar", "wrn_40_2_cifar"]
    assert names("lmcl_resnet20") == ["resnet20"] * 2
    assert names("resnet20, resnet56") == ["resnet20", "resnet56"]
    with pytest.raises(UserError, match="--number_net 3"):
        names("lmcl_res56_wrn_40_2_cifar", number_net=3)
    assert names("resnet20,resnet20,resnet56", number_net=3) == ["resnet20", "resnet20", "resnet56"]
    assert names("resnet20,resnet20,resnet56") == ["resnet20", "resnet20", "resnet56"]
    with pytest.raises(UserError, match="--number_net 3"):
        names("resnet20, resnet56", number_net=3)


@pytest.mark.parametrize(
    "wrong",
    [{"number_net": 1}, {"times": 0}, {"meta_freq": 0}, {"tau": 0.0}, {"soft_T": -1.0}, {"alpha": -0.1},
     {"lam": float("inf")}, {"nce_m": 1.5}, {"neg_k": 0}, {"feat_dim": 0}],
)  # fmt: skip
def test_senseless_options_are_refused(wrong):
    with pytest.raises(UserError, match=f"--{next(iter(wrong))}"):
        LMCLOptions(**wrong)


def test_one_network_or_one_without_stages_is_refused():
    with pytest.raises(UserError, match="two networks or more"):
        make(("wrn_10_1",))
    with pytest.raises(UserError, match="has no stages that run one after another"):
        LMCL(SplitNet([nn.Linear(3, 2), nn.Linear(3, 2)]), LMCLOptions())


def test_published_recipes():
    cifar, imagenet = (methods.get("l_mcl").recipe(name, None) for name in ("cifar100", "imagenet"))
    assert (cifar["epochs"], cifar["lr_mode"], cifar["weight_decay"]) == (300, "epoch_cos", 5e-4)
    assert (imagenet["epochs"], imagenet["lr_milestones"], imagenet["weight_decay"]) == (100, (30, 60, 90), 1e-4)
    own = {"contrast": "bank", "tau": 0.07, "alpha": 0.01, "beta": 0.01, "meta_freq": 500}
    assert own.items() <= imagenet.items()
    assert LMCLOptions(**own).neg_k == 8192
    assert LMCL.recipe("imagenet", 10)["lr_milestones"] == (3, 6, 9)
    assert LMCL.recipe("imagenet", 1)["lr_milestones"] == (1, 1)
    assert "lr" not in LMCL.recipe("digits", None)


@pytest.mark.parametrize(("dataset", "row"), [("cifar100", "cosine_300"), ("imagenet", "multistep_100")])
def test_the_recipe_gives_the_published_learning_rate(dataset, row):
    argv = ["--method", "l_mcl", "--dataset", dataset, "--arch", "resnet18_imagenet,resnet18_imagenet"]
    config = resolve_config(parse_config(argv), data_recipe=dataset)
    schedule = Schedule(config, steps_per_epoch=7)
    for epoch, rate in GOLDEN["lr"][row].items():
        for step in (0, 6):
            assert schedule(7 * int(epoch) + step) == pytest.approx(rate, rel=1e-6)


def test_the_published_crops_of_large_images():
    """Crops of 8 % of an image or more; in evaluation the short side becomes 256 pixels."""
    config = resolve_config(
        parse_config(["--method", "l_mcl", "--dataset", "imagenet", "--arch", "lmcl_resnet18_imagenet"]),
        data_recipe="imagenet",
    )
    assert (config.crop_size, config.crop_area) == (224, (0.08, 1.0))
    assert eval_resize(config.crop_size, config.crop_pct) == 256


# ---- processes ------------------------------------------------------------------------------------------------------


def _train_in_process(rank: int, world_size: int) -> list[dict[str, Tensor]]:
    return [_train_on_own_images(rank, options) for options in ({}, BANK)]


def _train_on_own_images(rank: int, options: dict) -> dict[str, Tensor]:
    """Three steps with a meta round at the first and the last; what every process must have in common."""
    method = make(meta_freq=2, **options)
    optimizer = torch.optim.SGD([p for _, p in method.trained_parameters()], lr=0.05, momentum=0.9)
    for step in range(3):
        views, targets = batch(seed=10 * step + rank)
        progress = progress_of(step, indices=torch.tensor([0, 1, 4, 5, 2, 3, 6, 7]) + 8 * rank)
        method.before_step(views, targets, progress)
        output = method(views, targets, progress)
        optimizer.zero_grad()
        output.loss.backward()
        own = [p.grad.clone() for _, p in method.trained_parameters()]
        method.reduce_gradients()
        optimizer.step()
        method.after_step(views, targets, output, progress)
    reduced = [p.grad for _, p in method.trained_parameters()]
    return {
        "own": torch.cat([g.flatten() for g in own]),
        "reduced": torch.cat([g.flatten() for g in reduced]),
        **{n: v for n, v in method.state_dict().items() if "running" not in n and "num_batches" not in n},
    }


@pytest.mark.slow
def test_two_processes_keep_everything_trained_identical(tmp_path):
    results = run_processes(2, _train_in_process, tmp_path / "results")
    for options, first, second in zip(({}, BANK), *results, strict=True):
        assert first.keys() == second.keys()
        assert {"weight_net.layers.0.weight", "heads.0.0.weight", "gates.0.layers.0.weight"} <= first.keys()
        own = first.pop("own"), second.pop("own")
        assert not torch.equal(*own)
        torch.testing.assert_close(first["reduced"], (own[0] + own[1]) / 2)
        for name, value in first.items():
            assert torch.equal(value, second[name]), name
        assert ("banks_NRD" in first) == bool(options)
        if options:
            moved = (first["banks_NRD"] != make(**options).banks_NRD).any(dim=-1)
            assert moved[:, :16].all()
            assert not moved[:, 16:].any()

"""ONE, OKDDip, BYOT and KDCL: golden losses and gradients, sizes of their parts, and the plain network that is left."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from loss.distillation import collaborative_target, distillation_kl
from method import Method, Progress, Targets, methods
from method.costs import training_macs, training_params
from method.inner import ramp
from model import BackboneRequest, build_network, build_splitnet
from model.heads import BottleneckExits, MapGate, PeerAttention
from model.staged import staged_parts
from parser_params import parse_config, resolve_config
from tests.rivals import GOLDEN, assert_number, assert_record, every_precision, fill
from utils.errors import UserError
from utils.macs import count_macs, count_params

REQUEST = BackboneRequest(arch="resnet20", num_classes=10, dataset="digits", crop_size=16)


def progress(epoch: int = 0, epochs: int = 300) -> Progress:
    return Progress(epoch, 0, 0, 10, epochs, 0.1, torch.arange(4))


def plain(labels: Any) -> Targets:
    labels_B = torch.as_tensor(labels)
    return Targets(labels_B, labels_B, torch.tensor(1.0))


def make(name: str, count: int = 1, request: BackboneRequest = REQUEST, **options: Any) -> Any:
    torch.manual_seed(0)
    kind = methods.get(name)
    network = build_splitnet(request, seed=0, archs=[request.arch] * count)
    return kind(network, kind.Options(**options)).train()


def step(method: Method, views: Tensor, targets: Targets, epoch: int = 300) -> Any:
    method.before_step(views, targets, progress(epoch))
    return method(views, targets, progress(epoch))


def views_of(count: int = 1, size: int = 4) -> Tensor:
    return torch.randn(count, size, 3, 16, 16, generator=torch.Generator().manual_seed(1))


# ---- golden losses ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", GOLDEN["one"]["ramp"])
def test_ramp(row: dict[str, Any]) -> None:
    assert_number(ramp(row["epoch"], row["length"]), row["weight"])


@every_precision
@pytest.mark.parametrize("row", GOLDEN["one"]["loss"])
def test_one_is_that_of_the_golden_file(row: dict[str, Any], dtype: torch.dtype) -> None:
    map_BCHW = fill(row["trunk_map"], dtype)
    logits = [fill(spec, dtype) for spec in row["branch_logits"]]
    gate = MapGate(map_BCHW.shape[1], len(logits)).to(dtype)
    parts = ("gate_linear_weight", "gate_linear_bias", "gate_norm_weight", "gate_norm_bias")
    with torch.no_grad():
        for name, parameter in zip(parts, gate.parameters(), strict=True):
            parameter.copy_(fill(row[name], dtype))
    method = make("one", one_temperature=row["temperature"], one_ramp_epochs=row["ramp_length"]).to(dtype)
    method.ensembles[0].forward = lambda network, images: (torch.stack(logits), gate(map_BCHW))
    images = torch.zeros(1, len(row["labels"]), 3, 4, 4, dtype=dtype)
    output = step(method, images, plain(row["labels"]), row["epoch"])
    assert_record(method.extra_logits(images[0])["gated"], row["gated_logits"])
    assert_number(output.metrics["loss_ce"], row["loss_ce"], dtype)
    assert_number(output.metrics["loss_kl"], row["loss_kl_exact"], dtype)
    assert_number(output.loss, row["exact"]["total"], dtype)
    output.loss.backward()
    for tensor, record in zip(logits, row["exact"]["grad_branch_logits"], strict=True):
        assert_record(tensor.grad, record)
    assert_record(map_BCHW.grad, row["exact"]["grad_trunk_map"])
    assert_record(gate.linear.weight.grad, row["exact"]["grad_gate_linear_weight"])
    assert_record(gate.norm.weight.grad, row["exact"]["grad_gate_norm_weight"])

    gated_BK = method.extra_logits(images[0])["gated"].detach()
    published = published_kl(torch.stack(logits), gated_BK, row["temperature"]).mean(dim=1).sum()
    assert_number(ramp(row["epoch"], row["ramp_length"]) * published, row["loss_kl_published"], dtype)


def published_kl(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """With 1e-7 added to the probabilities of the target, as the published codes do."""
    target = (teacher / temperature).softmax(dim=-1) + 1e-7
    return temperature**2 * (target * (target.log() - (student / temperature).log_softmax(dim=-1))).sum(dim=-1)


@every_precision
@pytest.mark.parametrize("stopped", [False, True])
@pytest.mark.parametrize("row", GOLDEN["okddip"]["loss"])
def test_okddip_is_that_of_the_golden_file(row: dict[str, Any], stopped: bool, dtype: torch.dtype) -> None:
    embeddings = [fill(spec, dtype) for spec in row["peer_embeddings"]]
    logits = [fill(spec, dtype) for spec in row["logits_peers_then_leader"]]
    query, key = fill(row["query_weight"], dtype), fill(row["key_weight"], dtype)
    attention = PeerAttention(query.shape[1], query.shape[1] // query.shape[0]).to(dtype)
    attention.query.weight, attention.key.weight = nn.Parameter(query.detach()), nn.Parameter(key.detach())
    options = {"okddip_temperature": row["temperature"], "okddip_weight": row["ramp_weight"]}  # the ramp has ended
    method = make("okddip", okddip_stop_gradient=stopped, **options).to(dtype)
    method.groups[0].forward = lambda networks, views: (torch.stack(logits), attention(embeddings))
    images = torch.zeros(1, len(row["labels"]), 3, 4, 4, dtype=dtype)
    output = step(method, images, plain(row["labels"]))
    exact = row["exact"]
    assert_number(output.metrics["loss_ce"], row["loss_ce"], dtype)
    assert_number(output.metrics["loss_peers"], row["ramp_weight"] * exact["kl_peers"], dtype)
    assert_number(output.metrics["loss_leader"], row["ramp_weight"] * exact["kl_leader"], dtype)
    assert_number(output.loss, exact["total"], dtype)
    targets_BKP = torch.einsum("bpq,qbk->bkp", attention(embeddings), torch.stack(logits[:-1]))
    assert_record(targets_BKP, row["targets_BKP"])
    output.loss.backward()
    expected = exact["grad_stopped" if stopped else "grad_through_targets"]
    for name, tensors in (("logits", logits), ("embeddings", embeddings)):
        for tensor, record in zip(tensors, expected[name], strict=True):
            assert_record(tensor.grad, record)
    assert_record(attention.query.weight.grad, expected["query_weight"])
    assert_record(attention.key.weight.grad, expected["key_weight"])


@every_precision
@pytest.mark.parametrize("row", GOLDEN["byot"]["loss"])
def test_byot_is_that_of_the_golden_file(row: dict[str, Any], dtype: torch.dtype) -> None:
    logits = [fill(spec, dtype) for spec in row["logits_shallowest_first"]]
    features = [fill(spec, dtype) for spec in row["features_shallowest_first"]]
    options = {"byot_alpha": row["alpha"], "byot_temperature": row["temperature"]}
    images, labels = torch.zeros(1, len(row["labels"]), 3, 4, 4, dtype=dtype), plain(row["labels"])

    def method(**more: Any) -> Any:
        made = make("byot", **options, **more).to(dtype)
        made.exits[0].forward = lambda network, images: (features, logits)
        return made

    without = step(method(byot_hint_weight=0), images, labels)
    assert_number(without.loss, row["exact"]["total_without_hint"], dtype)
    assert_number(without.metrics["loss_kl"], row["alpha"] * row["kl_sum"], dtype)
    squared = step(method(byot_hint_weight=0, byot_T2=True), images, labels)
    assert_number(squared.metrics["loss_kl"], row["alpha"] * row["temperature"] ** 2 * row["kl_sum"], dtype)
    without.loss.backward()
    for tensor, record in zip(logits, row["grad_logits"], strict=True):
        assert_record(tensor.grad, record)
        tensor.grad = None
    hinted = step(method(byot_hint_weight=1.0), images, labels)
    assert_number(hinted.metrics["loss_hint"], row["hint_ours"], dtype)
    hinted.loss.backward()
    for tensor, record in zip(features, row["grad_features_hint_ours"], strict=True):
        assert tensor.grad is None if record is None else assert_record(tensor.grad, record) is None


@every_precision
@pytest.mark.parametrize("rule", ["mean", "naive", "minlogit"])
@pytest.mark.parametrize("row", GOLDEN["kdcl"]["loss"])
def test_kdcl_is_that_of_the_golden_file(row: dict[str, Any], rule: str, dtype: torch.dtype) -> None:
    logits = [fill(spec, dtype) for spec in row["logits"]]
    options = {"kdcl_temperature": row["temperature"], "kdcl_weight": row["weight"], "kdcl_target": rule}
    method = make("kdcl", 2, **options).to(dtype)
    method.network.forward = lambda views: torch.stack(logits)
    expected = row["targets"][rule]
    assert_record(collaborative_target(torch.stack(logits), plain(row["labels"]), rule=rule), expected["target"])
    output = step(method, torch.zeros(2, len(row["labels"]), 3, 4, 4, dtype=dtype), plain(row["labels"]))
    assert_number(output.metrics["loss_ce"], expected["loss_ce"], dtype)
    assert_number(output.metrics["loss_kl"], row["weight"] * expected["loss_kl"], dtype)
    assert_number(output.loss, expected["total"], dtype)
    output.loss.backward()
    for tensor, record in zip(logits, expected["grad_logits"], strict=True):
        assert_record(tensor.grad, record)


def test_mixed_images_take_the_label_of_the_larger_part_and_equal_networks_the_first() -> None:
    torch.manual_seed(0)
    logits = torch.randn(3, 2, 4)
    one, other = torch.tensor([0, 1]), torch.tensor([3, 2])
    for lam, labels in ((0.5, one), (0.49, other)):
        for rule in ("minlogit", "naive"):
            mixed = collaborative_target(logits, Targets(one, other, torch.tensor(lam)), rule=rule)
            assert torch.equal(mixed, collaborative_target(logits, plain(labels), rule=rule))
    twice = torch.stack([logits[0], logits[0].flip(1).flip(1)])
    twice[1, :, 0] = twice[0, :, 0]
    assert torch.equal(collaborative_target(twice, plain(one), rule="naive"), logits[0])


def test_enormous_logits_give_finite_losses_and_gradients() -> None:
    size = 1e4
    logits = torch.tensor([[[size, -size, 0.0]], [[-size, size, size]]], requires_grad=True)
    for rule in ("mean", "naive", "minlogit"):
        target = collaborative_target(logits.detach(), plain([1]), rule=rule)
        for constant in (True, False):
            loss = distillation_kl(logits, target, is_constant=constant).sum()
            (gradient,) = torch.autograd.grad(loss, logits)
            assert loss.isfinite()
            assert gradient.isfinite().all()


# ---- parts and what is left of them ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "row"), [("resnet18", 0), ("resnet50", 1), ("resnet18", 2)])
def test_exits_have_the_published_sizes(name: str, row: int) -> None:
    """The published backbone has ResNet's stages on 32-pixel images: sides 32, 16, 8, 4."""
    golden = GOLDEN["byot"]["branch_params"][row]
    request = BackboneRequest(arch=f"torchvision/{name}", num_classes=golden["num_classes"], crop_size=128)
    exits = BottleneckExits(staged_parts(build_network(request)))
    assert [count_params(one) for one in exits] == [golden[f"branch{i}"] for i in (1, 2, 3)]


def test_one_has_the_published_sizes() -> None:
    for golden in GOLDEN["one"]["params"]:
        arch = f"resnet{golden['depth']}_cifar"
        request = BackboneRequest(arch=arch, num_classes=golden["num_classes"], dataset="cifar100", crop_size=32)
        method = make("one", request=request)
        assert count_params(method.ensembles[0].gate) == golden["gate"]
        assert training_params(method) == golden["gate"] + sum(map(count_params, method.ensembles[0].branches))


@pytest.mark.parametrize("name", ["one", "okddip", "byot"])
def test_what_is_left_is_the_plain_network(name: str) -> None:
    method = make(name)
    step(method, views_of(), plain([0, 1, 2, 3])).loss.backward()
    alone = build_network(REQUEST)
    alone.load_state_dict(method.network.models[0].state_dict())
    images = views_of()[0]
    assert torch.equal(alone.eval()(images), method.eval().network(images)[0])
    image = (3, 16, 16)
    assert (count_params(method.deployed()), count_macs(method.deployed(), image)) == (
        count_params(alone),
        count_macs(alone, image),
    )
    assert training_params(method) == count_params(method) - count_params(alone)
    assert training_macs(method, 16) > count_macs(alone, image)
    rows = method.extra_logits(images)
    assert all(row.shape == (4, 10) for row in rows.values())


def test_rows_of_evaluations_have_names() -> None:
    images = views_of()[0]
    assert list(make("one").eval().extra_logits(images)) == ["branch2", "branch3", "gated"]
    assert list(make("byot").eval().extra_logits(images)) == ["exit1", "exit2", "exits_mean"]
    assert list(make("okddip").eval().extra_logits(images)) == ["peer1", "peer2", "peer3", "peers_mean"]
    several = make("okddip", 3, okddip_share="networks").eval()
    torch.testing.assert_close(several.extra_logits(images)["peers_mean"], several.network(images)[:2].mean(dim=0))


def test_several_networks_have_parts_of_their_own_and_losses_add_up() -> None:
    views, targets = views_of(2), plain([0, 1, 2, 3])
    for name in ("one", "byot", "okddip"):
        both = make(name, 2)
        parts = next(part for part_name, part in both.named_children() if part_name in ("ensembles", "exits", "groups"))
        together = step(both, views, targets).loss
        alone = []
        for i in range(2):
            single = make(name)
            single.network.models[0] = both.network.models[i]
            part_name = next(n for n, _ in single.named_children() if n in ("ensembles", "exits", "groups"))
            getattr(single, part_name)[0] = parts[i]
            alone.append(step(single, views[i : i + 1], targets).loss)
        torch.testing.assert_close(together, torch.stack(alone).sum())


def test_networks_side_by_side_count_the_leader_or_all() -> None:
    image = (3, 16, 16)
    one = count_macs(build_network(REQUEST), image)
    for deploy, times in (("leader", 1), ("ensemble", 3)):
        method = make("okddip", 3, okddip_share="networks", okddip_deploy=deploy)
        assert count_macs(method.deployed(), image) == times * one


@pytest.mark.parametrize(
    ("name", "count", "options", "said"),
    [
        ("kdcl", 1, {}, "--method kdcl needs two networks"),
        ("okddip", 1, {"okddip_branches": 2}, "--okddip_branches 2: two peers and a leader"),
        ("okddip", 2, {"okddip_share": "networks"}, "there are 2 networks"),
    ],
)
def test_too_few_are_refused(name: str, count: int, options: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        make(name, count, **options)


def test_embeddings_of_other_sizes_and_networks_without_stages_are_refused() -> None:
    kind = methods.get("okddip")
    mixed = build_splitnet(REQUEST, seed=0, archs=["resnet20", "resnet20", "wide_resnet16_4"])
    with pytest.raises(UserError, match="embeddings of one size, and these have 64, 64, 256"):
        kind(mixed, kind.Options(okddip_share="networks"))
    flat = replace(REQUEST, arch="torchvision/squeezenet1_0", crop_size=64)
    for name in ("one", "okddip", "byot"):
        with pytest.raises(UserError, match=f"--method {name}: .* has no stages"):
            make(name, request=flat)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "one",
            {"epochs": 300, "batch_size": 128, "lr_milestones": (151, 225), "weight_decay": 1e-4, "is_nesterov": False},
        ),
        ("okddip", {"epochs": 300, "lr_milestones": (150, 225), "weight_decay": 5e-4, "is_nesterov": True}),
        ("byot", {"epochs": 250, "lr_milestones": (83, 166, 240), "weight_decay": 5e-4, "is_autoaugment": True}),
    ],
)
def test_recipes_are_the_published_ones(name: str, expected: dict[str, Any]) -> None:
    config = resolve_config(parse_config(["--method", name, "--dataset", "cifar100"]), data_recipe="cifar100")
    assert {flag: getattr(config, flag) for flag in expected} == expected

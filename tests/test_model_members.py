"""Forms in which members share one network: golden layers, sizes, folding, fixed masks, and checkpoints."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from method.mimo import member_orders
from model import BackboneRequest, build_splitnet
from model.members import RankOne
from model.registry import MemberForm
from model.restore import restore_splitnet
from model.splitnet import SplitNet
from model.summary import network_sizes
from tests.rivals import GOLDEN, assert_number, assert_record, every_precision, fill
from utils.errors import UserError
from utils.macs import count_macs, count_params

SHARED = {"norm": "shared", "init": -0.5}


def request(arch: str = "resnet20", **changes: Any) -> BackboneRequest:
    return BackboneRequest(**{"arch": arch, "num_classes": 10, "dataset": "digits", "crop_size": 16} | changes)


def members(kind: str, count: int, *, seed: int = 0, arch: str = "resnet20", **numbers: Any) -> Any:
    defaults = {"batch_ensemble": SHARED, "mc_dropout": {"place": "stages", "rate": 0.2, "mask_seed": 5}}.get(kind, {})
    form = MemberForm(kind=kind, members=count, numbers=defaults | numbers)
    return build_splitnet(request(arch, form=form), seed=seed)


def images_of(count: int = 4) -> Tensor:
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(1))


# ---- BatchEnsemble ---------------------------------------------------------------------------------------------------


def rank_one(row: dict[str, Any], layer: nn.Module, dtype: torch.dtype) -> tuple[RankOne, dict[str, Tensor]]:
    """The layer with golden values, and these values as leaves."""
    made = RankOne(layer, row["M"]).to(dtype)
    values = {name: fill(row[name], dtype) for name in ("weight", "r", "s", "bias") if name in row}
    made.r, made.s = nn.Parameter(values["r"].detach()), nn.Parameter(values["s"].detach())
    made.layer.weight = nn.Parameter(values["weight"].detach())
    if "bias" in values:
        made.bias = nn.Parameter(values["bias"].detach())
    return made, values


@every_precision
@pytest.mark.parametrize("row", GOLDEN["batch_ensemble_linear"])
def test_a_linear_layer_is_that_of_the_golden_file(row: dict[str, Any], dtype: torch.dtype) -> None:
    outputs, inputs = row["weight"]["shape"]
    check(row, *rank_one(row, nn.Linear(inputs, outputs, bias="bias" in row), dtype), dtype)


@every_precision
@pytest.mark.parametrize("row", GOLDEN["batch_ensemble_conv"])
def test_a_convolution_is_that_of_the_golden_file(row: dict[str, Any], dtype: torch.dtype) -> None:
    outputs, inputs, *kernel = row["weight"]["shape"]
    groups = row["groups"]
    layer = nn.Conv2d(
        inputs * groups, outputs, kernel, row["stride"], row["padding"], groups=groups, bias="bias" in row
    )
    check(row, *rank_one(row, layer, dtype), dtype)


def check(row: dict[str, Any], layer: RankOne, values: dict[str, Tensor], dtype: torch.dtype) -> None:
    name = next(key for key in row if key.startswith("input_"))
    x_MB = fill(row[name], dtype)
    output = layer(x_MB.flatten(0, 1))
    assert_record(output, row["output_flat_MB"])
    output.backward(fill(row["grad_output_flat_MB"], dtype).detach())
    for key, parameter in (("weight", layer.layer.weight), ("r", layer.r), ("s", layer.s), ("bias", layer.bias)):
        if f"grad_{key}" in row:
            assert_record(parameter.grad, row[f"grad_{key}"])
    assert_record(x_MB.grad, row[f"grad_{name}"])
    for member in range(row["M"]):
        folded = layer.folded(member)(x_MB[member].detach())
        torch.testing.assert_close(folded, output.detach().unflatten(0, (row["M"], -1))[member])


@pytest.mark.parametrize("row", GOLDEN["batch_ensemble_networks"])
def test_parameters_are_the_published_ones(row: dict[str, Any]) -> None:
    form = MemberForm(kind="batch_ensemble", members=row["M"], numbers=SHARED)
    with torch.device("meta"):
        network = build_splitnet(
            request(row["network"], num_classes=row["num_classes"], crop_size=64, form=form), seed=0
        )
    assert count_params(network) == row["params"]


@pytest.mark.parametrize("row", [row for row in GOLDEN["our_networks"] if row["dataset"] != "imagenet"])
def test_our_networks_have_the_derived_sizes(row: dict[str, Any]) -> None:
    for kind in ("batch_ensemble", "mimo"):
        form = MemberForm(kind=kind, members=row["M"], numbers=SHARED)
        own = request(row["arch"], num_classes=row["num_classes"], dataset=row["dataset"], crop_size=32, form=form)
        with torch.device("meta"):
            assert count_params(build_splitnet(own, seed=0)) == row[kind]


def test_folded_members_equal_the_unfolded_and_cost_m_times() -> None:
    network = members("batch_ensemble", 3).double()
    network.train()(images_of(8).double())  # statistics of their own
    network.eval()
    folded = network.folded()
    assert type(folded) is SplitNet
    torch.testing.assert_close(folded(images_of().double()), network(images_of().double()), rtol=1e-10, atol=1e-10)
    image = (3, 16, 16)
    assert count_macs(network, image) == count_macs(folded, image) == 3 * count_macs(folded.models[0], image)


def test_permuting_members_permutes_the_rows() -> None:
    network = members("batch_ensemble", 3).eval()
    order = torch.tensor([2, 0, 1])
    before = network(images_of())
    with torch.no_grad():
        for part in network.modules():
            if isinstance(part, RankOne):
                for name in ("r", "s", "bias"):
                    if getattr(part, name) is not None:
                        getattr(part, name).copy_(getattr(part, name)[order])
    torch.testing.assert_close(network(images_of()), before[order])


def test_factors_are_drawn_as_said() -> None:
    normal = torch.cat(
        [f.flatten() for f in members("batch_ensemble", 4, arch="wide_resnet16_4").fast_parameters().values()]
    )
    assert normal.mean().item() == pytest.approx(1, abs=0.05)
    assert normal.std().item() == pytest.approx(0.5, abs=0.05)
    signs = torch.cat([f.flatten() for f in members("batch_ensemble", 4, init=0.25).fast_parameters().values()])
    assert set(signs.tolist()) == {-1.0, 1.0}
    assert (signs > 0).double().mean().item() == pytest.approx(0.25, abs=0.05)
    ones = members("batch_ensemble", 4, init=0.0)
    plain = build_splitnet(request(), seed=0).eval()
    torch.testing.assert_close(ones.eval()(images_of()), plain(images_of()).expand(4, -1, -1))


def test_members_may_have_norms_of_their_own() -> None:
    shared, own = members("batch_ensemble", 2), members("batch_ensemble", 2, norm="member")
    norms = sum(
        p.numel()
        for m in build_splitnet(request(), seed=0).modules()
        if isinstance(m, nn.BatchNorm2d)
        for p in m.parameters()
    )
    assert count_params(own) == count_params(shared) + norms
    assert own(images_of()).shape == (2, 4, 10)


# ---- multi-input multi-output ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", GOLDEN["mimo_networks"])
def test_mimo_has_the_derived_sizes(row: dict[str, Any]) -> None:
    form = MemberForm(kind="mimo", members=row["M"], numbers={})
    own = request(row["network"], num_classes=row["num_classes"], crop_size=row["crop"], form=form)
    with torch.device("meta"):
        network = build_splitnet(own, seed=0)
    assert count_params(network) == row["params"]
    assert count_macs(network, (3, row["crop"], row["crop"])) == row["macs"]


@every_precision
@pytest.mark.parametrize("row", GOLDEN["mimo_forward"])
def test_mimo_reads_and_answers_as_the_reference(row: dict[str, Any], dtype: torch.dtype) -> None:
    outputs = row["conv_weight"]["shape"][0]
    count, classes = row["M"], row["linear_weight"]["shape"][0] // row["M"]
    network = members("mimo", count)
    conv = nn.Conv2d(3 * count, outputs, row["conv_weight"]["shape"][2:], padding=1, bias=False)
    last = nn.Linear(outputs, count * classes)
    weights = {name: fill(row[name], dtype) for name in ("conv_weight", "linear_weight", "linear_bias")}
    conv.weight, last.weight, last.bias = (nn.Parameter(value.detach()) for value in weights.values())
    network.models[0] = nn.Sequential(conv, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), last)
    views, labels = fill(row["views_MBCHW"], dtype), torch.tensor(row["labels"])
    orders_MB = torch.tensor(row["permutations_MB"])
    logits = network(torch.stack([view[order] for view, order in zip(views, orders_MB, strict=True)]))
    assert_record(logits, row["training_logits_MBK"])
    loss = sum(F.cross_entropy(one, labels[order]) for one, order in zip(logits, orders_MB, strict=True))
    assert_number(loss, row["loss_sum"], dtype)
    loss.backward()
    assert_record(conv.weight.grad, row["grad_conv_weight"])
    assert_record(last.weight.grad, row["grad_linear_weight"])
    assert_record(network(views[0]), row["evaluation_logits_of_view_0_MBK"])


@pytest.mark.parametrize("row", GOLDEN["mimo_shared_rows"])
def test_orders_share_as_many_rows_as_published(row: dict[str, Any]) -> None:
    rows = row["B"] * row["batch_repetition"]
    orders = member_orders(rows, 3, row["input_repetition"], torch.Generator().manual_seed(0))
    assert rows == row["rows"]
    assert (orders.sort(dim=1).values == torch.arange(rows)).all()
    from_shared = rows - int(rows * (1 - row["input_repetition"]))
    assert from_shared == row["rows_shared_by_all"]
    assert (orders[:, rows - from_shared :] == orders[0, rows - from_shared :]).all()
    if from_shared < rows:
        assert not torch.equal(orders[0], orders[1])


# ---- Monte-Carlo dropout ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["stages", "classifier", "own"])
def test_masks_are_the_same_for_every_batch_order_and_call(place: str) -> None:
    arch = "wide_resnet40_10" if place == "own" else "resnet20"
    network = members("mc_dropout", 3, arch=arch, place=place).eval()
    images = images_of(4)
    whole = network(images)
    assert torch.equal(network(images), whole)
    torch.testing.assert_close(network(images.flip(0)).flip(1), whole)
    torch.testing.assert_close(
        torch.cat([network(images[:1]), network(images[1:])], dim=1), whole, rtol=1e-4, atol=1e-5
    )
    assert not torch.allclose(whole[0], whole[1])
    again = members("mc_dropout", 3, arch=arch, place=place).eval()
    assert torch.equal(again(images), whole)
    other = members("mc_dropout", 3, arch=arch, place=place, mask_seed=6).eval()
    assert not torch.allclose(other(images), whole)


def test_no_dropout_is_the_plain_network() -> None:
    plain = build_splitnet(request(), seed=0)
    network = members("mc_dropout", 3, rate=0.0)
    assert network.state_dict().keys() == plain.state_dict().keys()
    torch.testing.assert_close(network.eval()(images_of()), plain.eval()(images_of()).expand(3, -1, -1))


def test_masks_drop_their_part_and_scale_the_rest() -> None:
    drop = members("mc_dropout", 2, rate=0.25)._drops()[0]
    drop.eval().member_key = torch.tensor(7)
    values = drop(torch.ones(2, 20_000, 1, 1))
    assert torch.equal(values[0], values[1])
    assert (values == 0).double().mean().item() == pytest.approx(0.25, abs=0.01)
    assert values.max().item() == pytest.approx(1 / 0.75)
    drop.train().member_key = None
    assert not torch.equal(*drop(torch.ones(2, 100, 1, 1)))


def test_the_part_before_the_first_dropout_is_counted_once() -> None:
    image = (3, 16, 16)
    plain = count_macs(build_splitnet(request(), seed=0), image)
    head = 64 * 10
    assert count_macs(members("mc_dropout", 5, place="classifier"), image) == plain + 4 * head
    everywhere = count_macs(members("mc_dropout", 5), image)
    assert plain < everywhere < 5 * plain


def test_a_network_without_dropout_of_its_own_is_refused() -> None:
    with pytest.raises(UserError, match="--mc_dropout_place own: --arch has no dropout"):
        members("mc_dropout", 2, place="own")


# ---- all of them -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["batch_ensemble", "mimo", "mc_dropout"])
def test_a_checkpoint_says_what_its_members_are(kind: str) -> None:
    network = members(kind, 3, seed=4).eval()
    content = {
        "state_dict": network.state_dict(),
        "config": {"arch": "resnet20", "dataset": "digits", "crop_size": 16},
        "form": network.form.as_dict(),
        "classes": list("0123456789"),
    }
    restored, info = restore_splitnet(content)
    assert (info.num_networks, info.num_classes) == (3, 10)
    assert torch.equal(restored(images_of()), network(images_of()))
    with pytest.raises(UserError, match="entry 'form' is damaged"):
        restore_splitnet(content | {"form": {"kind": "other"}})


def test_one_member_has_the_weights_of_the_plain_network() -> None:
    plain = build_splitnet(request(), seed=0).eval()
    for kind, numbers in (("mimo", {}), ("batch_ensemble", {"init": 0.0}), ("mc_dropout", {"rate": 0.0})):
        torch.testing.assert_close(members(kind, 1, **numbers).eval()(images_of()), plain(images_of()))


@pytest.mark.parametrize("arch", ["resnet20", "torchvision/resnet18"])
def test_a_copy_draws_the_same_masks_and_a_summary_counts_them(arch: str) -> None:
    crop = 16 if arch == "resnet20" else 64
    form = MemberForm(kind="mc_dropout", members=3, numbers={"place": "stages", "rate": 0.2, "mask_seed": 5})
    made = request(arch, form=form, crop_size=crop, shape="small" if crop == 16 else "large")
    network = build_splitnet(made, seed=0).eval()
    twin = copy.deepcopy(network)
    images = torch.randn(2, 3, crop, crop, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits_TBK = network(images)
        assert torch.equal(twin(images), logits_TBK)
    assert not torch.equal(logits_TBK[0], logits_TBK[1])
    sizes = network_sizes([made])
    assert sizes["macs_total"] == count_macs(network, (3, crop, crop))
    assert sizes["thop_macs_total"] is None or sizes["thop_macs_total"] > sizes["macs_total"]

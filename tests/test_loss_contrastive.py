"""Contrastive terms against golden values, plain loops and finite differences."""

import json
from itertools import product
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from loss.contrastive import (
    bank_contrast,
    batch_contrast,
    contrast_nll,
    exit_pairs,
    same_class,
    update_bank,
)
from loss.distillation import distillation_kl
from model.heads import PairWeights, ProjectionHead

GOLDEN = json.loads((Path(__file__).parent / "golden" / "lmcl_loss.json").read_text())
CIFAR, IMAGENET = GOLDEN["cifar"], GOLDEN["imagenet"]
FLOAT32 = {"rtol": 2e-4, "atol": 1e-5}
FLOAT64 = {"rtol": 1e-6, "atol": 1e-8}

precisions = pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, FLOAT64), (torch.float32, FLOAT32)], ids=["float64", "float32"]
)


def heads_of(golden: dict, stages: int, dtype: torch.dtype) -> list[ProjectionHead]:
    """The projection heads of both networks' first stages, with the golden weights."""
    heads = []
    for net in golden["heads"]:
        for values in net[:stages]:
            weights = {k: torch.tensor(v, dtype=dtype) for k, v in values.items()}
            head = ProjectionHead(weights["W1"].shape[1], len(weights["b2"])).to(dtype)
            head.load_state_dict(dict(zip(("0.weight", "0.bias", "2.weight", "2.bias"), weights.values(), strict=True)))
            heads.append(head)
    return heads


def leaves(values: list, dtype: torch.dtype) -> list[Tensor]:
    """Embeddings of all exits, network by network, as leaves of the graph."""
    return [torch.tensor(stage, dtype=dtype, requires_grad=True) for net in values for stage in net]


def project(heads: list[ProjectionHead], embeddings: list[Tensor]) -> Tensor:
    return torch.stack([head(e) for head, e in zip(heads, embeddings, strict=True)])


def pair_rows(pair_order: list[list[int]], stages: int) -> list[tuple[int, bool]]:
    """For each ordered pair its row among our unordered ones."""
    first, second = exit_pairs([stages, stages]).tolist()
    ours = {frozenset(pair): row for row, pair in enumerate(zip(first, second, strict=True))}
    return [ours[frozenset((a * stages + k, b * stages + z))] for a, k, b, z in pair_order]


def weighted_means(terms, weights_QB: Tensor, rows: list[int]) -> Tensor:
    """[Q, 4] batch means over ordered pairs, in the golden order of columns."""
    columns = (terms.vcl_PB, terms.soft_vcl_PB, terms.icl_PB, terms.soft_icl_PB)
    return torch.stack([(weights_QB * column[rows]).mean(dim=-1) for column in columns], dim=1)


def mcl_of(pair_losses_Q4: Tensor, loss_weights: dict) -> Tensor:
    return pair_losses_Q4.sum(dim=0) @ torch.tensor(
        [loss_weights[name] for name in ("alpha", "gamma", "beta", "lam")], dtype=pair_losses_Q4.dtype
    )


def test_pairs_are_those_of_different_networks_once():
    first, second = exit_pairs([3, 3]).tolist()
    assert list(zip(first, second, strict=True)) == [(m, n) for m in range(3) for n in range(3, 6)]
    assert exit_pairs([2, 1, 2]).shape == (2, 2 + 4 + 2)
    assert exit_pairs([4]).shape == (2, 0)


@precisions
@pytest.mark.parametrize("case", ["labels_8x2", "labels_uneven", "labels_8x2_unit_weights"])
def test_batch_golden(case, dtype, tolerance):
    embeddings = leaves(CIFAR["embeddings"], dtype)
    heads = heads_of(CIFAR, 3, dtype)
    weights = torch.tensor(CIFAR["weights"], dtype=dtype)
    if case.endswith("unit_weights"):
        weights = torch.ones_like(weights)
    weights.requires_grad_()
    labels = torch.tensor(CIFAR[case.removesuffix("_unit_weights")])
    projected = project(heads, embeddings)
    expected = CIFAR["expected"]
    target = torch.tensor(expected["projected"], dtype=dtype).flatten(0, 1)
    torch.testing.assert_close(projected, target, **tolerance)

    terms = batch_contrast(projected, labels, exit_pairs([3, 3]), tau=CIFAR["tau"], soft_temperature=CIFAR["kd_T"])
    pair_losses = weighted_means(terms, weights, pair_rows(CIFAR["pair_order"], 3))
    loss = mcl_of(pair_losses, CIFAR["loss_weights"])
    golden = expected[case]
    torch.testing.assert_close(pair_losses, torch.tensor(golden["pair_losses"], dtype=dtype), **tolerance)
    for column, name in enumerate(("vcl", "soft_vcl", "icl", "soft_icl")):
        total = torch.tensor(golden[f"total_{name}"], dtype=dtype)
        torch.testing.assert_close(pair_losses[:, column].sum(), total, **tolerance)
    torch.testing.assert_close(loss, torch.tensor(golden["loss_mcl"], dtype=dtype), **tolerance)
    if "grad_embeddings" in golden:
        gradients = torch.autograd.grad(loss, [*embeddings, weights, heads[0][0].weight])
        flat = [torch.tensor(stage, dtype=dtype) for net in golden["grad_embeddings"] for stage in net]
        flat += [torch.tensor(golden[name], dtype=dtype) for name in ("grad_weights", "grad_head_net0_stage0_W1")]
        for found, wanted in zip(gradients, flat, strict=True):
            torch.testing.assert_close(found, wanted, **tolerance)


@precisions
def test_pair_weights_golden(dtype, tolerance):
    golden = GOLDEN["weight_net"]
    embeddings = leaves(CIFAR["embeddings"], dtype)
    net = PairWeights([e.shape[1] for e in embeddings]).to(dtype)
    linears = [linear for of_net in golden["proj"] for linear in of_net]
    for layer, values in zip(net.layers, linears, strict=True):
        layer.load_state_dict({"weight": torch.tensor(values["W"]), "bias": torch.tensor(values["b"])})
    weights = net(embeddings, exit_pairs([3, 3]))
    expected = torch.tensor(golden["expected"]["weights"], dtype=dtype)
    torch.testing.assert_close(weights[pair_rows(CIFAR["pair_order"], 3)], expected, **tolerance)
    assert weights.min() >= torch.sigmoid(torch.tensor(-1.0))
    assert weights.max() <= torch.sigmoid(torch.tensor(1.0))


def bank_inputs(dtype: torch.dtype):
    """Embeddings, heads, keys and the two networks' numbers of the memory-bank fixture."""
    embeddings = leaves(IMAGENET["embeddings"], dtype)
    heads = heads_of(CIFAR, 2, dtype)
    memory = torch.tensor(IMAGENET["memory"], dtype=dtype)
    columns = torch.cat([torch.tensor(IMAGENET["pos_idx"]), torch.tensor(IMAGENET["neg_idx"])], dim=1)
    return embeddings, heads, memory[:, columns]


@precisions
def test_bank_golden(dtype, tolerance):
    embeddings, heads, keys = bank_inputs(dtype)
    terms = bank_contrast(
        project(heads, embeddings),
        keys,
        torch.tensor([0, 0, 1, 1]),
        exit_pairs([2, 2]),
        pos_k=IMAGENET["pos_k"],
        tau=IMAGENET["tau"],
        soft_temperature=IMAGENET["kd_T"],
    )
    weights = torch.tensor(IMAGENET["weights"], dtype=dtype)
    pair_losses = weighted_means(terms, weights, pair_rows(IMAGENET["pair_order"], 2))
    golden = IMAGENET["expected"]["own_bank_vcl"]
    torch.testing.assert_close(pair_losses, torch.tensor(golden["pair_losses"], dtype=dtype), **tolerance)
    for column, name in enumerate(("vcl", "soft_vcl", "icl", "soft_icl")):
        total = torch.tensor(golden[f"total_{name}"], dtype=dtype)
        torch.testing.assert_close(pair_losses[:, column].sum(), total, **tolerance)
    loss = mcl_of(pair_losses, IMAGENET["loss_weights"])
    torch.testing.assert_close(loss, torch.tensor(golden["loss_mcl"], dtype=dtype), **tolerance)


@precisions
def test_bank_golden_of_the_reference(dtype, tolerance):
    """With its defect: inside the second network of an ordered pair it reads the first network's bank."""
    embeddings, heads, keys = bank_inputs(dtype)
    projected = project(heads, embeddings).unflatten(0, (2, 2))
    tau, temperature, pos_k = IMAGENET["tau"], IMAGENET["kd_T"], IMAGENET["pos_k"]

    def similarities(bank: int, net: int, stage: int, start: int) -> Tensor:
        return torch.einsum("bcd,bd->bc", keys[bank], projected[net, stage])[:, start:] / tau

    def terms_of(x: Tensor, y: Tensor, positives: int) -> tuple[Tensor, Tensor]:
        mask = torch.zeros_like(x, dtype=torch.bool)
        mask[:, :positives] = True
        every = torch.ones_like(mask)
        hard = contrast_nll(x, mask, every) + contrast_nll(y, mask, every)
        soft = distillation_kl(x, y, temperature=temperature) + distillation_kl(y, x, temperature=temperature)
        return hard, soft

    rows = []
    for (a, k, b, z), w in zip(IMAGENET["pair_order"], IMAGENET["weights"], strict=True):
        vcl, soft_vcl = terms_of(similarities(a, a, k, 1), similarities(a, b, z, 1), pos_k)
        icl, soft_icl = terms_of(similarities(b, a, k, 0), similarities(a, b, z, 0), 1 + pos_k)
        weight = torch.tensor(w, dtype=dtype)
        rows.append(torch.stack([(weight * term).mean() for term in (vcl, soft_vcl, icl, soft_icl)]))
    pair_losses = torch.stack(rows)
    golden = IMAGENET["expected"]["reference"]
    torch.testing.assert_close(pair_losses, torch.tensor(golden["pair_losses"], dtype=dtype), **tolerance)
    loss = mcl_of(pair_losses, IMAGENET["loss_weights"])
    torch.testing.assert_close(loss, torch.tensor(golden["loss_mcl"], dtype=dtype), **tolerance)
    expected = [torch.tensor(stage, dtype=dtype) for net in golden["grad_embeddings"] for stage in net]
    for found, wanted in zip(torch.autograd.grad(loss, embeddings), expected, strict=True):
        torch.testing.assert_close(found, wanted, **tolerance)


@precisions
def test_bank_update_golden(dtype, tolerance):
    embeddings, heads, _ = bank_inputs(dtype)
    projected = project(heads, embeddings).unflatten(0, (2, 2))
    banks = torch.tensor(IMAGENET["memory"], dtype=dtype)
    indices = torch.tensor(IMAGENET["pos_idx"])[:, 0]
    for bank, final in zip(banks, projected[:, -1], strict=True):
        update_bank(bank, indices, final, momentum=IMAGENET["memory_momentum"])
    expected = torch.tensor(IMAGENET["expected"]["memory_after"], dtype=dtype)
    torch.testing.assert_close(banks, expected, **tolerance)


def test_bank_update_takes_the_last_of_equal_indices_and_skips_what_is_not_finite():
    torch.manual_seed(0)
    bank, new = torch.randn(5, 3), F.normalize(torch.randn(4, 3), dim=1)
    new[3] = float("nan")
    expected = bank.clone()
    for index, row in ((2, 2), (0, 1)):
        expected[index] = F.normalize(0.25 * bank[index] + 0.75 * new[row], dim=0)
    update_bank(bank, torch.tensor([2, 0, 2, 4]), new, momentum=0.25)
    torch.testing.assert_close(bank, expected)


def plain_hard(logits: Tensor, labels: Tensor) -> Tensor:
    """The hard term of each anchor by loops over images; NaN without a positive."""
    B = len(labels)
    values = []
    for n in range(B):
        others = [m for m in range(B) if m != n]
        log_sum = torch.logsumexp(logits[n, others], dim=0)
        own = [log_sum - logits[n, m] for m in others if labels[m] == labels[n]]
        values.append(torch.stack(own).mean() if own else torch.tensor(float("nan"), dtype=logits.dtype))
    return torch.stack(values)


def random_inputs(labels: list[int], exits: list[int] = [2, 2], size: int = 4, seed: int = 0):  # noqa: B006
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    projected = torch.randn(sum(exits), len(labels), size, dtype=torch.float64, generator=generator)
    return F.normalize(projected, dim=-1), torch.tensor(labels), exit_pairs(exits)


@pytest.mark.parametrize("exits", [[2, 2], [1, 3], [2, 1, 2]])
def test_batch_terms_are_the_definitions(exits):
    projected, labels, pairs = random_inputs([0, 1, 0, 1, 1, 2, 2], exits)
    tau, temperature = 0.2, 2.0
    terms = batch_contrast(projected, labels, pairs, tau=tau, soft_temperature=temperature)
    for p, (m, n) in enumerate(pairs.T.tolist()):
        a, b = projected[m], projected[n]
        aa, bb, ab = a @ a.T / tau, b @ b.T / tau, a @ b.T / tau
        torch.testing.assert_close(terms.vcl_PB[p], plain_hard(aa, labels) + plain_hard(bb, labels))
        torch.testing.assert_close(terms.icl_PB[p], plain_hard(ab, labels) + plain_hard(ab.T, labels))
        for found, x, y in ((terms.soft_vcl_PB[p], aa, bb), (terms.soft_icl_PB[p], ab, ab.T)):
            px, py = (x / temperature).softmax(dim=1), (y / temperature).softmax(dim=1)
            both = (py * (py / px).log()).sum(dim=1) + (px * (px / py).log()).sum(dim=1)
            torch.testing.assert_close(found, temperature**2 * both)


def test_images_without_a_positive_are_skipped_and_the_rest_averaged():
    projected, labels, pairs = random_inputs([0, 1, 0, 2, 1, 3])
    terms = batch_contrast(projected, labels, pairs, tau=0.1, soft_temperature=3.0)
    logits = projected[pairs[0, 0]] @ projected[pairs[1, 0]].T / 0.1
    expected = plain_hard(logits, labels).nanmean() + plain_hard(logits.T, labels).nanmean()
    torch.testing.assert_close(terms.icl_PB[0].mean(), expected)
    assert (terms.icl_PB[:, [3, 5]] == 0).all()


@pytest.mark.parametrize("labels", [[0], [0, 1, 2]])
def test_a_batch_without_any_positive_gives_zero_and_no_nan(labels):
    projected, labels, pairs = random_inputs(labels)
    projected.requires_grad_()
    terms = batch_contrast(projected, labels, pairs, tau=0.1, soft_temperature=3.0)
    assert (terms.vcl_PB == 0).all()
    assert (terms.icl_PB == 0).all()
    (gradient,) = torch.autograd.grad(sum(term.sum() for term in terms), projected)
    assert gradient.isfinite().all()


def test_terms_are_symmetric_in_the_two_networks():
    projected, labels, pairs = random_inputs([0, 0, 1, 1, 2, 2], [3, 3])
    swapped = torch.cat([projected[3:], projected[:3]])
    keys = F.normalize(torch.randn(2, 6, 9, 4, dtype=torch.float64), dim=-1)
    owners = torch.tensor([0, 0, 0, 1, 1, 1])
    bank = {"pos_k": 2, "tau": 0.1, "soft_temperature": 3.0}
    transposed = torch.arange(9).reshape(3, 3).T.flatten()
    for here, there in (
        (
            batch_contrast(projected, labels, pairs, tau=0.1, soft_temperature=3.0),
            batch_contrast(swapped, labels, pairs, tau=0.1, soft_temperature=3.0),
        ),
        (
            bank_contrast(projected, keys, owners, pairs, **bank),
            bank_contrast(swapped, keys.flip(0), owners, pairs, **bank),
        ),
    ):
        for x, y in zip(here, there, strict=True):
            torch.testing.assert_close(x, y[transposed], rtol=1e-12, atol=1e-12)


def test_own_entry_counts_across_networks_only():
    projected, _, pairs = random_inputs([0, 0, 1], [1, 1])
    keys = F.normalize(torch.randn(2, 3, 6, 4, dtype=torch.float64), dim=-1)
    moved = keys.clone()
    moved[:, :, 0] = -moved[:, :, 0]
    here, there = (
        bank_contrast(projected, k, torch.tensor([0, 1]), pairs, pos_k=1, tau=0.1, soft_temperature=3.0)
        for k in (keys, moved)
    )
    assert torch.equal(here.vcl_PB, there.vcl_PB)
    assert torch.equal(here.soft_vcl_PB, there.soft_vcl_PB)
    assert (here.icl_PB != there.icl_PB).all()
    assert (here.soft_icl_PB != there.soft_icl_PB).all()


@pytest.mark.parametrize("term", [0, 2])
def test_hard_terms_pass_gradcheck(term):
    projected, labels, pairs = random_inputs([0, 1, 0, 1], [1, 1])

    def value(x: Tensor) -> Tensor:
        return batch_contrast(x, labels, pairs, tau=0.5, soft_temperature=2.0)[term]

    assert torch.autograd.gradcheck(value, projected.requires_grad_())
    assert torch.autograd.gradgradcheck(value, projected)


def test_soft_terms_pass_gradcheck_with_the_other_side_fixed():
    torch.manual_seed(0)
    x = torch.randn(4, 4, dtype=torch.float64, requires_grad=True)
    y = torch.randn(4, 4, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda z: distillation_kl(z, y, temperature=3.0), x)
    projected, labels, pairs = random_inputs([0, 0, 1, 1], [1, 1])
    projected.requires_grad_()
    a, b = projected
    terms = batch_contrast(projected, labels, pairs, tau=0.5, soft_temperature=3.0)
    aa, bb = a @ a.T / 0.5, b @ b.T / 0.5
    expected = distillation_kl(aa, bb.detach(), temperature=3.0) + distillation_kl(bb, aa.detach(), temperature=3.0)
    gradients = [torch.autograd.grad(v.sum(), projected, retain_graph=True)[0] for v in (terms.soft_vcl_PB, expected)]
    torch.testing.assert_close(*gradients)


def test_same_class_leaves_out_the_image_itself():
    found = same_class(torch.tensor([1, 2, 1]))
    assert found.tolist() == [[False, False, True], [False, False, False], [True, False, False]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_changes_nothing(dtype):
    projected, labels, pairs = random_inputs([0, 1, 0, 1])
    projected = projected.float()
    keys = torch.randn(2, 4, 7, 4)
    owners = torch.tensor([0, 0, 1, 1])
    bank = {"pos_k": 1, "tau": 0.07, "soft_temperature": 3.0}
    plain = (
        *batch_contrast(projected, labels, pairs, tau=0.07, soft_temperature=3.0),
        *bank_contrast(projected, keys, owners, pairs, **bank),
    )
    with torch.autocast("cpu", dtype):
        low = (
            *batch_contrast(projected, labels, pairs, tau=0.07, soft_temperature=3.0),
            *bank_contrast(projected, keys, owners, pairs, **bank),
        )
    for x, y in zip(plain, low, strict=True):
        assert torch.equal(x, y)


def test_small_temperatures_stay_finite():
    projected, labels, pairs = random_inputs([0, 1, 0, 1])
    projected = projected.float().requires_grad_()
    terms = batch_contrast(projected, labels, pairs, tau=1e-4, soft_temperature=1.0)
    (gradient,) = torch.autograd.grad(sum(term.sum() for term in terms), projected)
    assert gradient.isfinite().all()


def test_sum_over_ordered_pairs_is_twice_ours():
    projected, labels, pairs = random_inputs([0, 1, 0, 1, 2, 2], [2, 2])
    terms = batch_contrast(projected, labels, pairs, tau=0.1, soft_temperature=3.0)
    total = 0.0
    for (a, k), (b, z) in product(product(range(2), range(2)), repeat=2):
        if a != b:
            x, y = projected[2 * a + k], projected[2 * b + z]
            total += (plain_hard(x @ y.T / 0.1, labels) + plain_hard(y @ x.T / 0.1, labels)).mean()
    torch.testing.assert_close(2 * terms.icl_PB.mean(dim=1).sum(), total)

"""Slices of an undivided parent: which channels, that every tensor agrees about them, and what is refused."""

import copy
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from model import argument_slices, kept_channels, slices
from model.registry import BackboneRequest, backbones, build_network, solved_request
from model.staged import classifier_name
from tests.test_model_contract import FORMS, make_images, make_request
from utils.errors import UserError

GOLDEN = json.loads((Path(__file__).parent / "golden" / "answers.json").read_text())["slices"]
# one of each kind of layer: plain, bottleneck, squeeze and excitation, depthwise, whole groups, concatenation
FAMILIES = {
    "resnet20": "small",
    "resnet164": "small",
    "wide_resnet16_4": "small",
    "se_resnet110": "small",
    "efficientnetb0": "small",
    "resnext50_32x4d": "small",
    "torchvision/densenet121": "small",
}


@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: f"{case['parent']}-{case['child']}-{case['network']}")
def test_the_fixtures_hold(case: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def fixed(seed: int, number: int, channels: int) -> np.ndarray:
        asked.append((number, channels))
        return np.array(case["permutation"])

    monkeypatch.setattr(kept_channels, "permutation", fixed)
    kept = kept_channels.kept_channels(3, case["network"], case["parent"], case["child"])
    assert kept.tolist() == case["kept"]
    assert asked in ([], [(case["permutation_number"], case["parent"])])


@given(seed=st.integers(0, 2**31 - 1), parent=st.integers(1, 70), child=st.integers(1, 70))
def test_networks_that_share_a_permutation_are_disjoint(seed: int, parent: int, child: int) -> None:
    if child > parent:
        with pytest.raises(ValueError, match="channels from"):
            kept_channels.kept_channels(seed, 0, parent, child)
        return
    together = max(1, parent // child)
    kept = [kept_channels.kept_channels(seed, i, parent, child) for i in range(together)]
    assert all((np.diff(one) > 0).all() and len(one) == child for one in kept)
    assert len(np.unique(np.concatenate(kept))) == (parent if child == parent else together * child)
    order = kept_channels.permutation(seed, 1, parent)
    assert sorted(order) == list(range(parent))


def test_a_permutation_depends_on_each_of_its_arguments() -> None:
    base = kept_channels.permutation(1, 0, 64).tolist()
    assert base == kept_channels.permutation(1, 0, 64).tolist()
    assert base != kept_channels.permutation(2, 0, 64).tolist()
    assert base != kept_channels.permutation(1, 1, 64).tolist()


def request_of(arch: str, shape: str) -> BackboneRequest:
    return make_request(arch, shape, 2)


def trained(request: BackboneRequest) -> nn.Module:
    """An undivided network with the statistics of something."""
    generator = torch.Generator().manual_seed(5)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(2)
        network = build_network(replace(request, split_factor=1)).eval()
    for name, value in network.state_dict().items():
        if name.endswith("running_var"):
            value.copy_(torch.rand(value.shape, generator=generator) + 0.5)
        elif name.endswith("running_mean"):
            value.copy_(torch.randn(value.shape, generator=generator) * 0.1)
    return network


def places_of(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """In place of every element its place in the tensor."""
    return {name: torch.arange(value.numel(), dtype=torch.float64).view(value.shape) for name, value in state.items()}


@pytest.mark.parametrize(("arch", "shape"), FAMILIES.items())
def test_a_network_of_slices_is_the_parent_without_the_channels_that_it_dropped(arch: str, shape: str) -> None:
    """So every tensor was cut by the same channels: of residual sums, of concatenations, of whole groups."""
    request = request_of(arch, shape)
    parent = trained(request)
    state = parent.state_dict()
    head = f"{classifier_name(parent)}.weight"
    found = slices.cut(state, request, networks=2, seed=3, source="P")
    places = slices.cut(places_of(state), request, networks=2, seed=3, source="P").states[1]
    child = build_network(request).eval()
    child.load_state_dict(found.states[1])
    for name, value in state.items():
        if not value.dim():
            continue
        factor = value.shape[1] / places[name].shape[1] if name == head else 1.0
        kept = (places[name] / factor).round().long().flatten()
        emptied = torch.full_like(value, float(name.endswith("running_var")))
        emptied.view(-1)[kept] = value.flatten()[kept] * factor
        value.copy_(emptied)
    images = make_images(request, 2)
    with torch.no_grad():
        expected, logits = parent(images), child(images)
    assert expected.abs().max() > 0
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))
    assert 0.0 <= found.shared < 1.0


SMALL_VIT = BackboneRequest(
    arch="timm/vit_tiny_patch16_224", split_factor=2, num_classes=10, crop_size=32, dataset="cifar10", fits_images=True
)


class CutVit(NamedTuple):
    """An undivided transformer, and what each of two parts has of it: places in the parent's tensors."""

    parent: nn.Module
    request: BackboneRequest
    found: slices.Slices


@pytest.fixture(scope="module")
def vit() -> CutVit:
    pytest.importorskip("timm")
    request = solved_request(SMALL_VIT)
    parent = trained(SMALL_VIT)
    return CutVit(parent, request, slices.cut(places_of(parent.state_dict()), request, networks=2, seed=2, source="P"))


@pytest.mark.slow
def test_a_divided_transformer_is_the_parent_without_the_heads_that_it_dropped(
    vit: CutVit, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Norms over channels would see those that are gone: here they are functions of each value alone."""
    monkeypatch.setattr(F, "layer_norm", lambda x, shape, weight, bias, eps: torch.tanh(x) * weight + bias)
    parent, places = copy.deepcopy(vit.parent), vit.found.states[1]
    for parameter in parent.parameters():  # zeros would hide what they are multiplied with
        nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(4))
    child, state = build_network(vit.request).eval(), parent.state_dict()
    kept = {name: one.round().long() for name, one in places.items() if name != "head.weight"}
    kept["head.weight"] = (places["head.weight"] / (192 / 128)).round().long()
    child.load_state_dict({name: state[name].flatten()[one] for name, one in kept.items()})
    for name, one in kept.items():
        emptied = torch.zeros_like(state[name])
        emptied.view(-1)[one.flatten()] = state[name].flatten()[one.flatten()]
        state[name].copy_(emptied)
    images = make_images(vit.request, 2)
    with torch.no_grad():
        expected, logits = parent(images), child(images)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.slow
def test_transformers_are_cut_by_whole_heads(vit: CutVit) -> None:
    """One choice of heads for tokens, fused projections and the classifier; interiors of MLPs have their own."""
    chosen = []
    for state in vit.found.states:
        tokens = state["cls_token"].flatten().long()
        heads = tokens.view(2, 64)[:, 0] // 64
        chosen.append(heads.tolist())
        assert torch.equal(tokens, (heads[:, None] * 64 + torch.arange(64)).flatten())
        rows = (state["blocks.5.attn.qkv.weight"][:, 0] // 192).long()
        assert torch.equal(rows, (torch.arange(3)[:, None] * 192 + tokens).flatten())
        for name in ("blocks.0.attn.proj.weight", "blocks.11.mlp.fc1.weight"):
            assert torch.equal((state[name][0] % 192).long(), tokens)
        inside = state["blocks.2.mlp.fc1.bias"].long()
        assert torch.equal((state["blocks.2.mlp.fc2.weight"][0] % 768).long(), inside)
        assert not set((inside % 192).tolist()) <= set(tokens.tolist())
        assert torch.equal(state["head.weight"][0] / (192 / 128), tokens.double())
    assert chosen[0] != chosen[1]
    assert 0.5 < vit.found.shared < 1.0


@pytest.mark.slow
def test_narrower_heads_take_the_first_channels_of_each() -> None:
    pytest.importorskip("timm")
    request = solved_request(replace(SMALL_VIT, split_factor=4))
    assert dict(zip(request.width_names, request.widths or (), strict=True))["embed_dim"] == 96
    parent = trained(SMALL_VIT).state_dict()
    found = slices.cut(places_of(parent), request, networks=4, seed=3, source="P")
    for state in found.states:
        tokens = (state["cls_token"].flatten()).long().view(2, 48)
        assert torch.equal(tokens % 64, torch.arange(48).expand(2, 48))


@pytest.mark.long
@pytest.mark.parametrize(
    ("arch", "heads", "per_head"),
    [
        ("timm/deit3_small_patch16_224", 6, ()),
        ("timm/beit_base_patch16_224", 12, ("blocks.{}.attn.relative_position_bias_table",)),
    ],
)
def test_four_networks_take_whole_heads_and_together_all_of_the_parent(
    arch: str, heads: int, per_head: tuple[str, ...]
) -> None:
    """Halves of the parent's heads, of 64 channels each; tables with a column for each head follow."""
    pytest.importorskip("timm")
    undivided = BackboneRequest(arch=arch, num_classes=10, crop_size=224, dataset="imagenet", shape="large")
    request = solved_request(replace(undivided, split_factor=4))
    assert dict(zip(request.width_names, request.widths or (), strict=True))["num_heads"] == heads // 2
    with torch.device("meta"):
        shapes = build_network(undivided).state_dict()
    width, half = 64 * heads, 32 * heads
    found = slices.cut(
        {name: torch.arange(value.numel(), dtype=torch.float32).view(value.shape) for name, value in shapes.items()},
        request,
        networks=4,
        seed=3,
        source="P",
    )
    used = set()
    for state in found.states:
        tokens = state["cls_token"].flatten().long()
        kept = tokens.view(-1, 64)[:, 0] // 64
        assert torch.equal(tokens, (kept[:, None] * 64 + torch.arange(64)).flatten())
        used |= set(tokens.tolist())
        for block in (0, 11):
            of_block = {name.removeprefix(f"blocks.{block}."): value.long() for name, value in state.items()}
            rows = of_block["attn.qkv.weight"][:, 0] // width
            queries = rows[:half].view(-1, 64)
            assert torch.equal(queries % 64, torch.arange(64).expand(heads // 2, 64))
            assert torch.equal(rows, torch.cat([rows[:half], width + rows[:half], 2 * width + rows[:half]]))
            assert torch.equal(of_block["attn.proj.weight"][0] % width, rows[:half])
            assert torch.equal(of_block["attn.proj.weight"][:, 0] // width, tokens)
            for name in per_head:
                columns = state[name.format(block)].long()
                assert torch.equal(columns % heads, (queries[:, 0] // 64).expand(len(columns), -1))
    assert used == set(range(width))


@pytest.mark.slow
def test_a_plan_that_is_wider_somewhere_than_the_parent_is_refused_by_tensor(vit: CutVit) -> None:
    widths = dict(zip(vit.request.width_names, vit.request.widths or (), strict=True)) | {"mlp_ratio": 7.0}
    request = replace(vit.request, widths=tuple(widths.values()))
    with pytest.raises(UserError, match=r"^P: --arch timm/vit_tiny\S+ .* blocks.0.mlp.fc1.weight has 896 channels"):
        slices.cut(vit.parent.state_dict(), request, networks=2, seed=3, source="P")


@pytest.mark.slow
def test_what_does_not_fit_together_is_refused_before_it_is_cut(vit: CutVit, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here tokens by heads, and queries, keys and values by single channels."""
    real = argument_slices._in_blocks

    def unfused(sizes: tuple[int, int], widths: list[argument_slices.Width]) -> argument_slices.Dimension | None:
        return None if sizes[0] == 3 * 192 else real(sizes, widths)

    monkeypatch.setattr(argument_slices, "_in_blocks", unfused)
    monkeypatch.setattr(argument_slices.Stage, "width", lambda self, before, after: argument_slices.Width(192, 128))
    with pytest.raises(UserError, match=r"^P: --arch timm/vit_tiny\S+ .* does not give the parent's answers"):
        slices.cut(vit.parent.state_dict(), vit.request, networks=2, seed=3, source="P")


def test_an_undivided_network_takes_everything() -> None:
    request = replace(request_of("resnet20", "small"), split_factor=1)
    state = trained(request).state_dict()
    found = slices.cut(state, request, networks=1, seed=3, source="P")
    assert all(torch.equal(found.states[0][name], value) for name, value in state.items())
    assert found.shared == 1.0


def test_a_classifier_for_other_classes_is_left_out() -> None:
    request = request_of("resnet20", "small")
    state = trained(request).state_dict()
    found = slices.cut(state, replace(request, num_classes=5), networks=2, seed=3, source="P")
    assert set(state) - set(found.states[0]) == {"fc.weight", "fc.bias"}


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda state: state.pop("layer1.0.conv1.weight"), "no tensor layer1.0.conv1.weight"),
        (lambda state: state.update({"layer1.0.bn1.bias": torch.zeros(9)}), r"layer1.0.bn1.bias has shape \(9,\)"),
    ],
)
def test_another_network_is_no_parent(change, complaint: str) -> None:
    request = request_of("resnet20", "small")
    state = dict(trained(request).state_dict())
    change(state)
    with pytest.raises(UserError, match=f"^P: is no parent of these networks: .*{complaint}"):
        slices.cut(state, request, networks=2, seed=3, source="P")


def test_a_parent_whose_channels_cannot_be_followed_is_refused_in_a_line() -> None:
    pytest.importorskip("timm")
    request = BackboneRequest(arch="timm/pit_ti_224", num_classes=10, crop_size=224, shape="large")
    with torch.device("meta"):
        parent = build_network(request).state_dict()
    with pytest.raises(UserError, match=r"--arch timm/pit_ti_224 .* its channels cannot be followed"):
        slices.cut(parent, request, networks=1, seed=3, source="P")


@pytest.mark.long
def test_every_backbone_is_cut_or_refused_by_name() -> None:
    refused, complaints = set(), {}
    for arch, shape in FORMS:
        legal = backbones.get(arch).split_factors[shape]
        if 2 not in legal:
            continue
        request = request_of(arch, shape)
        with torch.device("meta"):
            parent = build_network(replace(request, split_factor=1)).state_dict()
            child = {name: value.shape for name, value in build_network(request).state_dict().items()}
        try:
            found = slices.cut(parent, request, networks=2, seed=3, source="--pretrained P")
        except UserError as error:
            complaints[arch] = str(error)
            if arch != "wide_resnet16_2":  # its children have 16 channels where the stem has, and so no projection
                refused.add(backbones.get(arch).family)
            continue
        assert {name: value.shape for name, value in found.states[1].items()} == child, arch
    assert all(f"--arch {arch} " in complaint for arch, complaint in complaints.items())
    # groups of groups, parts that run side by side, or one number of channels divided in two ways
    assert refused == {"senet", "resnexst", "resnext", "shake_resnet", "cream"}

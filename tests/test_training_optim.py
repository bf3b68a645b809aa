"""Parameter groups, optimisers, steps that skip themselves, the moving average of the weights."""

import copy
import io
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode

from benchmarks.dispatched import CountedOperations
from model import backbones
from model.backbone import timm_nets, torchvision_nets
from tests.networks import LIBRARY_NETWORKS, needs_timm
from tests.waits import nothing_waits
from training.optim import (
    NORMS,
    RMSprop,
    WeightAverage,
    build_optimizer,
    clip_gradients,
    guarded_step,
    in_order,
    parameter_groups,
    set_learning_rate,
    start_anew,
)
from training.options import OPTIMIZERS, OptimizerOptions
from utils.errors import UserError

GOLDEN = json.loads((Path(__file__).parent / "golden" / "cream.json").read_text())["rmsprop_tf"]


def small_network(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 5))
    return network.to(dtype)


def give_gradients(network: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        values = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.grad = torch.empty_like(parameter).copy_(values)


def build(network: nn.Module, name: str, *, capturable: bool = False, **settings: object) -> torch.optim.Optimizer:
    options = OptimizerOptions(optimizer=name, lr=0.1, weight_decay=1e-2, **settings)
    groups = parameter_groups(network, network.named_parameters(), options)
    return build_optimizer(options, groups, capturable=capturable)


def flag(value: float) -> Tensor:
    return torch.tensor(value)


def flag_of(norm: Tensor) -> Tensor:
    return 1.0 - norm.isfinite().float()


def snapshot(network: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    tensors = {name: p.detach().clone() for name, p in network.named_parameters()}
    for index, parameter in enumerate(network.parameters()):
        for key, value in optimizer.state[parameter].items():
            tensors[f"{index}.{key}"] = torch.as_tensor(value).clone()
    return tensors


# ---- groups ----------------------------------------------------------------------------------------------------------


def names_in(network: nn.Module, groups: list[dict]) -> list[set[str]]:
    names = {id(p): name for name, p in network.named_parameters()}
    return [{names[id(p)] for p in group["params"]} for group in groups]


def names_in_order(network: nn.Module, groups: list[dict]) -> list[list[str]]:
    names = {id(p): name for name, p in network.named_parameters()}
    return [[names[id(p)] for p in group["params"]] for group in groups]


@pytest.mark.parametrize(
    ("flags", "spared"),
    [
        ({"no_decay": "bias"}, {"0.bias", "1.bias", "3.bias"}),
        ({"no_decay": "norm_bias"}, {"0.bias", "1.bias", "3.bias", "1.weight"}),
        ({"no_decay": "norm_bias", "is_wd_all": True}, set()),
    ],
)
def test_what_is_spared_from_weight_decay(flags: dict, spared: set[str]) -> None:
    network = small_network()
    groups = parameter_groups(network, network.named_parameters(), OptimizerOptions(weight_decay=0.3, **flags))
    decayed, not_decayed = names_in(network, groups)
    assert not_decayed == spared
    assert decayed == {name for name, _ in network.named_parameters()} - spared
    assert [group["weight_decay"] for group in groups] == [0.3, 0.0]
    assert [group["lr_multiplier"] for group in groups] == [1.0, 1.0]


def spared_names(network: nn.Module, no_decay: str) -> set[str]:
    groups = parameter_groups(network, network.named_parameters(), OptimizerOptions(no_decay=no_decay))
    return names_in(network, groups)[1]


class BiasesOfOthers(TorchFunctionMode):
    """Which parameters are given to torch's layers as what is added, by the place of the argument."""

    PLACES: Mapping[Any, tuple[int, ...]] = {
        F.linear: (2,),
        F.conv1d: (2,),
        F.conv2d: (2,),
        F.batch_norm: (4,),
        F.layer_norm: (3,),
        F.group_norm: (3,),
        F.multi_head_attention_forward: (6, 12),
    }

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[int] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = [args[place] for place in self.PLACES.get(func, ()) if place < len(args)]
        self.seen |= {id(value) for value in (*given, kwargs.get("bias")) if isinstance(value, nn.Parameter)}
        return func(*args, **kwargs)


ODD = (
    "beit_base_patch16_224",
    "swinv2_cr_tiny_ns_224",
    "swinv2_tiny_window8_256",
    "sequencer2d_s",
    "convnext_atto_rms",
)
ODD += ("cait_xxs24_224", "coatnet_0_rw_224", "dm_nfnet_f0", "convnextv2_atto", "efficientformerv2_s0")
# those that reach a layer within another tensor, or are looked up by place
PUT_TOGETHER = {"q_bias", "v_bias", "relative_position_bias_table", "attention_biases"}


@pytest.mark.parametrize("arch", [*LIBRARY_NETWORKS, *(pytest.param(f"timm/{n}", marks=needs_timm) for n in ODD)])
def test_every_bias_of_other_libraries_is_spared_whatever_it_is_called(arch: str) -> None:
    name = arch.partition("/")[2]
    library = torchvision_nets.LIBRARY if arch.startswith("torchvision/") else timm_nets.library()
    network = library._on_meta(arch, 5).to("meta")
    side = backbones.get(arch).crop_size or 224
    with BiasesOfOthers() as added:
        network(torch.empty(2, 3, side, side, device="meta"))
    spared, names = spared_names(network, "bias"), dict(network.named_parameters())
    assert {name for name, parameter in names.items() if id(parameter) in added.seen} <= spared
    others = {name.rpartition(".")[2] for name in spared if id(names[name]) not in added.seen}
    assert others <= {"bias", *PUT_TOGETHER} | {f"bias_{of}_l0{way}" for of in ("ih", "hh") for way in ("", "_reverse")}
    assert {"in_proj_bias"} <= {n.rpartition(".")[2] for n in spared} or name != "vit_b_16"
    # and of normalisations nothing is left over
    left = [name.removesuffix(".weight") for name in names.keys() - spared_names(network, "norm_bias")]
    kinds = {type(network.get_submodule(name)).__name__ for name in left if f"{name}.weight" in names}
    assert not [kind for kind in kinds if "norm" in kind.lower()]
    assert spared < spared_names(network, "norm_bias") or not any(isinstance(m, NORMS) for m in network.modules())


def test_what_a_parameter_is_decides_and_not_the_layers_above() -> None:
    attention = nn.MultiheadAttention(4, 2, add_bias_kv=True)
    assert spared_names(attention, "bias") == {"in_proj_bias", "out_proj.bias"}
    recurrent = nn.LSTM(4, 4)
    assert spared_names(recurrent, "bias") == {"bias_ih_l0", "bias_hh_l0"}
    within = nn.ModuleDict({"bias": nn.Linear(2, 2), "norm": nn.Linear(2, 2), "normed": nn.BatchNorm1d(2)})
    assert spared_names(within, "bias") == {"bias.bias", "norm.bias", "normed.bias"}
    assert spared_names(within, "norm_bias") == {"bias.bias", "norm.bias", "normed.bias", "normed.weight"}
    unbiased = nn.Module()
    unbiased.unbiased = nn.Parameter(torch.zeros(2))
    unbiased.bias1a = nn.Parameter(torch.zeros(2))
    assert spared_names(unbiased, "norm_bias") == {"bias1a"}
    halved = nn.Linear(2, 2)
    parametrize.register_parametrization(halved, "bias", nn.Softplus())
    parametrize.register_parametrization(halved, "weight", nn.Softplus())
    assert spared_names(halved, "bias") == {"parametrizations.bias.original"}

    class NormFreeBlock(nn.Module):  # as timm has it
        def __init__(self) -> None:
            super().__init__()
            self.skipinit_gain = nn.Parameter(torch.tensor(0.0))

    assert spared_names(NormFreeBlock(), "norm_bias") == set()


def test_new_heads_are_groups_of_their_own() -> None:
    network = small_network()
    options = OptimizerOptions(weight_decay=0.3, lr_multiplier=10.0)
    groups = parameter_groups(network, network.named_parameters(), options, new_heads=("3.",))
    assert names_in(network, groups)[2:] == [{"3.weight"}, {"3.bias"}]
    assert [group["weight_decay"] for group in groups] == [0.3, 0.0, 0.3, 0.0]
    optimizer = build_optimizer(options, groups)
    set_learning_rate(optimizer, 0.02)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.02, 0.02, 0.2, 0.2])


def test_only_named_parameters_are_grouped() -> None:
    network = small_network()
    options = OptimizerOptions(weight_decay=0.3)
    groups = parameter_groups(network, [("3.weight", network[3].weight)], options)
    assert names_in(network, groups) == [{"3.weight"}, set()]
    give_gradients(network, 0)
    guarded_step(build_optimizer(options, groups), flag(0.0))  # an empty group is no error


def test_unknown_names_are_refused() -> None:
    with pytest.raises(UserError, match=r"--no_decay.*'norm' is not one of bias, norm_bias"):
        OptimizerOptions(no_decay="norm")
    with pytest.raises(UserError, match=r"--optimizer.*'AdomW' .* Did you mean 'AdamW'\?"):
        OptimizerOptions(optimizer="AdomW")


# ---- optimisers ------------------------------------------------------------------------------------------------------

PLAIN = {
    "Adam": lambda groups: torch.optim.Adam(groups, 0.1, (0.9, 0.999), 1e-8, foreach=False),
    "SGD": lambda groups: torch.optim.SGD(groups, 0.1, 0.9, nesterov=True, foreach=False),
    "AdamW": lambda groups: torch.optim.AdamW(groups, 0.1, (0.9, 0.999), 1e-4, foreach=False),
    "RMSprop": lambda groups: torch.optim.RMSprop(groups, 0.1, 0.9, 1e-8, momentum=0.9, foreach=False),
}


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("name", PLAIN)
def test_equals_torchs_plain_optimiser(name: str, layout: torch.memory_format) -> None:
    network = small_network().to(memory_format=layout)
    reference = copy.deepcopy(network)
    optimizer = build(network, name)
    plain = PLAIN[name](parameter_groups(reference, reference.named_parameters(), OptimizerOptions(weight_decay=1e-2)))
    for step in range(4):
        for module in (network, reference):
            give_gradients(module, step)
        guarded_step(optimizer, flag(0.0))
        plain.step()
        for ours, theirs in zip(network.parameters(), reference.parameters(), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["Adam", "AdamW", "RMSprop", "RMSpropTF"])
def test_eps_stands_in_the_denominator(name: str) -> None:
    """One step from zero state with gradient 1: the update is lr, divided by what eps makes of the root."""
    weights = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    group = {"params": [weights], "weight_decay": 0.0, "lr_multiplier": 1.0}
    optimizer = build_optimizer(OptimizerOptions(optimizer=name, lr=0.1, optimizer_eps=0.5), [group])
    weights.grad = torch.ones_like(weights)
    guarded_step(optimizer, flag(0.0))
    expected = {"Adam": 1.5, "AdamW": 1.5, "RMSprop": 0.1**0.5 + 0.5, "RMSpropTF": 1.5**0.5}[name]
    assert weights.item() == pytest.approx(-0.1 / expected, rel=1e-12)


def test_an_eps_that_cannot_be_is_refused() -> None:
    for name, eps in (("SGD", 1e-3), ("Adam", 0.0), ("RMSpropTF", math.nan)):
        with pytest.raises(UserError, match="--optimizer_eps"):
            build(small_network(), name, optimizer_eps=eps)


def test_missing_momentum_is_zero_momentum() -> None:
    """As in the state of an optimiser of which some parameters never got a gradient."""
    network = small_network()
    optimizer = build(network, "SGD")
    state = optimizer.state_dict()
    del state["state"][0]
    state["state"][1]["momentum_buffer"] = None
    optimizer.load_state_dict(state)
    reference = copy.deepcopy(network)
    for module, stepper in ((network, optimizer), (reference, build(reference, "SGD"))):
        give_gradients(module, 0)
        guarded_step(stepper, flag(0.0))
    for ours, theirs in zip(network.parameters(), reference.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_momentum_zero_needs_no_nesterov() -> None:
    network = small_network()
    before = network[3].weight.detach().clone()
    give_gradients(network, 0)
    guarded_step(build(network, "SGD", momentum=0.0, is_nesterov=True), flag(0.0))
    torch.testing.assert_close(network[3].weight, before - 0.1 * (network[3].weight.grad + 1e-2 * before))


def test_rmsprop_tf_follows_the_golden_trajectory() -> None:
    weights = nn.Parameter(torch.tensor(GOLDEN["start"], dtype=torch.float64))
    group = {"params": [weights], "weight_decay": GOLDEN["weight_decay"], "lr_multiplier": 1.0}
    options = OptimizerOptions(optimizer="RMSpropTF", lr=GOLDEN["lr"], momentum=GOLDEN["momentum"])
    optimizer = build_optimizer(options, [group])
    assert optimizer.param_groups[0]["alpha"] == GOLDEN["alpha"]
    assert optimizer.param_groups[0]["eps"] == GOLDEN["eps"]
    for gradient, after in zip(GOLDEN["grads"], GOLDEN["after"], strict=True):
        weights.grad = torch.tensor(gradient, dtype=torch.float64)
        guarded_step(optimizer, flag(0.0))
        assert weights.tolist() == pytest.approx(after, rel=1e-13)


def test_rmsprop_serves_a_gradient_scaler() -> None:
    """`grad_scale` divides the gradients before everything else, as torch's fused optimisers have it."""
    results = []
    for scale in (1.0, 8.0):
        weights = nn.Parameter(torch.tensor([1.0, -2.0]))
        optimizer = RMSprop([weights], 0.1, weight_decay=0.1)
        weights.grad = torch.tensor([0.5, 0.25]) * scale
        optimizer.grad_scale = torch.tensor(scale)
        optimizer.step()
        results.append(weights.tolist())
    assert results[0] == results[1]


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("first", [True, False])
def test_a_flagged_step_changes_nothing(name: str, first: bool) -> None:
    network = small_network(torch.float32)
    unspoilt = copy.deepcopy(network)
    optimizer, reference = build(network, name), build(unspoilt, name)
    if not first:
        for module, stepper in ((network, optimizer), (unspoilt, reference)):
            give_gradients(module, 0)
            guarded_step(stepper, flag(0.0))
    before = snapshot(network, optimizer)
    for bad in (math.nan, math.inf):
        give_gradients(network, 1)
        network[0].weight.grad[0, 0] = bad
        guarded_step(optimizer, flag_of(clip_gradients(network.parameters(), max_norm=1.0)))
    after = snapshot(network, optimizer)
    for key in before:
        assert torch.equal(after[key], before[key]), key
    # And nothing is hidden anywhere: the next step is that of an optimiser that never saw the bad gradients.
    for module, stepper in ((network, optimizer), (unspoilt, reference)):
        give_gradients(module, 2)
        guarded_step(stepper, flag(0.0))
    for key, value in snapshot(unspoilt, reference).items():
        assert torch.equal(snapshot(network, optimizer)[key], value), key


def test_a_gradient_that_lies_otherwise_in_memory_is_read_right() -> None:
    network = small_network().to(memory_format=torch.channels_last)
    reference = copy.deepcopy(network)
    for module in (network, reference):
        give_gradients(module, 0)
    network[0].weight.grad = network[0].weight.grad.contiguous()
    assert network[0].weight.grad.stride() != network[0].weight.stride()
    for module in (network, reference):
        guarded_step(build(module, "SGD"), flag(0.0))
    assert torch.equal(network[0].weight, reference[0].weight)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_gradient_of_a_1x1_convolution_is_not_copied_for_strides_that_mean_nothing(name: str) -> None:
    network = nn.Conv2d(6, 4, 1).to(memory_format=torch.channels_last)
    reference = copy.deepcopy(network)
    give_gradients(reference, 0)
    give_gradients(network, 0)
    assert network.weight.grad is not None
    gradient = network.weight.grad.as_strided((4, 6, 1, 1), (6, 1, 1, 1))
    assert gradient.stride() != network.weight.stride()
    network.weight.grad = gradient
    with mock.patch("torch.empty_like", side_effect=AssertionError("a copy")):
        guarded_step(build(network, name), flag(0.0))
    guarded_step(build(reference, name), flag(0.0))
    assert torch.equal(network.weight, reference.weight)


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_loaded_state_continues_bit_for_bit_in_the_form_it_was_built(name: str, capturable: bool) -> None:
    """Saved beside contiguous weights by an optimiser that was not fused, loaded beside channels_last weights."""
    network = small_network()
    optimizer = build(network, name)
    give_gradients(network, 0)
    guarded_step(optimizer, flag(0.0))
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)

    resumed = copy.deepcopy(network).to(memory_format=torch.channels_last)
    loaded = build(resumed, name, capturable=capturable)
    state = torch.load(file, weights_only=True)
    for group in state["param_groups"]:
        group.pop("lr_multiplier")
        group.update({key: None for key in ("fused", "foreach") if key in group})
    loaded.load_state_dict(state)
    for group in loaded.param_groups:
        assert isinstance(group["lr"], Tensor) == capturable
    for lr in (0.05, 0.025):
        for module, stepper in ((network, optimizer), (resumed, loaded)):
            give_gradients(module, 1)
            set_learning_rate(stepper, lr)
            guarded_step(stepper, flag(0.0))
    for key, value in snapshot(network, optimizer).items():
        tolerance = {"rtol": 1e-6, "atol": 1e-7} if capturable else {"rtol": 0.0, "atol": 0.0}
        torch.testing.assert_close(snapshot(resumed, loaded)[key], value, **tolerance)


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimiser_that_starts_anew_goes_on_as_a_new_one(name: str, capturable: bool) -> None:
    network = small_network()
    optimizer = build(network, name, capturable=capturable)
    start_anew(optimizer)  # before its first step there is nothing to forget
    for step in range(2):
        give_gradients(network, step)
        guarded_step(optimizer, flag(0.0))
    twin = copy.deepcopy(network)
    state = [id(value) for parts in optimizer.state.values() for value in parts.values()]
    set_learning_rate(optimizer, 0.02)
    start_anew(optimizer)
    assert state == [id(value) for parts in optimizer.state.values() for value in parts.values()]  # in place
    new = build(twin, name, capturable=capturable)
    set_learning_rate(new, 0.02)
    for step in range(2, 4):
        for module, stepper in ((network, optimizer), (twin, new)):
            give_gradients(module, step)
            guarded_step(stepper, flag(0.0))
    for key, value in snapshot(twin, new).items():
        assert torch.equal(snapshot(network, optimizer)[key], value), key


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_state_goes_to_the_parameters_that_it_belongs_to_whatever_their_order_was(name: str) -> None:
    def twins() -> dict[str, nn.Module]:
        torch.manual_seed(0)
        return {key: nn.Linear(3, 3).double() for key in ("a", "b", "c", "unused")}

    then, now = nn.ModuleDict(twins()), nn.ModuleDict(dict(sorted(twins().items(), reverse=True)))
    for module in (then, now):
        module["unused"].requires_grad_(False)
    optimizers = []
    for module in (then, now):
        trained = [(n, p) for n, p in module.named_parameters() if p.requires_grad]
        options = OptimizerOptions(optimizer=name, lr=0.1, weight_decay=1e-2)
        groups = parameter_groups(module, trained, options, new_heads=("b.",))
        optimizers.append((build_optimizer(options, groups), names_in_order(module, groups)))
    first, second = optimizers[0][0], optimizers[1][0]
    for module, optimizer in ((then, first), (now, second)):
        for step in range(2 if module is then else 0):
            give_gradients(module, step)
            guarded_step(optimizer, flag(0.0))
    now.load_state_dict(then.state_dict())
    saved = copy.deepcopy(first.state_dict())
    orders = {"then": list(then.state_dict()), "now": list(now.state_dict())}
    second.load_state_dict(in_order(saved, optimizers[1][1], **orders))
    for key, parameter in then.named_parameters():
        gradient = torch.randn(parameter.shape, dtype=torch.float64)
        parameter.grad, now.get_parameter(key).grad = gradient.clone(), gradient.clone()
    for optimizer in (first, second):
        guarded_step(optimizer, flag(0.0))
    for key, parameter in then.named_parameters():
        assert torch.equal(now.get_parameter(key), parameter), key
    # an unchanged module changes nothing, in whatever order its parameters are trained
    for names in (optimizers[0][1], [group[::-1] for group in optimizers[0][1]]):
        for order in (orders["then"], []):
            assert in_order(saved, names, then=order, now=order)["state"] == saved["state"]


def test_the_state_of_a_parameter_of_another_shape_is_refused() -> None:
    network = small_network()
    optimizer = build(network, "SGD")
    state = optimizer.state_dict()
    state["state"][0], state["state"][1] = state["state"][1], state["state"][0]
    with pytest.raises(ValueError, match="momentum_buffer"):
        optimizer.load_state_dict(state)


# ---- norms and flags -------------------------------------------------------------------------------------------------


def test_global_norm_and_clipping() -> None:
    first, second, unused = (nn.Parameter(torch.zeros(n)) for n in (2, 1, 3))
    first.grad, second.grad = torch.tensor([2.0, 3.0]), torch.tensor([6.0])
    parameters = [first, second, unused]
    assert clip_gradients(parameters).item() == 7.0
    assert second.grad.item() == 6.0
    assert clip_gradients(parameters, max_norm=3.5).item() == 7.0
    torch.testing.assert_close(second.grad, torch.tensor([3.0]))
    assert clip_gradients(parameters, max_norm=100.0).item() == pytest.approx(3.5, rel=1e-5)
    torch.testing.assert_close(second.grad, torch.tensor([3.0]))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_guarded_step_never_waits_for_the_device(name: str) -> None:
    network = small_network(torch.float32).cuda()
    optimizer = build(network, name, capturable=True)
    give_gradients(network, 0)
    found = torch.ones((), device="cuda")
    guarded_step(optimizer, found)
    before = snapshot(network, optimizer)
    with nothing_waits():
        for _ in range(2):
            set_learning_rate(optimizer, 0.05)
            guarded_step(optimizer, flag_of(clip_gradients(network.parameters(), 1.0) * math.nan))
    for key, value in snapshot(network, optimizer).items():
        assert torch.equal(before[key], value), key


def test_rmsprop_asks_once_whether_a_step_counts() -> None:
    network = small_network(torch.float32)
    optimizer = build(network, "RMSpropTF")
    give_gradients(network, 0)
    with CountedOperations() as counted:
        guarded_step(optimizer, torch.ones(()))
    assert len(optimizer.param_groups) == 2
    assert counted.calls[torch.ops.aten.ne.Scalar] == 1


def plain_rmsprop(group: dict[str, Any], parameter: Tensor, state: dict[str, Tensor]) -> None:
    """One update of one parameter, operation for operation as the class writes it down."""
    is_tensorflow, gradient = group["tensorflow"], parameter.grad
    if not state:
        state["square_avg"] = torch.full_like(parameter, 1.0 if is_tensorflow else 0.0)
        state["momentum_buffer"] = torch.zeros_like(parameter)
    if group["weight_decay"] != 0:
        gradient = gradient.add(parameter, alpha=group["weight_decay"])
    state["square_avg"].mul_(group["alpha"]).addcmul_(gradient, gradient, value=1 - group["alpha"])
    squares = state["square_avg"]
    root = squares.add(group["eps"]).sqrt() if is_tensorflow else squares.sqrt().add(group["eps"])
    update = gradient / root
    if is_tensorflow:
        update = update.mul(group["lr"])
    state["momentum_buffer"].mul_(group["momentum"]).add_(update)
    buffer = state["momentum_buffer"]
    parameter.sub_(buffer if is_tensorflow else buffer.mul(group["lr"]))


@pytest.mark.parametrize("name", ["RMSprop", "RMSpropTF"])
@torch.no_grad()
def test_rmsprop_side_by_side_is_bit_for_bit_what_it_is_one_by_one(name: str) -> None:
    """From a state that one by one has written, with parameters that now and then have no gradient."""
    network = small_network(torch.float32).to(memory_format=torch.channels_last)
    plain = copy.deepcopy(network)
    optimizer, reference = build(network, name), build(plain, name)
    for step in range(6):
        for module in (network, plain):
            give_gradients(module, step)
            if step % 2:
                module[0].weight.grad = module[3].bias.grad = None
        for group in reference.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    plain_rmsprop(group, parameter, reference.state[parameter])
        guarded_step(optimizer, flag(0.0))
        expected, found = snapshot(plain, reference), snapshot(network, optimizer)
        assert expected.keys() == found.keys()
        assert all(torch.equal(found[key], value) for key, value in expected.items())
        if step == 2:
            optimizer.load_state_dict(reference.state_dict())
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    reference.load_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
    assert all(
        torch.equal(snapshot(plain, reference)[key], value) for key, value in snapshot(network, optimizer).items()
    )


def operations_of_an_update(name: str, layers: int, *, frozen: int = 0) -> int:
    network = nn.Sequential(*(nn.Linear(3, 3, device="meta") for _ in range(layers)))
    optimizer = build(network, name)
    for place, parameter in enumerate(network.parameters()):
        parameter.grad = torch.empty_like(parameter) if place >= frozen else None
    found = torch.zeros((), device="meta")
    guarded_step(optimizer, found)
    with CountedOperations() as counted:
        guarded_step(optimizer, found)
    return sum(counted.calls.values())


@pytest.mark.parametrize("name", ["RMSprop", "RMSpropTF"])
@pytest.mark.parametrize("frozen", [0, 1])
def test_rmsprop_has_as_many_operations_whatever_it_trains(name: str, frozen: int) -> None:
    few, many = (operations_of_an_update(name, layers, frozen=frozen) for layers in (2, 150))
    assert few == many < 50


# ---- moving average --------------------------------------------------------------------------------------------------


def test_weight_average_follows_parameters_and_buffers() -> None:
    network = small_network()
    average = WeightAverage(network, 0.9)
    expected = {name: value.clone() for name, value in network.state_dict().items()}
    for step in range(3):
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.add_(step + 1.0)
        network(torch.randn(2, 3, 4, 4, dtype=torch.float64))
        average.update(network)
        for name, value in network.state_dict().items():
            expected[name] = 0.9 * expected[name] + 0.1 * value if value.is_floating_point() else value.clone()
    for name, value in average.state_dict().items():
        torch.testing.assert_close(value, expected[name])
    assert average.state_dict()["1.num_batches_tracked"].item() == 3


def test_weight_average_walks_the_modules_only_where_a_tensor_was_replaced() -> None:
    network = small_network()
    average = WeightAverage(network, 0.5)
    average.update(network)
    with mock.patch.object(nn.Module, "state_dict", side_effect=AssertionError("a walk")):
        average.update(network)
        network[1].running_mean = torch.full((4,), 8.0, dtype=torch.float64)  # as stacking does
        with pytest.raises(AssertionError, match="a walk"):
            average.update(network)
    average.update(network)
    assert average.state_dict()["1.running_mean"].tolist() == [4.0] * 4
    network[3].weight = nn.Parameter(torch.ones_like(network[3].weight))
    before = average.state_dict()["3.weight"].clone()
    average.update(network)
    assert torch.equal(average.state_dict()["3.weight"], before.lerp(torch.ones_like(before), 0.5))


def test_weight_average_is_lent_and_given_back() -> None:
    network = small_network()
    average = WeightAverage(network, 0.5)
    with torch.no_grad():
        network[3].weight.fill_(1.0)
    average.update(network)
    own = {name: value.clone() for name, value in network.state_dict().items()}
    with average.applied_to(network):
        assert torch.equal(network[3].weight, average.state_dict()["3.weight"])
        assert not torch.equal(network[3].weight, own["3.weight"])
    for name, value in network.state_dict().items():
        assert torch.equal(value, own[name])

    other = WeightAverage(small_network(), 0.5)
    other.load_state_dict(average.state_dict())
    for name, value in other.state_dict().items():
        assert torch.equal(value, average.state_dict()[name])
    with pytest.raises(KeyError):
        other.load_state_dict({})

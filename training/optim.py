"""Optimisers, the parameter groups that they take, and steps that a non-finite gradient cannot spoil.

Nothing here waits for the device: norms, flags and (for CUDA graphs) learning rates are tensors on it.
"""

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.optim import Optimizer

from training.flat import Flat
from training.options import OptimizerOptions
from utils.device import by_type
from utils.errors import UserError

NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
NO_FACTORS: Mapping[str, float] = MappingProxyType({})
_BIAS = re.compile(r"(?<![a-z])bias(es)?(?![a-z])")


def _spared(module: nn.Module, no_decay: str) -> set[int]:
    """The ids of the parameters that weight decay leaves alone.

    A bias is what is added, and is called so by its own layer: `bias`, `in_proj_bias` of attention, `bias_ih_l0` of an
    LSTM, `q_bias`, and, because the published rule names them too, tables of relative position biases. The names of the
    layers above say nothing. `bias_k` and `bias_v` of nn.MultiheadAttention are a key and a value, and are decayed.

    Args:
        module: holds the parameters.
        no_decay: "bias"; "norm_bias", also every parameter of a normalisation: torch's kinds, and any layer whose class
            is called one and that has a weight and a bias a channel, or one of the two; "one_dimensional", every
            parameter of one dimension or none, and what a network itself names by `no_weight_decay()`.
    """
    if no_decay == "one_dimensional":
        return {id(parameter) for parameter in module.parameters() if parameter.dim() <= 1} | _named_by_networks(module)
    norms = no_decay == "norm_bias"
    spared: set[int] = set()
    for part in module.modules():
        own = dict(part.named_parameters(recurse=False))
        if norms and _is_norm(part, own):
            spared |= {id(parameter) for parameter in own.values()}
        if isinstance(part, nn.MultiheadAttention):
            own = {name: parameter for name, parameter in own.items() if name not in ("bias_k", "bias_v")}
        spared |= {id(parameter) for name, parameter in own.items() if _BIAS.search(name)}
        # a bias that torch.nn.utils.parametrize computes is kept under another name
        for name, parametrization in (getattr(part, "parametrizations", None) or {}).items():
            if _BIAS.search(name):
                spared |= {id(parameter) for parameter in parametrization.parameters(recurse=False)}
    return spared


def _named_by_networks(module: nn.Module) -> set[int]:
    """The ids of the parameters that parts of a module name by `no_weight_decay()`, from where they stand (timm)."""
    found: set[int] = set()
    for part in module.modules():
        names = getattr(part, "no_weight_decay", None)
        if callable(names):
            own = dict(part.named_parameters())
            found |= {id(own[name]) for name in names() if name in own}
    return found


def _is_norm(part: nn.Module, own: dict[str, nn.Parameter]) -> bool:
    if isinstance(part, NORMS):
        return True
    by_channel = own.keys() <= {"weight", "bias"} and all(parameter.dim() == 1 for parameter in own.values())
    return by_channel and "norm" in type(part).__name__.lower()


def parameter_groups(
    module: nn.Module,
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    options: OptimizerOptions,
    *,
    new_heads: Sequence[str] = (),
    factors: Mapping[str, float] = NO_FACTORS,
    undecayed: Collection[str] = (),
) -> list[dict[str, Any]]:
    """Parameters sorted into groups: [decayed, not decayed] and, if there are new heads, the same two of theirs.

    Where parameters have factors for their rates, these groups are split by them, lower rates last.

    --no_decay bias: every bias is spared (as published: the scales of batch norm are decayed); norm_bias: so are all
    parameters of normalisations; one_dimensional: all of one dimension, and what the networks name; with --is_wd_all
    nothing is. What counts as which says `_spared`.

    Args:
        module: the module that the names belong to; tells what a parameter is.
        named_parameters: what is to be trained, named as in `module.named_parameters()`.
        options: the flags.
        new_heads: prefixes of names that train with another learning rate ("network.models.0.fc."); --lr_multiplier
            is kept in their groups under that name.
        factors: of learning rates by name (--layer_decay); 1 for those that are not named.
        undecayed: names of parameters that are not decayed whatever they are.
    """
    spared = set() if options.is_wd_all else _spared(module, options.no_decay)
    groups: list[dict[str, Any]] = [
        {"params": [], "weight_decay": decay, "lr_multiplier": multiplier}
        for multiplier in (1.0, options.lr_multiplier)
        for decay in (options.weight_decay, 0.0)
    ]
    for name, parameter in named_parameters:
        is_spared = id(parameter) in spared or name in undecayed
        groups[2 * name.startswith(tuple(new_heads)) + is_spared]["params"].append((name, parameter))
    return [part for i, group in enumerate(groups) for part in _by_factor(group, factors, keep_empty=i < 2)]


def _by_factor(group: dict[str, Any], factors: Mapping[str, float], *, keep_empty: bool) -> list[dict[str, Any]]:
    """A group of (name, parameter) pairs as groups of parameters of one rate each."""
    by_factor: dict[float, list[nn.Parameter]] = {1.0: []} if keep_empty and not factors else {}
    for name, parameter in group["params"]:
        by_factor.setdefault(factors.get(name, 1.0), []).append(parameter)
    return [
        {**group, "params": parameters, "lr_multiplier": group["lr_multiplier"] * factor}
        for factor, parameters in sorted(by_factor.items(), reverse=True)
    ]


def build_optimizer(
    options: OptimizerOptions, groups: Sequence[dict[str, Any]], *, capturable: bool = False
) -> Optimizer:
    """The optimiser that the flags name, over the groups of `parameter_groups`, in the fused form where torch has one.

    SGD; AdamW (betas 0.9, 0.999, eps 1e-4); RMSprop (alpha 0.9, eps 1e-8) and RMSpropTF (alpha 0.9, eps 1e-3): the
    settings of arXiv:2011.14660, torch's own eps for RMSprop, which has no published one. Adam, with the decay in the
    gradient, is as torch has it (betas 0.9, 0.999, eps 1e-8). --lr holds before the first `set_learning_rate`;
    Nesterov means nothing without momentum.

    Args:
        options: the flags.
        groups: parameter groups with `weight_decay` and `lr_multiplier`.
        capturable: keep learning rates on the device, so that a step can be captured in a CUDA graph.

    Raises:
        UserError: an eps that the optimiser cannot take.
    """
    name, lr, momentum, eps = options.optimizer, options.lr, options.momentum, options.optimizer_eps
    if eps is not None and name == "SGD":
        raise UserError("--optimizer_eps is none of --optimizer SGD's settings: leave it away.")
    parameters = [p for group in groups for p in group["params"]]
    device = parameters[0].device
    groups = [{**group, "lr": torch.tensor(lr, device=device) if capturable else lr} for group in groups]
    optimizer: Optimizer
    if name == "SGD":
        optimizer = torch.optim.SGD(groups, lr, momentum, nesterov=options.is_nesterov and momentum > 0, fused=True)
    elif name in ("Adam", "AdamW"):
        on_gpu = capturable and device.type == "cuda"
        kind, usual = (torch.optim.Adam, 1e-8) if name == "Adam" else (torch.optim.AdamW, 1e-4)
        eps = usual if eps is None else eps
        optimizer = kind(groups, lr, betas=(0.9, 0.999), eps=eps, fused=True, capturable=on_gpu)
        # Steps before the capture are not a mistake.
        optimizer._warned_capturable_if_run_uncaptured = True
    else:
        optimizer = RMSprop(groups, lr, momentum=momentum, tensorflow=name == "RMSpropTF", eps=eps)
    _fill_momentum(optimizer)
    _keep_form(optimizer)
    set_learning_rate(optimizer, lr)
    return optimizer


def _fill_momentum(optimizer: Optimizer) -> None:
    """Give SGD the momentum buffers that it lacks, at zero, from where the first step goes as it does without them.

    torch makes them in the first step without filling them, which a first step that is skipped would expose.
    """
    if isinstance(optimizer, torch.optim.SGD):
        for group in optimizer.param_groups:
            for parameter in group["params"] if group["momentum"] > 0 else ():
                if optimizer.state[parameter].get("momentum_buffer") is None:
                    optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)


def _keep_form(optimizer: Optimizer) -> None:
    """Let a loaded state bring values only: how and where this optimiser computes stays as it was built.

    A state saved on another device or with another memory format would otherwise move learning rates off the device,
    or make fused kernels, which read memory as it lies, combine the wrong elements.
    """
    fixed = ("fused", "capturable", "foreach", "lr_multiplier")
    forms = [{key: group[key] for key in fixed if key in group} for group in optimizer.param_groups]
    rates = [group["lr"] for group in optimizer.param_groups]

    def restore(loaded: Optimizer) -> None:
        for group, form, rate in zip(loaded.param_groups, forms, rates, strict=True):
            value = float(group["lr"])
            group.update(form)
            group["lr"] = rate.fill_(value) if isinstance(rate, Tensor) else value
        for parameter, state in loaded.state.items():
            for key, value in state.items():
                if isinstance(value, Tensor):
                    same = value.shape == parameter.shape
                    if not same and value.dim():  # a fused kernel would write behind its end
                        raise ValueError(f"{key} of {list(value.shape)}, and its parameter is {list(parameter.shape)}")
                    state[key] = torch.empty_like(parameter).copy_(value) if same else value.to(parameter.device)
        _fill_momentum(loaded)

    optimizer.register_load_state_dict_post_hook(restore)


def start_anew(optimizer: Optimizer) -> None:
    """Bring an optimiser of `build_optimizer` to where a new one stands: nothing gathered; rates and decay as they are.

    In place and on the device, so that a captured CUDA graph goes on with it.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            for key, value in optimizer.state.get(parameter, {}).items():
                value.fill_(1.0 if key == "square_avg" and group["tensorflow"] else 0.0)


def in_order(
    saved: dict[str, Any], groups: Sequence[Sequence[str]], *, then: Iterable[str], now: Iterable[str]
) -> dict[str, Any]:
    """A state dict of an optimiser of which the parameters may have stood in another order, in the order of today.

    torch knows a parameter by its number alone: its place in its group, where groups follow each other.

    Args:
        saved: as `state_dict()` gave it.
        groups: names of the parameters of each group, today; in the module's order or any other that follows from it.
        then, now: names in the order in which the module had and has them; one that is missing stands behind.
    """
    places_then, places_now = ({name: i for i, name in reversed([*enumerate(names)])} for names in (then, now))
    state, first = {}, 0
    for names in groups:
        by_place_then = sorted(names, key=lambda name: places_then.get(name, len(places_then)))
        by_place_now = sorted(names, key=lambda name: places_now.get(name, len(places_now)))
        in_the_place_of = dict(zip(by_place_now, by_place_then, strict=True))
        number_then = {in_the_place_of[name]: number for number, name in enumerate(names, start=first)}
        for number, name in enumerate(names, start=first):
            if number_then[name] in saved["state"]:
                state[number] = saved["state"][number_then[name]]
        first += len(names)
    return {**saved, "state": state}


def set_learning_rate(optimizer: Optimizer, lr: float) -> None:
    """Set every group's learning rate to `lr` times its multiplier; tensors on the device are written in place."""
    for group in optimizer.param_groups:
        rate = lr * group["lr_multiplier"]
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def clip_gradients(
    parameters: Iterable[nn.Parameter], max_norm: float | None = None, *, others: dist.ProcessGroup | None = None
) -> Tensor:
    """Global L2 norm of the gradients before clipping, as a scalar tensor; non-finite if any gradient is.

    Args:
        parameters: those without a gradient are passed over.
        max_norm: gradients are scaled in place so that their norm is at most this; None only measures.
        others: processes that hold further parameters, which the norm is to cover too; None: there are none.
    """
    trained = [p for p in parameters if p.grad is not None]
    norm = nn.utils.get_total_norm([p.grad for p in trained if p.grad is not None])
    if others is not None:
        square = norm.double().square()
        dist.all_reduce(square, group=others)
        norm = square.sqrt().to(norm.dtype)
    if max_norm is not None:
        nn.utils.clip_grads_with_norm_(trained, max_norm, norm)
    return norm


def guarded_step(optimizer: Optimizer, found_nonfinite: Tensor) -> None:
    """`optimizer.step()` that leaves weights and state bit for bit as they are where the flag is 1.

    The device itself decides: nothing waits for the flag's value.

    Args:
        optimizer: from `build_optimizer`.
        found_nonfinite: float32 scalar on the parameters' device, 0 or 1, the same on every process.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            gradient = parameter.grad
            if gradient is None or gradient.stride() == parameter.stride():  # nearly always
                continue
            if not _lie_alike(gradient, parameter):
                # Fused kernels read memory as it lies; autograd's own gradients always lie as their parameters do.
                parameter.grad = torch.empty_like(parameter).copy_(gradient)
    optimizer.found_inf = found_nonfinite  # type: ignore[attr-defined]
    try:
        optimizer.step()
    finally:
        del optimizer.found_inf  # type: ignore[attr-defined]


def _lie_alike(one: Tensor, other: Tensor) -> bool:
    """Whether tensors of one shape keep their elements in one order; strides of dimensions of size 1 mean nothing."""
    return all(a == b for size, a, b in zip(one.shape, one.stride(), other.stride(), strict=True) if size > 1)


class RMSprop(Optimizer):
    """RMSprop with momentum and coupled weight decay (Tieleman and Hinton, 2012), in torch's or TensorFlow's form.

    torch:      v ← alpha v + (1 - alpha) g²;  b ← momentum b + g / (√v + eps);        w ← w - lr b;  v starts at 0
    TensorFlow: v ← alpha v + (1 - alpha) g²;  b ← momentum b + lr g / √(v + eps);     w ← w - b;     v starts at 1

    Like torch's fused optimisers it honours `grad_scale` and `found_inf`, so GradScaler and `guarded_step` need no
    synchronisation.

    Args:
        params: parameters or groups.
        lr: learning rate.
        alpha: decay of the mean square.
        momentum: decay of the buffer; 0: none.
        weight_decay: added to the gradient.
        tensorflow: which of the two forms.
        eps: None: 1e-3 (TensorFlow's) or 1e-8.
    """

    _step_supports_amp_scaling = True
    _storages: dict[int, tuple[list[Tensor], list["_Storage"]]]

    def __init__(
        self,
        params: Any,
        lr: float,
        *,
        alpha: float = 0.9,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        tensorflow: bool = False,
        eps: float | None = None,
    ) -> None:
        if eps is None:
            eps = 1e-3 if tensorflow else 1e-8
        super().__init__(
            params,
            {
                "lr": lr,
                "alpha": alpha,
                "eps": eps,
                "momentum": momentum,
                "weight_decay": weight_decay,
                "tensorflow": tensorflow,
            },
        )
        self._storages = {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """What is loaded or copied is brought to one storage by the next step."""
        super().__setstate__(state)
        self._storages = {}

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update of every parameter that has a gradient; the number of operations does not depend on how many."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        found_inf = getattr(self, "found_inf", None)
        skips = None if found_inf is None else found_inf != 0
        for number, group in enumerate(self.param_groups):
            for storage in self._stored(number, group):
                self._update(group, storage, skips)
        return loss

    def _stored(self, number: int, group: dict[str, Any]) -> list["_Storage"]:
        """The storage of a group: one for each type and device among its parameters."""
        parameters = group["params"]
        known, storages = self._storages.get(number, ([], []))
        if len(known) != len(parameters) or any(a is not b for a, b in zip(known, parameters, strict=True)):
            square_avg = 1.0 if group["tensorflow"] else 0.0
            storages = [_Storage([parameters[i] for i in some], square_avg=square_avg) for some in by_type(parameters)]
            self._storages[number] = (list(parameters), storages)
        return storages

    def _update(self, group: dict[str, Any], storage: "_Storage", skips: Tensor | None) -> None:
        trained = [i for i, parameter in enumerate(storage.parameters) if parameter.grad is not None]
        if not trained:
            return
        storage.adopt(self.state, trained)
        parameters = [storage.parameters[i] for i in trained]
        torch._foreach_copy_(storage.gradients.of(trained), [p.grad for p in parameters if p.grad is not None])
        torch._foreach_copy_(storage.weights.of(trained), parameters)

        gradients, weights = storage.gradients.whole, storage.weights.whole
        squares, new_squares = storage.squares.whole, storage.new_squares.whole
        buffers, new_buffers = storage.buffers.whole, storage.new_buffers.whole
        if (grad_scale := getattr(self, "grad_scale", None)) is not None:
            gradients.div_(grad_scale)
        if group["weight_decay"] != 0:
            gradients.add_(weights, alpha=group["weight_decay"])
        torch.mul(squares, group["alpha"], out=new_squares).addcmul_(gradients, gradients, value=1 - group["alpha"])
        if group["tensorflow"]:
            updates = gradients.div_(new_squares.add(group["eps"]).sqrt_()).mul_(group["lr"])
        else:
            updates = gradients.div_(new_squares.sqrt().add_(group["eps"]))
        torch.mul(buffers, group["momentum"], out=new_buffers).add_(updates)
        new_weights = weights - (new_buffers if group["tensorflow"] else new_buffers.mul(group["lr"]))

        if skips is not None:
            for old, new in ((squares, new_squares), (buffers, new_buffers), (weights, new_weights)):
                torch.where(skips, old, new, out=new)
        weights.copy_(new_weights)
        torch._foreach_copy_(parameters, storage.weights.of(trained))
        for old_side, new_side in ((storage.squares, storage.new_squares), (storage.buffers, storage.new_buffers)):
            if len(trained) == len(storage.parameters):
                old_side.whole.copy_(new_side.whole)
            else:
                torch._foreach_copy_(old_side.of(trained), new_side.of(trained))


class _Storage:
    """RMSprop's storage for parameters of one group, type and device: one tensor for each of their states, of which
    `optimizer.state` has the parts.

    So an operation on a state is one, however many parameters there are. What lies between the parts, for alignment,
    and in the parts of parameters without gradients, is computed and never read.

    Args:
        parameters: in their order.
        square_avg: what a mean square starts at.

    Attributes:
        squares, buffers: the states.
        new_squares, new_buffers, gradients, weights: room for a step; kept, because parts take long to make.
    """

    def __init__(self, parameters: list[Tensor], *, square_avg: float) -> None:
        self.parameters = parameters
        self.squares, self.buffers = Flat(parameters, square_avg), Flat(parameters)
        self.new_squares, self.new_buffers = Flat(parameters), Flat(parameters)
        self.gradients, self.weights = Flat(parameters), Flat(parameters)

    def adopt(self, state: Mapping[Tensor, dict[str, Tensor]], places: Sequence[int]) -> None:
        """Let the states of these parameters be parts of the whole; values that were loaded are taken over."""
        for place in places:
            own = state[self.parameters[place]]
            for name, side in (("square_avg", self.squares), ("momentum_buffer", self.buffers)):
                part, value = side.parts[place], own.get(name)
                if value is not part:
                    if value is not None:
                        part.copy_(value)
                    own[name] = part


class _Pair(NamedTuple):
    """A parameter or buffer, where its module keeps it, and its average."""

    owner: Mapping[str, Tensor | None]
    key: str
    value: Tensor
    average: Tensor


def _pairs(module: nn.Module, average: Mapping[str, Tensor]) -> list[_Pair]:
    """Everything that the module's state dict names, beside its average.

    What a hook has put there, and no module keeps, is in no owner: it is asked for anew in every update.
    """
    places: dict[int, tuple[Mapping[str, Tensor | None], str]] = {}
    for part in module.modules():
        for owner in (part._parameters, part._buffers):
            places.update((id(value), (owner, key)) for key, value in owner.items())
    state = module.state_dict(keep_vars=True)
    return [_Pair(*places.get(id(state[name]), ({}, name)), state[name], value) for name, value in average.items()]


class WeightAverage:
    """Exponential moving average of a module's parameters and buffers; integer buffers are copied.

    Args:
        module: whose state starts the average.
        decay: in [0, 1); average ← decay · average + (1 - decay) · current, after every step.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self._average = {name: value.clone() for name, value in module.state_dict().items()}
        self._pairs: list[_Pair] = []
        self._averaged: tuple[list[Tensor], list[Tensor]] = [], []  # averages, and what they follow
        self._copied: tuple[list[Tensor], list[Tensor]] = [], []  # of whole numbers, which have no average

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Move the average towards the module's present state; the same module in every call."""
        # walking the modules takes longer than the update; a tensor is replaced now and then (`stacked` does so)
        if not self._pairs or any(pair.owner.get(pair.key) is not pair.value for pair in self._pairs):
            self._pairs = _pairs(module, self._average)
            averaged = [pair for pair in self._pairs if pair.value.is_floating_point()]
            copied = [pair for pair in self._pairs if not pair.value.is_floating_point()]
            self._averaged = [pair.average for pair in averaged], [pair.value for pair in averaged]
            self._copied = [pair.average for pair in copied], [pair.value for pair in copied]
        torch._foreach_lerp_(*self._averaged, 1 - self.decay)
        if self._copied[0]:
            torch._foreach_copy_(*self._copied)

    @contextmanager
    def applied_to(self, module: nn.Module) -> Iterator[None]:
        """Within the context the module holds the average; after it, its own state again, bit for bit."""
        own = {name: value.clone() for name, value in module.state_dict().items()}
        module.load_state_dict(self._average)
        try:
            yield
        finally:
            module.load_state_dict(own)

    def state_dict(self) -> dict[str, Tensor]:
        """The averaged state under the module's own names: loads into the module as it is."""
        return dict(self._average)

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Inverse of `state_dict`.

        Raises:
            KeyError: a name is missing.
        """
        for name, value in self._average.items():
            value.copy_(state[name])

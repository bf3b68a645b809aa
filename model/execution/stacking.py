"""S networks of one structure as one network with S times the channels and groups.

The code of the first network runs once, on `Stacked` maps: logically [B, C, ...], in memory [B, S * C, ...], network
by network. Its parameters are `Joined`: those of all networks, concatenated when a rule needs them, so that gradients
reach the networks' own parameters and state dicts stay as they are. Every operation needs a rule in `_RULES`; one
without a rule raises NotStackable. No family has to be written twice.
"""

import copy
from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from model.layers.onednn import conv2d
from model.layers.random import RandomLayer
from model.layers.sync_norm import ProcessSyncBatchNorm, SyncBatchNorm

NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm, SyncBatchNorm, ProcessSyncBatchNorm)


class NotStackable(Exception):
    """These networks cannot run by the strategy that was asked for; the message says why."""


def _dispatch(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any] | None) -> Any:
    rule = _RULES.get(func)
    if rule is None:
        raise NotStackable(f"the operation {getattr(func, '__name__', func)} has no stacked form")
    return rule(*args, **(kwargs or {}))


class Joined:
    """One parameter (or buffer) of each of the S networks, in the place of the first network's own."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.tensors = tuple(tensors)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _dispatch(func, args, kwargs)

    def cat(self) -> Tensor:
        """[S * n, ...] from S times [n, ...]."""
        return torch.cat(self.tensors)

    def stack(self) -> Tensor:
        """[S, n, ...] from S times [n, ...]."""
        return torch.stack(self.tensors)


class Stacked:
    """A map [B, C, ...] of each of S networks.

    Args:
        merged: [B, S * C, ...], network by network.
        size: S.
        is_view: it may share memory with another map, so it must not be written in place.
    """

    def __init__(self, merged: Tensor, size: int, is_view: bool = False) -> None:
        self.merged = merged
        self.size_S = size
        self.is_view = is_view

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _dispatch(func, args, kwargs)

    @property
    def apart(self) -> Tensor:
        """[B, S, C, ...]."""
        return self.merged.unflatten(1, (self.size_S, -1))

    @property
    def shape(self) -> torch.Size:
        """Of one network's map: [B, C, ...]."""
        B, SC, *rest = self.merged.shape
        return torch.Size([B, SC // self.size_S, *rest])

    @property
    def ndim(self) -> int:
        return self.merged.dim()

    @property
    def dtype(self) -> torch.dtype:
        return self.merged.dtype

    @property
    def device(self) -> torch.device:
        return self.merged.device

    def dim(self) -> int:
        return self.merged.dim()

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def __len__(self) -> int:
        return self.merged.shape[0]

    def __iter__(self) -> NoReturn:
        raise NotStackable("it iterates over the images")

    def __bool__(self) -> NoReturn:
        raise NotStackable("it branches on a value")

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise NotStackable(f"the operation {name} has no stacked form")


def _join(split_BSC: Tensor, size: int, is_view: bool = True) -> Stacked:
    """[B, S, C, ...] as a map."""
    if split_BSC.dim() < 3:
        raise NotStackable("it reduces a map to less than [B, C]")
    return Stacked(split_BSC.flatten(1, 2), size, is_view)


def _require_map(x: Any) -> Stacked:
    if not isinstance(x, Stacked):
        raise NotStackable(f"a {type(x).__name__} stands where a map of features is expected")
    return x


# ---- rules -----------------------------------------------------------------------------------------------------------


def _conv2d(
    x: Any, weight: Any, bias: Any = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: int = 1
) -> Stacked:
    if not isinstance(weight, Joined) or not (bias is None or isinstance(bias, Joined)):
        raise NotStackable("a convolution computes its weights")
    x = _require_map(x)
    joined_bias = None if bias is None else bias.cat()
    out = conv2d(x.merged, weight.cat(), joined_bias, stride, padding, dilation, x.size_S * groups)
    return Stacked(out, x.size_S)


def _linear(x: Any, weight: Any, bias: Any = None) -> Stacked:
    if not isinstance(weight, Joined) or not (bias is None or isinstance(bias, Joined)):
        raise NotStackable("a linear layer computes its weights")
    x = _require_map(x)
    if x.ndim != 2:
        raise NotStackable(f"a linear layer takes a map of {x.ndim} dimensions")
    inputs_SBD, weight_SDK = x.apart.transpose(0, 1), weight.stack().transpose(1, 2)
    if bias is None:
        out_SBK = torch.bmm(inputs_SBD, weight_SDK)
    else:
        out_SBK = torch.baddbmm(bias.stack().unsqueeze(1), inputs_SBD, weight_SDK)
    return _join(out_SBK.transpose(0, 1), x.size_S, is_view=False)


def _pointwise(func: Callable[..., Tensor], in_place: bool = False) -> Callable[..., Stacked]:
    """Rule of an operation on each number; maps may differ where they broadcast."""

    def rule(*args: Any, **kwargs: Any) -> Stacked:
        maps = [x for x in args if isinstance(x, Stacked)]
        if any(isinstance(x, Tensor | Joined) for x in chain(args, kwargs.values())):
            raise NotStackable("it combines a map with a tensor that is no map")
        if any(x.ndim != maps[0].ndim for x in maps):
            raise NotStackable("it combines maps of different dimensions")
        if (in_place or kwargs.get("inplace")) and _require_map(args[0]).is_view:
            raise NotStackable("it writes into a part of a map")
        size = maps[0].size_S
        if all(x.merged.shape[1] == maps[0].merged.shape[1] for x in maps):
            return Stacked(func(*(x.merged if isinstance(x, Stacked) else x for x in args), **kwargs), size)
        if in_place:
            raise NotStackable("it writes into a map of other channels")
        return _join(func(*(x.apart if isinstance(x, Stacked) else x for x in args), **kwargs), size, is_view=False)

    return rule


def _trailing(func: Callable[..., Tensor]) -> Callable[..., Stacked]:
    """Rule of an operation on the positions of each channel, such as pooling."""

    def rule(x: Any, *args: Any, **kwargs: Any) -> Stacked:
        x = _require_map(x)
        if x.ndim < 3:
            raise NotStackable("it pools something that is no map")
        return Stacked(func(x.merged, *args, **kwargs), x.size_S)

    return rule


def _shifted(x: Stacked, dim: int) -> int:
    """The dimension of `x.apart` that is `dim` of the map.

    Raises:
        NotStackable: the images.
    """
    dim = dim + x.ndim if dim < 0 else dim
    if not 1 <= dim < x.ndim:
        raise NotStackable("it works across the images of a batch")
    return dim + 1


def _along(func: Callable[..., Tensor], is_view: bool = False) -> Callable[..., Stacked]:
    """Rule of a function of (map, dim or dims, keywords)."""

    def rule(x: Any, dim: Any = None, *args: Any, **kwargs: Any) -> Stacked:
        x = _require_map(x)
        if dim is None:
            raise NotStackable("it reduces over all images")
        kwargs.pop("_stacklevel", None)
        dims = tuple(_shifted(x, d) for d in dim) if isinstance(dim, tuple | list) else _shifted(x, dim)
        return _join(func(x.apart, dims, *args, **kwargs), x.size_S, is_view)

    return rule


def _cat(tensors: Sequence[Any], dim: int = 0) -> Stacked:
    maps = [_require_map(x) for x in tensors]
    return _join(torch.cat([x.apart for x in maps], _shifted(maps[0], dim)), maps[0].size_S, is_view=False)


def _pieces(func: Callable[..., Any]) -> Callable[..., tuple[Stacked, ...]]:
    def rule(x: Any, sections: Any, dim: int = 0) -> tuple[Stacked, ...]:
        x = _require_map(x)
        return tuple(_join(part, x.size_S) for part in func(x.apart, sections, _shifted(x, dim)))

    return rule


def _flatten(x: Any, start_dim: int = 0, end_dim: int = -1) -> Stacked:
    x = _require_map(x)
    return _join(x.apart.flatten(_shifted(x, start_dim), _shifted(x, end_dim)), x.size_S)


def _unflatten(x: Any, dim: int, sizes: Any) -> Stacked:
    x = _require_map(x)
    return _join(x.apart.unflatten(_shifted(x, dim), sizes), x.size_S)


def _reshape(x: Any, *shape: Any) -> Stacked:
    x = _require_map(x)
    batch, *rest = shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape
    if batch != len(x) or not rest:
        raise NotStackable("it reshapes the images of a batch")
    return _join(x.apart.reshape(batch, x.size_S, *rest), x.size_S)


def _reshape_as(x: Any, other: Any) -> Stacked:
    return _reshape(x, tuple(_require_map(other).shape))


def _transpose(x: Any, dim0: int, dim1: int) -> Stacked:
    x = _require_map(x)
    return _join(x.apart.transpose(_shifted(x, dim0), _shifted(x, dim1)), x.size_S)


def _permute(x: Any, *dims: Any) -> Stacked:
    x = _require_map(x)
    first, *rest = dims[0] if len(dims) == 1 and not isinstance(dims[0], int) else dims
    if first != 0:
        raise NotStackable("it moves the images of a batch")
    return _join(x.apart.permute(0, 1, *(_shifted(x, dim) for dim in rest)), x.size_S)


def _unsqueeze(x: Any, dim: int) -> Stacked:
    x = _require_map(x)
    dim = dim + x.ndim + 1 if dim < 0 else dim
    if dim < 1:
        raise NotStackable("it moves the images of a batch")
    return _join(x.apart.unsqueeze(dim + 1), x.size_S)


def _getitem(x: Any, index: Any) -> Stacked:
    x = _require_map(x)
    index = index if isinstance(index, tuple) else (index,)
    known = all(isinstance(part, slice | int) or part is None or part is Ellipsis for part in index)
    indexed = sum(isinstance(part, slice | int) for part in index)
    if known and index[0] == slice(None):
        index = (slice(None), *index)
    elif not known or index[0] is not Ellipsis or indexed >= x.ndim:
        raise NotStackable("it selects images of a batch")
    return _join(x.apart[index], x.size_S)


def _pad(x: Any, pad: Sequence[int], mode: str = "constant", value: float | None = None) -> Stacked:
    x = _require_map(x)
    if len(pad) <= 2 * (x.ndim - 2):
        return Stacked(F.pad(x.merged, pad, mode, value), x.size_S)
    if len(pad) == 2 * (x.ndim - 1) and mode == "constant":
        return _join(F.pad(x.apart, pad, mode, value), x.size_S)
    raise NotStackable("it pads the batch with images")


_POINTWISE: list[Callable[..., Any]] = [
    *(torch.relu, torch.sigmoid, torch.tanh, torch.exp, torch.abs, torch.square, torch.sqrt, torch.neg, torch.selu),
    *(torch.add, torch.sub, torch.rsub, torch.mul, torch.div, torch.pow, torch.clamp, F.sigmoid, F.tanh, F.softplus),
    *(F.relu, F.relu6, F.silu, F.gelu, F.hardswish, F.hardsigmoid, F.hardtanh, F.leaky_relu, F.elu, F.mish),
]
_IN_PLACE = (torch.relu_, Tensor.add_, Tensor.mul_, Tensor.sub_, Tensor.div_, Tensor.sigmoid_)
_TRAILING = (F.avg_pool2d, F.adaptive_avg_pool2d, F.adaptive_max_pool2d, F.max_pool2d, torch.max_pool2d, F.interpolate)
_ALONG: list[Callable[..., Any]] = [
    *(torch.sum, torch.mean, torch.amax, torch.amin, torch.softmax, torch.log_softmax, F.softmax, F.log_softmax)
]

_RULES: dict[Any, Callable[..., Any]] = {
    F.conv2d: _conv2d,
    F.linear: _linear,
    torch.cat: _cat,
    torch.chunk: _pieces(torch.chunk),
    torch.split: _pieces(torch.split),
    torch.flatten: _flatten,
    torch.unflatten: _unflatten,
    torch.reshape: _reshape,
    torch.transpose: _transpose,
    torch.permute: _permute,
    torch.unsqueeze: _unsqueeze,
    F.pad: _pad,
    **{func: _pointwise(func) for func in _POINTWISE},
    **{func: _pointwise(func, in_place=True) for func in _IN_PLACE},
    **{func: _trailing(func) for func in _TRAILING},
    **{func: _along(func) for func in _ALONG},
}

# What is written as a method or an operator of the map.
_METHODS: dict[str, Callable[..., Any]] = {
    **{name: _RULES[getattr(torch, name)] for name in ("cat", "chunk", "split", "flatten", "unflatten", "reshape")},
    **{name: _RULES[getattr(torch, name)] for name in ("transpose", "permute", "unsqueeze", "sum", "mean", "amax")},
    **{name: _RULES[getattr(torch, name)] for name in ("amin", "softmax", "log_softmax", "relu", "sigmoid", "tanh")},
    **{name: _RULES[getattr(torch, name)] for name in ("exp", "abs", "square", "sqrt", "neg", "add", "sub", "mul")},
    **{name: _RULES[getattr(torch, name)] for name in ("div", "pow", "clamp")},
    **{name: _RULES[getattr(Tensor, name)] for name in ("add_", "mul_", "sub_", "div_", "sigmoid_")},
    "relu_": _RULES[torch.relu_],
    "view": _reshape,
    "view_as": _reshape_as,
    "reshape_as": _reshape_as,
    "to": _pointwise(Tensor.to),
    "float": _pointwise(Tensor.float),
    "type_as": _pointwise(Tensor.type_as),
    "contiguous": _pointwise(Tensor.contiguous),
    "clone": _pointwise(Tensor.clone),
    "detach": _pointwise(Tensor.detach),
    "__getitem__": _getitem,
    "__add__": _RULES[torch.add],
    "__radd__": _RULES[torch.add],
    "__sub__": _RULES[torch.sub],
    "__rsub__": _pointwise(Tensor.__rsub__),
    "__mul__": _RULES[torch.mul],
    "__rmul__": _RULES[torch.mul],
    "__truediv__": _RULES[torch.div],
    "__pow__": _RULES[torch.pow],
    "__neg__": _RULES[torch.neg],
    "__iadd__": _RULES[Tensor.add_],
    "__isub__": _RULES[Tensor.sub_],
    "__imul__": _RULES[Tensor.mul_],
    "__itruediv__": _RULES[Tensor.div_],
}


def _method(rule: Callable[..., Any]) -> Callable[..., Any]:
    def method(self: Stacked, *args: Any, **kwargs: Any) -> Any:
        return rule(self, *args, **kwargs)

    return method


for _name, _rule in _METHODS.items():
    setattr(Stacked, _name, _method(_rule))


# ---- layers with state of their own ----------------------------------------------------------------------------------


class StackedNorm(nn.Module):
    """Batch normalisation of S networks as one over S * C channels.

    Its buffers are those of all networks in one piece, and the networks' own become views of it: a running mean is
    written once and stands in both.
    """

    running_mean: Tensor | None
    running_var: Tensor | None
    num_batches_tracked: Tensor | None

    def __init__(self, norms: Sequence[nn.Module]) -> None:
        super().__init__()
        self.norms: tuple[Any, ...] = tuple(norms)
        if self.norms[0].momentum is None and self.norms[0].track_running_stats:
            raise NotStackable("a batch norm averages all batches alike (momentum None)")
        self._views: dict[str, tuple[Tensor, ...]] = {}
        for name, buffer in self.norms[0].named_buffers():
            self.register_buffer(name, buffer)
        self.tie()

    def tie(self) -> None:
        """Make the networks' buffers views of the stacked ones again, where they have been replaced."""
        for name in self._buffers:
            views = self._views.get(name, ())
            own = [norm._buffers[name] for norm in self.norms]
            if len(views) == len(own) and all(a is b for a, b in zip(views, own, strict=True)):
                continue
            whole = torch.stack(own)
            self._buffers[name] = whole if whole.dim() == 1 else whole.flatten(0, 1)
            self._views[name] = tuple(whole)
            for norm, view in zip(self.norms, whole, strict=True):
                norm._buffers[name] = view

    def forward(self, x: Any) -> Stacked:
        """Map of [B, C, H, W] -> the same."""
        x, first = _require_map(x), self.norms[0]
        weight = None if first.weight is None else torch.cat([norm.weight for norm in self.norms])
        bias = None if first.bias is None else torch.cat([norm.bias for norm in self.norms])
        if type(first) is not nn.BatchNorm2d:
            tensors = {"weight": weight, "bias": bias, **self._buffers}
            state = {name: tensor for name, tensor in tensors.items() if tensor is not None}
            return Stacked(functional_call(first, state, (x.merged,)), x.size_S)
        tracks = first.training and first.track_running_stats
        if tracks and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        used = not first.training or first.track_running_stats
        out = F.batch_norm(
            x.merged,
            self.running_mean if used else None,
            self.running_var if used else None,
            weight,
            bias,
            first.training or self.running_mean is None,
            first.momentum or 0.0,
            first.eps,
        )
        return Stacked(out, x.size_S)


class StackedRandom(nn.Module):
    """A random layer of S networks: each draws for itself, and the draws act on the stacked map."""

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.layers: tuple[Any, ...] = tuple(layers)

    def forward(self, *maps: Any) -> Any:
        """Maps [B, C, ...] -> one of that shape."""
        first = self.layers[0]
        if not first.is_random:
            return first(*maps)
        draws = zip(*(layer.draw(maps[0]) for layer in self.layers), strict=True)
        stacked = [torch.stack(parts, dim=1) for parts in draws]
        return _join(first.combine(*(_require_map(x).apart for x in maps), *stacked), maps[0].size_S, is_view=False)


# ---- networks --------------------------------------------------------------------------------------------------------


def require_one_structure(networks: Sequence[nn.Module]) -> None:
    """Refuse networks that cannot run as one.

    Raises:
        NotStackable: their structures differ.
    """
    first = _structure(networks[0])
    if any(_structure(network) != first for network in networks[1:]):
        raise NotStackable("the networks differ in structure")


def _structure(network: nn.Module) -> Any:
    shapes = [(name, tuple(t.shape)) for name, t in chain(network.named_parameters(), network.named_buffers())]
    return type(network), repr(network), shapes


def stack(networks: Sequence[nn.Module]) -> nn.Module:
    """A module that maps a `Stacked` image batch to `Stacked` logits; it shares all tensors with the networks.

    Raises:
        NotStackable: their structures differ, or a layer has no stacked form.
    """
    require_one_structure(networks)
    first = networks[0]
    # copies made by deepcopy take these for the originals' parts, wherever the network keeps them
    memo: dict[int, Any] = {}
    for parts in zip(*(network.modules() for network in networks), strict=True):
        if type(parts[0]) in NORMS:
            memo[id(parts[0])] = StackedNorm(parts)
        elif isinstance(parts[0], RandomLayer):
            memo[id(parts[0])] = StackedRandom(parts)
    for tensors in _columns([network.parameters() for network in networks]):
        memo[id(tensors[0])] = Joined(tensors)
    for tensors in _columns([network.buffers() for network in networks]):
        memo.setdefault(id(tensors[0]), Joined(tensors))
    template = copy.deepcopy(first, memo)
    for module in template.modules():
        for tensors_by_name in (module._parameters, module._buffers):
            for name, value in [*tensors_by_name.items()]:
                if isinstance(value, Joined):  # an ordinary attribute: torch.compile takes parameters for tensors
                    del tensors_by_name[name]
                    object.__setattr__(module, name, value)
    return template


def _columns(rows: Sequence[Iterable[Tensor]]) -> Iterable[tuple[Tensor, ...]]:
    return zip(*rows, strict=True)


class StackedNetworks:
    """Strategy `stacked`: views [S, B, C, H, W] -> logits [S, B, K] by one pass through one network.

    Args:
        networks: S of one structure.

    Raises:
        NotStackable: see `stack`.
    """

    def __init__(self, networks: Sequence[nn.Module]) -> None:
        self.networks = list(networks)
        with torch.inference_mode(False), torch.no_grad():
            self.template = stack(networks)
        self.norms = [module for module in self.template.modules() if isinstance(module, StackedNorm)]

    def __call__(self, views_SBCHW: Tensor) -> Tensor:
        if not torch.compiler.is_compiling():
            self._follow()
        logits = self.template(Stacked(views_SBCHW.transpose(0, 1).flatten(1, 2), len(self.networks)))
        if not isinstance(logits, Stacked) or logits.ndim != 2:
            raise NotStackable("the networks' output is no [B, K] of logits")
        return logits.apart.transpose(0, 1).contiguous()

    def _follow(self) -> None:
        """Take over the networks' mode, and buffers that have been replaced."""
        if self.template.training != self.networks[0].training:
            self.template.train(self.networks[0].training)
        with torch.inference_mode(False), torch.no_grad():
            for norm in self.norms:
                norm.tie()

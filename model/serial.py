"""Stages of a library's network of which nothing is known beforehand: found by following one pass. Ours.

A network has them if its `blocks`, `stages` or `layers` run one after another, each on nothing but what the one before
gave, and what follows is a chain of modules and the library's own pooling. Which tensor goes where is read off their
identity in a pass without storage, so no class has to be listed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import chain, pairwise
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from model.registry import BackboneRequest
from model.staged import Staged, half_of_blocks

SEQUENCES = ("blocks", "stages", "layers")
_RUNS = 4  # stages of a network whose blocks are all alike
_MOST_STAGES = 8
_LONGEST = 8  # chain of modules between the last stage and the pooling

Pool = Callable[[Any, Tensor], Tensor]  # (network, last feature map) -> embedding [B, D]


@dataclass(frozen=True)
class Layout:
    """Where the parts of a network are.

    Attributes:
        members: names of the modules that run one after another.
        stages: of each stage, (its first member, the one behind its last).
        after: names of the modules that run between the last member and the pooling.
        classifier: name of the linear layer.
        pool: what follows them, up to the classifier.
        is_tokens: features are [B, N, C].
        channels_last: features are [B, H, W, C].
        prefix_tokens: how many tokens stand before those of the image.
    """

    members: tuple[str, ...]
    stages: tuple[tuple[int, int], ...]
    after: tuple[str, ...]
    classifier: str
    pool: Pool
    is_tokens: bool = False
    channels_last: bool = False
    prefix_tokens: int = 0


class _Reached(Exception):
    """The first stage is about to run: ends the pass that makes its input."""

    def __init__(self, features: Tensor) -> None:
        super().__init__()
        self.features = features


def _stop(module: nn.Module, inputs: tuple[Any, ...]) -> None:
    raise _Reached(inputs[0])


class SerialParts(Staged):
    """The parts of a library's network by a `Layout`; no module, and nothing of it is an attribute of the network."""

    def __init__(self, network: nn.Module, layout: Layout, request: BackboneRequest | None) -> None:
        self._network = network
        self.layout = layout
        self.request = request

    @property
    def network(self) -> nn.Module:
        return self._network

    @property
    def probe_side(self) -> int:
        """That of the run's images: tables of positions are made for one size."""
        assert self.request is not None
        return self.request.crop_size

    @property
    def channel_dim(self) -> int:
        return -1 if self.layout.is_tokens or self.layout.channels_last else 1

    @property
    def stages(self) -> list[nn.Module]:
        members = [self._network.get_submodule(name) for name in self.layout.members]
        parts = [members[begin:end] for begin, end in self.layout.stages]
        return [part[0] if len(part) == 1 else nn.Sequential(*part) for part in parts]

    def stem(self, images_BCHW: Tensor) -> Tensor:
        """The network's own code, up to where it calls the first member."""
        handle = self._network.get_submodule(self.layout.members[0]).register_forward_pre_hook(_stop)
        try:
            self._network.forward(images_BCHW)
        except _Reached as reached:
            return reached.features
        finally:
            handle.remove()
        raise AssertionError(f"{self.layout.members[0]} was not run")

    def tail(self, features_BCHW: Tensor) -> Tensor:
        for name in self.layout.after:
            features_BCHW = self._network.get_submodule(name)(features_BCHW)
        return self.layout.pool(self._network, features_BCHW)

    def classify(self, embedding_BD: Tensor) -> Tensor:
        logits_BK: Tensor = self._network.get_submodule(self.layout.classifier)(embedding_BD)
        return logits_BK

    @property
    def classifier_name(self) -> str:
        return self.layout.classifier

    def halved_depth(self) -> int:
        return half_of_blocks(self.stages[-1])

    def as_map(self, features: Tensor) -> Tensor:
        if self.layout.channels_last:
            return features.movedim(-1, 1)
        if not self.layout.is_tokens:
            return features
        tokens_BCN = features[:, self.layout.prefix_tokens :].transpose(1, 2)
        side = math.isqrt(tokens_BCN.shape[2])
        return tokens_BCN.unflatten(2, (side, side) if side * side == tokens_BCN.shape[2] else (-1, 1))


# ---- how a layout is found -------------------------------------------------------------------------------------------


@dataclass
class _Calls:
    """Calls of modules in one pass that took one tensor and gave one; the tensors are kept, so that each stays itself.

    Attributes:
        found: (name, input, output), inner calls before outer ones.
    """

    found: list[tuple[str, Tensor, Tensor]] = field(default_factory=list)

    def of(self, network: nn.Module, run: Callable[[], Any]) -> Any:
        """Run something and record the network's modules meanwhile."""

        def hook(name: str) -> Callable[..., None]:
            def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
                if len(args) == 1 and not kwargs and isinstance(args[0], Tensor) and isinstance(output, Tensor):
                    self.found.append((name, args[0], output))

            return record

        named = [(name, module) for name, module in network.named_modules() if name]
        handles = [module.register_forward_hook(hook(name), with_kwargs=True) for name, module in named]
        try:
            return run()
        finally:
            for handle in handles:
                handle.remove()

    def at(self, name: str) -> tuple[Tensor, Tensor] | None:
        """(input, output) of a module that was called once."""
        calls = [(given, gave) for called, given, gave in self.found if called == name]
        return calls[0] if len(calls) == 1 else None

    def chain(self, begin: Tensor, end: Tensor) -> tuple[str, ...] | None:
        """Names of modules that lead from one tensor to another; None where none do."""
        names: list[str] = []
        while begin is not end:
            takers = [(name, gave) for name, given, gave in self.found if given is begin and gave is not begin]
            if not takers or len(names) == _LONGEST:
                return None
            name, begin = min(takers, key=lambda taker: taker[0].count("."))
            names.append(name)
        return tuple(names)


def serial_layout(network: Any, image: Tensor) -> Layout | None:
    """The layout of a network of timm, None where its parts do not run one after another.

    Args:
        network: in evaluation mode; has timm's `forward_features`, `forward_head` and `get_classifier`.
        image: [1, 3, H, W] on its device.
    """
    if not all(callable(getattr(network, n, None)) for n in ("forward_features", "forward_head", "get_classifier")):
        return None
    said = network.get_classifier()
    classifier = next((name for name, module in network.named_modules() if module is said), "")
    if not classifier or type(said) is not nn.Linear:
        return None
    whole, calls = _Calls(), _Calls()
    logits = whole.of(network, lambda: network(image))
    at_the_end = whole.at(classifier)
    features = calls.of(network, lambda: network.forward_features(image))
    if at_the_end is None or at_the_end[1] is not logits or not isinstance(features, Tensor):
        return None
    embedding = network.forward_head(features, pre_logits=True)
    if not isinstance(embedding, Tensor) or embedding.shape != at_the_end[0].shape or embedding.dim() != 2:
        return None
    for attribute in SEQUENCES:
        found = _members(network, attribute, calls)
        after = None if found is None else calls.chain(found[1][-1], features)
        if found is not None and after is not None:
            last = found[1][-1]
            layout = Layout(
                members=found[0],
                stages=grouped(network, *found),
                after=after,
                classifier=classifier,
                pool=_head,
                is_tokens=last.dim() == 3,
                channels_last=last.dim() == 4 and _is_channels_last(network, last),
                prefix_tokens=int(getattr(network, "num_prefix_tokens", 0)),
            )
            return layout if _composes(network, layout, image) else None
    return None


def _composes(network: nn.Module, layout: Layout, image: Tensor) -> bool:
    """Whether the parts one after another do what the network does, operation by operation."""
    whole, parts = _Operations(network), _Operations(network)
    with whole:
        network(image)
    with parts:
        SerialParts(network, layout, None).composed(image)
    return whole.found == parts.found


class _Operations(TorchDispatchMode):
    """Every operation that runs inside, with the parameters, the shapes and the numbers that it takes."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.found: list[Any] = []
        self._own = {id(tensor): name for name, tensor in chain(network.named_parameters(), network.named_buffers())}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self.found.append((str(func), self._shown(args), self._shown(tuple(kwargs.items()))))
        return func(*args, **kwargs)

    def _shown(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self._own.get(id(value), tuple(value.shape))
        if isinstance(value, tuple | list):
            return tuple(map(self._shown, value))
        return str(value)


def _head(network: Any, features: Tensor) -> Tensor:
    embedding_BD: Tensor = network.forward_head(features, pre_logits=True)
    return embedding_BD


def _members(network: Any, attribute: str, calls: _Calls) -> tuple[tuple[str, ...], list[Tensor]] | None:
    """(names, outputs) of the members of a sequence, each of which takes what the one before gave."""
    sequence = getattr(network, attribute, None)
    if not isinstance(sequence, nn.Sequential | nn.ModuleList) or len(sequence) < 2:
        return None
    names = tuple(f"{attribute}.{name}" for name, _ in sequence.named_children())
    own = [calls.at(name) for name in names]
    ends = [call for call in own if call is not None]
    if len(ends) < len(own) or any(before[1] is not after[0] for before, after in pairwise(ends)):
        return None
    return names, [gave for _, gave in ends]


def grouped(network: nn.Module, names: Sequence[str], outputs: Sequence[Tensor]) -> tuple[tuple[int, int], ...]:
    """The members by stages: all alike, four runs; few, each for itself; else those that give the same shape."""
    count, shapes = len(names), [gave.shape for gave in outputs]
    kinds = {type(network.get_submodule(name)) for name in names}
    if count >= _RUNS and len(kinds) == 1 and len(set(shapes)) == 1:
        return in_runs(count)
    starts = [i for i in range(count) if count <= _MOST_STAGES or i == 0 or shapes[i] != shapes[i - 1]]
    return tuple(pairwise([*starts, count]))


def in_runs(count: int) -> tuple[tuple[int, int], ...]:
    """So many blocks in four runs of a quarter each, the rest in the last."""
    starts = [i * (count // _RUNS) for i in range(_RUNS)]
    return tuple(pairwise([*starts, count]))


def _is_channels_last(network: Any, features: Tensor) -> bool:
    size = getattr(network, "num_features", None)
    said = str(getattr(network, "output_fmt", "")) == "NHWC"
    return said or (features.shape[-1] == size and features.shape[1] != size)

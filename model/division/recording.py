"""The constructor arguments of a network, recorded while its library builds it, and the network built with others.

The class's constructor is wrapped for the time of one build; everything the library does before and after stays. No
object of the library is mutated. Ours.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import inspect
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

Arguments = dict[str, Any]
Step = tuple[str, Any]  # kind of container, key in it
DEEPEST = 8  # containers inside one another that are looked into
_LOCK = threading.RLock()

# what the constructors and forward passes of libraries raise
BUILD_ERRORS = (
    RuntimeError,
    ValueError,
    AssertionError,
    TypeError,
    IndexError,
    KeyError,
    AttributeError,
    ZeroDivisionError,
)


class NotRecorded(Exception):
    """The library does not call the constructor of the network's class where it could be seen."""


def build_on_meta(create: Callable[[], nn.Module]) -> nn.Module:
    """A network without storage.

    A constructor that reads values of the tensors that it computes (torchvision's RegNet) cannot run on the meta
    device; then only what layers allocate is put there, and what is left is moved.
    """
    try:
        with torch.device("meta"):
            return create()
    except (RuntimeError, NotImplementedError):
        with torch.device("cpu"), _WeightsOn(torch.device("meta")):
            return create().to("meta")


class _WeightsOn(TorchFunctionMode):
    """Puts what layers allocate on a device, and leaves alone what their constructors compute with tensors."""

    ALLOCATE = (torch.empty, torch.zeros, torch.ones, torch.full)

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func in self.ALLOCATE and kwargs.get("device") is None:
            kwargs["device"] = self.device
        return func(*args, **kwargs)


@contextmanager
def watched_constructor(kind: type, change: Callable[[Arguments], None]) -> Iterator[None]:
    """While it lasts, `change` may replace the arguments of the outermost constructor call of exactly `kind`.

    Args:
        kind: the class.
        change: gets the arguments by name, defaults included, and writes others in their places.
    """
    own = "__init__" in vars(kind)
    original: Callable[..., None] = kind.__init__  # type: ignore[misc]
    signature = inspect.signature(original)
    inherited = _inherited_numbers(kind)
    inside = False

    @functools.wraps(original)
    def constructor(self: Any, *args: Any, **kwargs: Any) -> None:
        nonlocal inside
        if inside or type(self) is not kind:
            return original(self, *args, **kwargs)
        bound = signature.bind(self, *args, **kwargs)
        bound.apply_defaults()
        if inherited and not bound.args[1:]:
            *_, rest = bound.arguments
            bound.arguments[rest] = {**inherited, **bound.arguments[rest]}
        change(bound.arguments)
        inside = True
        try:
            return original(*bound.args, **bound.kwargs)
        finally:
            inside = False

    with _LOCK:
        setattr(kind, "__init__", constructor)  # noqa: B010  mypy refuses the plain assignment
        try:
            yield
        finally:
            if own:
                setattr(kind, "__init__", original)  # noqa: B010
            else:
                delattr(kind, "__init__")


def _inherited_numbers(kind: type) -> dict[str, int | float]:
    """Of a class whose constructor only hands its arguments on: the numbers that the next class takes by default."""
    own, *bases = (base.__init__ for base in kind.__mro__ if "__init__" in vars(base))  # type: ignore[misc]
    only_hands_on = [inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD]
    if [parameter.kind for parameter in inspect.signature(own).parameters.values()][1:] != only_hands_on:
        return {}
    taken = inspect.signature(bases[0]).parameters.values()
    return {p.name: p.default for p in taken if isinstance(p.default, int | float) and not isinstance(p.default, bool)}


class Recording:
    """The numbers inside the constructor arguments of a library's network.

    Args:
        create: makes the network, as the library does.

    Attributes:
        kind: the network's class.
        leaves: name of each number ("embed_dim", "cfg.blocks.1.c") -> its value.

    Raises:
        NotRecorded: the class's constructor is not called while the network is made.
    """

    def __init__(self, create: Callable[[], nn.Module]) -> None:
        self.create = create
        self.kind = type(build_on_meta(create))
        found: list[Arguments] = []
        with watched_constructor(self.kind, lambda arguments: found.append(_copy(arguments))):
            build_on_meta(create)
        if not found:
            raise NotRecorded(f"the constructor of {self.kind.__name__} is not called")
        self._paths = dict(_leaves(found[-1]))
        self.leaves: dict[str, int | float] = {name: _at(found[-1], path) for name, path in self._paths.items()}

    def build(self, changes: Mapping[str, int | float], *, meta: bool = True) -> nn.Module:
        """The network with other numbers at some leaves, without storage or on the default device.

        Raises:
            KeyError: a name that is no leaf.
        """
        paths = {name: self._paths[name] for name in changes}

        def change(arguments: Arguments) -> None:
            for name, path in paths.items():
                arguments[path[0][1]] = _replaced(arguments[path[0][1]], path[1:], changes[name])

        with watched_constructor(self.kind, change):
            return build_on_meta(self.create) if meta else self.create()


def _copy(arguments: Arguments) -> Arguments:
    copied = {}
    for name, value in arguments.items():
        if isinstance(value, nn.Module):
            continue  # the network itself, and parts of it that are made outside
        try:
            copied[name] = copy.deepcopy(value)
        except (TypeError, ValueError, RuntimeError):
            copied[name] = value
    return copied


_PLAIN = (str, bytes, type, FunctionType, ModuleType, nn.Module, Tensor, torch.dtype, torch.device)


def _inside(value: Any) -> list[tuple[Step, str, Any]]:
    """(step, name, value) of what a container holds; [] where it is none."""
    if value is None or isinstance(value, _PLAIN) or inspect.isroutine(value):
        return []
    if isinstance(value, Mapping):
        return [(("key", key), str(key), inner) for key, inner in value.items()]
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return [(("field", name), name, getattr(value, name)) for name in value._fields]
    if isinstance(value, list | tuple):
        return [(("index", i), str(i), inner) for i, inner in enumerate(value)]
    if isinstance(value, functools.partial):
        return [(("keyword", name), name, inner) for name, inner in value.keywords.items()]
    if dataclasses.is_dataclass(value):
        return [(("attribute", f.name), f.name, getattr(value, f.name)) for f in dataclasses.fields(value)]
    own = getattr(value, "__dict__", None)
    return [(("attribute", name), name, inner) for name, inner in own.items()] if isinstance(own, dict) else []


def _leaves(arguments: Arguments) -> Iterator[tuple[str, tuple[Step, ...]]]:
    def walk(value: Any, name: str, path: tuple[Step, ...]) -> Iterator[tuple[str, tuple[Step, ...]]]:
        if isinstance(value, int | float) and not isinstance(value, bool):
            yield name, path
        elif len(path) <= DEEPEST:
            for step, part, inner in _inside(value):
                yield from walk(inner, f"{name}.{part}", (*path, step))

    for name, value in arguments.items():
        yield from walk(value, name, (("key", name),))


def _at(value: Any, path: tuple[Step, ...]) -> Any:
    for kind, key in path:
        if kind in ("key", "index"):
            value = value[key]
        else:
            value = value.keywords[key] if kind == "keyword" else getattr(value, key)
    return value


def _replaced(value: Any, path: tuple[Step, ...], number: int | float) -> Any:
    """A copy of `value` with another number at the end of the path; only the containers on the path are copied."""
    if not path:
        return number
    (kind, key), *rest = path
    inner = _replaced(_at(value, path[:1]), tuple(rest), number)
    if kind == "index":
        items = [*value[:key], inner, *value[key + 1 :]]
        return items if type(value) is list else type(value)(items)
    if kind == "field":
        return value._replace(**{key: inner})
    if kind == "keyword":
        return functools.partial(value.func, *value.args, **{**value.keywords, key: inner})
    copied = copy.copy(value)
    if kind == "key":
        copied[key] = inner
    else:
        object.__setattr__(copied, key, inner)  # also of a frozen dataclass
    return copied

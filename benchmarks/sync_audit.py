"""Counting what makes the host wait for the device: on a GPU by torch's own debug mode, on a CPU by watching the ops.

A training step that never waits keeps a GPU busy; one that reads a single number back drains its queue.
"""

import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

_aten = torch.ops.aten
# What a GPU can only do by telling the host a number: a value, or the size of a result.
_WAITING = frozenset(
    {
        _aten._local_scalar_dense,
        _aten.nonzero,
        _aten.masked_select,
        _aten._unique2,
        _aten.unique_dim,
        _aten.unique_consecutive,
        _aten.bincount,
        _aten.histc,
        _aten.equal,
        _aten.is_nonzero,
    }
)
_READS = frozenset({Tensor.cpu, Tensor.numpy, Tensor.tolist, Tensor.__array__})
_FACTORIES: frozenset[Callable[..., Any]] = frozenset(
    {
        *(torch.tensor, torch.as_tensor, torch.empty, torch.zeros, torch.ones, torch.full, torch.arange, torch.eye),
        *(torch.linspace, torch.logspace, torch.rand, torch.randn, torch.randint, torch.randperm, torch.tril_indices),
    }
)
_TORCH = str(Path(torch.__file__).parent)


class SyncAudit:
    """Context manager that finds the host synchronisations of what runs inside it.

    On a CUDA device it counts torch's own warnings (`set_sync_debug_mode`). On a CPU it tells what would wait on a
    GPU: values and sizes read back, copies from the device, and copies to it that are not `non_blocking`. There, a
    tensor counts as the host's if it comes from NumPy, or from a function that makes tensors and was given no device;
    every other tensor, also if it is older than the audit, is taken for one of the device. Ops of other threads and of
    compiled code are not seen.

    Args:
        device: where the audited code computes.

    Attributes:
        found: one line for each synchronisation: what, and the line of code that led to it.
    """

    def __init__(self, device: torch.device) -> None:
        self.found: list[str] = []
        self._device = device
        self._exit = ExitStack()

    def __enter__(self) -> "SyncAudit":
        if self._device.type == "cuda":
            mode = torch.cuda.get_sync_debug_mode()
            self._exit.callback(torch.cuda.set_sync_debug_mode, mode)
            self._warnings = self._exit.enter_context(warnings.catch_warnings(record=True))
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            return self
        host = _HostTensors()
        self._exit.callback(setattr, torch, "from_numpy", torch.from_numpy)
        from_numpy = torch.from_numpy
        setattr(torch, "from_numpy", lambda array: host.add(from_numpy(array)))  # noqa: B010 - no mode sees it
        self._exit.enter_context(_Ops(host, self.found))
        self._exit.enter_context(_Functions(host, self.found))
        return self

    def __exit__(self, *error: object) -> None:
        if self._device.type == "cuda":
            waits = [w for w in self._warnings if "synchronizing CUDA operation" in str(w.message)]
            self.found += [f"{w.message} at {w.filename}:{w.lineno}" for w in waits]
        self._exit.close()


class _HostTensors:
    """Which storages are the host's. A weak reference keeps an address from being used again."""

    def __init__(self) -> None:
        self._known: dict[int, StorageWeakRef] = {}

    def add(self, tensor: Tensor) -> Tensor:
        reference = StorageWeakRef(tensor.untyped_storage())
        self._known[reference.cdata] = reference
        return tensor

    def discard(self, tensor: Tensor) -> None:
        self._known.pop(tensor.untyped_storage()._cdata, None)

    def __contains__(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage()._cdata in self._known


def _place() -> str:
    """The innermost line that is neither torch's nor this file's."""
    frame: Any = sys._getframe(1)
    while frame.f_back is not None and (
        frame.f_code.co_filename == __file__ or frame.f_code.co_filename.startswith((_TORCH, "<"))
    ):
        frame = frame.f_back
    return f"{frame.f_code.co_filename}:{frame.f_lineno}"


def _tensors(value: object) -> Iterator[Tensor]:
    """All tensors in arguments or results."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)


def _names_a_device(args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether arguments of Tensor.to name a device; strings are devices there."""
    return kwargs.get("device") is not None or any(isinstance(a, torch.device | str | Tensor) for a in args)


class _Functions(TorchFunctionMode):
    """Sees calls as they are written: the copies that a CPU does not make, and tensors made on the host."""

    def __init__(self, host: _HostTensors, found: list[str]) -> None:
        super().__init__()
        self._host, self._found = host, found

    def __torch_function__(
        self, func: Any, types: Sequence[Any], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        first = args[0] if args and isinstance(args[0], Tensor) else None
        from_device = first is not None and first not in self._host
        if (func in _READS and from_device) or (func is Tensor.to and from_device and "cpu" in args[1:2]):
            self._found.append(f"{func.__name__} at {_place()}")
        if func is Tensor.new_tensor or (func in (torch.tensor, torch.as_tensor) and kwargs.get("device") is not None):
            self._found.append(f"{func.__name__}: a copy from pageable memory at {_place()}")
        if func in (Tensor.__getitem__, Tensor.__setitem__) and from_device:
            places = args[1] if isinstance(args[1], tuple) else (args[1],)
            if any(isinstance(place, list) for place in places):
                self._found.append(f"index by a list at {_place()}")
        result = func(*args, **kwargs)
        if func in _FACTORIES and kwargs.get("device") is None:
            self._host.add(result)
        if func is Tensor.to and not from_device and first is not None and _names_a_device(args[1:], kwargs):
            if not kwargs.get("non_blocking"):
                self._found.append(f"to(device), not non_blocking, at {_place()}")
            self._host.discard(result)
        return result


class _Ops(TorchDispatchMode):
    """Sees every op, those of the backward pass included."""

    def __init__(self, host: _HostTensors, found: list[str]) -> None:
        super().__init__()
        self._host, self._found = host, found

    def __torch_dispatch__(
        self, func: Any, types: Sequence[Any], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        inputs = list(_tensors((args, kwargs)))
        on_host = [tensor in self._host for tensor in inputs]
        if not all(on_host) and self._waits(func, args, kwargs, on_host, inputs):
            self._found.append(f"{func} at {_place()}")
        result = func(*args, **kwargs)
        if inputs and all(on_host):
            for tensor in _tensors(result):
                self._host.add(tensor)
        return result

    def _waits(
        self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], on_host: list[bool], inputs: list[Tensor]
    ) -> bool:
        packet = func.overloadpacket
        if packet in _WAITING:
            return True
        if packet is _aten.repeat_interleave:
            return kwargs.get("output_size") is None
        if packet in (_aten.index, _aten.index_put, _aten.index_put_):
            masks = [i for i in args[1] if i is not None and i.dtype in (torch.bool, torch.uint8)]
            fills_one_value = packet is not _aten.index and args[2].numel() == 1
            if masks and not fills_one_value:
                return True
        if packet is _aten.copy_:
            return any(on_host) and not (len(args) > 2 and args[2])
        # a scalar of the host travels with the kernel's arguments
        return any(own and tensor.dim() for own, tensor in zip(on_host, inputs, strict=True))

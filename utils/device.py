"""The device that computes: what the host must know of one that works by itself."""

import os
from collections import deque
from collections.abc import Sequence

import torch
from torch import Tensor


def wait_for(device: torch.device) -> None:
    """Wait until a GPU has done all that it was asked to do; a CPU has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def by_type(tensors: Sequence[Tensor]) -> list[list[int]]:
    """Places of the tensors that one operation takes together: of one type, on one device."""
    places: dict[tuple[torch.dtype, torch.device], list[int]] = {}
    for place, tensor in enumerate(tensors):
        places.setdefault((tensor.dtype, tensor.device), []).append(place)
    return [*places.values()]


class Fetched:
    """A tensor on its way to the host. Waiting for it waits for nothing that the device is asked for later.

    Args:
        value: must not be written to after this, unless by what the device is asked for later.
    """

    def __init__(self, value: Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        self._host = value
        if value.device.type == "cuda":
            self._host = torch.empty_like(value, device="cpu", pin_memory=True).copy_(value, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(value.device))

    def is_here(self) -> bool:
        """Whether `get` would not wait."""
        return self._event is None or self._event.query()

    def get(self) -> Tensor:
        """The tensor on the host."""
        if self._event is not None:
            self._event.synchronize()
        return self._host


class Uploads:
    """Copies from pinned memory to a GPU beside what it computes, in a stream of their own.

    The host may ask for AHEAD copies more than the GPU has used; so many lie in the GPU's memory.

    Args:
        device: the GPU.
    """

    AHEAD = 2

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream: torch.cuda.Stream | None = None
        self._asked: deque[torch.cuda.Event] = deque()

    def send(self, host: Tensor) -> Tensor:
        """The tensor on the GPU, for what is computed in the current stream from here on."""
        if self._stream is None:
            self._stream = torch.cuda.Stream(self._device)
        here = torch.cuda.current_stream(self._device)
        used = torch.cuda.Event()  # all that was asked for so far, so all copies but this one
        used.record(here)
        self._asked.append(used)
        if len(self._asked) > self.AHEAD:
            self._asked.popleft().synchronize()
        with torch.cuda.stream(self._stream):
            copy = host.to(self._device, non_blocking=True)
            ready = torch.cuda.Event()
            ready.record(self._stream)
        here.wait_event(ready)
        copy.record_stream(here)  # or its memory would be given to a later copy while it is used
        return copy


def ask_for_determinism(asked: bool) -> None:
    """Let two equal runs be equal in every bit, as far as torch can; or let cuDNN take the fastest of its algorithms.

    Before anything is computed: cuBLAS reads its setting once.
    """
    torch.backends.cudnn.benchmark = not asked
    if asked:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # else its sums depend on how streams overlap
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # we read nothing that was not written


def gpu_facts(device: torch.device) -> dict[str, str]:
    """What the bits of a run on a GPU depend on beside its program; nothing on a CPU."""
    if device.type != "cuda":
        return {}
    return {"gpu": torch.cuda.get_device_name(device), "cudnn": str(torch.backends.cudnn.version())}

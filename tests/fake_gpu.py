"""A GPU without numbers: tensors that know their device and shape only, so that mixing devices fails on any machine.

torch's FakeTensorMode refuses an operation on tensors of two devices, and reading a value back, as a GPU would refuse
the former and wait for the latter. It cannot run autograd's engine for a device that is not there.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily

import dataset.views

GPU = torch.device("cuda", 0)


@contextmanager
def fake_gpu(monkeypatch: pytest.MonkeyPatch, num_classes: int) -> Iterator[None]:
    """Inside, tensors can be made on `GPU` and moved there; what asks the driver gets the answers of a large GPU.

    A loss that goes back gets gradients of nothing for all modules moved to `GPU`, and must lie there itself.

    Args:
        monkeypatch: undoes the replacements.
        num_classes: what `unique` and `bincount` of fake labels find.
    """
    moved: list[nn.Module] = []

    def to(module: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        # torch's own swaps the tensors of a parameter, which fake ones do not allow
        device, dtype, _, memory_format = torch._C._nn._parse_to(*args, **kwargs)

        def convert(tensor: Tensor) -> Tensor:
            new = tensor.detach().to(device=device, dtype=dtype if tensor.is_floating_point() else None)
            return new if memory_format is None or new.dim() != 4 else new.to(memory_format=memory_format)

        known: dict[int, nn.Parameter] = {}
        for part in module.modules():
            for name, old in part._parameters.items():
                if old is not None:
                    new = known.setdefault(id(old), nn.Parameter(convert(old), old.requires_grad))
                    known[id(new)] = part._parameters[name] = new
            part._buffers.update({name: convert(old) for name, old in part._buffers.items() if old is not None})
        moved.append(module)
        return module

    def backward(loss: Tensor, *args: Any, **kwargs: Any) -> None:
        assert loss.device == GPU
        for module in moved:
            for parameter in module.parameters():
                parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None

    def counting(real: Callable[..., Tensor], fake: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
        """Of real tensors as it is; the result of a fake one has a size that nobody can know."""

        def count(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            if isinstance(tensor, FakeTensor):
                return fake(tensor)
            with unset_fake_temporarily():
                return real(tensor, *args, **kwargs)

        return count

    monkeypatch.setattr(nn.Module, "to", to)
    monkeypatch.setattr(Tensor, "backward", backward)
    monkeypatch.setattr(Tensor, "pin_memory", lambda tensor: tensor)
    monkeypatch.setattr(
        Tensor, "unique", counting(Tensor.unique, lambda labels: torch.arange(num_classes, device=labels.device))
    )
    monkeypatch.setattr(
        Tensor, "bincount", counting(Tensor.bincount, lambda labels: labels.new_zeros(num_classes, dtype=torch.int64))
    )
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device=None: (1 << 37, 1 << 37))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "_lazy_init", lambda: None)
    monkeypatch.setattr(torch._C, "_cuda_init", lambda: None)
    monkeypatch.setattr(dataset.views, "HAS_TRITON", False)  # a kernel needs a driver
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield

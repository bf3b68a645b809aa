"""What the audit on a CPU takes for a wait of the host, and what not."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.sync_audit import SyncAudit
from tests.waits import nothing_waits

ROOT = Path(__file__).parent.parent
DEVICE = torch.device("cpu")  # of x_N, as far as the audit is concerned the device that must not be waited for
x_N = torch.arange(6.0)
index_N = torch.arange(3)


def syncs(function) -> list[str]:
    with SyncAudit(DEVICE) as audit:
        function()
    return audit.found


def assign(place, value):
    return lambda: x_N.clone().__setitem__(place, value)


WAITS = {
    "item": lambda: x_N.sum().item(),
    "if": lambda: bool(x_N.sum() > 0),
    "int": lambda: int(x_N.max()),
    "in": lambda: 3 in x_N,
    "tolist": lambda: x_N.tolist(),
    "cpu": lambda: x_N.cpu(),
    "to cpu": lambda: x_N.to("cpu"),
    "numpy": lambda: x_N.numpy(),
    "mask": lambda: x_N[x_N > 2],
    "masked rows": assign(x_N > 2, x_N[:3]),
    "nonzero": lambda: torch.where(x_N > 2),
    "unique": lambda: x_N.unique(),
    "equal": lambda: torch.equal(x_N, x_N),
    "bincount": lambda: index_N.bincount(minlength=4),
    "repeats": lambda: x_N.repeat_interleave(index_N.repeat(2)),
    "list": lambda: x_N[[1, 2]],
    "tensor": lambda: torch.tensor(3.0, device=DEVICE),
    "new_tensor": lambda: x_N.new_tensor(3.0),
    "copy to": lambda: torch.from_numpy(np.ones(6)).to(DEVICE),
    "copy into": lambda: x_N.clone().copy_(torch.from_numpy(np.ones(6))),
    "host index": lambda: x_N[torch.from_numpy(np.arange(3))],
    "host operand": lambda: x_N * torch.ones(6),
}


def through_a_hook() -> None:
    leaf_N = x_N.clone().requires_grad_()
    leaf_N.register_hook(lambda gradient_N: gradient_N * gradient_N.sum().item())
    leaf_N.sum().backward()


WAITS["backward"] = through_a_hook


@pytest.mark.parametrize("function", WAITS.values(), ids=WAITS)
def test_what_waits_is_found_with_its_place(function):
    (line,) = syncs(function)
    assert __file__ in line


FREE = {
    "arithmetic": lambda: (x_N.double().requires_grad_() * 2 + 1).sum().backward(),
    "queued copy": lambda: torch.from_numpy(np.arange(3)).to(DEVICE, non_blocking=True) + index_N,
    "index": lambda: x_N[index_N],
    "slices": lambda: x_N[None, 1:3],
    "fill by mask": assign(x_N > 2, 0.0),
    "host only": lambda: torch.tensor([1, 2]).cumsum(0).tolist(),
    "host scalar": lambda: x_N * torch.tensor(2.0),
    "made there": lambda: torch.full((6,), 2.0, device=DEVICE) + x_N,
    "type": lambda: x_N.to(torch.float64).to(x_N.device),
}


@pytest.mark.parametrize("function", FREE.values(), ids=FREE)
def test_what_does_not_wait(function):
    assert syncs(function) == []


def test_after_it_everything_is_as_before():
    from_numpy = torch.from_numpy
    with pytest.raises(ZeroDivisionError), SyncAudit(DEVICE) as audit:
        raise ZeroDivisionError
    assert torch.from_numpy is from_numpy
    assert x_N.sum().item() == 15
    assert audit.found == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ["item", "mask", "nonzero", "new_tensor", "tensor", "unique"])
def test_a_gpu_agrees(name, monkeypatch):
    """ "list" is left out: whether it waits is for torch's version to say."""
    monkeypatch.setitem(globals(), "DEVICE", torch.device("cuda"))
    monkeypatch.setitem(globals(), "x_N", x_N.cuda())
    assert syncs(WAITS[name])
    assert syncs(FREE["arithmetic"]) == []


# ---- the tests that need a GPU ---------------------------------------------------------------------------------------


def test_waiting_is_an_error_inside_and_allowed_again_after_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    modes: list[str] = []
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    with pytest.raises(ZeroDivisionError), nothing_waits():
        modes.append(f"{1 // (len(modes) - 1)}")
    assert modes == ["error", "default"]  # set before what fails, and set back after it


@pytest.mark.slow
def test_what_torch_says_once_of_a_gpu_fails_no_test(tmp_path: Path) -> None:
    """In a process of its own: torch says it at the first call, of which a driver is not part."""
    probe = tmp_path / "test_probe.py"
    probe.write_text("import torch\n\n\ndef test_mode():\n    torch._C._cuda_set_sync_debug_mode(0)\n")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", str(ROOT / "pyproject.toml")]
    command += ["--noconftest", str(probe)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr

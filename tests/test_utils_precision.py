"""One decision about precision, from the flags and the hardware."""

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from utils import precision
from utils.errors import UserError
from utils.precision import choose_precision, lay_out

CPU = torch.device("cpu")
CPU_INFO = Path("/proc/cpuinfo")


@pytest.mark.parametrize(("fast", "name", "autocast"), [(True, "bf16", torch.bfloat16), (False, "fp32", None)])
def test_auto_follows_the_hardware(
    monkeypatch: pytest.MonkeyPatch, fast: bool, name: str, autocast: torch.dtype | None
) -> None:
    monkeypatch.setattr(precision, "has_fast_bf16", lambda device: fast)
    chosen = choose_precision(CPU, is_amp=True, amp_dtype="auto")
    assert (chosen.name, chosen.autocast, chosen.scaler) == (name, autocast, False)
    assert chosen.memory_format == torch.channels_last


def test_amp_off_is_fp32_and_fp64_is_itself() -> None:
    assert choose_precision(CPU, is_amp=False, amp_dtype="bf16").name == "fp32"
    chosen = choose_precision(CPU, is_amp=True, amp_dtype="fp64")
    assert (chosen.weights, chosen.autocast) == (torch.float64, None)
    assert chosen.memory_format == torch.contiguous_format


@pytest.mark.parametrize(
    ("device", "name", "layout", "execution", "nhwc"),
    [
        ("cpu", "fp32", "auto", "loop", True),
        ("cpu", "fp64", "auto", "stacked", False),
        ("cpu", "fp64", "nhwc", "loop", True),
        ("cpu", "fp32", "nchw", "loop", False),
        ("cuda", "fp64", "auto", "loop", True),
        ("cuda", "fp32", "auto", "auto", True),
        ("cuda", "fp32", "auto", "stacked", False),
        ("cuda", "fp32", "nhwc", "stacked", True),
        ("cuda", "fp32", "nchw", "loop", False),
    ],
)
def test_the_layout_is_that_of_the_flag_else_of_the_strategy(
    monkeypatch: pytest.MonkeyPatch, device: str, name: str, layout: str, execution: str, nhwc: bool
) -> None:
    monkeypatch.setattr(precision, "GPU_LAYOUTS", {"stacked": torch.contiguous_format})
    chosen = choose_precision(torch.device(device), is_amp=True, amp_dtype=name, layout=layout, execution=execution)
    assert chosen.memory_format == (torch.channels_last if nhwc else torch.contiguous_format)


def test_only_images_weights_are_laid_out_and_one_to_one_ones_as_torch_does() -> None:
    network = nn.Sequential(nn.Conv2d(4, 8, 3), nn.Conv2d(8, 4, 1), nn.Conv3d(4, 8, (1, 3, 3)), nn.Linear(8, 4))
    expected = copy.deepcopy(network[:2]).to(memory_format=torch.channels_last)
    before = dict(network.named_parameters())
    assert lay_out(network, torch.channels_last) is network
    found = dict(network.named_parameters())
    assert all(found[name] is parameter for name, parameter in before.items())
    assert all(found[name].stride() == parameter.stride() for name, parameter in expected.named_parameters())
    assert found["0.weight"].is_contiguous(memory_format=torch.channels_last)
    assert found["2.weight"].is_contiguous()


def test_fp16_needs_a_gpu() -> None:
    with pytest.raises(UserError, match=r"--amp_dtype fp16.*GPU"):
        choose_precision(CPU, is_amp=True, amp_dtype="fp16")


@pytest.mark.skipif(not CPU_INFO.exists(), reason="needs the kernel's list of what the CPU has")
def test_what_this_cpu_has_is_known() -> None:
    flags = CPU_INFO.read_text().split()
    assert precision.has_fast_bf16(CPU) == bool({"avx512_bf16", "amx_bf16"} & set(flags))

"""One decision about precision, from the flags and the hardware."""

from pathlib import Path

import pytest
import torch

from utils import precision
from utils.errors import UserError
from utils.precision import choose_precision

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


def test_fp16_needs_a_gpu() -> None:
    with pytest.raises(UserError, match=r"--amp_dtype fp16.*GPU"):
        choose_precision(CPU, is_amp=True, amp_dtype="fp16")


@pytest.mark.skipif(not CPU_INFO.exists(), reason="needs the kernel's list of what the CPU has")
def test_what_this_cpu_has_is_known() -> None:
    flags = CPU_INFO.read_text().split()
    assert precision.has_fast_bf16(CPU) == bool({"avx512_bf16", "amx_bf16"} & set(flags))

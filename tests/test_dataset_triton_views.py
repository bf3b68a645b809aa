"""The Triton kernel for small views equals the plain batched ops, bit for bit; Triton's interpreter runs it here."""

import importlib.util
import os
import subprocess
import sys
from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dataset.augment.policy import Op, Resample, Steps
from dataset.views import KERNEL_SIZES, ViewMaker, ViewParameters, ViewSpec

ROOT = Path(__file__).parent.parent


def compare(device: torch.device) -> None:
    """Every op at its edges, both paddings, all sizes and layouts: the kernel against the plain ops."""
    values = {
        Op.POSTERIZE: (0, 4, 8),
        Op.SOLARIZE: (0, 85.3, 256),
        Op.SOLARIZE_ADD: (0, 110),
        Op.BRIGHTNESS: (0.1, 1, 1.9),
        Op.CONTRAST: (0.1, 1.7),
        Op.COLOR: (0.1, 1.9),
        Op.SHARPNESS: (0.1, 1.9),
        Op.SHEAR_X: (0.3, -0.1),
        Op.SHEAR_Y: (-0.3, 1 / 30),
        Op.TRANSLATE_X: (150 / 331, -0.05, 1.5),
        Op.TRANSLATE_Y: (-150 / 331, 0.5 / 16),
        Op.ROTATE: (30, -13.3),
    }
    cases = [
        (op, value, resample)
        for op in Op
        for value in values.get(op, (0,))
        for resample in (Resample if op >= Op.SHEAR_X else (Resample.NEAREST,))
    ]
    random = np.random.default_rng(0)
    for size, side, padding, reflect in ((16, 16, 2, "zero"), (16, 20, 3, "reflect"), (32, 32, 4, "zero")):
        # every case in the first size; a few of them, chained, in the others
        chosen = cases if (size, side) == (16, 16) else [cases[i] for i in random.permutation(len(cases))[:6]]
        count = len(chosen)
        spec = ViewSpec(
            crop_size=size,
            padding=padding,
            padding_mode=reflect,
            erase_p=1,
            policy="cifar10",
            flip=True,
            mean=(0.1, 0.5, 0.9),
            std=(0.2, 0.25, 0.3),
        )
        images = torch.from_numpy(random.integers(0, 256, (count, 3, side, side), dtype=np.uint8))
        images[1] //= 4
        images[2, 0] = 7  # one value only
        images[3] = 250 + images[3] % 4
        room = side + 2 * padding - size + 1
        ops, levels, resamples = (np.array(column) for column in zip(*chosen, strict=True))
        order = [np.arange(count), random.permutation(count)][: 1 if (size, side) == (16, 16) else 2]
        steps = Steps(
            *(np.stack([column[o][None] for o in order]) for column in (ops, levels.astype(float), resamples))
        )
        parameters = ViewParameters(
            image_size=(side, side),
            tops_VB=random.integers(0, room, (1, count)),
            lefts_VB=random.integers(0, room, (1, count)),
            flips_VB=random.random((1, count)) < 0.5,
            steps=((steps, (128, 3, 255)),),
            boxes_VB4=random.integers(0, size // 2, (1, count, 4)),
            noise_keys_VB=np.zeros((1, count), np.int64),
        )
        maker = ViewMaker(spec, seed=0)
        for layout in (torch.contiguous_format, torch.channels_last)[: len(order)]:
            expected = maker.apply(images, parameters, memory_format=layout)
            views = torch.full_like(expected, torch.nan, device=device)
            maker._fill_by_kernel(views, images.to(device), parameters, slice(0, count))
            wrong = [str(chosen[i]) for i in range(count) if not torch.equal(views[0, i].cpu(), expected[0, i])]
            assert not wrong, (size, side, layout, wrong)


def compare_drawn(device: torch.device, sizes: Sequence[int], counts: Sequence[int]) -> None:
    """Views as a run draws them, of every size that the kernel makes and of even and odd numbers of images."""
    random = np.random.default_rng(1)
    for size in sizes:
        spec = ViewSpec(
            crop_size=size,
            padding=size // 8,
            flip=True,
            policy="cifar10",
            erase_p=0.5,
            mean=(0.1, 0.5, 0.9),
            std=(0.2, 0.25, 0.3),
        )
        maker = ViewMaker(spec, seed=size)
        for count in counts:
            images = torch.from_numpy(random.integers(0, 256, (count, 3, size, size), dtype=np.uint8))
            parameters = maker.draw(0, np.arange(count), 1, (size, size))
            expected = maker.apply(images, parameters)
            views = torch.full_like(expected, torch.nan, device=device)
            maker._fill_by_kernel(views, images.to(device), parameters, slice(0, count))
            assert torch.equal(views.cpu(), expected), (size, count)


def mend_interpreter() -> None:
    """Triton 3.6's interpreter counts a loop by int() of an array of one dimension, which NumPy 2.4 refuses."""
    import triton
    from triton.runtime import interpreter

    if tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 8):
        return
    patch_tensor = interpreter._patch_lang_tensor

    def mended(tensor, scope):
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = mended


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
def test_the_kernel_equals_the_plain_ops():
    # in a process of its own: Triton asks for the interpreter when a kernel is defined
    code = "import torch; import tests.test_dataset_triton_views as here; from dataset.views import KERNEL_SIZES; "
    code += "here.mend_interpreter(); here.compare(torch.device('cpu')); "
    code += "here.compare_drawn(torch.device('cpu'), KERNEL_SIZES, (1, 3))"
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def compile_for(capability: int) -> str:
    """The kernel's PTX for a compute capability, which Triton's own assembler has accepted; this needs no GPU."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from dataset.augment.triton_views import COMPILER_OPTIONS
    from dataset.augment.triton_views import _make_view as kernel

    pointers = {"views": "*fp32", "images": "*u8", "tables": "*u8", "scale": "*fp64"}
    pointers |= dict.fromkeys(("windows", "records"), "*i64")
    # what a launch makes constant: the two options, and every number that is 1, as the stride of channels-last views
    constants = {"reflect": True, "size": 32, "stride_c": 1}
    types = {name: "constexpr" if name in constants else pointers.get(name, "i32") for name in kernel.arg_names}
    source = ASTSource(fn=kernel, signature=types, constexprs=constants, attrs={})
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=COMPILER_OPTIONS).asm["ptx"]


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
def test_the_kernel_compiles_for_a_gpu_without_fused_multiply_adds():
    # in a process of its own, so that no test before it has chosen the interpreter
    code = "import tests.test_dataset_triton_views as here; print(here.compile_for(90))"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert ".target sm_90" in done.stdout
    assert "fma.rn" not in done.stdout  # Pillow rounds after each product


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
def test_the_kernel_is_launched_on_the_device_of_the_views(monkeypatch):
    """Which need not be the current one."""
    from dataset.augment import triton_views

    events = []

    @contextmanager
    def device_of(tensor):
        events.append(tensor)
        yield
        events.append("left")

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    kernel = SimpleNamespace()
    monkeypatch.setattr(triton_views, "_make_view", {(2,): lambda *_, **__: events.append(kernel)})
    spec = ViewSpec(crop_size=8, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
    maker, views = ViewMaker(spec, seed=0), torch.empty(1, 2, 3, 8, 8)
    parameters = maker.draw(0, np.arange(2), 1, (8, 8))
    maker._fill_by_kernel(views, torch.zeros(2, 3, 8, 8, dtype=torch.uint8), parameters, slice(0, 2))
    assert events[0] is views
    assert events[1:] == [kernel, "left"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_agrees():
    compare(torch.device("cuda"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("size", KERNEL_SIZES)
def test_a_gpu_agrees_for_every_size_and_number_of_views(size):
    compare_drawn(torch.device("cuda"), [size], (1, 3, 300))


def test_views_on_a_cpu_are_made_without_it(monkeypatch):
    spec = ViewSpec(crop_size=16, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
    monkeypatch.setattr(ViewMaker, "_fill_by_kernel", None)
    assert ViewMaker(spec, seed=0).make(torch.zeros(2, 3, 16, 16, dtype=torch.uint8), 0, np.arange(2), 1).shape[1] == 2

"""The Triton kernel for small views equals the plain batched ops, bit for bit; Triton's interpreter runs it here."""

import importlib.util
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from dataset.augment.policy import AUTOAUGMENT_POLICIES, TRIVIAL, Op, Resample, Steps
from dataset.views import KERNEL_SIZES, ViewMaker, ViewParameters, ViewSpec
from utils.seed import STREAM_VIEW, fold_in

ROOT = Path(__file__).parent.parent
NOTHING, TABLE = 0, 4  # kinds of `triton_views`
FIRST_VIEW = 2
POLICIES = ("none", *AUTOAUGMENT_POLICIES, TRIVIAL, "rand-m9-n2", "rand-m4-n3-inc1", "rand-m0")


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
            drawn = torch.full_like(expected, torch.nan, device=device)
            maker._draw_and_fill(drawn, images.to(device), 0, np.arange(count), 0)
            assert torch.equal(drawn.cpu(), expected), (size, count, "drawn")


def compare_parameters(device: torch.device, count: int, every: bool) -> None:
    """All that is drawn about views, under every policy that a table holds, with and without every other transform.

    every: all combinations; else each policy in a few of them.
    """
    random = np.random.default_rng(2)
    erasings: Any = ({}, {"erase_p": 0.5}, {"erase_p": 1.0, "erase_area": (0.3, 1.0), "erase_ratio": (0.1, 9.0)})
    crops: Any = ({"crop_size": 16, "padding": 2}, {"crop_size": 32}, {"crop_size": 8, "padding_mode": "reflect"})
    combinations = [*itertools.product(POLICIES, erasings, (False, True), crops)]
    for policy, erasing, flip, crop in combinations if every else combinations[::5]:
        spec = ViewSpec(policy=policy, flip=flip, mean=(0.1, 0.5, 0.9), std=(0.2, 0.25, 0.3), **erasing, **crop)
        maker, positions_B = ViewMaker(spec, seed=int(random.integers(2**31))), random.permutation(50_000)[:count]
        epoch, side = int(random.integers(300)), (34, 32)
        windows, records, tables = on_the_host(maker, epoch, positions_B, side)
        drawing, _ = maker._drawing_for(torch.zeros(1, 3, *side, device=device))
        drawn = drawing.draw(fold_in(maker.seed, STREAM_VIEW, epoch), positions_B, 3, first_view=FIRST_VIEW)
        windows_K8, records_NK9 = (part.cpu().numpy() for part in drawn)
        assert np.array_equal(windows_K8[:, :7], windows), spec
        if policy == "none":
            assert drawing.num_steps == 0
            continue
        kinds_NK = records[..., 0]
        by_table, is_other = kinds_NK == TABLE, (kinds_NK != NOTHING) & (kinds_NK != TABLE)
        assert np.array_equal(records_NK9[..., [0, 2]], records[..., [0, 2]]), spec  # kind and colour
        assert np.array_equal(records_NK9[is_other], records[is_other]), spec
        own_tables = drawing.tables.cpu().numpy()
        assert np.array_equal(own_tables[records_NK9[by_table][:, 1]], tables[records[by_table][:, 1]]), spec


def on_the_host(
    maker: ViewMaker, epoch: int, positions_B: np.ndarray, side: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What the kernel would be given of views that the host draws: windows [K, 7], records [N, K, 9] and tables."""
    from dataset.augment.triton_views import records_of

    parameters = maker.draw(epoch, positions_B, 3, side, first_view=FIRST_VIEW)
    corners = (parameters.tops_VB, parameters.lefts_VB, parameters.flips_VB)
    windows_K3 = np.stack([part.ravel() for part in corners], axis=1).astype(np.int64)
    windows = np.concatenate([windows_K3, parameters.boxes_VB4.reshape(-1, 4)], axis=1)
    steps = [
        (*(part.ravel() for part in step), fill)
        for steps, fill in parameters.steps
        for step in zip(*steps, strict=True)
    ]
    return windows, *records_of(steps, len(windows), maker.spec.crop_size)


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
    interpreted("here.compare(cpu); here.compare_drawn(cpu, here.KERNEL_SIZES, (1, 3))")


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
def test_the_kernel_draws_what_the_host_draws():
    interpreted("here.compare_parameters(cpu, 130, False)")


@pytest.mark.long
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
def test_the_kernel_draws_what_the_host_draws_in_every_combination():
    interpreted("here.compare_parameters(cpu, 130, True)")


def interpreted(call: str) -> None:
    """Run code on `here`, this module, where Triton interprets its kernels."""
    code = "import torch; import tests.test_dataset_triton_views as here; here.mend_interpreter(); "
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", f"{code} cpu = torch.device('cpu'); {call}"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def compile_for(capability: int, size: int) -> list[str]:
    """PTX of the kernel that makes views, of the one that draws, and of it without boxes, for a compute capability.

    Triton's own assembler has accepted it; this needs no GPU.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from dataset.augment import triton_draw, triton_views

    pointers = {"views": "*fp32", "images": "*u8", "tables": "*u8"}
    pointers |= dict.fromkeys(("scale", "numbers", "chances"), "*fp64")
    pointers |= dict.fromkeys(("windows", "records", "positions", "slots", "outcomes"), "*i64")
    # what a launch makes constant: options, and every number that is 1, as the stride of channels-last views
    of_views = {"reflect": True, "size": size, "stride_c": 1}
    of_drawing = {"box_slot": 9, "num_steps": 2, "majors": 25, "minors": 1, "size": size}
    of_drawing |= {"flips": True, "erases": True, "lanes": triton_draw.LANES}
    of_a_batch = {"batch", "rows", "columns", "stride_v", "stride_b", "count"}  # a last one compiles nothing anew
    for kernel in (triton_views._make_view, triton_draw._draw):
        assert not [one.name for one in kernel.params if one.name in of_a_batch and not one.do_not_specialize]
    found = []
    for kernel, constants, warps in (
        (triton_views._make_view, of_views, triton_views.WARPS[size]),
        (triton_draw._draw, of_drawing, 4),
        (triton_draw._draw, of_drawing | {"erases": False}, 4),
    ):
        types = {name: "constexpr" if name in constants else pointers.get(name, "i32") for name in kernel.arg_names}
        source = ASTSource(fn=kernel, signature=types, constexprs=constants, attrs={})
        options = triton_views.COMPILER_OPTIONS | {"num_warps": warps}
        found.append(triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options).asm["ptx"])
    return found


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
@pytest.mark.parametrize(("capability", "size"), [(80, 8), (90, 32), (120, 16)])
def test_the_kernels_compile_for_a_gpu_and_round_as_the_host_does(capability, size):
    # in a process of its own, so that no test before it has chosen the interpreter
    code = "import json; import tests.test_dataset_triton_views as here; "
    code += f"print(json.dumps(here.compile_for({capability}, {size})))"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    views, drawing, without_boxes = json.loads(done.stdout)
    assert all(f".target sm_{capability}" in ptx for ptx in (views, drawing, without_boxes))
    # Pillow and NumPy round after each product; an exponential, which boxes have, is made of fused ones
    assert "fma.rn" not in views
    assert "fma.rn" not in without_boxes
    assert "sqrt.rn.f64" in drawing
    assert "div.rn.f64" in drawing
    assert "approx" not in drawing


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
    monkeypatch.setattr(
        triton_views, "_make_view", {(2,): lambda *_, num_warps, **__: events.extend((kernel, num_warps))}
    )
    spec = ViewSpec(crop_size=8, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
    maker, views = ViewMaker(spec, seed=0), torch.empty(1, 2, 3, 8, 8)
    parameters = maker.draw(0, np.arange(2), 1, (8, 8))
    maker._fill_by_kernel(views, torch.zeros(2, 3, 8, 8, dtype=torch.uint8), parameters, slice(0, 2))
    assert events[0] is views
    assert events[1:] == [kernel, triton_views.WARPS[8], "left"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_agrees():
    compare(torch.device("cuda"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_draws_what_the_host_draws():
    compare_parameters(torch.device("cuda"), 300, True)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("size", KERNEL_SIZES)
def test_a_gpu_agrees_for_every_size_and_number_of_views(size):
    compare_drawn(torch.device("cuda"), [size], (1, 3, 300))


def test_views_on_a_cpu_are_made_without_it(monkeypatch):
    spec = ViewSpec(crop_size=16, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
    monkeypatch.setattr(ViewMaker, "_fill_by_kernel", None)
    assert ViewMaker(spec, seed=0).make(torch.zeros(2, 3, 16, 16, dtype=torch.uint8), 0, np.arange(2), 1).shape[1] == 2

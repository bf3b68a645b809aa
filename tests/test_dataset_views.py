"""Whole views against PIL, and the promise that a view depends on nothing but its seed, epoch, position and number."""

import dataclasses
import math
import subprocess
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps
from scipy import stats

from dataset import views
from dataset.augment.policy import Op, Resample
from dataset.options import DataOptions
from dataset.views import ViewMaker, ViewSpec, view_spec
from tests.test_dataset_augment import pil_op, to_tensor
from tests.waits import nothing_waits
from utils.errors import UserError

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
FLAGS = {"crop_size": 32, "padding": 4, "is_autoaugment": True, "is_cutout": True, "erase_p": 0.5}


def recipe_spec(recipe: str, mean: tuple[float, float, float] = MEAN, **changes) -> ViewSpec:
    return view_spec(recipe, DataOptions(**FLAGS | changes), mean=mean, std=STD)


def cifar_spec(**changes) -> ViewSpec:
    return dataclasses.replace(recipe_spec("cifar10"), **changes)


def make_images(count: int, height: int = 32, width: int = 32) -> np.ndarray:
    """Noise and smooth images in turn: uint8 [count, height, width, 3]."""
    rng = np.random.default_rng(count)
    images = rng.integers(0, 256, (count, height, width, 3))
    y, x = np.mgrid[:height, :width]
    for i in range(0, count, 2):
        phase, frequency = rng.uniform(0, 6, 3), rng.uniform(0.05, 0.4, (2, 3))
        waves = np.sin(x[..., None] * frequency[0] + y[..., None] * frequency[1] + phase)
        images[i] = 128 + rng.uniform(10, 120) * waves
    return images.astype(np.uint8)


def pil_view(spec, image: np.ndarray, parameters: views.ViewParameters, v: int, b: int, dtype) -> torch.Tensor:
    """One view made by PIL and torch from the drawn parameters, image by image."""
    padding = spec.padding
    mode = {"zero": "constant", "reflect": "reflect"}[spec.padding_mode]
    picture = Image.fromarray(np.pad(image, ((padding, padding), (padding, padding), (0, 0)), mode=mode))
    top, left = int(parameters.tops_VB[v, b]), int(parameters.lefts_VB[v, b])
    picture = picture.crop((left, top, left + spec.crop_size, top + spec.crop_size))
    if parameters.flips_VB[v, b]:
        picture = ImageOps.mirror(picture)
    for steps, fill in parameters.steps:
        for ops_VB, values_VB, resamples_VB in zip(*steps, strict=True):
            op, resample = Op(int(ops_VB[v, b])), Resample(int(resamples_VB[v, b]))
            picture = pil_op(picture, op, float(values_VB[v, b]), resample, fill)
    view = torch.from_numpy(np.array(picture)).permute(2, 0, 1).to(dtype).div(255)
    mean, std = (torch.tensor(numbers, dtype=dtype)[:, None, None] for numbers in (spec.mean, spec.std))
    view = (view - mean) / std
    top, left, height, width = parameters.boxes_VB4[v, b]
    view[:, top : top + height, left : left + width] = 0
    return view


SPECS = {
    "cifar10": recipe_spec("cifar10"),
    "svhn": recipe_spec("svhn"),
    "imagenet": recipe_spec("imagenet", crop_size=45),
    "randaa": recipe_spec("cifar100", randaa="rand-m9-n2-mstd0.5-inc1"),
    "randaa-wide": recipe_spec("imagenet", crop_size=37, randaa="rand-m5-n3-mstd4"),
    "trivial": recipe_spec("cifar100", randaa="trivial"),
    "jitter-reflect": cifar_spec(color_jitter=0.4, padding_mode="reflect", policy="svhn"),
    "plain": cifar_spec(policy="none", erase_p=0.0, flip=False, padding=0),
    "digits": recipe_spec("digits", crop_size=16, padding=2),
    "inner-crop": cifar_spec(crop_size=19, padding=1),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", SPECS)
def test_views_are_what_pil_makes_bit_for_bit(name, dtype):
    spec = SPECS[name]
    size = (spec.crop_size, spec.crop_size) if spec.random_resized_crop or name == "digits" else (32, 32)
    images = make_images(150, *size)
    maker = ViewMaker(spec, seed=3)
    parameters = maker.draw(2, np.arange(150) + 40, 2, size)
    got = maker.apply(to_tensor(images), parameters, dtype=dtype)
    assert got.shape == (2, 150, 3, spec.crop_size, spec.crop_size)
    assert got.dtype == dtype
    for v in range(2):
        for b, image in enumerate(images):
            assert torch.equal(got[v, b], pil_view(spec, image, parameters, v, b, dtype)), (name, v, b)


def test_images_need_not_be_square():
    spec, images = cifar_spec(crop_size=24), make_images(20, 40, 27)
    maker = ViewMaker(spec, seed=3)
    parameters = maker.draw(0, np.arange(20), 1, (40, 27))
    assert parameters.tops_VB.max() > parameters.lefts_VB.max()
    got = maker.apply(to_tensor(images), parameters)
    for b, image in enumerate(images):
        assert torch.equal(got[0, b], pil_view(spec, image, parameters, 0, b, torch.float32))


def test_views_that_come_cropped_are_flipped_and_augmented():
    spec = recipe_spec("imagenet")
    crops = make_images(60)
    maker = ViewMaker(spec, seed=1)
    parameters = maker.draw(0, np.arange(20), 3, (32, 32))
    got = maker.apply(to_tensor(crops).view(3, 20, 3, 32, 32), parameters)
    for v in range(3):
        for b in range(20):
            assert torch.equal(got[v, b], pil_view(spec, crops[20 * v + b], parameters, v, b, torch.float32))


@pytest.mark.parametrize("name", ["cifar10", "svhn", "randaa", "trivial", "jitter-reflect"])
def test_views_depend_on_neither_batch_nor_chunks(name, monkeypatch):
    spec = dataclasses.replace(SPECS[name], erase_mode="pixel")
    images, positions = to_tensor(make_images(90)), np.random.default_rng(0).permutation(1000)[:90]
    maker = ViewMaker(spec, seed=5)
    whole = maker.make(images, 7, positions, 3)
    monkeypatch.setattr(views, "CHUNK_PIXELS", {"cpu": 3 * 7 * 32 * 32})  # 7 images at a time
    assert torch.equal(maker.make(images, 7, positions, 3), whole)
    monkeypatch.undo()
    assert torch.equal(maker.make(images, 7, positions, 1), whole[:1])
    for part in (slice(0, 1), slice(1, 40), slice(40, 90)):
        assert torch.equal(maker.make(images[part], 7, positions[part], 3), whole[:, part])
    assert torch.equal(ViewMaker(spec, seed=5).make(images, 7, positions, 3), whole)
    for other in (ViewMaker(spec, seed=6).make(images, 7, positions, 3), maker.make(images, 8, positions, 3)):
        assert not torch.equal(other, whole)
    assert not torch.equal(whole[0], whole[1])


@settings(max_examples=25, deadline=None)
@given(
    positions=st.lists(st.integers(0, 10**9), min_size=1, max_size=40),
    epoch=st.integers(0, 2000),
    num_views=st.integers(1, 5),
    name=st.sampled_from(list(SPECS)),
)
def test_parameters_are_a_pure_function_of_position_and_view(positions, epoch, num_views, name):
    maker = ViewMaker(SPECS[name], seed=11)
    size = (max(32, SPECS[name].crop_size),) * 2
    whole = maker.draw(epoch, np.array(positions), num_views, size)
    alone = maker.draw(epoch, np.array(positions[-1:]), num_views, size)
    for field in ("tops_VB", "lefts_VB", "flips_VB", "boxes_VB4", "noise_keys_VB"):
        np.testing.assert_array_equal(getattr(whole, field)[:, -1:], getattr(alone, field), err_msg=field)
    for (steps, fill), (steps_alone, fill_alone) in zip(whole.steps, alone.steps, strict=True):
        assert fill == fill_alone
        for part, part_alone in zip(steps, steps_alone, strict=True):
            np.testing.assert_array_equal(part[..., -1:], part_alone)


def test_retried_boxes_do_not_depend_on_the_batch():
    maker = ViewMaker(cifar_spec(erase_area=(0.5, 0.99), erase_ratio=(0.3, 3.3), erase_p=1.0), seed=0)
    positions = np.arange(400)
    boxes = maker.draw(0, positions, 2, (32, 32)).boxes_VB4
    assert (boxes[..., 2] > 0).mean() > 0.9  # one try alone fits a quarter of the time
    alone = np.concatenate([maker.draw(0, positions[[i]], 2, (32, 32)).boxes_VB4 for i in range(400)], axis=1)
    np.testing.assert_array_equal(boxes, alone)


def test_crops_and_flips_are_uniform_and_independent_between_views():
    parameters = ViewMaker(cifar_spec(), seed=9).draw(0, np.arange(40_000), 2, (32, 32))
    corners = parameters.tops_VB * 9 + parameters.lefts_VB
    assert parameters.tops_VB.min() == 0
    assert parameters.tops_VB.max() == 8
    cells = (corners[0] * 2 + parameters.flips_VB[0]).astype(int)
    assert stats.chisquare(np.bincount(cells, minlength=162)).pvalue > 1e-3
    both = parameters.tops_VB[0] * 9 + parameters.tops_VB[1]
    assert stats.chisquare(np.bincount(both, minlength=81)).pvalue > 1e-3
    flips = parameters.flips_VB[0] * 2 + parameters.flips_VB[1]
    assert stats.chisquare(np.bincount(flips, minlength=4)).pvalue > 1e-3
    erased = parameters.boxes_VB4[..., 2] > 0
    assert stats.binomtest(int(erased.sum()), erased.size).pvalue > 1e-3


def test_every_choice_has_numbers_of_its_own():
    """Two choices that read the same uniform number would be correlated."""
    spec = cifar_spec(color_jitter=0.4, policy="svhn", erase_area=(0.1, 0.3), erase_ratio=(0.5, 2.0), erase_p=1.0)
    parameters = ViewMaker(spec, seed=2).draw(0, np.arange(20_000), 1, (32, 32))
    jitter, policy = (steps for steps, _ in parameters.steps)
    boxes = parameters.boxes_VB4[0].astype(float)
    columns = [
        parameters.tops_VB[0],
        parameters.lefts_VB[0],
        parameters.flips_VB[0],
        *jitter.values_NVB[:, 0],
        *(policy.ops_NVB[:, 0] > 0),
        *(policy.values_NVB[:, 0] > 0.5),
        boxes[:, 0] / (33 - boxes[:, 2]),
        boxes[:, 1] / (33 - boxes[:, 3]),
        boxes[:, 2] * boxes[:, 3],
        boxes[:, 2] / boxes[:, 3],
        parameters.noise_keys_VB[0],
    ]
    correlations = np.corrcoef(np.array(columns, dtype=float))
    related = [(6, 7), (6, 8), (7, 9), (8, 9), (6, 9), (7, 8)]  # ops of one sub-policy belong together
    for i, j in related:
        correlations[i, j] = correlations[j, i] = 0
    np.fill_diagonal(correlations, 0)
    assert np.abs(correlations).max() < 4.5 / math.sqrt(20_000)


def test_pixel_erasing_puts_unit_gaussian_noise_into_the_box_only():
    spec = cifar_spec(erase_p=0.5, erase_area=(0.2, 0.4), erase_ratio=(0.5, 2.0))
    images, positions = to_tensor(make_images(200)), np.arange(200)
    zero = ViewMaker(spec, seed=4).make(images, 0, positions, 2)
    maker = ViewMaker(dataclasses.replace(spec, erase_mode="pixel"), seed=4)
    noisy = maker.make(images, 0, positions, 2)
    boxes = maker.draw(0, positions, 2, (32, 32)).boxes_VB4
    inside = torch.zeros(2, 200, 1, 32, 32, dtype=torch.bool)
    for v in range(2):
        for b in range(200):
            top, left, height, width = boxes[v, b]
            inside[v, b, :, top : top + height, left : left + width] = True
    inside = inside.expand_as(noisy)
    assert torch.equal(noisy[~inside], zero[~inside])
    assert not zero[inside].any()
    assert stats.kstest(noisy[inside].numpy()[::7], "norm").pvalue > 1e-3
    erased = np.argwhere(boxes[..., 2] > 0)
    (v0, b0), (v1, b1) = erased[0], erased[-1]
    assert not torch.equal(noisy[v0, b0], noisy[v1, b1])


def test_result_types_and_memory_formats():
    images, maker = to_tensor(make_images(12)), ViewMaker(cifar_spec(), seed=0)
    parameters = maker.draw(0, np.arange(12), 2, (32, 32))
    exact = maker.apply(images, parameters)
    assert exact.is_contiguous()
    half = maker.apply(images, parameters, dtype=torch.bfloat16, memory_format=torch.channels_last)
    assert half.dtype == torch.bfloat16
    assert all(view.is_contiguous(memory_format=torch.channels_last) for view in half)
    assert torch.equal(half, exact.bfloat16())
    wide = maker.apply(images, parameters, dtype=torch.float64)
    torch.testing.assert_close(wide.float(), exact, rtol=0, atol=1e-6)
    assert not torch.equal(wide, exact.double())  # not computed in float32


def test_apply_leaves_images_alone_and_takes_slices():
    images = to_tensor(make_images(40))
    kept, maker = images.clone(), ViewMaker(cifar_spec(padding=0), seed=0)
    strided = torch.stack([images, images], dim=1).flatten(0, 1)[::2]
    assert not strided.is_contiguous()
    assert torch.equal(maker.make(strided, 0, np.arange(40), 2), maker.make(images, 0, np.arange(40), 2))
    assert torch.equal(images, kept)


def test_evaluation_normalises_only():
    images, maker = to_tensor(make_images(5)), ViewMaker(cifar_spec(), seed=0)
    mean, std = torch.tensor(MEAN)[:, None, None], torch.tensor(STD)[:, None, None]
    expected = (images.float() / 255 - mean) / std
    assert torch.equal(maker.evaluate(images), expected)
    assert torch.equal(maker.evaluate(images, torch.bfloat16), expected.bfloat16())
    assert maker.evaluate(images, torch.float64).dtype == torch.float64
    last = maker.evaluate(images, memory_format=torch.channels_last)
    assert last.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(last, expected)


@pytest.mark.parametrize(
    ("recipe", "changes", "expected"),
    [
        ("cifar10", {}, {"policy": "cifar10", "erase_area": (0.125, 0.2), "erase_ratio": (0.99, 1.0), "padding": 4}),
        ("cifar10", {"is_autoaugment": False}, {"policy": "none", "flip": True}),
        ("cifar100", {}, {"policy": "cifar10", "erase_area": (0.0625, 0.1), "erase_ratio": (0.99, 1.0)}),
        ("cifar100", {"is_autoaugment": False, "is_cutout": False}, {"policy": "none", "erase_p": 0.0}),
        ("svhn", {}, {"policy": "svhn", "erase_area": (0.125, 0.25), "erase_ratio": (0.9, 1.1), "flip": True}),
        (
            "imagenet",
            {"crop_size": 224, "erase_p": 0.2},
            {
                "policy": "imagenet",
                "erase_area": (0.05, 0.12),
                "erase_ratio": (0.5, 1.5),
                "erase_p": 0.2,
                "padding": 0,
                "random_resized_crop": True,
            },
        ),
        (
            "imagenet",
            {"erase_area": (0.02, 0.3), "erase_ratio": (0.3, 3.3), "color_jitter": 0.4},
            {"erase_area": (0.02, 0.3), "erase_ratio": (0.3, 3.3), "color_jitter": 0.4, "erase_p": 0.5},
        ),
        ("digits", {"erase_area": (0.1, 0.2)}, {"erase_area": (0.1, 0.2), "erase_ratio": (1.0, 1.0), "erase_p": 0.5}),
        ("imagenet", {"randaa": "rand-m9-mstd0.5"}, {"policy": "rand-m9-mstd0.5"}),
        ("imagenet", {"mean": (0.485, 0.456, 0.406)}, {"fill": (124, 116, 104)}),
        ("digits", {"padding": 2}, {"policy": "none", "flip": False, "erase_p": 0.0, "padding": 2}),
    ],
)
def test_recipe_rows(recipe, changes, expected):
    spec = recipe_spec(recipe, **changes)
    assert {name: getattr(spec, name) for name in expected} == expected
    assert spec.erase_mode == "const"
    assert recipe_spec(recipe, **changes, erase_mode="pixel").erase_mode == "pixel"
    assert spec.random_resized_crop == (recipe == "imagenet")


@pytest.mark.parametrize(
    ("changes", "flag"),
    [
        ({"crop_size": 0}, "--crop_size"),
        ({"padding": -1}, "--padding"),
        ({"erase_p": 1.5}, "--erase_p"),
        ({"randaa": "rand-m9-nonsense"}, "--randaa"),
    ],
)
def test_wrong_flags_are_named(changes, flag):
    with pytest.raises(UserError, match=flag):
        ViewMaker(recipe_spec("cifar10", **changes), seed=0)


def test_a_crop_or_reflection_larger_than_the_images_is_refused():
    reflecting = ViewMaker(recipe_spec("cifar10", crop_size=8, padding=8, padding_mode="reflect"), seed=0)
    with pytest.raises(UserError, match=r"--padding 8 .*--padding_mode reflect .* 7 or less"):
        reflecting.draw(0, np.arange(2), 1, (8, 8))
    with pytest.raises(UserError, match=r"--crop_size 41 .* 40 or less"):
        ViewMaker(cifar_spec(crop_size=41), seed=0).draw(0, np.arange(2), 1, (32, 32))


def test_wrong_images_are_refused():
    maker = ViewMaker(cifar_spec(), seed=0)
    parameters = maker.draw(0, np.arange(4), 2, (32, 32))
    byte = torch.uint8
    wrong = [
        torch.zeros(4, 3, 32, 32),
        torch.zeros(5, 3, 32, 32, dtype=byte),
        torch.zeros(4, 3, 32, 33, dtype=byte),
        torch.zeros(2, 4, 3, 32, 32, dtype=byte),
        torch.zeros(3, 32, 32, dtype=byte),
    ]
    for images in wrong:
        with pytest.raises(ValueError, match="uint8"):
            maker.apply(images, parameters)


def test_views_that_should_come_cropped_are_not_cropped_again():
    maker = ViewMaker(recipe_spec("imagenet"), seed=0)
    with pytest.raises(ValueError, match="32x32"):
        maker.draw(0, np.arange(4), 2, (40, 40))
    with pytest.raises(ValueError, match="views"):
        maker.apply(torch.zeros(3, 4, 3, 32, 32, dtype=torch.uint8), maker.draw(0, np.arange(4), 2, (32, 32)))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("erase_mode", ["const", "pixel"])  # const: where there is one, by the Triton kernel
@pytest.mark.parametrize("name", SPECS)
def test_a_gpu_makes_the_same_views_and_is_never_waited_for(name, erase_mode):
    spec = dataclasses.replace(SPECS[name], erase_mode=erase_mode)
    size = (spec.crop_size, spec.crop_size) if spec.random_resized_crop or name == "digits" else (32, 32)
    images, positions = to_tensor(make_images(300, *size)), np.arange(300)
    expected = ViewMaker(spec, seed=3).make(images, 1, positions, 2)
    maker, on_device = ViewMaker(spec, seed=3), images.cuda()
    maker.make(on_device, 0, positions, 2)  # first use fills the table of normal quantiles
    with nothing_waits():
        got = maker.make(on_device, 1, positions, 2)
        evaluated = maker.evaluate(on_device)
    assert torch.equal(got.cpu(), expected)
    assert torch.equal(evaluated.cpu(), maker.evaluate(images))


class Kernel:
    """Stands for the Triton kernel: makes the views by the plain ops, and then does what it is told to.

    Also for the kernel that draws, where it is told what that one does then.
    """

    def __init__(self, monkeypatch, then, then_drawn=None):
        self.parts, self.drawn = [], []
        plain = ViewMaker._fill

        def fill(maker, views, images, parameters, part):
            self.parts.append(part)
            plain(maker, views, images, parameters, part)
            then(views)

        def draw(maker, views, images, epoch, positions, first_view):
            self.drawn.append(epoch)
            parameters = maker.draw(epoch, positions, len(views), images.shape[-2:], first_view=first_view)
            plain(maker, views, images, parameters, slice(0, len(images)))
            then_drawn(views)

        monkeypatch.setattr(ViewMaker, "_has_kernel", lambda *_: True)
        monkeypatch.setattr(ViewMaker, "_fill_by_kernel", fill)
        if then_drawn is None:
            monkeypatch.setattr(ViewMaker, "_has_table", lambda _: False)
        monkeypatch.setattr(ViewMaker, "_draw_and_fill", draw)


def no_compiler(views):
    raise RuntimeError("Failed to find C compiler.\nPlease specify")


def no_headers(views):
    raise subprocess.CalledProcessError(1, ["gcc", "driver.c"])


KERNELS = {
    "works": (lambda views: None, None),
    "no compiler": (no_compiler, "cannot be used here (Failed to find C compiler. Please specify)"),
    "no headers": (no_headers, "cannot be used here (Command '['gcc', 'driver.c']' returned non-zero"),
    "wrong": (lambda views: views[-1, -1, -1, -1, -1].add_(1), "makes other views than the plain operations"),
}


@pytest.mark.parametrize(("then", "line"), KERNELS.values(), ids=KERNELS)
def test_the_kernel_is_used_only_where_it_makes_the_plain_views(monkeypatch, caplog, then, line):
    spec, positions = SPECS["cifar10"], np.arange(80)
    images = to_tensor(make_images(80, 32, 32))
    expected = [ViewMaker(spec, seed=3).make(images, epoch, positions, 2) for epoch in range(2)]
    kernel, maker = Kernel(monkeypatch, then), ViewMaker(spec, seed=3)
    for epoch in range(2):
        assert torch.equal(maker.make(images, epoch, positions, 2), expected[epoch])
    assert len(kernel.parts) == (3 if line is None else 1)
    assert kernel.parts[0] == slice(0, 64)  # compared
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == (line is not None)
    assert all(line in one and "are the same and take longer" in one for one in lines)


DRAWINGS = {
    "works": (lambda views: None, None),
    "no compiler": (no_compiler, "cannot be drawn by a kernel here (Failed to find C compiler. Please specify)"),
    "wrong": (lambda views: views[-1, -1, -1, -1, -1].add_(1), "draws other views on this GPU than the host does"),
}


@pytest.mark.parametrize(("then", "line"), DRAWINGS.values(), ids=DRAWINGS)
def test_views_are_drawn_on_the_device_only_where_they_are_the_hosts(monkeypatch, caplog, then, line):
    """Once the kernel that makes them has proved itself."""
    spec, positions = SPECS["cifar10"], np.arange(60)
    images = to_tensor(make_images(60, 32, 32))
    expected = [ViewMaker(spec, seed=3).make(images, epoch, positions, 2) for epoch in range(4)]
    kernel, maker = Kernel(monkeypatch, lambda views: None, then), ViewMaker(spec, seed=3)
    for epoch in range(4):
        assert torch.equal(maker.make(images, epoch, positions, 2), expected[epoch])
    assert kernel.drawn == ([1, 2, 3] if line is None else [1])
    assert len(kernel.parts) == (2 if line is None else 5)
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == (line is not None)
    assert all(line in one and "are the same and take longer" in one for one in lines)


@pytest.mark.parametrize(
    ("change", "has_table"),
    [
        ({}, True),
        ({"policy": "none"}, True),
        ({"policy": "trivial"}, True),
        ({"policy": "rand-m9-n2"}, True),
        ({"policy": "rand-m9-mstd0.5"}, False),  # continuous
        ({"color_jitter": 0.4}, False),
        ({"erase_p": 0.5, "erase_mode": "pixel"}, False),
        ({"erase_p": 0, "erase_mode": "pixel"}, True),
    ],
)
def test_what_a_table_holds_is_drawn_on_the_device(change, has_table):
    assert ViewMaker(replace(SPECS["cifar10"], **change), seed=3)._has_table() == has_table


def test_images_that_are_not_those_of_the_positions_never_reach_the_kernels(monkeypatch):
    """They would read and write beside what they are given."""
    images, positions = to_tensor(make_images(6, 32, 32)), np.arange(6)
    kernel, maker = Kernel(monkeypatch, lambda views: None, lambda views: None), ViewMaker(SPECS["cifar10"], seed=3)
    for epoch in range(2):
        maker.make(images, epoch, positions, 2)
    for wrong in (images[:4], images.float()):
        with pytest.raises(ValueError, match="uint8"):
            maker.make(wrong, 2, positions, 2)
    assert kernel.drawn == [1]


def test_a_kernel_that_cannot_be_built_again_later_is_given_up_too(monkeypatch, caplog):
    """For another number of images Triton may build another kernel."""
    spec, positions = SPECS["cifar10"], np.arange(6)
    images = to_tensor(make_images(6, 32, 32))
    maker, broken = ViewMaker(spec, seed=3), []
    kernel = Kernel(monkeypatch, lambda views: no_headers(views) if broken else None)
    maker.make(images, 0, positions, 2)
    broken.append(True)
    for epoch in (1, 2):
        expected = ViewMaker(spec, seed=3)
        expected._kernel_works = False
        assert torch.equal(maker.make(images, epoch, positions, 2), expected.make(images, epoch, positions, 2))
    assert len(kernel.parts) == 3
    assert len(caplog.records) == 1


def test_memory_that_does_not_suffice_is_not_the_kernels_fault(monkeypatch):
    def full(views):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    Kernel(monkeypatch, full)
    with pytest.raises(torch.OutOfMemoryError):
        ViewMaker(SPECS["cifar10"], seed=3).make(to_tensor(make_images(4, 32, 32)), 0, np.arange(4), 2)

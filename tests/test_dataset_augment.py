"""Image ops against PIL and timm, policies and boxes against the distributions they promise."""

import json
import math
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps
from scipy import stats
from timm.data import auto_augment as timm_augment
from torchvision import transforms

from dataset.augment import color, erasing, geometry
from dataset.augment.plan import Upload, plan_step
from dataset.augment.policy import (
    AUTOAUGMENT_POLICIES,
    AutoAugment,
    ColorJitter,
    Op,
    RandAugment,
    Resample,
    TrivialAugment,
    parse_randaugment,
)
from dataset.augment.resized_crop import RESIZED_CROP_SLOTS, draw_resized_crops
from utils.errors import UserError

FILL = (124, 116, 104)
SIZES = [(32, 32), (33, 47), (64, 64), (96, 80), (5, 7), (3, 2), (1, 1)]
GEOMETRIC = (Op.SHEAR_X, Op.SHEAR_Y, Op.TRANSLATE_X, Op.TRANSLATE_Y, Op.ROTATE)
ENHANCERS = {
    Op.BRIGHTNESS: ImageEnhance.Brightness,
    Op.CONTRAST: ImageEnhance.Contrast,
    Op.COLOR: ImageEnhance.Color,
    Op.SHARPNESS: ImageEnhance.Sharpness,
}


def pil_op(image: Image.Image, op: Op, value: float, resample: Resample, fill: tuple[int, ...]) -> Image.Image:
    """What PIL makes of one image; `tests.test_dataset_views` uses it too."""
    width, height = image.size
    if op is Op.NONE:
        return image
    if op in ENHANCERS:
        return ENHANCERS[op](image).enhance(value)
    if op is Op.AUTOCONTRAST:
        return ImageOps.autocontrast(image)
    if op is Op.EQUALIZE:
        return ImageOps.equalize(image)
    if op is Op.INVERT:
        return ImageOps.invert(image)
    if op is Op.POSTERIZE:  # PIL of late refuses 0 bits, which is black
        return ImageOps.posterize(image, int(value)) if value else Image.new("RGB", image.size)
    if op is Op.SOLARIZE:
        return ImageOps.solarize(image, value)
    if op is Op.SOLARIZE_ADD:
        return timm_augment.solarize_add(image, int(value))
    if op is Op.ROTATE:
        return image.rotate(value, resample=int(resample), fillcolor=fill)
    matrix = {
        Op.SHEAR_X: (1, value, 0, 0, 1, 0),
        Op.SHEAR_Y: (1, 0, 0, value, 1, 0),
        Op.TRANSLATE_X: (1, 0, value * width, 0, 1, 0),
        Op.TRANSLATE_Y: (1, 0, 0, 0, 1, value * height),
    }[op]
    return image.transform(image.size, Image.Transform.AFFINE, matrix, resample=int(resample), fillcolor=fill)


def make_images(height: int, width: int) -> np.ndarray:
    """Noise, gradients, constants, few values, natural contrasts: uint8 [N, height, width, 3]."""
    rng = np.random.default_rng(height * 1000 + width)
    y, x = np.mgrid[:height, :width]
    gradients = np.stack([x * 255 // max(1, width - 1), y * 255 // max(1, height - 1), (x + y) * 3 % 256], axis=-1)
    images = [
        rng.integers(0, 256, (height, width, 3)),
        gradients,
        np.full((height, width, 3), (0, 128, 255)),
        rng.integers(100, 120, (height, width, 3)),
        np.where(rng.random((height, width, 3)) < 0.02, 200, 60),
        np.clip(rng.normal(120, 40, (height, width, 3)), 0, 255),
    ]
    return np.stack(images).astype(np.uint8)


def to_tensor(images_NHWC: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(images_NHWC, -1, 1)))


def run_ops(images_KCHW, ops, values, resamples, fill=FILL) -> np.ndarray:
    """Apply one op to each image: uint8 [K, H, W, C]."""
    upload = Upload()
    plan = plan_step(
        np.array(ops, dtype=np.int64),
        np.array(values, dtype=np.float64),
        np.array(resamples, dtype=np.int64),
        height=images_KCHW.shape[2],
        width=images_KCHW.shape[3],
        fill_place=upload.add(np.array(fill, dtype=np.float64)),
        upload=upload,
    )
    changed = images_KCHW[torch.from_numpy(plan.order)]
    plan.run(changed, upload.send(changed.device))
    return np.moveaxis(changed[torch.from_numpy(np.argsort(plan.order))].numpy(), 1, -1)


def values_of(op: Op) -> list[float]:
    """Every AutoAugment level and sign, every RandAugment integer, and values between."""
    rng = np.random.default_rng(int(op))
    if op in ENHANCERS:
        levels = np.linspace(0, 0.9, 10)
        return [*(1 + levels), *(1 - levels), *rng.uniform(0, 2, 10), 0.0, 2.0]
    if op is Op.POSTERIZE:
        return list(range(9))
    if op is Op.SOLARIZE:
        return [*np.linspace(256, 0, 10), *rng.integers(0, 257, 5)]
    if op is Op.SOLARIZE_ADD:
        return [0, 1, 50, 99, 110, 128]
    top = {Op.SHEAR_X: 0.3, Op.SHEAR_Y: 0.3, Op.TRANSLATE_X: 150 / 331, Op.TRANSLATE_Y: 150 / 331, Op.ROTATE: 30}
    if op in top:
        levels = np.linspace(0, top[op], 10)
        halves = [0.5 / 32, -0.5 / 32, 1.5 / 64, -1.5 / 64]  # shifts of half a pixel, a tie between two neighbours
        return [*levels, *-levels, *rng.uniform(-top[op], top[op], 10), *halves]
    return [0]


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("op", list(Op), ids=lambda op: op.name)
def test_op_is_pil_bit_for_bit(op, size):
    images = make_images(*size)
    resamples = list(Resample) if op in GEOMETRIC else [Resample.NEAREST]
    if op in (Op.SHEAR_X, Op.SHEAR_Y):
        resamples = [Resample.BILINEAR, Resample.BICUBIC]  # no policy shears with nearest neighbours
    cases = [(i, float(v), r) for i in range(len(images)) for v in values_of(op) for r in resamples]
    got = run_ops(
        to_tensor(images)[[i for i, _, _ in cases]], [op] * len(cases), [v for _, v, _ in cases], [r for *_, r in cases]
    )
    for result, (i, value, resample) in zip(got, cases, strict=True):
        expected = np.asarray(pil_op(Image.fromarray(images[i]), op, value, resample, FILL))
        np.testing.assert_array_equal(result, expected, err_msg=f"image {i}, value {value}, {resample!r}")


def test_every_image_keeps_its_own_op_and_place_in_a_mixed_batch():
    rng = np.random.default_rng(0)
    images = make_images(20, 24)
    cases = [
        (op, float(v), r) for op in Op for v in values_of(op) for r in (list(Resample) if op in GEOMETRIC else [0])
    ]
    cases = [case for case in cases if not (case[0] in (Op.SHEAR_X, Op.SHEAR_Y) and case[2] == Resample.NEAREST)]
    rng.shuffle(cases)
    which = rng.integers(0, len(images), len(cases))
    ops, values, resamples = zip(*cases, strict=True)
    got = run_ops(to_tensor(images)[which], ops, values, resamples)
    for result, i, (op, value, resample) in zip(got, which, cases, strict=True):
        expected = pil_op(Image.fromarray(images[i]), op, value, Resample(resample), FILL)
        np.testing.assert_array_equal(result, np.asarray(expected), err_msg=f"{op!r} {value}")


def test_a_large_rotation_is_pil_too():
    images = make_images(31, 44)
    angles = [90.0, 180.0, -90.0, 135.0, 359.0]
    for resample in Resample:
        got = run_ops(to_tensor(images)[:5], [Op.ROTATE] * 5, angles, [resample] * 5)
        for result, image, angle in zip(got, images, angles, strict=False):
            if angle % 90 == 0 and resample is not Resample.NEAREST:
                continue  # PIL transposes instead of interpolating
            expected = np.asarray(pil_op(Image.fromarray(image), Op.ROTATE, angle, resample, FILL))
            np.testing.assert_array_equal(result, expected, err_msg=f"{angle} {resample!r}")


TRIVIAL_NAMES = {"Identity": Op.NONE, "AutoContrast": Op.AUTOCONTRAST, "Equalize": Op.EQUALIZE, "ShearX": Op.SHEAR_X}
TRIVIAL_NAMES |= {"ShearY": Op.SHEAR_Y, "TranslateX": Op.TRANSLATE_X, "TranslateY": Op.TRANSLATE_Y, "Rotate": Op.ROTATE}
TRIVIAL_NAMES |= {"Brightness": Op.BRIGHTNESS, "Color": Op.COLOR, "Contrast": Op.CONTRAST, "Sharpness": Op.SHARPNESS}
TRIVIAL_NAMES |= {"Posterize": Op.POSTERIZE, "Solarize": Op.SOLARIZE}


@pytest.mark.parametrize("size", [32, 45, pytest.param(224, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", TRIVIAL_NAMES)
def test_trivial_augment_is_torchvisions_at_every_magnitude(name: str, size: int) -> None:
    policy = TrivialAugment(size)
    space = transforms.TrivialAugmentWide()._augmentation_space(31)
    assert space.keys() == TRIVIAL_NAMES.keys()
    magnitudes, signed = space[name]
    image = make_images(size, size)[0]
    which = [*policy._ops].index(TRIVIAL_NAMES[name])
    places = [(bin, sign) for bin in range(31) for sign in range(1 + signed)]
    uniforms_1BU = np.array([[((which + 0.5) / 14, (bin + 0.5) / 31, 0.25 if sign else 0.75) for bin, sign in places]])
    ops_1B, values_1B, resamples_1B = (part[0] for part in policy.draw(uniforms_1BU))
    images = to_tensor(image[None]).expand(len(places), -1, -1, -1).contiguous()
    got = run_ops(images, ops_1B[0], values_1B[0], resamples_1B[0], fill=policy.fill)
    for result, (bin, sign) in zip(got, places, strict=True):
        magnitude = float(magnitudes[bin]) * (-1 if sign else 1) if magnitudes.ndim else 0.0
        picture = Image.fromarray(image)
        nearest = transforms.InterpolationMode.NEAREST
        expected = transforms.autoaugment._apply_op(picture, name, magnitude, interpolation=nearest, fill=None)
        np.testing.assert_array_equal(result, np.asarray(expected), err_msg=f"{name} {magnitude}")


def test_trivial_augment_draws_ops_magnitudes_and_signs_evenly_and_apart() -> None:
    policy = TrivialAugment(32)
    uniforms_VBU = np.random.default_rng(0).random((2, 20000, policy.num_slots))
    (ops_VB,), (values_VB,), (resamples_VB,) = policy.draw(uniforms_VBU)
    assert not resamples_VB.any()
    ops, counts = np.unique(ops_VB, return_counts=True)
    assert {*map(Op, ops.tolist())} == {*TRIVIAL_NAMES.values()}
    assert stats.chisquare(counts).pvalue > 1e-4
    turns = values_VB[ops_VB == Op.ROTATE]
    assert len(np.unique(turns)) == 61
    assert stats.chisquare(np.unique(np.abs(turns), return_counts=True)[1]).pvalue > 1e-4
    assert abs((turns > 0).mean() - (turns < 0).mean()) < 0.05


def test_reflection_padding_is_numpys():
    images = make_images(9, 6)
    padded = geometry.pad_images(to_tensor(images), 4, "reflect")
    expected = np.pad(images, ((0, 0), (4, 4), (4, 4), (0, 0)), mode="reflect")
    np.testing.assert_array_equal(np.moveaxis(padded.numpy(), 1, -1), expected)


def test_counting_on_gpus_is_bincount():
    bins = torch.from_numpy(np.random.default_rng(0).integers(0, 700, 5000)).int()
    counts = color.count_without_waiting(bins, minlength=768)
    assert torch.equal(counts.long(), torch.bincount(bins, minlength=768))


# --- AutoAugment ---


def test_policies_are_the_golden_tables():
    golden = json.loads((Path(__file__).parent / "golden" / "autoaugment.json").read_text())
    assert {name: [list(row) for row in rows] for name, rows in AUTOAUGMENT_POLICIES.items()} == {
        name: rows for name, rows in golden.items() if name != "_about"
    }


AUTOAUGMENT_LEVELS = {
    "shearX": (Op.SHEAR_X, np.linspace(0, 0.3, 10)),
    "shearY": (Op.SHEAR_Y, np.linspace(0, 0.3, 10)),
    "translateX": (Op.TRANSLATE_X, np.linspace(0, 150 / 331, 10)),
    "translateY": (Op.TRANSLATE_Y, np.linspace(0, 150 / 331, 10)),
    "rotate": (Op.ROTATE, np.linspace(0, 30, 10)),
    "color": (Op.COLOR, np.linspace(0, 0.9, 10)),
    "contrast": (Op.CONTRAST, np.linspace(0, 0.9, 10)),
    "brightness": (Op.BRIGHTNESS, np.linspace(0, 0.9, 10)),
    "sharpness": (Op.SHARPNESS, np.linspace(0, 0.9, 10)),
    "posterize": (Op.POSTERIZE, [8, 8, 7, 7, 6, 6, 5, 5, 4, 4]),
    "solarize": (Op.SOLARIZE, np.linspace(256, 0, 10)),
    "autocontrast": (Op.AUTOCONTRAST, [0] * 10),
    "equalize": (Op.EQUALIZE, [0] * 10),
    "invert": (Op.INVERT, [0] * 10),
}


@pytest.mark.parametrize("name", AUTOAUGMENT_POLICIES)
def test_autoaugment_draws_sub_policies_probabilities_and_signs(name):
    policy, count = AutoAugment(name), 100_000
    uniforms = np.random.default_rng(1).random((1, count, policy.num_slots))
    steps = policy.draw(uniforms)
    assert steps.ops_NVB.shape == (2, 1, count)
    sub_policy = np.floor(uniforms[0, :, 0] * 25).astype(int)
    assert stats.chisquare(np.bincount(sub_policy, minlength=25)).pvalue > 1e-3
    p_values = []
    for row, (p1, op1, level1, p2, op2, level2) in enumerate(AUTOAUGMENT_POLICIES[name]):
        chosen = sub_policy == row
        applied = []
        for i, p, op_name, level in ((0, p1, op1, level1), (1, p2, op2, level2)):
            op, levels = AUTOAUGMENT_LEVELS[op_name]
            ops, values = steps.ops_NVB[i, 0, chosen], steps.values_NVB[i, 0, chosen]
            assert set(ops) <= {0, int(op)}
            applied.append(ops > 0)
            point = levels[level]
            allowed = {point}
            if op in ENHANCERS:
                allowed = {1 + point, 1 - point}
            elif op in GEOMETRIC and op is not Op.ROTATE:
                allowed = {point, -point}
            if p > 0:
                assert set(values[ops > 0]) == allowed
            if len(allowed) == 2 and p > 0:
                p_values.append(
                    stats.binomtest(int((values[ops > 0] == max(allowed)).sum()), int((ops > 0).sum())).pvalue
                )
            assert set(values[ops == 0]) <= {0.0}
            resample = {Op.SHEAR_X: Resample.BICUBIC, Op.SHEAR_Y: Resample.BICUBIC}.get(op, Resample.NEAREST)
            assert set(steps.resamples_NVB[i, 0, chosen][ops > 0]) <= {int(resample)}
        both = applied[0] & applied[1]
        first, second = steps.values_NVB[:, 0, chosen][:, both]
        if len(set(first)) == len(set(second)) == 2:
            table = np.histogram2d(first, second, bins=2)[0]
            p_values.append(stats.chi2_contingency(table).pvalue)
        joint = np.bincount(2 * applied[0] + applied[1], minlength=4)
        expected = chosen.sum() * np.array([(1 - p1) * (1 - p2), (1 - p1) * p2, p1 * (1 - p2), p1 * p2])
        assert not joint[expected == 0].any()
        possible = expected > 0
        p_values.append(stats.chisquare(joint[possible], expected[possible]).pvalue if possible.sum() > 1 else 1.0)
    assert min(p_values) > 1e-4  # up to 75 tests


# --- RandAugment ---

TIMM_NAMES = {
    "AutoContrast": Op.AUTOCONTRAST,
    "Equalize": Op.EQUALIZE,
    "Invert": Op.INVERT,
    "Rotate": Op.ROTATE,
    "Posterize": Op.POSTERIZE,
    "Solarize": Op.SOLARIZE,
    "SolarizeAdd": Op.SOLARIZE_ADD,
    "Color": Op.COLOR,
    "Contrast": Op.CONTRAST,
    "Brightness": Op.BRIGHTNESS,
    "Sharpness": Op.SHARPNESS,
    "ShearX": Op.SHEAR_X,
    "ShearY": Op.SHEAR_Y,
    "TranslateXRel": Op.TRANSLATE_X,
    "TranslateYRel": Op.TRANSLATE_Y,
}


def timm_op(name: str) -> Op:
    return TIMM_NAMES[name.removesuffix("Increasing")]


def timm_levels(ops: list, count: int) -> dict[Op, np.ndarray]:
    """Arguments that timm's ops draw when they are applied, 0 for none: op -> [count]."""
    drawn = {}
    for op in ops:
        values = []
        op.prob = 1.0
        op.aug_fn = lambda image, *args, values=values, **kwargs: values.append(args[0] if args else 0.0)
        for _ in range(count):
            op(None)
        drawn[timm_op(op.name)] = np.array(values)
    return drawn


@pytest.mark.parametrize(
    "text", ["rand-m9-n2-mstd0.5", "rand-m9-n3-mstd0.5-inc1", "rand-m4-mstd0.5", "rand-m2-mstd3-inc1"]
)
def test_randaugment_draws_as_timm(text):
    random.seed(0)
    theirs = timm_augment.rand_augment_transform(text, {"img_mean": FILL})
    ours = parse_randaugment(text, FILL)
    assert ours.num_ops == theirs.num_layers
    count = 60_000
    uniforms = np.random.default_rng(2).random((1, count, ours.num_slots))
    steps = ours.draw(uniforms)
    p_values = []
    for i in range(ours.num_ops):
        ops = steps.ops_NVB[i, 0]
        expected = [count / 2] + [count / 2 / len(theirs.ops)] * len(theirs.ops)
        p_values.append(stats.chisquare(np.bincount(ops, minlength=16), expected).pvalue)
        resamples = steps.resamples_NVB[i, 0]
        assert not resamples[~np.isin(ops, GEOMETRIC)].any()
        bilinear = resamples[np.isin(ops, GEOMETRIC)] == Resample.BILINEAR
        assert set(resamples[np.isin(ops, GEOMETRIC)]) == {Resample.BILINEAR, Resample.BICUBIC}
        p_values.append(stats.binomtest(int(bilinear.sum()), len(bilinear)).pvalue)
        positive = steps.values_NVB[i, 0][np.isin(ops, GEOMETRIC)] > 0
        p_values.append(stats.chi2_contingency(np.histogram2d(positive, bilinear, bins=2)[0]).pvalue)
    for op, values in timm_levels(theirs.ops, 1500).items():
        p_values.append(stats.ks_2samp(steps.values_NVB[0, 0][steps.ops_NVB[0, 0] == op], values).pvalue)
    assert len(p_values) == 3 * ours.num_ops + 15
    assert min(p_values) > 1e-4


@pytest.mark.parametrize("increasing", [0, 1])
@pytest.mark.parametrize("level", range(11))
def test_randaugment_op_at_a_level_is_timms(level, increasing):
    """Every op, interpolation and sign gives the very image that timm gives."""
    size = (33, 47)
    images = make_images(*size)
    ours = RandAugment(magnitude=level, increasing=bool(increasing), fill=FILL)
    steps = ours.draw(np.random.default_rng(3).random((1, 4000, ours.num_slots)))
    ours_of = {op: set(steps.values_NVB[steps.ops_NVB == op]) for op in TIMM_NAMES.values()}
    for interpolation in (Resample.BILINEAR, Resample.BICUBIC):
        hparams = {"img_mean": FILL, "interpolation": int(interpolation)}
        for op in timm_augment.rand_augment_transform(f"rand-m{level}-inc{increasing}", hparams).ops:
            if op.name.startswith("Posterize") and op.level_fn(level, hparams)[0] == 0:
                continue  # PIL of late refuses 0 bits
            op.prob = 1.0
            number, drawn, level_fn = timm_op(op.name), [], op.level_fn
            if level_fn is not None:

                def recorded(*args, level_fn=level_fn, drawn=drawn):
                    drawn.append(level_fn(*args))
                    return drawn[-1]

                op.level_fn = recorded
            random.seed(level)
            theirs = [np.asarray(op(Image.fromarray(image))) for image in images]
            values = [args[0] for args in drawn] or [0.0] * len(images)
            assert set(values) <= ours_of[number]
            resample = interpolation if number in GEOMETRIC else Resample.NEAREST
            got = run_ops(to_tensor(images), [number] * len(images), values, [resample] * len(images))
            np.testing.assert_array_equal(got, theirs, err_msg=op.name)


def test_levels_are_normal_and_clipped():
    uniforms = np.random.default_rng(9).random((1, 60_000, 12))
    steps = RandAugment(magnitude=5, std=1).draw(uniforms)
    tops = {Op.ROTATE: 30.0, Op.SHEAR_X: 0.3, Op.SHEAR_Y: 0.3, Op.TRANSLATE_X: 0.45, Op.TRANSLATE_Y: 0.45}
    levels = np.concatenate([np.abs(steps.values_NVB[steps.ops_NVB == op]) / top * 10 for op, top in tops.items()])
    assert stats.kstest(levels, stats.norm(5, 1).cdf).pvalue > 1e-3
    for magnitude, share in ((0, 0.5), (10, 0.5), (9, stats.norm.cdf(-2))):
        steps = RandAugment(magnitude=magnitude, std=0.5).draw(uniforms)
        levels = np.abs(steps.values_NVB[steps.ops_NVB == Op.ROTATE]) / 3
        clipped = np.isclose(levels, 0 if magnitude == 0 else 10, atol=1e-12)
        assert levels.max() < 10 + 1e-12
        assert stats.binomtest(int(clipped.sum()), len(levels), share).pvalue > 1e-3


def test_zero_bits_are_black():
    images = make_images(8, 8)
    assert not run_ops(to_tensor(images), [Op.POSTERIZE] * len(images), [0] * len(images), [0] * len(images)).any()


def test_randaugment_string_defaults_are_timms():
    policy = parse_randaugment("rand")
    assert (policy.magnitude, policy.num_ops, policy.std, policy.increasing) == (10.0, 2, 0.0, False)


@pytest.mark.parametrize(
    "text",
    ["", "rand-", "rnd-m9", "rand-m", "rand-m9-n0", "rand-m9-n1.5", "rand-m9-q3", "rand-m9-m8", "rand-inc2", "9"],
)
def test_malformed_randaugment_strings_are_refused(text):
    with pytest.raises(UserError, match="--randaa") as caught:
        parse_randaugment(text)
    assert "\n" not in str(caught.value)


def test_color_jitter_draws_as_torchvision():
    torch.manual_seed(0)
    theirs = [transforms.ColorJitter.get_params((0.6, 1.4), (0.6, 1.4), (0.6, 1.4), None) for _ in range(1500)]
    orders = [tuple(int(i) for i in params[0] if i < 3) for params in theirs]
    policy = ColorJitter(0.4)
    steps = policy.draw(np.random.default_rng(4).random((1, 20_000, policy.num_slots)))
    of_op = {int(Op.BRIGHTNESS): 0, int(Op.CONTRAST): 1, int(Op.COLOR): 2}
    ours = [tuple(of_op[op] for op in ops) for ops in steps.ops_NVB[:, 0].T.tolist()]
    kinds = sorted(set(orders))
    assert len(kinds) == 6
    assert set(ours) == set(kinds)
    table = [[found.count(kind) for kind in kinds] for found in (ours, orders)]
    assert stats.chi2_contingency(table).pvalue > 1e-3
    for op, place in of_op.items():
        factors = steps.values_NVB[steps.ops_NVB == op]
        assert stats.ks_2samp(factors, [params[1 + place] for params in theirs]).pvalue > 1e-3
    assert ColorJitter(2.0).draw(np.zeros((1, 1, 6))).values_NVB.min() == 0


# --- boxes ---


@pytest.mark.parametrize(
    ("size", "area", "ratio"),
    [((32, 32), (0.125, 0.25), (0.9, 1.1)), ((40, 56), (0.02, 1 / 3), (0.3, 3.3)), ((32, 20), (0.3, 0.95), (0.5, 4.0))],
)
def test_erased_boxes_are_distributed_as_torchvisions(size, area, ratio):
    torch.manual_seed(0)
    theirs = []
    for _ in range(1500):
        *box, _ = transforms.RandomErasing.get_params(torch.empty(3, *size), area, ratio, [0.0])
        theirs.append(box)
    theirs = np.array(theirs)
    missed = (theirs[:, 2] == size[0]) & (theirs[:, 3] == size[1])
    uniforms = np.random.default_rng(5).random((1, 10_000, erasing.PLACE_SLOTS + 2 * erasing.TRIES))
    boxes, missed_ours = erasing.draw_erasing(uniforms, *size, probability=0.75, area=area, ratio=ratio)
    boxes, missed_ours = boxes[0], missed_ours[0]
    wanted = uniforms[0, :, 0] < 0.75
    assert not boxes[~wanted].any()
    assert not missed_ours[~wanted].any()
    assert not boxes[missed_ours].any()
    drawn = boxes[wanted & ~missed_ours]
    assert (drawn[:, :2] >= 0).all()
    assert (drawn[:, :2] + drawn[:, 2:] <= size).all()
    for column in range(4):
        assert stats.ks_2samp(drawn[:, column], theirs[~missed, column]).pvalue > 1e-3
    table = [[missed_ours.sum(), (wanted & ~missed_ours).sum()], [missed.sum(), (~missed).sum()]]
    assert missed.any() == missed_ours.any()
    if missed.any():
        assert stats.chi2_contingency(table).pvalue > 1e-3


def test_fewer_tries_draw_the_same_boxes_where_they_fit():
    uniforms = np.random.default_rng(6).random((2, 500, erasing.PLACE_SLOTS + 2 * erasing.TRIES))
    options = {"probability": 0.9, "area": (0.3, 0.95), "ratio": (0.5, 4.0)}
    boxes, _ = erasing.draw_erasing(uniforms, 32, 20, **options)
    first, missed = erasing.draw_erasing(uniforms[..., : erasing.PLACE_SLOTS + 2], 32, 20, **options)
    assert 0 < missed.sum() < missed.size
    np.testing.assert_array_equal(first[~missed], boxes[~missed])


def test_counter_normals_are_normal_and_pure_functions_of_their_key():
    keys = torch.arange(50, dtype=torch.int64) * 7919
    normals = erasing.counter_normal(keys, 1001)
    assert normals.shape == (50, 1001)
    assert stats.kstest(normals.flatten().numpy(), "norm").pvalue > 1e-3
    assert abs(float(normals.var()) - 1) < 0.02
    products = (normals[:, 1:] * normals[:, :-1]).mean() * math.sqrt(50 * 1000)
    assert abs(float(products)) < 4
    torch.testing.assert_close(erasing.counter_normal(keys[[31]], 77), normals[[31], :77], rtol=0, atol=0)


@pytest.mark.parametrize(("size", "area"), [((375, 500), (0.1, 1.0)), ((40, 200), (0.08, 1.0)), ((9, 9), (0.01, 0.2))])
def test_resized_crops_are_distributed_as_torchvisions(size, area):
    torch.manual_seed(0)
    image, ratio = torch.empty(3, *size), (3 / 4, 4 / 3)
    theirs = np.array([transforms.RandomResizedCrop.get_params(image, area, ratio) for _ in range(1500)])
    uniforms = np.random.default_rng(7).random((2, 5000, RESIZED_CROP_SLOTS))
    ours = draw_resized_crops(uniforms, size[0], np.full(5000, size[1]), area, ratio)
    assert ours.shape == (2, 5000, 4)
    assert (ours >= 0).all()
    assert (ours[..., :2] + ours[..., 2:] <= size).all()
    for column in range(4):
        assert stats.ks_2samp(ours[..., column].ravel(), theirs[:, column]).pvalue > 1e-3


@pytest.mark.parametrize("size", [(20, 300), (300, 20), (301, 20), (37, 37), (100, 130), (3, 4), (4, 3)])
def test_resized_crop_falls_back_to_the_centre_as_torchvision(size):
    area = (1.5, 2.0)  # never fits
    expected = transforms.RandomResizedCrop.get_params(torch.empty(3, *size), area, (3 / 4, 4 / 3))
    boxes = draw_resized_crops(np.random.default_rng(8).random((3, RESIZED_CROP_SLOTS)), *size, area)
    np.testing.assert_array_equal(boxes, [expected] * 3)

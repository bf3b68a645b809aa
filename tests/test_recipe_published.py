"""The published recipes, our rules between them, and that nothing the user set is replaced."""

import dataclasses
import math
from typing import Any

import pytest
import torch

from model import LARGE, SMALL, BackboneRequest, backbones, build_network
from parser_params import parse_config, resolve_config
from recipe.published import recipe_defaults
from training.optim import parameter_groups
from training.options import OptimizerOptions
from training.schedule import Schedule


def recipe(
    data_recipe: str,
    arch: str = "resnet110",
    split_factor: int = 1,
    *,
    dataset: str | None = None,
    own_size: int | None = None,
    **given: Any,
) -> tuple[dict[str, Any], dict[str, Any]]:
    return recipe_defaults(
        data_recipe=data_recipe,
        dataset=dataset or data_recipe,
        arch=arch,
        split_factor=split_factor,
        epochs=given.get("epochs"),
        batch_size=given.get("batch_size"),
        given=given,
        own_size=own_size,
    )


def defaults(data_recipe: str, arch: str = "resnet110", split_factor: int = 1, **given: Any) -> dict[str, Any]:
    return recipe(data_recipe, arch, split_factor, **given)[0]


@pytest.mark.parametrize(
    ("data_recipe", "expected"),
    [
        (
            "cifar10",
            {"epochs": 300, "batch_size": 128, "crop_size": 32, "padding": 4, "lr": 0.1, "end_lr": 1e-4}
            | {"slow_start_epochs": 20, "cot_weight_warm_up_epochs": 40, "is_label_smoothing": False},
        ),
        (
            "svhn",
            {"epochs": 200, "batch_size": 128, "crop_size": 32, "padding": 4, "lr": 5e-3, "end_lr": 1e-5}
            | {"slow_start_epochs": 0, "cot_weight_warm_up_epochs": 40, "is_label_smoothing": False},
        ),
        (
            "imagenet",
            {"epochs": 120, "batch_size": 256, "crop_size": 224, "lr": 0.1, "end_lr": 1e-5}
            | {"slow_start_epochs": 5, "cot_weight_warm_up_epochs": 60, "is_label_smoothing": True},
        ),
    ],
)
def test_published_rows(data_recipe: str, expected: dict[str, Any]) -> None:
    row = defaults(data_recipe)
    common = {"optimizer": "SGD", "momentum": 0.9, "lr_mode": "cos", "slow_start_lr": 5e-3, "is_mixup": True}
    common |= {"is_autoaugment": True, "randaa": None, "is_cutout": True, "erase_p": 0.5}
    assert {name: row[name] for name in expected | common} == expected | common
    if data_recipe == "cifar10":
        assert defaults("cifar100") == row


def test_digits_take_no_augmentation() -> None:
    row = defaults("digits", "resnet20")
    assert {name: row[name] for name in ("batch_size", "crop_size", "padding", "lr", "lr_mode", "weight_decay")} == {
        "batch_size": 64,
        "crop_size": 16,
        "padding": 2,
        "lr": 0.1,
        "lr_mode": "cos",
        "weight_decay": 5e-4,
    }
    assert 15 <= row["epochs"] <= 40
    assert not any(row[name] for name in ("is_mixup", "is_autoaugment", "is_cutout", "is_label_smoothing"))


@pytest.mark.parametrize(
    ("data_recipe", "archs", "expected"),
    [
        ("cifar10", ["resnet110", "resnet164", "se_resnet110", "se_resnet164", "wide_resnet16_8"], 1e-4),
        ("cifar100", ["efficientnetb0", "efficientnetb1", "efficientnetb2", "densenet190"], 1e-4),
        ("cifar100", ["shake_resnet26_2x96d", "pyramidnet164", "pyramidnet272"], 1e-4),
        ("cifar10", ["wide_resnet16_12", "wide_resnet28_10", "wide_resnet40_10", "wide_resnet52_8"], 5e-4),
        ("cifar100", ["resnext29_8x64d", "resnext29_16x64d", "efficientnetb3"], 5e-4),
        ("cifar10", ["resnet20", "resnet50", "no_such_arch"], 1e-4),
        ("imagenet", ["resnet50"], 5e-5),
        ("imagenet", ["resnet101", "wide_resnet50_2", "resnext101_64x4d", "se_resnet50", "resnest101"], 1e-4),
        ("imagenet", ["efficientnetb0", "efficientnetb7", "efficientnetl2"], 1e-5),
        ("svhn", ["resnet50", "wide_resnet28_10", "efficientnetb0"], 1e-3),
    ],
)
def test_weight_decay_by_architecture(data_recipe: str, archs: list[str], expected: float) -> None:
    for arch in archs:
        assert defaults(data_recipe, arch)["weight_decay"] == expected, arch


@pytest.mark.parametrize("split_factor", [2, 4, 8])
def test_weight_decay_is_divided_by_equation_6(split_factor: int) -> None:
    divided = 5e-4 * math.exp(1 / split_factor - 1)
    arch = "wide_resnet28_10"
    assert recipe("cifar10", arch, split_factor)[0]["weight_decay"] == pytest.approx(divided, rel=1e-14)
    assert recipe("cifar10", arch, split_factor, is_div_wd=True)[0]["weight_decay"] == pytest.approx(divided, rel=1e-14)
    assert recipe("cifar10", arch, split_factor, is_div_wd=False)[0]["weight_decay"] == 5e-4


@pytest.mark.parametrize(
    ("given", "adjusted"),
    [
        ({}, {}),
        ({"is_div_wd": False}, {}),
        ({"is_div_wd": True}, {"weight_decay": 0.01 * math.exp(-0.5)}),
        ({"is_div_wd": True, "is_wd_test": True}, {}),
    ],
)
def test_a_weight_decay_that_was_set_is_divided_only_on_request(given: dict, adjusted: dict) -> None:
    assert recipe("cifar10", "resnet110", 2, weight_decay=0.01, **given)[1] == pytest.approx(adjusted)
    assert recipe("cifar10", "resnet110", 1, weight_decay=0.01, **given)[1] == {}


@pytest.mark.parametrize(
    ("data_recipe", "arch", "epochs", "expected"),
    [
        ("cifar10", "resnet110", 300, 20),
        ("cifar10", "resnext29_16x64d", 300, 30),
        ("cifar100", "se_resnet164", 300, 30),
        ("cifar100", "se_resnet164", 150, 10),
        ("cifar10", "wide_resnet40_10", 1800, 60),
        ("cifar10", "shake_resnet26_2x96d", 1800, 0),
        ("cifar10", "pyramidnet272", 1800, 0),
        ("cifar10", "densenet190", 1800, 0),
        ("cifar10", "densenet190", 300, 20),
        ("cifar10", "resnet110", 200, 13),
        ("cifar10", "resnet110", 7, 0),
        ("imagenet", "resnet50", 120, 5),
        ("imagenet", "resnet50", 60, 2),
        ("imagenet", "resnet50", 300, 12),
        ("svhn", "resnet110", 200, 0),
        ("svhn", "resnet110", 100, 0),
        ("digits", "resnet20", 30, 2),
    ],
)
def test_learning_rate_warm_up(data_recipe: str, arch: str, epochs: int, expected: int) -> None:
    assert defaults(data_recipe, arch, epochs=epochs)["slow_start_epochs"] == expected


@pytest.mark.parametrize(
    ("data_recipe", "epochs", "expected"),
    [
        ("cifar10", 300, 40),
        ("cifar100", 1800, 80),
        ("cifar10", 200, 27),
        ("cifar10", 3, 0),
        ("svhn", 200, 40),
        ("svhn", 150, 20),
        ("imagenet", 120, 60),
        ("imagenet", 90, 45),
        ("digits", 30, 4),
    ],
)
def test_co_training_warm_up(data_recipe: str, epochs: int, expected: int) -> None:
    assert defaults(data_recipe, epochs=epochs)["cot_weight_warm_up_epochs"] == expected


@pytest.mark.parametrize(
    ("data_recipe", "epochs", "expected"),
    [
        ("cifar10", 300, (100, 225)),
        ("cifar10", 60, (20, 45)),
        ("cifar100", 1800, (600, 1350)),
        ("svhn", 200, (80, 120)),
        ("svhn", 50, (20, 30)),
        ("imagenet", 120, (30, 60, 90)),
        ("cifar10", 1, (1,)),
    ],
)
def test_milestones_scale_with_training(data_recipe: str, epochs: int, expected: tuple[int, ...]) -> None:
    assert defaults(data_recipe, epochs=epochs, lr_mode="step")["lr_milestones"] == expected
    assert "lr_milestones" not in defaults(data_recipe, epochs=epochs)


@pytest.mark.parametrize(
    ("data_recipe", "arch", "given", "expected"),
    [
        ("cifar10", "resnext29_16x64d", {"epochs": 300}, 0.05),
        ("cifar10", "resnext29_16x64d", {"epochs": 1800}, 0.1),
        ("cifar10", "resnext29_8x64d", {"epochs": 300}, 0.1),
        ("cifar10", "shake_resnet26_2x96d", {"epochs": 1800}, 0.2),
        ("cifar10", "shake_resnet26_2x96d", {"epochs": 300}, 0.1),
        ("imagenet", "se_resnext101_64x4d_B", {"batch_size": 512}, 0.2),
        ("imagenet", "senet113", {"batch_size": 128}, 0.05),
        ("imagenet", "resnexst101_8x32d", {}, 0.1),
        ("imagenet", "se_resnext101_64x4d", {"batch_size": 512}, 0.1),
        ("imagenet", "senet113", {"batch_size": 512, "is_linear_lr": True}, 0.2),
        ("cifar10", "resnet110", {"batch_size": 512}, 0.1),
        ("cifar10", "resnet110", {"batch_size": 512, "is_linear_lr": True}, 0.4),
        ("cifar10", "senet113", {"batch_size": 256, "is_linear_lr": True}, 0.2),
        ("svhn", "resnet110", {"batch_size": 64, "is_linear_lr": True}, 2.5e-3),
        ("imagenet", "resnet50", {"batch_size": 128, "is_linear_lr": True}, 0.05),
        ("cifar10", "resnet110", {"optimizer": "AdamW"}, 1e-3),
        ("imagenet", "efficientnetb0", {"optimizer": "SGD"}, 0.1),
    ],
)
def test_learning_rate(data_recipe: str, arch: str, given: dict, expected: float) -> None:
    assert defaults(data_recipe, arch, **given)["lr"] == pytest.approx(expected, rel=1e-14)


def test_linear_scaling_of_what_was_set() -> None:
    row, adjusted = recipe("cifar10", lr=0.05, momentum=0.8, batch_size=256, is_linear_lr=True)
    assert adjusted == pytest.approx({"lr": 0.1, "momentum": 0.64})
    row, adjusted = recipe("cifar10", lr=0.05, batch_size=256, is_linear_lr=True)
    assert adjusted == pytest.approx({"lr": 0.1})
    assert row["momentum"] == pytest.approx(0.81)
    assert recipe("cifar10", lr=0.05, momentum=0.8, batch_size=256, is_linear_lr=False)[1] == {}
    assert recipe("imagenet", "senet113", lr=0.2, batch_size=512, is_linear_lr=True)[1] == pytest.approx({"lr": 0.4})


@pytest.mark.parametrize(
    ("arch", "crop_size", "erase_p", "randaa"),
    [
        ("efficientnetb0", 224, 0.2, "rand-m4-mstd0.5"),
        ("efficientnetb1", 240, 0.2, "rand-m4-mstd0.5"),
        ("efficientnetb2", 260, 0.3, "rand-m5-mstd0.5"),
        ("efficientnetb3", 300, 0.3, "rand-m6-mstd0.5"),
        ("efficientnetb4", 380, 0.4, "rand-m6-mstd0.5"),
        ("efficientnetb5", 456, 0.4, "rand-m7-mstd0.5"),
        ("efficientnetb6", 528, 0.5, "rand-m8-mstd0.5"),
        ("efficientnetb7", 600, 0.5, "rand-m9-mstd0.5"),
        ("efficientnetb8", 672, 0.5, "rand-m9-mstd0.5"),
        ("efficientnetl2", 800, 0.5, "rand-m9-mstd0.5"),
    ],
)
def test_efficientnet_on_imagenet(arch: str, crop_size: int, erase_p: float, randaa: str) -> None:
    row = defaults("imagenet", arch)
    expected = {"crop_size": crop_size, "erase_p": erase_p, "randaa": randaa, "is_autoaugment": False}
    expected |= {"is_mixup": False, "optimizer": "RMSpropTF", "lr": 0.256, "lr_mode": "exponential"}
    assert {name: row[name] for name in expected} == expected
    assert defaults("imagenet", arch, is_efficientnet_user_crop=True)["crop_size"] == 224


def test_efficientnet_on_imagenet_warms_up_from_the_floor() -> None:
    names = {field.name for field in dataclasses.fields(OptimizerOptions)}
    row = defaults("imagenet", "efficientnetb0")
    schedule = Schedule(OptimizerOptions(**{name: row[name] for name in names & row.keys()}), steps_per_epoch=100)
    assert (row["slow_start_lr"], row["end_lr"], row["slow_start_epochs"]) == (1e-6, 1e-5, 5)
    assert (schedule(0), schedule(500)) == (1e-5, 0.256)
    assert schedule(250) == pytest.approx(1e-6 + (0.256 - 1e-6) / 2)
    assert defaults("imagenet", "resnet50")["slow_start_lr"] == 5e-3
    assert defaults("cifar10", "efficientnetb0")["slow_start_lr"] == 5e-3


EVERY_FORM = [
    *((arch, shape, {}) for arch, entry in backbones.items() for shape in entry.split_factors),
    ("densenet190", SMALL, {"is_official_densenet": False}),
    ("efficientnetb0", LARGE, {"is_lukemelas_efficientnet": True}),
]


@pytest.mark.parametrize(("arch", "shape", "flags"), EVERY_FORM, ids=str)
def test_what_is_spared_from_weight_decay_is_what_the_published_rule_names(arch: str, shape: str, flags: dict) -> None:
    dataset = "cifar100" if shape == SMALL else "imagenet"
    request = BackboneRequest(
        arch=arch, num_classes=100, shape=shape, dataset=dataset, crop_size=32 if shape == SMALL else 224, options=flags
    )
    with torch.device("meta"):
        network = build_network(request)
    no_decay = defaults(dataset, arch, **flags).get("no_decay", "bias")
    groups = parameter_groups(network, network.named_parameters(), OptimizerOptions(no_decay=no_decay))
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    spared = {names[id(parameter)] for parameter in groups[1]["params"]}
    if backbones.get(arch).family == "cream" and arch != "cream_supernet" and shape == LARGE:
        assert spared == {name for name, p in network.named_parameters() if p.dim() == 1}  # published by size there
    else:
        assert spared == {name for name in names.values() if "norm" in name or "bias" in name}
    counts = {"densenet190": 190 if flags else 381, "efficientnetb0": 82 if flags else 131}
    assert len(spared) == counts.get(arch, len(spared))


def test_whatever_is_said_of_weight_decay_wins_over_the_names() -> None:
    assert defaults("svhn", "efficientnetb3")["no_decay"] == "norm_bias"
    config = resolve_config(
        parse_config(["--dataset", "cifar10", "--arch", "densenet190", "--no_decay", "bias"]), data_recipe="cifar10"
    )
    assert config.no_decay == "bias"


def test_efficientnet_on_small_images_takes_the_common_row() -> None:
    row = defaults("cifar10", "efficientnetb0")
    assert (row["optimizer"], row["crop_size"], row["is_mixup"], row["randaa"]) == ("SGD", 32, True, None)


@pytest.mark.parametrize(
    ("arch", "randaa"),
    [
        ("se_resnext101_64x4d_B", "rand-m9-mstd0.5"),
        ("senet113", "rand-m9-mstd0.5"),
        ("resnexst101_8x32d", "rand-m9-mstd0.5"),
        ("se_resnet50", "rand-m6-mstd0.5"),
        ("resnexst50_4x16d", "rand-m6-mstd0.5"),
        ("resnet50", None),
        ("se_resnext101_64x4d", None),
    ],
)
def test_randaugment_replaces_autoaugment(arch: str, randaa: str | None) -> None:
    row = defaults("imagenet", arch)
    assert (row["randaa"], row["is_autoaugment"]) == (randaa, randaa is None)
    assert defaults("cifar10", arch)["randaa"] is None
    assert defaults("imagenet", arch, is_autoaugment=True)["randaa"] is None
    assert defaults("imagenet", arch, randaa=None)["is_autoaugment"] is True
    assert defaults("cifar10", arch, randaa="rand-m5-mstd0.5")["is_autoaugment"] is False


@pytest.mark.parametrize("name", ["14", "43", "114", "287", "481", "604"])
def test_cream_retraining_is_the_file_of_its_recipe(name: str) -> None:
    file = parse_config(["--config", f"script/cream/retrain_{name}.yaml"])
    config = resolve_config(parse_config(["--dataset", "imagenet", "--arch", f"cream_{name}"]), data_recipe="imagenet")
    same = {k: v for k, v in config.values().items() if k in file.given and k not in ("config", "seed", "print_freq")}
    assert same == {k: file.values()[k] for k in same}
    assert len(same) > 25
    assert (config.crop_interpolation, config.eval_interpolation) == ("random", "bicubic")


def test_creams_search_makes_its_images_as_published() -> None:
    file = parse_config(["--config", "script/cream/train.yaml"])
    words = ["--dataset", "imagenet", "--method", "cream", "--arch", "cream_supernet"]
    config = resolve_config(parse_config(words), data_recipe="imagenet")
    for one in (file, config):
        assert (one.crop_interpolation, one.eval_interpolation) == ("random", "bilinear")
        assert one.erase_ratio == (0.3, 1 / 0.3)
    plain = resolve_config(parse_config(["--dataset", "imagenet", "--arch", "resnet50"]), data_recipe="imagenet")
    assert (plain.crop_interpolation, plain.eval_interpolation) == ("bicubic", "bicubic")


def test_cream_retraining_of_other_networks_and_lengths() -> None:
    row = defaults("imagenet", "cream", epochs=51)
    assert (row["lr_mode"], row["decay_epochs"], row["slow_start_epochs"]) == ("epoch_cos", 50.0, 0)
    row = defaults("imagenet", "cream_42", epochs=250)
    assert (row["lr_mode"], row["decay_epochs"], row["slow_start_epochs"]) == ("epoch_step", 1.2, 2)
    row = defaults("imagenet", "cream_14", lr_mode="epoch_cos")
    assert (row["epochs"], row["decay_epochs"], row["end_lr"]) == (510, 500.0, 1e-5)
    assert defaults("imagenet", "cream_14", own_size=64)["crop_size"] == 64
    assert defaults("imagenet", "cream_supernet")["optimizer"] == "SGD"
    assert defaults("cifar10", "cream")["optimizer"] == "SGD"
    search = resolve_config(
        parse_config(["--dataset", "imagenet", "--method", "cream", "--flops_maximum", "43"]), data_recipe="imagenet"
    )
    assert (search.arch, search.crop_size, search.crop_pct) == ("cream_supernet", 160, 0.875)
    sizes = {}
    for arch in ("cream_14", "cream_112", "cream_604", "cream", "cream_supernet", "resnet50"):
        config = resolve_config(parse_config(["--dataset", "imagenet", "--arch", arch]), data_recipe="imagenet")
        sizes[arch] = (config.crop_size, config.crop_pct)
    assert sizes == {
        "cream_14": (64, 0.875),
        "cream_112": (160, 0.875),
        "cream_604": (224, 0.875),
        "cream": (224, 0.875),
        "cream_supernet": (224, 0.875),
        "resnet50": (224, None),
    }


def test_open_data_sets_know_their_own_size() -> None:
    assert "crop_size" not in defaults("cifar10", dataset="folder")
    assert "crop_size" not in defaults("imagenet", dataset="synthetic")
    assert defaults("imagenet", "efficientnetb3", dataset="folder")["crop_size"] == 300


@pytest.mark.parametrize(
    ("given", "start", "floor"),
    [({}, 5e-3, 1e-4), ({"lr": 0.05}, 5e-3, 1e-4), ({"lr": 2e-3}, 1e-4, 1e-4), ({"lr": 1e-4}, 5e-6, 1e-7)],
)
def test_a_small_rate_is_not_raised_by_warm_up_or_floor(given: dict, start: float, floor: float) -> None:
    row = defaults("cifar10", **given)
    assert (row["slow_start_lr"], row["end_lr"]) == pytest.approx((start, floor))


@pytest.mark.parametrize("data_recipe", ["digits", "cifar10", "cifar100", "svhn", "imagenet"])
@pytest.mark.parametrize("arch", ["resnet50", "efficientnetb1", "shake_resnet26_2x96d"])
@pytest.mark.parametrize("epochs", [None, 1, 90, 300, 1800])
def test_every_recipe_makes_a_schedule(data_recipe: str, arch: str, epochs: int | None) -> None:
    row = defaults(data_recipe, arch, 2, **({} if epochs is None else {"epochs": epochs}))
    names = {field.name for field in dataclasses.fields(OptimizerOptions)}
    schedule = Schedule(OptimizerOptions(**{name: row[name] for name in names & row.keys()}), steps_per_epoch=10)
    assert row["slow_start_epochs"] < row["epochs"]
    assert max(schedule(step) for step in range(10 * row["epochs"])) == pytest.approx(row["lr"])

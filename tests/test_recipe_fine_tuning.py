"""The recipe of fine-tuning: what it supplies, what wins over it, its rate for other batches, the images of weights."""

from typing import Any

import pytest

from parser_params import Config, parse_config, resolve_config
from recipe.fine_tuning import flags_before, image_flags
from recipe.preprocessing import Preprocessing, eval_resize

IMAGES = image_flags(
    Preprocessing(resize=232, interpolation="bilinear", crop=224, mean=(0.5, 0.4, 0.3), std=(0.1, 0.2, 0.3))
)
PRETRAINED = ["--dataset", "folder", "--arch", "torchvision/resnet18", "--pretrained", "x.pth"]


def resolved(*argv: object, recipe: str = "imagenet", start: dict[str, Any] | None = IMAGES, nodes: int = 1) -> Config:
    config = parse_config([*PRETRAINED, *map(str, argv)])
    return resolve_config(config, data_recipe=recipe, crop_size=224, start=start, nodes=nodes)


def test_what_the_recipe_supplies_and_who_says_so() -> None:
    config = resolved()
    assert (config.optimizer, config.lr, config.momentum, config.weight_decay) == ("SGD", 0.01, 0.9, 1e-4)
    assert (config.epochs, config.batch_size, config.lr_mode, config.slow_start_epochs) == (15, 64, "cos", 1)
    assert (config.slow_start_lr, config.end_lr, config.crop_area) == (0.0, 0.0, (0.25, 1.0))
    assert not any((config.is_mixup, config.is_cutout, config.is_autoaugment, config.randaa, config.cutmix_alpha))
    assert (config.crop_size, config.eval_interpolation, config.crop_interpolation) == (224, "bilinear", "bilinear")
    assert eval_resize(config.crop_size, config.crop_pct) == 232
    assert (config.mean, config.std) == ((0.5, 0.4, 0.3), (0.1, 0.2, 0.3))
    assert config.origins["lr"] == "recipe: fine-tuning"
    assert config.origins["mean"] == "recipe: the weights' own images"


def test_flags_win() -> None:
    config = resolved("--lr", 0.3, "--epochs", 4, "--is_mixup", 1, "--crop_size", 64, "--mean", "0.1 0.1 0.1")
    assert (config.lr, config.epochs, config.is_mixup, config.crop_size) == (0.3, 4, True, 64)
    assert config.mean == (0.1, 0.1, 0.1)
    assert config.origins["lr"] == "flag"
    assert config.slow_start_epochs == 1


@pytest.mark.parametrize(
    ("arch", "expected"),
    [("torchvision/resnet18", "SGD"), ("torchvision/convnext_tiny", "AdamW"), ("resnet50", "SGD")],
)
def test_the_optimiser_goes_by_the_family(arch: str, expected: str) -> None:
    config = resolved("--arch", arch)
    assert config.optimizer == expected
    if expected == "AdamW":
        assert (config.lr, config.weight_decay, config.no_decay, config.optimizer_eps) == (
            1e-4,
            0.05,
            "norm_bias",
            1e-8,
        )


@pytest.mark.parametrize(("optimizer", "lr"), [("AdamW", 1e-4), ("Adam", 1e-4), ("SGD", 0.01), ("RMSprop", 1e-4)])
def test_another_optimiser_has_a_fine_tuning_rate_too(optimizer: str, lr: float) -> None:
    assert resolved("--optimizer", optimizer).lr == lr


@pytest.mark.parametrize(
    ("argv", "nodes", "factor"),
    [
        (["--batch_size", 16], 1, 0.25),
        (["--batch_size", 16, "--iters_to_accumulate", 2], 1, 0.5),
        (["--batch_size", 128], 2, 4),
        ([], 1, 1),
        (["--optimizer", "AdamW", "--batch_size", 32], 1, 0.5),
    ],
)
def test_the_rate_goes_with_the_images_of_an_update_and_says_so(argv: list[object], nodes: int, factor: float) -> None:
    config = resolved(*argv, nodes=nodes)
    usual = 1e-4 if config.optimizer == "AdamW" else 0.01
    assert config.lr == pytest.approx(usual * factor)
    assert config.momentum == 0.9
    assert len(config.warnings) == (factor != 1)
    assert all("scaled to" in line and "--lr" in line for line in config.warnings)


def test_a_rate_that_was_given_is_not_scaled() -> None:
    config = resolved("--lr", 0.02, "--batch_size", 8)
    assert (config.lr, config.warnings) == (0.02, ())


def test_small_images_take_mean_and_deviation_only() -> None:
    config = resolved(recipe="cifar10")
    assert config.mean == (0.5, 0.4, 0.3)
    assert config.crop_pct is None
    assert config.eval_interpolation == "bicubic"
    assert (config.lr, config.epochs) == (0.01, 15)


def test_large_images_of_weights_that_say_nothing_are_imagenets() -> None:
    config = resolved(start={})
    assert config.mean == (0.485, 0.456, 0.406)
    assert config.crop_pct is None


def test_a_methods_recipe_from_scratch_gives_way() -> None:
    config = resolved("--dataset", "cifar10", "--arch", "wrn_16_1", "--method", "dks", recipe="cifar10")
    assert (config.lr, config.epochs, config.lr_mode, config.batch_size) == (0.01, 15, "cos", 64)
    assert config.mean == (0.5, 0.4, 0.3)
    assert config.padding_mode == "reflect"  # what it says of its views otherwise stays


def test_without_pretrained_weights_nothing_changes() -> None:
    config = resolved(start=None)
    assert (config.epochs, config.lr, config.crop_area, config.mean) == (120, 0.1, (0.1, 1.0), ())


def test_a_run_that_goes_on_has_the_images_of_before() -> None:
    before = resolved("--crop_size", 64)
    assert resolved(start=flags_before(before.values())).values() == before.values() | {"crop_size": 64}

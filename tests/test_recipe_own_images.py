"""The small default of images of a user's own, and rates for another number of images in an update."""

from pathlib import Path

import pytest

from parser_params import Config, parse_config, resolve_config
from recipe.own_images import SMALL_DEFAULTS
from recipe.scaling import scaled_rate
from utils.errors import UserError

BARE = ["--dataset", "folder"]


def resolved(argv: list[str], recipe: str = "cifar10", *, is_drawn: bool = True, nodes: int = 1) -> Config:
    return resolve_config(parse_config(argv), data_recipe=recipe, crop_size=32, is_drawn=is_drawn, nodes=nodes)


def test_the_rate_follows_the_images_of_an_update() -> None:
    assert scaled_rate(0.1, batch_size=64, images_per_update=64) == (0.1, "")
    rate, line = scaled_rate(0.1, batch_size=64, images_per_update=16)
    assert rate == pytest.approx(0.025)
    assert "0.1" in line
    assert "0.025" in line
    assert "\n" not in line


@pytest.mark.parametrize("recipe", ["cifar10", "imagenet"])
def test_without_an_arch_the_row_decides_and_is_the_origin(recipe: str) -> None:
    row = SMALL_DEFAULTS[recipe]
    config = resolved(["--data", "nowhere", *BARE], recipe)
    for name, value in row.training.items():
        if name != "weight_decay":
            assert getattr(config, name) == value
    for name in ("arch", "epochs", "batch_size", "lr"):
        assert config.origins[name] == f"recipe: {row.name}"
    assert config.warnings == ()


@pytest.mark.parametrize(
    ("argv", "nodes", "factor"),
    [
        (["--batch_size", "16"], 1, 0.25),
        (["--iters_to_accumulate", "4"], 1, 4),
        (["--batch_size", "32", "--iters_to_accumulate", "2"], 1, 1),
        ([], 2, 2),
    ],
)
def test_the_rate_of_the_row_is_scaled_and_said(argv: list[str], nodes: int, factor: float) -> None:
    row = SMALL_DEFAULTS["cifar10"]
    usual = row.training["batch_size"]
    if "--batch_size" in argv:
        argv = [*argv[:1], str(usual // (4 if argv[1] == "16" else 2)), *argv[2:]]
    config = resolved([*BARE, *argv], nodes=nodes)
    assert config.lr == pytest.approx(row.training["lr"] * factor)
    assert config.momentum == 0.9
    assert len(config.warnings) == (factor != 1)


def test_a_rate_that_somebody_chose_stays() -> None:
    config = resolved([*BARE, "--batch_size", "8", "--lr", "0.3"])
    assert (config.lr, config.warnings) == (0.3, ())
    assert resolved([*BARE, "--batch_size", "8", "--is_linear_lr", "0"]).lr == SMALL_DEFAULTS["cifar10"].training["lr"]


def test_columns_are_for_tables() -> None:
    with pytest.raises(UserError, match="--label_column is for tables"):
        parse_config([*BARE, "--label_column", "x"])
    assert parse_config(["--dataset", "csv", "--label_column", "x"]).label_column == "x"


def test_what_data_holds_is_the_origin_of_the_data_set(tmp_path: Path) -> None:
    (tmp_path / "labels.csv").touch()
    config = parse_config(["--data", str(tmp_path)])
    assert (config.dataset, config.origins["dataset"]) == ("csv", "data")
    again = resolve_config(config, data_recipe="cifar10", crop_size=32)
    assert (again.dataset, again.origins["dataset"]) == ("csv", "data")
    summary = parse_config(["--data", str(tmp_path), "--is_summary", "1"])
    assert (summary.dataset, summary.origins["dataset"]) == ("csv", "data")


def test_a_summary_depends_on_data_only_where_they_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / Config.data / "cifar-100-python").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert parse_config([]).dataset == "cifar100"
    assert parse_config(["--is_summary", "1"]).dataset == "cifar10"
    assert parse_config(["--is_summary", "1", "--data", Config.data]).dataset == "cifar100"


def test_published_recipes_and_calls_of_before_keep_theirs() -> None:
    for config in (
        resolved([*BARE, "--arch", "resnet20", "--batch_size", "16"]),
        resolved([*BARE, "--batch_size", "16"], is_drawn=False),
        resolved(["--dataset", "cifar10", "--batch_size", "16"]),
    ):
        assert (config.lr, config.epochs, config.warnings) == (0.1, 300, ())
    assert resolved(BARE, is_drawn=False).arch == Config.arch
    assert resolved(BARE).arch == "resnet20"

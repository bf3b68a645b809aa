"""Look-ups by name: known names are listed, the nearest is offered, a duplicate is refused."""

import pytest

from utils.errors import UserError
from utils.registry import Registry, nearest_name


def small_registry() -> Registry[int]:
    registry: Registry[int] = Registry("thing", "--thing", "model.layers")
    registry.add("resnet20", 1)
    registry.add("resnet32", 2)
    return registry


def test_get_returns_what_was_filed() -> None:
    assert small_registry().get("resnet32") == 2
    assert "resnet20" in small_registry()
    assert small_registry().names() == ["resnet20", "resnet32"]


def test_unknown_name_gets_the_nearest_and_all_known() -> None:
    with pytest.raises(UserError, match=r"--thing 'resnet21' .*Did you mean 'resnet.*Known: resnet20, resnet32"):
        small_registry().get("resnet21")


def test_duplicate_is_refused() -> None:
    with pytest.raises(KeyError, match="registered twice"):
        small_registry().add("resnet20", 3)


def test_nothing_near_offers_nothing() -> None:
    assert nearest_name("zzz", ["resnet20"]) == ""

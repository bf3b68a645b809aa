"""Look-ups by name: known names are listed, the nearest is offered, a duplicate is refused."""

import sys
from pathlib import Path

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


def test_of_many_names_five_near_ones_of_the_nearest_family_are_shown() -> None:
    from model import backbones

    line = str(backbones.unknown("resnet105"))
    assert line.startswith("--arch 'resnet105' is not a known backbone. Did you mean 'resnet1")
    shown = line.split("Near: ")[1].split(";")[0].split(", ")
    assert len(shown) == 5
    assert set(shown) <= {*backbones.index["resnet"]}
    assert "Near" not in str(backbones.unknown("xyz"))
    assert "--help lists all" in str(backbones.unknown("xyz"))
    assert backbones.near("wide_resnet28_1")[0] == "wide_resnet28_10"
    assert set(backbones.near("wide_resnet28_1")) <= {*backbones.index["wide_resnet"]}


def test_what_is_listed_is_known_without_importing_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "listed_things"
    package.mkdir()
    (package / "__init__.py").write_text("from utils.registry import Registry\n")
    for name in ("alpha", "beta", "gamma"):
        (package / f"{name}.py").write_text(f"from listed_things import things\nthings.add('{name}', 1)\n")
    (package / "__init__.py").write_text(
        "from utils.registry import Registry\n"
        "things = Registry('thing', '--thing', 'listed_things', index={'alpha': ['alpha'], 'beta': ['beta']})\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    from listed_things import things

    def imported() -> set[str]:
        return {name for name in ("alpha", "beta", "gamma") if f"listed_things.{name}" in sys.modules}

    assert "beta" in things
    assert imported() == set()
    assert things.names() == ["alpha", "beta", "gamma"]
    assert "delta" not in things
    assert imported() == {"gamma"}  # nobody has listed it
    assert things.get("alpha") == 1
    assert imported() == {"alpha", "gamma"}
    assert dict(things.items()) == {"alpha": 1, "beta": 1, "gamma": 1}


def test_duplicate_is_refused() -> None:
    with pytest.raises(KeyError, match="registered twice"):
        small_registry().add("resnet20", 3)


def test_nothing_near_offers_nothing() -> None:
    assert nearest_name("zzz", ["resnet20"]) == ""

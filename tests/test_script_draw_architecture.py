"""The map of rooms, the list of imports and the picture are those of the code."""

import re
import subprocess
import sys
from itertools import pairwise

import pytest
from PIL import Image

from script.draw_architecture import (
    FACE,
    PAGE,
    PICTURE,
    ROOT,
    Node,
    arrange,
    build,
    crossings,
    floors,
    imports_of_house,
    imports_of_model,
    listing,
    packages,
    page_with,
    rooms_in,
    shortest,
    spread,
)

TEXT = PAGE.read_text(encoding="utf-8")
AGAIN = "python script/draw_architecture.py writes list and picture anew"


def test_every_room_has_one_line_and_every_line_a_room() -> None:
    named = re.findall(r"^\| `([^`]+)` \|", TEXT, flags=re.M)
    wanted = {f"{name}.py" for name, path in rooms_in(ROOT).items() if path.is_file()} | set(packages())
    assert sorted(named) == sorted(set(named))
    assert wanted <= set(named), f"no line in {PAGE.name}: {sorted(wanted - set(named))}"
    assert not [name for name in named if not (ROOT / name).exists()]


def test_the_list_is_what_the_code_imports() -> None:
    assert page_with(listing(), TEXT) == TEXT, AGAIN


def test_the_picture_is_of_this_list() -> None:
    with Image.open(PICTURE) as picture:
        picture.load()
        assert picture.info["Description"] == listing(), AGAIN


def test_the_command_draws(tmp_path) -> None:
    path = tmp_path / "architecture.png"
    program = ROOT / "script" / "draw_architecture.py"
    done = subprocess.run([sys.executable, "-W", "error", program, path], check=False, cwd=tmp_path)
    assert done.returncode == 0
    with Image.open(path) as drawn, Image.open(PICTURE) as committed:
        assert drawn.size == committed.size


def test_the_imports_that_everybody_knows_are_found() -> None:
    house, inside = imports_of_house(), imports_of_model()
    assert {"loss/", "model/", "utils/"} <= house["method/"]
    assert "parser_params.py" in house["train_split.py"]
    assert "build.py" in inside[FACE]
    assert all(FACE not in others for others in inside.values())
    assert "tests/" not in house


def test_floors_and_shortest_ways() -> None:
    imports = {"a": {"b", "c"}, "b": {"c"}, "c": set(), "d": set()}
    assert floors(imports) == {"a": 2, "b": 1, "c": 0, "d": 0}
    assert shortest(imports) == {"a": {"b"}, "b": {"c"}, "c": set(), "d": set()}
    with pytest.raises(ValueError, match="in a circle: a, b"):
        floors({"a": {"b"}, "b": {"a"}, "c": set()})


@pytest.mark.parametrize("imports", [imports_of_house(), imports_of_model()], ids=["house", "model"])
def test_boxes_stand_apart_and_arrows_go_down(imports) -> None:
    levels, ways = build(imports)
    arrange(levels)
    spread(levels)
    for level in levels:
        for left, right in pairwise(level):
            assert right.x - left.x > (left.width + right.width) / 2
    assert sorted(node.room for level in levels for node in level if node.room) == sorted(imports)
    assert len(ways) == sum(map(len, shortest(imports).values()))
    assert all(upper.floor == lower.floor + 1 for way in ways for upper, lower in pairwise(way))


def test_crossings_are_counted() -> None:
    below, above = [Node(0, "a"), Node(0, "b")], [Node(1, "c"), Node(1, "d")]
    above[0].below, above[1].below = [below[1]], [below[0]]
    assert crossings([below, above]) == 1
    assert crossings([below, above[::-1]]) == 0


def test_a_page_without_marks_is_refused() -> None:
    with pytest.raises(ValueError, match="expected the lines"):
        page_with("text", "no marks")

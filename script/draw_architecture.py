"""Reads the project's own imports and draws its rooms: `python script/draw_architecture.py` is the one command.

It writes miscs/architecture.png and the list of imports in miscs/architecture.md, between its marks. A room is a folder
or a file; it stands one floor above the highest room that it imports. An arrow is drawn where no way of other arrows
leads, so that the picture stays readable; the list has every import.
"""

import ast
import random
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, PathPatch, Polygon
from matplotlib.path import Path as Curve

ROOT = Path(__file__).resolve().parent.parent
PICTURE = ROOT / "miscs" / "architecture.png"
PAGE = ROOT / "miscs" / "architecture.md"
MARKS = ("<!-- imports: python script/draw_architecture.py -->", "<!-- imports end -->")
PROGRAMS = ("train_split", "eval", "parser_params")  # a user may keep files of his own beside them
NOT_DRAWN = {"tests", "examples"}  # the former import everything, the latter only the face
FACE = "model/__init__.py"

INK = "#222222"
GREY = "#8a8f98"
ARROW = "#6b7280"
FLOORS = (  # fill, line; from the ground upwards
    ("#e9ecf0", "#7b8492"),
    ("#dbe7f5", "#1f5fa8"),
    ("#e3f1e6", "#2c8a4b"),
    ("#fbf3d5", "#a9861a"),
    ("#fbe3d3", "#d1571b"),
    ("#f7dfe4", "#b8385a"),
    ("#efe4f4", "#8a3fa0"),
)
WIDTH, HEIGHT, STOREY, GAP = 1.8, 0.68, 1.2, 0.3  # of a box, a floor and the space between boxes

Imports = dict[str, set[str]]


# ---- what the code imports -------------------------------------------------------------------------------------------


def has_python(folder: Path) -> bool:
    """Whether a folder is a room: visible, with Python files of its own."""
    return folder.is_dir() and not folder.name.startswith((".", "_")) and any(folder.glob("*.py"))


def rooms_in(folder: Path) -> dict[str, Path]:
    """Rooms of a folder by name: its Python files, but for `__init__.py` and `__main__.py`, and folders."""
    files = {path.stem: path for path in folder.glob("*.py") if not path.stem.startswith("__")}
    if folder == ROOT:
        files = {name: files[name] for name in PROGRAMS}
    return dict(sorted((files | {path.name: path for path in folder.iterdir() if has_python(path)}).items()))


def packages() -> list[str]:
    """Every folder with Python code as the map names it: "dataset/", "dataset/augment/", …"""
    found = []
    for room, folder in rooms_in(ROOT).items():
        if folder.is_dir():
            found += [f"{room}/", *(f"{room}/{inner.name}/" for inner in sorted(folder.iterdir()) if has_python(inner))]
    return found


def imported_names(path: Path) -> set[str]:
    """Dotted names that a file imports anywhere; `from a import b` as "a.b"."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def imports_of_files(room: Path) -> set[str]:
    """What the files of a room import; a package's `__main__.py` is a program that stands above it, and not counted."""
    files = [room] if room.is_file() else [path for path in room.rglob("*.py") if path.name != "__main__.py"]
    return set().union(*map(imported_names, files))


def imports_of_house() -> Imports:
    """Rooms of the whole project -> rooms that each imports."""
    rooms = {name: path for name, path in rooms_in(ROOT).items() if name not in NOT_DRAWN}
    label = {name: f"{name}/" if path.is_dir() else f"{name}.py" for name, path in rooms.items()}
    return {
        label[name]: {label[part] for other in imports_of_files(path) if (part := other.split(".")[0]) in rooms}
        - {label[name]}
        for name, path in rooms.items()
    }


def imports_of_model() -> Imports:
    """The same inside model/, with its face."""
    rooms = rooms_in(ROOT / "model")
    label = {name: f"{name}/" if path.is_dir() else f"{name}.py" for name, path in rooms.items()}
    label["__init__"] = FACE

    def inside(names: set[str]) -> set[str]:
        parts = [name.split(".") for name in names]
        return {label[part[1]] for part in parts if part[0] == "model" and len(part) > 1 and part[1] in rooms}

    inner = {label[name]: inside(imports_of_files(path)) - {label[name]} for name, path in rooms.items()}
    return inner | {FACE: inside(imported_names(ROOT / FACE))}


def floors(imports: Imports) -> dict[str, int]:
    """Floor of every room: 0 for one that imports none, else one above the highest that it imports.

    Raises:
        ValueError: rooms import each other in a circle.
    """
    found: dict[str, int] = {}
    while len(found) < len(imports):
        ready = [room for room in imports if room not in found and imports[room] <= found.keys()]
        if not ready:
            raise ValueError(f"rooms import each other in a circle: {', '.join(sorted(imports.keys() - found.keys()))}")
        found |= {room: max((found[other] + 1 for other in imports[room]), default=0) for room in ready}
    return found


def shortest(imports: Imports) -> Imports:
    """The imports without those that a way over other rooms stands for."""
    reached: Imports = {}
    for room in sorted(imports, key=floors(imports).__getitem__):
        reached[room] = imports[room].union(*(reached[other] for other in imports[room]))
    return {room: others - set().union(*(reached[other] for other in others)) for room, others in imports.items()}


def listing() -> str:
    """The imports as text: a line for each room, upper floors first; arrows of the picture stand without brackets."""
    blocks = []
    for title, imports in (("the project", imports_of_house()), ("inside model/", imports_of_model())):
        storey, drawn = floors(imports), shortest(imports)
        width = max(map(len, imports))
        lines = [f"{title}: floor, room, imports (in brackets: also reached through another room)"]
        for room in sorted(imports, key=lambda name: (-storey[name], name)):
            others = sorted(imports[room], key=lambda name: (-storey[name], name))
            names = ", ".join(name if name in drawn[room] else f"({name})" for name in others)
            lines.append(f"{storey[room]}  {room:<{width}}  {names}".rstrip())
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def page_with(text: str, page: str) -> str:
    """The page with `text` as the code block between its MARKS.

    Raises:
        ValueError: the page has no marks.
    """
    before, found, rest = page.partition(MARKS[0])
    _, end, after = rest.partition(MARKS[1])
    if not found or not end:
        raise ValueError(f"{PAGE.name}: expected the lines {MARKS[0]} and {MARKS[1]}")
    return f"{before}{found}\n```text\n{text}\n```\n{end}{after}"


# ---- where boxes stand -----------------------------------------------------------------------------------------------


@dataclass
class Node:
    """A box, or the place where an arrow passes a floor between boxes."""

    floor: int
    room: str = ""
    x: float = 0.0
    above: list["Node"] = field(default_factory=list)
    below: list["Node"] = field(default_factory=list)

    @property
    def width(self) -> float:
        return WIDTH if self.room else 0.02


def build(imports: Imports) -> tuple[list[list[Node]], list[list[Node]]]:
    """Nodes by floor, and the way of every arrow from box to box."""
    storey, drawn = floors(imports), shortest(imports)
    boxes = {room: Node(storey[room], room) for room in sorted(imports)}
    levels: list[list[Node]] = [[] for _ in range(max(storey.values()) + 1)]
    for node in boxes.values():
        levels[node.floor].append(node)
    ways = []
    for room in sorted(imports):
        for other in sorted(drawn[room]):
            way = [boxes[room]]
            for floor in range(storey[room] - 1, storey[other], -1):
                levels[floor].append(Node(floor))
                way.append(levels[floor][-1])
            way.append(boxes[other])
            for upper, lower in pairwise(way):
                upper.below.append(lower)
                lower.above.append(upper)
            ways.append(way)
    return levels, ways


def crossings(levels: Sequence[Sequence[Node]]) -> int:
    """How often arrows between neighbouring floors cross."""
    count = 0
    for lower, upper in pairwise(levels):
        place = {id(node): i for i, node in enumerate(lower)}
        pairs = [(i, place[id(other)]) for i, node in enumerate(upper) for other in node.below]
        count += sum((a - c) * (b - d) < 0 for a, b in pairs for c, d in pairs) // 2
    return count


def arrange(levels: list[list[Node]]) -> None:
    """Order every floor so that few arrows cross: means of neighbours' places, from several beginnings."""
    best: tuple[int, list[list[Node]]] | None = None
    dice = random.Random(0)
    for _ in range(60):
        for level in levels:
            dice.shuffle(level)
        for sweep in range(12):
            down = sweep % 2 == 0
            for level in reversed(levels[:-1]) if down else levels[1:]:
                neighbours = levels[level[0].floor + (1 if down else -1)]
                place = {id(node): i / max(1, len(neighbours) - 1) for i, node in enumerate(neighbours)}
                _sort(level, place, down)
            count = crossings(levels)
            if best is None or count < best[0]:
                best = (count, [list(level) for level in levels])
    assert best is not None
    levels[:] = best[1]


def _sort(level: list[Node], place: Mapping[int, float], down: bool) -> None:
    def middle(node: Node) -> float:
        others = [place[id(other)] for other in (node.above if down else node.below)]
        return sum(others) / len(others) if others else 0.5

    level.sort(key=middle)


def spread(levels: Sequence[Sequence[Node]]) -> None:
    """Give every node its x: near the mean of its neighbours, in the order of its floor, with room between."""
    for level in levels:
        for i, node in enumerate(level):
            node.x = (i - (len(level) - 1) / 2) * (WIDTH + GAP)
    for sweep in range(200):
        for level in levels if sweep % 2 else reversed(levels):
            wanted = []
            for node in level:
                others = node.above + node.below
                # a passing arrow pulls harder than a box: straight lines first
                weights = [3.0 if not (node.room and other.room) else 1.0 for other in others]
                total = sum(w * other.x for w, other in zip(weights, others, strict=True))
                wanted.append(total / sum(weights) if others else node.x)
            _apart(level, wanted)


def _apart(level: Sequence[Node], wanted: Sequence[float]) -> None:
    """The x nearest to the wanted ones (least squares) that keep the order and the distances of a floor."""
    offsets = [0.0]
    for left, right in pairwise(level):
        offsets.append(offsets[-1] + (left.width + right.width) / 2 + GAP)
    groups: list[list[float]] = []  # sum, count
    for x, offset in zip(wanted, offsets, strict=True):
        groups.append([x - offset, 1])
        while len(groups) > 1 and groups[-2][0] / groups[-2][1] > groups[-1][0] / groups[-1][1]:
            total, count = groups.pop()
            groups[-1][0] += total
            groups[-1][1] += count
    starts = [total / count for total, count in groups for _ in range(int(count))]
    for node, start, offset in zip(level, starts, offsets, strict=True):
        node.x = start + offset


# ---- drawing ---------------------------------------------------------------------------------------------------------


def draw_house(
    axes: Axes, imports: Imports, inner: Mapping[str, str], corner: tuple[float, float]
) -> tuple[float, float]:
    """Boxes on their floors and the arrows between them, from `corner` to the right and up; returns where they end."""
    levels, ways = build(imports)
    arrange(levels)
    spread(levels)
    left = min(node.x - node.width / 2 for level in levels for node in level)
    for node in (node for level in levels for node in level):
        node.x += corner[0] - left
    bottom = [corner[1] + floor * STOREY for floor in range(len(levels))]
    for way in ways:
        _arrow(axes, way, bottom)
    for level in levels:
        for node in level:
            if node.room:
                _box(axes, node, bottom[node.floor], inner.get(node.room, ""), len(levels))
    top = bottom[-1] + HEIGHT + 0.34
    return max(node.x + node.width / 2 for level in levels for node in level), top


def _box(axes: Axes, node: Node, y: float, note: str, count: int) -> None:
    fill, line = FLOORS[round(node.floor * (len(FLOORS) - 1) / max(1, count - 1))]
    style: dict[str, Any] = {
        "boxstyle": "round,pad=0,rounding_size=0.09",
        "fc": fill,
        "ec": line,
        "lw": 1.3,
        "zorder": 3,
    }
    axes.add_patch(FancyBboxPatch((node.x - WIDTH / 2, y), WIDTH, HEIGHT, **style))
    label: dict[str, Any] = {"ha": "center", "va": "center", "zorder": 4}
    lift = 0.0 if not note else 0.11 if "\n" not in note else 0.17
    axes.text(node.x, y + HEIGHT / 2 + lift, node.room, fontsize=10.5, color=INK, **label)
    axes.text(node.x, y + HEIGHT / 2 - 0.14, note, fontsize=7.2, color="#5b6370", linespacing=1.15, **label)


def _port(node: Node, other: Node, others: Sequence[Node]) -> float:
    """x at which an arrow leaves or meets a box: side by side in the order of the other ends."""
    if not node.room:
        return node.x
    order = sorted(others, key=lambda end: end.x)
    place = next(i for i, end in enumerate(order) if end is other)
    step = min(0.24, 0.8 * WIDTH / len(order))
    return node.x + (place - (len(order) - 1) / 2) * step


def _arrow(axes: Axes, way: Sequence[Node], bottom: Sequence[float]) -> None:
    points: list[tuple[float, float]] = []
    codes: list[Any] = []
    for upper, lower in pairwise(way):
        start = (_port(upper, lower, upper.below), bottom[upper.floor])
        end = (_port(lower, upper, lower.above), bottom[lower.floor] + HEIGHT)
        bend = (start[1] - end[1]) * 0.5
        points += [start, (start[0], start[1] - bend), (end[0], end[1] + bend), end]
        codes += [Curve.LINETO if codes else Curve.MOVETO, Curve.CURVE4, Curve.CURVE4, Curve.CURVE4]
    x, y = points[-1]
    points[-1] = (x, y + 0.08)
    axes.add_patch(PathPatch(Curve(points, codes), fill=False, ec=ARROW, lw=1.0, zorder=2))
    axes.add_patch(Polygon([(x, y), (x - 0.04, y + 0.1), (x + 0.04, y + 0.1)], fc=ARROW, ec="none", zorder=2))


def notes() -> dict[str, str]:
    """The packages inside each room, in small print."""
    found = {}
    for room, folder in rooms_in(ROOT).items():
        inner = sorted(path.name for path in folder.iterdir() if has_python(path)) if folder.is_dir() else []
        half = (len(inner) + 1) // 2 if len(inner) > 3 else len(inner)
        found[f"{room}/"] = ",\n".join(", ".join(part) for part in (inner[:half], inner[half:]) if part)
    return found


def draw(path: Path) -> Path:
    """Write the figure as a PNG, with `listing()` as its description."""
    figure = Figure(facecolor="white")
    axes = figure.add_axes((0, 0, 1, 1))
    axes.axis("off")
    middle, top = draw_house(axes, imports_of_house(), notes(), (0.0, 0.0))
    right, other_top = draw_house(axes, imports_of_model(), {}, (middle + 0.9, 0.0))
    top = max(top, other_top)
    axes.plot([middle + 0.45] * 2, [0, top], color="#e1e4e8", lw=1)
    for x, title in ((0.0, "The project"), (middle + 0.9, "Inside model/")):
        axes.text(x, top, title, fontsize=12.5, fontweight="bold", color=INK, va="center")
    size = (right + 0.8, top + 0.6)
    axes.set(xlim=(-0.4, size[0] - 0.4), ylim=(-0.3, size[1] - 0.3))
    figure.set_size_inches(*size)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150, metadata={"Description": listing()})
    return path


def main() -> None:
    """Write picture and list, or the picture alone where a path is given."""
    if len(sys.argv) > 1:
        draw(Path(sys.argv[1]))
        return
    draw(PICTURE)
    PAGE.write_text(page_with(listing(), PAGE.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()

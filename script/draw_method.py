"""Draws the figure of the method, miscs/method.png: `python script/draw_method.py [PATH]`."""

import sys
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Polygon, Rectangle

INK = "#222222"
GREY = "#8a8f98"
LARGE = "#c9ced6"
NETWORKS = (("#dbe7f5", "#1f5fa8"), ("#fbe3d3", "#d1571b"))  # fill, line
LOSS = ("#e3f1e6", "#2c8a4b")
ENSEMBLE = ("#efe4f4", "#8a3fa0")


def box(axes: Axes, x: float, y: float, width: float, height: float, text: str, colours: tuple[str, str]) -> None:
    """A rounded box with its lower left corner at (x, y)."""
    fill, line = colours
    axes.add_patch(
        FancyBboxPatch((x, y), width, height, boxstyle="round,pad=0,rounding_size=0.09", fc=fill, ec=line, lw=1.3)
    )
    axes.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=10.5, color=INK)


def network(axes: Axes, x: float, y: float, height: float, colours: tuple[str, str], width: float = 1.3) -> None:
    """A network as the shrinking feature maps of three stages; (x, y) is the middle of its left side."""
    fill, line = colours
    step = width / 3
    for i, share in enumerate((1.0, 0.74, 0.5)):
        side = height * share
        axes.add_patch(Rectangle((x + i * step, y - side / 2), step * 0.72, side, fc=fill, ec=line, lw=1.3))


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], **style: Any) -> None:
    """An arrow between two points."""
    look: dict[str, Any] = {
        "arrowstyle": "-|>",
        "mutation_scale": 11,
        "lw": 1.2,
        "color": INK,
        "shrinkA": 0,
        "shrinkB": 0,
    } | style
    axes.add_patch(FancyArrowPatch(start, end, **look))


def picture(axes: Axes, x: float, y: float, tilt: float, mirrored: bool, hole: tuple[float, float] | None) -> None:
    """A small image of a house under a sun: one view of it, cropped, flipped or partly erased."""
    size = 0.92
    frame = Rectangle((x, y), size, size, fc="#f3f6fa", ec=GREY, lw=1.0)
    axes.add_patch(frame)

    def at(u: float, v: float) -> tuple[float, float]:
        u = 1 - u if mirrored else u
        return x + size * (u + tilt * (v - 0.5)), y + size * v

    parts = [
        ("#b9d3b0", [(-0.2, -0.1), (1.2, -0.1), (1.2, 0.22), (-0.2, 0.22)]),
        ("#d9c2a3", [(0.2, 0.16), (0.62, 0.16), (0.62, 0.5), (0.2, 0.5)]),
        ("#b5644a", [(0.13, 0.5), (0.69, 0.5), (0.41, 0.78)]),
        ("#7c5b44", [(0.36, 0.16), (0.48, 0.16), (0.48, 0.36), (0.36, 0.36)]),
        ("#f2c14e", [(0.78, 0.7), (0.85, 0.75), (0.85, 0.84), (0.78, 0.89), (0.71, 0.84), (0.71, 0.75)]),
    ]
    for colour, corners in parts:
        patch = Polygon([at(u, v) for u, v in corners], fc=colour, ec="none")
        axes.add_patch(patch)
        patch.set_clip_path(frame)
    if hole is not None:
        axes.add_patch(Rectangle((x + hole[0] * size, y + hole[1] * size), 0.3 * size, 0.3 * size, fc="#111111"))


def draw(path: Path) -> Path:
    """Write the figure as a PNG."""
    figure = Figure(figsize=(14.6, 4.7), facecolor="white")
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, 14.6), ylim=(0, 4.7))
    axes.axis("off")
    title: dict[str, Any] = {"fontsize": 12.5, "fontweight": "bold", "color": INK, "va": "center"}
    label: dict[str, Any] = {"fontsize": 10.5, "color": INK, "ha": "center", "va": "center"}
    note: dict[str, Any] = {"fontsize": 9.5, "color": GREY, "ha": "center", "va": "center"}
    rows = (3.3, 1.5)
    for x in (4.3, 11.25):
        axes.plot([x, x], [0.25, 4.5], color="#e1e4e8", lw=1)

    axes.text(0.25, 4.4, "1  Divide", **title)
    network(axes, 0.35, 2.4, 2.6, (LARGE, "#5b6370"), width=1.65)
    axes.text(1.1, 0.72, "large network M", **label)
    axes.text(1.1, 0.42, "width C, decay λ, dropout p", **note)
    for i, (y, colours) in enumerate(zip(rows, NETWORKS, strict=True), start=1):
        arrow(axes, (1.98, 2.4), (2.6, y), color=GREY, linestyle=(0, (4, 2)))
        network(axes, 2.7, y, 1.2, colours)
        axes.text(3.3, y + 0.78, f"$M_{i}$", **label)
    axes.text(3.3, 0.72, "S small networks", **label)
    axes.text(3.3, 0.42, "C/√S,  λ·exp(1/S − 1),  p/√S", **note)

    axes.text(4.5, 4.4, "2  Co-train", **title)
    views = ((0.0, False, (0.06, 0.6)), (0.14, True, (0.56, 0.1)))
    for i, (y, colours, (tilt, mirrored, hole)) in enumerate(zip(rows, NETWORKS, views, strict=True), start=1):
        picture(axes, 4.65, y - 0.46, tilt, mirrored, hole)
        axes.text(5.11, y - 0.66, f"view {i}", **note)
        arrow(axes, (5.65, y), (6.02, y))
        network(axes, 6.1, y, 1.2, colours)
        axes.text(6.7, y + 0.78, f"$M_{i}$", **label)
        arrow(axes, (7.35, y), (7.78, y))
        box(axes, 7.84, y - 0.27, 0.8, 0.54, f"$p_{i}$", colours)
        arrow(axes, (8.64, y), (9.2, y))
        box(axes, 9.25, y - 0.27, 1.7, 0.54, "cross-entropy", LOSS)
    box(axes, 7.4, 2.05, 1.68, 0.7, "co-training loss\nJS($p_1$, …, $p_S$)", LOSS)
    for start, end in ((rows[0] - 0.27, 2.75), (rows[1] + 0.27, 2.05)):
        arrow(axes, (8.24, start), (8.24, end), arrowstyle="<|-|>")
    axes.text(10.1, 2.4, r"$\sum_i\,\mathrm{CE}(p_i,y)+w\,\mathrm{JS}$", **label | {"fontsize": 12})
    axes.text(5.11, 0.42, "of the same image", **note)
    axes.text(8.24, 0.72, "one optimiser, one schedule", **label)

    axes.text(11.45, 4.4, "3  Ensemble", **title)
    picture(axes, 11.5, 1.94, 0.0, False, None)
    for y, colours in zip((3.15, 1.65), NETWORKS, strict=True):
        arrow(axes, (12.48, 2.4), (12.74, y))
        network(axes, 12.8, y, 0.8, colours, width=0.8)
        arrow(axes, (13.57, y), (13.85, 2.75 if y > 2.4 else 2.05))
    box(axes, 13.58, 2.05, 0.8, 0.7, "mean of\nlogits", ENSEMBLE)
    axes.text(12.93, 0.72, "about the cost of M", **label)
    axes.text(12.93, 0.42, "the S networks can run in parallel", **note)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    return path


if __name__ == "__main__":
    default = Path(__file__).resolve().parent.parent / "miscs" / "method.png"
    draw(Path(sys.argv[1]) if len(sys.argv) > 1 else default)

"""Draws the two ways to train on several machines, miscs/together.png: `python script/draw_together.py [PATH]`."""

import sys
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

from script.draw_method import GREY, INK, LOSS, NETWORKS, arrow, box, network

MACHINE = ("#f7f8fa", GREY)
FILES = ("#fdf6dd", "#b08900")


def machine(axes: Axes, x: float, y: float, width: float, height: float, title: str) -> None:
    """The frame of one machine, its lower left corner at (x, y)."""
    fill, line = MACHINE
    axes.add_patch(
        FancyBboxPatch((x, y), width, height, boxstyle="round,pad=0,rounding_size=0.12", fc=fill, ec=line, lw=1.2)
    )
    axes.text(x + 0.15, y + height - 0.14, title, ha="left", va="top", fontsize=10, color=INK)


def note(axes: Axes, x: float, y: float, text: str, size: float = 9.5) -> None:
    """A line of text around (x, y)."""
    axes.text(x, y, text, ha="center", va="center", fontsize=size, color=INK)


def draw_placement(axes: Axes, x: float) -> None:
    """One job: each process its own networks, and logits between them in every step."""
    note(axes, x + 3.3, 4.95, "A. --placement networks: one job, one step for all", 12)
    for row, colours in enumerate(NETWORKS):
        y = 2.75 - 2.45 * row
        machine(axes, x, y, 6.6, 1.9, f"machine {row + 1}: view {row + 1}")
        network(axes, x + 0.35, y + 0.75, 1.0, colours)
        note(axes, x + 1.0, y + 0.14, f"network {row + 1}, its optimiser", 9)
        arrow(axes, (x + 1.75, y + 0.75), (x + 2.3, y + 0.75))
        box(axes, x + 2.3, y + 0.45, 1.15, 0.6, "own logits\n[B, K]", colours)
        arrow(axes, (x + 3.45, y + 0.75), (x + 4.0, y + 0.75))
        box(axes, x + 4.0, y + 0.35, 2.3, 0.8, "whole loss L of [S, B, K]\n∂L/∂(own) is exact", LOSS)
    arrow(axes, (x + 2.7, 3.2), (x + 2.7, 1.35), lw=1.6)
    arrow(axes, (x + 3.05, 1.35), (x + 3.05, 3.2), lw=1.6)
    note(axes, x + 4.85, 2.48, "S · B · K numbers a step; no gradient travels")


def draw_exchange(axes: Axes, x: float) -> None:
    """S jobs: each with frozen copies of the others, and weights in files now and then."""
    note(axes, x + 3.7, 4.95, "B. --exchange DIR: S jobs, nobody waits", 12)
    for row, colours in enumerate(NETWORKS):
        y, other = 2.75 - 2.45 * row, NETWORKS[1 - row]
        machine(axes, x, y, 4.6, 1.9, f"job {row + 1}: its own steps")
        network(axes, x + 0.3, y + 0.75, 1.0, colours, width=1.0)
        note(axes, x + 0.8, y + 0.14, "trains", 9)
        network(axes, x + 1.6, y + 0.75, 0.75, (MACHINE[0], other[1]), width=0.8)
        note(axes, x + 2.0, y + 0.14, "frozen peer", 9)
        box(axes, x + 2.75, y + 0.4, 1.6, 0.75, "loss, the peer's\nlogits constant", LOSS)
    box(axes, x + 5.6, 1.95, 1.9, 1.05, "DIR: weights\nof every network,\nsome steps old", FILES)
    for y in (3.5, 1.2):
        arrow(axes, (x + 4.6, y), (x + 5.7, 2.95 if y > 2 else 2.0), arrowstyle="<|-|>", lw=1.4)


def draw(path: Path) -> Path:
    """Write the figure as a PNG."""
    figure = Figure(figsize=(15.2, 5.3), facecolor="white")
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, 15.2), ylim=(0, 5.3))
    axes.axis("off")
    draw_placement(axes, 0.3)
    draw_exchange(axes, 7.5)
    figure.savefig(path, dpi=110)
    return path


if __name__ == "__main__":
    where = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent.parent / "miscs" / "together.png"
    print(draw(where))

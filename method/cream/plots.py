"""Pictures of a Cream search: the board over time, the network that was found. matplotlib is imported where used."""

import io
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

COLOURS = ("#1f5fa8", "#d1571b", "#2c8a4b", "#8a3fa0", "#b8860b", "#008b9a")
GREY = "#e4e4e4"
BOX, GAP, STAGE_GAP = 1.0, 0.25, 0.7


class Block(Protocol):
    """One inverted residual."""

    @property
    def kernel(self) -> int: ...

    @property
    def expansion(self) -> int: ...

    @property
    def out_channels(self) -> int: ...

    @property
    def stride(self) -> int: ...


def plot_board(board: Mapping[str, Any]) -> bytes:
    """PNG: score against MACs of everything that was on the board, coloured by the epoch it came.

    Args:
        board: content of board.json: `board`, the last state, and `history`, that after every epoch; entries have
            score [%], macs [millions] and arch.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    arrivals: dict[tuple[float, float], int] = {}
    for snapshot in board["history"]:
        for entry in snapshot["entries"]:
            arrivals.setdefault((entry["macs"], entry["score"]), snapshot["epoch"] + 1)
    if arrivals:
        points = axes.scatter(
            [macs for macs, _ in arrivals],
            [score for _, score in arrivals],
            c=list(arrivals.values()),
            cmap="viridis",
            s=36,
            linewidths=0,
        )
        figure.colorbar(points, ax=axes, label="epoch of arrival", ticks=MaxNLocator(integer=True))
    axes.scatter(
        [entry["macs"] for entry in board["board"]],
        [entry["score"] for entry in board["board"]],
        s=110,
        facecolors="none",
        edgecolors="#c22f2f",
        linewidths=1.6,
        label="on the board now",
    )
    for entry in board["board"][:1]:
        axes.scatter(entry["macs"], entry["score"], marker="*", s=90, color="#c22f2f", label="best", zorder=3)
    axes.set(
        title="Board of prioritised paths",
        xlabel="MACs in millions",
        ylabel="top-1 on the path's training batch in %",
    )
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    if board["board"]:
        axes.legend(fontsize=9)
    return _png(figure)


def plot_network(stages: Sequence[Sequence[Block]], *, title: str = "") -> bytes:
    """PNG: the searchable blocks of a network from left to right, one colour per kernel, taller for more expansion.

    Args:
        stages: blocks of every searchable stage (`NetworkPlan.stages`).
        title: above the picture.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import FancyBboxPatch, Patch

    blocks = [block for stage in stages for block in stage]
    colours = {kernel: COLOURS[kernel // 2 % len(COLOURS)] for kernel in sorted({block.kernel for block in blocks})}
    tallest = max(block.expansion for block in blocks)
    width = (len(blocks) + 2) * (BOX + GAP) + (len(stages) + 1) * STAGE_GAP
    figure = Figure(figsize=(max(6.0, 0.52 * width), 3.6), layout="constrained")
    axes = figure.subplots()

    def draw(left: float, height: float, colour: str, text: str, ink: str) -> None:
        corner = (left, 1.5 - height / 2)
        axes.add_patch(FancyBboxPatch(corner, BOX, height, boxstyle="round,pad=0,rounding_size=0.12", color=colour))
        axes.text(left + BOX / 2, 1.5, text, ha="center", va="center", color=ink, fontsize=9)

    left = 0.0
    draw(left, 2.0, GREY, "stem\nand\nstage 0", "#333333")
    for number, stage in enumerate(stages, start=1):
        left += BOX + STAGE_GAP
        first = left
        for position, block in enumerate(stage):
            if position:
                left += BOX + GAP
            height = 0.9 + 1.5 * block.expansion / tallest
            text = f"{block.kernel}x{block.kernel}\ne{block.expansion}" + ("\ns2" if block.stride == 2 else "")
            draw(left, height, colours[block.kernel], text, "white")
        axes.plot([first, left + BOX], [0.12, 0.12], color="#555555", linewidth=1)
        label = f"stage {number}\n{stage[0].out_channels} channels"
        axes.text((first + left + BOX) / 2, 0.02, label, ha="center", va="top", fontsize=8.5, color="#333333")
    left += BOX + STAGE_GAP
    draw(left, 2.0, GREY, "1x1,\npool,\nhead", "#333333")
    axes.annotate(
        "", (left + BOX + 0.5, 1.5), (-0.5, 1.5), arrowprops={"arrowstyle": "->", "color": "#888888"}, zorder=0
    )
    axes.set_xlim(-0.6, left + BOX + 0.6)
    axes.set_ylim(-0.75, 3.1)
    axes.axis("off")
    axes.set_title(title)
    handles = [Patch(color=colour, label=f"{kernel}x{kernel} depthwise") for kernel, colour in colours.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False, fontsize=9)
    return _png(figure)


def _png(figure: Any) -> bytes:
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=130)
    return content.getvalue()

"""The same table as Markdown, as LaTeX and as CSV."""

import csv
import io
from collections.abc import Iterable, Sequence
from typing import Any

Blocks = Sequence[Sequence[Sequence[str]]]  # rows of cells, in blocks that a line parts

_LATEX = {character: f"\\{character}" for character in "&%$#_{}"} | {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "±": r"$\pm$",
    "×": r"$\times$",
}


def markdown_table(titles: Sequence[str], is_number: Sequence[bool], blocks: Blocks) -> str:
    """A table for every block, a line between them.

    Args:
        titles: of the columns.
        is_number: whether a column stands to the right.
        blocks: rows of cells.
    """
    head = [f"| {' | '.join(titles)} |", f"| {' | '.join('---:' if right else '---' for right in is_number)} |"]
    tables = ["\n".join([*head, *(f"| {' | '.join(row)} |" for row in block)]) for block in blocks if block]
    return "\n\n---\n\n".join(tables)


def latex_table(titles: Sequence[str], is_number: Sequence[bool], blocks: Blocks) -> str:
    """A `tabular` that needs no packages, with a line between the blocks; arguments as `markdown_table`."""
    lines = [f"\\begin{{tabular}}{{{''.join('r' if right else 'l' for right in is_number)}}}", "\\hline"]
    lines += [_latex_row(titles), "\\hline"]
    for block in blocks:
        if block:
            lines += [*map(_latex_row, block), "\\hline"]
    return "\n".join([*lines, "\\end{tabular}", ""])


def _latex_row(cells: Sequence[str]) -> str:
    return " & ".join("".join(_LATEX.get(character, character) for character in cell) for cell in cells) + r" \\"


def csv_table(titles: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """The contents of a CSV file."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(titles)
    writer.writerows(rows)
    return file.getvalue()

"""Parameters and MACs of every registered backbone and division beside the published figures.

`python -m script.summarise_zoo [ARCH ...]` prints the table; `--markdown FILE` puts it between the marks of a file.
"""

import sys
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path

from model import LARGE, SMALL, BackboneRequest, backbones, image_shape
from model.summary import network_sizes
from recipe.datasets import ROWS
from record.checkpoint import write_file
from script.published import PUBLISHED, Size
from utils.command_line import OneLineParser
from utils.errors import UserError, reason
from utils.text import fit_streams

# the data set that stands for a form of the networks, and its crop
SHAPES = {SMALL: ("cifar100", 32), LARGE: ("imagenet", 224)}
SPLIT_FACTORS = (1, 2, 4, 8, 16)
TITLES = (
    "arch",
    "data set",
    "S",
    "crop",
    "params one M",
    "params all M",
    "published",
    "MACs one G",
    "MACs all G",
    "published",
    "thop all G",
)
MARKS = ("<!-- zoo: script/summary.sh all -- --thop --markdown miscs/zoo.md -->", "<!-- zoo ends -->")
LEGEND = (
    "A published figure that is not ours rounded has its distance from ours behind it. MACs are multiply-adds of "
    "convolutions and matrix products. Most published MACs are counts of the package thop, which adds batch norm and "
    "pooling; what it counts today, more than it did then, is in the last column of published rows."
)


def zoo_requests(archs: Sequence[str], split_factors: Sequence[int]) -> Iterator[tuple[BackboneRequest, Size | None]]:
    """One network of every division with a legal S among `split_factors`, and every published one; with its figures."""
    for arch in archs:
        entry = backbones.get(arch)
        cases = []
        for shape, legal in entry.split_factors.items():
            dataset, crop = SHAPES[shape]
            if shape == LARGE and entry.crop_size is not None:
                crop = entry.crop_size
            cases += [(dataset, crop, split_factor) for split_factor in split_factors if split_factor in legal]
        published = {(p.dataset, p.crop, p.split_factor): p for p in PUBLISHED if p.arch == arch}
        cases += [case for case in published if case not in cases and case[2] in split_factors]
        for dataset, crop, split_factor in cases:
            request = BackboneRequest(
                arch=arch,
                split_factor=split_factor,
                num_classes=ROWS[dataset].num_classes,
                shape=image_shape(dataset, crop),
                dataset=dataset,
                crop_size=crop,
                # the crop of the row, also where the network has a size of its own
                options={"is_efficientnet_user_crop": True},
            )
            yield request, published.get((dataset, crop, split_factor))


def zoo_rows(archs: Sequence[str], split_factors: Sequence[int], *, with_thop: bool = False) -> list[tuple[str, ...]]:
    """The cells of TITLES for each of `zoo_requests`.

    Args:
        with_thop: fill the last column of published rows, which takes longer.
    """
    rows: list[tuple[str, ...]] = []
    for request, published in zoo_requests(archs, split_factors):
        sizes = network_sizes([request] * request.split_factor, with_thop=with_thop and published is not None)
        params_M, macs_G = (sizes["params_total"] or 0) / 1e6, (sizes["macs_total"] or 0) / 1e9
        thop = sizes["thop_macs_total"]
        rows.append(
            (
                request.arch,
                request.dataset,
                str(request.split_factor),
                str(request.crop_size),
                f"{(sizes['params_one'] or 0) / 1e6:,.3f}",
                f"{params_M:,.3f}",
                beside(published.params, params_M) if published else "",
                f"{(sizes['macs_one'] or 0) / 1e9:,.4f}",
                f"{macs_G:,.4f}",
                beside(published.macs, macs_G) if published else "",
                "" if thop is None else f"{thop / 1e9:,.4f}",
            )
        )
    return rows


def beside(published: str, ours: float) -> str:
    """A published figure, with its distance in percent where it is not ours rounded: "5.25 (+0.1 %)"."""
    if not published:
        return ""
    digits = len(published.partition(".")[2])
    if f"{ours:.{digits}f}" == published:
        return published
    return f"{published} ({100 * (float(published) / ours - 1):+.1f} %)"


def notes(archs: Sequence[str]) -> list[str]:
    """What explains the larger differences."""
    found: dict[str, list[Size]] = {}
    for size in PUBLISHED:
        if size.note and size.arch in archs:
            found.setdefault(size.note, []).append(size)
    return [
        f"{', '.join(f'{size.arch} S = {size.split_factor} ({size.dataset})' for size in sizes)}: {note}."
        for note, sizes in found.items()
    ]


def markdown(rows: Sequence[tuple[str, ...]], archs: Sequence[str]) -> str:
    """Table, legend and notes as Markdown; the prose wraps as all of the project's does."""
    lines = [TITLES, ("---", "---", *["---:"] * (len(TITLES) - 2)), *rows]
    table = ["| " + " | ".join(line) + " |" for line in lines]
    return "\n".join([*table, "", _filled(LEGEND), "", *(_filled(note, "- ") for note in notes(archs))])


def _filled(text: str, mark: str = "") -> str:
    indent = " " * len(mark)
    return textwrap.fill(text, 120, initial_indent=mark, subsequent_indent=indent, break_on_hyphens=False)


def plain(rows: Sequence[tuple[str, ...]], archs: Sequence[str]) -> str:
    """The same for a terminal."""
    widths = [max(map(len, column)) for column in zip(TITLES, *rows, strict=True)]
    table = [
        "  ".join(cell.ljust(width) if i < 2 else cell.rjust(width) for i, (cell, width) in enumerate(cells)).rstrip()
        for cells in (list(zip(line, widths, strict=True)) for line in (TITLES, *rows))
    ]
    return "\n".join([*table, "", LEGEND, *notes(archs)])


def replace_table(path: Path, text: str) -> None:
    """Put `text` between the MARKS of a file.

    Raises:
        UserError: the file cannot be read or written, or has no marks.
    """
    try:
        content = path.read_text(encoding="utf-8")
        before, found, rest = content.partition(MARKS[0])
        _, end, after = rest.partition(MARKS[1])
        if not found or not end:
            raise UserError(f"--markdown {path}: expected the lines {MARKS[0]} and {MARKS[1]}.")
        write_file(path, f"{before}{found}\n{text}\n{end}{after}")
    except OSError as error:
        raise UserError(f"--markdown {path}: {reason(error)}.") from None


def main() -> int:
    """The command line; returns the exit code."""
    fit_streams()
    parser = OneLineParser(prog="summarise_zoo", description=__doc__.partition("\n")[0])
    parser.add_argument("archs", nargs="*", metavar="ARCH", help="backbones [default: all]")
    parser.add_argument("--split_factors", type=int, nargs="+", default=SPLIT_FACTORS, metavar="S")
    parser.add_argument("--thop", action="store_true", help="count published rows with the package thop too")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="replace the table in this Markdown file")
    arguments = parser.parse_args()
    archs = arguments.archs or backbones.names()
    try:
        rows = zoo_rows(archs, arguments.split_factors, with_thop=arguments.thop)
        if arguments.markdown is None:
            print(plain(rows, archs))
        else:
            replace_table(arguments.markdown, markdown(rows, archs))
    except UserError as error:
        print(f"summarise_zoo: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

"""Compare runs in one table (Markdown, LaTeX, CSV) and one picture; runs that differ by the seed alone make a row."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from record import compare, equal_budget
from record.checkpoint import write_file
from record.runs import FinishedRun, read_run
from utils.command_line import OneLineParser
from utils.errors import RunError, UserError, reason
from utils.text import fit_streams


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    fit_streams()
    parser = OneLineParser(prog=f"python -m {__package__}", description=__doc__)
    parser.add_argument("folders", nargs="+", metavar="RUN_DIR", help="run directories (--model_dir of train_split.py)")
    parser.add_argument(
        "--out",
        default="compare",
        metavar="PREFIX",
        help="where PREFIX.md, PREFIX.tex, PREFIX.csv and PREFIX.png go [default: compare]",
    )
    parser.add_argument(
        "--budget",
        choices=("equal",),
        help="compare ways to spend one budget: sizes beside the undivided network's, differences seed by seed",
    )
    parser.add_argument(
        "--budget_of",
        choices=equal_budget.BUDGETS,
        help="for --budget, what an equal row has in common with the undivided network [default: both]",
    )
    parser.add_argument(
        "--equal_training",
        choices=equal_budget.TRAININGS,
        help="for --budget, whether all train the same epochs or the same multiply-adds [default: epochs]",
    )
    parser.add_argument(
        "--reference",
        metavar="PARAMS,MACS",
        help="for --budget, sizes of the undivided network [default: those of its run]",
    )
    parser.add_argument(
        "--entries",
        metavar="'NAME ...'",
        help="for --budget, what the rows are called [default: by method, members and what else differs]",
    )
    arguments = parser.parse_args(argv)
    prefix = Path(arguments.out)
    try:
        _check(arguments)
        runs = [read_run(Path(folder)) for folder in arguments.folders]
        write = _equal_budget if arguments.budget else _side_by_side
        try:
            prefix.parent.mkdir(parents=True, exist_ok=True)
            text = write(runs, prefix, arguments)
        except OSError as error:
            raise UserError(f"--out {prefix}: cannot be written: {reason(error)}.") from None
    except (UserError, RunError) as error:
        print(f"compare: {error}", file=sys.stderr)  # noqa: T201 - an entry point
        return error.exit_code
    print(f"{text}\n{_place(prefix, 'png')}")  # noqa: T201
    return 0


def _check(arguments: argparse.Namespace) -> None:
    for flag in ("budget_of", "equal_training", "reference", "entries"):
        if getattr(arguments, flag) is not None and arguments.budget is None:
            raise UserError(f"--{flag} is for a comparison at equal budget: add --budget equal, or leave it away.")


def _place(prefix: Path, ending: str) -> Path:
    return prefix.with_name(f"{prefix.name}.{ending}")


def _write(prefix: Path, text: str, latex: str, csv: str) -> None:
    for ending, content in (("md", text), ("tex", latex), ("csv", csv)):
        write_file(_place(prefix, ending), content)


def _side_by_side(runs: Sequence[FinishedRun], prefix: Path, arguments: argparse.Namespace) -> str:
    rows = compare.compare_runs(runs)
    chosen = sorted({f"{run.results['best_chosen_on']} images" for run in runs if "best_chosen_on" in run.results})
    text = compare.markdown(rows)
    best = f"; best epoch chosen on the {', '.join(chosen)}" if chosen else ""  # where one was evaluated
    text += f"\n\nTop-1 in %, mean ± standard deviation over the seeds{best}."
    text += "\nMACs and parameters are those of the networks as deployed; seconds include the evaluations.\n"
    _write(prefix, text, compare.latex(rows), compare.csv_table(rows))
    compare.plot_comparison(rows, _place(prefix, "png"))
    return text


def _equal_budget(runs: Sequence[FinishedRun], prefix: Path, arguments: argparse.Namespace) -> str:
    budget_of, training = arguments.budget_of or "both", arguments.equal_training or "epochs"
    rows = equal_budget.budget_rows(
        [run for run in runs if run.is_finished],
        budget_of=budget_of,
        equal_training=training,
        reference=None if arguments.reference is None else _sizes(arguments.reference),
        entries=(arguments.entries or "").split(),
    )
    left_out = [run for run in runs if not run.is_finished]
    said = equal_budget.notes(rows, budget_of=budget_of, equal_training=training, left_out=left_out)
    text = "\n".join([equal_budget.markdown(rows), "", *(f"- {note}" for note in said), ""])
    _write(prefix, text, equal_budget.latex(rows), equal_budget.csv_table(rows))
    equal_budget.plot(rows, _place(prefix, "png"))
    return text


def _sizes(text: str) -> tuple[int, int]:
    numbers = text.split(",")
    if len(numbers) != 2 or not all(number.isdecimal() and int(number) > 0 for number in numbers):
        raise UserError(f"--reference {text}: expected PARAMS,MACS of the undivided network.")
    return int(numbers[0]), int(numbers[1])


if __name__ == "__main__":
    raise SystemExit(main())

"""Compare finished runs in one table (Markdown, CSV) and one picture; runs that differ by the seed alone make a row."""

import sys
from pathlib import Path

from record.checkpoint import write_file
from record.compare import compare_runs, csv_table, markdown, plot_comparison, read_run
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
        help="where PREFIX.md, PREFIX.csv and PREFIX.png go [default: compare]",
    )
    arguments = parser.parse_args(argv)
    prefix = Path(arguments.out)
    try:
        runs = [read_run(Path(folder)) for folder in arguments.folders]
        rows = compare_runs(runs)
        table = markdown(rows)
        notes = ", ".join(sorted({f"{run.results['best_chosen_on']} images" for run in runs}))
        table += f"\n\nTop-1 in %, mean ± standard deviation over the seeds; best epoch chosen on the {notes}."
        table += "\nMACs and parameters are those of the networks as deployed; seconds include the evaluations.\n"
        try:
            prefix.parent.mkdir(parents=True, exist_ok=True)
            write_file(prefix.with_name(prefix.name + ".md"), table)
            write_file(prefix.with_name(prefix.name + ".csv"), csv_table(rows))
            picture = plot_comparison(rows, prefix.with_name(prefix.name + ".png"))
        except OSError as error:
            raise UserError(f"--out {prefix}: cannot be written: {reason(error)}.") from None
    except (UserError, RunError) as error:
        print(f"compare: {error}", file=sys.stderr)  # noqa: T201 - an entry point
        return error.exit_code
    print(f"{table}\n{picture}")  # noqa: T201
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

"""What script/distill.sh needs: a finished run's settings as those of its student, and the table of both.

`plan RUN_DIR OUT [EPOCHS] [STUDENT]` writes OUT/distill.yaml; `table LABEL=RUN_DIR:EVALUATION_DIR ...` prints it.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from dataset.options import DataOptions
from parser_params import DeviceOptions, EvaluationOptions, parse_config, resolve_config
from record.checkpoint import BEST, load_checkpoint, write_file
from record.run_folder import HPARAMS, RESULTS, make_folder
from training.options import OptimizerOptions
from utils.errors import UserError
from utils.options import OF_CALL, flags_of
from utils.text import fit_streams

STUDENTS = ("undivided", "one")
COLUMNS = ("", "top-1 %", "NLL", "ECE", "disagreement", "parameters", "MACs", "ms of one image", "training s")


def student_settings(run: Path, epochs: int | None, student: str) -> dict[str, Any]:
    """Flag values of the student's run: the data, recipe, precision and seed of the teacher's, by flag name.

    The recipe is asked again for a student of another division, because it has other weight decay and dropout then.

    Raises:
        UserError: no run directory, or a student that the run's networks do not give.
    """
    if student not in STUDENTS:
        raise UserError(f"STUDENT {student}: expected {' or '.join(STUDENTS)}.")
    try:
        described = json.loads((run / HPARAMS).read_text(encoding="utf-8"))
        values = {name: item["value"] for name, item in described.items()}
        given = {name for name, item in described.items() if item["origin"] not in ("recipe", "default")}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        raise UserError(f"{run} is no run directory: {HPARAMS} is missing or foreign.") from None
    archs = values["arch"].split(",")
    if student == "undivided" and len(set(archs)) > 1:
        raise UserError(f"{run}: --arch {values['arch']} names several networks: none of them is the undivided one.")
    content = load_checkpoint(run / BEST, "the teacher")
    undone = {"model_dir", "resume", "config", "evaluate", "pretrained", "pretrained_dir", "stage_widths"}
    kept = {name: values[name] for name in given - undone if values[name] is not None}
    if student == "undivided":
        kept |= {"arch": archs[0], "split_factor": 1}
    if epochs is not None:
        kept["epochs"] = epochs
    words = [word for name, value in kept.items() for word in (f"--{name}", *_words(value))]
    config = resolve_config(
        parse_config(["--method", values["method"], *words]),
        data_recipe=content["data_recipe"],
        crop_size=values["crop_size"],
    )
    kinds = (DataOptions, OptimizerOptions, EvaluationOptions, DeviceOptions)
    names = {flag.name for kind in kinds for flag in flags_of(kind) if flag.resume != OF_CALL}
    if "test_fraction" not in given:
        names.discard("test_fraction")  # data with a split of its own refuses it
    settings = {name: value for name, value in config.values().items() if name in names and value is not None}
    settings |= {"seed": values["seed"], "data": values["data"], "dataset": values["dataset"]}
    # its epochs and the network come last, and a division's own weight decay is in the settings already
    settings |= {"method": "kd", "teacher": str(run / BEST), "is_div_wd": False}
    return settings | ({"student_of": True} if student == "one" else {"arch": archs[0]})


def _words(value: Any) -> list[str]:
    values = value if isinstance(value, list) else [value]
    return [str(int(item)) if isinstance(item, bool) else str(item) for item in values]


def table(entries: Mapping[str, tuple[Path, Path]]) -> str:
    """Figures of runs side by side as Markdown.

    Args:
        entries: label -> (run directory, directory of its evaluation with --benchmark).
    """
    lines = [COLUMNS, ("---", *["---:"] * (len(COLUMNS) - 1))]
    for label, (run, evaluation) in entries.items():
        trained, figures = (json.loads((path / RESULTS).read_text(encoding="utf-8")) for path in (run, evaluation))
        own = [row["p50_ms"] for row in figures["latency"] if row["batch_size"] == 1 and row["name"] != "undivided"]
        disagreement = figures.get("disagreement") if figures["split_factor"] > 1 else None
        lines.append(
            (
                label,
                f"{figures['ensemble_acc1']:.2f}",
                f"{figures['ensemble_nll']:.4f}",
                f"{figures['ensemble_ece']:.4f}",
                "" if disagreement is None else f"{disagreement:.4f}",
                f"{trained['params_total']:,}",
                f"{trained['macs_total']:,}",
                f"{min(own):.3g}",
                f"{trained['seconds']:.0f}",
            )
        )
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main(arguments: Sequence[str]) -> int:
    """The command line; returns the exit code."""
    fit_streams()
    try:
        if arguments[0] == "plan":
            run, out, epochs, student = arguments[1:]
            settings = student_settings(Path(run), int(epochs) if epochs else None, student)
            make_folder(Path(out))
            plain = {name: list(value) if isinstance(value, tuple) else value for name, value in settings.items()}
            write_file(Path(out) / "distill.yaml", yaml.safe_dump(plain, sort_keys=True))
            return 0
        entries = {}
        for entry in arguments[1:]:
            label, _, places = entry.partition("=")
            run, _, evaluation = places.partition(":")
            entries[label] = (Path(run), Path(evaluation))
        print(table(entries))
    except UserError as error:
        print(f"distill: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))

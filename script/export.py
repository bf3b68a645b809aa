"""Writes the whole ensemble of a checkpoint as one file: `python script/export.py CHECKPOINT [--out FILE.pt2|.onnx]`.

Batch norm is folded, the ensemble rule is inside, the batch size is free; class names, normalisation and crop size are
in the file. Weights and rule are chosen as in eval.py, whose flags all work here: --is_ensembled_after_softmax,
--is_max_ensemble, --weights, --predict PATH (images to compare on), ... Exit code 1: the file's logits are not those of
eval.py, and it is not kept.
"""

import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# the project's root, where this file is run by its path
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from evaluation.ensemble import ensemble_scores
from evaluation.export import OUTPUTS, export_ensemble, load_exported, onnx_bytes, program_bytes, require
from evaluation.options import EvalOptions
from evaluation.session import Session, class_names_and_statistics, open_inputs, open_session
from model.splitnet import SplitNet
from parser_params import parse_config
from record.checkpoint import PARTIAL
from utils import launch
from utils.command_line import OneLineParser
from utils.errors import RunError, UserError, reason
from utils.plain_json import plain_json
from utils.text import fit_streams

BATCH_SIZES = (1, 2, 7)
TOLERANCE = 1e-3
WRITERS = {".pt2": program_bytes, ".onnx": onnx_bytes}


@dataclass(frozen=True)
class Difference:
    """How far a file is from eval.py on some images.

    Attributes:
        source: what the images are.
        absolute: largest difference of a logit of a network or of the ensemble.
        relative: the same by the largest logit.
    """

    source: str
    absolute: float
    relative: float


def metadata_of(session: Session) -> dict[str, Any]:
    """What a user of the file needs to know."""
    classes, mean, std = class_names_and_statistics(session)
    info = session.info
    return {
        "checkpoint": session.checkpoint.name,
        "arch": list(info.archs),
        "networks": info.num_networks,
        "weights": info.weights,
        "rule": session.rule,
        "classes": list(classes),
        "mean": list(mean),
        "std": list(std),
        "crop_size": info.crop_size,
        "input": "images [B, 3, crop_size, crop_size]: RGB / 255, minus mean, by std",
        "outputs": {"ensemble": "scores [B, K] by the rule", "logits": "[networks, B, K]"},
        "torch": torch.__version__,
    }


def comparison_images(session: Session, batch_sizes: Sequence[int]) -> Iterator[tuple[str, Tensor]]:
    """(what they are, prepared images [B, 3, H, W]): of --predict, else random ones in several batch sizes."""
    predict, crop = session.config.extra_options.predict, session.info.crop_size
    if predict is None:
        generator = torch.Generator().manual_seed(session.seed)
        for size in batch_sizes:
            images_BCHW = torch.randn(size, 3, crop, crop, generator=generator)
            yield f"{size} random image(s)", images_BCHW.to(session.precision.weights)
        return
    _, mean, std = class_names_and_statistics(session)
    for _, images_BCHW in open_inputs(session, Path(predict), mean, std).batches:
        yield f"{len(images_BCHW)} image(s) of {predict}", images_BCHW


def compare(session: Session, path: Path, batch_sizes: Sequence[int]) -> list[Difference]:
    """What the file at `path` gives, beside what eval.py gives."""
    run, _ = load_exported(path)
    differences = []
    with torch.inference_mode():
        for source, images_BCHW in comparison_images(session, batch_sizes):
            logits_SBK = session.network(images_BCHW)
            expected = (ensemble_scores(logits_SBK, session.rule), logits_SBK)
            found = run(images_BCHW)
            absolute = max(float((a - b).abs().max()) for a, b in zip(found, expected, strict=True))
            largest = max(float(tensor.abs().max()) for tensor in expected)
            differences.append(Difference(source, absolute, absolute / max(largest, 1e-12)))
    return differences


def export(argv: Sequence[str]) -> tuple[dict[str, Any], list[Difference], bool]:
    """Write and compare as a command line says; returns (results, differences, whether all are within the tolerance).

    Raises:
        UserError: a wrong flag or checkpoint, a missing package.
        RunError: the file cannot be written.
    """
    parser = OneLineParser(prog="export.py", description=__doc__, allow_abbrev=False)
    parser.add_argument("checkpoint", help="checkpoint of train_split.py, or a released one (see eval.py --help)")
    parser.add_argument("--out", type=Path, help="file to write, .pt2 or .onnx [default: CHECKPOINT's name, .pt2]")
    parser.add_argument(
        "--batch_sizes", type=int, nargs="+", default=BATCH_SIZES, metavar="N", help="compared [default: 1 2 7]"
    )
    parser.add_argument(
        "--tolerance", type=float, default=TOLERANCE, help="allowed difference by the largest logit [default: 0.001]"
    )
    arguments, flags = parser.parse_known_args(argv)
    checkpoint = Path(arguments.checkpoint)
    out: Path = arguments.out or checkpoint.with_name(checkpoint.name.split(".")[0] + ".pt2")
    if out.suffix not in WRITERS:
        raise UserError(f"--out {out}: expected a name that ends in {' or '.join(WRITERS)}.")
    if min(arguments.batch_sizes) < 1:
        raise UserError("--batch_sizes: expected numbers of 1 or more.")
    if out.suffix == ".onnx":
        require(("onnx", "onnxscript", "onnxruntime"))
    if not out.parent.is_dir():
        raise UserError(f"--out {out}: the folder {out.parent} does not exist.")
    # the file runs on any device and in full precision, whatever evaluates here
    words = ["--resume", str(checkpoint), *flags, "--no_cuda", "--amp_dtype", "fp32"]
    config = parse_config(words, program="export.py", extra=EvalOptions)
    session = open_session(config, launch.join([]), [])
    assert isinstance(session.network, SplitNet)
    crop = session.info.crop_size
    program = export_ensemble(session.network, session.rule, (3, crop, crop))
    metadata = metadata_of(session)
    partial = out.with_name(f"{out.stem}{PARTIAL}{out.suffix}")
    try:
        partial.write_bytes(WRITERS[out.suffix](program, metadata))
        differences = compare(session, partial, arguments.batch_sizes)
        agrees = all(one.relative <= arguments.tolerance for one in differences)  # not so where one is NaN
        if agrees:
            os.replace(partial, out)
    except OSError as error:
        raise RunError(f"--out {out}: cannot be written: {reason(error)}.") from None
    finally:
        partial.unlink(missing_ok=True)
    results = {
        "out": str(out) if agrees else None,
        "outputs": OUTPUTS,
        **{name: metadata[name] for name in ("arch", "networks", "weights", "rule", "crop_size")},
        "largest_difference": max(one.absolute for one in differences),
        "largest_relative_difference": max(one.relative for one in differences),
        "tolerance": arguments.tolerance,
    }
    return results, differences, agrees


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code: 0 done, 1 the file differs or cannot be written, 2 a user's mistake."""
    fit_streams()
    try:
        results, differences, agrees = export(sys.argv[1:] if argv is None else argv)
    except (UserError, RunError) as error:
        print(f"export.py: {error}", file=sys.stderr)
        return error.exit_code
    for one in differences:
        print(f"{one.source}: largest difference {one.absolute:.2e}, {one.relative:.2e} of the largest logit")
    if not agrees:
        print(f"export.py: beyond the tolerance of {results['tolerance']:g}: no file is kept.", file=sys.stderr)
    print(json.dumps(plain_json(results)))
    return 0 if agrees else 1


if __name__ == "__main__":
    raise SystemExit(main())

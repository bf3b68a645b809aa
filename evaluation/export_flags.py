"""The command line of `script/export.py`, read without torch: --help and a wrong flag are answered at once."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from evaluation.options import EvalOptions
from parser_params import Config, parse_config
from utils.command_line import OneLineParser
from utils.errors import UserError
from utils.program import program_name

ABOUT = """Writes the whole ensemble of a checkpoint as one file, .pt2 or .onnx.

Batch norm is folded, the ensemble rule is inside, the batch size is free; class names and `preprocessing` are in the
file. Weights and rule are chosen as in eval.py, whose flags work here: --is_ensembled_after_softmax, --is_max_ensemble,
--weights, --predict PATH (images to compare on), ... Exit code 1: the file's logits are not those of eval.py, and it is
not kept. Of a tuned checkpoint the calibrated probabilities are a further output. --answer cascade writes the cascade
of a tuned checkpoint: as one file for one image at a time, as a folder DIR/ for batches, which run_cascade.py in it
runs.
"""
PROGRAM = program_name("export.py", "export")
BATCH_SIZES = (1, 2, 7)
TOLERANCE = 1e-3
FORMATS = ("onnx", "pt2")
INPUTS = {
    "float32": "images [B, 3, crop, crop], float32: RGB / 255, minus mean, by std",
    "uint8": "images [B, 3, crop, crop], uint8: RGB, resized and cropped; what follows is inside",
}


@dataclass(frozen=True, kw_only=True)
class ExportFlags:
    """What a command line of an export says.

    Attributes:
        checkpoint: a run directory or a checkpoint.
        out: as it was given; None: beside the checkpoint.
        networks_format: one of FORMATS, of the networks in a folder.
        input: what the file takes, a key of INPUTS.
        batch_sizes: in which the file is compared with the running networks.
        tolerance: largest difference by the largest logit.
        config: the flags of eval.py.
    """

    checkpoint: str
    out: str | None
    networks_format: str | None
    input: str
    batch_sizes: Sequence[int]
    tolerance: float
    config: Config


def read(argv: Sequence[str] | None = None) -> ExportFlags:
    """What a command line says, its arguments without the program's name; None takes those of this process.

    Raises:
        UserError: a wrong flag, or one that no exported file can obey.
        SystemExit: the help is shown, or one of the export's own flags is wrong and was named.
    """
    parser = OneLineParser(prog=PROGRAM, description=ABOUT, allow_abbrev=False)
    parser.add_argument("checkpoint", help="a run directory, a checkpoint, or a released one (see eval.py --help)")
    parser.add_argument(
        "--out",
        help="file to write, .pt2 or .onnx; of a cascade also a folder DIR/ [default: CHECKPOINT's name, .pt2]",
    )
    parser.add_argument("--format", choices=FORMATS, help="of the networks in a folder of --out DIR/ [default: onnx]")
    parser.add_argument(
        "--input",
        choices=INPUTS,
        default="float32",
        help="what the file takes: normalised floats, or the pixels of resized and cropped images [default: float32]",
    )
    parser.add_argument(
        "--batch_sizes", type=int, nargs="+", default=BATCH_SIZES, metavar="N", help="compared [default: 1 2 7]"
    )
    parser.add_argument(
        "--tolerance", type=float, default=TOLERANCE, help="allowed difference by the largest logit [default: 0.001]"
    )
    own, others = parser.parse_known_args(sys.argv[1:] if argv is None else argv)
    if min(own.batch_sizes) < 1:
        raise UserError("--batch_sizes: expected numbers of 1 or more.")
    # the file runs on any device and in full precision, whatever evaluates here
    words = ["--resume", own.checkpoint, *others, "--no_cuda", "--amp_dtype", "fp32"]
    config = parse_config(words, program=PROGRAM, extra=EvalOptions)
    tta = config.extra_options.tta
    if tta != "none":
        raise UserError(
            f"--tta {tta}: an exported file answers for an image as it is. Leave the flag away, and take the mean of "
            "its logits for the image and for its mirror image."
        )
    return ExportFlags(
        checkpoint=own.checkpoint,
        out=own.out,
        networks_format=own.format,
        input=own.input,
        batch_sizes=own.batch_sizes,
        tolerance=own.tolerance,
        config=config,
    )

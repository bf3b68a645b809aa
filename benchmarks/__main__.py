"""Times one subject beside the published behaviour: `python -m benchmarks SUBJECT --help`. See benchmarks/README.md."""

import argparse
import importlib
import shlex
import sys
import time
from pathlib import Path

import torch

from benchmarks.report import Clock, describe, judged, markdown, write
from record.checkpoint import write_file
from utils.command_line import OneLineParser, at_least
from utils.cpus import settle_threads
from utils.errors import RunError, UserError, reason
from utils.text import fit_streams

SUBJECTS = {
    "ceilings": "what the device can do at most: products, copies, launches",
    "convolutions": "3x3 convolutions of S narrow networks, in sequence, in streams, with groups",
    "numerics": "how far cases drift apart over the same training steps",
    "division": "a step of S networks beside the one that they divide, and the use of the device (G3, G4)",
    "inference": "latency of S networks beside the large one (G9)",
    "counts": "operations and host waits of a training step (G8)",
    "epoch": "an epoch end to end, or an evaluation alone (G7, G11)",
    "placement": "all networks in every process beside own networks alone, on a link (G13, G14, G15)",
    "l_mcl_step": "a step of layer-wise mutual contrastive learning in its parts",
    "passes": "operations of a training step, an evaluation batch and an inference batch",
    "peers": "an epoch by timm, by torchvision and by ours; a deep ensemble and a loop",
    "step": "one training step of S networks (G1, G2, G10)",
    "views": "augmented views against Pillow (G5, G6), and large images from files",
}


def build_parser() -> argparse.ArgumentParser:
    """One parser for each subject; what is common comes first."""
    parser = OneLineParser(prog="python -m benchmarks", description=__doc__)
    subjects = parser.add_subparsers(dest="subject", required=True, metavar="SUBJECT")
    for name, text in SUBJECTS.items():
        own = subjects.add_parser(name, help=text, description=text)
        own.add_argument("--device", default="auto", help="cpu, cuda, cuda:1 … (default: the GPU where there is one)")
        own.add_argument("--threads", type=at_least(0), default=0, help="of a CPU (default 0: as many as may be used)")
        own.add_argument("--split_factor", type=at_least(1), default=4, help="S (default 4)")
        own.add_argument("--rounds", type=at_least(1), default=50, help="timed rounds at most (default 50)")
        own.add_argument("--seconds", type=float, default=180, help="no new round begins after (default 180)")
        own.add_argument(
            "--calls", type=at_least(1), default=1, help="of a timed sample, without waiting in between (default 1)"
        )
        own.add_argument("--json", type=Path, help="write the rows there, and the table beside it as .md")
        importlib.import_module(f"benchmarks.{name}").add_flags(own)
    return parser


def main(argv: list[str] | None = None, *, clock: Clock = time.perf_counter) -> int:
    """The command line; returns the exit code: 0 measured, whatever the goals say; 1 a case failed, and the others
    were measured; 2 the user's mistake. With --json, what is measured is written at once.

    Args:
        clock: tells the time in seconds; subjects find it in their options.
    """
    fit_streams()
    arguments = sys.argv[1:] if argv is None else argv
    options = build_parser().parse_args(arguments, argparse.Namespace(clock=clock))
    try:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if options.device != "auto":
            device = _device(options.device)
        settle_threads(options.threads or None)
        subject = importlib.import_module(f"benchmarks.{options.subject}")
        command = shlex.join(["python", "-m", "benchmarks", *arguments])
        rows, text = [], ""
        for one in subject.run(options, device):
            rows.append(judged(one, device))
            text = f"{describe(device, command)}\n\n{getattr(subject, 'markdown', markdown)(rows)}"
            if options.json is not None:
                write(options.json, rows, device=device, command=command)
                write_file(options.json.with_suffix(".md"), text + "\n")
    except (UserError, RunError) as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        return error.exit_code
    except OSError as error:
        print(f"benchmarks: --json {options.json}: cannot be written: {reason(error)}.", file=sys.stderr)
        return RunError.exit_code
    print(text)
    return RunError.exit_code if any("error" in one for one in rows) else 0


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name}: {reason(error)[:150]}. Use cpu, or cuda where there is a GPU.") from None
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # where events are recorded and Triton's kernels run
    return device


if __name__ == "__main__":
    raise SystemExit(main())

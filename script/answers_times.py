"""Times the cascades of one seed of script/answers.sh, on real test images: FOLDER IMAGES writes FOLDER/times.json.

In turns at batch 1 and 128: the undivided network, every single network, the full ensemble in every way of running it,
the chosen cascade, and others along the curve. Apart from them at batch 1, where they were exported, the cascade and
the full ensemble in onnxruntime. S networks, B images.
"""

import json
import platform
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from evaluation.answers import Answers
from evaluation.cascade import thinned
from evaluation.contenders import CascadeContender, Contender, candidates_of, cascade_candidates
from evaluation.export import load_exported
from evaluation.export_cascade import load_cascade
from evaluation.held_out import reported_images
from evaluation.latency import Candidate, Latency, as_plain, measure
from evaluation.options import EvalOptions
from evaluation.session import Session, open_large, open_session
from model.options import EXECUTIONS
from model.splitnet import SplitNet
from parser_params import parse_config
from record.checkpoint import write_file
from utils import launch
from utils.errors import UserError

BATCH_SIZES = (1, 128)
CURVE = 8  # cascades beside the chosen one
ONNX = {"cascade": "cascade.onnx", "ensemble": "ensemble.onnx"}


def threshold_text(thresholds: Sequence[float]) -> str:
    """The name of a cascade."""
    return " ".join(f"{threshold:.9g}" for threshold in thresholds)


def candidates(session: Session, large: Session, answers: Answers, images_BCHW: Tensor) -> list[Candidate]:
    """Everything that is timed in turns; a cascade's name are its thresholds.

    Args:
        images_BCHW: prepared, on the device.
    """
    network, cascade = session.network, answers.cascade
    assert isinstance(network, SplitNet)
    assert cascade is not None
    precision = session.precision
    found = candidates_of(Contender("undivided", large.network, None), images_BCHW, precision, ("loop",))
    for s, one in enumerate(network.models):
        found += candidates_of(Contender(f"network {s + 1}", SplitNet([one]), None), images_BCHW, precision, ("loop",))
    found += candidates_of(Contender("ensemble", network, None), images_BCHW, precision, EXECUTIONS)
    chosen = tuple(bound for bounds in cascade.bounds for bound in bounds)
    curve = [tuple(one["thresholds"]) for one in cascade.held_out["curve"]]
    for thresholds in dict.fromkeys((chosen, *thinned(curve, CURVE))):
        bounds = tuple((threshold,) for threshold in thresholds)
        other = replace(answers, cascade=replace(cascade, bounds=bounds))
        contender = CascadeContender(other.running_cascade, cascade.order[0], images_BCHW, None, None)
        *_, running = cascade_candidates(contender, Contender("ensemble", network, None), images_BCHW, precision)
        found.append(replace(running, name=threshold_text(thresholds)))
    return found


def in_onnxruntime(folder: Path, images_BCHW: Tensor, seconds: float) -> list[Latency]:
    """The exported cascade and ensemble, one image at a time; none where they were not exported."""
    if not all((folder / name).exists() for name in ONNX.values()):
        return []
    cascade, (ensemble, _) = load_cascade(folder / ONNX["cascade"]), load_exported(folder / ONNX["ensemble"])
    pair = [
        Candidate(name="cascade", strategy="onnxruntime", forward=lambda images: cascade(images)[0]),
        Candidate(name="ensemble", strategy="onnxruntime", forward=lambda images: ensemble(images)[0]),
    ]
    return measure(pair, images_BCHW.float().cpu(), batch_sizes=(1,), seconds=seconds, each_image=True)


def times(folder: Path, images: int, seconds: float = 3.0) -> dict[str, Any]:
    """What times.json holds.

    Args:
        folder: of script/answers.sh.
        images: that are timed, at most.
        seconds: of each candidate and batch size, at least one turn over the images.

    Raises:
        UserError: a checkpoint that is not there.
    """
    tuned = folder / "margin" / "model_best.tuned.pth.tar"
    words = ["--resume", str(tuned), "--large", str(folder / "undivided" / "model_best.pth.tar"), "--workers", "0"]
    config = parse_config(words, program="answers_times", extra=EvalOptions)
    session = open_session(config, launch.join(config.gpus()), config.gpus())
    assert session.answers is not None
    large, precision = open_large(session), session.precision
    images_BCHW = reported_images(session, images, shuffled=True)
    placed = images_BCHW.to(session.world.device, memory_format=precision.memory_format)
    rows = measure(
        candidates(session, large, session.answers, placed),
        placed,
        autocast_dtype=precision.autocast,
        batch_sizes=BATCH_SIZES,
        seconds=seconds,
        each_image=True,
    )
    return {
        "device": str(session.world.device),
        "machine": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "images": len(images_BCHW),
        "rows": as_plain(rows),
        "onnxruntime": as_plain(in_onnxruntime(folder, images_BCHW, seconds)),
    }


def main(arguments: Sequence[str]) -> int:
    """The command line; returns the exit code."""
    folder, images = Path(arguments[0]), int(arguments[1])
    try:
        write_file(folder / "times.json", json.dumps(times(folder, images), indent=2) + "\n")
    except UserError as error:
        print(f"answers_times: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))

"""Flags of eval.py beside those of a training run."""

from dataclasses import dataclass

from model.restore import WEIGHTS
from utils.options import OF_CALL, Options, option


@dataclass(frozen=True, kw_only=True)
class EvalOptions(Options):
    """Evaluation of a checkpoint"""

    predict: str | None = option(
        None,
        "classify an image, the images of a folder, or a .npy array [N, 3, H, W] of normalised floats",
        metavar="PATH",
        resume=OF_CALL,
    )
    weights: str = option(
        "auto", "which weights; auto is the moving average where there is one", choices=WEIGHTS, resume=OF_CALL
    )
    split: str | None = option(
        None,
        "what to evaluate on",
        choices=("val", "test"),
        default_text="test where there is one, else val",
        resume=OF_CALL,
    )
    benchmark: bool = option(
        False,
        "after the evaluation, time the networks beside the undivided one: latency.md, .json and .png",
        bare="1",
        resume=OF_CALL,
    )
    large: str | None = option(
        None,
        "for --benchmark, checkpoint of the undivided network; without it its weights are random",
        metavar="PATH",
        resume=OF_CALL,
    )
    metrics: str | None = option(
        None,
        "further figures, from the logits of all images at once: a comma list, such as aurc",
        metavar="NAMES",
        resume=OF_CALL,
    )
    devices: str | None = option(
        None,
        "for --benchmark, GPUs to spread the networks over, as cuda:0,cuda:1; one device is timed anyway",
        resume=OF_CALL,
    )

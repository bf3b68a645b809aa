"""Flags of eval.py beside those of a training run."""

from dataclasses import dataclass
from typing import ClassVar

from model.options import WEIGHTS
from utils.options import OF_CALL, Options, option
from utils.program import program_name

CALIBRATIONS = ("none", "ensemble", "networks", "both", "stages")
TARGETS = ("no_loss", "budget", "best")  # of a cascade
CASCADE_KINDS = ("leave", "window")
TTA = ("none", "flip")
CONFIDENCES = ("margin", "max_prob", "entropy")
PROGRAM = program_name("eval.py", "eval")
SAVES_MEMORY = "a smaller --eval_batch_size or --execution loop"  # flags, for the line of an evaluation without memory


@dataclass(frozen=True, kw_only=True)
class EvalOptions(Options):
    """Evaluation of a checkpoint"""

    usage: ClassVar[str] = "%(prog)s RUN_DIR|CHECKPOINT [--predict PATH] [--flag VALUE ...] [KEY VALUE ...]"
    about: ClassVar[str] = (
        "Evaluate the best checkpoint of a run, or another one: every network, every ensemble rule. With --predict, "
        "classify images."
    )

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
    tta: str = option(
        "none",
        "answer for the mean of the logits of every image and its mirror image (at twice the time)",
        choices=TTA,
        resume=OF_CALL,
    )
    benchmark: bool = option(
        False,
        "after the evaluation, time the networks, and their tuned cascade, beside the undivided one: latency.md, .json "
        "and .png",
        bare="1",
        resume=OF_CALL,
    )
    large: str | None = option(
        None,
        "for --benchmark and cascades, checkpoint of the undivided network; without it its weights are random",
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
    tune: str | None = option(
        None,
        "fit on held-out images and write a tuned checkpoint: a comma list of calibration, cascade, conformal, or all",
        metavar="LIST",
        resume=OF_CALL,
    )
    tune_on: str = option(
        "val",
        "images that --tune fits on: val (what --val_fraction or a val/ held out), a folder DIR/<class>/*, or test:F, "
        "a part of the test images, which then is not reported",
        metavar="val|DIR|test:F",
        resume=OF_CALL,
    )
    answers: str | None = option(
        None, "answers.json of a --tune in place of what the checkpoint holds", metavar="FILE", resume=OF_CALL
    )
    answer: str = option(
        "ensemble", "for --predict and exports, who answers", choices=("ensemble", "cascade"), resume=OF_CALL
    )
    calibrate: str = option(
        "ensemble",
        "temperatures of probabilities: of the ensemble, of each network, of both, or of a cascade's stages",
        choices=CALIBRATIONS,
        resume=OF_CALL,
    )
    cascade_target: str = option("no_loss", "what thresholds are chosen for", choices=TARGETS, resume=OF_CALL)
    cascade_tolerance: float = option(
        0.25, "for no_loss, held-out accuracy that a cascade may lose", unit="points", least=0, resume=OF_CALL
    )
    cascade_margin: float = option(
        1.0, "for no_loss, standard errors of the loss that are added to it", least=0, resume=OF_CALL
    )
    cascade_budget: float = option(
        0.6,
        "for budget, average MACs: up to 1 a part of the ensemble's, above it MACs",
        above=0,
        resume=OF_CALL,
    )
    cascade_confidence: str = option(
        "margin", "how sure an answer is, by its probabilities", choices=CONFIDENCES, resume=OF_CALL
    )
    cascade_thresholds: str = option(
        "one", "one threshold for all stages, or one for each", choices=("one", "each"), resume=OF_CALL
    )
    cascade_order: str = option(
        "greedy", "networks as they help most, or in their order", choices=("greedy", "given"), resume=OF_CALL
    )
    cascade_kind: str = option(
        "leave",
        "images leave when sure, or go on only around a threshold of acceptance",
        choices=CASCADE_KINDS,
        resume=OF_CALL,
    )
    window_for: str = option(
        "risk:0.05",
        "operating point of a window: risk:R (most images at that error), coverage:C or tpr:C (that part is kept)",
        metavar="NAME:SHARE",
        resume=OF_CALL,
    )
    window_width: float = option(
        0.1, "part of the images to each side of the point that goes on", above=0, most=0.5, resume=OF_CALL
    )
    uncertainty: bool = option(
        False, "report what the ensemble knows about its doubt: uncertainty.json, .md and pictures", resume=OF_CALL
    )
    ood: str | None = option(
        None,
        "sets of images that are none of the classes: folders, .npy arrays [N, H, W, 3] of uint8, or NAME:DIR of "
        "--dataset NAME",
        metavar="SET[,SET]",
        resume=OF_CALL,
    )
    shift: str | None = option(
        None, "corrupted images with labels, laid out as CIFAR-C or ImageNet-C", metavar="DIR", resume=OF_CALL
    )
    conformal: str | None = option(
        None,
        "sets of classes that miss the true one at most so often; half of the held-out images are for their quantiles",
        metavar="ALPHA[,ALPHA]",
        resume=OF_CALL,
    )
    conformal_randomised: bool = option(False, "draw u for each image of APS and RAPS sets", resume=OF_CALL)

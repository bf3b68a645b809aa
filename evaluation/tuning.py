"""Fitting answers on held-out images, and the tuned checkpoint. S networks, N images, K classes."""

import logging
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dataset.holdout import split_indices
from evaluation.answers import Answers, CascadeAnswers
from evaluation.calibration import (
    Temperatures,
    calibrated_log_probs,
    calibration_figures,
    check_finite,
    chunks,
    fit_stages,
    fit_temperatures,
    scores_of,
)
from evaluation.cascade import (
    Choice,
    EachStage,
    Stages,
    Target,
    at_stage,
    choose_shared,
    curve_of,
    fit_window,
    greedy_order,
    leave_stages,
    run_stages,
    shared_walks,
    walk_of,
    window_stages,
)
from evaluation.collecting import Logits, collect_logits
from evaluation.conformal import KINDS, Conformal, fit_conformal, parse_alphas
from evaluation.held_out import HeldOut, check_enough
from evaluation.options import EvalOptions
from evaluation.selective import OPERATING_POINTS, operating_point
from evaluation.session import Session
from model.splitnet import SplitNet
from record import checkpoint as ckpt
from utils.errors import UserError
from utils.macs import count_macs
from utils.seed import STREAM_SPLIT, numpy_generator

logger = logging.getLogger("eval")

PARTS = ("calibration", "cascade", "conformal")
CURVE = 30  # cascades of a curve
IMAGES_EACH = 2000  # held-out images for every threshold of --cascade_thresholds each
UNIFORM_HELD_OUT, UNIFORM_TEST = 2, 3  # streams of u, behind STREAM_SPLIT
# of a run, and of no use to an evaluation
RUN_ONLY = frozenset(
    {
        *("optimizer", "scaler", "rng", "method", "sampler", "meters", "clock", "guard", "report", "environment"),
        *("parameters", "new_heads"),
    }
)


@dataclass(frozen=True)
class Request:
    """What --tune and its flags ask for.

    Attributes:
        cascade: whether a cascade is chosen.
        alphas: of conformal sets; empty without.
        point, share: the operating point of a window.
    """

    options: EvalOptions
    cascade: bool
    alphas: Sequence[float]
    point: str
    share: float

    @classmethod
    def of(cls, options: EvalOptions, num_networks: int, given: Mapping[str, Any]) -> "Request":
        """Checked against each other and against S.

        Raises:
            UserError: flags that do not fit.
        """
        asked = [part.strip() for part in (options.tune or "").split(",")]
        unknown = [part for part in asked if part not in (*PARTS, "all")]
        if unknown:
            raise UserError(f"--tune {options.tune}: {unknown[0]!r} is none of {', '.join(PARTS)}, all.")
        if "cascade" in asked and num_networks == 1:
            raise UserError("--tune cascade: there is one network, and a cascade needs two or more.")
        if "conformal" in asked and options.conformal is None:
            raise UserError("--tune conformal: add --conformal ALPHA, such as 0.1.")
        window = options.cascade_kind == "window"
        if window and (options.calibrate == "none" or given.get("cascade_confidence", "max_prob") != "max_prob"):
            raise UserError(
                "--cascade_kind window decides by max_prob with a temperature for each stage: leave "
                "--cascade_confidence and --calibrate none away."
            )
        point, share = read_point(options.window_for)
        return cls(
            options=options,
            cascade=num_networks > 1 and ("cascade" in asked or "all" in asked),
            alphas=read_alphas(options) if {"conformal", "all"} & set(asked) else [],
            point=point,
            share=share,
        )

    @property
    def target(self) -> Target:
        """What thresholds are chosen for."""
        options = self.options
        return Target(options.cascade_target, options.cascade_tolerance, options.cascade_margin, options.cascade_budget)


def read_alphas(options: EvalOptions) -> Sequence[float]:
    """The numbers of --conformal; none without it.

    Raises:
        UserError: one is not in (0, 1).
    """
    if options.conformal is None:
        return []
    try:
        return parse_alphas(options.conformal)
    except ValueError:
        raise UserError(
            f"--conformal {options.conformal}: expected numbers above 0 and below 1, such as 0.1."
        ) from None


def read_point(text: str) -> tuple[str, float]:
    """The name and the share of --window_for.

    Raises:
        UserError: not such a point.
    """
    name, _, number = text.partition(":")
    try:
        share = float(number)
    except ValueError:
        share = math.nan
    if name not in OPERATING_POINTS or not 0 < share < 1:
        raise UserError(
            f"--window_for {text}: expected risk:R, coverage:C or tpr:C, with a number above 0 and below 1."
        )
    return name, share


def uniform_of(seed: int, stream: int, images: int) -> Tensor:
    """u of randomised conformal sets: a function of the seed and the number of the image; float64 [N]."""
    return torch.from_numpy(numpy_generator(seed, STREAM_SPLIT, stream).random(images))


def macs_of(session: Session) -> tuple[int, ...]:
    """MACs of every network for one image."""
    assert isinstance(session.network, SplitNet)
    crop = session.info.crop_size
    return tuple(count_macs(network, (3, crop, crop)) for network in session.network.models)


def tune(session: Session, request: Request, held_out: HeldOut) -> tuple[Answers, Logits]:
    """Fit everything that was asked for, in one order: temperatures, order, stages, thresholds, quantiles.

    Returns:
        the answers, the same in every process, and the logits that temperatures and thresholds were fitted on.

    Raises:
        UserError: a budget below the first network; too few images that can be read.
        RunError: a logit that is not finite; as `collect_logits`.
    """
    logits = collect_logits(
        session,
        held_out.images,
        recipe=held_out.recipe,
        mean=held_out.mean,
        std=held_out.std,
        what=f"--tune_on {held_out.source}",
    )
    check_enough(held_out.source, len(logits.labels_N))  # --on_bad_image skip may have left some out
    check_finite(logits.logits_SNK, "held-out images")
    began = time.perf_counter()
    tuned, quantiles = logits, None
    if request.alphas:
        generator = numpy_generator(session.seed, STREAM_SPLIT, 1)
        first, second = split_indices(logits.labels_N, 0.5, generator)
        tuned, quantiles = (Logits(logits.logits_SNK[:, part], logits.labels_N[part]) for part in (first, second))
    answers = fit(
        tuned.logits_SNK,
        tuned.labels_N,
        request,
        rule=session.rule,
        macs=macs_of(session) if request.cascade else (),
        identity={
            "weights": session.info.weights,
            "weights_sha256": session.weights_sha256,
            "tuned_on": {
                "source": held_out.source,
                "images": len(tuned.labels_N),
                "conformal_images": 0 if quantiles is None else len(quantiles.labels_N),
                "sha256": held_out.sha256,
                "also_chose_epoch": held_out.also_chose_epoch,
            },
        },
    )
    if quantiles is not None:
        answers = replace(answers, conformal=fit_sets(answers, quantiles, request, session.seed))
    logger.info("fitting on %d held-out images took %.1f s", len(logits.labels_N), time.perf_counter() - began)
    return answers, tuned


def fit(
    logits_SNK: Tensor,
    labels_N: Tensor,
    request: Request,
    *,
    rule: str,
    macs: Sequence[int],
    identity: Mapping[str, Any],
) -> Answers:
    """Temperatures and a cascade, as far as they were asked for.

    Args:
        logits_SNK, labels_N: of held-out images.
        macs: of every network; not needed without a cascade.
        identity: the fields of `Answers` that say what it is for.
    """
    options = request.options
    mode = options.calibrate
    fitted = None if mode == "none" else fit_temperatures(logits_SNK, labels_N, rule)
    own = None if fitted is None else fitted.of_networks(mode)
    cascade, stages = None, None
    if request.cascade:
        networks = len(logits_SNK)
        order = (
            list(range(networks))
            if options.cascade_order == "given"
            else greedy_order(logits_SNK, labels_N, macs, rule, own)
        )
        if fitted is not None:
            fitted = replace(fitted, stages=fit_stages(logits_SNK, labels_N, rule, order, own))
        cascade, stages = _choose(logits_SNK, labels_N, request, rule, order, macs, own, fitted)
    answers = Answers(rule=rule, mode=mode, temperatures=fitted, cascade=cascade, held_out={}, **identity)
    rows = calibration_rows(answers, logits_SNK, labels_N, "held_out", stages)
    return replace(answers, held_out={"calibration": rows})


def _choose(
    logits_SNK: Tensor,
    labels_N: Tensor,
    request: Request,
    rule: str,
    order: Sequence[int],
    macs: Sequence[int],
    own: Sequence[float] | None,
    fitted: Temperatures | None,
) -> tuple[CascadeAnswers, Stages]:
    """(the cascade, what its stages say of the images)."""
    options, target = request.options, request.target
    kind = "max_prob" if options.cascade_kind == "window" else options.cascade_confidence
    stages = run_stages(
        logits_SNK,
        order,
        rule,
        kind,
        temperatures_S=own,
        stage_temperatures=None if fitted is None else fitted.stages,
        labels_N=labels_N,
    )
    right_SN, ordered = stages.predictions_SN == labels_N, [macs[s] for s in order]
    described: dict[str, Any]
    bounds: list[tuple[float, ...]]
    if options.cascade_kind == "window":
        windows = [
            fit_window(stages.confidence_SN[k], ~right_SN[k], request.point, request.share, options.window_width)
            for k in range(len(order) - 1)
        ]
        edges = [(one.low, one.high) for one in windows]
        bounds = [*edges]
        stage_N = window_stages(stages.confidence_SN, edges)
        described = {"name": "window", "window_for": options.window_for, "width": options.window_width}
        chosen = Choice([], walk_of(stage_N, right_SN, ordered))
        curve: Sequence[Choice] = []
    else:
        chosen, curve = _choose_thresholds(stages, right_SN, request, target, ordered)
        bounds = [(threshold,) for threshold in chosen.thresholds]
        described = {
            "name": target.name,
            "tolerance": target.tolerance,
            "margin": target.margin,
            "budget": target.budget,
            "thresholds": options.cascade_thresholds,
        }
        stage_N = leave_stages(stages.confidence_SN, chosen.thresholds)
    final_N, right_N = at_stage(stages.confidence_SN, stage_N), at_stage(right_SN, stage_N)
    accept = operating_point(final_N, ~right_N, request.point, request.share).tau
    images = len(labels_N)
    alone = [float((one_NK.argmax(dim=-1) == labels_N).double().mean()) for one_NK in logits_SNK]
    chosen_cascade = CascadeAnswers(
        kind=options.cascade_kind,
        order=tuple(order),
        confidence=kind,
        bounds=tuple(bounds),
        accept=accept,
        target=described,
        macs=tuple(macs),
        held_out={
            **held_out_figures(chosen, images),
            "lost": chosen.walk.lost,
            "won": chosen.walk.won,
            "left": list(chosen.walk.left_S),
            "networks_acc1": [100 * value for value in alone],
            "stages_acc1": [100 * value for value in right_SN.double().mean(dim=1).tolist()],
            "curve": [{"thresholds": one.thresholds, **held_out_figures(one, images)} for one in curve],
        },
    )
    return chosen_cascade, stages


def held_out_figures(choice: Choice, images: int) -> dict[str, float]:
    """Accuracy in percent and average MACs."""
    return {"acc1": 100 * choice.walk.right / images, "average_macs": choice.walk.macs / images}


def _choose_thresholds(
    stages: Stages, right_SN: Tensor, request: Request, target: Target, macs: Sequence[int]
) -> tuple[Choice, Sequence[Choice]]:
    """(the chosen thresholds, those of the curve)."""
    if request.options.cascade_thresholds == "one":
        walks = shared_walks(stages.confidence_SN, right_SN, macs)
        return choose_shared(walks, target, macs), curve_of(walks, CURVE)
    needed = IMAGES_EACH * (len(macs) - 1)
    if right_SN.shape[1] < needed:
        logger.warning(
            "--cascade_thresholds each: %d held-out images for %d thresholds; below %d one threshold is safer.",
            right_SN.shape[1],
            len(macs) - 1,
            needed,
        )
    each = EachStage(stages.confidence_SN, right_SN, macs)
    return each.choose(target), each.pareto(CURVE)


def fit_sets(answers: Answers, images: Logits, request: Request, seed: int) -> tuple[Conformal, ...]:
    """Every kind of set at every alpha."""
    probs_NK = log_probs_of(answers, images.logits_SNK).exp()
    uniform_N = uniform_of(seed, UNIFORM_HELD_OUT, len(images.labels_N))
    randomised = request.options.conformal_randomised
    return tuple(
        fit_conformal(probs_NK, images.labels_N, kind, alpha, uniform_N if randomised and kind != "thr" else None)
        for alpha in request.alphas
        for kind in KINDS
    )


def log_probs_of(answers: Answers, logits_SNK: Tensor, mode: str | None = None) -> Tensor:
    """Log-probabilities of the ensemble, calibrated as the answers are or as `mode` says: float64 [N, K]."""
    mode = answers.mode if mode is None else mode
    return torch.cat(
        [
            calibrated_log_probs(logits_SNK[:, part], answers.rule, mode, answers.temperatures)
            for part in chunks(logits_SNK.shape[1])
        ]
    )


def calibration_rows(
    answers: Answers, logits_SNK: Tensor, labels_N: Tensor, split: str, stages: Stages | None
) -> list[dict[str, str | float | None]]:
    """Figures before and after calibration of the ensemble, each network, and the cascade: one row for each.

    Args:
        stages: of the cascade, if there is one, on these images.
    """
    fitted, rows = answers.temperatures, []

    def add(what: str, when: str, log_probs_NK: Tensor) -> None:
        figures = calibration_figures(log_probs_NK, labels_N)
        rows.append({"what": what, "when": when, "split": split, **figures})

    modes = {"before": "none", "after": answers.mode}
    for when, mode in modes.items():
        add("ensemble", when, log_probs_of(answers, logits_SNK, mode))
    for s, one_NK in enumerate(logits_SNK):
        for when, temperature in (("before", 1.0), ("after", 1.0 if fitted is None else fitted.networks[s])):
            add(f"network {s + 1}", when, (one_NK.double() / temperature).log_softmax(dim=-1))
    if answers.cascade is not None:
        assert stages is not None
        stage_N = answers.cascade.leave(stages.confidence_SN)
        scores_NK = cascade_scores(answers, logits_SNK, stage_N)
        add("cascade", "before", scores_NK.log_softmax(dim=-1))
        add("cascade", "after", answers.stage_log_probs(scores_NK, stage_N))
    return rows


def cascade_scores(answers: Answers, logits_SNK: Tensor, stage_N: Tensor) -> Tensor:
    """Scores of the stage at which every image left, not divided by its temperature: float64 [N, K]."""
    assert answers.cascade is not None
    own = answers.network_temperatures()
    scores_NK = torch.empty(logits_SNK.shape[1:], dtype=torch.float64)
    for k in range(len(answers.cascade.order)):
        first = list(answers.cascade.order[: k + 1])
        rows = (stage_N == k).nonzero().squeeze(1)
        temperatures = None if own is None else [own[s] for s in first]
        for part in rows.split(4096):
            scores_NK[part] = scores_of(logits_SNK[first][:, part], answers.rule, temperatures)
    return scores_NK


def tuned_path(checkpoint: Path, folder: Path) -> Path:
    """model_best.pth.tar -> model_best.tuned.pth.tar in `folder`."""
    suffix = ".pth.tar"
    stem = checkpoint.name.removesuffix(suffix) if checkpoint.name.endswith(suffix) else checkpoint.stem
    return folder / f"{stem}.tuned{suffix}"


def write_tuned(session: Session, answers: Answers, folder: Path) -> Path:
    """Write the tuned checkpoint and answers.json; the run's own checkpoint is left alone.

    Raises:
        WriteError: the disk is full.
        UserError: the checkpoint is not there any more, or the folder holds it under the new name.
    """
    path = tuned_path(session.checkpoint, folder)
    content = ckpt.load_checkpoint(session.checkpoint)
    if content and all(isinstance(value, Tensor) for value in content.values()):  # the plain weights of one network
        content = {"state_dict": content}
    kept = {key: value for key, value in content.items() if key not in RUN_ONLY}
    ckpt.write_file(folder / "answers.json", answers.as_json())
    ckpt.save_checkpoint({**kept, "answers": answers.as_dict()}, path)
    return path

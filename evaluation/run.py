"""What eval.py does with a session: an evaluation, a prediction, a timing; and what it prints and writes."""

import json
import logging
import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from evaluation.answer_report import AnswerReport, check_flags, report_mode
from evaluation.answered import CascadeLogits, answer_images, cascade_summary
from evaluation.answers import Answers
from evaluation.collecting import Logits
from evaluation.contenders import CascadeContender, Contender, compare_latencies, undivided
from evaluation.counts import logits_figures
from evaluation.files import evaluation_results, write_evaluation, write_latencies
from evaluation.held_out import open_reported, reported_images
from evaluation.latency import Latency, as_plain
from evaluation.metrics import LogitsMetric, metrics
from evaluation.options import PROGRAM, SAVES_MEMORY, EvalOptions
from evaluation.passes import evaluate
from evaluation.per_image import ImageAnswers, image_table
from evaluation.prediction import predict, write_prediction
from evaluation.session import (
    Session,
    class_names_and_statistics,
    open_inputs,
    open_large,
    open_session,
    output_folder,
    prediction_folder,
)
from evaluation.shift import mean as mean_of_known
from parser_params import Config, parse_config
from record.checkpoint import write_file
from record.logger import set_up_text_log
from record.run_folder import PREDICTIONS, RESULTS, as_json
from record.screen import watched
from utils import distributed, launch
from utils.cpus import settle_threads
from utils.errors import RunError, UserError
from utils.plain_json import plain_json
from utils.program import Output, run_program, show
from utils.text import escaped

logger = logging.getLogger("eval")

CASCADE_IMAGES = 1024  # that a cascade is timed on


def run_evaluation(session: Session) -> dict[str, Any]:
    """Evaluate on the split that --split names and, with --benchmark, time the networks; process 0 writes and prints.

    Returns:
        figures in percent, nats and [0, 1]: see `EvaluationCounts.result`; those of --benchmark under `latency`.

    Raises:
        UserError: as `open_reported` and `AnswerReport.open`.
        RunError: an unreadable image under --on_bad_image fail, no readable image, a full disk.
    """
    folder = output_folder(session)
    timing = Timing.open(session)
    answers = AnswerReport.open(session, folder)
    evaluated = evaluate_session(session, keep_logits=answers is not None)
    results = evaluated.results
    results["results_dir"] = str(folder)
    more = None if answers is None or evaluated.logits is None else answers.collect(evaluated.logits)
    if session.world.is_main:
        classes = tuple(results["per_class_acc"])
        write_file(folder / f"{results['split']}_predictions.csv", evaluated.table())
        show(write_evaluation(plain_json(results), evaluated.confusion_KK, classes, folder))
        if answers is not None and more is not None:
            found, tables = answers.write(more)
            results |= found
            write_file(folder / RESULTS, as_json(results))
            show(f"\n{tables}")
        if timing is not None:
            rows = timing.run(results, None if answers is None else answers.answers)
            results["latency"] = as_plain(rows)
            write_file(folder / RESULTS, as_json(results))
            show(f"\n{write_latencies(rows, folder)}")
    return results


@dataclass(frozen=True)
class Timing:
    """What --benchmark does once the ensemble's accuracy is known.

    Attributes:
        session: whose networks are timed.
        large: the undivided network beside them, if there is one.
        devices: several GPUs to spread the networks over.
    """

    session: Session
    large: Contender | None
    devices: Sequence[torch.device]

    @classmethod
    def open(cls, session: Session) -> Self | None:
        """Made before the evaluation, so that wrong flags fail before it; None without --benchmark.

        Raises:
            UserError: flags that do not fit, --large is no checkpoint of one network for these classes, or --devices
                names something else than GPUs.
        """
        info, options, world = session.info, session.options, session.world
        if not options.benchmark:
            if options.devices is not None or (options.large is not None and not AnswerReport.is_asked(session)):
                raise UserError(
                    "--large and --devices are for --benchmark, --large also for tuned answers and --uncertainty: add "
                    "it, or leave them away."
                )
            return None
        if world.world_size > 1:
            raise UserError(f"--benchmark times one process, and this job has {world.world_size}: start it alone.")
        devices = launch.named_gpus("--devices", options.devices)
        divided = len(info.archs) == 1 and info.split_factor > 1
        large = Contender("undivided", undivided(info.request), None) if divided else None
        if options.large is not None:
            other = open_large(session)
            accuracy = evaluate_session(other, with_further=False).results["ensemble_acc1"]
            large = Contender("undivided", other.network, accuracy)
        return cls(session, large, devices)

    def run(self, results: Mapping[str, Any], answers: Answers | None) -> list[Latency]:
        """Time the networks in every way of running them, and the cascade of `answers` if there is one.

        Args:
            results: of the evaluation.
        """
        info, accuracy = self.session.info, results["ensemble_acc1"]
        has_cascade = answers is not None and answers.cascade is not None
        return compare_latencies(
            Contender(f"{','.join(info.archs)}, S = {info.num_networks}", self.session.network, accuracy),
            self.large,
            crop_size=info.crop_size,
            device=self.session.world.device,
            precision=self.session.precision,
            devices=self.devices,
            cascade=self._cascade(results, answers) if answers is not None and has_cascade else None,
        )

    def _cascade(self, results: Mapping[str, Any], answers: Answers) -> CascadeContender:
        """On test images that are reported, in an order by the seed."""
        session, cascade = self.session, answers.cascade
        assert cascade is not None
        first = cascade.order[0]
        chosen = next(row for row in results["cascade"]["rows"] if row["chosen"])
        return CascadeContender(
            over=answers.running_cascade,
            first=first,
            images_NCHW=reported_images(session, CASCADE_IMAGES, answers, shuffled=True),
            accuracy=chosen["test_acc1"],
            first_accuracy=results["networks"][first]["acc1"],
        )


class Evaluated(NamedTuple):
    """What was found on the split that --split names.

    Attributes:
        results: as results.json has them.
        confusion_KK: see `evaluation.passes.Evaluation`.
        table: makes `test_predictions.csv`, see `evaluation.per_image.image_table`; for the process that writes it.
        logits: of all images, where they were to be kept.
    """

    results: dict[str, Any]
    confusion_KK: Tensor
    table: Callable[[], str]
    logits: Logits | None


def evaluate_session(session: Session, *, with_further: bool = True, keep_logits: bool = False) -> Evaluated:
    """Evaluate; every process takes part.

    Raises:
        UserError, RunError: as `run_evaluation` and `further_metrics`.
    """
    info = session.info
    further = further_metrics(session.options.metrics) if with_further else []
    source = open_reported(session)
    # the statistics of a folder are those of its training images, which only the checkpoint knows
    mean, std = info.mean or source.mean, info.std or source.std
    loader = session.loader(source.test, info.data_recipe or source.recipe)
    images = ImageAnswers(session.rule, session.world.device)
    began = time.perf_counter()
    evaluation = evaluate(
        session.classifier,
        watched(loader, len(loader), f"evaluating {source.reported}", visible=session.world.is_main),
        prepare=session.prepare(mean, std),
        num_networks=info.num_networks,
        num_classes=info.num_classes,
        rule=session.rule,
        device=session.world.device,
        autocast_dtype=session.precision.autocast,
        all_reduce=distributed.all_reduce_sum,
        keep_logits=bool(further) or keep_logits,
        gather_rows=distributed.all_gather_rows,
        recorder=session.recorder(len(loader)),
        each=images.add,
    )
    answers_NC = images.gather(distributed.all_gather_rows)
    if further:
        assert evaluation.logits_SNK is not None
        assert evaluation.labels_N is not None
        more = logits_figures(further, evaluation.logits_SNK, evaluation.labels_N, session.rule)
        rules = {rule: row | more["rules"][rule] for rule, row in evaluation.figures["rules"].items()}
        evaluation = replace(evaluation, figures={**evaluation.figures, **more, "rules": rules})
    seconds = time.perf_counter() - began
    figures = evaluation.figures
    if figures["seen"] == 0:
        raise RunError(f"--data {session.config.data}: not one image of the {source.reported} split can be read.")
    classes = info.classes or source.classes
    results = {**session.header(), "split": source.reported} | evaluation_results(
        evaluation, classes, skipped=len(source.test) - figures["seen"], seconds=seconds
    )
    for path, why in loader.bad_images.items():
        logger.warning("left out: %s: %s", escaped(path), why)
    logits = None
    if keep_logits:
        assert evaluation.logits_SNK is not None
        assert evaluation.labels_N is not None
        logits = Logits(evaluation.logits_SNK, evaluation.labels_N)
    data = Path(session.config.data)
    table = partial(image_table, answers_NC, source.test, classes, data if data.is_dir() else data.parent)
    return Evaluated(results, evaluation.confusion, table, logits)


def further_metrics(names: str | None) -> list[str]:
    """The metrics that --metrics names.

    Raises:
        UserError: a name that is none, or of one that every evaluation has.
    """
    found = []
    for name in (part.strip() for part in (names or "").split(",") if part.strip()):
        if not isinstance(metrics.get(name), LogitsMetric):
            raise UserError(f"--metrics {name}: every evaluation has it; name only those that need all logits at once.")
        found.append(name)
    return found


def run_prediction(session: Session, path: Path) -> dict[str, Any]:
    """Classify images; process 0 writes predictions.csv, logits.npz and predictions.json, see `prediction_folder`.

    Raises:
        UserError: nothing to classify, or an array of another kind.
        RunError: an unreadable image under --on_bad_image fail, no readable image, a full disk.
    """
    folder = prediction_folder(session, path)
    info, precision = session.info, session.precision
    classes, mean, std = class_names_and_statistics(session)
    check_flags(session)
    answers, by_cascade = session.answers, session.options.answer == "cascade"
    network: nn.Module = session.classifier
    if by_cascade and answers is not None:
        network = CascadeLogits(answers.running_cascade(session.networks()))
    inputs = open_inputs(session, path, mean, std)
    prediction = predict(
        network,
        inputs.names,
        inputs.batches,
        num_networks=info.num_networks,
        num_classes=info.num_classes,
        rule=session.rule,
        device=session.world.device,
        dtype=precision.weights,
        autocast_dtype=precision.autocast,
        source=f"--predict {path}",
    )
    answered = None
    if answers is not None:
        mode = report_mode(session, answers)
        answered = answer_images(answers, mode, prediction.logits_SNK, by_cascade=by_cascade, seed=session.seed)
    disagreement = prediction.disagreement_N().tolist() if answered is None else answered.disagreement
    results = {
        **session.header(),
        "input": str(path.resolve()),
        "images": len(prediction.names),
        "skipped": len(inputs.names) - len(prediction.names),
        "rule": session.rule,
        "disagreement": mean_of_known(disagreement),
        "answer": session.options.answer,
        **(cascade_summary(answers, answered) if by_cascade and answers is not None and answered is not None else {}),
        "predictions": str(folder / "predictions.csv"),
        "logits": str(folder / "logits.npz"),
        "results_dir": str(folder),
    }
    if session.world.is_main:
        show("\n".join(write_prediction(prediction, classes, folder, answered)))
        write_file(folder / PREDICTIONS, as_json(results))
    return results


def run(config: Config) -> dict[str, Any]:
    """Evaluate or predict as `config` says, in this process of the job; returns the results.

    Raises:
        UserError, RunError: see `open_session`, `run_evaluation`, `run_prediction`.
    """
    gpus = config.gpus()
    world = launch.join(gpus, backend=config.dist_backend)
    set_up_text_log(None, rank=world.rank)
    logger.info("%s", settle_threads(config.threads, processes=world.local_size))
    if not config.no_cuda and (line := launch.unused_gpu()):
        logger.warning("%s", line)
    for line in config.warnings:
        logger.warning("%s", line)
    try:
        with launch.naming_lost_processes(world, "Start it again."):
            return _run(open_session(config, world, gpus))
    finally:
        launch.leave(world)


def _run(session: Session) -> dict[str, Any]:
    if session.precision.name == "fp32":
        torch.backends.cudnn.allow_tf32 = False  # of this program; a `load` in somebody else's leaves it alone
    info = session.info
    logger.info(
        "%s: %d x %s, %s weights, K = %d, on %s in %s",
        session.checkpoint,
        info.num_networks,
        ",".join(dict.fromkeys(info.archs)),
        "averaged" if info.weights == "ema" else "raw",
        info.num_classes,
        session.world.device,
        session.precision.name,
    )
    predict = session.options.predict
    if predict is not None and session.options.benchmark:
        raise UserError("--benchmark follows an evaluation, and --predict takes its place: use one of them.")
    return run_evaluation(session) if predict is None else run_prediction(session, Path(predict))


def output(results: Mapping[str, Any], *, as_json: bool) -> Output:
    """What an evaluation or a prediction ends with; its tables were shown before."""
    folder = results.get("results_dir")
    return Output(results, f"\nwritten: {folder}" if folder else "", as_json)


def evaluate_arguments(argv: list[str], config: Config | None = None) -> dict[str, Any]:
    """Evaluate as a command line says, starting the processes that it asks for; returns the results.

    Args:
        argv: the command line, for those processes.
        config: what it says, where it has been read already.

    Raises:
        UserError, RunError: as `run`.
        SystemExit: a started process failed and has said why.
    """
    config = config or parse_config(argv, program=PROGRAM, extra=EvalOptions)
    if not config.multiprocessing_distributed or launch.under_launcher():
        return run(config)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "results.json"
        config.start_processes(_worker, (argv, str(path)))
        results: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return results


def _worker(argv: list[str], path: str) -> None:
    """One process of the published launcher; the one on each node that comes first hands the results over."""

    def work(arguments: list[str]) -> None:
        results = run(parse_config(arguments, program=PROGRAM, extra=EvalOptions))
        if os.environ["LOCAL_RANK"] == "0":
            Path(path).write_text(json.dumps(plain_json(results)), encoding="utf-8")

    raise SystemExit(run_program(PROGRAM, work, argv, saves_memory=SAVES_MEMORY))

"""Evaluate a checkpoint, or classify images with it: `python eval.py --resume CHECKPOINT [--predict PATH]`.

Backbone, S, classes and normalisation come from the checkpoint; flags fill in what a released one does not say. The
last line of stdout is one JSON object, also in results.json of --model_dir, by default `eval/` beside the checkpoint.
"""

import dataclasses
import json
import logging
import os
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dataset import DataSource, ImageSet, SourceRequest, open_source
from dataset.loader import EvalLoader
from dataset.pipeline import build_eval_loader
from dataset.unlabelled import Inputs, array_inputs, file_inputs
from dataset.views import ViewMaker, plain_spec
from evaluation.contenders import Contender, compare_latencies, undivided
from evaluation.ensemble import ensemble_rule
from evaluation.files import evaluation_results, write_evaluation, write_latencies
from evaluation.latency import Latency, as_plain
from evaluation.passes import evaluate
from evaluation.prediction import predict, write_prediction
from method import methods
from model import backbones, split_list
from model.restore import WEIGHTS, NetworkInfo, restore_splitnet
from model.splitnet import SplitNet
from parser_params import Config, parse_config
from recipe.datasets import ROWS, open_row
from record import checkpoint as ckpt
from record.logger import plain_json, set_up_text_log
from record.run_folder import HPARAMS, RESULTS, as_json
from utils import distributed, launch
from utils.errors import RunError, UserError, reason
from utils.launch import World
from utils.options import Options, option
from utils.precision import Precision, choose_precision, lay_out

logger = logging.getLogger("eval")

# flags that are those of the training run unless they are given
INHERITED = ("dataset", "data", "method", "is_ensembled_after_softmax", "is_max_ensemble")


@dataclass(frozen=True, kw_only=True)
class EvalOptions(Options):
    """Evaluation of a checkpoint"""

    predict: str | None = option(
        None,
        "classify an image, the images of a folder, or a .npy array [N, 3, H, W] of normalised floats",
        metavar="PATH",
    )
    weights: str = option("auto", "which weights; auto is the moving average where there is one", choices=WEIGHTS)
    benchmark: bool = option(
        False, "after the evaluation, time the networks beside the undivided one: latency.md, .json and .png", bare="1"
    )
    large: str | None = option(
        None, "for --benchmark, checkpoint of the undivided network; without it its weights are random", metavar="PATH"
    )
    devices: str | None = option(
        None, "for --benchmark, GPUs to spread the networks over, as cuda:0,cuda:1; one device is timed anyway"
    )


@dataclass(frozen=True)
class Session:
    """What an evaluation works with.

    Attributes:
        config: flags, completed by those of the training run.
        checkpoint: the file.
        info: what the checkpoint says of its networks.
        seed: of the training run, for generated data.
        network: prepared images [B, 3, H, W] -> logits [S, B, K], in evaluation mode on its device.
    """

    config: Config
    checkpoint: Path
    info: NetworkInfo
    seed: int
    world: World
    precision: Precision
    network: nn.Module

    @property
    def options(self) -> EvalOptions:
        """The flags that only eval.py has."""
        return self.config.extra_options if isinstance(self.config.extra_options, EvalOptions) else EvalOptions()

    @property
    def rule(self) -> str:
        """The ensemble rule that is reported."""
        return ensemble_rule(self.config.is_ensembled_after_softmax, self.config.is_max_ensemble)

    def header(self) -> dict[str, Any]:
        """What all results begin with."""
        return {
            "checkpoint": str(self.checkpoint),
            "arch": ",".join(self.info.archs),
            "split_factor": self.info.num_networks,
            "dataset": self.config.dataset,
            "weights": self.info.weights,
            "precision": self.precision.name,
        }

    def prepare(self, mean: Sequence[float], std: Sequence[float]) -> Callable[[Tensor], Tensor]:
        """uint8 images -> normalised floats as the networks take them."""
        views, precision = ViewMaker(plain_spec(self.info.crop_size, mean, std), seed=0), self.precision
        return lambda images: views.evaluate(images, precision.weights, memory_format=precision.memory_format)

    def loader(self, split: ImageSet, recipe: str) -> EvalLoader:
        """This process's part of a split, cut as the recipe evaluates: large images as `eval_resize` says."""
        crop_pct = self.config.crop_pct if ROWS[recipe].is_large else 1.0
        options = replace(self.config, crop_size=self.info.crop_size, crop_pct=crop_pct)
        return build_eval_loader(split, options, self.world)


# ---- from flags to a session -----------------------------------------------------------------------------------------


def open_session(config: Config, world: World, gpus: list[int], flag: str = "--resume") -> Session:
    """Networks of --resume on their device, what is known of them, and flags completed by the training run's.

    Args:
        flag: that the checkpoint was given by; named in errors.

    Raises:
        UserError: no checkpoint, not one of networks, or one that contradicts the flags.
    """
    options = config.extra_options if isinstance(config.extra_options, EvalOptions) else EvalOptions()
    content, path = _read_checkpoint(config, flag)
    trained = content.get("config")
    trained = trained if isinstance(trained, Mapping) else {}
    given = config.given
    inherited = {
        name: trained[name]
        for name in INHERITED
        if name not in given and isinstance(trained.get(name), type(getattr(config, name)))
    }
    config = replace(config, extra_options=options, **inherited)
    network, info = restore_splitnet(
        content,
        arch=given.get("arch"),
        split_factor=given.get("split_factor"),
        dataset=config.dataset,
        num_classes=given.get("num_classes"),
        crop_size=given.get("crop_size"),
        options={name: given[name] for name in (*config.backbone_options, "output_stride") if name in given},
        train_separately=config.is_train_sep,
        backbone_names=_backbone_names(config, trained),
        weights=options.weights,
        source=f"{flag} {path}",
    )
    if config.crop_pct is None and info.archs[0] in backbones:
        config = replace(config, crop_pct=trained.get("crop_pct", backbones.get(info.archs[0]).crop_pct))
    seed = config.seed if config.seed is not None else trained.get("seed")
    # exact figures unless a precision is asked for
    amp_dtype = config.amp_dtype if "amp_dtype" in given else "fp32"
    precision = choose_precision(world.device, is_amp=config.is_amp, amp_dtype=amp_dtype)
    if precision.name == "fp32":
        torch.backends.cudnn.allow_tf32 = False
    return Session(
        config=config,
        checkpoint=path,
        info=info,
        seed=seed if isinstance(seed, int) else 0,
        world=world,
        precision=precision,
        network=_place(network, config, precision, world.device, gpus),
    )


def _read_checkpoint(config: Config, flag: str) -> tuple[dict[str, Any], Path]:
    if config.resume is None:
        raise UserError("--resume PATH is missing: the checkpoint to evaluate.")
    if config.resume != "auto":
        return ckpt.load_checkpoint(config.resume, flag), Path(config.resume)
    newest = ckpt.load_newest(Path(config.model_dir))
    if newest is None:
        raise UserError(f"--resume auto: --model_dir {config.model_dir} holds no checkpoint.")
    return newest


def _backbone_names(config: Config, trained: Mapping[str, Any]) -> Callable[[str], Sequence[str]]:
    """How the method that trained the networks reads --arch: some have names of their own for lists of backbones."""
    if config.method not in methods:
        return split_list
    kind = methods.get(config.method)
    options = config.method_options
    if trained:
        defaults = dataclasses.asdict(kind.Options())
        known = {k: trained[k] for k, v in defaults.items() if k in trained and isinstance(trained[k], type(v))}
        options = kind.Options(**known)
    return lambda arch: kind.backbone_names(arch, options)


def _place(network: SplitNet, config: Config, precision: Precision, device: torch.device, gpus: list[int]) -> nn.Module:
    network.to(device, precision.weights)
    lay_out(network, precision.memory_format)
    for flag in ("is_test_on_multigpus", "is_test_with_multistreams"):
        if getattr(config, flag) and device.type != "cuda":
            raise UserError(f"--{flag} 1 needs a GPU, and this run is on the CPU: leave it away.")
    if config.is_test_on_multigpus:
        if launch.under_launcher():
            raise UserError("--is_test_on_multigpus 1 spreads networks, and torchrun spreads images: use one of them.")
        network.spread([torch.device("cuda", number) for number in gpus])
    else:
        network.execution = "parallel" if config.is_test_with_multistreams else config.execution
    return network


def output_folder(session: Session) -> Path:
    """Where results go: --model_dir if given, but not over a training run's own; else `eval/` beside the checkpoint.

    Raises:
        UserError: the folder cannot be made.
    """
    folder = session.checkpoint.parent / "eval"
    if "model_dir" in session.config.given:
        given = Path(session.config.model_dir)
        folder = given / "eval" if (given / HPARAMS).exists() else given
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--model_dir {folder}: cannot be made: {reason(error)}.") from None
    return folder


def open_test_split(session: Session, *, download: bool = True) -> DataSource:
    """The data set to evaluate on.

    Raises:
        UserError: the data is missing, or its classes are not those of the networks.
    """
    config, info = session.config, session.info
    source = open_source(
        SourceRequest(
            dataset=config.dataset,
            root=Path(config.data),
            num_classes=info.num_classes if config.dataset == "synthetic" else None,
            crop_size=info.crop_size,
            seed=session.seed,
            splits=("test",),
            on_bad_image=config.on_bad_image,
            workers=config.workers,
            download=download,
        )
    )
    if len(source.classes) != info.num_classes:
        raise UserError(
            f"--dataset {config.dataset} has {len(source.classes)} classes and the networks of --resume have "
            f"{info.num_classes}: name the data set that they were trained on."
        )
    # numbers stand for names that the data set's files do not tell
    nameless = config.dataset == info.dataset and source.classes == _numbers(info.num_classes)
    if info.classes is not None and info.classes != source.classes and not nameless:
        at = next(i for i, name in enumerate(info.classes) if name != source.classes[i])
        raise UserError(
            f"--dataset {config.dataset} has other classes than the networks of --resume: class {at} is "
            f"{source.classes[at]!r} in the data and {info.classes[at]!r} in the checkpoint."
        )
    return source


def _numbers(count: int) -> tuple[str, ...]:
    return tuple(map(str, range(count)))


# ---- evaluation ------------------------------------------------------------------------------------------------------


def run_evaluation(session: Session) -> dict[str, Any]:
    """Evaluate on the test split and, with --benchmark, time the networks; process 0 writes and prints.

    Returns:
        figures in percent, nats and [0, 1]: see `EvaluationCounts.result`; those of --benchmark under `latency`.

    Raises:
        UserError: as `open_test_split`.
        RunError: an unreadable image under --on_bad_image fail, no readable image, a full disk.
    """
    folder = output_folder(session)
    timing = open_timing(session)
    results, confusion_KK = evaluate_session(session)
    results["results_dir"] = str(folder)
    if session.world.is_main:
        classes = tuple(results["per_class_acc"])
        print(write_evaluation(plain_json(results), confusion_KK, classes, folder), flush=True)
        if timing is not None:
            rows = timing(results["ensemble_acc1"])
            results["latency"] = as_plain(rows)
            ckpt.write_file(folder / RESULTS, as_json(results))
            print(f"\n{write_latencies(rows, folder)}", flush=True)
    return results


def open_timing(session: Session) -> Callable[[float], list[Latency]] | None:
    """What --benchmark does once the ensemble's accuracy is known; None without it.

    Raises:
        UserError: flags that do not fit, --large is no checkpoint of one network for these classes, or --devices
            names something else than GPUs.
    """
    info, options, world = session.info, session.options, session.world
    if not options.benchmark:
        if options.large is not None or options.devices is not None:
            raise UserError("--large and --devices are for --benchmark: add it, or leave them away.")
        return None
    if world.world_size > 1:
        raise UserError(f"--benchmark times one process, and this job has {world.world_size}: start it alone.")
    devices = launch.named_gpus("--devices", options.devices)
    divided = len(info.archs) == 1 and info.split_factor > 1
    large = Contender("undivided", undivided(info.request), None) if divided else None
    if options.large is not None:
        given = {flag: value for flag, value in session.config.given.items() if flag not in ("arch", "split_factor")}
        other = open_session(replace(session.config, resume=options.large, given=given), world, [], "--large")
        if other.info.num_networks != 1 or other.info.num_classes != info.num_classes:
            raise UserError(f"--large {options.large}: expected one network for {info.num_classes} classes.")
        large = Contender("undivided", other.network, evaluate_session(other)[0]["ensemble_acc1"])

    def timing(accuracy: float) -> list[Latency]:
        name = f"{','.join(info.archs)}, S = {info.num_networks}"
        return compare_latencies(
            Contender(name, session.network, accuracy),
            large,
            crop_size=info.crop_size,
            device=world.device,
            precision=session.precision,
            devices=devices,
        )

    return timing


def evaluate_session(session: Session) -> tuple[dict[str, Any], Tensor]:
    """Figures on the test split, and the confusion matrix [K, K]; raises as `run_evaluation`."""
    info = session.info
    source = open_test_split(session) if session.world.is_main else None
    distributed.barrier()  # process 0 first, because it may download
    source = source or open_test_split(session)
    # the statistics of a folder are those of its training images, which only the checkpoint knows
    mean, std = info.mean or source.mean, info.std or source.std
    loader = session.loader(source.test, info.data_recipe or source.recipe)
    began = time.perf_counter()
    evaluation = evaluate(
        session.network,
        loader,
        prepare=session.prepare(mean, std),
        num_networks=info.num_networks,
        num_classes=info.num_classes,
        rule=session.rule,
        device=session.world.device,
        autocast_dtype=session.precision.autocast,
        all_reduce=distributed.all_reduce_sum,
    )
    seconds = time.perf_counter() - began
    figures = evaluation.figures
    if figures["seen"] == 0:
        raise RunError(f"--data {session.config.data}: not one image of the test split can be read.")
    results = session.header() | evaluation_results(
        evaluation, info.classes or source.classes, skipped=len(source.test) - figures["seen"], seconds=seconds
    )
    for path, why in loader.bad_images.items():
        logger.warning("left out: %s: %s", path, why)
    return results, evaluation.confusion


# ---- prediction ------------------------------------------------------------------------------------------------------


def run_prediction(session: Session, path: Path) -> dict[str, Any]:
    """Classify images; process 0 writes predictions.csv and logits.npz (`logits` [S, N, K], `ensemble` [N, K]).

    Raises:
        UserError: nothing to classify, or an array of another kind.
        RunError: an unreadable image under --on_bad_image fail, no readable image, a full disk.
    """
    folder = output_folder(session)
    info, precision = session.info, session.precision
    classes, mean, std = class_names_and_statistics(session)
    inputs = open_inputs(session, path, mean, std)
    prediction = predict(
        session.network,
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
    results = {
        **session.header(),
        "images": len(prediction.names),
        "skipped": len(inputs.names) - len(prediction.names),
        "rule": session.rule,
        "disagreement": float(prediction.disagreement_N().mean()),
        "predictions": str(folder / "predictions.csv"),
        "logits": str(folder / "logits.npz"),
        "results_dir": str(folder),
    }
    if session.world.is_main:
        print("\n".join(write_prediction(prediction, classes, folder)), flush=True)
        ckpt.write_file(folder / RESULTS, as_json(results))
    return results


def open_inputs(session: Session, path: Path, mean: Sequence[float], std: Sequence[float]) -> Inputs:
    """What --predict names, prepared; files are cut as in evaluation."""
    info, world, precision = session.info, session.world, session.precision
    if path.suffix.lower() == ".npy":
        return array_inputs(
            path,
            rank=world.rank,
            world_size=world.world_size,
            batch_size=session.config.eval_batch_size,
            device=world.device,
            dtype=precision.weights,
            memory_format=precision.memory_format,
        )
    recipe = info.data_recipe or open_row(info.crop_size)
    return file_inputs(path, load=lambda split: session.loader(split, recipe), prepare=session.prepare(mean, std))


def class_names_and_statistics(session: Session) -> tuple[Sequence[str], Sequence[float], Sequence[float]]:
    """(K names, mean, std) for prediction: the checkpoint's; for a released one the data set's, as far as it is there.

    Raises:
        UserError: a released checkpoint, and a data set that has no published mean and deviation and is not there.
    """
    info, dataset = session.info, session.config.dataset
    if info.classes is not None and info.mean is not None and info.std is not None:
        return info.classes, info.mean, info.std
    try:
        source = open_test_split(session, download=False)
        return info.classes or source.classes, info.mean or source.mean, info.std or source.std
    except UserError as error:
        row = ROWS.get(dataset)
        if row is None or row.statistics is None:
            raise
        logger.info("class names are unknown, numbers stand for them: %s", error)
    mean, std = row.statistics
    return info.classes or _numbers(info.num_classes), info.mean or mean, info.std or std


# ---- entry -----------------------------------------------------------------------------------------------------------


def run(config: Config) -> dict[str, Any]:
    """Evaluate or predict as `config` says, in this process of the job; returns the results.

    Raises:
        UserError, RunError: see `open_session`, `run_evaluation`, `run_prediction`.
    """
    gpus = launch.visible_gpus(no_cuda=config.no_cuda, gpu=config.gpu, gpu_ids=config.gpu_ids)
    world = launch.join(gpus, backend=config.dist_backend)
    set_up_text_log(None, rank=world.rank)
    for line in config.warnings:
        logger.warning("%s", line)
    try:
        session = open_session(config, world, gpus)
        logger.info(
            "%s: %d x %s, %s weights, K = %d, on %s in %s",
            session.checkpoint,
            session.info.num_networks,
            ",".join(dict.fromkeys(session.info.archs)),
            "averaged" if session.info.weights == "ema" else "raw",
            session.info.num_classes,
            world.device,
            session.precision.name,
        )
        predict = session.options.predict
        if predict is not None and session.options.benchmark:
            raise UserError("--benchmark follows an evaluation, and --predict takes its place: use one of them.")
        return run_evaluation(session) if predict is None else run_prediction(session, Path(predict))
    finally:
        launch.leave(world)


def evaluate_arguments(argv: list[str]) -> dict[str, Any]:
    """Evaluate as a command line says, starting the processes that it asks for; returns the results.

    Raises:
        UserError, RunError: as `run`.
        SystemExit: a started process failed and has said why.
    """
    config = parse_config(argv, program="eval.py", extra=EvalOptions)
    if not config.multiprocessing_distributed or launch.under_launcher():
        return run(config)
    gpus = launch.visible_gpus(no_cuda=config.no_cuda, gpu=config.gpu, gpu_ids=config.gpu_ids)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "results.json"
        launch.spawn(
            _worker,
            (argv, str(path)),
            processes=config.nproc_per_node or len(gpus) or 1,
            nodes=config.world_size,
            node=config.rank,
            url=config.dist_url,
        )
        results: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return results


def _worker(argv: list[str], path: str) -> None:
    """One process of the published launcher; the one on each node that comes first hands the results over."""
    try:
        results = run(parse_config(argv, program="eval.py", extra=EvalOptions))
    except (UserError, RunError) as error:
        print(f"eval.py: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None
    if os.environ["LOCAL_RANK"] == "0":
        Path(path).write_text(json.dumps(plain_json(results)), encoding="utf-8")


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code: 0 done, 1 failed while running, 2 the user's mistake."""
    try:
        results = evaluate_arguments(sys.argv[1:] if argv is None else argv)
    except (UserError, RunError) as error:
        print(f"eval.py: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    if int(os.environ.get("RANK", "0")) == 0:
        print(json.dumps(plain_json(results)), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

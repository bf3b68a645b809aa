"""Evaluate a checkpoint, or classify images with it: `python eval.py --resume CHECKPOINT [--predict PATH]`.

Backbone, S, classes and normalisation come from the checkpoint; flags fill in what a released one does not say. The
last line of stdout is one JSON object, also in results.json of --model_dir, by default `eval/` beside the checkpoint.
"""

import csv
import dataclasses
import io
import json
import logging
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dataset import DataSource, ImageSet, SourceRequest, open_source
from dataset.class_folders import iterate_images
from dataset.loader import EvalLoader, shard
from dataset.pipeline import RESIZE_FACTOR
from dataset.source import cifar, imagenet
from dataset.views import ViewMaker, view_spec
from method import methods
from model import split_list
from model.concurrent import ConcurrentNetworks
from model.restore import WEIGHTS, NetworkInfo, restore_splitnet
from model.splitnet import SplitNet
from parser_params import Config, parse_config
from utils import checkpoint as ckpt
from utils import distributed
from utils.distributed import World
from utils.ensemble import ensemble_log_probs, ensemble_rule, ensemble_scores
from utils.errors import RunError, UserError, reason
from utils.evaluation import evaluate
from utils.logger import plain_json, set_up_text_log
from utils.options import option
from utils.plots import plot_confusion
from utils.precision import Precision, choose_precision

logger = logging.getLogger("eval")

# flags that are those of the training run unless they are given
INHERITED = ("dataset", "data", "method", "is_ensembled_after_softmax", "is_max_ensemble")
FIGURES = ("acc1", "acc5", "nll", "brier", "ece")
TOP = 5  # classes listed per image
SHOWN = 10  # predictions that are printed
SMALL_SIDE = 64  # pixels; larger crops are evaluated as on ImageNet where a checkpoint does not say

# mean and standard deviation of released checkpoints, where the data itself is not there
PUBLISHED_STATISTICS = {
    "cifar10": (cifar.CIFAR10_MEAN, cifar.CIFAR10_STD),
    "cifar100": (cifar.CIFAR100_MEAN, cifar.CIFAR100_STD),
    "svhn": ((0.4309, 0.4302, 0.4463), (0.1965, 0.1983, 0.1994)),
    "imagenet": (imagenet.MEAN, imagenet.STD),
}


@dataclass(frozen=True, kw_only=True)
class EvalOptions:
    """Evaluation of a checkpoint"""

    predict: str | None = option(
        None,
        "classify an image, the images of a folder, or a .npy array [N, 3, H, W] of normalised floats",
        metavar="PATH",
    )
    weights: str = option("auto", "which weights; auto is the moving average where there is one", choices=WEIGHTS)


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
        plain = view_spec(
            "digits",  # a row without any augmentation
            crop_size=self.info.crop_size,
            padding=0,
            is_autoaugment=False,
            randaa=None,
            is_cutout=False,
            erase_p=0.0,
            mean=(mean[0], mean[1], mean[2]),
            std=(std[0], std[1], std[2]),
        )
        views, precision = ViewMaker(plain, seed=0), self.precision
        return lambda images: views.evaluate(images, precision.weights, memory_format=precision.memory_format)

    def loader(self, split: ImageSet, recipe: str) -> EvalLoader:
        """This process's part of a split, cut as the recipe evaluates: large images at 1.15 times the crop."""
        crop = self.info.crop_size
        files = split.images is None
        return EvalLoader(
            split,
            batch_size=self.config.eval_batch_size,
            rank=self.world.rank,
            world_size=self.world.world_size,
            device=self.world.device,
            workers=self.config.workers,
            resize=(int(RESIZE_FACTOR * crop) if recipe == "imagenet" else crop) if files else None,
            crop=crop if files else None,
            on_bad_image=self.config.on_bad_image,
        )


# ---- from flags to a session -----------------------------------------------------------------------------------------


def open_session(config: Config, world: World, gpus: list[int]) -> Session:
    """Networks of --resume on their device, what is known of them, and flags completed by the training run's.

    Raises:
        UserError: no checkpoint, not one of networks, or one that contradicts the flags.
    """
    options = config.extra_options if isinstance(config.extra_options, EvalOptions) else EvalOptions()
    content, path = _read_checkpoint(config)
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
        source=f"--resume {path}",
    )
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


def _read_checkpoint(config: Config) -> tuple[dict[str, Any], Path]:
    if config.resume is None:
        raise UserError("--resume PATH is missing: the checkpoint to evaluate.")
    if config.resume != "auto":
        return ckpt.load_checkpoint(config.resume), Path(config.resume)
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
    network.to(memory_format=precision.memory_format)
    for flag in ("is_test_on_multigpus", "is_test_with_multistreams"):
        if getattr(config, flag) and device.type != "cuda":
            raise UserError(f"--{flag} 1 needs a GPU, and this run is on the CPU: leave it away.")
    if config.is_test_on_multigpus:
        if distributed.under_launcher():
            raise UserError("--is_test_on_multigpus 1 spreads networks, and torchrun spreads images: use one of them.")
        return ConcurrentNetworks(network, [torch.device("cuda", number) for number in gpus])
    return ConcurrentNetworks(network, [device]) if config.is_test_with_multistreams else network


def output_folder(session: Session) -> Path:
    """Where results go: --model_dir if given, but not over a training run's own; else `eval/` beside the checkpoint.

    Raises:
        UserError: the folder cannot be made.
    """
    folder = session.checkpoint.parent / "eval"
    if "model_dir" in session.config.given:
        given = Path(session.config.model_dir)
        folder = given / "eval" if (given / "hparams_train.json").exists() else given
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
    """Evaluate on the test split; process 0 writes and prints.

    Returns:
        figures in percent, nats and [0, 1]: see `EvaluationCounts.result`.

    Raises:
        UserError: as `open_test_split`.
        RunError: an unreadable image under --on_bad_image fail, no readable image, a full disk.
    """
    info = session.info
    folder = output_folder(session)
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
    figures, confusion_KK = evaluation.figures, evaluation.confusion
    if figures["seen"] == 0:
        raise RunError(f"--data {session.config.data}: not one image of the test split can be read.")
    classes = info.classes or source.classes
    per_class_K = 100.0 * confusion_KK.diagonal().double() / confusion_KK.sum(dim=1)
    results = {
        **session.header(),
        "images": figures["seen"],
        "skipped": len(source.test) - figures["seen"],
        "networks": [
            {"network": i + 1, **{name: figures[name][i] for name in FIGURES}} for i in range(info.num_networks)
        ],
        "ensembles": figures["rules"],
        "rule": figures["rule"],
        **{f"ensemble_{name}": figures[f"ensemble_{name}"] for name in FIGURES},
        "acc1": figures["acc1"],
        "disagreement": figures["disagreement"],
        "mean_pairwise_js": figures["js_divergence"],
        "per_class_acc": dict(zip(classes, per_class_K.tolist(), strict=True)),
        "seconds": round(seconds, 3),
        "images_per_second": round(figures["seen"] / max(seconds, 1e-9), 1),
        "results_dir": str(folder),
    }
    for path, why in loader.bad_images.items():
        logger.warning("left out: %s: %s", path, why)
    if session.world.is_main:
        table = format_table(results)
        rows = [(i, name, int(confusion_KK[i].sum()), f"{float(per_class_K[i]):.4f}") for i, name in enumerate(classes)]
        _write(folder / "results.json", json.dumps(plain_json(results), indent=2) + "\n")
        _write(folder / "table.md", table + "\n")
        _write(folder / "per_class.csv", _csv_text(("class", "name", "images", "acc1"), rows))
        plot_confusion(confusion_KK.numpy(), classes, folder / "confusion.png")
        print(table, flush=True)
    return results


def format_table(results: Mapping[str, Any]) -> str:
    """Every network and every ensemble rule as a Markdown table; the reported rule is marked."""
    rows = [(f"network {row['network']}", row) for row in results["networks"]]
    for rule, row in results["ensembles"].items():
        rows.append((f"{rule} (reported)" if rule == results["rule"] else rule, row))
    lines = ["| | top-1 % | top-5 % | NLL | Brier | ECE |", "|---|---:|---:|---:|---:|---:|"]
    for name, row in rows:
        cells = [_cell(row[figure], 2 if figure.startswith("acc") else 4) for figure in FIGURES]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    disagreement, js = results["disagreement"], results["mean_pairwise_js"]
    lines += [
        "",
        f"{results['images']} images; two networks disagree on {_cell(disagreement and 100 * disagreement, 2)} % of "
        f"them, their mean JS divergence is {_cell(js, 4)} nats.",
    ]
    return "\n".join(lines)


def _cell(value: float | None, digits: int) -> str:
    return "not finite" if value is None else f"{value:.{digits}f}"


def _csv_text(titles: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(titles)
    writer.writerows(rows)
    return text.getvalue()


def _write(path: Path, content: bytes | str) -> None:
    try:
        ckpt.write_file(path, content)
    except OSError as error:
        raise RunError(f"{path}: cannot be written: {reason(error)}.") from None


# ---- prediction ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Inputs:
    """What is to be classified, and this process's part of it, prepared for the networks.

    Attributes:
        names: of all inputs, N.
        batches: (int64 indices [B] into `names`, prepared images [B, 3, H, W]).
        classes: K names.
    """

    names: Sequence[str]
    batches: Iterable[tuple[Tensor, Tensor]]
    classes: Sequence[str]


def run_prediction(session: Session, predict: Path) -> dict[str, Any]:
    """Classify images; process 0 writes predictions.csv and logits.npz (`logits` [S, N, K], `ensemble` [N, K]).

    Raises:
        UserError: nothing to classify, or an array of another kind.
        RunError: an unreadable image under --on_bad_image fail, no readable image, a full disk.
    """
    folder = output_folder(session)
    inputs = array_inputs(session, predict) if predict.suffix.lower() == ".npy" else file_inputs(session, predict)
    info, device, rule = session.info, session.world.device, session.rule
    autocast = session.precision.autocast
    exact = torch.promote_types(session.precision.weights, torch.float32)
    indices: list[Tensor] = [torch.empty(0, dtype=torch.int64)]
    logits: list[Tensor] = [torch.empty(0, info.num_networks, info.num_classes, dtype=exact)]
    with torch.inference_mode(), torch.autocast(device.type, autocast, enabled=autocast is not None):
        for indices_B, images in inputs.batches:
            try:
                logits_SBK = session.network(images)
            except RuntimeError as error:  # too small for the strides, too large for the memory
                size = " x ".join(map(str, images.shape))
                raise RunError(f"--predict {predict}: the networks fail on a batch {size}: {reason(error)}") from None
            indices.append(indices_B.cpu())
            logits.append(logits_SBK.to("cpu", exact).transpose(0, 1))
    indices_N = distributed.all_gather_rows(torch.cat(indices).to(device)).cpu()
    logits_SNK = distributed.all_gather_rows(torch.cat(logits).to(device)).cpu().transpose(0, 1).contiguous()
    if not len(indices_N):
        raise RunError(f"--predict {predict}: not one image can be read.")

    names = [inputs.names[i] for i in indices_N.tolist()]
    log_probs_NK = ensemble_log_probs(logits_SNK, rule)
    best_N5 = log_probs_NK.topk(min(TOP, info.num_classes), dim=1)
    choices_SN = logits_SNK.argmax(dim=-1)
    pairs = max(info.num_networks * (info.num_networks - 1), 1)
    disagreement_N = (choices_SN[:, None] != choices_SN).sum(dim=(0, 1)).double() / pairs
    results = {
        **session.header(),
        "images": len(names),
        "skipped": len(inputs.names) - len(names),
        "rule": rule,
        "disagreement": float(disagreement_N.mean()),
        "predictions": str(folder / "predictions.csv"),
        "logits": str(folder / "logits.npz"),
        "results_dir": str(folder),
    }
    if session.world.is_main:
        titles = ["file"]
        for place in range(1, best_N5.indices.shape[1] + 1):
            titles += [f"class_{place}", f"name_{place}", f"probability_{place}"]
        rows: list[list[Any]] = []
        for n, name in enumerate(names):
            row: list[Any] = [name]
            for k, log_prob in zip(best_N5.indices[n].tolist(), best_N5.values[n].tolist(), strict=True):
                row += [k, inputs.classes[k], f"{math.exp(log_prob):.6f}"]
            rows.append([*row, f"{float(disagreement_N[n]):.4f}"])
        arrays = io.BytesIO()
        np.savez(arrays, logits=logits_SNK.numpy(), ensemble=ensemble_scores(logits_SNK, rule).numpy())
        _write(folder / "predictions.csv", _csv_text([*titles, "disagreement"], rows))
        _write(folder / "logits.npz", arrays.getvalue())
        _write(folder / "results.json", json.dumps(plain_json(results), indent=2) + "\n")
        for name, row in list(zip(names, rows, strict=True))[:SHOWN]:
            print(f"{name}: {row[2]} ({100 * float(row[3]):.1f} %)")
        if len(names) > SHOWN:
            print(f"… and {len(names) - SHOWN} more in {folder / 'predictions.csv'}", flush=True)
    return results


def array_inputs(session: Session, path: Path) -> Inputs:
    """The rows of a .npy file, taken as they are: normalised floats [N, 3, H, W], any H and W.

    Raises:
        UserError: not such an array.
    """
    wanted = "expected a .npy array [N, 3, H, W] of normalised floats"
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise UserError(f"--predict {path}: does not exist.") from None
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"--predict {path}: {wanted}: {reason(error)}.") from None
    if array.ndim != 4 or array.shape[1] != 3 or 0 in array.shape or not np.issubdtype(array.dtype, np.floating):
        raise UserError(f"--predict {path}: {wanted}, found {array.dtype} {list(array.shape)}.")
    part = shard(len(array), session.world.rank, session.world.world_size)
    size, precision, device = session.config.eval_batch_size, session.precision, session.world.device

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        for start in range(part.start, part.stop, size):
            rows = np.array(array[start : min(start + size, part.stop)])  # a copy: the file is mapped read-only
            images = torch.from_numpy(rows).to(device, precision.weights)
            yield torch.arange(start, start + len(rows)), images.contiguous(memory_format=precision.memory_format)

    classes, _, _ = class_names_and_statistics(session)
    return Inputs([f"{path.name}[{i}]" for i in range(len(array))], batches(), classes)


def file_inputs(session: Session, path: Path) -> Inputs:
    """An image, or all images of a folder and its subfolders, cut and normalised as in evaluation.

    Raises:
        UserError: nothing there.
    """
    if path.is_dir():
        files = list(iterate_images(path))
        names = [str(file.relative_to(path)) for file in files]
    else:
        files, names = [path], [path.name]
    if not path.exists() or not files:
        raise UserError(f"--predict {path}: {'holds no image' if path.exists() else 'does not exist'}.")
    classes, mean, std = class_names_and_statistics(session)
    split = ImageSet(targets=torch.zeros(len(files), dtype=torch.int64), paths=tuple(files))
    recipe = session.info.data_recipe or ("imagenet" if session.info.crop_size > SMALL_SIDE else "cifar10")
    loader = session.loader(split, recipe)
    prepare = session.prepare(mean, std)

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        for batch in loader:
            yield batch.indices_B, prepare(batch.images)
        for file, why in loader.bad_images.items():
            logger.warning("left out: %s: %s", file, why)

    return Inputs(names, batches(), classes)


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
        if dataset not in PUBLISHED_STATISTICS:
            raise
        logger.info("class names are unknown, numbers stand for them: %s", error)
    mean, std = PUBLISHED_STATISTICS[dataset]
    return info.classes or _numbers(info.num_classes), info.mean or mean, info.std or std


# ---- entry -----------------------------------------------------------------------------------------------------------


def run(config: Config) -> dict[str, Any]:
    """Evaluate or predict as `config` says, in this process of the job; returns the results.

    Raises:
        UserError, RunError: see `open_session`, `run_evaluation`, `run_prediction`.
    """
    gpus = distributed.visible_gpus(no_cuda=config.no_cuda, gpu=config.gpu, gpu_ids=config.gpu_ids)
    world = distributed.join(gpus, backend=config.dist_backend)
    set_up_text_log(None, rank=world.rank)
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
        predict = session.config.extra_options.predict
        return run_evaluation(session) if predict is None else run_prediction(session, Path(predict))
    finally:
        distributed.leave(world)


def evaluate_arguments(argv: list[str]) -> dict[str, Any]:
    """Evaluate as a command line says, starting the processes that it asks for; returns the results.

    Raises:
        UserError, RunError: as `run`.
        SystemExit: a started process failed and has said why.
    """
    config = parse_config(argv, program="eval.py", extra=EvalOptions)
    if not config.multiprocessing_distributed or distributed.under_launcher():
        return run(config)
    gpus = distributed.visible_gpus(no_cuda=config.no_cuda, gpu=config.gpu, gpu_ids=config.gpu_ids)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "results.json"
        distributed.spawn(
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

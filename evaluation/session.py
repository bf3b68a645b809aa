"""A session: checkpoint and flags as networks on their device, with their data, its statistics and class names."""

import dataclasses
import itertools
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from dataset import DataSource, ImageSet, SourceRequest
from dataset.loader import EvalLoader
from dataset.pipeline import build_eval_loader
from dataset.shared import open_shared
from dataset.unlabelled import Inputs, array_inputs, file_inputs
from dataset.views import ViewMaker, plain_spec
from evaluation.answers import Answers, check_tuned_for, read_answers, read_answers_file
from evaluation.ensemble import ensemble_rule
from evaluation.options import EvalOptions
from evaluation.passes import recorder_of_passes
from evaluation.tta import FlipAveraged
from method import methods
from model import SplitNet, backbones, split_list
from model.restore import NetworkInfo, restore_splitnet
from parser_params import Config
from recipe.datasets import OPEN_ROWS, ROWS, open_row
from recipe.own_images import KINDS
from recipe.preprocessing import Preprocessing, eval_resize
from record import checkpoint as ckpt
from record.run_folder import HPARAMS, PREDICTIONS, checkpoint_of, read_results
from utils import distributed, launch
from utils.errors import UserError, reason
from utils.launch import World
from utils.plain_json import plain_json
from utils.precision import Precision, choose_precision, lay_out
from utils.recording import Recorder

logger = logging.getLogger("eval")

# flags that are those of the training run unless they are given
INHERITED = (
    *("eval_interpolation", "dataset", "data", "val_fraction", "method"),
    *("is_ensembled_after_softmax", "is_max_ensemble"),
)
COLUMNS = ("image_column", "label_column", "split_column")  # the same, where the training run named them


@dataclass(frozen=True)
class Session:
    """What an evaluation works with.

    Attributes:
        config: flags, completed by those of the training run.
        checkpoint: the file.
        info: what the checkpoint says of its networks.
        seed: of the training run, for generated data.
        network: prepared images [B, 3, H, W] -> logits [S, B, K], in evaluation mode on its device.
        held_out_sha256: digest of the images that training held out, "" for none; None: the checkpoint does not say.
        answers: what was fitted for these networks, of --answers or the checkpoint; None with --tune.
        weights_sha256: digest of the networks where answers are there or to be made, else "".
        test_fraction: part of the images that a hash of names kept for the test in training, or that --test_fraction
            names; None: the training data had a split of its own.
        opened: the data set to evaluate on, once it is opened.
    """

    config: Config
    checkpoint: Path
    info: NetworkInfo
    seed: int
    world: World
    precision: Precision
    network: nn.Module
    test_fraction: float | None = None
    held_out_sha256: str | None = None
    answers: Answers | None = None
    weights_sha256: str = ""
    opened: list[DataSource] = field(default_factory=list, init=False, repr=False, compare=False)

    @property
    def options(self) -> EvalOptions:
        """The flags that only eval.py has."""
        return _eval_options(self.config)

    def networks(self) -> list[nn.Module]:
        """The networks one by one, as a cascade runs them."""
        assert isinstance(self.network, SplitNet)
        return list(self.network.models)

    @property
    def classifier(self) -> nn.Module:
        """What evaluation and prediction ask: the networks, or, under --tta flip, `evaluation.tta.FlipAveraged`."""
        return FlipAveraged(self.network).eval() if self.options.tta == "flip" else self.network

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
            **({} if self.options.tta == "none" else {"tta": self.options.tta}),
        }

    def prepare(self, mean: Sequence[float], std: Sequence[float]) -> Callable[[Tensor], Tensor]:
        """uint8 images -> normalised floats as the networks take them."""
        views, precision = ViewMaker(plain_spec(self.info.crop_size, mean, std), seed=0), self.precision
        return lambda images: views.evaluate(images, precision.weights, memory_format=precision.memory_format)

    def loader(self, split: ImageSet, recipe: str) -> EvalLoader:
        """This process's part of a split, cut as the checkpoint or the recipe says."""
        resize, interpolation = self.resizing(recipe)
        options = replace(self.config, crop_size=self.info.crop_size, eval_interpolation=interpolation)
        on_gpu = self.world.device.type == "cuda"
        batch_size = self.config.evaluation_batch(in_memory=split.images is not None, on_gpu=on_gpu)
        return build_eval_loader(split, options, self.world, resize=resize, batch_size=batch_size)

    def recorder(self, batches: int) -> Recorder | None:
        """What passes over so many batches are replayed by, where --cuda_graph asks for it; a line says what is done.

        None: they are computed as they are written.
        """
        asked = self.config.cuda_graph
        if asked == "0":
            return None
        found, why = None, ""
        if self.world.device.type != "cuda":
            why = "there is no GPU"
        elif self.config.is_test_on_multigpus:
            why = "the networks are on several GPUs"
        else:
            found = recorder_of_passes(self.world.device, batches)
            why = f"{batches} batches are too few"
        done = f"not replayed: {why}" if found is None else "replayed as one CUDA graph"
        logger.info("--cuda_graph %s: passes over images are %s.", asked, done)
        return found

    def at_size_of(self, info: NetworkInfo) -> Self:
        """The same data, decoded for other networks where these want images of another size."""
        wanted = replace(self.info, crop_size=info.crop_size, preprocessing=info.preprocessing)
        return self if wanted == self.info else replace(self, info=wanted)

    @property
    def file_recipe(self) -> str:
        """The recipe by which images of the user's own are cut."""
        return self.info.data_recipe or open_row(self.info.crop_size)

    @property
    def data_classes(self) -> tuple[str, ...] | None:
        """The names of the classes as the data has them; None where the checkpoint names none."""
        return self.info.codes or self.info.classes

    def source_request(self, **changes: Any) -> SourceRequest:
        """The data set of the flags, as the checkpoint knows it; `changes`: further fields of the request."""
        config, info = self.config, self.info
        return SourceRequest(
            dataset=config.dataset,
            root=Path(config.data),
            num_classes=info.num_classes if config.dataset == "synthetic" else None,
            crop_size=info.crop_size,
            seed=self.seed,
            test_fraction=self.test_fraction,
            image_column=config.image_column,
            label_column=config.label_column,
            split_column=config.split_column,
            classes=self.data_classes,
            recipe=info.data_recipe if info.data_recipe in OPEN_ROWS else None,
            on_bad_image=config.on_bad_image,
            workers=config.workers,
            **changes,
        )

    def resizing(self, recipe: str) -> tuple[int, str]:
        """(short side in pixels, interpolation) of files: the flags', else the checkpoint's, else the recipe's."""
        stored, given, crop = self.info.preprocessing, self.config.given, self.info.crop_size
        row = ROWS.get(recipe) or ROWS[open_row(crop)]  # a checkpoint may name a row that is not here
        resize, interpolation = eval_resize(crop, self.config.crop_pct) if row.is_large else crop, None
        if stored is not None and stored.crop == crop:
            resize = resize if "crop_pct" in given else stored.resize
            interpolation = None if "eval_interpolation" in given else stored.interpolation
        return resize, interpolation or self.config.eval_interpolation


def open_session(config: Config, world: World, gpus: list[int], flag: str = "--resume") -> Session:
    """Networks of --resume on their device, what is known of them, and flags completed by the training run's.

    Args:
        flag: that the checkpoint was given by; named in errors.

    Raises:
        UserError: no checkpoint, not one of networks, or one that contradicts the flags.
    """
    options = _eval_options(config)
    content, path = _read_checkpoint(config, flag)
    trained = content.get("config")
    trained = trained if isinstance(trained, Mapping) else {}
    given = config.given
    inherited = {
        name: trained[name]
        for name in INHERITED
        if name not in given and isinstance(trained.get(name), type(getattr(config, name)))
    }
    if "dataset" not in given and config.dataset in KINDS:  # as --data looks
        if inherited.get("dataset") not in KINDS:
            inherited.setdefault("dataset", Config.dataset)
        elif "data" in given:
            del inherited["dataset"]  # images of a user's own come in any form
    for name in COLUMNS:
        if isinstance(trained.get(name), str) and name not in given:
            inherited[name] = trained[name]
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
        stored = trained.get("crop_pct", backbones.get(info.archs[0]).crop_pct)
        config = replace(config, crop_pct=stored if isinstance(stored, float) else None)
    seed = config.seed if config.seed is not None else trained.get("seed")
    # exact figures unless a precision is asked for
    amp_dtype = config.amp_dtype if "amp_dtype" in given else "fp32"
    precision = choose_precision(
        world.device, is_amp=config.is_amp, amp_dtype=amp_dtype, layout=config.layout, execution=config.execution
    )
    _say_of_precision(content.get("environment"), precision.name)
    if config.class_map is not None and flag == "--resume":  # --large has the same flags
        logger.warning(
            "--class_map %s is for training, and has no effect here: classes are named as the checkpoint names them.",
            config.class_map,
        )
    answers, weights_sha256 = _answers(content, network, info, config, f"{flag} {path}")
    held_out = content.get("held_out_sha256")
    return Session(
        config=config,
        checkpoint=path,
        info=info,
        seed=seed if isinstance(seed, int) else 0,
        world=world,
        precision=precision,
        network=_place(network, config, precision, world.device, gpus),
        test_fraction=_test_fraction(config, content),
        held_out_sha256=held_out if isinstance(held_out, str) else None,
        answers=answers,
        weights_sha256=weights_sha256,
    )


def _answers(
    content: Mapping[str, Any], network: SplitNet, info: NetworkInfo, config: Config, source: str
) -> tuple[Answers | None, str]:
    """(what was fitted for these networks, digest of their weights); --large has no answers of its own.

    Raises:
        UserError: damaged answers, or those of other networks.
    """
    options = _eval_options(config)
    if source.startswith("--large"):
        return None, ""
    if options.tune is not None:
        return None, ckpt.state_sha256(network.state_dict())
    answers = None
    if options.answers is not None:
        answers = read_answers_file(Path(options.answers), info.num_networks)
        source = f"--answers {options.answers}"
    elif content.get("answers") is not None:
        source = f"answers of {source.partition(' ')[2]}"
        answers = read_answers(content["answers"], info.num_networks, source)
    if answers is None:
        return None, ""
    sha256 = ckpt.state_sha256(network.state_dict())
    rule = ensemble_rule(config.is_ensembled_after_softmax, config.is_max_ensemble)
    check_tuned_for(answers, weights_sha256=sha256, weights=info.weights, rule=rule, source=source)
    return answers, sha256


def open_large(session: Session) -> Session:
    """The undivided network of --large, under the flags of the session.

    Raises:
        UserError: no checkpoint of one network for these classes.
    """
    options, config, num_classes = session.options, session.config, session.info.num_classes
    given = {flag: value for flag, value in config.given.items() if flag not in ("arch", "split_factor")}
    other = open_session(replace(config, resume=options.large, given=given), session.world, [], "--large")
    if other.info.num_networks != 1 or other.info.num_classes != num_classes:
        raise UserError(f"--large {options.large}: expected one network for {num_classes} classes.")
    return other


def _say_of_precision(environment: object, name: str) -> None:
    """Where training had its figures in another precision, one checkpoint has two figures."""
    before = environment.get("precision", name) if isinstance(environment, Mapping) else name
    if before != name:
        logger.info(
            "evaluated in %s; training had its figures in %s, which may differ from these in the second decimal "
            "(--amp_dtype %s gives the same).",
            name,
            before,
            before,
        )


def _eval_options(config: Config) -> EvalOptions:
    """The flags that only eval.py has; their defaults where another program evaluates."""
    return config.extra_options if isinstance(config.extra_options, EvalOptions) else EvalOptions()


def _read_checkpoint(config: Config, flag: str) -> tuple[dict[str, Any], Path]:
    if config.resume is None:
        raise UserError(
            "nothing to evaluate: name a run directory or a checkpoint, as in eval.py runs/a (--resume PATH)."
        )
    if config.resume != "auto":
        path = checkpoint_of(config.resume)
        return ckpt.load_checkpoint(path, flag), path
    newest = ckpt.load_newest(Path(config.model_dir))
    if newest is None:
        raise UserError(f"--resume auto: --model_dir {config.model_dir} holds no checkpoint.")
    return newest


def _test_fraction(config: Config, content: Mapping[str, Any]) -> float | None:
    """See `Session`."""
    if "test_fraction" in config.given:
        return config.test_fraction
    pace = content.get("pace")
    drawn = pace.get("test_fraction") if isinstance(pace, Mapping) else None
    return drawn if isinstance(drawn, float) and 0 < drawn < 1 else None


def _backbone_names(config: Config, trained: Mapping[str, Any]) -> Callable[[str], Sequence[str]]:
    """How the method that trained the networks reads --arch: some have names of their own for lists of backbones."""
    if config.method not in methods:
        return split_list
    kind = methods.get(config.method)
    options = config.method_options
    if trained:
        defaults = dataclasses.asdict(kind.Options())
        known = {k: trained[k] for k, v in defaults.items() if k in trained and isinstance(trained[k], type(v))}
        try:
            options = kind.Options(**known)
        except UserError:  # values of training, trained with wider ranges: of no concern to an evaluation
            options = kind.Options()
    return lambda arch: kind.backbone_names(arch, options)


def _place(network: SplitNet, config: Config, precision: Precision, device: torch.device, gpus: list[int]) -> nn.Module:
    network.to(device, precision.weights)
    lay_out(network, precision.memory_format)
    asked = [
        name for name in ("execution", "is_test_with_multistreams", "is_test_on_multigpus") if config.given.get(name)
    ]
    if len(asked) > 1 and (config.execution, asked) != ("parallel", ["execution", "is_test_with_multistreams"]):
        raise UserError(f"--{asked[0]} and --{asked[1]} are two ways of running the networks: give one of them.")
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


def preprocessing(session: Session) -> Preprocessing:
    """What is done with an image file before the networks see it.

    Raises:
        UserError: as `class_names_and_statistics`.
    """
    _, mean, std = class_names_and_statistics(session)
    resize, interpolation = session.resizing(session.file_recipe)
    return Preprocessing(
        resize=resize,
        interpolation=interpolation,
        crop=session.info.crop_size,
        mean=(mean[0], mean[1], mean[2]),
        std=(std[0], std[1], std[2]),
    )


def output_folder(session: Session) -> Path:
    """Where results go: --model_dir if given, but not over a training run's own; else `eval/` beside the checkpoint.

    Raises:
        UserError: the folder cannot be made.
    """
    folder = session.checkpoint.parent / "eval"
    if "model_dir" in session.config.given:
        given = Path(session.config.model_dir)
        folder = given / "eval" if (given / HPARAMS).exists() else given
    return _made(folder)


def prediction_folder(session: Session, path: Path) -> Path:
    """Where the results of an input of --predict go: `predict_<its name>` below --model_dir or beside the checkpoint.

    The folder of an earlier prediction of the same input is taken again; another input of that name gets
    `predict_<name>_2`, and so on. Nothing else is ever written into. Every process takes part.

    Raises:
        UserError: the folder cannot be made.
    """
    below = Path(session.config.model_dir) if "model_dir" in session.config.given else session.checkpoint.parent
    name = f"predict_{path.resolve().name or 'root'}"

    def first_free() -> Path:
        numbers = itertools.count(2)
        folder = below / name
        while not _may_hold(folder, path):
            folder = below / f"{name}_{next(numbers)}"
        return _made(folder)

    return distributed.main_first(session.world, first_free, what="made the folder of the predictions")


def _may_hold(folder: Path, path: Path) -> bool:
    """Whether a folder is new, empty, or holds the predictions of this input; one that cannot be looked into is not."""
    if not os.path.isdir(folder):
        return not os.path.lexists(folder)
    if (before := read_results(folder, PREDICTIONS)) is not None:
        return before.get("input") == plain_json(str(path.resolve()))
    try:
        return not any(folder.iterdir())
    except OSError:
        return False


def _made(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--model_dir {folder}: cannot be made: {reason(error)}.") from None
    return folder


def open_test_split(session: Session, *, download: bool = True) -> DataSource:
    """The data set to evaluate on, opened once; its `test` is the split that --split names. Every process takes part.

    Raises:
        UserError: the data is missing, or its classes are not those of the networks.
    """
    if not session.opened:
        session.opened.append(_open_test_split(session, download=download))
    return session.opened[0]


def _open_test_split(session: Session, *, download: bool) -> DataSource:
    config, info = session.config, session.info
    known = session.data_classes
    source = open_shared(
        session.source_request(
            val_fraction=config.val_fraction if session.test_fraction else 0.0,
            splits=("test",),
            split=session.options.split,
            download=download,
        ),
        session.world,
    )
    unknown = sorted(set(source.classes) - set(known or source.classes))
    if unknown and len(source.classes) > info.num_classes:
        raise UserError(
            f"--data {config.data} has a class that the networks of --resume do not know: {unknown[0]!r} "
            f"({len(unknown)} in all). Name the data set that they were trained on."
        )
    if len(source.classes) != info.num_classes:
        raise UserError(
            f"--dataset {config.dataset} has {len(source.classes)} classes and the networks of --resume have "
            f"{info.num_classes}: name the data set that they were trained on."
        )
    # numbers stand for names that the data set's files do not tell
    nameless = config.dataset == info.dataset and source.classes == _numbers(info.num_classes)
    if known is not None and source.classes not in (known, info.classes) and not nameless:
        at = next(i for i, name in enumerate(known) if name != source.classes[i])
        raise UserError(
            f"--dataset {config.dataset} has other classes than the networks of --resume: class {at} is "
            f"{source.classes[at]!r} in the data and {known[at]!r} in the checkpoint."
        )
    return source


def _numbers(count: int) -> tuple[str, ...]:
    return tuple(map(str, range(count)))


def open_inputs(session: Session, path: Path, mean: Sequence[float], std: Sequence[float]) -> Inputs:
    """What --predict names, prepared; files are cut as in evaluation."""
    world, precision = session.world, session.precision
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
    prepare = session.prepare(mean, std)
    return file_inputs(path, load=lambda split: session.loader(split, session.file_recipe), prepare=prepare)


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

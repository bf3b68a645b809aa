"""A session: checkpoint and flags as networks on their device, with their data, its statistics and class names."""

import dataclasses
import logging
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
from evaluation.answers import Answers, check_tuned_for, read_answers, read_answers_file
from evaluation.ensemble import ensemble_rule
from evaluation.options import EvalOptions
from method import methods
from model import SplitNet, backbones, split_list
from model.restore import NetworkInfo, restore_splitnet
from parser_params import Config
from recipe.datasets import OPEN_ROWS, ROWS, open_row
from recipe.own_images import KINDS
from recipe.preprocessing import Preprocessing, eval_resize
from record import checkpoint as ckpt
from record.run_folder import HPARAMS
from utils import launch
from utils.errors import UserError, reason
from utils.launch import World
from utils.precision import Precision, choose_precision, lay_out

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

    @property
    def options(self) -> EvalOptions:
        """The flags that only eval.py has."""
        return _eval_options(self.config)

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
        """This process's part of a split, cut as the checkpoint or the recipe says."""
        resize, interpolation = self.resizing(recipe)
        options = replace(self.config, crop_size=self.info.crop_size, eval_interpolation=interpolation)
        return build_eval_loader(split, options, self.world, resize=resize)

    @property
    def file_recipe(self) -> str:
        """The recipe by which images of the user's own are cut."""
        return self.info.data_recipe or open_row(self.info.crop_size)

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
    precision = choose_precision(world.device, is_amp=config.is_amp, amp_dtype=amp_dtype)
    answers, weights_sha256 = _answers(content, network, info, config, f"{flag} {path}")
    held_out = content.get("held_out_sha256")

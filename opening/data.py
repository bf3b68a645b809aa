"""The data of a training, opened as its flags say, and how the images of a fine-tuning are prepared."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from dataset import DataSource, SourceRequest
from dataset.class_files import with_names
from dataset.loader import EvalLoader, TrainLoader
from dataset.pipeline import build_eval_loader
from dataset.shared import open_shared
from method import methods
from model.pretrained import Start
from parser_params import Config
from recipe.fine_tuning import flags_before, image_flags
from record.run_folder import Resumed
from utils.errors import UserError
from utils.launch import World


def start_images(config: Config, start: Start | None, resumed: Resumed | None) -> dict[str, Any] | None:
    """For a run that fine-tunes, the flags under which its weights see what they were trained on; None: another run.

    Raises:
        UserError: the networks' weights want images of different means.
    """
    kind = methods.get(config.method)
    if config.pretrained is None or not kind.fine_tunes:
        return None
    if resumed is not None:  # the run before has settled it, if it was one that fine-tuned
        before = resumed.state.get("config", {})
        return flags_before(before) if "layer_decay" in before else None
    assert start is not None
    names = kind.backbone_names(config.arch, config.method_options)
    settled = {"mean", "std"} <= config.given.keys()
    wanted = start.preprocessing(names, may_differ=settled)
    return {} if wanted is None else image_flags(wanted)


def source_request(config: Config, cache_dir: Path, own_size: int | None = None) -> SourceRequest:
    """What the flags ask for of the data.

    Args:
        cache_dir: where what is found out about the data is kept.
        own_size: side in pixels where --crop_size says no other.
    """
    return SourceRequest(
        dataset=config.dataset,
        root=Path(config.data),
        cache_dir=cache_dir,
        num_classes=config.num_classes,
        crop_size=config.given.get("crop_size", own_size),
        seed=config.seed or 0,
        val_fraction=config.val_fraction,
        test_fraction=config.test_fraction,
        image_column=config.image_column,
        label_column=config.label_column,
        split_column=config.split_column,
        on_bad_image=config.on_bad_image,
        workers=config.workers,
    )


def open_shared_source(config: Config, world: World, own_size: int | None = None) -> DataSource:
    """Open the data set of the flags in every process, see `open_shared`.

    Args:
        own_size: side in pixels of the images that pretrained weights want, where --crop_size says no other.
    """
    source = open_shared(source_request(config, Path(config.model_dir), own_size), world)
    if config.class_map is not None:
        source = with_names(source, config.class_map)
    if "test_fraction" in config.given and not source.fractions:
        raise UserError(
            f"--test_fraction {config.test_fraction:g}: --data {config.data} has its own split. Leave the flag away."
        )
    return source


def build_eval_loaders(source: DataSource, config: Config, world: World) -> dict[str, EvalLoader]:
    """By name of the split: the held-out images, "val", where there are some, and those that are reported on."""
    splits = {"val": source.val, source.reported: source.test}
    on_gpu = world.device.type == "cuda"
    return {
        name: build_eval_loader(
            split,
            config,
            world,
            batch_size=config.evaluation_batch(in_memory=split.images is not None, on_gpu=on_gpu),
        )
        for name, split in splits.items()
        if split is not None
    }


def resident(source: DataSource, train: TrainLoader, evaluated: Mapping[str, EvalLoader]) -> DataSource:
    """The data with its images where the loaders have them, so that no second copy of them stays on the host."""
    return replace(
        source,
        train=train.resident(source.train),
        test=evaluated[source.reported].resident(source.test),
        val=None if source.val is None else evaluated["val"].resident(source.val),
    )

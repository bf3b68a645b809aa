"""Which images answers are fitted on, and that none of them is reported. N images.

Fitted are temperatures, the order of a cascade, its thresholds and conformal quantiles; never on images that trained
the networks, and never on the ones that are reported.
"""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from dataset import DataSource, ImageSet, held_out_digest, held_out_names_digest
from dataset.class_folders import labelled_folder
from dataset.holdout import split_indices
from dataset.shared import open_shared
from evaluation.answers import Answers
from evaluation.session import Session, class_names_and_statistics, open_test_split
from utils.errors import UserError
from utils.seed import STREAM_SPLIT, numpy_generator
from utils.text import escaped

logger = logging.getLogger("eval")

FEWEST, FEW = 100, 1000
TEST_PART = "test:"
SHUFFLED = 4  # stream of an order of test images, behind STREAM_SPLIT and the streams of evaluation/tuning.py
WAYS = "train with --val_fraction F, or give --tune_on DIR of labelled images, or --tune_on test:F"


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """Images to fit on.

    Attributes:
        source: the value of --tune_on.
        images: with their labels.
        recipe: by which files are cut.
        mean, std: per channel.
        sha256: digest of which they are.
        also_chose_epoch: whether they chose the best epoch too.
    """

    source: str
    images: ImageSet
    recipe: str
    mean: Sequence[float]
    std: Sequence[float]
    sha256: str
    also_chose_epoch: bool


def test_fraction_of(tune_on: str) -> float | None:
    """F of "test:F"; None for the other ways.

    Raises:
        UserError: F is no number in (0, 1).
    """
    if not tune_on.startswith(TEST_PART):
        return None
    try:
        fraction = float(tune_on.removeprefix(TEST_PART))
    except ValueError:
        fraction = math.nan
    if not 0 < fraction < 1:
        raise UserError(f"--tune_on {tune_on}: expected test:F with F above 0 and below 1.")
    return fraction


def split_test(source: DataSource, tune_on: str, seed: int) -> tuple[ImageSet, ImageSet, str]:
    """(the part of the test images to fit on, the rest, the part's digest), class-balanced, by the seed of the run.

    Raises:
        UserError: a class has no image on one side.
    """
    fraction = test_fraction_of(tune_on)
    assert fraction is not None
    rest, held = split_indices(source.test.targets, fraction, numpy_generator(seed, STREAM_SPLIT))
    counts = [source.test.targets[part].bincount(minlength=len(source.classes)) for part in (rest, held)]
    seen = source.test.targets.bincount(minlength=len(source.classes)) > 0
    for counts_K in counts:
        lonely = (seen & (counts_K == 0)).nonzero().flatten().tolist()
        if lonely:
            raise UserError(
                f"--tune_on {tune_on}: the class {source.classes[lonely[0]]!r} has too few images for both sides."
            )
    return source.test.subset(held), source.test.subset(rest), held_out_digest(len(source.test), held)


def open_held_out(session: Session) -> HeldOut:
    """The images that --tune_on names; every process takes part.

    Raises:
        UserError: there are none or too few; others than were held out in training; some of them are reported.
    """
    tune_on = session.options.tune_on
    if test_fraction_of(tune_on) is not None:
        found = _of_test(session, tune_on)
    elif tune_on == "val":
        found = _of_training(session)
    else:
        found = _of_folder(session, Path(tune_on))
    check_enough(tune_on, len(found.images))
    if len(found.images) < FEW:
        logger.warning(
            "--tune_on %s: only %d held-out images; with fewer than %d, what is chosen on them may not hold.",
            tune_on,
            len(found.images),
            FEW,
        )
    return found


def check_enough(tune_on: str, images: int) -> None:
    """Raises UserError: so few held-out images are too few to fit on."""
    if images < FEWEST:
        raise UserError(
            f"--tune_on {tune_on}: {images} held-out images are too few to fit on; {FEWEST} are the least. Other ways: "
            f"{WAYS}."
        )


def _of_test(session: Session, tune_on: str) -> HeldOut:
    source = open_test_split(session)
    part, _, sha256 = split_test(source, tune_on, session.seed)
    return _held_out(session, source, part, sha256, tune_on, also_chose_epoch=_chose_on_test(session, source))


def _chose_on_test(session: Session, source: DataSource) -> bool:
    """Whether training chose its best epoch on the reported images, having no others."""
    return session.held_out_sha256 == "" and session.checkpoint.name.startswith("model_best")


def _of_training(session: Session) -> HeldOut:
    config, info = session.config, session.info
    source = open_shared(session.source_request(val_fraction=config.val_fraction), session.world)
    if source.val is None or not len(source.val):
        raise UserError(f"--tune_on val: the run of {session.checkpoint} held no images out: {WAYS}.")
    if len(source.classes) != info.num_classes:
        raise UserError(
            f"--tune_on val: --data {config.data} has {len(source.classes)} classes and the networks of --resume have "
            f"{info.num_classes}: name the data set that they were trained on."
        )
    if session.held_out_sha256 is None:
        logger.warning(
            "--tune_on val: %s does not say which images were held out (it is of an earlier version); they are made "
            "again from its seed and --val_fraction %g.",
            session.checkpoint,
            config.val_fraction,
        )
    elif session.held_out_sha256 != source.held_out_sha256:
        raise UserError(
            f"--tune_on val: the images held out now are not those of the training run (held_out_sha256 differs): give "
            f"--data, --val_fraction and --seed of the run, or {WAYS.partition('or ')[2]}."
        )
    chose = session.checkpoint.name.startswith("model_best")
    return _held_out(session, source, source.val, source.held_out_sha256, "val", also_chose_epoch=chose)


def _of_folder(session: Session, folder: Path) -> HeldOut:
    classes, mean, std = class_names_and_statistics(session)
    images = labelled_folder(folder, classes, "--tune_on")
    own = {path.resolve() for path in images.paths}
    source = open_test_split(session)
    reported = (*source.test.paths, *source.reported_paths)
    twice = next((path for path in reported if path.resolve() in own), None)
    if twice is not None:
        raise UserError(f"--tune_on {folder}: {escaped(twice)} is among the reported images too: give others.")
    return HeldOut(
        source=str(folder),
        images=images,
        recipe=session.file_recipe,
        mean=mean,
        std=std,
        sha256=held_out_names_digest("/".join(path.parts[-2:]) for path in images.paths),
        also_chose_epoch=False,
    )


def _held_out(
    session: Session, source: DataSource, images: ImageSet, sha256: str, tune_on: str, *, also_chose_epoch: bool
) -> HeldOut:
    info = session.info
    return HeldOut(
        source=tune_on,
        images=images,
        recipe=info.data_recipe or source.recipe,
        mean=info.mean or source.mean,
        std=info.std or source.std,
        sha256=sha256,
        also_chose_epoch=also_chose_epoch,
    )


def open_reported(session: Session, answers: Answers | None = None) -> DataSource:
    """The data set to evaluate on, its `test` without images that answers were, or are now, fitted on.

    Every process takes part.

    Args:
        answers: that are evaluated; None: those of the session, if it has any.

    Raises:
        UserError: as `open_test_split`; the reported images are those that the answers were fitted on.
    """
    source = open_test_split(session)
    answers = answers or session.answers
    tune_on = session.options.tune_on if session.options.tune else None
    sha256 = ""
    if answers is not None:
        tune_on, sha256 = str(answers.tuned_on.get("source", "")), str(answers.tuned_on.get("sha256", ""))
    if tune_on is None:
        return source
    if sha256 and sha256 == source.reported_sha256:
        raise UserError(
            f"--split {source.reported}: these are the images that the answers were fitted on; evaluate on others."
        )
    if test_fraction_of(tune_on) is None:
        return source
    _, rest, digest = split_test(source, tune_on, session.seed)
    if sha256 and digest != sha256:
        logger.warning(
            "the answers were fitted on a part of another test split (%s): all images are reported.", tune_on
        )
        return source
    return replace(source, test=rest)


def reported_images(session: Session, count: int, answers: Answers | None = None, *, shuffled: bool = False) -> Tensor:
    """The first prepared images of those that are evaluated on, on the host: [B, 3, H, W], B <= count.

    Args:
        answers: as `open_reported`.
        shuffled: in an order by the seed of the run, instead of that of the data set.

    Raises:
        UserError: as `open_reported`.
    """
    source = open_reported(session, answers)
    images = len(source.test)
    numbers = torch.arange(images)
    if shuffled:
        numbers = torch.from_numpy(numpy_generator(session.seed, STREAM_SPLIT, SHUFFLED).permutation(images))
    loader = session.loader(source.test.subset(numbers[:count]), session.info.data_recipe or source.recipe)
    prepare = session.prepare(session.info.mean or source.mean, session.info.std or source.std)
    return torch.cat([prepare(batch.images).cpu() for batch in loader])

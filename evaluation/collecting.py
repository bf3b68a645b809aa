"""The logits of all images of a set: one pass, with a bar where somebody watches."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from dataset import ImageSet
from evaluation.passes import evaluate
from evaluation.session import Session
from record.screen import watched
from utils import distributed
from utils.errors import RunError
from utils.text import escaped

logger = logging.getLogger("eval")


@dataclass(frozen=True)
class Logits:
    """Of the images that could be read, in their order, on the CPU, the same in every process.

    Attributes:
        logits_SNK: float32 or better.
        labels_N: int64.
    """

    logits_SNK: Tensor
    labels_N: Tensor


def collect_logits(
    session: Session,
    images: ImageSet,
    *,
    recipe: str,
    mean: Sequence[float],
    std: Sequence[float],
    what: str,
    network: nn.Module | None = None,
    num_networks: int | None = None,
) -> Logits:
    """Run networks over images, each process over its part.

    Args:
        recipe: by which files are cut.
        mean, std: per channel.
        what: the images are, for the bar and for errors.
        network, num_networks: those of the session where they are not given.

    Raises:
        RunError: an unreadable image under --on_bad_image fail, no readable image.
    """
    info = session.info
    loader = session.loader(images, recipe)
    evaluation = evaluate(
        session.classifier if network is None else network,
        watched(loader, len(loader), what, visible=session.world.is_main),
        prepare=session.prepare(mean, std),
        num_networks=num_networks or info.num_networks,
        num_classes=info.num_classes,
        rule=session.rule,
        device=session.world.device,
        autocast_dtype=session.precision.autocast,
        all_reduce=distributed.all_reduce_sum,
        keep_logits=True,
        gather_rows=distributed.all_gather_rows,
        recorder=session.recorder(len(loader)),
    )
    tell_bad_images(loader.bad_images)
    assert evaluation.logits_SNK is not None
    assert evaluation.labels_N is not None
    if not len(evaluation.labels_N):
        raise RunError(f"{what}: not one image can be read.")
    return Logits(evaluation.logits_SNK, evaluation.labels_N)


def tell_bad_images(bad_images: dict[Path, str]) -> None:
    """Name the files that were left out."""
    for path, why in bad_images.items():
        logger.warning("left out: %s: %s", escaped(path), why)

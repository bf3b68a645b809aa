"""One pass over a split: counts on this process's shard, added over all processes, divided once."""

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from evaluation.counts import EvaluationCounts
from evaluation.metrics import counted
from training.replay import ReplayedStep
from utils.errors import RunError
from utils.precision import autocast
from utils.recording import CudaRecorder, Recorder

logger = logging.getLogger(__name__)

REPLAYED_FROM = 16  # batches of an evaluation: the first ones warm up, and to record takes as long as some
NOT_CAPTURED = "a pass over images cannot be captured as a CUDA graph ({}): passes are not replayed."


class LabelledImages(Protocol):
    """The part of a loader's batch that an evaluation reads: uint8 images [B, 3, H, W], int64 labels [B]."""

    @property
    def images(self) -> Tensor: ...

    @property
    def labels_B(self) -> Tensor: ...


Images = TypeVar("Images", bound=LabelledImages)


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found.

    Attributes:
        figures: as `EvaluationCounts.result`; top-1 of further classifiers by name under `extra`.
        confusion: int64 [K, K]; row: label, column: prediction of the reported ensemble.
        logits_SNK, labels_N: of all images in their order, on the CPU, where they were to be kept.
    """

    figures: dict[str, Any]
    confusion: Tensor
    logits_SNK: Tensor | None = None
    labels_N: Tensor | None = None


def recorder_of_passes(device: torch.device, batches: int) -> Recorder | None:
    """What an evaluation of so many batches is recorded by; None on a CPU, and where they are too few to gain by it."""
    return CudaRecorder(device, NOT_CAPTURED) if device.type == "cuda" and batches >= REPLAYED_FROM else None


class _Replayed:
    """A function of prepared images and labels that is replayed; where it cannot be recorded, it is called.

    Its result is valid until the next call.
    """

    def __init__(self, look: Callable[[Tensor, Tensor], Tensor], recorder: Recorder) -> None:
        self._look, self._step = look, ReplayedStep(recorder)
        self._gave_up = False

    def __call__(self, images: Tensor, labels_B: Tensor) -> Tensor:
        if not self._gave_up:
            try:
                return self._step(self._look, images, labels_B)
            except RunError as error:  # before anything was counted
                logger.info("%s", error)
                self._gave_up = True
        return self._look(images, labels_B)


def _alone(value: Tensor) -> Tensor:
    return value


@torch.inference_mode()
def evaluate(
    network: nn.Module,
    batches: Iterable[Images],
    *,
    prepare: Callable[[Tensor], Tensor],
    num_networks: int,
    num_classes: int,
    rule: str,
    device: torch.device,
    autocast_dtype: torch.dtype | None = None,
    extra: Callable[[Tensor], dict[str, Tensor]] | None = None,
    all_reduce: Callable[[Tensor], Tensor] = _alone,
    keep_logits: bool = False,
    gather_rows: Callable[[Tensor], Tensor] = _alone,
    each: Callable[[Images, Tensor], None] | None = None,
    recorder: Recorder | None = None,
) -> Evaluation:
    """Evaluate S networks and their ensembles; nothing inside the loop waits for the device.

    Args:
        network: normalised images [B, 3, H, W] -> logits [S, B, K]; in evaluation mode.
        batches: this process's shard; shards are disjoint and may differ in length, also by being empty.
        prepare: uint8 images -> what the network takes.
        num_networks, num_classes: S and K.
        rule: ensemble rule of the reported figures.
        device: where counts are kept.
        autocast_dtype: type of matrix products and convolutions, or None for that of the weights.
        extra: more classifiers, name -> logits [B, K]; names must not depend on the images.
        all_reduce: sum over all processes, in place.
        keep_logits: also return all logits and labels; each batch then waits for the device.
        gather_rows: rows [B_r, ...] of every process one after another, [N, ...].
        each: is shown every batch and its logits [S, B, K], which are valid until the next one.
        recorder: of what is replayed: the pass of a batch and what it adds to the counts, for batches of one size;
            None: everything is computed as it is written.
    """
    counts = EvaluationCounts(num_networks, num_classes, rule, device)
    correct: dict[str, Tensor] = {}
    kept_logits: list[Tensor] = []
    kept_labels: list[Tensor] = []

    def look(images: Tensor, labels_B: Tensor) -> Tensor:
        logits_SBK: Tensor = network(images)
        counts.update(logits_SBK, labels_B)
        return logits_SBK

    answer = look if recorder is None else _Replayed(look, recorder)
    # around the loop, not in it: autocast then casts each weight once. The counts are float64, which it leaves alone.
    with autocast(device, autocast_dtype):
        for batch in batches:
            images = prepare(batch.images)
            logits_SBK = answer(images, batch.labels_B)
            if each is not None:
                each(batch, logits_SBK)
            if keep_logits:
                exact = torch.promote_types(logits_SBK.dtype, torch.float32)
                kept_logits.append(logits_SBK.transpose(0, 1).to("cpu", exact, copy=recorder is not None))
                kept_labels.append(batch.labels_B.cpu())
            for name, logits_BK in (extra(images) if extra is not None else {}).items():
                hits = (logits_BK.argmax(dim=-1) == batch.labels_B).sum()
                correct[name] = correct[name] + hits if name in correct else hits
    counts.all_reduce(all_reduce)
    figures = counts.result()
    if extra is not None:
        # a process without images does not know the names, and must still take part in their sum
        size, informed = all_reduce(torch.tensor([len(correct), bool(correct)], device=device)).tolist()
        hits_E = torch.zeros(size // max(informed, 1), dtype=torch.int64, device=device)
        for i, name in enumerate(sorted(correct)):
            hits_E[i] = correct[name]
        rates = (100.0 * all_reduce(hits_E).double() / max(figures["seen"], 1)).tolist()
        if correct:
            figures["extra"] = dict(zip(sorted(correct), rates, strict=True))
    confusion_KK = counts.confusion_KK.cpu()
    if not keep_logits:
        return Evaluation(figures, confusion_KK)
    empty = torch.empty(0, num_networks, num_classes)
    logits_NSK = gather_rows(torch.cat([empty, *kept_logits]).to(device)).cpu()
    labels_N = gather_rows(torch.cat([torch.empty(0, dtype=torch.int64), *kept_labels]).to(device)).cpu()
    return Evaluation(figures, confusion_KK, logits_NSK.transpose(0, 1), labels_N)


def figure_names(splits: Sequence[str], reported: str) -> list[str]:
    """Names of the figures of an evaluation, as `record.report.flat_figures` has them."""
    rows = [f"ensemble_{name}" for name, metric in counted().items() if metric.of_rows]
    together = [name for name, metric in counted().items() if not metric.of_rows]
    others = [f"{split}_{name}" for split in splits if split != reported for name in (*rows, "loss")]
    return [*rows, *together, "loss", *others]

"""One pass over a split: counts on this process's shard, added over all processes, divided once."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from evaluation.counts import EvaluationCounts


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
        each: is shown every batch and its logits [S, B, K].
    """
    counts = EvaluationCounts(num_networks, num_classes, rule, device)
    correct: dict[str, Tensor] = {}
    kept_logits: list[Tensor] = []
    kept_labels: list[Tensor] = []
    # around the loop, not in it: autocast then casts each weight once. The counts are float64, which it leaves alone.
    with torch.autocast(device.type, autocast_dtype, enabled=autocast_dtype is not None):
        for batch in batches:
            images = prepare(batch.images)
            logits_SBK = network(images)
            counts.update(logits_SBK, batch.labels_B)
            if each is not None:
                each(batch, logits_SBK)
            if keep_logits:
                exact = torch.promote_types(logits_SBK.dtype, torch.float32)
                kept_logits.append(logits_SBK.transpose(0, 1).to("cpu", exact))
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

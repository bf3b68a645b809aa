"""Classifying images with S networks, and the files that a prediction writes. N images, K classes."""

import io
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from evaluation.answered import TITLES, Answered
from evaluation.ensemble import ensemble_log_probs, ensemble_scores
from evaluation.ood import pair_disagreement
from record.checkpoint import write_file
from record.tables import csv_table
from utils import distributed
from utils.errors import RunError, reason
from utils.memory import is_out_of_memory
from utils.precision import autocast

TOP = 5  # classes listed per image
SHOWN = 10  # predictions that are printed


@dataclass(frozen=True)
class Prediction:
    """What the networks say of the images that could be read.

    Attributes:
        names: N.
        logits_SNK: of every network, float32 or better, on the CPU.
        rule: of the ensemble.
    """

    names: Sequence[str]
    logits_SNK: Tensor
    rule: str

    def disagreement_N(self) -> Tensor:
        """The part of all pairs of networks that choose different classes: float64 [N]; 0 for one network."""
        return pair_disagreement(self.logits_SNK)


@torch.inference_mode()
def predict(
    network: nn.Module,
    names: Sequence[str],
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    num_networks: int,
    num_classes: int,
    rule: str,
    device: torch.device,
    dtype: torch.dtype,
    autocast_dtype: torch.dtype | None,
    source: str,
) -> Prediction:
    """Classify every process's part of the images, and gather all in the order of `names`.

    Args:
        network: prepared images [B, 3, H, W] -> logits [S, B, K]; in evaluation mode.
        names, batches: as in `dataset.unlabelled.Inputs`.
        dtype, autocast_dtype: type of the weights, and of matrix products and convolutions (None: the same).
        source: the flag and path that an error names.

    Raises:
        RunError: no image can be read, or the networks cannot take one.
    """
    exact = torch.promote_types(dtype, torch.float32)
    indices: list[Tensor] = [torch.empty(0, dtype=torch.int64)]
    logits: list[Tensor] = [torch.empty(0, num_networks, num_classes, dtype=exact)]
    with autocast(device, autocast_dtype):
        for indices_B, images in batches:
            try:
                logits_SBK = network(images)
            except RuntimeError as error:  # too small for the strides
                if is_out_of_memory(error):
                    raise
                size = " x ".join(map(str, images.shape))
                raise RunError(f"{source}: the networks fail on a batch {size}: {reason(error)}") from None
            indices.append(indices_B.cpu())
            logits.append(logits_SBK.to("cpu", exact).transpose(0, 1))
    indices_N = distributed.all_gather_rows(torch.cat(indices).to(device)).cpu()
    logits_SNK = distributed.all_gather_rows(torch.cat(logits).to(device)).cpu().transpose(0, 1).contiguous()
    if not len(indices_N):
        raise RunError(f"{source}: not one image can be read.")
    return Prediction([names[i] for i in indices_N.tolist()], logits_SNK, rule)


def write_prediction(
    prediction: Prediction, classes: Sequence[str], folder: Path, answered: Answered | None = None
) -> list[str]:
    """Write predictions.csv and logits.npz (`logits` [S, N, K], `ensemble` [N, K]).

    Args:
        classes: K names.
        answered: what tuned answers say; predictions.csv has their probabilities and further columns then, and
            logits.npz `networks_used` [N].

    Returns:
        what to print: the first SHOWN images with their class, and how many more there are.

    Raises:
        RunError: a file cannot be written.
    """
    logits_SNK, rule = prediction.logits_SNK, prediction.rule
    log_probs_NK = ensemble_log_probs(logits_SNK, rule) if answered is None else answered.log_probs_NK
    best_N5 = log_probs_NK.topk(min(TOP, len(classes)), dim=1)
    titles = ["file"]
    for place in range(1, best_N5.indices.shape[1] + 1):
        titles += [f"class_{place}", f"name_{place}", f"probability_{place}"]
    rows: list[list[object]] = []
    shown = []
    disagreement: Sequence[float | None] = prediction.disagreement_N().tolist()
    if answered is not None:
        disagreement = answered.disagreement
    for n, name in enumerate(prediction.names):
        row: list[object] = [name]
        for k, log_prob in zip(best_N5.indices[n].tolist(), best_N5.values[n].tolist(), strict=True):
            row += [k, classes[k], f"{math.exp(log_prob):.6f}"]
        if n < SHOWN:
            shown.append(f"{name}: {row[2]} ({100 * math.exp(best_N5.values[n, 0].item()):.1f} %)")
        apart = disagreement[n]
        row.append("" if apart is None else f"{apart:.4f}")
        rows.append(row if answered is None else [*row, *(answered.columns[title][n] for title in TITLES)])
    arrays = io.BytesIO()
    if answered is None:
        np.savez(arrays, logits=logits_SNK.numpy(), ensemble=ensemble_scores(logits_SNK, rule).numpy())
    else:
        used_N = answered.networks_used_N.numpy()
        np.savez(arrays, logits=logits_SNK.numpy(), ensemble=answered.scores_NK.numpy(), networks_used=used_N)
    titles += ["disagreement", *(() if answered is None else TITLES)]
    write_file(folder / "predictions.csv", csv_table(titles, rows))
    write_file(folder / "logits.npz", arrays.getvalue())
    if len(rows) > SHOWN:
        shown.append(f"… and {len(rows) - SHOWN} more in {folder / 'predictions.csv'}")
    return shown

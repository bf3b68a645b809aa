"""Layer-wise mutual contrastive learning: losses between embeddings of several networks (arXiv:2207.11518).

Shapes: M exits of all networks, numbered network by network; P pairs of exits of different networks; B images;
D dimensions of a projected, unit-length embedding; C columns that an image is compared with (the other images of the
batch, or entries of a memory bank); N networks. All values are per pair and image, (P, B), not yet weighted.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from loss import at_least_float32
from loss.distillation import distillation_kl


class ContrastTerms(NamedTuple):
    """The four terms of each pair, (P, B): inside each network and across the two, hard and soft."""

    vcl_PB: Tensor
    soft_vcl_PB: Tensor
    icl_PB: Tensor
    soft_icl_PB: Tensor


def exit_pairs(exits_per_network: Sequence[int]) -> Tensor:
    """Unordered pairs of exits that belong to different networks, int64 (2, P).

    All terms are symmetric in the pair, so a sum over ordered pairs is twice the sum over these.
    """
    network_M = [i for i, count in enumerate(exits_per_network) for _ in range(count)]
    pairs = [(m, n) for m, i in enumerate(network_M) for n, j in enumerate(network_M) if i < j]
    return torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2).T.contiguous()


def contrast_nll(logits: Tensor, positives_BC: Tensor, candidates_BC: Tensor) -> Tensor:
    """Mean over the positives of -log softmax over the candidates: (..., B, C) -> (..., B). Supervised contrast.

    An image without a positive is skipped: its value is 0, and the others are scaled so that the mean over the batch
    is their mean.

    Args:
        logits: similarities divided by the temperature.
        positives_BC: bool, columns of the image's own class.
        candidates_BC: bool, columns that count at all; positives included, the image itself not.
    """
    count_B = positives_BC.sum(dim=-1)
    valid_B = count_B > 0
    # finite, so that a row without candidates gives no NaN before it is skipped
    log_sum = logits.masked_fill(~candidates_BC, torch.finfo(logits.dtype).min / 2).logsumexp(dim=-1)
    mean_positive = (logits * positives_BC).sum(dim=-1) / count_B.clamp(min=1)
    scale = len(valid_B) / valid_B.sum().clamp(min=1)
    return torch.where(valid_B, log_sum - mean_positive, 0.0) * scale


def same_class(labels_B: Tensor) -> Tensor:
    """bool (B, B): the two are different images of one class."""
    different = ~torch.eye(len(labels_B), dtype=torch.bool, device=labels_B.device)
    return (labels_B[:, None] == labels_B[None, :]) & different


def batch_contrast(
    embeddings_MBD: Tensor, labels_B: Tensor, pairs_2P: Tensor, *, tau: float, soft_temperature: float
) -> ContrastTerms:
    """The terms with the batch itself as columns (C = B).

    The image itself is no candidate of the hard terms, but keeps its column in the soft ones, as published.

    Args:
        embeddings_MBD: unit-length.
        labels_B: int64.
        pairs_2P: from `exit_pairs`, on the embeddings' device.
        tau: temperature of the similarities.
        soft_temperature: second temperature of the soft terms.
    """
    embeddings_MBD = at_least_float32(embeddings_MBD)
    first_P, second_P = pairs_2P
    with torch.autocast(embeddings_MBD.device.type, enabled=False):
        within_MBB = embeddings_MBD @ embeddings_MBD.mT / tau
        across_PBB = embeddings_MBD[first_P] @ embeddings_MBD[second_P].mT / tau
    positives_BB = same_class(labels_B)
    others_BB = ~torch.eye(len(labels_B), dtype=torch.bool, device=labels_B.device)
    nll_MB = contrast_nll(within_MBB, positives_BB, others_BB)
    nll_across_PB = contrast_nll(across_PBB, positives_BB, others_BB)
    nll_back_PB = contrast_nll(across_PBB.mT, positives_BB, others_BB)
    return ContrastTerms(
        vcl_PB=nll_MB[first_P] + nll_MB[second_P],
        soft_vcl_PB=_mutual_kl(within_MBB[first_P], within_MBB[second_P], soft_temperature),
        icl_PB=nll_across_PB + nll_back_PB,
        soft_icl_PB=_mutual_kl(across_PBB, across_PBB.mT, soft_temperature),
    )


def bank_contrast(
    embeddings_MBD: Tensor,
    keys_NBCD: Tensor,
    network_M: Tensor,
    pairs_2P: Tensor,
    *,
    pos_k: int,
    tau: float,
    soft_temperature: float,
) -> ContrastTerms:
    """The terms with entries of the networks' memory banks as columns.

    Across networks an embedding is compared with the other network's bank, all columns counting; inside a network
    with its own bank, where the image's own entry is left out.

    Args:
        embeddings_MBD: unit-length.
        keys_NBCD: for each image the banks' entries of: the image itself, `pos_k` images of its class, then others.
            Constants.
        network_M: int64, the network that each exit belongs to.
        pairs_2P: from `exit_pairs`. `network_M` and `pairs_2P` are on the embeddings' device.
        pos_k: positives per image beside its own entry.
        tau, soft_temperature: as in `batch_contrast`.
    """
    embeddings_MBD = at_least_float32(embeddings_MBD)
    first_P, second_P = pairs_2P
    with torch.autocast(embeddings_MBD.device.type, enabled=False):
        embeddings_BDM = embeddings_MBD.permute(1, 2, 0)
        logits_NMBC = torch.stack([(keys @ embeddings_BDM).permute(2, 0, 1) for keys in keys_NBCD]) / tau
    within_MBC = logits_NMBC[network_M, torch.arange(len(network_M), device=network_M.device), :, 1:]
    first_PBC = logits_NMBC[network_M[second_P], first_P]
    second_PBC = logits_NMBC[network_M[first_P], second_P]
    candidates_BC = torch.ones_like(first_PBC[0], dtype=torch.bool)
    positives_BC = candidates_BC.clone()
    positives_BC[:, 1 + pos_k :] = False
    nll_MB = contrast_nll(within_MBC, positives_BC[:, 1:], candidates_BC[:, 1:])
    return ContrastTerms(
        vcl_PB=nll_MB[first_P] + nll_MB[second_P],
        soft_vcl_PB=_mutual_kl(within_MBC[first_P], within_MBC[second_P], soft_temperature),
        icl_PB=contrast_nll(first_PBC, positives_BC, candidates_BC)
        + contrast_nll(second_PBC, positives_BC, candidates_BC),
        soft_icl_PB=_mutual_kl(first_PBC, second_PBC, soft_temperature),
    )


def _mutual_kl(logits: Tensor, other_logits: Tensor, temperature: float) -> Tensor:
    """Each side distils the other's distribution over the columns: (P, B, C) -> (P, B)."""
    return distillation_kl(logits, other_logits, temperature=temperature) + distillation_kl(
        other_logits, logits, temperature=temperature
    )


@torch.no_grad()
def update_bank(bank_ND: Tensor, indices_B: Tensor, embeddings_BD: Tensor, *, momentum: float) -> None:
    """Move entries towards new embeddings in place: entry <- normalise(m · entry + (1 - m) · embedding).

    Where an index occurs more than once, its last embedding counts; where an embedding is not finite, nothing moves.

    Args:
        bank_ND: of all N images of the training set.
        indices_B: int64, the images.
        embeddings_BD: unit-length.
        momentum: m.
    """
    old_BD = bank_ND[indices_B]
    moved_BD = torch.nn.functional.normalize(
        momentum * old_BD + (1 - momentum) * embeddings_BD.to(bank_ND.dtype), dim=-1
    )
    entries_BD = torch.where(moved_BD.isfinite().all(dim=-1, keepdim=True), moved_BD, old_BD)
    # every occurrence writes the last one's value, so the order of the writes does not matter
    position_B = torch.arange(len(indices_B), device=indices_B.device)
    last_B = torch.where(indices_B[:, None] == indices_B[None, :], position_B, -1).amax(dim=-1)
    bank_ND[indices_B] = entries_BD[last_B]

"""Accuracy, calibration and diversity, as counts and sums that add over shards of the data.

S networks, B images, K classes; R = S networks + the ensemble rules, the rows of the result.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from evaluation.ensemble import RULES, ensemble_scores, rule_index

NUM_BINS = 15


def label_ranks(scores_RBK: Tensor, labels_B: Tensor) -> Tensor:
    """How many classes come before the labelled one: (R, B, K), int64 (B,) -> int64 (R, B); 0 is a correct top-1.

    Equal scores go by class index, as in argmax, whatever the device; a NaN never makes a prediction correct.
    """
    index_RB1 = labels_B.expand(scores_RBK.shape[:2]).unsqueeze(-1)
    own_RB1 = scores_RBK.gather(-1, index_RB1)
    classes_K = torch.arange(scores_RBK.shape[-1], device=scores_RBK.device)
    before_RBK = ~(scores_RBK <= own_RB1) | ((scores_RBK == own_RB1) & (classes_K < index_RB1))
    return before_RBK.sum(dim=-1)


class EvaluationCounts:
    """What an evaluation adds up; `update` never waits for the device, `result` divides once at the end.

    Args:
        num_networks: S.
        num_classes: K.
        rule: the ensemble rule that is reported, one of `evaluation.ensemble.RULES`; the others get rows too.
        device: where the logits are.

    Raises:
        UserError: unknown rule.

    Attributes:
        counts: int64 tensors by name, among them `confusion` (K, K): images by label (row) and prediction of the
            chosen rule (column).
        sums: float64 tensors by name.
    """

    def __init__(self, num_networks: int, num_classes: int, rule: str, device: torch.device | str = "cpu") -> None:
        self.num_networks = num_networks
        self.rule = rule
        self._chosen = num_networks + rule_index(rule)
        rows = num_networks + len(RULES)
        integers: dict[str, tuple[int, ...]] = {
            "seen": (),
            "correct1": (rows,),
            "correct5": (rows,),
            "bin_seen": (rows, NUM_BINS),
            "bin_correct": (rows, NUM_BINS),
            "disagreements": (),
            "confusion": (num_classes, num_classes),
        }
        reals: dict[str, tuple[int, ...]] = {
            "nll": (rows,),
            "brier": (rows,),
            "bin_confidence": (rows, NUM_BINS),
            "js": (),
        }
        self.counts = {name: torch.zeros(size, dtype=torch.int64, device=device) for name, size in integers.items()}
        self.sums = {name: torch.zeros(size, dtype=torch.float64, device=device) for name, size in reals.items()}

    @torch.no_grad()
    def update(self, logits_SBK: Tensor, labels_B: Tensor) -> None:
        """Add one batch.

        Raises:
            ValueError: the shape is not (S, B, K) with the S and K of this object.
        """
        num_networks, num_classes = self.num_networks, len(self.counts["confusion"])
        if logits_SBK.dim() != 3 or logits_SBK.shape[0] != num_networks or logits_SBK.shape[2] != num_classes:
            raise ValueError(f"expected logits ({num_networks}, B, {num_classes}), got {tuple(logits_SBK.shape)}")
        logits_SBK = logits_SBK.double()
        scores_RBK = torch.cat([logits_SBK, torch.stack([ensemble_scores(logits_SBK, rule) for rule in RULES])])
        log_probs_RBK = scores_RBK.log_softmax(dim=-1)
        probs_RBK = log_probs_RBK.exp()
        ranks_RB = label_ranks(scores_RBK, labels_B)
        predictions_RB = scores_RBK.argmax(dim=-1)
        correct_RB = ranks_RB == 0
        label_log_probs_RB = log_probs_RBK.gather(-1, labels_B.expand(ranks_RB.shape).unsqueeze(-1)).squeeze(-1)

        counts, sums = self.counts, self.sums
        counts["seen"] += len(labels_B)
        counts["correct1"] += correct_RB.sum(dim=1)
        counts["correct5"] += (ranks_RB < 5).sum(dim=1)
        sums["nll"] -= label_log_probs_RB.sum(dim=1)
        sums["brier"] += (probs_RBK.square().sum(dim=-1) - 2 * label_log_probs_RB.exp() + 1).sum(dim=1)

        # Bin m of M holds the confidences in ((m - 1) / M, m / M].
        confidence_RB = probs_RBK.amax(dim=-1)
        bins_RB = (confidence_RB * NUM_BINS).ceil() - 1
        in_bin_RBM = bins_RB.unsqueeze(-1) == torch.arange(NUM_BINS, device=bins_RB.device)
        counts["bin_seen"] += in_bin_RBM.sum(dim=1)
        counts["bin_correct"] += (in_bin_RBM & correct_RB.unsqueeze(-1)).sum(dim=1)
        sums["bin_confidence"] += torch.where(in_bin_RBM, confidence_RB.unsqueeze(-1), 0.0).sum(dim=1)

        own_SB, log_probs_SBK = predictions_RB[:num_networks], log_probs_RBK[:num_networks]
        counts["disagreements"] += (own_SB.unsqueeze(1) != own_SB).sum()
        sums["js"] += _summed_js(log_probs_SBK)
        cells_B = labels_B * num_classes + predictions_RB[self._chosen]
        counts["confusion"].view(-1).scatter_add_(0, cells_B, torch.ones_like(cells_B))

    def all_reduce(self, add_over_processes: Callable[[Tensor], object]) -> None:
        """Add the counts and sums of all processes; the function does so in place for one tensor."""
        for value in (*self.counts.values(), *self.sums.values()):
            add_over_processes(value)

    def result(self) -> dict[str, Any]:
        """Plain numbers for JSON: accuracies in percent, NLL and JS in nats, ECE and disagreement in [0, 1].

        seen, rule; ensemble_acc1, _acc5, _nll, _brier, _ece of the chosen rule; acc1, acc5, nll, brier, ece as lists
        over the networks; rules, the five figures of every ensemble rule; disagreement and js_divergence, means over
        pairs of networks (0 for one network). A figure that is not finite, or of no image at all, is None.
        """
        counts = {name: value.double().cpu() for name, value in self.counts.items()}
        sums = {name: value.cpu() for name, value in self.sums.items()}
        seen = counts["seen"]
        gaps_RM = (counts["bin_correct"] - sums["bin_confidence"]).abs()
        figures_R = {
            "acc1": 100 * counts["correct1"] / seen,
            "acc5": 100 * counts["correct5"] / seen,
            "nll": sums["nll"] / seen,
            "brier": sums["brier"] / seen,
            "ece": gaps_RM.sum(dim=1) / seen,
        }
        columns = {name: [_number(value) for value in values] for name, values in figures_R.items()}
        by_rule = {
            rule: {name: column[self.num_networks + i] for name, column in columns.items()}
            for i, rule in enumerate(RULES)
        }
        pairs = max(self.num_networks * (self.num_networks - 1), 1)
        return {
            "seen": int(seen),
            "rule": self.rule,
            **{f"ensemble_{name}": value for name, value in by_rule[self.rule].items()},
            **{name: column[: self.num_networks] for name, column in columns.items()},
            "rules": by_rule,
            "disagreement": _number(counts["disagreements"] / (pairs * seen)),
            "js_divergence": _number(sums["js"] / (pairs * seen)),
        }


def _summed_js(log_probs_SBK: Tensor) -> Tensor:
    """Jensen-Shannon divergence summed over ordered pairs of networks and over images: (S, B, K) -> scalar.

    The sum over i and j of KL(p_i ‖ (p_i + p_j) / 2): (i, j) and (j, i) together are twice the pair's divergence.
    """
    sums = []
    for own_BK in log_probs_SBK:
        log_means_SBK = torch.logaddexp(own_BK, log_probs_SBK) - math.log(2)
        sums.append((own_BK.exp() * (own_BK - log_means_SBK)).sum())
    return torch.stack(sums).sum()


def _number(value: Tensor) -> float | None:
    number = float(value)
    return number if math.isfinite(number) else None

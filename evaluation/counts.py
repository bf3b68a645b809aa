"""What an evaluation adds up: the sums of every counted metric, and the confusion matrix.

S networks, B images, K classes; R = S networks + the ensemble rules, the rows of the result.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from evaluation.ensemble import RULES, ensemble_scores, rule_index
from evaluation.metrics import LogitsMetric, Scored, Shape, counted, in_order, metrics


class EvaluationCounts:
    """Sums over the images seen; `update` never waits for the device, `result` divides once at the end.

    Args:
        num_networks: S.
        num_classes: K.
        rule: the ensemble rule that is reported, one of `evaluation.ensemble.RULES`; the others get rows too.
        device: where the logits are.

    Raises:
        UserError: unknown rule.

    Attributes:
        seen: images, int64 scalar.
        confusion_KK: int64, images by label (row) and prediction of the chosen rule (column).
        sums: int64 and float64 tensors by metric and name.
    """

    def __init__(self, num_networks: int, num_classes: int, rule: str, device: torch.device | str = "cpu") -> None:
        self.shape = Shape(num_networks, num_classes, device)
        self.rule = rule
        self._chosen = num_networks + rule_index(rule)
        self.metrics = counted()
        self.seen = self.shape.counts()
        self.confusion_KK = self.shape.counts(num_classes, num_classes)
        self._one = self.shape.counts() + 1
        self.sums = {name: metric.zeros(self.shape) for name, metric in self.metrics.items()}

    @torch.no_grad()
    def update(self, logits_SBK: Tensor, labels_B: Tensor) -> None:
        """Add one batch.

        Raises:
            ValueError: the shape is not (S, B, K) with the S and K of this object.
        """
        num_networks, num_classes = self.shape.num_networks, self.shape.num_classes
        if logits_SBK.dim() != 3 or logits_SBK.shape[0] != num_networks or logits_SBK.shape[2] != num_classes:
            raise ValueError(f"expected logits ({num_networks}, B, {num_classes}), got {tuple(logits_SBK.shape)}")
        batch = Scored(logits_SBK.double(), labels_B)
        self.seen += len(labels_B)
        cells_B = torch.add(batch.predictions_RB[self._chosen], labels_B, alpha=num_classes)
        self.confusion_KK.view(-1).scatter_add_(0, cells_B, self._one.expand_as(cells_B))
        for name, metric in self.metrics.items():
            metric.add(self.sums[name], batch)

    def tensors(self) -> list[Tensor]:
        """Everything that adds up."""
        return [self.seen, self.confusion_KK, *(value for sums in self.sums.values() for value in sums.values())]

    def all_reduce(self, add_over_processes: Callable[[Tensor], object]) -> None:
        """Add the counts and sums of all processes; the function does so in place for one tensor."""
        for value in self.tensors():
            add_over_processes(value)

    def result(self) -> dict[str, Any]:
        """Plain numbers for JSON, in the units of each metric.

        seen, rule; of a metric of rows `ensemble_<name>` by the chosen rule, `<name>` as a list over the networks, and
        under `rules` its figure of every rule; of a metric of all networks `<name>`. A figure that is not finite, or of
        no image at all, is None.
        """
        seen, num_networks = self.seen.double().cpu(), self.shape.num_networks
        figures = {
            name: metric.figure({k: v.double().cpu() for k, v in self.sums[name].items()}, seen, self.shape)
            for name, metric in self.metrics.items()
        }
        columns = {name: numbers(value) for name, value in figures.items() if self.metrics[name].of_rows}
        by_rule = {
            rule: {name: column[num_networks + i] for name, column in columns.items()} for i, rule in enumerate(RULES)
        }
        together = {name: number(float(value)) for name, value in figures.items() if not self.metrics[name].of_rows}
        older = {self.metrics[name].also: value for name, value in together.items() if self.metrics[name].also}
        return {
            "seen": int(seen),
            "rule": self.rule,
            **{f"ensemble_{name}": value for name, value in by_rule[self.rule].items()},
            **{name: column[:num_networks] for name, column in columns.items()},
            "rules": by_rule,
            **together,
            **older,
        }


def logits_figures(names: Sequence[str], logits_SNK: Tensor, labels_N: Tensor, rule: str) -> dict[str, Any]:
    """Figures of metrics that need all logits, in the form of `EvaluationCounts.result`.

    Args:
        names: of `LogitsMetric`s.
        logits_SNK, labels_N: of all images, in their order.
        rule: the ensemble rule that is reported.
    """
    logits_SNK = logits_SNK.double()
    figures: dict[str, Any] = {"rules": {each: {} for each in RULES}}
    for name in in_order(names):
        metric = metrics.get(name)
        assert isinstance(metric, LogitsMetric)
        if not metric.of_rows:
            figures[name] = number(metric.of_networks(logits_SNK, labels_N))
            continue
        # row by row: all of them at once may not fit
        figures[name] = [number(metric.of_row(row_NK.log_softmax(dim=-1), labels_N)) for row_NK in logits_SNK]
        for each in RULES:
            row_NK = ensemble_scores(logits_SNK, each).log_softmax(dim=-1)
            figures["rules"][each][name] = number(metric.of_row(row_NK, labels_N))
        figures[f"ensemble_{name}"] = figures["rules"][rule][name]
    return figures


def number(value: float) -> float | None:
    """A figure for JSON: None where it is not finite."""
    return value if math.isfinite(value) else None


def numbers(values: Tensor) -> list[float | None]:
    """The same for a vector."""
    return [number(value) for value in values.tolist()]

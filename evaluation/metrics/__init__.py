"""Figures of an evaluation: each is one small file here, registered under the name that results.json has.

S networks, B images of a batch, N images of a split, K classes; R = S networks + the ensemble rules: the rows.

A metric is of one of two kinds. A `CountedMetric` adds up over batches on the device, then over processes, and is
divided once; it is taken in every evaluation, in training too. A `LogitsMetric` needs the logits of all images at
once, in the order of the images, because no sum gives it; eval.py takes it when --metrics names it. Either is a figure
of every row, such as an accuracy, or one figure of all networks together, such as their disagreement. Tables, JSON,
CSV and TensorBoard take both from the registry.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from evaluation.ensemble import RULES, scores_of_all_rules
from utils.registry import Registry

Sums = Mapping[str, Tensor]  # what a metric adds up: int64 counts and float64 sums by name


@dataclass(frozen=True)
class Scored:
    """One batch as metrics see it; what several of them need is computed once.

    Attributes:
        logits_SBK: of the networks, float64.
        labels_B: int64.
    """

    logits_SBK: Tensor
    labels_B: Tensor

    @cached_property
    def scores_RBK(self) -> Tensor:
        """Logits of the networks, then the scores of every ensemble rule in the order of RULES."""
        return torch.cat([self.logits_SBK, *(row_BK.unsqueeze(0) for row_BK in scores_of_all_rules(self.logits_SBK))])

    @cached_property
    def log_probs_RBK(self) -> Tensor:
        """Log-probabilities."""
        return self.scores_RBK.log_softmax(dim=-1)

    @cached_property
    def probs_RBK(self) -> Tensor:
        """Probabilities."""
        return self.log_probs_RBK.exp()

    @cached_property
    def predictions_RB(self) -> Tensor:
        """The class of the highest score, int64."""
        return self.scores_RBK.argmax(dim=-1)

    @cached_property
    def ranks_RB(self) -> Tensor:
        """How many classes come before the labelled one, int64; 0 is a correct top-1."""
        return label_ranks(self.scores_RBK, self.labels_B)

    @cached_property
    def hits_RB(self) -> Tensor:
        """Whether the labelled class has the highest score."""
        return self.ranks_RB == 0

    @cached_property
    def label_log_probs_RB(self) -> Tensor:
        """Log-probability of the labelled class."""
        return self.log_probs_RBK.gather(-1, self.labels_B.expand(self.scores_RBK.shape[:2]).unsqueeze(-1)).squeeze(-1)


@dataclass(frozen=True)
class Shape:
    """How large an evaluation is, and where it adds up.

    Attributes:
        num_networks, num_rows, num_classes: S, R and K.
        device: where the sums live.
    """

    num_networks: int
    num_classes: int
    device: torch.device | str

    @property
    def num_rows(self) -> int:
        """R."""
        return self.num_networks + len(RULES)

    @property
    def num_pairs(self) -> int:
        """Ordered pairs of different networks; 1 for one network, so that means over pairs are 0 there."""
        return max(self.num_networks * (self.num_networks - 1), 1)

    def counts(self, *size: int) -> Tensor:
        """Zeros to count in: int64."""
        return torch.zeros(size, dtype=torch.int64, device=self.device)

    def sums(self, *size: int) -> Tensor:
        """Zeros to sum in: float64."""
        return torch.zeros(size, dtype=torch.float64, device=self.device)


class Metric(ABC):
    """What both kinds have; instances hold no state.

    Attributes:
        of_rows: True for a figure of every network and every ensemble rule; False for one of all networks together,
            which is shown where there are two networks or more.
        title: heading of its column in a table.
        digits: behind the decimal point, in a table.
        place: tables and files order metrics by this number, then by name.
        also: of a figure of all networks, an older name under which metrics.jsonl has it too.
    """

    of_rows: ClassVar[bool] = True
    title: str
    digits: int = 4
    place: int = 100
    also: str = ""

    def cell(self, value: float | None) -> str:
        """The figure as a table has it."""
        return "not finite" if value is None else f"{value:.{self.digits}f}"

    def sentence(self, value: float | None) -> str:
        """The figure of all networks together, as a part of the sentence below a table."""
        return f"{self.title} {self.cell(value)}"


class CountedMetric(Metric):
    """A figure that adds up over any cut of the images."""

    @abstractmethod
    def zeros(self, shape: Shape) -> dict[str, Tensor]:
        """The empty sums, made by `Shape.counts` and `Shape.sums`."""

    @abstractmethod
    def add(self, sums: Sums, batch: Scored) -> None:
        """Add one batch, in place, without waiting for the device."""

    @abstractmethod
    def figure(self, sums: Sums, seen: Tensor, shape: Shape) -> Tensor:
        """The figure of what was added up: float64 [R], or a scalar where not `of_rows`.

        Args:
            sums: on the CPU, counts as float64.
            seen: images, float64 scalar; 0 images give NaN, which becomes None.
            shape: as `zeros` had it.
        """


class LogitsMetric(Metric):
    """A figure of all images at once: implement the one of the two that fits `of_rows`."""

    def of_row(self, log_probs_NK: Tensor, labels_N: Tensor) -> float:
        """The figure of one network or one ensemble rule, from float64 log-probabilities."""
        raise NotImplementedError

    def of_networks(self, logits_SNK: Tensor, labels_N: Tensor) -> float:
        """The figure of all networks together, from float64 logits."""
        raise NotImplementedError


metrics: Registry[Metric] = Registry("metric", "--metrics", __name__)


def in_order(names: Sequence[str]) -> list[str]:
    """Names of metrics in the order of tables."""
    return sorted(names, key=lambda name: (metrics.get(name).place, name))


def counted() -> dict[str, CountedMetric]:
    """Every counted metric by name, in the order of tables."""
    found = {name: metrics.get(name) for name in in_order(metrics.names())}
    return {name: metric for name, metric in found.items() if isinstance(metric, CountedMetric)}


def label_ranks(scores_RBK: Tensor, labels_B: Tensor) -> Tensor:
    """How many classes come before the labelled one: (R, B, K), int64 (B,) -> int64 (R, B); 0 is a correct top-1.

    Equal scores go by class index, as in argmax, whatever the device; a NaN never makes a prediction correct.
    """
    index_RB1 = labels_B.expand(scores_RBK.shape[:2]).unsqueeze(-1)
    own_RB1 = scores_RBK.gather(-1, index_RB1)
    num_classes = scores_RBK.shape[-1]
    is_earlier_RBK = torch.arange(num_classes, device=scores_RBK.device) < index_RB1
    not_before_RBK = torch.where(is_earlier_RBK, scores_RBK < own_RB1, scores_RBK <= own_RB1)
    return num_classes - not_before_RBK.sum(dim=-1)

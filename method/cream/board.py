"""The board of prioritised paths of a Cream search, and the draw of the path that a step trains.

Source: Peng et al., "Cream of the Crop", NeurIPS 2020, and its published code's behaviour. Ours: probabilities are
honoured, fixed stages do not count in the `teacher` histogram, equal entries are no error.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

Path = Sequence[Sequence[int]]


@dataclass(frozen=True)
class BoardEntry:
    """A path that did well, and what judges how well it matches another one.

    Attributes:
        score: top-1 in percent on the training batch of the step that trained it; never measured again.
        flops: estimated operations in millions.
        arch: operator index of every block, per stage.
        images: [SLICE, C, H, W], the first of that batch.
        probs: [SLICE, K], the path's own softmax outputs for them.
    """

    score: float
    flops: float
    arch: Path
    images: Tensor
    probs: Tensor


class PathBoard:
    """The best paths so far, best first: by score, then the one with more operations.

    Args:
        pool_size: how many entries are kept.
        acc_gap: percentage points by which a dearer path must beat the worst entry.
        start_epoch: up to this epoch (from 0, inclusive) nothing is admitted.
    """

    def __init__(self, pool_size: int = 10, acc_gap: float = 5.0, start_epoch: int = 20) -> None:
        self.pool_size = pool_size
        self.acc_gap = acc_gap
        self.start_epoch = start_epoch
        self.entries: list[BoardEntry] = []

    def __len__(self) -> int:
        return len(self.entries)

    def admits(self, score: float, flops: float, epoch: int) -> bool:
        """Whether a path would enter: room left, a clear gap, or better and cheaper than the worst entry."""
        if epoch <= self.start_epoch:
            return False
        if len(self.entries) < self.pool_size:
            return True
        worst = self.entries[-1]
        return score > worst.score + self.acc_gap or (score > worst.score and flops < worst.flops)

    def add(self, entry: BoardEntry) -> None:
        """Put an admitted entry in its place; the last one falls off a full board."""
        self.entries.append(entry)
        self.entries.sort(key=lambda e: (e.score, e.flops), reverse=True)
        del self.entries[self.pool_size :]

    def result(self, minimum: float, maximum: float) -> tuple[BoardEntry, bool] | None:
        """(best entry whose operations lie in the interval, True), else (best entry, False); None if empty."""
        inside = [entry for entry in self.entries if minimum <= entry.flops <= maximum]
        if inside:
            return inside[0], True
        return (self.entries[0], False) if self.entries else None

    def rows(self) -> list[dict[str, Any]]:
        """score [%], flops [million operations] and arch of every entry, best first."""
        return [
            {"score": entry.score, "flops": entry.flops, "arch": [list(stage) for stage in entry.arch]}
            for entry in self.entries
        ]

    def state_dict(self) -> list[dict[str, Any]]:
        """Everything on the board as plain data and tensors."""
        return [
            {**row, "images": entry.images, "probs": entry.probs}
            for row, entry in zip(self.rows(), self.entries, strict=True)
        ]

    def load_state_dict(self, state: Iterable[Mapping[str, Any]], device: torch.device | str = "cpu") -> None:
        """Inverse of `state_dict`, with the tensors put on `device`."""
        self.entries = [
            BoardEntry(row["score"], row["flops"], row["arch"], row["images"].to(device), row["probs"].to(device))
            for row in state
        ]


class PathSampler:
    """Independent draws of one operator per block, from a generator of its own.

    Every process makes the same draws from the same seed. For uniform and for given probabilities the draws are
    those of NumPy's legacy generator, one `choice` per stage.

    Args:
        depths: blocks of every searchable stage.
        num_operators: how many operators a block chooses from.
        seed: of the generator.
        probs: probability of every operator, in proportion, or None for equal ones.
    """

    def __init__(
        self, depths: Sequence[int], num_operators: int, seed: int, probs: Sequence[float] | None = None
    ) -> None:
        self.depths = tuple(depths)
        self.num_operators = num_operators
        # NumPy refuses a sum that is off by more than 1.5e-8, which seven digits of a third are
        self.probs = None if probs is None else np.asarray(probs, dtype=np.float64) / np.sum(probs)
        self.generator = np.random.RandomState(seed % 2**32)

    def draw(self, probs: Sequence[float] | None = None) -> list[list[int]]:
        """The next path; `probs` in place of the sampler's own."""
        weights = self.probs if probs is None else probs
        stages = [self.generator.choice(self.num_operators, depth, p=weights).tolist() for depth in self.depths]
        return [[0], *stages, [0]]

    def histogram(self, paths: Iterable[Path]) -> list[float] | None:
        """Share of every operator in the searchable stages of some paths; None if there are no paths."""
        indices = [index for path in paths for stage in path[1:-1] for index in stage]
        if not indices:
            return None
        return [float(share) for share in np.bincount(indices, minlength=self.num_operators) / len(indices)]

    def state_dict(self) -> dict[str, Any]:
        """Where the generator stands, as plain data and a tensor."""
        _, keys, position, has_gauss, cached = self.generator.get_state(legacy=True)
        return {
            "keys": torch.from_numpy(np.asarray(keys, dtype=np.int64)),
            "position": int(position),
            "has_gauss": int(has_gauss),
            "cached": float(cached),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Inverse of `state_dict`."""
        keys = state["keys"].cpu().numpy().astype(np.uint32)
        self.generator.set_state(("MT19937", keys, state["position"], state["has_gauss"], state["cached"]))

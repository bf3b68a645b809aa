"""Weights in autocast's type, written by one operation a step in place of a cast for each of them."""

from collections.abc import Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from model.casting import CastWatch
from model.splitnet import SplitNet


class WeightCopies:
    """Around a forward and backward pass: layers compute with copies of the weights that autocast would cast.

    The copies are written before the pass, whoever has changed the weights, and their gradients reach the weights after
    it, each by one operation for all: the numbers are those of autocast, bit for bit. The first pass is made without
    them, so that the networks' execution is settled, and in the second the weights are found that are cast and used for
    nothing else. Stacked networks, whose weights are joined before they are cast, have none.

    Args:
        module: what is trained.
        network: the SplitNet in it.
        dtype: of autocast.
    """

    def __init__(self, module: nn.Module, network: SplitNet, dtype: torch.dtype) -> None:
        self._module, self._network, self._dtype = module, network, dtype
        self._passes = 0
        self._watch: CastWatch | None = None
        self._weights: list[Tensor] = []
        self._copies: list[Tensor] = []
        self._places: list[tuple[nn.Module, str, int]] = []  # of each weight, by its number

    def __enter__(self) -> None:
        self._passes += 1
        if self._network.execution == "stacked":
            return
        if self._passes == 2:
            self._watch = CastWatch(self._module, self._dtype)
            self._watch.__enter__()
        elif self._weights:
            with torch.no_grad():
                torch._foreach_copy_(self._copies, self._weights)
            self._put(self._copies)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._watch is not None:
            self._watch.__exit__(kind, error, trace)
            self._copy(self._watch.found())
            self._watch = None
        elif self._weights:
            self._put(self._weights)
            self._hand_over_gradients()

    def _copy(self, weights: Sequence[nn.Parameter]) -> None:
        """Make copies of the weights, for the next pass on."""
        self._weights = [*weights]
        self._copies = [
            nn.Parameter(torch.empty_like(weight, dtype=self._dtype), weight.requires_grad) for weight in weights
        ]
        numbers = {id(weight): number for number, weight in enumerate(weights)}
        self._places = [
            (part, name, numbers[id(weight)])
            for part in self._module.modules()
            for name, weight in part._parameters.items()
            if id(weight) in numbers
        ]

    def _put(self, parameters: Sequence[Any]) -> None:
        """Let the layers have these in the places of the weights."""
        for part, name, number in self._places:
            part._parameters[name] = parameters[number]

    def _hand_over_gradients(self) -> None:
        """From the copies to the weights, in the weights' type."""
        learned = [number for number, copy in enumerate(self._copies) if copy.grad is not None]
        of_copies: list[Any] = [self._copies[number].grad for number in learned]
        gradients = [torch.empty_like(self._weights[number]) for number in learned]
        if learned:
            torch._foreach_copy_(gradients, of_copies)
        for number, gradient in zip(learned, gradients, strict=True):
            weight = self._weights[number]
            weight.grad = gradient if weight.grad is None else weight.grad + gradient
            self._copies[number].grad = None

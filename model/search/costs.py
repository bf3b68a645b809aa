"""What blocks and networks of a Cream search are made of, and what each costs. Arithmetic only, no modules."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple, Protocol


def div8(value: float) -> int:
    """The multiple of 8 nearest to `value`, at least 8 and never below 90 % of it."""
    rounded = max(8, 8 * int((value + 4) // 8))
    return rounded + 8 if rounded < 0.9 * value else rounded


def strided(side: int, stride: int) -> int:
    """Side of the map after a convolution with an odd kernel, padding kernel // 2 and this stride."""
    return (side - 1) // stride + 1


class Cost(NamedTuple):
    """Exact counts for one image.

    Attributes:
        macs: multiply-adds of convolutions and linear layers.
        ref_flops: the published count: MACs, and 1 per bias output, 2 per batch-norm input, 1 per ReLU element,
            1 per input element of an average pool; Swish, hard sigmoid, gate and shortcut are free.
        params: parameters.
    """

    macs: int = 0
    ref_flops: int = 0
    params: int = 0


def total(costs: Iterable[Cost]) -> Cost:
    """The sum of costs, count by count."""
    return Cost(*(sum(counts) for counts in zip(Cost(), *costs, strict=True)))


def _conv(in_channels: int, out_channels: int, kernel: int, side: int, *, groups: int = 1, bias: bool = False) -> Cost:
    """A convolution (or, at side 1 and kernel 1, a linear layer) whose output is side x side."""
    weights = kernel**2 * (in_channels // groups) * out_channels
    extra = out_channels if bias else 0
    return Cost(weights * side**2, (weights + extra) * side**2, weights + extra)


def _batch_norm(channels: int, side: int) -> Cost:
    return Cost(0, 2 * channels * side**2, 2 * channels)


def _pool(channels: int, side: int) -> Cost:
    return Cost(0, channels * side**2, 0)


def reduced_channels(channels: int) -> int:
    """Width of the bottleneck inside squeeze-and-excitation on `channels` (expanded) channels."""
    return div8(channels / 4)


def _squeeze_excite(channels: int, side: int) -> Cost:
    reduced = reduced_channels(channels)
    return total(
        [
            _pool(channels, side),
            _conv(channels, reduced, 1, 1, bias=True),
            Cost(0, reduced, 0),
            _conv(reduced, channels, 1, 1, bias=True),
        ]
    )


@dataclass(frozen=True)
class Operator:
    """What a searchable block may be: an inverted residual with this depthwise kernel and expansion."""

    kernel: int
    expansion: int


@dataclass(frozen=True)
class BlockPlan:
    """One inverted residual: channels in and out, the operator's numbers, and the stride of its depthwise part."""

    in_channels: int
    out_channels: int
    kernel: int
    expansion: int
    stride: int

    @property
    def mid_channels(self) -> int:
        """Width between the two 1x1 convolutions."""
        return div8(self.in_channels * self.expansion)

    @property
    def has_shortcut(self) -> bool:
        """Whether the input is added to the output."""
        return self.stride == 1 and self.in_channels == self.out_channels

    def cost(self, side: int) -> Cost:
        """Counts for an input of side x side pixels."""
        mid, out_side = self.mid_channels, strided(side, self.stride)
        return total(
            [
                _conv(self.in_channels, mid, 1, side),
                _batch_norm(mid, side),
                _conv(mid, mid, self.kernel, out_side, groups=mid),
                _batch_norm(mid, out_side),
                _squeeze_excite(mid, out_side),
                _conv(mid, self.out_channels, 1, out_side),
                _batch_norm(self.out_channels, out_side),
            ]
        )


@dataclass(frozen=True)
class FramePlan:
    """The parts that no search changes: stem, stage 0, last stage, head.

    Attributes:
        stem_channels, stem_stride: the 3x3 convolution on the image.
        base_channels: output of stage 0, a depthwise-separable block with squeeze-and-excitation.
        in_channels: what the last stage gets.
        tail_channels: output of the last stage, a 1x1 convolution.
        head_channels: embedding dimension D, from a 1x1 convolution behind the pool.
    """

    stem_channels: int
    stem_stride: int
    base_channels: int
    in_channels: int
    tail_channels: int
    head_channels: int

    def stem_cost(self, side: int) -> Cost:
        """The stem's convolution, without its batch norm, for an image of side x side."""
        return _conv(3, self.stem_channels, 3, strided(side, self.stem_stride))

    def stem_norm_cost(self, side: int) -> Cost:
        """The stem's batch norm, for an image of side x side."""
        return _batch_norm(self.stem_channels, strided(side, self.stem_stride))

    def base_cost(self, side: int) -> Cost:
        """Stage 0 on a map of side x side."""
        channels = self.stem_channels
        return total(
            [
                _conv(channels, channels, 3, side, groups=channels),
                _batch_norm(channels, side),
                _squeeze_excite(channels, side),
                _conv(channels, self.base_channels, 1, side),
                _batch_norm(self.base_channels, side),
            ]
        )

    def tail_cost(self, side: int) -> Cost:
        """The last stage on a map of side x side."""
        return total([_conv(self.in_channels, self.tail_channels, 1, side), _batch_norm(self.tail_channels, side)])

    def head_cost(self, side: int) -> Cost:
        """Global pool and head convolution on a map of side x side."""
        return total([_pool(self.tail_channels, side), _conv(self.tail_channels, self.head_channels, 1, 1, bias=True)])


@dataclass(frozen=True)
class NetworkPlan:
    """A stand-alone network: the frame, the blocks of every searchable stage, K classes."""

    frame: FramePlan
    stages: tuple[tuple[BlockPlan, ...], ...]
    num_classes: int

    def cost(self, resolution: int) -> Cost:
        """Counts for an image of resolution x resolution pixels."""
        frame = self.frame
        costs = [frame.stem_cost(resolution), frame.stem_norm_cost(resolution)]
        side = strided(resolution, frame.stem_stride)
        costs.append(frame.base_cost(side))
        for block in (block for stage in self.stages for block in stage):
            costs.append(block.cost(side))
            side = strided(side, block.stride)
        classifier = _conv(frame.head_channels, self.num_classes, 1, 1, bias=True)
        return total([*costs, frame.tail_cost(side), frame.head_cost(side), classifier])


class Planned(Protocol):
    """A network that knows its plan."""

    @property
    def plan(self) -> NetworkPlan: ...


def macs(network: Planned, resolution: int) -> int:
    """Multiply-adds of a network's convolutions and linear layers for one image of resolution x resolution pixels."""
    return network.plan.cost(resolution).macs


def ref_flops(network: Planned, resolution: int) -> int:
    """The operation count that the published model names are made of (see `Cost`), for one image."""
    return network.plan.cost(resolution).ref_flops

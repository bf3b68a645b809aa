"""Frozen copies of networks that other jobs train: what they predict is what this job's network learns from.

Codistillation with stale predictions, Anil et al., arXiv:1804.03235: weights travel now and then, and every job
computes what its peers' weights say of its own images.
"""

import copy
import time
from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor, nn

from loss import at_least_float32
from method.inner import Asleep
from utils.seed import STREAM_PEERS, numpy_generator


class Peers:
    """The S - 1 networks of the other jobs, as this job knows them.

    It is no module: no peer is trained, wrapped by DDP, or kept in a checkpoint.

    Args:
        network: this job's own network, on its device; each peer is a copy of its structure.
        number: of this job's network, counted from 0.
        split_factor: S.
        seed: of the run; decides the draws of `most`.
        burn_in: epochs in which there are no peers.
        most: how many of them a step learns from at most; None: all.

    Attributes:
        present: numbers of the peers that a step may learn from, in ascending order; none at first.
        metrics: of the last step, detached scalars: `peers`, how many it learnt from, and `agreement`, the share of
            images on which this network and a peer say the same class, a mean over the peers; 0 without any.
        burn_in: see above.
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        number: int,
        split_factor: int,
        seed: int,
        burn_in: int = 0,
        most: int | None = None,
    ) -> None:
        self.number, self.burn_in = number, burn_in
        self._seed, self._most = seed, most
        self._copies = {j: Asleep(copy.deepcopy(network)) for j in range(split_factor) if j != number}
        self._device = next(network.parameters()).device
        self._stopwatch = Stopwatch(self._device)
        self.present: Sequence[int] = ()
        self.metrics: dict[str, Tensor] = {}

    @property
    def numbers(self) -> list[int]:
        """The numbers of all peers."""
        return list(self._copies)

    def network(self, number: int) -> nn.Module:
        """The copy that stands for a peer."""
        return self._copies[number].network

    def take(self, number: int, state: Mapping[str, Tensor]) -> None:
        """Give a peer new weights."""
        self.network(number).load_state_dict(state)

    def set_present(self, numbers: Collection[int]) -> None:
        """Say which peers steps learn from now on."""
        self.present = sorted(numbers)

    def chosen(self, epoch: int, step: int) -> list[int]:
        """The peers that a step learns from: all that are present or, of more than `most`, those drawn for the step."""
        if epoch < self.burn_in:
            return []
        if self._most is None or len(self.present) <= self._most:
            return list(self.present)
        drawn = numpy_generator(self._seed, STREAM_PEERS, step, self.number).permutation(len(self.present))
        return sorted(self.present[i] for i in drawn[: self._most])

    def join(self, logits_1BK: Tensor, images_BCHW: Tensor, *, epoch: int, step: int) -> Tensor:
        """This network's logits among its P peers' constant ones, in the order of the numbers.

        [1, B, K] -> [1 + P, B, K].

        Args:
            logits_1BK: of this network, in float32 or better.
            images_BCHW: the view that it has seen.
            epoch, step: of the step, counted from 0.
        """
        chosen = self.chosen(epoch, step)
        zero = logits_1BK.new_zeros(())
        self.metrics = {"peers": zero + len(chosen), "agreement": zero}
        if not chosen:
            return logits_1BK
        with self._stopwatch:
            rows = {j: at_least_float32(self._copies[j](images_BCHW)) for j in chosen}
            guesses_B = logits_1BK[0].argmax(dim=-1)
            same = [(logits_BK.argmax(dim=-1) == guesses_B).to(zero.dtype).mean() for logits_BK in rows.values()]
            self.metrics["agreement"] = torch.stack(same).mean()
        rows[self.number] = logits_1BK[0]
        return torch.stack([rows[j].to(logits_1BK.dtype) for j in sorted(rows)])

    def seconds(self) -> float:
        """What the peers' predictions have taken since the last call."""
        return self._stopwatch.read()


class Stopwatch:
    """Seconds that a device spends on a block; on a GPU it is asked for them when it has come past the block anyway.

    Args:
        device: where the block computes.
    """

    def __init__(self, device: torch.device) -> None:
        self._is_gpu = device.type == "cuda"
        self._seconds, self._began = 0.0, 0.0
        self._pairs: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def _event(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def __enter__(self) -> None:
        if self._is_gpu:
            start = self._event()
            self._pairs.append((start, start))
        self._began = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        if self._is_gpu:
            self._pairs[-1] = (self._pairs[-1][0], self._event())
        else:
            self._seconds += time.perf_counter() - self._began

    def read(self) -> float:
        """Seconds since the last call, of blocks that are done."""
        done = [pair for pair in self._pairs if pair[1].query()]
        self._pairs = self._pairs[len(done) :]
        seconds = self._seconds + sum(start.elapsed_time(end) for start, end in done) / 1000
        self._seconds = 0.0
        return seconds

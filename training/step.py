"""The training step: one batch -> views -> mixing -> forward, backward, update of the weights -> metrics."""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dataset.loader import Batch
from dataset.mixup import apply_mix, as_cutmix, draw_mix, is_cutmix_step
from dataset.options import DataOptions
from dataset.sampler import shard
from dataset.views import ViewMaker
from method import Method, Progress, StepOutput
from training.copies import WeightCopies
from training.lone_image import is_lone_image
from training.optim import set_learning_rate
from training.replay import ReplayedStep
from training.update import WeightUpdate
from utils import distributed
from utils.errors import RunError
from utils.launch import World
from utils.precision import Precision, autocast
from utils.seed import STREAM_STEP, fold_in
from utils.targets import Targets, plain_targets


def forward_backward(
    model: nn.Module,
    views_VBCHW: Tensor,
    targets: Targets,
    progress: Progress,
    *,
    precision: Precision,
    scaler: torch.amp.GradScaler,
    scale: float,
    copies: WeightCopies | None = None,
) -> StepOutput:
    """Forward and backward of one batch; gradients add up in the parameters.

    Args:
        model: the method, or its DDP wrapper.
        views_VBCHW: V views, S or 1, of B images.
        scale: factor of the loss before the backward pass: 1 / --iters_to_accumulate, times this process's share of
            the images where shards are uneven.
        copies: of weights that are cast; None: autocast casts them.
    """
    with copies or nullcontext():
        with autocast(views_VBCHW.device, precision.autocast):
            output: StepOutput = model(views_VBCHW, targets, progress)
        scaler.scale(output.loss * scale).backward()
    return output


class TrainingStep:
    """What a run does with each batch. Nothing in it waits for the device, but for what other processes have lost
    (--on_bad_image skip) and for methods that decide on the host.

    Everything random in a step is a function of the seed, its number and the process, so a resumed run needs no state
    of random generators.

    Args:
        method: what is trained.
        views: makes the training views.
        update: what follows the last backward pass of an accumulation group.
        options: whether and how images are mixed, and whether processes may have lost some.
        num_views: V, one for each network or one for all.
        iters_to_accumulate: batches per update.
        precision: of weights and products.
        seed: of the run.
        world: this process's place among all.
        first_view: number of the first of these views among those of all networks.
        replayed: replays the part of a step that a CUDA graph can hold; None: every step is computed as it is written.
        copies: of the weights that autocast casts, for replayed steps; None: it casts them.
    """

    def __init__(
        self,
        method: Method[Any],
        views: ViewMaker,
        update: WeightUpdate,
        options: DataOptions,
        *,
        num_views: int,
        iters_to_accumulate: int,
        precision: Precision,
        seed: int,
        world: World,
        replayed: ReplayedStep | None = None,
        copies: WeightCopies | None = None,
        first_view: int = 0,
    ) -> None:
        self.method, self.views, self.update, self.options = method, views, update, options
        self.num_views, self.iters_to_accumulate = num_views, iters_to_accumulate
        self.precision, self.seed, self.world, self.replayed = precision, seed, world, replayed
        self.copies = copies
        self.first_view = first_view
        # last, because DDP copies process 0's weights to the others
        self.model: nn.Module = method
        if world.num_shards > 1 and not method.reduces_own_gradients:
            self.model = distributed.wrap(method, world)

    def __call__(self, batch: Batch, progress: Progress) -> Mapping[str, Tensor]:
        """Train on one batch; the weights change where `progress.updates`.

        Returns:
            detached means over this process's images, on the device: loss, acc1 [S] in percent, the method's own.

        Raises:
            RunError: a batch of one image, the others unreadable, that the networks cannot train on.
        """
        # The random layers of a step depend on (seed, step, shard of the batch) only.
        key = fold_in(self.seed, STREAM_STEP, progress.step, self.world.shard)
        torch.manual_seed(key)
        self.method.network.begin_step(key)
        counts_W = self._counts(batch)
        views_VBCHW, targets = self._mixed(self.make_views(batch, progress.epoch), batch.labels_B, progress, counts_W)
        set_learning_rate(self.update.optimizer, progress.learning_rate)
        progress = progress._replace(counts_W=tuple(counts_W))
        self.method.before_step(views_VBCHW, targets, progress)
        share = len(batch.labels_B) * self.world.num_shards / sum(counts_W)
        learn = partial(self._learn, progress, share / self.iters_to_accumulate)
        step = torch.full((), progress.step, device=self.world.device)
        tensors = (views_VBCHW, *targets, progress.indices_B, step)
        try:
            output = learn(*tensors) if self.replayed is None else self.replayed(learn, *tensors)
        except ValueError as error:
            if not is_lone_image(error):
                raise
            raise RunError(
                f"Step {progress.step}: process {self.world.rank} has one image that can be read, and these networks "
                "cannot train on one. Mend the files, or give a larger --batch_size."
            ) from None
        if progress.updates:
            self.method.after_step(views_VBCHW, targets, output, progress)
        of_peers = {} if self.method.peers is None else self.method.peers.metrics
        return {"loss": output.loss, "acc1": _accuracy(output.logits_SBK, targets), **output.metrics, **of_peers}

    def make_views(self, batch: Batch, epoch: int) -> Tensor:
        """The views [V, B, C, H, W] that a batch is trained on."""
        return self.views.make(
            batch.images,
            epoch,
            batch.positions_B,
            self.num_views,
            first_view=self.first_view,
            dtype=self.precision.weights,
            memory_format=self.precision.memory_format,
        )

    def _counts(self, batch: Batch) -> list[int]:
        """How many images every shard W of the batch has.

        Raises:
            RunError: other images could be read where other networks are.
        """
        num_shards = self.world.num_shards
        if self.options.on_bad_image == "skip":
            counts = distributed.gather_counts(len(batch.labels_B), self.world.device)
            if counts != counts[:num_shards] * (len(counts) // num_shards):
                raise RunError(
                    f"--on_bad_image skip: processes with the same part of a batch could read {counts} images of it. "
                    "Mend the files that bad_images.txt names, on every machine."
                )
            return counts[:num_shards]
        parts = (shard(batch.global_batch_size, number, num_shards) for number in range(num_shards))
        return [part.stop - part.start for part in parts]

    def _mixed(
        self, views_VBCHW: Tensor, labels_B: Tensor, progress: Progress, counts_W: list[int]
    ) -> tuple[Tensor, Targets]:
        """Views and targets after mixup or CutMix, where one of them is on."""
        options, step = self.options, progress.step
        is_cutmix = options.cutmix_alpha > 0
        if not is_cutmix and not options.is_mixup:
            return views_VBCHW, plain_targets(labels_B)
        if is_cutmix and options.is_mixup:
            is_cutmix = is_cutmix_step(self.seed, step, switch_prob=options.mix_switch_prob)
        mix = draw_mix(
            self.seed,
            step,
            alpha=options.cutmix_alpha if is_cutmix else options.mix_alpha,
            global_batch=sum(counts_W),
            first=sum(counts_W[: self.world.shard]),
            count=len(labels_B),
        )
        if is_cutmix:
            mix = as_cutmix(mix, self.seed, step, (views_VBCHW.shape[-2], views_VBCHW.shape[-1]))
        return apply_mix(views_VBCHW, labels_B, mix, counts_W, self.world.sharers)

    def _learn(
        self,
        progress: Progress,
        scale: float,
        views_VBCHW: Tensor,
        labels_B: Tensor,
        labels_other_B: Tensor,
        lam: Tensor,
        indices_B: Tensor,
        step: Tensor,
    ) -> StepOutput:
        """The part of a step that a CUDA graph can hold: what changes from step to step comes as a tensor."""
        self.update.keep_buffers()
        with self._gradient_exchange(progress.updates):
            output = forward_backward(
                self.model,
                views_VBCHW,
                Targets(labels_B, labels_other_B, lam),
                progress._replace(indices_B=indices_B),
                precision=self.precision,
                scaler=self.update.scaler,
                scale=scale,
                copies=self.copies,
            )
        if progress.updates:
            if self.method.reduces_own_gradients and self.world.num_shards > 1:
                self.method.reduce_gradients()
            self.update(output.loss, output.logits_SBK, step)
        return output._replace(loss=output.loss.detach())

    def _gradient_exchange(self, updates: bool) -> AbstractContextManager[Any]:
        """DDP exchanges gradients only in the last backward pass of an accumulation group."""
        if isinstance(self.model, DistributedDataParallel) and not updates:
            return self.model.no_sync()
        return nullcontext()


def _accuracy(logits_SBK: Tensor, targets: Targets) -> Tensor:
    """Top-1 of each network in percent, float64 [S]; of mixed images the two labels' by their weights."""
    guesses_SB = logits_SBK.argmax(dim=-1)
    hits_S, others_S = ((guesses_SB == labels_B).double().mean(dim=1) for labels_B in targets[:2])
    return 100.0 * torch.lerp(others_S, hits_S, targets.lam.double())

"""Cream: a one-shot architecture search in which good paths of the supernet teach the others.

Source: Peng et al., "Cream of the Crop: Distilling Prioritized Paths For One-Shot Neural Architecture Search",
NeurIPS 2020, after its published code. Each step trains one sampled path; a board keeps the best; a board path is the
teacher, chosen and weighted by a meta-network on output differences. Where the published code departs from its own
idea we follow the idea: sampling probabilities are honoured, an entry keeps the outputs of its own path, the gate is
sigmoid(+score of the chosen teacher) and detached, the meta step is the exact virtual step at the current learning
rate, the schedule is 1 - step / steps, auxiliary forward passes leave the running statistics alone.
"""

import json
import logging
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, NamedTuple

import torch
import torch.distributed as dist
import yaml
from torch import Tensor, nn

from loss import at_least_float32
from loss.classification import CROSS_ENTROPY, ClassLoss
from loss.soft_target import soft_cross_entropy
from method import Method, Progress, StepOutput, Targets, methods
from method.cream.board import BoardEntry, PathBoard, PathSampler
from method.cream.meta import frozen_statistics, match_features, match_gradient, match_scores, probabilities
from method.cream.plots import plot_board, plot_network
from method.inner import average_over_processes, finite_sgd_step
from method.options.cream import CreamSearchOptions
from model import LARGE, request_of
from model.search.costs import NetworkPlan
from model.search.estimates import est_flops, size_supernet
from model.search.reading import read_space, space_to_text
from model.search.space import PUBLISHED, PUBLISHED_SMALL, Arch
from model.search.supernet import Supernet
from model.splitnet import SplitNet
from utils.distributed import all_reduce_sum, is_alone
from utils.errors import UserError
from utils.seed import STREAM_METHOD, fold_in

logger = logging.getLogger(__name__)

META_MOMENTUM = 0.9
META_CLIP = 1.0
TOP1_GATE = 0.5


# ---- the method ------------------------------------------------------------------------------------------------------


class _Step(NamedTuple):
    """What a step trains: the student, its estimated operations in millions, its teacher and the gate, if any."""

    path: list[list[int]]
    flops: float
    teacher: Arch | None
    gate: Tensor


@methods.register("cream")
class Cream(Method[CreamSearchOptions]):
    """Trains one sampled path per step with CE, or ((2 - g) CE + g KD(board path)) / 2 once the board has entries.

    The network is one `Supernet` (`--arch cream_supernet`). Two numbers reach the host per step once the board is
    open, the teacher's index and the path's accuracy, because they decide what is computed next.

    Args:
        network: a SplitNet of one Supernet.
        options: flags.
        class_loss: what every prediction costs against the labels.

    Raises:
        UserError: another network, or probabilities that do not fit the search space.
    """

    Options = CreamSearchOptions
    exchanges = "the weights of its supernet"
    shared_view = True
    runs_networks_itself = True
    reduces_own_gradients = True
    decides_on_host = True
    networks_from_list = False
    fine_tunes = False
    incompatible: ClassVar[Mapping[str, str]] = {"freeze": "a search trains all of its supernet"}

    def __init__(
        self, network: SplitNet, options: CreamSearchOptions, *, class_loss: ClassLoss = CROSS_ENTROPY
    ) -> None:
        super().__init__(network, options, class_loss=class_loss)
        supernet = network.models[0]
        if len(network.models) != 1 or not isinstance(supernet, Supernet):
            raise UserError("--method cream searches one supernet: use --arch cream_supernet and --split_factor 1.")
        count = len(supernet.space.operators)
        if options.how_to_prob == "pre_prob" and len(options.pre_prob) != count:
            raise UserError(
                f"--pre_prob has {len(options.pre_prob)} numbers and the search space {count} operators: "
                "give one per operator, or --how_to_prob even."
            )
        network.requires_grad_(True)  # a trainer may have frozen what the supernet's default path leaves unused
        self.board = PathBoard(options.pool_size, options.acc_gap, options.meta_sta_epoch)
        self.history: list[dict[str, Any]] = []
        self.meta_optimizer = torch.optim.SGD(
            supernet.meta_layer.parameters(), options.meta_lr, momentum=META_MOMENTUM, nesterov=True
        )
        self._epoch = 0
        self._side = supernet.space.resolution
        self._step: _Step | None = None
        self.prepare(torch.empty(0, dtype=torch.int64), 0)

    @classmethod
    def recipe(
        cls, dataset_recipe: str, epochs: int | None, given: Mapping[str, Any] | None = None
    ) -> Mapping[str, Any]:
        """The published search by flag name; learning rate and batch size elsewhere than on imagenet are ours.

        With the flags that the user gave, also the resolution that the interval of operations leads to, where it is
        below the search space's own.

        Raises:
            UserError: an interval that no supernet reaches.
        """
        epochs = 120 if epochs is None else epochs
        flags: dict[str, Any] = {
            "arch": "cream_supernet",
            "epochs": epochs,
            "meta_sta_epoch": round(20 * epochs / 120),
            "optimizer": "SGD",
            "lr": 0.1,
            "lr_mode": "linear",
            "slow_start_epochs": -1,
            "end_lr": 0.0,
            "momentum": 0.9,
            "is_nesterov": True,
            "weight_decay": 1e-4,
            "no_decay": "norm_bias",
            "is_label_smoothing": True,
            "is_mixup": False,
            "is_amp": False,
            "ema_decay": 0.0,
        }
        if dataset_recipe == "imagenet":
            flags |= {"lr": 1.0, "batch_size": 1024, "eval_batch_size": 512, "is_autoaugment": False, "erase_p": 0.2}
            flags |= {"crop_area": (0.08, 1.0), "color_jitter": 0.4, "erase_mode": "pixel"}
            flags |= {"erase_area": (0.02, 1 / 3), "erase_ratio": (0.3, 1 / 0.3)}
            flags |= {"crop_interpolation": "random", "eval_interpolation": "bilinear"}
        given = given or {}
        if {"search_space", "flops_minimum", "flops_maximum"} & set(given) and not given.get("sta_num"):
            default = PUBLISHED if dataset_recipe == "imagenet" else PUBLISHED_SMALL
            space = read_space(given["search_space"]) if given.get("search_space") else default
            size = size_supernet(given.get("flops_minimum", 0.0), given.get("flops_maximum", 600.0), space)
            if size.resolution < space.resolution:
                flags["crop_size"] = size.resolution
        return flags

    @property
    def supernet(self) -> Supernet:
        """The one network."""
        supernet = self.network.models[0]
        assert isinstance(supernet, Supernet)
        return supernet

    def prepare(self, labels_N: Tensor, seed: int) -> None:
        """Seed the draw of paths, alike in every process."""
        options, supernet = self.options, self.supernet
        probs = options.pre_prob if options.how_to_prob == "pre_prob" else None
        self._seed = seed
        self.path_sampler = PathSampler(supernet.depths, len(supernet.space.operators), seed, probs)

    def trained_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """All but the meta layer, which has its own optimiser."""
        own = {id(parameter) for parameter in self.supernet.meta_layer.parameters()}
        return [(name, p) for name, p in super().trained_parameters() if id(p) not in own]

    def before_step(self, views_SBCHW: Tensor, targets: Targets, progress: Progress) -> None:
        """Draw the student; where it is due, train the meta layer; choose the teacher.

        Raises:
            UserError: a batch too small for the slices.
        """
        images_BCHW, options = views_SBCHW[0], self.options
        uses_meta = options.pick_method == "meta"
        needed = (2 if uses_meta else 1) * self.supernet.slice_size
        if len(images_BCHW) < needed:
            raise UserError(
                f"--batch_size gives a process {len(images_BCHW)} images, and --slice {self.supernet.slice_size} needs "
                f"{needed}: raise the one or lower the other."
            )
        self._epoch, self._side = progress.epoch, images_BCHW.shape[-1]
        on_board = [entry.arch for entry in self.board.entries]
        probs = self.path_sampler.histogram(on_board) if options.how_to_prob == "teacher" else None
        path = self.path_sampler.draw(probs)
        teacher, gate = None, images_BCHW.new_zeros(())
        if self.board.entries and progress.epoch > options.meta_sta_epoch:
            chosen = 0
            if uses_meta:
                with frozen_statistics(self.supernet):
                    if progress.batch > 0 and progress.batch % options.update_iter == 0:
                        self._learn_to_match(path, images_BCHW, targets, progress)
                    features = match_features(self.supernet, path, self.board.entries)
                    chosen, score = match_scores(self.supernet.meta_layer, features)
                gate = score.sigmoid()
            else:
                gate = torch.full_like(gate, TOP1_GATE)
            teacher = self.board.entries[chosen].arch
        self._step = _Step(path, est_flops(path, self.supernet.space) / 1e6, teacher, gate)

    def _learn_to_match(self, path: Arch, images_BCHW: Tensor, targets: Targets, progress: Progress) -> None:
        """One step of the meta layer, on the first two slices of the batch; nothing else changes."""
        size = self.supernet.slice_size
        inner, outer = slice(0, size), slice(size, 2 * size)
        labels = Targets(targets.labels_B[outer], targets.labels_other_B[outer], targets.lam)

        def outer_loss(logits_BK: Tensor) -> Tensor:
            return self.class_loss(logits_BK, labels).mean()

        with torch.enable_grad():
            found = match_gradient(
                self.supernet,
                path,
                self.board.entries,
                images_BCHW[inner],
                images_BCHW[outer],
                outer_loss,
                progress.learning_rate,
            )
        meta_layer = self.supernet.meta_layer
        meta_layer.weight.grad, meta_layer.bias.grad = (
            found.weight.to(meta_layer.weight),
            found.bias.to(meta_layer.bias),
        )
        norm = nn.utils.clip_grad_norm_(meta_layer.parameters(), META_CLIP)
        steps = progress.epochs * progress.steps_per_epoch
        for group in self.meta_optimizer.param_groups:
            group["lr"] = self.options.meta_lr * max(0.0, 1 - progress.step / steps)
        finite_sgd_step(self.meta_optimizer, norm)
        self.meta_optimizer.zero_grad()

    def forward(self, views_SBCHW: Tensor, targets: Targets, progress: Progress) -> StepOutput:
        """One view [1, B, C, H, W] -> loss of the step's path, metrics, logits [1, B, K].

        Metrics: loss_ce; loss_kd and gate, both 0 as long as there is no teacher.
        """
        if self._step is None:
            raise RuntimeError("before_step draws the path that forward trains: call it first")
        images_BCHW, step = views_SBCHW[0], self._step
        logits_BK = at_least_float32(self.supernet(images_BCHW, step.path))
        loss = loss_ce = self.class_loss(logits_BK, targets).mean()
        loss_kd = torch.zeros_like(loss_ce)
        if step.teacher is not None:
            with torch.no_grad(), frozen_statistics(self.supernet):
                probs_BK = probabilities(self.supernet(images_BCHW, step.teacher))
            loss_kd = soft_cross_entropy(logits_BK, probs_BK).mean()
            loss = (step.gate * loss_kd + (2 - step.gate) * loss_ce) / 2
        metrics = {"loss_ce": loss_ce.detach(), "loss_kd": loss_kd.detach(), "gate": step.gate}
        return StepOutput(loss, metrics, logits_BK.detach()[None])

    def after_step(self, views_SBCHW: Tensor, targets: Targets, output: StepOutput, progress: Progress) -> None:
        """Offer the path to the board, with its accuracy on the batch before the update.

        A path whose outputs are not finite is not offered: as a teacher it would spoil every later step.
        """
        assert self._step is not None
        step, self._step = self._step, None
        if progress.epoch <= self.options.meta_sta_epoch:
            return
        logits_BK = output.logits_SBK[0]
        correct = (logits_BK.argmax(dim=1) == targets.labels_B).sum()
        count, broken = torch.full_like(correct, len(logits_BK)), (~logits_BK.isfinite()).any().to(correct)
        hits, everyone, spoilt = all_reduce_sum(torch.stack([correct, count, broken])).tolist()
        score = 100.0 * hits / everyone
        if not spoilt and self.board.admits(score, step.flops, progress.epoch):
            size = self.supernet.slice_size
            images = views_SBCHW[0][:size].clone(memory_format=torch.contiguous_format)
            probs = probabilities(logits_BK[:size])
            if not is_alone():
                # the first images of the step's whole batch, so that a checkpoint holds the board of every process
                dist.broadcast(images, src=0)
                dist.broadcast(probs, src=0)
            self.board.add(BoardEntry(score, step.flops, step.path, images, probs))
            self.supernet.default_path = self.board.entries[0].arch
        if progress.batch + 1 == progress.steps_per_epoch:
            self.history.append({"epoch": progress.epoch, "entries": self._with_macs(self.board.rows())})

    def extra_logits(self, images_BCHW: Tensor) -> dict[str, Tensor]:
        """random_path: logits [B, K] of one uniformly drawn path, another one every epoch."""
        supernet = self.supernet
        seed = fold_in(self._seed, STREAM_METHOD, self._epoch)
        path = PathSampler(supernet.depths, len(supernet.space.operators), seed).draw()
        return {"random_path": supernet(images_BCHW, path)}

    @torch.no_grad()
    def synchronise(self) -> None:
        """Give every process the mean of all processes' running statistics."""
        average_over_processes([buffer for buffer in self.buffers() if buffer.is_floating_point()])

    def run_files(self, *, final: bool) -> dict[str, str | bytes]:
        """board.json: the board and its state after every epoch; found.yaml: flags of the network that was found.

        board.png and found.png are the two as pictures. Entries have their network's MACs beside the estimate of
        operations that the search goes by.
        The network is the best entry whose estimate lies in the interval of operations; where there is none it is the
        best entry, and `final` warns.
        """
        board = {"board": self._with_macs(self.board.rows()), "history": self.history}
        files: dict[str, str | bytes] = {"board.json": json.dumps(board, indent=1) + "\n"}
        minimum, maximum = self.supernet.interval
        found = self.board.result(minimum, maximum)
        if found is None:
            if final:
                logger.warning("the search found nothing: its board stayed empty; lower --meta_sta_epoch")
            return files
        entry, inside = found
        if final and not inside:
            logger.warning(
                "no path on the board has %g to %g million operations; found.yaml holds the best one, of %.1f",
                minimum,
                maximum,
                entry.flops,
            )
        plan = self._plan(entry.arch)
        title = f"found: {self._macs(plan):.3g} million MACs, {entry.score:.1f} % on its training batch"
        flags = {
            "arch": "cream",
            "arch_list": json.dumps([list(stage) for stage in entry.arch]),
            "honour_single_block": 1,
            "crop_size": self._side,
        }
        if self.supernet.global_pool != "avg":
            flags["global_pool"] = self.supernet.global_pool
        if self.supernet.space != (PUBLISHED if request_of(self.supernet).shape == LARGE else PUBLISHED_SMALL):
            flags["search_space"] = space_to_text(self.supernet.space)
        return files | {
            "found.yaml": yaml.safe_dump(flags, sort_keys=False, width=10**6),
            "board.png": plot_board(board),
            "found.png": plot_network(plan.stages, title=title),
        }

    def _plan(self, arch: Arch) -> NetworkPlan:
        return self.supernet.space.plan(arch, self.supernet.classifier.out_features, honour_single_block=True)

    def _with_macs(self, rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Rows of the board with `macs` in millions, of the whole network and the images of the search."""
        return [{**row, "macs": self._macs(self._plan(row["arch"]))} for row in rows]

    def _macs(self, plan: NetworkPlan) -> float:
        return plan.cost(self._side).macs / 1e6

    def training_state(self) -> dict[str, Any]:
        """Board, its history, the sampler, the meta optimiser, and what an evaluation knows of the last step."""
        return {
            "epoch": self._epoch,
            "side": self._side,
            "board": self.board.state_dict(),
            "history": self.history,
            "sampler": self.path_sampler.state_dict(),
            "meta_optimizer": self.meta_optimizer.state_dict(),
        }

    def load_training_state(self, state: Mapping[str, Any]) -> None:
        """Inverse of `training_state`."""
        self._epoch, self._side = int(state["epoch"]), int(state["side"])
        self.board.load_state_dict(state["board"], self.supernet.path.device)
        self.history = list(state["history"])
        self.path_sampler.load_state_dict(state["sampler"])
        self.meta_optimizer.load_state_dict(state["meta_optimizer"])

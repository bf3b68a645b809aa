"""Train a SplitNet, or any other method of learning together: `python train_split.py --help`.

Progress goes to stderr and train.log; the last line of stdout is one JSON object with the final figures.
"""

import json
import logging
import os
import signal
import sys
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dataset import DataSource, SourceRequest, open_source
from dataset.loader import Batch
from dataset.mixup import apply_mix, draw_mix
from dataset.pipeline import build_eval_loader, build_train_loader
from dataset.sampler import shard
from dataset.views import ViewMaker, view_spec
from evaluation.ensemble import ensemble_rule
from evaluation.passes import evaluate
from method import Method, Progress, StepOutput, methods
from model import build_splitnet, network_requests, request_of
from model.division.plan import solver_plan
from model.layers.narrow_norm import restore_narrow_norms
from model.layers.sync_norm import synchronise_batchnorm
from model.restore import library_weights, load_pretrained, plain_keys, published_keys, stored_widths
from model.summary import format_table, network_sizes
from parser_params import Config, parse_config, resolve_config
from recipe.datasets import ROWS, row_for
from record import checkpoint as ckpt
from record.logger import RunLog, plain_json, set_up_text_log
from record.plots import plot_curves
from record.report import Reporter, RunClock
from record.run_folder import HPARAMS, RESULTS, as_json, describe_environment, make_folder, open_run, read_results
from record.saving import Saver
from training.compiling import as_written, compile_modules
from training.guard import NonfiniteGuard, judge_nonfinite
from training.interrupt import Stopped, StopRequest
from training.meters import MeanMeter
from training.optim import WeightAverage, build_optimizer, parameter_groups, set_learning_rate
from training.replay import CudaRecorder, ReplayedStep, check_replayable
from training.schedule import Schedule
from training.update import WeightUpdate
from utils import distributed, launch
from utils.errors import RunError, UserError, WriteError, reason
from utils.launch import World
from utils.macs import count_macs, count_params
from utils.precision import Precision, choose_precision, lay_out
from utils.seed import STREAM_INIT, STREAM_STEP, draw_seed, fold_in
from utils.targets import Targets, plain_targets

logger = logging.getLogger("train_split")

LABEL_SMOOTHING = 0.1
METHOD_INIT = 1_000_000  # the part of the initialisation stream that a method's own layers use


def train_step(
    model: nn.Module,
    views_SBCHW: Tensor,
    targets: Targets,
    progress: Progress,
    *,
    precision: Precision,
    scaler: torch.amp.GradScaler,
    scale: float,
) -> StepOutput:
    """Forward and backward of one batch; gradients add up in the parameters.

    Args:
        model: the method, or its DDP wrapper.
        scale: factor of the loss before the backward pass: 1 / --iters_to_accumulate, times this process's share of
            the images where shards are uneven.
    """
    device = views_SBCHW.device.type
    with torch.autocast(device, precision.autocast, enabled=precision.autocast is not None):
        output: StepOutput = model(views_SBCHW, targets, progress)
    scaler.scale(output.loss * scale).backward()
    return output


class Trainer:
    """Everything of one run: data, networks, method, optimiser, logs, and the loop over epochs."""

    def __init__(self, config: Config, world: World, source: DataSource, resumed: dict[str, Any] | None) -> None:
        assert config.seed is not None
        source = source.normalised(config.mean, config.std)
        self.config = config
        self.world = world
        self.source = source
        self.seed: int = config.seed
        self.folder = Path(config.model_dir)
        self.precision = choose_precision(world.device, is_amp=config.is_amp, amp_dtype=config.amp_dtype)

        # networks and method
        self.method = self._build_method(resumed or {})
        self.replayed: ReplayedStep | None = None
        if config.cuda_graph:
            check_replayable(
                device=world.device,
                world_size=world.world_size,
                scaler=self.precision.scaler,
                iters_to_accumulate=config.iters_to_accumulate,
                own_gradients=self.method.reduces_own_gradients,
            )
            self.replayed = ReplayedStep(CudaRecorder(world.device))
        self.network = self.method.network
        self.num_networks = len(self.network.models)
        self.params_one = count_params(self.network.models[0])
        self.params_total = count_params(self.network)
        self.macs_total = count_macs(self.network, (3, config.crop_size, config.crop_size))
        new_heads = self._load_pretrained() if config.pretrained is not None and resumed is None else ()
        self.method.to(world.device, self.precision.weights)
        lay_out(self.method, self.precision.memory_format)
        if config.is_syncbn and world.world_size > 1:
            synchronise_batchnorm(self.method, world.device)

        self.network.execution = self._choose_execution(resumed)

        self._prepare_data(source)
        self._prepare_optimisation(new_heads)

        # where training stands: the next epoch, the next batch in it, batches done in all
        self.epoch = 0
        self.batch = 0
        self.step = 0
        self.clock = RunClock()
        self.meter = MeanMeter(world.device)
        self.epoch_meter = MeanMeter(world.device)
        self.bad_images: dict[Path, str] = {}
        self.stop = StopRequest()
        self.stopping = False  # what all processes have agreed on
        # steps between two questions whether to stop: to GPUs the answer of the others is a synchronisation
        self.ask_every = config.print_freq if world.world_size > 1 and world.device.type == "cuda" else 1
        self.saver = Saver(self.folder, keep=config.max_ckpt_nums, stops=config.on_save_error == "stop")
        self.log = RunLog(self.folder, self.num_networks, active=world.is_main)
        self.report = Reporter(
            self.log, epochs=config.epochs, steps_per_epoch=self.steps_per_epoch, visible=world.is_main
        )
        if resumed is not None:
            self._restore(resumed)
        else:
            self.log.rewind({}, epoch=0, step=0)
        if config.start_epoch is not None:
            self.epoch, self.batch, self.step = config.start_epoch, 0, config.start_epoch * self.steps_per_epoch

        # inside the DDP wrapper, whose gradient hooks sit on the parameters and so outside of what is compiled
        if config.compile is not None:
            parts = self.method.compiled_parts()
            for part in parts:
                restore_narrow_norms(part)
            compile_modules(parts, config.compile, world.device, self.network.execution)
        # last, because DDP copies process 0's weights to the others
        self.model: nn.Module = self.method
        if world.world_size > 1 and not self.method.reduces_own_gradients:
            self.model = distributed.wrap(self.method, world)

    # ---- building ----------------------------------------------------------------------------------------------------

    def _build_method(self, resumed: Mapping[str, Any]) -> Method:
        config = self.config
        kind = methods.get(config.method)
        names = kind.backbone_names(config.arch, config.method_options)
        if len(names) > 1 and not kind.networks_from_list:
            raise UserError(f"--method {config.method} takes one backbone; --arch names {len(names)}.")
        request = config.backbone_request(len(self.source.classes))
        network = build_splitnet(
            replace(request, arch=names[0], widths=stored_widths(resumed, "--resume")),
            seed=self.seed,
            identical_init=config.is_identical_init,
            train_separately=config.is_train_sep,
            archs=names if len(names) > 1 else None,
        )
        smoothing = LABEL_SMOOTHING if config.is_label_smoothing else 0.0
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(fold_in(self.seed, STREAM_INIT, METHOD_INIT))
            return kind(network, config.method_options, label_smoothing=smoothing)

    def _choose_execution(self, resumed: Mapping[str, Any] | None) -> str:
        """How the networks run: as the resumed run's did, unless another strategy is asked for."""
        asked = self.config.execution
        before = (resumed or {}).get("environment", {}).get("execution")
        if self.method.runs_networks_itself:
            if asked != "loop":
                logger.info("--execution %s: this method runs parts of networks, so it keeps to loop.", asked)
            return "loop"
        return before if before and (asked == "auto" or "execution" not in self.config.given) else asked

    def _load_pretrained(self) -> tuple[str, ...]:
        """Take weights from --pretrained; returns the names of the heads that stay new, as prefixes."""
        path = self.config.pretrained
        content = ckpt.load_checkpoint(path, "--pretrained") if path else library_weights(self.network)
        renewed = load_pretrained(self.network, content, path or "of the library")
        for name in renewed:
            logger.info("--pretrained: the head %s has another size there and starts anew.", name)
        return tuple(f"network.{name}." for name in renewed)

    def _prepare_data(self, source: DataSource) -> None:
        """Views and loaders, and how many steps there are."""
        config, world = self.config, self.world
        self.num_views = 1 if self.method.shared_view or not config.is_diff_data_train else self.num_networks
        self.views = ViewMaker(view_spec(source.recipe, config, mean=source.mean, std=source.std), self.seed)
        self.loader = build_train_loader(
            source, config, world, num_views=self.num_views, seed=self.seed, sampler=self.method.sampler
        )
        self.eval_loaders = {
            name: build_eval_loader(split, config, world)
            for name, split in (("val", source.val), ("test", source.test))
            if split is not None
        }
        self.steps_per_epoch = self.loader.steps_per_epoch
        self.total_steps = config.epochs * self.steps_per_epoch
        if config.max_steps is not None:
            self.total_steps = min(self.total_steps, config.max_steps)
        self.method.prepare(source.train.targets.to(world.device), self.seed)

    def _prepare_optimisation(self, new_heads: tuple[str, ...]) -> None:
        """Optimiser, schedule, and what follows a backward pass.

        Args:
            new_heads: prefixes of the parameters that --pretrained did not bring.
        """
        config, world = self.config, self.world
        groups = parameter_groups(self.method, self.method.trained_parameters(), config, new_heads=new_heads)
        self.optimizer = build_optimizer(config, groups, capturable=config.cuda_graph)
        self.schedule = Schedule(config, self.steps_per_epoch)
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=self.precision.scaler)
        self.guard = NonfiniteGuard(self.num_networks, world.device, sticky=config.on_nonfinite == "stop")
        self.average = WeightAverage(self.network, config.ema_decay) if config.ema_decay > 0 else None
        self.update = WeightUpdate(
            network=self.network,
            parameters=[p for _, p in self.method.trained_parameters()],
            optimizer=self.optimizer,
            scaler=self.scaler,
            guard=self.guard,
            average=self.average,
            clip_grad=config.clip_grad,
            restores_buffers=config.on_nonfinite == "skip",
        )

    # ---- state -------------------------------------------------------------------------------------------------------

    def state(self, meters: list[Any]) -> dict[str, Any]:
        """The checkpoint: everything that a resumed run needs to go on bit for bit, and that eval.py needs to load.

        `meters`: those of every process.
        """
        best = self.report.best
        state: dict[str, Any] = {
            "epoch": self.epoch,
            "arch": self.config.arch,
            "widths": list(request_of(self.network.models[0]).widths or ()),
            "state_dict": published_keys(self.network.state_dict()),
            "best_acc1": best["ensemble_acc1"] if best else 0.0,
            "optimizer": self.optimizer.state_dict(),
            "method": self.method.training_state(),
            "rng": {"seed": self.seed},
            "sampler": {"epoch": self.epoch, "batch": self.batch, "step": self.step},
            "config": self.config.values(),
            "classes": list(self.source.classes),
            "mean": list(self.source.mean),
            "std": list(self.source.std),
            "crop_size": self.config.crop_size,
            "data_recipe": self.source.recipe,
            "report": self.report.state_dict(),
            "meters": meters,
            "clock": self.clock.state_dict(),
            "guard": self.guard.state_dict(),
            "environment": self._environment(),
            "format_version": ckpt.FORMAT_VERSION,
        }
        if self.precision.scaler:
            state["scaler"] = self.scaler.state_dict()
        if self.average is not None:
            state["ema"] = published_keys(self.average.state_dict())
        return state

    def _environment(self) -> dict[str, Any]:
        """What must stay the same for a resumed run to be the same bit for bit."""
        return {
            "threads": torch.get_num_threads(),
            "execution": self.network.execution,
            "world_size": self.world.world_size,
            "precision": self.precision.name,
            "device": self.world.device.type,
        }

    def _restore(self, state: Mapping[str, Any]) -> None:
        """Inverse of `state`.

        Raises:
            UserError: the checkpoint holds no run, or that of other flags.
        """
        own = self.config.values()
        try:
            for name in ("arch", "split_factor", "divide_by", "method", "dataset", "optimizer"):
                if state["config"].get(name) != own[name]:
                    raise UserError(
                        f"--resume: the checkpoint is of a run with --{name} {state['config'].get(name)}, "
                        f"and this one has --{name} {own[name]}."
                    )
            torch.set_num_threads(min(state["environment"]["threads"], os.cpu_count() or 1))
            for name, value in self._environment().items():
                before = state["environment"].get(name, value)
                if before != value:
                    logger.warning("So far %s was %s, now it is %s: the last bits will differ.", name, before, value)
            self.network.load_state_dict(plain_keys(state["state_dict"]))
            self.optimizer.load_state_dict(state["optimizer"])
            self.method.load_training_state(state["method"])
            if self.precision.scaler and "scaler" in state:
                self.scaler.load_state_dict(state["scaler"])
            if self.average is not None and "ema" in state:
                self.average.load_state_dict(plain_keys(state["ema"]))
            place = state["sampler"]
            self.epoch, self.batch, self.step = int(place["epoch"]), int(place["batch"]), int(place["step"])
            meters = state["meters"]
            if len(meters) == self.world.world_size:
                meters = [meters[self.world.rank]]
            elif not self.world.is_main:
                meters = []
            self.meter.load_state_dict(*(part["interval"] for part in meters))
            self.epoch_meter.load_state_dict(*(part["epoch"] for part in meters))
            self.clock.load_state_dict(state["clock"])
            self.guard.load_state_dict(state["guard"])
            self.report.load_state_dict(state["report"], epoch=self.epoch, step=self.step)
        except UserError:
            raise
        except (KeyError, ValueError, TypeError, AttributeError, RuntimeError) as error:
            raise UserError(
                f"--resume: the checkpoint holds no run of these flags to go on with ({reason(error)[:200]}). "
                "Use --pretrained for its weights alone."
            ) from None

    def save(self, name: str) -> None:
        """Begin to write a checkpoint of this name (process 0); the oldest ones beyond --max_ckpt_nums go then."""
        self.method.synchronise()
        meters = distributed.gather_values(
            {"interval": self.meter.state_dict(), "epoch": self.epoch_meter.state_dict()}
        )
        if self.world.is_main:
            self.saver.checkpoint(name, self.state(meters))

    # ---- one epoch ---------------------------------------------------------------------------------------------------

    def train_epoch(self) -> None:
        """From the current batch to the end of the epoch, or until --max_steps or a signal."""
        self.method.train()
        if self.batch == 0:
            self.meter.reset()
            self.epoch_meter.reset()
        batches = self.loader.epoch(self.epoch, start_batch=self.batch)
        while self.batch < self.steps_per_epoch:
            images, waited, seconds = self.clock.images, self.loader.time_waiting, self.clock.seconds
            with self.clock.training():
                progress = self._interval(batches)
            seconds = max(self.clock.seconds - seconds, 1e-9)
            if progress is not None:
                self._report_interval(
                    progress,
                    images_per_second=round((self.clock.images - images) / seconds, 1),
                    data_wait=round((self.loader.time_waiting - waited) / seconds, 4),
                )
            if self.step >= self.total_steps:
                return
            if self.config.save_steps and self.step % self.config.save_steps == 0 and self.batch < self.steps_per_epoch:
                self.save(f"checkpoint_{self.epoch}_{self.step}.pth.tar")
            if self.stopping:
                return

    def _interval(self, batches: Iterator[Batch]) -> Progress | None:
        """Train to the next line, checkpoint or stop; returns the last batch's place if a line is due.

        Checkpoints are made, and signals obeyed, at the end of an accumulation group only: they hold no gradients.
        """
        config = self.config
        for batch in batches:
            progress = Progress(
                epoch=self.epoch,
                step=self.step,
                batch=self.batch,
                steps_per_epoch=self.steps_per_epoch,
                epochs=config.epochs,
                learning_rate=self.schedule(self.step),
                indices_B=batch.indices_B,
                weight_decay=config.weight_decay,
            )
            self._one_batch(batch, progress)
            self.batch += 1
            self.step += 1
            self.clock.images += batch.global_batch_size
            self.report.step()
            last = self._ends_training_or_epoch()
            line = self.batch % config.print_freq == 0 or last
            between = last or self.batch % config.iters_to_accumulate == 0
            self.stopping = between and self._asked_to_stop()
            save = between and config.save_steps and self.step % config.save_steps == 0
            if line or save or self.stopping:
                return progress if line else None
        raise RunError("The training data ended within an epoch.")

    def _ends_training_or_epoch(self) -> bool:
        return self.batch == self.steps_per_epoch or self.step >= self.total_steps

    def _one_batch(self, batch: Batch, progress: Progress) -> None:
        """Views, forward, backward and, at the end of an accumulation group, the update of the weights."""
        config, world = self.config, self.world
        # The random layers of a step depend on (seed, step, process) only, so that a resumed run needs no RNG state.
        key = fold_in(self.seed, STREAM_STEP, self.step, world.rank)
        torch.manual_seed(key)
        self.network.begin_step(key)
        views = self.views.make(
            batch.images,
            self.epoch,
            batch.positions_B,
            self.num_views,
            dtype=self.precision.weights,
            memory_format=self.precision.memory_format,
        )
        if self.step == 0:
            self.log.views(views, self.source.mean, self.source.std, 0)
        count = len(batch.labels_B)
        if config.on_bad_image == "skip":
            counts = distributed.gather_counts(count, world.device)
        else:
            parts = (shard(batch.global_batch_size, rank, world.world_size) for rank in range(world.world_size))
            counts = [part.stop - part.start for part in parts]
        first, everyone = sum(counts[: world.rank]), sum(counts)
        if config.is_mixup:
            mix = draw_mix(
                self.seed,
                self.step,
                alpha=config.mix_alpha,
                global_batch=everyone,
                first=first,
                count=count,
            )
            views, targets = apply_mix(views, batch.labels_B, mix, counts)
        else:
            targets = plain_targets(batch.labels_B)
        last = self.batch + 1 == self.steps_per_epoch or self.step + 1 >= self.total_steps
        update = last or (self.batch + 1) % config.iters_to_accumulate == 0
        scale = count * world.world_size / everyone / config.iters_to_accumulate
        set_learning_rate(self.optimizer, progress.learning_rate)
        self.method.before_step(views, targets, progress)
        learn = partial(self._learn, progress, update, scale)
        step = torch.full((), self.step, device=world.device)
        tensors = (views, *targets, progress.indices_B, step)
        output = learn(*tensors) if self.replayed is None else self.replayed(learn, *tensors)
        if update:
            self.method.after_step(views, targets, output, progress)
        guesses_SB = output.logits_SBK.argmax(dim=-1)
        hits_S, others_S = ((guesses_SB == labels_B).double().mean(dim=1) for labels_B in targets[:2])
        metrics = {"loss": output.loss, "acc1": 100.0 * torch.lerp(others_S, hits_S, targets.lam.double())}
        metrics |= output.metrics
        self.meter.update(metrics, count)
        self.epoch_meter.update(metrics, count)

    def _learn(
        self,
        progress: Progress,
        update: bool,
        scale: float,
        views: Tensor,
        labels_B: Tensor,
        others_B: Tensor,
        lam: Tensor,
        indices_B: Tensor,
        step: Tensor,
    ) -> StepOutput:
        """The part of a batch that a CUDA graph can hold: it waits for nothing, and what changes comes as a tensor."""
        before = self.update.snapshot()
        with self._gradient_sync(update):
            output = train_step(
                self.model,
                views,
                Targets(labels_B, others_B, lam),
                progress._replace(indices_B=indices_B),
                precision=self.precision,
                scaler=self.scaler,
                scale=scale,
            )
        if update:
            if self.method.reduces_own_gradients and self.world.world_size > 1:
                self.method.reduce_gradients()
            self.update(output.loss, output.logits_SBK, step, before)
        return output._replace(loss=output.loss.detach())

    def _gradient_sync(self, update: bool) -> AbstractContextManager[Any]:
        """DDP exchanges gradients only in the last backward pass of an accumulation group."""
        if isinstance(self.model, DistributedDataParallel) and not update:
            return self.model.no_sync()
        return nullcontext()

    def _check_finite(self) -> None:
        """Stop where a step was non-finite; the first read of the guard's device values, so it synchronises."""
        found = self.guard.read(distributed.all_reduce_sum)
        if found is None:
            return
        limit = self.config.nonfinite_limit if self.config.on_nonfinite == "skip" else None
        logger.warning("%s", judge_nonfinite(found, limit, self.steps_per_epoch))

    def _report_interval(self, progress: Progress, **speed: float) -> None:
        """Read the meters (the one host synchronisation of an interval), log them, and look for non-finite steps."""
        means = self.meter.read(distributed.all_reduce_sum)
        self.meter.reset()
        self._check_finite()
        self.saver.check()
        self.report.interval(
            epoch=progress.epoch,
            step=progress.step,
            batch=progress.batch,
            rate=progress.learning_rate,
            means=means,
            speed=speed,
        )

    # ---- evaluation --------------------------------------------------------------------------------------------------

    def evaluate_epoch(self) -> None:
        """Evaluate, log the figures and keep the best; every process takes part."""
        self.method.synchronise()
        self.method.eval()
        with self.clock.evaluating():
            figures = {name: self._evaluate(name) for name in self.eval_loaders}
        is_best = self.report.evaluation(
            figures,
            epoch=self.epoch,
            step=self.step,
            rate=self.schedule(max(self.step - 1, 0)),
            train=self.epoch_meter.read(distributed.all_reduce_sum),
            seconds=self.clock.seconds,
        )
        if is_best:
            self.save(ckpt.BEST)

    def _evaluate(self, name: str) -> dict[str, Any]:
        loader = self.eval_loaders[name]
        # not compiled, as in eval.py, so that both find the same figures
        with as_written(self.config.compile is not None), self._evaluated_weights():
            distributed.broadcast_buffers(self.network)  # an average's are each process's own until here
            evaluation = evaluate(
                self.network,
                self.stop.until_stopped(loader, rounds=loader.rounds, device=self.world.device, every=self.ask_every),
                prepare=lambda images: self.views.evaluate(images, dtype=self.precision.weights),
                num_networks=self.num_networks,
                device=self.world.device,
                num_classes=len(self.source.classes),
                rule=ensemble_rule(
                    after_softmax=self.config.is_ensembled_after_softmax, maximum=self.config.is_max_ensemble
                ),
                autocast_dtype=self.precision.autocast,
                extra=self.method.extra_logits,
                all_reduce=distributed.all_reduce_sum,
            )
            return self.method.complete_figures(evaluation.figures)

    def _evaluated_weights(self) -> AbstractContextManager[Any]:
        """The moving average of the weights in place of the weights, where there is one."""
        return nullcontext() if self.average is None else self.average.applied_to(self.network)

    # ---- the run -----------------------------------------------------------------------------------------------------

    def run(self) -> dict[str, Any]:
        """Train to the end and return the final figures.

        Raises:
            Stopped: SIGTERM or SIGINT; a checkpoint was written.
            RunError: a non-finite step, a bad image, a full disk under --on_save_error stop.
        """
        try:
            with self.stop:
                self._train_and_evaluate()
                return self.finish()
        finally:
            self.saver.close()

    def _train_and_evaluate(self) -> None:
        while self.step < self.total_steps or self.batch == self.steps_per_epoch:
            with self.report.epoch(self.epoch, self.batch):
                self.train_epoch()
            if self.stopping:
                self._save_and_stop()
            complete = self.batch == self.steps_per_epoch
            if complete:
                self.epoch, self.batch = self.epoch + 1, 0
            if self.step >= self.total_steps or (complete and self.epoch % self.config.eval_per_epoch == 0):
                try:
                    self.evaluate_epoch()
                except Stopped:  # the resumed run begins with this evaluation
                    if complete:
                        self.epoch, self.batch = self.epoch - 1, self.steps_per_epoch
                    self._save_and_stop()
            within = "" if complete else f"_{self.step}"
            self.save(f"checkpoint_{self.epoch}{within}.pth.tar")
            self._write_method_files(final=False)
            self._list_bad_images()

    def _list_bad_images(self) -> None:
        """Name the images that --on_bad_image skip has left out so far, in the log and in bad_images.txt."""
        found = {**self.source.bad_images, **self.loader.bad_images}
        for loader in self.eval_loaders.values():
            found.update(loader.bad_images)
        new = {path: why for path, why in found.items() if path not in self.bad_images}
        for path, why in new.items():
            logger.warning("left out: %s: %s", path, why)
        self.bad_images.update(new)
        if new:
            name = "bad_images.txt" if self.world.is_main else f"bad_images_{self.world.rank}.txt"
            self.saver.file(name, "".join(f"{path}: {why}\n" for path, why in sorted(self.bad_images.items())))

    def _write_method_files(self, *, final: bool) -> None:
        """What the method wants to have in the run directory, such as an architecture that it found."""
        if not self.world.is_main:
            return
        for name, content in self.method.run_files(final=final).items():
            self.saver.file(name, content)
            if isinstance(content, bytes):
                self.log.picture(Path(name).stem, content, self.epoch)

    def finish(self) -> dict[str, Any]:
        """Final figures: results.json, curves.png, TensorBoard's hparams."""
        if self.report.last is None or self.report.last["step"] != self.step:  # it was stopped within its evaluation
            self.evaluate_epoch()
        self._write_method_files(final=True)
        self.saver.wait()
        results = self.results()
        if self.world.is_main:
            self.saver.file(RESULTS, as_json(results))
            self.log.hparams(
                {name: item for name, item in self.config.values().items() if item is not None},
                {f"final/{name}": results[name] for name in ("ensemble_acc1", "best_ensemble_acc1")},
            )
            self.log.close()
            try:
                plot_curves([("", self.folder)], self.folder / "curves.png")
            except OSError as error:
                self.saver.failed(WriteError(f"{self.folder / 'curves.png'}: could not be written: {reason(error)}."))
        return results

    def results(self) -> dict[str, Any]:
        """The JSON object that a run ends with; accuracies in percent."""
        return {
            **self.report.results(),
            "params_one": self.params_one,
            "params_total": self.params_total,
            "macs_total": self.macs_total,
            "epochs": self.epoch,
            "steps": self.step,
            "seconds": round(self.clock.seconds, 3),
            "images_per_second": round(self.clock.images_per_second(), 1),
            "state_sha256": ckpt.state_sha256(published_keys(self.network.state_dict())),
            "arch": self.config.arch,
            "method": self.config.method,
            "split_factor": self.num_networks,
            "dataset": self.config.dataset,
            "seed": self.seed,
            "precision": self.precision.name,
            "nonfinite_skipped": self.guard.count(),
            "model_dir": str(self.folder),
        }

    def _asked_to_stop(self) -> bool:
        """Whether any process was signalled."""
        if self.batch % self.ask_every and self.batch < self.steps_per_epoch:
            return False
        return self.stop.agreed(self.world.device)

    def _save_and_stop(self) -> None:
        self._check_finite()
        self.save(f"checkpoint_{self.epoch}_{self.step}.pth.tar")
        self.saver.wait()
        raise Stopped(self.stop.number)


# ---- entry -----------------------------------------------------------------------------------------------------------


def settle_seed(config: Config, world: World, resumed: Mapping[str, Any] | None) -> Config:
    """The configuration with its seed: the user's, else the resumed run's, else one drawn by process 0."""
    seed = config.seed
    if seed is None and resumed is not None:
        seed = resumed.get("rng", {}).get("seed")
    if seed is None:
        drawn = torch.tensor([draw_seed()], device=world.device)
        if world.world_size > 1:
            torch.distributed.broadcast(drawn, src=0)
        seed = int(drawn)
    return replace(config, seed=seed)


def run(config: Config) -> dict[str, Any]:
    """Train as `config` says, in this process of the job; returns the final figures.

    Raises:
        UserError, RunError, Stopped: see `Trainer.run`.
    """
    gpus = launch.visible_gpus(no_cuda=config.no_cuda, gpu=config.gpu, gpu_ids=config.gpu_ids)
    world = launch.join(gpus, backend=config.dist_backend)
    set_up_text_log(None, rank=world.rank)
    folder = Path(config.model_dir)
    try:
        resumed = open_run(folder, config.resume)
        distributed.barrier()  # nobody writes into the folder before everybody has looked
        finished = finished_results(folder, config, resumed)
        if finished is not None:
            return finished
        config = settle_seed(config, world, resumed)
        make_folder(folder)
        set_up_text_log(folder, rank=world.rank)
        source = open_shared_source(config, world)
        seed = config.seed
        config = replace(resolve_config(config, data_recipe=source.recipe, crop_size=source.crop_size), seed=seed)
        warn_of_unused_flags(config)
        if config.deterministic:
            torch.use_deterministic_algorithms(True, warn_only=True)
        torch.backends.cudnn.benchmark = not config.deterministic
        if world.is_main:
            ckpt.write_file(folder / HPARAMS, as_json(config.described()))
            ckpt.write_file(folder / "env.json", as_json(describe_environment(world)))
        with launch.naming_lost_processes(world):
            trainer = Trainer(config, world, source, resumed)
            announce(trainer)
            return trainer.run()
    finally:
        launch.leave(world)


def finished_results(folder: Path, config: Config, resumed: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """The results of a run that `--resume auto` finds with nothing left to do."""
    results = read_results(folder) if config.resume == "auto" else None
    if results is None or resumed is None:
        return None
    steps = resumed.get("sampler", {}).get("step", 0)
    epochs = config.given.get("epochs", resumed.get("config", {}).get("epochs", config.epochs))
    done = resumed.get("epoch", 0) >= epochs or (config.max_steps is not None and steps >= config.max_steps)
    return results if done and results.get("steps") == steps else None


def warn_of_unused_flags(config: Config) -> None:
    """Say which of the flags, and of the keys in a published --config, have no effect."""
    for line in config.warnings:
        logger.warning("%s", line)
    for name in ("gn_num_groups", "div_wd_den", "amp_opt_level"):
        if name in config.given:
            logger.warning("--%s has no effect, as in the published code.", name)


def open_shared_source(config: Config, world: World) -> DataSource:
    """Open the data set, in process 0 first, because it may download archives or measure statistics."""
    request = SourceRequest(
        dataset=config.dataset,
        root=Path(config.data),
        cache_dir=Path(config.model_dir),
        num_classes=config.num_classes,
        crop_size=config.given.get("crop_size"),
        seed=config.seed or 0,
        val_fraction=config.val_fraction,
        on_bad_image=config.on_bad_image,
        workers=config.workers,
    )
    source = open_source(request) if world.is_main else None
    distributed.barrier()
    return source if source is not None else open_source(request)


def announce(trainer: Trainer) -> None:
    """Say at the start what was decided and by whom."""
    config = trainer.config
    supplied = [f"{name} {value['value']}" for name, value in config.described().items() if value["origin"] == "recipe"]
    logger.info(
        "%s: %d x %s (S = %d) on %s, %d classes, %d training and %d test images; %.3f M parameters, %.1f M MACs",
        config.method,
        trainer.num_networks,
        config.arch,
        config.split_factor,
        config.dataset,
        len(trainer.source.classes),
        len(trainer.source.train),
        len(trainer.source.test),
        trainer.params_total / 1e6,
        trainer.macs_total / 1e6,
    )
    logger.info(
        "device %s, precision %s, %d process(es), seed %d, best epoch chosen on the %s images",
        trainer.world.device,
        trainer.precision.name,
        trainer.world.world_size,
        trainer.seed,
        "held-out" if "val" in trainer.eval_loaders else "test",
    )
    logger.info("from the recipe: %s", ", ".join(supplied))


def summarise(config: Config) -> dict[str, Any]:
    """Count what `config` stands for, print it as a table, and keep it in results.json of a --model_dir that was given.

    The results of a training run in that folder are left alone.

    Raises:
        UserError: a network that cannot be built, or a data set whose number of classes only --num_classes can say.
    """
    num_classes = ROWS[config.dataset].num_classes if config.dataset in ROWS else config.num_classes
    if num_classes is None:
        raise UserError(
            f"--is_summary opens no data, and --dataset {config.dataset} has any number of classes: add --num_classes."
        )
    if config.num_classes not in (None, num_classes):
        raise UserError(f"--num_classes {config.num_classes}: --dataset {config.dataset} has {num_classes} classes.")
    recipe = row_for(config.dataset, config.crop_size)
    config = resolve_config(config, data_recipe=recipe, crop_size=config.crop_size)
    request = config.backbone_request(num_classes)
    names = methods.get(config.method).backbone_names(config.arch, config.method_options)
    requests = network_requests(
        replace(request, arch=names[0]),
        train_separately=config.is_train_sep,
        archs=names if len(names) > 1 else None,
    )
    result: dict[str, Any] = {
        "arch": config.arch,
        "dataset": config.dataset,
        "split_factor": config.split_factor if len(names) == 1 else len(names),
        "num_classes": num_classes,
        "crop": config.crop_size,
        **network_sizes(requests),
    }
    print(format_table([result]), flush=True)
    plan = solver_plan(requests[0])
    if plan is not None:
        result["division"] = plan.as_dict()
        print(plan.table(), flush=True)
    folder = Path(config.model_dir)
    if "model_dir" in config.given and not (folder / HPARAMS).exists():
        make_folder(folder)
        ckpt.write_file(folder / RESULTS, as_json(result))
    return result


def worker(argv: list[str]) -> None:
    """One process of the published launcher."""
    raise SystemExit(main(argv))


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code: 0 done, 1 failed run, 2 the user's mistake, 130 interrupted."""
    arguments = sys.argv[1:] if argv is None else argv
    try:
        config = parse_config(arguments, program="train_split.py")
        set_process_title(config.proc_name)
        if config.is_summary:
            results = summarise(config)
        elif config.evaluate:
            from eval import evaluate_arguments

            results = evaluate_arguments(arguments)
        elif config.multiprocessing_distributed and not launch.under_launcher():
            gpus = launch.visible_gpus(no_cuda=config.no_cuda, gpu=config.gpu, gpu_ids=config.gpu_ids)
            launch.spawn(
                worker,
                (arguments,),
                processes=config.nproc_per_node or len(gpus) or 1,
                nodes=config.world_size,
                node=config.rank,
                url=config.dist_url,
            )
            return 0
        else:
            results = run(config)
    except (UserError, RunError) as error:
        print(f"train_split.py: {error}", file=sys.stderr)
        return error.exit_code
    except Stopped as stopped:
        print("train_split.py: stopped; a checkpoint was saved. Go on with --resume auto.", file=sys.stderr)
        return 130 if stopped.number == signal.SIGINT else 0
    except KeyboardInterrupt:
        return 130
    if int(os.environ.get("RANK", "0")) == 0:
        print(json.dumps(plain_json(results)), flush=True)
    return 0


def set_process_title(name: str) -> None:
    """Show the run under this name in process lists, where setproctitle is installed."""
    try:
        import setproctitle
    except ImportError:
        return
    setproctitle.setproctitle(name)


if __name__ == "__main__":
    raise SystemExit(main())

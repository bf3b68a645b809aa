"""Train a SplitNet, or any other method of learning together: `python train_split.py --help`.

Progress goes to stderr and train.log; the last line of stdout is one JSON object with the final figures.
"""

if __name__ == "__main__":  # torch takes seconds to import: --help and a wrong flag are answered before
    from parser_params import parse_config
    from utils.program import read_flags

    FLAGS = read_flags("train_split.py", parse_config)

import logging
import sys
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NoReturn

from torch import Tensor

from dataset import DataSource
from dataset.loader import Batch, EvalLoader, TrainLoader
from dataset.pipeline import build_train_loader, evaluation_preprocessing
from dataset.views import ViewMaker, view_spec
from evaluation.ensemble import ensemble_rule
from evaluation.passes import evaluate, figure_names, recorder_of_passes
from evaluation.run import evaluate_arguments
from evaluation.run import output as evaluation_output
from evaluation.sizes import summarise
from method import Progress
from method.costs import training_macs, training_params
from model.layers.narrow_norm import restore_narrow_norms
from model.layers.sync_norm import synchronise_batchnorm
from model.pretrained import Start
from model.restore import published_keys
from opening.announce import announce, warn_of_unused_flags
from opening.data import build_eval_loaders, open_shared_source, resident, start_images
from opening.dry_run import dry_run
from opening.earlier import finished_results, settle_seed
from opening.networks import (
    build_method,
    choose_execution,
    freeze_in_all,
    let_go_of_others,
    load_start,
    open_start,
    spread_over,
)
from parser_params import Config, answer_at_once, parse_config, resolve_config
from record import checkpoint as ckpt
from record.allowance import Allowance
from record.ending import format_ending
from record.logger import RunLog, set_up_text_log
from record.plots import curves_png
from record.report import Reporter, RunClock
from record.run_folder import (
    ABANDONED,
    HPARAMS,
    RESULTS,
    SPLIT,
    Hold,
    Resumed,
    as_json,
    describe_environment,
    is_in,
    keep_best,
    make_folder,
    open_run,
    put_aside,
    split_table,
)
from record.saving import Saver
from record.screen import watched
from record.sinks import open_sink
from training.compiling import as_written, compile_modules
from training.copies import WeightCopies
from training.exchange import open_exchange
from training.guard import NonfiniteSteps, judge_nonfinite
from training.interrupt import PACE, StopRequest
from training.intervals import Interval, Intervals
from training.lone_image import refuse_lone_images
from training.meters import MeanMeter, Means
from training.optim import start_anew
from training.replay import ReplayedStep, choose_recorder
from training.resume import Pace, Position
from training.schedule import Schedule
from training.state import (
    RunState,
    heads_before,
    is_out_of_patience,
    replayed_before,
)
from training.statistics import renew_statistics
from training.step import TrainingStep
from training.update import build_update
from utils import distributed, launch
from utils.cpus import settle_threads
from utils.device import ask_for_determinism, wait_for
from utils.errors import Incomplete, Interrupted, RunError, Stopped, UserError
from utils.launch import World
from utils.macs import count_macs, count_params
from utils.plain_json import plain_json
from utils.precision import choose_precision, lay_out
from utils.program import Output, program_name, run_program, set_process_title, show
from utils.recording import Recorder
from utils.text import escaped, one_line

logger = logging.getLogger("train_split")

STATISTICS_BATCHES = 100  # that slices of a parent get their running statistics from, or an epoch if that is less

PROGRAM = program_name("train_split.py", "train")

CURVES = "curves.png"
DRAWING_SHARE = 0.02  # of the run's time that its curves may take while it goes on
DRAWING_SECONDS = 1.0  # that drawing is thought to take before it was done
GRACE = 20.0  # seconds after a signal in which images may still come, so that an accumulation group gets whole
# flags, for the line of a run without memory
SAVES_MEMORY = (
    "a smaller --batch_size (with --iters_to_accumulate an update covers as many images as before), a smaller "
    "--eval_batch_size, or --execution loop"
)


class Trainer:
    """Everything of one run: data, networks, method, optimiser, logs, and the loop over epochs.

    Attributes:
        config, world, seed, folder, precision: what the run is, and where.
        source, loader, eval_loaders: its data.
        method, network: what is trained, and the S networks in it.
        training_step: what is done with each batch.
        fresh_optimizer_at: epochs at whose start the optimiser forgets.
        steps_per_epoch, total_steps, position: how far training goes without --max_steps, and where it stands.
        meter, epoch_meter, clock, report, intervals, log, saver: what it knows of itself, and what it writes.
        state: what a checkpoint holds of all this.
        stop: whether somebody wants it to end.
    """

    def __init__(
        self,
        config: Config,
        world: World,
        source: DataSource,
        resumed: Resumed | None,
        start: Start | None = None,
    ) -> None:
        assert config.seed is not None
        # what the run is
        self.config, self.world, self.seed = config, world, config.seed
        self.source = source = source.normalised(config.mean, config.std)
        self.folder = Path(config.model_dir)

        # networks and method
        before = None if resumed is None else resumed.state
        start = None if before is not None else start or open_start(config)
        self.method = build_method(config, source, seed=self.seed, world=world, before=before, start=start)
        execution = choose_execution(config, self.method, before)
        self.precision = choose_precision(
            world.device,
            is_amp=config.is_amp,
            amp_dtype=config.amp_dtype,
            layout=config.layout,
            execution=execution,
        )
        self.network = self.method.network
        self.num_networks = self.network.num_members
        deployed = self.method.deployed()
        self.params_one, self.params_total = count_params(self.network.models[0]), count_params(deployed)
        self.macs_total = count_macs(deployed, (3, config.crop_size, config.crop_size))
        self.params_training = training_params(self.method)
        self.macs_training = training_macs(self.method, config.crop_size)
        recorder = choose_recorder(
            config.cuda_graph,
            self.method,
            name=config.method,
            has_exchange=config.exchange is not None,
            iters_to_accumulate=config.iters_to_accumulate,
            scaler=self.precision.scaler,
            world=world,
            before=None if before is None else replayed_before(before),
        )
        self.is_replayed = recorder is not None
        new_heads = () if before is None else heads_before(before)
        if start is not None:
            new_heads = load_start(
                start,
                self.network,
                number=config.network,
                seed=self.seed,
                identical_init=config.is_identical_init,
            )
        let_go_of_others(self.method, world, config.method)
        self._place(execution, recorder)
        self.params_frozen = freeze_in_all(self.network, config.freeze, world) if config.freeze else 0

        # data, and how long the run is
        views = ViewMaker(view_spec(source.recipe, config, mean=source.mean, std=source.std), self.seed)
        self.loader = build_train_loader(
            source,
            config,
            world,
            num_views=self.num_views,
            seed=self.seed,
            sampler=self.method.sampler,
            first_view=self.first_view,
        )
        self.eval_loaders = build_eval_loaders(source, config, world)
        self.source = source = resident(source, self.loader, self.eval_loaders)
        if config.patience is not None and "val" not in self.eval_loaders:
            raise UserError(
                f"--patience {config.patience}: there are no held-out images to judge by, and test images are none: "
                "add --val_fraction, or a folder val/."
            )
        self.steps_per_epoch = self.loader.steps_per_epoch
        self.total_steps = config.epochs * self.steps_per_epoch
        refuse_lone_images(
            self.method,
            smallest=self.loader.fewest_images(min(config.max_steps or sys.maxsize, self.steps_per_epoch) - 1),
            largest=self.loader.fewest_images(0),
            crop_size=config.crop_size,
            arch=config.arch,
            synchronised=self.is_synchronised,
        )
        self.position = Position()
        pace = Pace(
            steps_per_epoch=self.steps_per_epoch,
            global_batch=config.batch_size * world.num_nodes,
            images=len(source.train),
            names=source.names,
            val_fraction=config.val_fraction,
            test_fraction=source.fractions.get("test", 0.0),
        )
        self.method.prepare(source.train.targets.to(world.device), self.seed)
        if start is not None and start.is_parent(self.network):
            self._renew_statistics(views)

        # what changes the weights
        self.schedule = Schedule(config, self.steps_per_epoch)
        self.fresh_optimizer_at = self.method.fresh_optimizer_at(
            config.lr_milestones if config.lr_mode == "step" else ()
        )
        update = build_update(
            self.method,
            config,
            new_heads=new_heads,
            on_nonfinite=config.on_nonfinite,
            scaler=self.precision.scaler,
            capturable=self.is_replayed,
            world=world,
        )
        self.guard, self.average = update.guard, update.average

        # what it knows of itself, and what it writes
        self.clock = RunClock(partial(wait_for, world.device))
        self.meter, self.epoch_meter = MeanMeter(world.device), MeanMeter(world.device)
        self.bad_images: dict[Path, str] = {}
        self.newest = ""  # name of the checkpoint that was saved last, the best one aside
        self.drawing = Allowance(DRAWING_SHARE, DRAWING_SECONDS)
        self.stop = StopRequest(PACE if world.world_size > 1 and world.device.type == "cuda" else 0.0)
        self.loaders: list[TrainLoader | EvalLoader] = [self.loader, *self.eval_loaders.values()]
        for loader in self.loaders:
            loader.on_wait(self.while_waiting)
        self.saver = Saver(self.folder, keep=config.max_ckpt_nums, stops=config.on_save_error == "stop")
        self.log = RunLog(
            self.folder,
            self.num_networks,
            active=world.is_main,
            figures=figure_names([*self.eval_loaders], source.reported),
        )
        self.report = Reporter(
            self.log,
            epochs=config.epochs,
            steps_per_epoch=self.steps_per_epoch,
            visible=world.is_main,
            reported=source.reported,
            losses=self.method.losses_in_sum(),
        )
        self.intervals = Intervals(
            meter=self.meter,
            guard=self.guard,
            clock=self.clock,
            report=self.report,
            waited=lambda: self.loader.time_waiting,
            check=self.check_interval,
            world=world,
        )
        self.state = RunState(
            flags=config.values(),
            origins=config.origins,
            choices=config.resume_choices(),
            seed=self.seed,
            data=source,
            preprocessing=evaluation_preprocessing(source, config),
            pace=pace,
            position=self.position,
            new_heads=new_heads,
            method=self.method,
            optimizer=update.optimizer,
            scaler=update.scaler,
            average=self.average,
            guard=self.guard,
            meter=self.meter,
            epoch_meter=self.epoch_meter,
            clock=self.clock,
            report=self.report,
            precision=self.precision,
            world=world,
            is_replayed=self.is_replayed,
        )
        self._begin(resumed)
        self.exchange = open_exchange(
            config,
            self.state,
            split_factor=config.split_factor,
            epochs=config.epochs,
            folder=self.folder,
            failed=self.saver.failed,
        )

        # last, because compiled parts and DDP's wrapper hold what the networks are now
        if config.compile is not None:
            # inside the DDP wrapper, whose gradient hooks sit on the parameters and so outside of what is compiled
            parts = self.method.compiled_parts()
            for part in parts:
                restore_narrow_norms(part)
            compile_modules(parts, config.compile, world.device, self.network.execution)
        self.training_step = TrainingStep(
            self.method,
            views,
            update,
            config,
            num_views=self.num_views,
            first_view=self.first_view,
            iters_to_accumulate=config.iters_to_accumulate,
            precision=self.precision,
            seed=self.seed,
            world=world,
            replayed=None if recorder is None else ReplayedStep(recorder),
            copies=self._copies(),
        )

    # ---- building ----------------------------------------------------------------------------------------------------

    def _copies(self) -> WeightCopies | None:
        """Copies of the weights that replayed steps would cast; compiled networks cast within their own kernels."""
        if not self.is_replayed or self.precision.autocast is None or self.config.compile is not None:
            return None
        return WeightCopies(self.method, self.network, self.precision.autocast)

    def _renew_statistics(self, views: ViewMaker) -> None:
        """Batch norms of slices get the statistics of what the slices give, from views as the first epoch has them."""
        layout: dict[str, Any] = {"dtype": self.precision.weights, "memory_format": self.precision.memory_format}
        batches = (
            views.make(batch.images, 0, batch.positions_B, self.num_views, first_view=self.first_view, **layout)
            for batch in self.loader.epoch(0, end_batch=STATISTICS_BATCHES)
        )
        count = renew_statistics(self.network, batches, self.precision)
        if count:
            logger.info("running statistics made anew from %d batches", count)

    def _place(self, execution: str, recorder: Recorder | None) -> None:
        """Bring the method to its device, in its precision and layout, and let its networks run as was decided."""
        self.method.to(self.world.device, self.precision.weights)
        lay_out(self.method, self.precision.memory_format)
        if self.is_synchronised:
            synchronise_batchnorm(self.method, self.world.device, self.world.sharers)
        self.network.execution = execution
        self.network.recorder = recorder
        if self.is_synchronised and self.network.execution == "parallel" and self.world.device.type == "cuda":
            logger.info("--execution parallel: with --is_syncbn 1 every exchange waits for the one before, as in loop.")

    @property
    def is_synchronised(self) -> bool:
        """Whether batch norms take the statistics of all shards of a batch."""
        return self.config.is_syncbn and self.world.num_shards > 1

    @property
    def num_views(self) -> int:
        """V: one view for each network held, or one for all where they must, or shall, see the same."""
        if self.shares_view:
            return 1
        return self.num_networks if self.world.mesh is None else len(self.network.models)

    @property
    def shares_view(self) -> bool:
        """Whether all networks see the same view."""
        return self.method.shared_view or not self.config.is_diff_data_train

    @property
    def first_view(self) -> int:
        """Number of the first view made here, among those of all networks."""
        return 0 if self.shares_view else self.network.first_network

    def _begin(self, resumed: Resumed | None) -> None:
        """Go to where the resumed run was stopped, or to the start, or to --start_epoch."""
        position, first = self.position, self.config.start_epoch
        changed: list[str] = []
        lines: Mapping[str, int] = {}
        if resumed is not None:
            changed = self.state.restore(resumed.state)
            lines = resumed.state["report"]["log"] if is_in(resumed.path, self.folder) else {}
        self.log.rewind(lines, epoch=position.epoch, step=position.done)
        if first is not None:
            position.epoch, position.batch = first, 0
            position.step = position.done = first * self.steps_per_epoch
            self.log.cut(epoch=first, step=position.done)
        if changed:
            logger.warning("changed on resume: %s", ", ".join(changed))
        if resumed is not None and (first is not None or self.config.resume != "auto"):
            self._settle_folder(resumed)

    def _settle_folder(self, resumed: Resumed) -> None:
        """Have in the run directory what a run has that has come to this place, and nothing of what came after it."""
        position, best = self.position, self.report.best
        if best is not None and (best["epoch"], best["step"]) > (position.epoch, position.done):
            best = None
        is_there = True
        if self.world.is_main:
            within = position.done if position.batch else None
            aside = put_aside(self.folder, epoch=position.epoch, done=within)
            if aside:
                logger.warning("put aside in %s: %s", self.folder / ABANDONED, ", ".join(aside))
            is_there = keep_best(resumed.path, self.folder, best)
        # every process must know, because all take part in saving a new best
        if best is None or not distributed.gather_values(is_there)[0]:
            if self.report.best is not None:
                logger.warning("the best epoch is counted anew from here: the weights of the one before are not there")
            self.report.forget_best()

    # ---- one epoch ---------------------------------------------------------------------------------------------------

    def train_epoch(self) -> None:
        """From the current batch to the end of the epoch, or of training.

        Checkpoints are made, and signals obeyed, at the end of an accumulation group only: they hold no gradients.

        Raises:
            Stopped: a signal; a checkpoint was written.
            RunError: a non-finite step, a bad image, a full disk under --on_save_error stop.
        """
        self.method.train()
        if self.position.batch == 0:
            if self.position.epoch in self.fresh_optimizer_at:
                start_anew(self.training_step.update.optimizer)
            self.meter.reset()
            self.epoch_meter.reset()
        self.intervals.begin()
        self.stop.begin()
        with self.clock.training():
            for batch in self.loader.epoch(self.position.epoch, start_batch=self.position.batch):
                progress = self.progress(batch)
                if progress.step == 0 and self.world.is_main:
                    self._show_views(batch)
                if self.exchange is not None:
                    self.exchange.before_step(self.position.done)
                metrics = self.training_step(batch, progress)
                self.advance(batch, metrics)
                if self.exchange is not None:
                    self.exchange.after_step(self.position.done, self.position.epoch)
                if self.line_is_due(progress):
                    self.intervals.end(progress, self.position.done)
                self.intervals.report(all_of_them=progress.is_last)
                if progress.updates and self.asked_to_stop():
                    self.save_and_stop()
                if progress.updates and self.save_is_due(progress):
                    self.save(f"checkpoint_{self.position.epoch}_{self.position.done}.pth.tar")
                if progress.is_last:
                    return
        raise RunError("The training data ended within an epoch.")

    def next_steps(self, count: int) -> Iterator[Mapping[str, Tensor]]:
        """Make the next steps of the epoch, so many if it has them, and say nothing of them: for a dry run."""
        self.method.train()
        position = self.position
        start = position.batch
        for batch in self.loader.epoch(position.epoch, start_batch=start, end_batch=start + count):
            progress = self.progress(batch)._replace(updates=True)  # what an update needs is there then
            yield self.training_step(batch, progress)
            position.batch, position.step, position.done = position.batch + 1, position.step + 1, position.done + 1

    def progress(self, batch: Batch) -> Progress:
        """Where training stands before this batch."""
        config, position = self.config, self.position
        # the one place that asks whether a batch is the last
        is_last = position.batch + 1 == self.steps_per_epoch or self.has_ended(ahead=1)
        return Progress(
            epoch=position.epoch,
            step=position.step,
            batch=position.batch,
            steps_per_epoch=self.steps_per_epoch,
            epochs=config.epochs,
            learning_rate=self.schedule(position.step),
            indices_B=batch.indices_B,
            weight_decay=config.weight_decay,
            is_last=is_last,
            updates=is_last or (position.batch + 1) % config.iters_to_accumulate == 0,
        )

    def has_ended(self, *, ahead: int = 0) -> bool:
        """Whether training is over, now or so many batches ahead: after --epochs or --max_steps, or out of patience."""
        most = self.config.max_steps
        position = self.position
        if position.step + ahead >= self.total_steps or (most is not None and position.done + ahead >= most):
            return True
        return ahead == 0 and self.is_out_of_patience()

    def steps_left(self) -> int:
        """How many batches are still to be done, if patience lasts."""
        left = self.total_steps - self.position.step
        return left if self.config.max_steps is None else min(left, self.config.max_steps - self.position.done)

    def is_out_of_patience(self) -> bool:
        """Whether the figure on held-out images has not risen for --patience epochs."""
        return is_out_of_patience(self.report.last, self.report.best, self.config.patience)

    def advance(self, batch: Batch, metrics: Mapping[str, Tensor]) -> None:
        """One batch is done."""
        self.position.batch += 1
        self.position.step += 1
        self.position.done += 1
        self.clock.images += batch.global_batch_size
        self.report.step(
            epoch=self.position.epoch, batch=self.position.batch, done=self.position.step, left=self.steps_left()
        )
        for meter in (self.meter, self.epoch_meter):
            meter.update(metrics, len(batch.labels_B))

    def line_is_due(self, progress: Progress) -> bool:
        """Whether the figures since the last line are to be logged."""
        return progress.is_last or self.position.batch % self.config.print_freq == 0

    def save_is_due(self, progress: Progress) -> bool:
        """Whether --save_steps asks for a checkpoint here; after an epoch there is one anyway."""
        every = self.config.save_steps
        return not progress.is_last and every > 0 and self.position.done % every == 0

    def asked_to_stop(self) -> bool:
        """Whether any process was signalled."""
        is_due = self.stop.due() or self.position.batch == self.steps_per_epoch
        return is_due and self.stop.agreed(self.world.device)

    def while_waiting(self) -> None:
        """Obey a signal although the next images do not come; called again and again while they do not.

        Several processes stop at one place only, so each of them waits for its images.

        Raises:
            Stopped: a signal; a checkpoint was written, or the last one is older.
            RunError: as Stopped, where other processes wait for this one.
        """
        if not self.stop.number:
            return
        if self.world.world_size == 1:
            if not self.method.training:
                raise Stopped(self.stop.number)  # out of `evaluate_epoch`
            if self.position.batch % self.config.iters_to_accumulate == 0:
                self.save_and_stop()
        if self.stop.seconds() > GRACE:
            what = f"no images came for {GRACE:.0f} s, so that the last checkpoint is an older one"
            if self.world.world_size > 1:
                raise RunError(f"stopped; {what}. Go on with --resume auto.")
            raise Stopped(self.stop.number, what)

    def check_interval(self, interval: Interval, means: Means) -> None:
        """Whether training may go on, asked before the line about these steps is written.

        Raises:
            RunError: a non-finite step, a full disk under --on_save_error stop, another job in this one's place.
        """
        self._judge(interval.nonfinite())
        self.saver.check()
        if self.exchange is not None:
            self.exchange.note(means, interval.done, interval.progress.epoch)
            self.exchange.check()

    def _show_views(self, batch: Batch) -> None:
        """A picture of the first images' views."""
        with self.clock.paused():
            views_VBCHW = self.training_step.make_views(batch, self.position.epoch)
            self.log.views(views_VBCHW, self.source.mean, self.source.std, 0)

    def _judge(self, found: NonfiniteSteps | None) -> None:
        """Stop where a step was non-finite, or say so."""
        if found is None:
            return
        limit = self.config.nonfinite_limit if self.config.on_nonfinite == "skip" else None
        logger.warning("%s", judge_nonfinite(found, limit, self.steps_per_epoch))

    # ---- checkpoints -------------------------------------------------------------------------------------------------

    def save(self, name: str) -> None:
        """Begin to write a checkpoint of this name (process 0); the oldest ones beyond --max_ckpt_nums go then."""
        if name != ckpt.BEST:
            self.newest = name
        self.intervals.report(all_of_them=True)  # a checkpoint knows all lines that were written before it
        with self.clock.paused():
            state = self.state.gather()

            def hand_over() -> None:
                if state is not None:
                    self.saver.checkpoint(name, state)

            # which waits for the disk where that is slow, and nobody may wait in an exchange for so long
            distributed.main_alone(self.world, hand_over, what="written its last checkpoints")

    def save_and_stop(self) -> NoReturn:
        """The end of a run that a signal asked for.

        Raises:
            Stopped: always, unless
            RunError: the checkpoint could not be written.
        """
        self.intervals.report(all_of_them=True)
        self._judge(self.guard.read(distributed.all_reduce_sum))
        self.save(f"checkpoint_{self.position.epoch}_{self.position.done}.pth.tar")
        self.saver.wait()
        if lost := self.saver.lost(self.newest):
            raise RunError(f"stopped, but {lost[0]} could not be written: {self.saver.on_disk()}.")
        raise Stopped(self.stop.number)

    # ---- evaluation --------------------------------------------------------------------------------------------------

    def evaluate_epoch(self) -> None:
        """Evaluate, log the figures and keep the best; every process takes part."""
        self.method.synchronise()
        self.method.eval()
        with self.clock.running():
            figures = {name: self.evaluate_split(name) for name in self.eval_loaders}
        position = self.position
        is_best = self.report.evaluation(
            figures,
            epoch=position.epoch,
            step=position.done,
            rate=self.schedule(max(position.step - 1, 0)),
            train=self.epoch_meter.read(distributed.add_once(self.world)),
            seconds=self.clock.seconds,
        )
        if is_best:
            self.save(ckpt.BEST)

    def say_epoch(self) -> None:
        """The line of an epoch that is not evaluated; every process takes part."""
        rate = self.schedule(max(self.position.step - 1, 0))
        train = self.epoch_meter.read(distributed.add_once(self.world))
        self.report.epoch_ended(epoch=self.position.epoch, rate=rate, train=train)

    def evaluate_split(self, name: str, *, most: int | None = None) -> dict[str, Any]:
        """Figures of the networks, which are in evaluation mode, on "val" or "test".

        Args:
            most: batches of a process; None: all.

        Raises:
            Stopped: a signal.
        """
        loader = self.eval_loaders[name]
        rounds = loader.rounds if most is None else min(most, loader.rounds)
        views, precision = self.training_step.views, self.precision
        weights = nullcontext() if self.average is None else self.average.applied_to(self.network)
        # not compiled, as in eval.py, so that both find the same figures
        with as_written(self.config.compile is not None), weights:
            # an average's are each process's own until here
            distributed.broadcast_buffers(self.network, self.world.sharers)
            evaluation = evaluate(
                self.network,
                watched(
                    self.stop.until_stopped(islice(loader, most), rounds=rounds, device=self.world.device),
                    rounds,
                    f"evaluating {name}",
                    visible=self.world.is_main,
                ),
                prepare=partial(views.evaluate, dtype=precision.weights, memory_format=precision.memory_format),
                num_networks=self.num_networks,
                device=self.world.device,
                num_classes=len(self.source.classes),
                rule=ensemble_rule(
                    after_softmax=self.config.is_ensembled_after_softmax, maximum=self.config.is_max_ensemble
                ),
                autocast_dtype=precision.autocast,
                extra=self.method.extra_logits,
                all_reduce=distributed.add_once(self.world),
                recorder=recorder_of_passes(self.world.device, rounds) if self.is_replayed else None,
            )
            return self.method.complete_figures(evaluation.figures)

    # ---- the run -----------------------------------------------------------------------------------------------------

    def run(self) -> dict[str, Any]:
        """Train to the end and return the final figures.

        Raises:
            Stopped: SIGTERM or SIGINT; a checkpoint was written.
            RunError: a non-finite step, a bad image, a full disk under --on_save_error stop.
            Incomplete: what the run ends with could not be written.
        """
        is_complete = False
        with self.stop:
            try:
                if self.config.sink is not None and self.world.is_main:
                    self.log.sink = open_sink(
                        self.config.sink, self.folder, plain_json(self.config.values()), self.log.reached
                    )
                with launch.naming_lost_processes(self.world), self.report.running(left=self.steps_left()):
                    self._begin_exchange()
                    self._train_and_evaluate()
                    results = self.finish()
                    is_complete = True
                    return results
            finally:
                if self.exchange is not None:
                    self.exchange.close()
                self.close()
                if self.log.sink is not None:
                    self.log.sink.end(complete=is_complete)

    def close(self) -> None:
        """End the processes that decode images, and the thread that writes."""
        self.saver.close()
        for loader in self.loaders:
            loader.close()

    def _begin_exchange(self) -> None:
        if self.exchange is None:
            return
        position = self.position
        self.exchange.begin(
            position.done,
            position.epoch,
            is_fresh=self.config.resume is None,
            given_up=lambda: bool(self.stop.number),
        )
        distributed.barrier()  # a job that may not train ends before any of its processes has begun

    def _train_and_evaluate(self) -> None:
        position, config = self.position, self.config
        while not self.has_ended() or position.batch == self.steps_per_epoch:
            if position.batch < self.steps_per_epoch:  # a run stopped within its evaluation begins with that
                before = self.clock.train_seconds
                self.train_epoch()
                self._say_share(self.clock.train_seconds - before)
            is_whole = position.batch == self.steps_per_epoch
            if is_whole:
                position.epoch, position.batch = position.epoch + 1, 0
            if self.has_ended() or (is_whole and position.epoch % config.eval_per_epoch == 0):
                try:
                    self.evaluate_epoch()
                except Stopped:
                    if is_whole:
                        position.epoch, position.batch = position.epoch - 1, self.steps_per_epoch
                    self.save_and_stop()
            else:
                self.say_epoch()
            within = "" if is_whole else f"_{position.done}"
            self.save(f"checkpoint_{position.epoch}{within}.pth.tar")
            self._write_method_files(final=False)
            self._draw_curves()
            self._list_bad_images()
        if self.is_out_of_patience() and position.step < self.total_steps:
            assert self.report.best is not None
            logger.info(
                "stopped after epoch %d of %d: held-out top-1 has not risen since epoch %d (--patience %d)",
                position.epoch,
                config.epochs,
                self.report.best["epoch"],
                config.patience,
            )

    def _list_bad_images(self) -> None:
        """Name the images that --on_bad_image skip has left out so far, in the log and in bad_images.txt."""
        found = {**self.source.bad_images, **self.loader.bad_images}
        for loader in self.eval_loaders.values():
            found.update(loader.bad_images)
        new = {path: why for path, why in found.items() if path not in self.bad_images}
        for path, why in new.items():
            logger.warning("left out: %s: %s", escaped(path), why)
        self.bad_images.update(new)
        if new:
            name = "bad_images.txt" if self.world.is_main else f"bad_images_{self.world.rank}.txt"
            lines = (f"{escaped(path)}: {one_line(why)}\n" for path, why in sorted(self.bad_images.items()))
            self.saver.file(name, "".join(lines))

    def _draw_curves(self) -> None:
        """curves.png so far, unless that would take more than its share of the run's time."""
        if self.world.is_main and self.drawing.allows():
            with self.drawing.spending():
                self.saver.file(CURVES, curves_png(self.folder))

    def _write_method_files(self, *, final: bool) -> None:
        """What the method wants to have in the run directory, such as an architecture that it found."""
        if not self.world.is_main:
            return
        for name, content in self.method.run_files(final=final).items():
            self.saver.file(name, content)
            if isinstance(content, bytes):
                self.log.picture(Path(name).stem, content, self.position.epoch)

    def _say_share(self, seconds: float) -> None:
        """Log what the peers' predictions took of so many seconds of training."""
        if self.exchange is not None and self.world.is_main:
            share = 100 * self.exchange.share(seconds)
            logger.info("the peers' predictions took %.1f %% of the training time of this epoch", share)

    def finish(self) -> dict[str, Any]:
        """Final figures: results.json, curves.png, TensorBoard's hparams.

        Raises:
            Incomplete: the best or the last checkpoint, or results.json, could not be written.
        """
        last = self.report.last
        if last is None or last["step"] != self.position.done or self.report.best is None:
            self.evaluate_epoch()  # it was stopped within its evaluation, or has lost its best epoch
        if self.exchange is not None:
            self.exchange.finish(self.position.done, self.position.epoch)
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
            self.saver.file(CURVES, curves_png(self.folder))
            if lost := self.saver.lost(ckpt.BEST, self.newest, RESULTS):
                raise Incomplete(
                    f"trained to the end, but {' and '.join(lost)} could not be written: {self.saver.on_disk()}. Make "
                    "room and go on with --resume auto.",
                    results,
                )
        return results

    def results(self) -> dict[str, Any]:
        """The JSON object that a run ends with; accuracies in percent."""
        return {
            **self.report.results(),
            "best_saved_epoch": ckpt.saved_epoch(self.folder / ckpt.BEST),
            "params_one": self.params_one,
            "params_total": self.params_total,
            "macs_total": self.macs_total,
            "params_training": self.params_training,
            "macs_training": self.macs_training,
            "epochs": self.position.epoch,
            "steps": self.position.done,
            "seconds": round(self.clock.seconds, 3),
            "images_per_second": round(self.clock.images_per_second(), 1),
            "state_sha256": ckpt.state_sha256(published_keys(self.state.weights())),
            "arch": self.config.arch,
            "method": self.config.method,
            "split_factor": self.num_networks,
            "dataset": self.config.dataset,
            "seed": self.seed,
            "precision": self.precision.name,
            "placement": self.config.placement,
            "world_size": self.world.world_size,
            "nonfinite_skipped": self.guard.count(),
            "model_dir": str(self.folder),
            **({} if self.config.network is None else {"network": self.config.network}),
        }


# ---- entry -----------------------------------------------------------------------------------------------------------


def run(config: Config) -> dict[str, Any]:
    """Train as `config` says, in this process of the job; returns the final figures.

    Raises:
        UserError, RunError, Stopped: see `Trainer.run`.
    """
    ask_for_determinism(config.deterministic)
    world = launch.join(config.gpus(), backend=config.dist_backend)
    set_up_text_log(None, rank=world.rank)
    if world.is_main and not config.no_cuda and (line := launch.unused_gpu()):
        logger.warning("%s", line)
    threads = settle_threads(config.threads, processes=world.local_size)
    if world.is_main:
        logger.info("%s", threads)
    try:
        return run_in(world, config)
    finally:
        launch.leave(world)


def run_in(world: World, config: Config) -> dict[str, Any]:
    """`run` in a process that has found its place."""
    folder = Path(config.model_dir)
    with launch.naming_lost_processes(world), Hold(folder, world) as hold:
        world = spread_over(world, config)
        if not config.dry_run:
            hold.take()  # before it is read, and again once it is made
        resumed = open_run(folder, config.resume)
        distributed.barrier()  # nobody writes into the folder before everybody has looked
        finished = finished_results(folder, config, resumed)
        if finished is not None:
            return finished
        config = settle_seed(config, world, resumed)
        if config.dry_run:
            cost = dry_run(world, config, lambda passing: build_trainer(world, passing, resumed))
            if world.is_main:
                show(cost.text())
            return cost.as_dict()
        make_folder(folder)
        hold.take()
        set_up_text_log(folder, rank=world.rank)
        return build_trainer(world, config, resumed).run()


def build_trainer(world: World, config: Config, resumed: Resumed | None) -> Trainer:
    """Open what the flags ask for, settle them, write down what the run is, and say it.

    Raises:
        UserError: flags, data, weights and networks that do not fit.
    """
    folder = Path(config.model_dir)
    start = open_start(config) if resumed is None else None
    images = start_images(config, start, resumed)
    source = open_shared_source(config, world, None if images is None else images.get("crop_size"))
    before = {} if resumed is None else resumed.state.get("config", {})
    config = resolve_config(
        config,
        data_recipe=source.recipe,
        crop_size=source.crop_size,
        is_drawn=bool(source.fractions),
        nodes=world.num_nodes,
        start=images,
        by_network=resumed is None or "drop_path" in before,
        began_at=before.get("crop_size"),
    )
    warn_of_unused_flags(config)
    if world.is_main:
        ckpt.write_file(folder / HPARAMS, as_json(config.described()))
        if source.membership:
            ckpt.write_file(folder / SPLIT, split_table(source.membership))
        ckpt.write_file(folder / "env.json", as_json(describe_environment(world)))
    trainer = Trainer(config, world, source, resumed, start)
    announce(
        config,
        trainer.state,
        params=trainer.params_total,
        macs=trainer.macs_total,
        frozen=trainer.params_frozen,
    )
    return trainer


def train_arguments(argv: list[str], config: Config | None = None) -> Output | None:
    """What a command line asks for: training, a summary or an evaluation; returns what the program ends with.

    Args:
        argv: the command line.
        config: what it says, where it has been read already.

    Raises:
        UserError, RunError, Stopped: see `Trainer.run`.
        SystemExit: a started process failed and has said why.
    """
    try:
        config = config or parse_config(argv, program=PROGRAM)
        set_process_title(config.proc_name)
        if (text := answer_at_once(config)) is not None:
            show(text)
            return None
        if config.is_summary:
            return Output(summarise(config), "", config.json)
        if config.evaluate:
            return evaluation_output(evaluate_arguments(argv), as_json=config.json)
        if config.multiprocessing_distributed and not launch.under_launcher():
            config.start_processes(worker, (argv,))
            return None  # process 0 has printed it
        results = run(config)
        return Output(results, "" if config.dry_run else format_ending(results), config.json)
    except Interrupted as interrupted:
        if config is not None and (config.is_summary or config.evaluate):
            raise
        raise before_training(interrupted.number) from None


def before_training(number: int) -> Stopped:
    """What a signal means while training is not under way."""
    return Stopped(number, "training was not under way")


def worker(argv: list[str]) -> None:
    """One process of the published launcher."""
    raise SystemExit(main(argv))


def main(argv: list[str] | None = None, config: Config | None = None) -> int:
    """The command line; returns the exit code: 0 done, also by SIGTERM, 1 failed, 2 the user's mistake, 130 SIGINT.

    Args:
        argv: the arguments without the program's name; None takes those of this process.
        config: what they say, where they have been read already.
    """
    work = partial(train_arguments, config=config)
    return run_program(PROGRAM, work, argv, saves_memory=SAVES_MEMORY, signalled=before_training)


if __name__ == "__main__":
    raise SystemExit(main(config=FLAGS))

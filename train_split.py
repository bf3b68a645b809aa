"""Train a SplitNet, or any other method of learning together: `python train_split.py --help`.

Progress goes to stderr and train.log; the last line of stdout is one JSON object with the final figures.
"""

if __name__ == "__main__":  # torch takes seconds to import: --help and a wrong flag are answered before
    from parser_params import parse_config
    from utils.program import read_flags

    FLAGS = read_flags("train_split.py", parse_config)

import logging
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from dataset import DataSource, SourceRequest, open_source
from dataset.class_files import class_weights, with_names
from dataset.loader import Batch, EvalLoader, TrainLoader
from dataset.pipeline import build_eval_loader, build_train_loader, evaluation_preprocessing
from dataset.views import ViewMaker, view_spec
from evaluation.ensemble import ensemble_rule
from evaluation.metrics import counted
from evaluation.passes import evaluate, recorder_of_passes
from evaluation.run import evaluate_arguments
from evaluation.run import output as evaluation_output
from evaluation.sizes import summarise
from loss.classification import ClassLoss
from method import Method, Peers, Progress, TrainingData, methods
from method.costs import training_macs, training_params
from model import BackboneRequest, build_splitnet
from model.depth import freeze, layer_factors, layer_rates
from model.layers.narrow_norm import restore_narrow_norms
from model.layers.sync_norm import synchronise_batchnorm
from model.pretrained import Start
from model.registry import SMALL, has_two_forms, image_shape, request_of, solved_request
from model.restore import published_keys, stored_plan
from parser_params import Config, answer_at_once, parse_config, resolve_config
from recipe.fine_tuning import flags_before, image_flags
from record import checkpoint as ckpt
from record.allowance import Allowance
from record.checkpoint import Checkpoint
from record.ending import format_ending
from record.exchange import ExchangeFolder
from record.logger import RunLog, set_up_text_log
from record.plots import curves_png
from record.report import Reporter, RunClock
from record.run_folder import (
    ABANDONED,
    HPARAMS,
    RESULTS,
    SPLIT,
    Resumed,
    as_json,
    describe_environment,
    is_in,
    keep_best,
    make_folder,
    open_run,
    put_aside,
    read_results,
    split_table,
)
from record.saving import Saver
from record.screen import watched
from record.sinks import open_sink
from training.compiling import as_written, compile_modules
from training.copies import WeightCopies
from training.cost import RunCost, nearest_folder, peak_memory
from training.exchange import Courier, Exchange
from training.guard import NonfiniteGuard, NonfiniteSteps, judge_nonfinite
from training.interrupt import PACE, StopRequest
from training.lone_image import refuse_lone_images
from training.meters import MeanMeter, Means, Reading
from training.optim import WeightAverage, build_optimizer, parameter_groups, start_anew
from training.replay import ReplayedStep, check_replayable
from training.resume import Pace, Position, changed_flags
from training.schedule import Schedule
from training.state import (
    RunState,
    execution_before,
    has_ended,
    heads_before,
    is_out_of_patience,
    replayed_before,
    seed_before,
    steps_before,
)
from training.statistics import renew_statistics
from training.step import TrainingStep
from training.update import KeptBuffers, WeightUpdate
from utils import distributed, launch
from utils.cpus import settle_threads
from utils.device import ask_for_determinism, wait_for
from utils.errors import Incomplete, Interrupted, RunError, Stopped, UserError
from utils.launch import World
from utils.macs import count_macs, count_params
from utils.mesh import build_mesh, choose_groups
from utils.plain_json import plain_json
from utils.precision import choose_precision, lay_out
from utils.program import Output, program_name, run_program, show
from utils.recording import CudaRecorder, Recorder
from utils.seed import STREAM_INIT, draw_seed, fold_in
from utils.text import escaped, one_line

logger = logging.getLogger("train_split")

STATISTICS_BATCHES = 100  # that slices of a parent get their running statistics from, or an epoch if that is less

PROGRAM = program_name("train_split.py", "train")

LABEL_SMOOTHING = 0.1
CURVES = "curves.png"
DRAWING_SHARE = 0.02  # of the run's time that its curves may take while it goes on
DRAWING_SECONDS = 1.0  # that drawing is thought to take before it was done
GRACE = 20.0  # seconds after a signal in which images may still come, so that an accumulation group gets whole
# flags, for the line of a run without memory
SAVES_MEMORY = (
    "a smaller --batch_size (with --iters_to_accumulate an update covers as many images as before), a smaller "
    "--eval_batch_size, or --execution loop"
)
METHOD_INIT = 1_000_000  # the part of the initialisation stream that a method's own layers use


class Mark(NamedTuple):
    """Images trained on, seconds waited for data and seconds of the run, at one moment."""

    images: int
    waiting: float
    seconds: float


@dataclass(kw_only=True)
class Interval:
    """What a line will say of the steps since the one before, once the device has done them.

    Attributes:
        progress: of its last batch.
        done: steps of the run at its end.
        images, waiting: as in `Mark`, at its end.
        means: of the meter.
        nonfinite: what the guard has found.
        seconds: as in `Mark`, when it was seen that the device is done with it.
    """

    progress: Progress
    done: int
    images: int
    waiting: float
    means: Reading
    nonfinite: Callable[[], NonfiniteSteps | None]
    seconds: float | None = None


class Trainer:
    """Everything of one run: data, networks, method, optimiser, logs, and the loop over epochs.

    Attributes:
        config, world, seed, folder, precision: what the run is, and where.
        source, loader, eval_loaders: its data.
        method, network: what is trained, and the S networks in it.
        training_step: what is done with each batch.
        fresh_optimizer_at: epochs at whose start the optimiser forgets.
        steps_per_epoch, total_steps, position: how far training goes without --max_steps, and where it stands.
        meter, epoch_meter, clock, report, log, saver: what it knows of itself, and what it writes.
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
        self.method = self._build_method(before)
        execution = self._choose_execution(before)
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
        recorder = self._recorder(before)
        self.is_replayed = recorder is not None
        start = None if before is not None else start or open_start(config)
        new_heads = heads_before(before) if before is not None else self._load_pretrained(start)
        self._spread()
        self._place(execution, recorder)
        self.params_frozen = self._freeze(config.freeze) if config.freeze else 0

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
        splits = {"val": source.val, source.reported: source.test}
        self.eval_loaders = {
            name: build_eval_loader(
                split,
                config,
                world,
                batch_size=config.evaluation_batch(
                    in_memory=split.images is not None, on_gpu=world.device.type == "cuda"
                ),
            )
            for name, split in splits.items()
            if split is not None
        }
        self.source = source = self._resident()
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
        update = self._build_update(new_heads)
        self.guard, self.average = update.guard, update.average

        # what it knows of itself, and what it writes
        self.clock = RunClock(partial(wait_for, world.device))
        self.meter, self.epoch_meter = MeanMeter(world.device), MeanMeter(world.device)
        self.since = Mark(0, 0.0, 0.0)  # the end of the last interval that was reported
        self.intervals: list[Interval] = []  # those that were not, and that a GPU may not be done with
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
        self.exchange = self._build_exchange()

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

    def _build_method(self, resumed: Checkpoint | None) -> Method[Any]:
        config = self.config
        kind = methods.get(config.method)
        names = kind.backbone_names(config.arch, config.method_options)
        if len(names) > 1 and not kind.networks_from_list:
            raise UserError(f"--method {config.method} takes one backbone; --arch names {len(names)}.")
        request = config.backbone_request(len(self.source.classes))
        request = replace(
            request,
            form=kind.member_form(config.method_options, request, self.seed),
            arch=names[0],
            **self._plan_before(request, resumed),
        )
        if request.form is None and len(names) == 1:  # one search for all processes, and one plan
            request = distributed.said_by_first(partial(solved_request, request))
        network = build_splitnet(
            request,
            seed=self.seed,
            identical_init=config.is_identical_init,
            train_separately=config.is_train_sep,
            archs=names if len(names) > 1 else None,
            number=config.network,
        )
        weights_K = None if config.class_weights is None else class_weights(config.class_weights, self.source)
        class_loss = ClassLoss(
            kind=config.class_loss,
            label_smoothing=LABEL_SMOOTHING if config.is_label_smoothing else 0.0,
            weights_K=None if weights_K is None else weights_K.to(self.world.device),
        )
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(fold_in(self.seed, STREAM_INIT, METHOD_INIT))
            method: Method[Any] = kind(network, config.method_options, class_loss=class_loss)
        source = self.source
        method.meet(TrainingData(source.classes, source.mean, source.std, config.crop_size))
        return method

    def _plan_before(self, request: BackboneRequest, resumed: Checkpoint | None) -> dict[str, Any]:
        """The plan of the resumed run's networks; of a new run, whether the networks are fitted to small images."""
        if resumed is None:
            own = methods.get(self.config.method).network_plan(self.config.method_options)
            return {"fits_images": self.config.pretrained is None, **own}
        stored = stored_plan(resumed, "--resume")
        return stored | {"widths": stored["widths"] or request.widths}

    def _recorder(self, resumed: Checkpoint | None) -> Recorder | None:
        """What replayed steps are recorded by, where --cuda_graph asks for them.

        `auto` asks where a step can be replayed, and does as the resumed run did. With 0, a line tells what it would do
        on a GPU.

        Raises:
            UserError: a step cannot be replayed, and shall be.
        """
        asked, device = self.config.cuda_graph, self.world.device
        if asked == "0" and device.type != "cuda":
            return None
        try:
            if why := self.method.incompatible.get("cuda_graph"):
                raise UserError(f"--cuda_graph cannot go with --method {self.config.method}: {why}.")
            if self.config.exchange is not None:
                raise UserError("--cuda_graph replays one and the same step, and peers come and go in an --exchange.")
            check_replayable(
                device=device,
                world_size=self.world.world_size,
                scaler=self.precision.scaler,
                iters_to_accumulate=self.config.iters_to_accumulate,
                decides_on_host=self.method.decides_on_host,
            )
        except UserError as error:
            if asked == "1":
                raise
            logger.info("--cuda_graph %s: steps are not replayed. %s", asked, error)
            return None
        if asked == "0":
            logger.info("--cuda_graph 0: steps are not replayed; with auto, or 1, they would be, as one CUDA graph.")
            return None
        before = None if resumed is None else replayed_before(resumed)
        if asked == "auto":
            is_wanted = before is None or before
            as_before = "" if before is None else ", as the run before did"
            logger.info(
                "--cuda_graph auto: steps are %s%s.",
                "replayed as one CUDA graph" if is_wanted else "not replayed",
                as_before,
            )
            if not is_wanted:
                return None
        return CudaRecorder(device)

    def _copies(self) -> WeightCopies | None:
        """Copies of the weights that replayed steps would cast; compiled networks cast within their own kernels."""
        if not self.is_replayed or self.precision.autocast is None or self.config.compile is not None:
            return None
        return WeightCopies(self.method, self.network, self.precision.autocast)

    def _load_pretrained(self, start: Start | None) -> tuple[str, ...]:
        """Take the weights of --pretrained, if any; returns the names of the heads that stay new, as prefixes."""
        if start is None:
            return ()
        if self.config.network is None:
            renewed = start.load_into(self.network, seed=self.seed)
        else:  # the weights that it has among all
            whole = build_splitnet(
                request_of(self.network.models[0]), seed=self.seed, identical_init=self.config.is_identical_init
            )
            heads = start.load_into(whole, seed=self.seed)
            own = f"models.{self.config.network}."
            self.network.models[0].load_state_dict(whole.models[self.config.network].state_dict())
            renewed = [f"models.0.{name.removeprefix(own)}" for name in heads if name.startswith(own)]
        for name in renewed:
            logger.info("--pretrained: the head %s has another size there and starts anew.", name)
        return tuple(f"network.{name}." for name in renewed)

    def _spread(self) -> None:
        """Let go of the networks that other processes hold, where --placement asks for it."""
        mesh = self.world.mesh
        if mesh is None:
            return
        if self.params_training:
            raise UserError(
                f"--placement networks: --method {self.config.method} trains parameters beside its networks. Use "
                "--placement data."
            )
        self.method.mesh = mesh
        self.network.hold(mesh)
        if self.world.is_main:
            logger.info("--placement networks: %d group(s) of %d process(es)", mesh.groups, mesh.replicas)

    def _freeze(self, what: str) -> int:
        """Freeze a part of every network; how many parameters that are in all of them."""
        frozen = freeze(self.network, what)
        if self.world.mesh is None:
            return frozen
        return int(self.world.mesh.sum_networks(torch.tensor([frozen], device=self.world.device)))

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

    def _choose_execution(self, resumed: Checkpoint | None) -> str:
        """How the networks run: as the resumed run's did, unless another strategy is asked for."""
        asked = self.config.execution
        if self.method.runs_networks_itself:
            if asked != "loop":
                logger.info("--execution %s: this method runs parts of networks, so it keeps to loop.", asked)
            return "loop"
        before = None if resumed is None else execution_before(resumed)
        return before if before and (asked == "auto" or "execution" not in self.config.given) else asked

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

    def _resident(self) -> DataSource:
        """The data with its images where the loaders have them, so that no second copy of them stays on the host."""
        source, loaders = self.source, self.eval_loaders
        return replace(
            source,
            train=self.loader.resident(source.train),
            test=loaders[source.reported].resident(source.test),
            val=None if source.val is None else loaders["val"].resident(source.val),
        )

    def _build_update(self, new_heads: tuple[str, ...]) -> WeightUpdate:
        """Optimiser, and what else follows a backward pass.

        Args:
            new_heads: prefixes of the parameters that --pretrained did not bring.
        """
        config, device = self.config, self.world.device
        trained = self.method.trained_parameters()
        factors = layer_factors(self.network, config.layer_decay) if config.layer_decay < 1 else {}
        groups = parameter_groups(
            self.method,
            trained,
            config,
            new_heads=new_heads,
            factors={f"network.{name}": factor for name, factor in factors.items()} | self.method.rate_factors(),
            undecayed=self.method.undecayed_parameters(),
        )
        return WeightUpdate(
            network=self.network,
            parameters=[parameter for _, parameter in trained],
            optimizer=build_optimizer(config, groups, capturable=self.is_replayed),
            scaler=torch.amp.GradScaler(device.type, enabled=self.precision.scaler),
            guard=NonfiniteGuard(self.num_networks, device, sticky=config.on_nonfinite == "stop"),
            average=WeightAverage(self.network, config.ema_decay) if config.ema_decay > 0 else None,
            clip_grad=config.clip_grad,
            kept=KeptBuffers(self.network) if config.on_nonfinite == "skip" else None,
            others=None if self.world.mesh is None else self.world.mesh.network_dim,
        )

    def _build_exchange(self) -> Exchange | None:
        """What learns from the jobs that train the other networks, where --exchange has this one train one of them."""
        config = self.config
        if config.exchange is None:
            return None
        assert config.network is not None
        own, burn_in = self.network.models[0], config.exchange_burn_in
        self.method.peers = peers = Peers(
            own,
            number=config.network,
            split_factor=config.split_factor,
            seed=self.seed,
            burn_in=self.method.peers_warm_up(config.epochs) if burn_in is None else burn_in,
            most=config.exchange_peers,
        )
        describe = partial(self.state.describe_network, config.network)
        courier = None
        if self.world.is_main:
            folder = ExchangeFolder(Path(config.exchange))
            courier = Courier(folder, config.network, peers.numbers, own.state_dict(), describe())
        return Exchange(
            courier,
            peers,
            describe=describe,
            state=self._own_weights,
            every=config.exchange_every,
            patience=config.exchange_patience or 20 * config.exchange_every,
            folder=self.folder,
            failed=self.saver.failed,
        )

    def _own_weights(self) -> dict[str, Tensor]:
        """The weights of the one network of a job that are published: the moving average's, where there is one."""
        state = self.network.state_dict() if self.average is None else self.average.state_dict()
        return {name.removeprefix("models.0."): value for name, value in state.items()}

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
        self.since = self.mark()
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
                    self.end_interval(progress)
                self.report_intervals(all_of_them=progress.is_last)
                if progress.updates and self.asked_to_stop():
                    self.save_and_stop()
                if progress.updates and self.save_is_due(progress):
                    self.save(f"checkpoint_{self.position.epoch}_{self.position.done}.pth.tar")
                if progress.is_last:
                    return
        raise RunError("The training data ended within an epoch.")

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

    def end_interval(self, progress: Progress) -> None:
        """Begin to read the meters for a line, and begin the next interval.

        Args:
            progress: of the interval's last batch.
        """
        here, everywhere = self.mark(), distributed.all_reduce_sum
        self.intervals.append(
            Interval(
                progress=progress,
                done=self.position.done,
                images=here.images,
                waiting=here.waiting,
                means=self.meter.reading(distributed.add_once(self.world)),
                nonfinite=self.guard.reading(everywhere),
            )
        )
        self.meter.reset()

    def report_intervals(self, *, all_of_them: bool) -> None:
        """Log the intervals that the device is done with, and look for non-finite steps.

        A GPU has the next steps to do meanwhile, and no more than an interval of them, so no line makes it idle.
        Several processes, which must find the same, look at the same step.

        Args:
            all_of_them: wait for what the device is not done with.

        Raises:
            RunError: a non-finite step, a full disk under --on_save_error stop.
        """
        alone = self.world.world_size == 1 or self.world.device.type == "cpu"
        while self.intervals:
            interval = self.intervals[0]
            is_here = interval.means.is_here()
            if is_here and interval.seconds is None:
                self.clock.count()
                interval.seconds = self.clock.seconds
            if not (all_of_them or len(self.intervals) > 1 or (is_here and alone)):
                return
            means = interval.means.get()  # in the steps' time, which on a GPU passes here
            del self.intervals[0]
            is_idle = self.world.device.type == "cpu" or (all_of_them and not self.intervals)
            # a pause would wait for the next steps too
            with self.clock.paused() if is_idle else self.clock.counted():
                self._report(interval, means)

    def _report(self, interval: Interval, means: Means) -> None:
        ended = self.clock.seconds if interval.seconds is None else interval.seconds
        since, self.since = self.since, Mark(interval.images, interval.waiting, ended)
        seconds = max(ended - since.seconds, 1e-9)
        self._judge(interval.nonfinite())
        self.saver.check()
        if self.exchange is not None:
            self.exchange.note(means, interval.done, interval.progress.epoch)
            self.exchange.check()
        self.report.interval(
            epoch=interval.progress.epoch,
            step=interval.done - 1,
            batch=interval.progress.batch,
            rate=interval.progress.learning_rate,
            means=means,
            speed={
                "images_per_second": round((interval.images - since.images) / seconds, 1),
                "data_wait": round((interval.waiting - since.waiting) / seconds, 4),
            },
        )

    def mark(self) -> Mark:
        """What the speed of an interval is measured by."""
        return Mark(self.clock.images, self.loader.time_waiting, self.clock.seconds)

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
        self.report_intervals(all_of_them=True)  # a checkpoint knows all lines that were written before it
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
        self.report_intervals(all_of_them=True)
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

    # ---- a dry run ---------------------------------------------------------------------------------------------------

    def measure(self, *, free_bytes: int) -> RunCost:
        """Make the next step and evaluate one batch, each twice where there are two, the second time by the clock.

        Args:
            free_bytes: on the disk of the run folder.

        Raises:
            RunError: a bad image, a non-finite step.
        """
        steps, config = self.steps_left(), self.config
        epochs = max(-(-steps // self.steps_per_epoch), 1)
        step_seconds = self._time_steps()
        if (found := self.guard.read(distributed.all_reduce_sum)) is not None:
            logger.warning("%s", judge_nonfinite(found, None, self.steps_per_epoch))
        self.method.synchronise()
        self.method.eval()
        evaluation_seconds = sum(self._time_evaluation(name) for name in self.eval_loaders)
        state = self.state.gather()
        saves = epochs + (steps // config.save_steps if config.save_steps else 0)
        return RunCost(
            steps=steps,
            evaluations=max(epochs // config.eval_per_epoch, 1),
            step_seconds=step_seconds,
            evaluation_seconds=evaluation_seconds,
            memory_bytes=peak_memory(self.world.device),
            device=self.world.device.type,
            checkpoint_bytes=0 if state is None else ckpt.checkpoint_size(state),
            checkpoints=min(saves, config.max_ckpt_nums) + 2,
            free_bytes=free_bytes,
        )

    def _time_steps(self) -> float:
        """Seconds of the second step from here, or of the first where that is the last."""
        self.method.train()
        position, seconds = self.position, 0.0
        batches = self.loader.epoch(position.epoch, start_batch=position.batch, end_batch=position.batch + 2)
        began = time.perf_counter()
        for batch in batches:
            progress = self.progress(batch)._replace(updates=True)  # what an update needs is there then
            self.training_step(batch, progress)
            wait_for(self.world.device)
            position.batch, position.step, position.done = position.batch + 1, position.step + 1, position.done + 1
            seconds, began = time.perf_counter() - began, time.perf_counter()
        return seconds

    def _time_evaluation(self, name: str) -> float:
        """Seconds of a whole evaluation on a split, from one batch."""
        seconds = 0.0
        for _ in range(2):
            began = time.perf_counter()
            self.evaluate_split(name, most=1)
            wait_for(self.world.device)
            seconds = time.perf_counter() - began
        return seconds * self.eval_loaders[name].rounds

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
                    self.log.sink = open_sink(self.config.sink, self.folder, plain_json(self.config.values()))
                with launch.naming_lost_processes(self.world), self.report.running(left=self.steps_left()):
                    self._begin_exchange()
                    self._train_and_evaluate()
                    results = self.finish()
                    is_complete = True
                    return results
            finally:
                if self.exchange is not None:
                    self.exchange.close()
                self.saver.close()
                if self.log.sink is not None:
                    self.log.sink.end(complete=is_complete)
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


def settle_seed(config: Config, world: World, resumed: Resumed | None) -> Config:
    """The configuration with its seed: the user's, else the resumed run's, else one drawn by process 0."""
    seed = config.seed
    if seed is None and resumed is not None:
        seed = seed_before(resumed.state)
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


def count_networks(config: Config) -> int:
    """How many networks the flags ask for: those of a list, or S."""
    names = methods.get(config.method).backbone_names(config.arch, config.method_options)
    if len(names) > 1:
        return len(names)
    return 1 if config.is_train_sep else config.split_factor


def spread_over(world: World, config: Config) -> World:
    """The process's place with the networks spread over the processes, where --placement asks for it.

    Raises:
        UserError: one process, one network, or a number of groups that does not fit.
    """
    if config.placement == "data":
        return world
    num_networks = count_networks(config)
    if num_networks == 1:
        raise UserError("--placement networks needs several networks, and there is one: give a --split_factor.")
    groups = choose_groups(num_networks, world.world_size, config.network_groups)
    return replace(world, mesh=build_mesh(groups, world.device))


def run_in(world: World, config: Config) -> dict[str, Any]:
    """`run` in a process that has found its place."""
    folder = Path(config.model_dir)
    with launch.naming_lost_processes(world):
        world = spread_over(world, config)
        resumed = open_run(folder, config.resume)
        distributed.barrier()  # nobody writes into the folder before everybody has looked
        finished = finished_results(folder, config, resumed)
        if finished is not None:
            return finished
        config = settle_seed(config, world, resumed)
        if config.dry_run:
            return dry_run(world, config, resumed)
        make_folder(folder)
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
    config = resolve_config(
        config,
        data_recipe=source.recipe,
        crop_size=source.crop_size,
        is_drawn=bool(source.fractions),
        nodes=world.num_nodes,
        start=images,
        by_network=resumed is None or "drop_path" in resumed.state.get("config", {}),
    )
    warn_of_unused_flags(config)
    if world.is_main:
        ckpt.write_file(folder / HPARAMS, as_json(config.described()))
        if source.membership:
            ckpt.write_file(folder / SPLIT, split_table(source.membership))
        ckpt.write_file(folder / "env.json", as_json(describe_environment(world)))
    trainer = Trainer(config, world, source, resumed, start)
    announce(trainer)
    return trainer


def dry_run(world: World, config: Config, resumed: Resumed | None) -> dict[str, Any]:
    """One step and one evaluation batch in a folder that goes again; says, and returns, what the run would cost.

    Raises:
        UserError, RunError: as the run itself would at its beginning.
    """
    disk = nearest_folder(Path(config.model_dir))
    if not os.access(disk, os.W_OK):
        raise UserError(f"--model_dir {config.model_dir}: cannot be written.")
    with tempfile.TemporaryDirectory() as own:
        place = distributed.gather_values(own)[0]  # process 0 writes, others may read what it wrote
        given = {**config.given, "model_dir": place}
        trainer = build_trainer(world, replace(config, model_dir=place, given=given), resumed)
        try:
            cost = trainer.measure(free_bytes=shutil.disk_usage(disk).free)
        finally:
            trainer.saver.close()
            for loader in trainer.loaders:
                loader.close()
        distributed.barrier()  # nobody looks into the folder any more
    if world.is_main:
        show(cost.text())
    return cost.as_dict()


def finished_results(folder: Path, config: Config, resumed: Resumed | None) -> dict[str, Any] | None:
    """The results of a run that `--resume auto` finds with nothing left to do.

    Raises:
        UserError: a flag that was given makes it another run.
    """
    results = read_results(folder) if config.resume == "auto" and config.start_epoch is None else None
    if results is None or resumed is None:
        return None
    epochs = config.given.get("epochs")
    done = has_ended(
        resumed.state,
        epochs=epochs,
        max_steps=config.max_steps,
        default_epochs=config.epochs,
        patience=config.given.get("patience", resumed.state.get("config", {}).get("patience")),
    )
    if not done or results.get("steps") != steps_before(resumed.state):
        return None
    given = {name: value for name, value in config.values().items() if name in config.given}
    changed = changed_flags(resumed.state.get("config", {}), given, config.resume_choices(), config.origins)
    logger.warning("already finished: nothing was trained%s", f"; without effect: {', '.join(changed)}" * bool(changed))
    if not (folder / ckpt.BEST).exists():
        logger.warning("%s is not there any more; %s is the newest checkpoint", ckpt.BEST, resumed.path.name)
    return results


def figure_names(splits: Sequence[str], reported: str) -> list[str]:
    """Names of the figures of an evaluation, as `record.report.flat_figures` has them."""
    rows = [f"ensemble_{name}" for name, metric in counted().items() if metric.of_rows]
    together = [name for name, metric in counted().items() if not metric.of_rows]
    others = [f"{split}_{name}" for split in splits if split != reported for name in (*rows, "loss")]
    return [*rows, *together, "loss", *others]


def warn_of_unused_flags(config: Config) -> None:
    """Say which of the flags, and of the keys in a published --config, have no effect."""
    for line in config.warnings:
        logger.warning("%s", line)
    for name in ("gn_num_groups", "div_wd_den", "amp_opt_level"):
        if name in config.given:
            logger.warning("--%s has no effect, as in the published code.", name)


def open_start(config: Config) -> Start | None:
    """What --pretrained names, read; None without it.

    Raises:
        UserError: a file that is none of ours or of a library's, or another number of files than of networks.
    """
    if config.pretrained is None:
        return None
    return Start.open(config.pretrained, count_networks(config), partial(ckpt.load_checkpoint, flag="--pretrained"))


def start_images(config: Config, start: Start | None, resumed: Resumed | None) -> dict[str, Any] | None:
    """For a run that fine-tunes, the flags under which its weights see what they were trained on; None: another run.

    Raises:
        UserError: the networks' weights want images of different means.
    """
    kind = methods.get(config.method)
    if config.pretrained is None or not kind.fine_tunes:
        return None
    if resumed is not None:  # the run before has settled it, if it was one that fine-tuned
        before = resumed.state.get("config", {})
        return flags_before(before) if "layer_decay" in before else None
    assert start is not None
    names = kind.backbone_names(config.arch, config.method_options)
    settled = {"mean", "std"} <= config.given.keys()
    wanted = start.preprocessing(names, may_differ=settled)
    return {} if wanted is None else image_flags(wanted)


def open_shared_source(config: Config, world: World, own_size: int | None = None) -> DataSource:
    """Open the data set, in process 0 first, because it may download archives or measure statistics.

    Args:
        own_size: side in pixels of the images that pretrained weights want, where --crop_size says no other.
    """
    request = SourceRequest(
        dataset=config.dataset,
        root=Path(config.data),
        cache_dir=Path(config.model_dir),
        num_classes=config.num_classes,
        crop_size=config.given.get("crop_size", own_size),
        seed=config.seed or 0,
        val_fraction=config.val_fraction,
        test_fraction=config.test_fraction,
        image_column=config.image_column,
        label_column=config.label_column,
        split_column=config.split_column,
        on_bad_image=config.on_bad_image,
        workers=config.workers,
    )
    source = distributed.main_first(world, partial(open_source, request))
    if config.class_map is not None:
        source = with_names(source, config.class_map)
    if "test_fraction" in config.given and not source.fractions:
        raise UserError(
            f"--test_fraction {config.test_fraction:g}: --data {config.data} has its own split. Leave the flag away."
        )
    return source


def announce(trainer: Trainer) -> None:
    """Say at the start what was decided and by whom."""
    config, source = trainer.config, trainer.source
    held_out = "held-out" if config.val_fraction else "validation"
    names = {"val": "validation", "test": "test"}
    evaluated = f"{len(source.test)} {names[source.reported]}"
    if source.val is not None:
        evaluated = f"{len(source.val)} {held_out}, {evaluated}"
    supplied: dict[str, list[str]] = {}
    for name, item in config.described().items():
        if item["origin"].startswith("recipe"):
            supplied.setdefault(item["origin"], []).append(f"{name} {item['value']}")
    logger.info(
        "%s: %d x %s (S = %d) on %s, %d classes, %d training, %s images; %.3f M parameters, %.1f M MACs",
        config.method,
        trainer.num_networks,
        config.arch,
        config.split_factor,
        config.dataset,
        len(source.classes),
        len(source.train),
        evaluated,
        trainer.params_total / 1e6,
        trainer.macs_total / 1e6,
    )
    logger.info(
        "device %s, precision %s, %d process(es), seed %d, best epoch chosen on the %s images",
        trainer.world.device,
        trainer.precision.name,
        trainer.world.world_size,
        trainer.seed,
        names[source.reported] if source.val is None else held_out,
    )
    small = [name for name in dict.fromkeys(config.archs()) if has_two_forms(name)]
    if small and image_shape(config.dataset, config.crop_size) == SMALL:
        logger.info(
            "%s: the CIFAR form, for images of %d pixels (3x3 stem, fewer strides); on ImageNet it is another network",
            ", ".join(small),
            config.crop_size,
        )
    if trainer.method.peers is not None:
        logger.info(
            "network %d of %d (from 0), with its peers through %s every %d steps after %d epoch(s) alone",
            *(config.network, config.split_factor, config.exchange, config.exchange_every),
            trainer.method.peers.burn_in,
        )
    for origin, flags in supplied.items():
        logger.info("from the %s: %s", origin, ", ".join(flags))
    if config.freeze:
        frozen, total = trainer.params_frozen, trainer.params_total
        logger.info("--freeze %s: %.3f of %.3f M parameters are not trained", config.freeze, frozen / 1e6, total / 1e6)
    if config.layer_decay < 1:
        for line in layer_rates(trainer.network, config.layer_decay, config.lr):
            logger.info("learning rates of %s", line)


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


def set_process_title(name: str) -> None:
    """Show the run under this name in process lists, where setproctitle is installed."""
    try:
        import setproctitle
    except ImportError:
        return
    setproctitle.setproctitle(name)


if __name__ == "__main__":
    raise SystemExit(main(config=FLAGS))

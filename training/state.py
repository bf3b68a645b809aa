"""The state of a run: written into a checkpoint, read back, and held against the flags of the run that goes on.

The keys of a checkpoint are `record.checkpoint.Checkpoint`; this module fills them and reads them.
"""

import hashlib
import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch

from dataset import DataSource
from method import Method
from model.registry import known_request
from model.restore import plain_keys, published_keys
from recipe.preprocessing import Preprocessing
from record.checkpoint import FORMAT_VERSION, Checkpoint, batches_done
from record.report import Reporter, RunClock
from training.guard import NonfiniteGuard
from training.meters import MeanMeter
from training.optim import WeightAverage, in_order, parameter_groups
from training.options import OptimizerOptions
from training.resume import Pace, Position, changed_flags, check_classes, position_now
from training.spread import Whole, join, part_of, tensors_of
from utils import distributed
from utils.cpus import allowed_cpus
from utils.device import gpu_facts
from utils.errors import UserError, reason
from utils.launch import World
from utils.memory import is_out_of_memory
from utils.options import OF_CALL
from utils.precision import Precision

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class RunState:
    """The parts of a run whose state a checkpoint holds.

    Attributes:
        flags, origins: every flag's value, as plain data, and where it comes from.
        choices: what a resumed run does with another value of each.
        seed: of the run.
        data: what is trained on.
        preprocessing: what evaluation does with an image file.
        pace: how an epoch is made of batches.
        position: where training stands.
        new_heads: prefixes of the parameters that --pretrained did not bring.
        method, optimizer, scaler, average, guard: what is trained, and with what; no average without --ema_decay.
        meter, epoch_meter: means over the print interval and over the epoch.
        clock, report: time, and the figures so far.
        precision, world: how and where the run computes.
        is_replayed: whether steps are replayed as a CUDA graph.
    """

    flags: Mapping[str, Any]
    origins: Mapping[str, str]
    choices: Mapping[str, str | None]
    seed: int
    data: DataSource
    preprocessing: Preprocessing
    pace: Pace
    position: Position
    new_heads: Sequence[str]
    method: Method[Any]
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    average: WeightAverage | None
    guard: NonfiniteGuard
    meter: MeanMeter
    epoch_meter: MeanMeter
    clock: RunClock
    report: Reporter
    precision: Precision
    world: World
    is_replayed: bool = False

    def environment(self) -> dict[str, Any]:
        """What must stay the same for a resumed run to be the same bit for bit."""
        of_gpus = {"cuda_graph": self.is_replayed} if self.world.device.type == "cuda" else {}
        mesh = self.world.mesh
        spread = {} if mesh is None else {"placement": f"networks, {mesh.groups} x {mesh.replicas}"}
        return spread | {
            "threads": torch.get_num_threads(),
            "execution": self.method.network.execution,
            "world_size": self.world.world_size,
            "precision": self.precision.name,
            "device": self.world.device.type,
            **gpu_facts(self.world.device),
            **of_gpus,
        }

    def _division(self) -> Checkpoint:
        """The plan by which the networks were divided, or fitted to small images."""
        request = known_request(self.method.network.models[0])
        fits = request is not None and request.fits_images
        if request is None or request.widths is None:
            return {"widths": [], "way": "", "width_names": [], "library": "", "fits_images": fits}
        return {
            "widths": list(request.widths),
            "way": request.way,
            "width_names": list(request.width_names),
            "library": request.library,
            "fits_images": fits,
        }

    def _of_data(self) -> Checkpoint:
        """Classes, and what an image goes through before a network sees it."""
        return {
            "classes": list(self.data.classes),
            "mean": list(self.data.mean),
            "std": list(self.data.std),
            "crop_size": self.flags["crop_size"],
            "data_recipe": self.data.recipe,
            "preprocessing": self.preprocessing.as_dict(),
        }

    def describe_network(self, number: int) -> dict[str, Any]:
        """What the weights of this job's one network are, as plain values, see `record.exchange`; not of which step.

        Args:
            number: of the network among all, counted from 0.
        """
        config = {name: value for name, value in self.flags.items() if self.choices.get(name) != OF_CALL}
        facts: dict[str, Any] = {
            "network": number,
            "split_factor": self.flags["split_factor"],
            "arch": self.flags["arch"],
            "seed": self.seed,
            **self._division(),
            **self._of_data(),
            "average": self.average is not None,
            "config": config,
            "config_sha256": hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest(),
        }
        if self.data.codes:
            facts["codes"] = list(self.data.codes)
        return facts

    def gather(self) -> Checkpoint | None:
        """All that a resumed run needs to go on bit for bit, and that eval.py needs to load.

        Every process takes part; the one that writes gets the checkpoint, the others None.
        """
        self.method.synchronise()
        meters = distributed.gather_values(
            {"interval": self.meter.state_dict(), "epoch": self.epoch_meter.state_dict()}
        )
        whole = self._whole()
        if not self.world.is_main:
            return None
        network, best, position = self.method.network, self.report.best, self.position
        request = known_request(network.models[0])
        form = None if request is None else request.form
        state: Checkpoint = {
            "epoch": position.epoch,
            "arch": self.flags["arch"],
            "widths": [],
            "form": None if form is None else form.as_dict(),
            "state_dict": published_keys(whole.network),
            "best_acc1": best["ensemble_acc1"] if best else 0.0,
            "optimizer": whole.optimizer,
            "method": self.method.training_state(),
            "new_heads": list(self.new_heads),
            "parameters": whole.parameters,
            "pace": self.pace.as_dict(),
            "rng": {"seed": self.seed},
            "sampler": asdict(position),
            "config": dict(self.flags),
            **self._of_data(),
            "held_out_sha256": self.data.held_out_sha256,
            "report": self.report.state_dict(),
            "meters": meters[: self.world.num_shards],
            "clock": self.clock.state_dict(),
            "guard": self.guard.state_dict(),
            "environment": self.environment(),
            "format_version": FORMAT_VERSION,
        }
        if self.precision.scaler:
            state["scaler"] = self.scaler.state_dict()
        state |= self._division()
        if self.data.codes:
            state["codes"] = list(self.data.codes)
        if whole.average is not None:
            state["ema"] = published_keys(whole.average)
        return state

    def _whole(self) -> Whole:
        """What all processes hold together; in process 0 alone, where the networks are spread."""
        names, average = self._optimised(), None if self.average is None else self.average.state_dict()
        optimizer = self.optimizer.state_dict()
        network, mesh = self.method.network, self.world.mesh
        if mesh is None:
            parameters = [name for group in names for name in group]
            return Whole(network.state_dict(), average, optimizer, parameters)
        make = partial(part_of, network.state_dict(), average, optimizer, names)
        return join(mesh.collect(make, mesh.held(network.split_factor)))

    def weights(self) -> Mapping[str, torch.Tensor]:
        """The weights of all networks; of those held in the processes that do not write, where they are spread."""
        state, mesh = self.method.network.state_dict(), self.world.mesh
        if mesh is None:
            return state
        parts = mesh.collect(partial(tensors_of, state), mesh.held(self.method.network.split_factor))
        return {name: value for part in parts for name, value in part.items()} or state

    def _own(self, names: Iterable[str], prefix: str = "") -> set[str]:
        """Of names in a checkpoint, which hold all networks, those of the networks held here."""
        if self.world.mesh is None:
            return set(names)
        held = tuple(f"{prefix}models.{number}." for number, _ in self.method.network.numbered())
        return {name for name in names if name.startswith(held)}

    def restore(self, state: Checkpoint) -> list[str]:
        """Inverse of `gather`, as far as this run is the one before; returns what has changed, in words.

        Raises:
            UserError: the checkpoint holds no run, or one that this cannot be.
        """
        try:
            changed = changed_flags(state["config"], self.flags, self.choices, self.origins)
            check_classes(state.get("classes"), self.data.classes)
            before = Pace.before(state, self.pace)
            follows = self.method.sampler != "shuffled"
            place = position_now(state["sampler"], before, self.pace, order_follows_batches=follows)
            if before.images != self.pace.images:
                changed.append(f"training images {before.images} → {self.pace.images}")
            self._check_environment(state["environment"])
            network = self.method.network
            weights = plain_keys(state["state_dict"])
            own = self._own(weights)
            network.load_state_dict({name: value for name, value in weights.items() if name in own})
            self._restore_optimizer(state)
            self.method.load_training_state(state["method"])
            if self.precision.scaler and "scaler" in state:
                self.scaler.load_state_dict(state["scaler"])
            if self.average is not None:
                # an average that is switched on now starts from the weights as they are
                start = plain_keys(state["ema"]) if "ema" in state else network.state_dict()
                self.average.load_state_dict(start)
            vars(self.position).update(vars(place))
            self._restore_meters(state["meters"])
            self.clock.load_state_dict(state["clock"])
            self.guard.load_state_dict(state["guard"])
            self.report.load_state_dict(state["report"])
        except UserError:
            raise
        except (KeyError, ValueError, TypeError, AttributeError, RuntimeError) as error:
            if is_out_of_memory(error):
                raise
            raise UserError(
                f"--resume: the checkpoint holds no run of these flags to go on with ({reason(error)[:200]}). "
                "Use --pretrained for its weights alone."
            ) from None
        return changed

    def _optimised(self) -> list[list[str]]:
        """Names of the optimiser's parameters, by group, in its order."""
        return self._named(self.optimizer.param_groups)

    def _groups_of(self, config: Mapping[str, Any]) -> list[list[str]]:
        """Names of the parameters by group, as the flags of a checkpoint sort them."""
        known = {name: config[name] for name in ("no_decay", "is_wd_all") if name in config}
        trained = self.method.trained_parameters()
        return self._named(
            parameter_groups(
                self.method,
                trained,
                OptimizerOptions(**known),
                new_heads=self.new_heads,
                undecayed=self.method.undecayed_parameters(),
            )
        )

    def _named(self, groups: Sequence[Mapping[str, Any]]) -> list[list[str]]:
        names = {id(parameter): name for name, parameter in self.method.named_parameters()}
        return [[names[id(parameter)] for parameter in group["params"]] for group in groups]

    def _restore_optimizer(self, state: Checkpoint) -> None:
        """The state of each parameter from before, under the settings of now (weight decay, momentum, groups)."""
        own, names = self.optimizer.state_dict(), [name for group in self._optimised() for name in group]
        if "parameters" in state:
            names_before, before = state["parameters"], state["optimizer"]["state"]
        elif self.world.mesh is not None:
            raise ValueError("it does not name the optimiser's parameters: go on with --placement data once")
        else:  # it stands in the order that the tensors of the checkpoint have, in the groups of its flags
            groups = self._groups_of(state["config"])
            if list(map(len, groups)) != [len(group["params"]) for group in state["optimizer"]["param_groups"]]:
                raise ValueError("the optimiser has other groups of parameters")
            names_before = [name for group in groups for name in group]
            orders = plain_keys(state["state_dict"]), self.method.network.state_dict()
            then, now = ([f"network.{key}" for key in keys] for keys in orders)
            before = in_order(state["optimizer"], groups, then=then, now=now)["state"]
        if sorted(self._own(names_before, "network.")) != sorted(names):
            lost = sorted(self._own(names_before, "network.") ^ set(names))
            raise ValueError(f"the optimiser has other parameters, such as {lost[0]}")
        place = {name: number for number, name in enumerate(names_before)}
        kept = {number: before[place[name]] for number, name in enumerate(names) if place[name] in before}
        self.optimizer.load_state_dict({"state": kept, "param_groups": own["param_groups"]})

    def _check_environment(self, before: Mapping[str, Any]) -> None:
        now = torch.get_num_threads()
        if self.flags["threads"] is None and before["threads"] <= max(now, allowed_cpus() // self.world.local_size):
            if before["threads"] != now:
                logger.info("%d thread(s) of the CPU, as the run had before", before["threads"])
            torch.set_num_threads(before["threads"])
        for name, value in self.environment().items():
            if before.get(name, value) != value:
                logger.warning("So far %s was %s, now it is %s: the last bits will differ.", name, before[name], value)

    def _restore_meters(self, meters: list[Any]) -> None:
        """Each shard its own; where their number has changed, the first takes all."""
        if len(meters) == self.world.num_shards:
            meters = [meters[self.world.shard]]
        elif self.world.shard > 0:
            meters = []
        self.meter.load_state_dict(*(part["interval"] for part in meters))
        self.epoch_meter.load_state_dict(*(part["epoch"] for part in meters))


def execution_before(resumed: Checkpoint) -> str | None:
    """How the networks of the run before were run, where its checkpoint says so."""
    return resumed.get("environment", {}).get("execution")


def replayed_before(resumed: Checkpoint) -> bool | None:
    """Whether the run before replayed its steps, where its checkpoint says so."""
    return resumed.get("environment", {}).get("cuda_graph")


def seed_before(resumed: Checkpoint) -> int | None:
    """The seed of the run before."""
    return resumed.get("rng", {}).get("seed")


def heads_before(resumed: Checkpoint) -> tuple[str, ...]:
    """Prefixes of the heads that --pretrained did not bring to the run before."""
    return tuple(resumed.get("new_heads", ()))


def is_out_of_patience(last: Mapping[str, Any] | None, best: Mapping[str, Any] | None, patience: int | None) -> bool:
    """Whether the last evaluation comes `patience` epochs or more after the best one.

    Args:
        last, best: evaluations of a `record.report.Reporter`; None: there was none.
        patience: None: endless.
    """
    if last is None or best is None or patience is None:
        return False
    waited: int = last["epoch"] - best["epoch"]
    return waited >= patience


def has_ended(
    resumed: Checkpoint, *, epochs: int | None, max_steps: int | None, default_epochs: int, patience: int | None
) -> bool:
    """Whether a checkpoint is the end of a run of this length.

    Args:
        epochs: as the user set it, or None: that of the run before.
        max_steps: as the user set it.
        default_epochs: for a checkpoint that does not say.
        patience: of this run.
    """
    report = resumed.get("report", {})
    if is_out_of_patience(report.get("last"), report.get("best"), patience):
        return True
    wanted = epochs if epochs is not None else resumed.get("config", {}).get("epochs", default_epochs)
    return resumed.get("epoch", 0) >= wanted or (max_steps is not None and steps_before(resumed) >= max_steps)


def steps_before(resumed: Checkpoint) -> int:
    """How many batches the run before has trained on."""
    return batches_done(resumed) or 0

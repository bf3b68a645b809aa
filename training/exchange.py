"""One of S networks learns from the others through files: its weights go out, theirs come in, and no step waits.

Anil et al., arXiv:1804.03235 (codistillation with stale weights). `record.exchange` knows the folder, `method.peers`
computes what the peers say; this module decides when weights go and come and which peers count.
"""

import json
import logging
import queue
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from method.peers import Peers
from record.exchange import (
    BEAT,
    FINISHED,
    SILENCE,
    STOPPED,
    ExchangeFolder,
    Lock,
    Refused,
    check_alike,
    check_tensors,
)
from record.logger import LineFile
from record.saving import snapshot
from training.options import MachineOptions
from training.state import RunState
from utils import distributed
from utils.errors import RunError, WriteError, reason

logger = logging.getLogger(__name__)

LOG = "exchange.jsonl"  # in the run directory: every set of weights that was taken
HOLDING = 2 * SILENCE  # seconds that a job waits at its start for the folder to answer
LAST = 60.0  # seconds that it waits at its end
INTERVAL = 0.05  # between two looks at what it waits for


class Arrival(NamedTuple):
    """Weights of a peer that have been read: what they are, and the tensors on the CPU."""

    facts: Mapping[str, Any]
    state: Mapping[str, Tensor]


class Courier:
    """The thread that reads and writes the folder of an exchange, and gives the signs of life.

    It is beside the saver's thread, so that a folder that does not answer delays no checkpoint of the run, and ends
    with the process whatever the folder does.

    Args:
        folder: of the exchange.
        network: number of this job's network.
        peers: numbers of the others.
        template: state dict of one network: names and shapes that weights of peers must have.
        facts: of this network, which the peers' must be like.
    """

    def __init__(
        self,
        folder: ExchangeFolder,
        network: int,
        peers: list[int],
        template: Mapping[str, Tensor],
        facts: Mapping[str, Any],
    ) -> None:
        self._folder, self._lock = folder, Lock(folder, network)
        self._peers, self._alike = peers, facts
        self._template = {name: torch.empty_like(value, device="meta") for name, value in template.items()}
        # a moving average or fewer networks' worth of padding aside, files of one structure are of one size
        self._most = 2 * sum(value.numel() * value.element_size() for value in template.values()) + 2**20
        self._tasks: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._pending = 0
        self._guard = threading.Lock()
        self._arrived: dict[int, Arrival] = {}
        self._finished: set[int] = set()
        self._taken: dict[int, tuple[int, str]] = {}
        self._said: set[str] = set()
        self._errors: list[Exception] = []
        self._publishing, self._looking = threading.Event(), threading.Event()
        self._holds = False
        self._ended = False
        self._last_beat = 0.0
        self.progress: Mapping[str, Any] = {}
        self._thread = threading.Thread(target=self._run, name="exchange", daemon=True)
        self._thread.start()

    # ---- in the thread -----------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._ended:
            try:
                task = self._tasks.get(timeout=BEAT)
            except queue.Empty:
                task = None
            try:
                if task is not None:
                    task()
                if self._holds and not self._ended and time.monotonic() - self._last_beat >= BEAT:
                    self._beat()
            except Exception as error:  # the thread lives on; whoever asks next is told
                with self._guard:
                    self._errors.append(error)
            finally:
                if task is not None:
                    with self._guard:
                        self._pending -= 1

    def _submit(self, task: Callable[[], None]) -> None:
        with self._guard:
            self._pending += 1
        self._tasks.put(task)

    def _beat(self) -> None:
        self._last_beat = time.monotonic()
        if held := self._lock.taken_by():
            self._holds = False
            raise RunError(held)
        try:
            self._lock.beat(self.progress)
        except WriteError as error:  # what is published next says it loudly
            logger.debug("%s", error)

    def _claim(self, is_fresh: bool) -> None:
        self._lock.claim(is_fresh=is_fresh)
        self._holds, self._last_beat = True, time.monotonic()

    def _publish(self, facts: Mapping[str, Any], state: Mapping[str, Tensor]) -> None:
        try:
            self._folder.publish(facts, state)
        finally:
            self._publishing.clear()

    def _look(self) -> None:
        self._looking.clear()  # what is published from here on may be missed, and is looked for again
        for number in self._peers:
            try:
                self._look_at(number)
            except FileNotFoundError:
                continue  # its next weights have taken the place of those that were found
            except (OSError, Refused) as error:
                line = str(error) if isinstance(error, Refused) else f"{self._folder.place(number)}: {reason(error)}."
                self._say(f"{line} Going on with what is known of network {number}.")

    def _look_at(self, number: int) -> None:
        """Read the newest weights of a peer that can be used, unless they are known."""
        for step in self._folder.steps(number):
            try:
                facts = self._folder.facts(number, step)
                path = self._folder.weights_path(number, step)
                if self._taken.get(number) != (step, facts["sha256"]):
                    check_alike(facts, self._alike, path)
                    state = self._folder.weights(facts, most=self._most)
                    check_tensors(state, self._template, path)
                    with self._guard:
                        self._arrived[number] = Arrival(facts, state)
                    self._taken[number] = (step, facts["sha256"])
            except Refused as error:
                self._say(f"{error} Going on with older weights of network {number}, if there are any.")
                if number in self._taken and step <= self._taken[number][0]:
                    return
                continue
            with self._guard:
                (self._finished.add if facts["finished"] else self._finished.discard)(number)
            return

    def _say(self, line: str) -> None:
        """Log a line once."""
        if line not in self._said:
            self._said.add(line)
            logger.warning("--exchange: %s", line)

    def _end(self, word: str) -> None:
        self._ended = True
        if self._holds and not self._lock.taken_by():
            self._lock.beat(self.progress, word)

    # ---- for the run -------------------------------------------------------------------------------------------------

    def claim(self, *, is_fresh: bool) -> None:
        """Begin to take hold of the network."""
        self._submit(lambda: self._claim(is_fresh))

    def publish(self, facts: Mapping[str, Any], state: Mapping[str, Tensor]) -> bool:
        """Begin to write weights; False, and nothing happens, where the ones before are still being written."""
        if self._publishing.is_set():
            return False
        self._publishing.set()
        self._submit(lambda: self._publish(facts, state))
        return True

    def look(self) -> None:
        """Begin to look for newer weights of the peers, unless that is under way."""
        if not self._looking.is_set():
            self._looking.set()
            self._submit(self._look)

    def is_busy(self) -> bool:
        """Whether something that was begun is not done."""
        with self._guard:
            return self._pending > 0

    def settle(self, seconds: float, given_up: Callable[[], bool] = lambda: False) -> bool:
        """Wait until everything that was begun is done; False where it is not after so long, or somebody gave up."""
        deadline = time.monotonic() + seconds
        while self.is_busy():
            if time.monotonic() > deadline or given_up():
                return False
            time.sleep(INTERVAL)
        return True

    def take(self) -> tuple[list[Arrival], set[int]]:
        """The weights that have come since the last call, and which peers have finished training."""
        with self._guard:
            arrived, self._arrived = [self._arrived[j] for j in sorted(self._arrived)], {}
            return arrived, set(self._finished)

    def errors(self) -> list[Exception]:
        """What has failed since the last call."""
        with self._guard:
            errors, self._errors = self._errors, []
            return errors

    def close(self, word: str, seconds: float) -> None:
        """Let go of the network, and end the thread as soon as the folder answers."""
        if not self._ended:
            self._submit(lambda: self._end(word))
            self._thread.join(seconds)


@dataclass
class _Known:
    """Weights of a peer that this job has: of which step, and at which step of its own it took them."""

    step: int
    taken_at: int


class Exchange:
    """What a run does to exchange weights with the jobs of its peers. All processes of the job call everything.

    At a multiple of `every` steps, the weights go out and the folder is looked through; what was found is taken before
    the next step, or a quarter of `every` steps later, or at the next multiple, whenever it has been read by then.

    Args:
        courier: reads and writes; None in all processes of the job but the first.
        peers: the networks of the others.
        describe: gives the facts of this network, see `record.exchange`, without step, epoch and finished.
        state: gives the weights to publish, by the network's own names.
        every: steps.
        patience: steps after which a peer that has not changed leaves the loss.
        folder: the run directory.
        failed: what weights that could not be written mean: a warning, or a RunError.
    """

    def __init__(
        self,
        courier: Courier | None,
        peers: Peers,
        *,
        describe: Callable[[], Mapping[str, Any]],
        state: Callable[[], Mapping[str, Tensor]],
        every: int,
        patience: int,
        folder: Path,
        failed: Callable[[WriteError], None],
    ) -> None:
        self.courier, self.peers = courier, peers
        self._describe, self._state, self._failed = describe, state, failed
        self._every, self._patience = every, patience
        self._log = LineFile(folder / LOG)
        self._known: dict[int, _Known] = {}
        self._finished: set[int] = set()
        self._begun = False
        self._is_slow = False

    def begin(self, step: int, epoch: int, *, is_fresh: bool, given_up: Callable[[], bool]) -> None:
        """Take hold of the network, and look for the peers; a folder that does not answer is gone on without.

        Args:
            step, epoch: where training begins.
            is_fresh: the run begins, and is not one that was stopped or killed.
            given_up: whether to wait no longer.

        Raises:
            UserError: another job trains the network, or the folder holds that of another run.
            RunError: the folder cannot be written, and that ends the run.
        """
        if self.courier is None:
            return
        self._log.rewind(self._log.lines_before(lambda line: _taken_at(line) >= step))
        self.courier.progress = {"step": step, "epoch": epoch}
        self.courier.claim(is_fresh=is_fresh)
        if self.courier.settle(HOLDING, given_up):
            self.check()
        if step:  # what a killed job has published after its checkpoint is not what goes on now
            self._publish(step, epoch, finished=False)
        self.courier.look()
        if not self.courier.settle(BEAT, given_up):
            logger.warning("--exchange: the folder does not answer; going on without waiting for it.")

    def before_step(self, step: int) -> None:
        """Take what has come, where it is time to.

        Args:
            step: number of the step, counted from 0.
        """
        if not self._begun or step % self._every in (0, self._every // 4):
            self._begun = True
            self._take(step)

    def after_step(self, done: int, epoch: int) -> None:
        """Publish and look, where it is time to.

        Args:
            done: steps done in all.
            epoch: of the last one, counted from 0.
        """
        if self.courier is not None and done % self._every == 0:
            self._publish(done, epoch, finished=False)
            self.courier.look()

    def note(self, means: Mapping[str, Any], step: int, epoch: int) -> None:
        """Let the signs of life say the run's latest figures."""
        if self.courier is not None:
            figures = {name: means[name] for name in ("loss", "loss_ce", "peers", "agreement") if name in means}
            self.courier.progress = {"step": step, "epoch": epoch, **figures}

    def check(self) -> None:
        """Say, or raise, what has failed meanwhile.

        Raises:
            RunError: another job has taken this one's place, or weights could not be written and that ends the run.
        """
        for error in [] if self.courier is None else self.courier.errors():
            if not isinstance(error, WriteError):
                raise error
            self._failed(error)

    def share(self, seconds: float) -> float:
        """Part of so many seconds of training that the peers' predictions took, since the last call."""
        return self.peers.seconds() / max(seconds, 1e-9)

    def finish(self, step: int, epoch: int) -> None:
        """Publish the last weights, which never grow old, and let go of the network.

        Raises:
            RunError: they could not be written, and that ends the run.
        """
        if self.courier is None:
            return
        self.courier.settle(LAST)
        self.courier.progress = {**self.courier.progress, "step": step, "epoch": epoch}
        self._publish(step, epoch, finished=True)
        if not self.courier.settle(LAST):
            logger.warning("--exchange: the last weights are not written after %.0f s; ending without them.", LAST)
        self.check()
        self.courier.close(FINISHED, BEAT)

    def close(self) -> None:
        """Let go of the network, where the run ends in any other way."""
        if self.courier is not None:
            self.courier.close(STOPPED, BEAT)
        self._log.close()

    def _publish(self, step: int, epoch: int, *, finished: bool) -> None:
        assert self.courier is not None
        facts = {**self._describe(), "step": step, "epoch": epoch, "finished": finished}
        is_slow = not self.courier.publish(facts, snapshot(self._state()))
        if is_slow and not self._is_slow:
            logger.warning("--exchange: the folder is slow: weights are left out while older ones are being written.")
        self._is_slow = is_slow

    def _take(self, step: int) -> None:
        """Give the peers the weights that have come, and decide which of them count; the same in every process."""
        arrived: list[Arrival] = []
        if self.courier is not None:
            arrived, self._finished = self.courier.take()
        for facts, _ in arrived:
            self._known[facts["network"]] = _Known(facts["step"], step)
        present = [j for j in sorted(self._known) if j in self._finished or self._is_recent(self._known[j], step)]
        taken, present = distributed.gather_values(([facts["network"] for facts, _ in arrived], present))[0]
        states = {facts["network"]: state for facts, state in arrived}
        for number in taken:
            if number in states:
                self.peers.take(number, states[number])
            if not distributed.is_alone():
                for value in self.peers.network(number).state_dict().values():
                    dist.broadcast(value, src=0)
        if self.courier is not None:
            self._say(present, step)
            for facts, _ in arrived:
                record = {name: facts[name] for name in ("network", "step", "sha256", "finished")}
                self._log.write(json.dumps({**record, "own_step": step}))
        self.peers.set_present(present)

    def _is_recent(self, known: _Known, step: int) -> bool:
        return step - known.step <= self._patience and step - known.taken_at <= self._patience

    def _say(self, present: list[int], step: int) -> None:
        """One line for every peer that comes or goes."""
        for number in sorted(set(present) ^ set(self.peers.present)):
            known = self._known[number]
            if number in present:
                logger.info("network %d is learnt from, by its weights of step %d", number, known.step)
            else:
                logger.warning(
                    "network %d is not learnt from until it is heard of again: its weights are of step %d, came at "
                    "step %d, and this is step %d (--exchange_patience %d)",
                    *(number, known.step, known.taken_at, step, self._patience),
                )


def _taken_at(line: str) -> float:
    """The step at which the weights of a line of LOG were taken; a line that is damaged lies after all steps."""
    try:
        return int(json.loads(line)["own_step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")


def open_exchange(
    options: MachineOptions,
    state: RunState,
    *,
    split_factor: int,
    epochs: int,
    folder: Path,
    failed: Callable[[WriteError], None],
) -> Exchange | None:
    """The exchange of a job that trains one of S networks, from which the job's method gets its peers; None of another.

    Args:
        options: --exchange, --network and what belongs to them.
        state: of the run, at the place where it begins.
        split_factor, epochs: of the run.
        folder, failed: as of `Exchange`.
    """
    if options.exchange is None:
        return None
    assert options.network is not None
    method, burn_in = state.method, options.exchange_burn_in
    own = method.network.models[0]
    method.peers = peers = Peers(
        own,
        number=options.network,
        split_factor=split_factor,
        seed=state.seed,
        burn_in=method.peers_warm_up(epochs) if burn_in is None else burn_in,
        most=options.exchange_peers,
    )
    describe = partial(state.describe_network, options.network)
    courier = None
    if state.world.is_main:
        courier = Courier(
            ExchangeFolder(Path(options.exchange)), options.network, peers.numbers, own.state_dict(), describe()
        )
    return Exchange(
        courier,
        peers,
        describe=describe,
        state=partial(_own_weights, state),
        every=options.exchange_every,
        patience=options.exchange_patience or 20 * options.exchange_every,
        folder=folder,
        failed=failed,
    )


def _own_weights(state: RunState) -> dict[str, Tensor]:
    """The weights of the one network of a job that are published: the moving average's, where there is one."""
    source = state.method.network if state.average is None else state.average
    return {name.removeprefix("models.0."): value for name, value in source.state_dict().items()}

"""What goes wrong in a run at a chosen place: it kills itself, or the disk is full. Called before the run."""

import functools
import importlib
import io
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

Hook = Callable[[], None]

STALLED = "this disk does not answer"  # a file of this name: see `tests.stalled_disk`

# where runs are killed: name -> `module.function` or `module.Class.function`
PLACES = {
    "flush to the disk": "os.fsync",
    "rename": "os.replace",
    "checkpoint": "torch.save",
    "dropping old checkpoints": "record.checkpoint.prune_checkpoints",
    "line of a log": "record.logger.LineFile.write",
    "record of TensorBoard": "record.events.append_whole",
    "training step": "training.step.forward_backward",
    "batch of an evaluation": "evaluation.passes.EvaluationCounts.update",
    "networks": "model.splitnet.SplitNet.forward",
    "wait for images": "dataset.decoders.Decoders._next",
}


def end(number: int = signal.SIGKILL) -> None:
    """Send this process a signal."""
    os.kill(os.getpid(), number)


def end_group(number: int) -> None:
    """Send a signal to this process and to all that it has started."""
    os.killpg(0, number)


def both(*hooks: Hook) -> Hook:
    """Several hooks of one run."""
    return functools.partial(_both, hooks)


def _both(hooks: tuple[Hook, ...]) -> None:
    for hook in hooks:
        hook()


def found(place: str) -> tuple[Any, str]:
    """The module or class that holds a function of PLACES, and the function's name there."""
    names = PLACES[place].split(".")
    module = ".".join(name for name in names[:-1] if not name[0].isupper())
    owner = functools.reduce(getattr, [n for n in names[:-1] if n[0].isupper()], importlib.import_module(module))
    return owner, names[-1]


def before_calls(place: str, before: Callable[..., None]) -> None:
    """Call `before` with the arguments of each call of a function of PLACES, before that call."""
    owner, name = found(place)
    original = getattr(owner, name)

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        before(*args, **kwargs)
        return original(*args, **kwargs)

    setattr(owner, name, wrapped)


class _Countdown:
    """True at the `number`-th call."""

    def __init__(self, number: int) -> None:
        self.left = number

    def __call__(self) -> bool:
        self.left -= 1
        return self.left == 0


def do_at_call(place: str, number: int, action: Hook) -> Hook:
    """`action` before the `number`-th call of a function of PLACES."""
    return functools.partial(_do_at_call, place, number, action)


def _do_at_call(place: str, number: int, action: Hook) -> None:
    due = _Countdown(number)
    before_calls(place, lambda *_, **__: action() if due() else None)


def at_call(place: str, number: int, signal_number: int = signal.SIGKILL) -> Hook:
    """Before the `number`-th call of a function of PLACES."""
    return do_at_call(place, number, functools.partial(end, signal_number))


def at_group_call(place: str, number: int, signal_number: int) -> Hook:
    """As `at_call`, to all processes of the run's group."""
    return do_at_call(place, number, functools.partial(end_group, signal_number))


def signalled_and_starved(number: int, signal_number: int, data: Path) -> Hook:
    """At the `number`-th wait for a decoding process a signal comes to all, and the disk of `data` answers no more."""
    return functools.partial(_signalled_and_starved, number, signal_number, data)


def _signalled_and_starved(number: int, signal_number: int, data: Path) -> None:
    due = _Countdown(number)
    set_preload = multiprocessing.set_forkserver_preload
    # the workers are forks of a server that has imported these; the mark stalls them alone, not the tests
    multiprocessing.set_forkserver_preload = lambda names: set_preload([*names, "tests.stalled_disk"])

    def starve(*_: Any, **__: Any) -> None:
        if multiprocessing.active_children() and due():
            (data / STALLED).touch()
            end_group(signal_number)

    before_calls("wait for images", starve)


def within_line(name: str, number: int) -> Hook:
    """When half of the `number`-th line of a log is written."""
    return functools.partial(_within_line, name, number)


def _within_line(name: str, number: int) -> None:
    due = _Countdown(number)

    def half(log: Any, line: str) -> None:
        if log.path.name == name and due():
            with log.path.open("a") as file:
                file.write(line[: len(line) // 2])
            end()

    before_calls("line of a log", half)


def within_board(number: int) -> Hook:
    """When half of TensorBoard's `number`-th record is written."""
    return functools.partial(_within_board, number)


def _within_board(number: int) -> None:
    due = _Countdown(number)

    def half(file: Any, record: bytes) -> None:
        if due():
            file.write(record[: len(record) // 2])
            end()

    before_calls("record of TensorBoard", half)


def within_checkpoint(number: int) -> Hook:
    """When half of the `number`-th checkpoint is written."""
    return functools.partial(_within_checkpoint, number)


def _within_checkpoint(number: int) -> None:
    import torch

    due, save = _Countdown(number), torch.save

    def half(state: Any, file: Any) -> None:
        if due():
            content = io.BytesIO()
            save(state, content)
            file.write(content.getvalue()[: content.tell() // 2])
            file.flush()
            end()

    before_calls("checkpoint", half)


def no_space_from_call(number: int) -> None:
    """From the `number`-th checkpoint on, the disk is full when it is flushed."""
    original, calls = os.fsync, 0

    def full(fd: int) -> None:
        nonlocal calls
        name = os.readlink(f"/proc/self/fd/{fd}")
        if ".pth.tar" in name:
            calls += 1
            if calls >= number:
                raise OSError(28, "No space left on device")
        original(fd)

    os.fsync = full  # type: ignore[assignment]


def small_files_only(room: int) -> None:
    """Let no file that a run writes below its folder grow beyond so many bytes."""
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))


def fail() -> None:
    """Fail as a run does that cannot go on."""
    from utils.errors import RunError

    raise RunError("a bad image")


def get_stuck() -> None:
    """As in an exchange over NCCL that never ends."""
    time.sleep(300)


def gpu_out_of_memory() -> None:
    """Fail as torch does on a GPU that is full."""
    import torch

    raise torch.OutOfMemoryError(
        "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 139.80 GiB of which 3.50 GiB "
        "is free. Of the allocated memory 130.00 GiB is allocated by PyTorch."
    )


def cpu_out_of_memory() -> None:
    """Ask for more than there is."""
    import torch

    torch.empty(10**15)


def library_weights_at_hand(name: str = "mobilenet_v3_small") -> None:
    """torchvision's published weights come without a network: those of a seed, as a download would give them."""
    import torch
    from torchvision.models import _api, get_model

    torch.manual_seed(9)
    state = get_model(name).state_dict()
    _api.load_state_dict_from_url = lambda *args, **kwargs: state

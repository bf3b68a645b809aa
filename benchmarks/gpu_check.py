"""What must hold on a GPU before anything is trained on it: `python -m benchmarks.gpu_check`, or script/gpu.sh --check.

One line for each check: views by the kernel equal those by plain operations bit for bit, replayed graphs equal eager
steps, half precisions stay near single, a killed run ends as one that was not, two GPUs train as one. On a CPU
(`--device cpu --tiny`, for the tests) replays are left out, Triton's interpreter stands for the kernel, and gloo for
NCCL. Exit code 1 if a check fails.
"""

import argparse
import itertools
import logging
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from benchmarks import own
from benchmarks.report import hardware, release, versions
from dataset.views import HAS_TRITON, KERNEL_SIZES, ViewMaker, ViewSpec
from record.checkpoint import load_newest
from record.run_folder import read_results
from train_split import Trainer
from training.compiling import missing_for_triton
from utils.command_line import OneLineParser
from utils.errors import RunError, UserError, reason
from utils.launch import free_port, one_gpu, unused_gpu
from utils.precision import has_fast_bf16
from utils.text import fit_streams

ROOT = Path(__file__).resolve().parent.parent
STEPS = 12  # of a comparison
LEAVES_WITHIN = 10.0  # seconds that a process has to end after another has failed
NEAR, NEAR_LATER = 0.02, 0.1  # relative differences of the first and the last loss in half precision


class Place(NamedTuple):
    """Where is checked, and whether at the smallest size."""

    device: torch.device
    tiny: bool


Check = Callable[[Place], str]  # returns what was found; raises RunError where it is wrong


def machine(place: Place) -> str:
    """A convolution in half precision and a pinned copy work; what Triton needs is there."""
    facts, device = hardware(place.device), place.device
    generator = torch.Generator().manual_seed(0)
    images_BCHW, weights = (torch.randn(*shape, generator=generator) for shape in ((8, 16, 16, 16), (16, 16, 3, 3)))
    pinned_BCHW = images_BCHW.pin_memory() if device.type == "cuda" else images_BCHW
    copied_BCHW = pinned_BCHW.to(device, non_blocking=True)
    _require(torch.equal(copied_BCHW.cpu(), images_BCHW), "a pinned copy arrives changed")
    expected = torch.nn.functional.conv2d(images_BCHW.double(), weights.double(), padding=1)
    half_BCHW, half_weights = (one.to(device, torch.bfloat16) for one in (images_BCHW, weights))
    found = torch.nn.functional.conv2d(half_BCHW, half_weights, padding=1).cpu().double()
    _require(bool((found - expected).norm() < NEAR * expected.norm()), "a convolution in bfloat16 is wrong")
    packages = ", ".join(f"{name} {number}" for name, number in versions().items())
    missing = missing_for_triton() if device.type == "cuda" else None
    without = f"; Triton cannot be used without {missing}" if missing else ""
    return f"{facts['device']}, {facts['cores']} cores, driver {_driver()}, {packages}{without}"


def _driver() -> str:
    """Its version, and of the first GPU the fastest clock and the most power that it may have."""
    query = ["nvidia-smi", "--query-gpu=driver_version,clocks.max.sm,power.limit", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    lines = done.stdout.strip().splitlines()
    return lines[0] if lines else "unknown"


def kernel(place: Place) -> str:
    """The Triton kernels draw what the host does and make the views of the plain operations, for every size."""
    device = place.device
    if not HAS_TRITON:
        return "no Triton here: views are made by plain operations"
    if device.type == "cpu" and "TRITON_INTERPRET" not in os.environ:
        return "left out: a CPU needs TRITON_INTERPRET=1"
    sizes, counts = (KERNEL_SIZES[:1], (1, 3)) if place.tiny else (KERNEL_SIZES, (1, 3, 64))
    random = np.random.default_rng(0)
    for size in sizes:
        for count in counts:
            spec = ViewSpec(
                crop_size=size,
                padding=size // 8,
                flip=True,
                policy="cifar10",
                erase_p=0.5,
                mean=(0.4, 0.5, 0.6),
                std=(0.2, 0.25, 0.3),
            )
            maker, images = ViewMaker(spec, seed=size), random.integers(0, 256, (count, 3, size, size), dtype=np.uint8)
            parameters = maker.draw(0, np.arange(count), 2, (size, size))
            expected, on_device = maker.apply(torch.from_numpy(images), parameters), torch.from_numpy(images).to(device)
            views, drawn = (torch.full_like(expected, torch.nan, device=device) for _ in range(2))
            maker._fill_by_kernel(views, on_device, parameters, slice(0, count))
            equal = torch.equal(views.cpu(), expected)
            _require(equal, f"{2 * count} views of {size} px differ from those by plain operations")
            maker._draw_and_fill(drawn, on_device, 0, np.arange(count), 0)
            equal = torch.equal(drawn.cpu(), expected)
            _require(equal, f"{2 * count} views of {size} px that a kernel draws differ from those that the host draws")
    sides = ", ".join(map(str, sizes))
    return f"views of {sides} px, drawn on the host or by a kernel, equal those by plain operations, bit for bit"


def graphs(place: Place) -> str:
    """Replayed steps equal the same steps computed one operation at a time, for every execution."""
    replays = place.device.type == "cuda"
    with _deterministic():
        expected = _state(["--execution", "loop"], place, replayed=False)
        again = _state(["--execution", "loop"], place, replayed=replays)
        once_more = "the replayed loop" if replays else "the loop once more"
        _require_alike(again, expected, 0.0, once_more, than="the eager loop")
        for execution in ("parallel", "stacked"):
            found = _state(["--execution", execution], place, replayed=replays)
            _require_alike(found, expected, 1e-9, execution, than="the eager loop")
    what = "replayed steps equal eager ones bit for bit" if replays else "without replays: equal runs are equal"
    return f"{what}; parallel and stacked agree with the loop to 1e-9 in float64"


def precisions(place: Place) -> str:
    """Half precisions begin where single does, stay finite, and stay near it."""
    names = [
        name for name, has in (("bf16", has_fast_bf16(place.device)), ("fp16", place.device.type == "cuda")) if has
    ]
    losses: dict[str, list[float]] = {}
    for name in ["fp32", *names]:
        with tempfile.TemporaryDirectory() as folder:
            trainer = _trainer(["--amp_dtype", name], place, Path(folder))
            losses[name] = _losses(trainer)
            trainer.log.close()
            trainer.saver.close()
        del trainer
        release(place.device)
        _require(bool(np.isfinite(losses[name]).all()), f"{name}: a loss is not finite")
        for step, limit in ((0, NEAR), (-1, NEAR_LATER)):
            distance = abs(losses[name][step] / losses["fp32"][step] - 1)
            which = "last" if step else "first"
            _require(distance < limit, f"{name}: its {which} loss of {STEPS} is {distance:.1%} away from that of fp32")
    return f"losses of {', '.join(losses)} are within {NEAR:.0%} at first, and {NEAR_LATER:.0%} after {STEPS} steps"


def resume(place: Place) -> str:
    """A run that is killed and goes on ends as one that was not killed, where that is promised."""
    flags = ["--deterministic", "1", "--save_steps", "4"]
    with tempfile.TemporaryDirectory() as folder:
        straight = finished(start(Path(folder) / "straight", place, flags))
        kill_once_saved(start(Path(folder) / "killed", place, flags))
        again = finished(start(Path(folder) / "killed", place, [*flags, "--resume", "auto"]))
    _require(straight == again, f"a killed run ends with other weights ({again[:12]}, not killed: {straight[:12]})")
    return "with --deterministic 1 a killed run ends with the weights of one that was not, bit for bit"


def processes(place: Place) -> str:
    """Two processes, a GPU each, train to the weights of one, and one that fails ends the other at once."""
    if place.device.type == "cuda" and torch.cuda.device_count() < 2:
        return "left out: it needs two GPUs"
    flags = ["--deterministic", "1", "--amp_dtype", "fp64", "--is_syncbn", "1", "--is_mixup", "1"]
    flags += ["--max_steps", "4" if place.tiny else "20"]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        finished(start(folder / "one", place, flags))
        for run in start_two(folder / "two", place, flags):
            finished(run)
        _require_alike(_weights(folder / "two"), _weights(folder / "one"), 1e-9, "two processes", than="one process")
        _write_images(folder / "images")
        files = ["--dataset", "folder", "--data", str(folder / "images"), "--crop_size", "16", "--is_autoaugment", "0"]
        files += ["--batch_size", "8", "--max_steps", "400", "--on_bad_image", "fail"]
        # the smallest size is for tests, which no slow machine shall fail
        end_together(start_two(folder / "bad", place, files), within=120 if place.tiny else LEAVES_WITHIN)
    return "two processes train to the weights of one, to 1e-9 in float64 with SyncBN; one that fails ends the other"


CHECKS: dict[str, Check] = {
    "machine": machine,
    "kernel": kernel,
    "graphs": graphs,
    "precisions": precisions,
    "resume": resume,
    "processes": processes,
}


def _require(holds: bool, otherwise: str) -> None:
    if not holds:
        raise RunError(otherwise)


# ---- training in this process ----------------------------------------------------------------------------------------


@contextmanager
def _deterministic() -> Iterator[None]:
    """Inside, cuDNN's algorithms are the same in every run."""
    settings = torch.backends.cudnn
    before = settings.deterministic, settings.benchmark
    settings.deterministic, settings.benchmark = True, False
    try:
        yield
    finally:
        settings.deterministic, settings.benchmark = before


def _trainer(flags: Sequence[str], place: Place, folder: Path) -> Trainer:
    small = ["--arch", "resnet20", "--split_factor", "2", "--batch_size", "8" if place.tiny else "64"]
    benchmark = torch.backends.cudnn.benchmark
    trainer = own.open_trainer([*small, "--workers", "0", "--lr", "0.01", *flags], folder, place.device)
    torch.backends.cudnn.benchmark = benchmark
    trainer.method.train()
    return trainer


def _losses(trainer: Trainer) -> list[float]:
    """Of STEPS training steps."""
    found = []
    batches = trainer.loader.epoch(0)
    for batch in itertools.islice(batches, STEPS):
        metrics = trainer.training_step(batch, trainer.progress(batch))
        trainer.advance(batch, metrics)
        found.append(float(metrics["loss"]))
    return found


def _state(flags: Sequence[str], place: Place, *, replayed: bool) -> dict[str, torch.Tensor]:
    """What STEPS steps in float64 come to. Learning rates lie on the GPU either way, in float32."""
    with tempfile.TemporaryDirectory() as folder:
        on_gpu = ["--cuda_graph", "1"] if place.device.type == "cuda" else []
        trainer = _trainer([*flags, "--amp_dtype", "fp64", *on_gpu], place, Path(folder))
        if not replayed:
            trainer.training_step.replayed = None
        _losses(trainer)
        trainer.log.close()
        trainer.saver.close()
    state = {name: value.cpu().clone() for name, value in trainer.network.state_dict().items()}
    del trainer
    release(place.device)
    return state


def _require_alike(
    found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float, what: str, *, than: str
) -> None:
    for name, value in expected.items():
        distance = float((found[name].double() - value.double()).abs().max())
        limit = tolerance * max(1.0, float(value.double().abs().max()))
        _require(distance <= limit, f"{what}: {name} is {distance:.1e} away from {than}'s")


# ---- training in processes of its own --------------------------------------------------------------------------------


class Run(NamedTuple):
    """A training that has been started."""

    process: subprocess.Popen[str]
    folder: Path


def start(folder: Path, place: Place, flags: Sequence[str]) -> Run:
    """Begin to train two small networks on the digits."""
    device = ["--no_cuda"] if place.device.type == "cpu" else ["--gpu", str(place.device.index or 0)]
    return _started(folder, [*_sizes(place), *device, *flags], {})


def start_two(folder: Path, place: Place, flags: Sequence[str]) -> list[Run]:
    """The same by two processes, as torchrun starts them; on GPUs the first two."""
    device = ["--no_cuda"] if place.device.type == "cpu" else ["--gpu_ids", "0,1"]
    job = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    words = [*_sizes(place), *device, *flags]
    return [_started(folder, words, {**job, "RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in range(2)]


def _sizes(place: Place) -> list[str]:
    return ["--batch_size", "64", "--max_steps", "8" if place.tiny else "160"]


def _started(folder: Path, flags: Sequence[str], environment: dict[str, str]) -> Run:
    command = [sys.executable, str(ROOT / "train_split.py"), "--dataset", "digits", "--arch", "resnet20"]
    command += ["--split_factor", "2", "--seed", "1", "--epochs", "8", "--workers", "0", "--model_dir", str(folder)]
    process = subprocess.Popen(
        [*command, *flags],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
    )
    return Run(process, folder)


def finished(run: Run) -> str:
    """The hash of the weights that a run ends with.

    Raises:
        RunError: it failed; with its last line.
    """
    _, errors = run.process.communicate()
    results = read_results(run.folder) if run.process.returncode == 0 else None
    if results is None:
        raise RunError(f"train_split.py failed: {(errors.strip().splitlines() or ['no message'])[-1][:300]}")
    return str(results["state_sha256"])


def kill_once_saved(run: Run) -> None:
    """Kill a run as soon as it has written a checkpoint, as a power cut would.

    Raises:
        RunError: it ended by itself.
    """
    while run.process.poll() is None and not list(run.folder.glob("checkpoint_*.pth.tar")):
        time.sleep(0.01)
    run.process.send_signal(signal.SIGKILL)
    _, errors = run.process.communicate()
    if run.process.returncode != -signal.SIGKILL:
        raise RunError(f"train_split.py ended before it could be killed: {errors.strip()[-300:] or 'it was done'}")


def end_together(runs: Sequence[Run], *, within: float) -> None:
    """Wait until one has failed, and the others have ended because of it.

    Args:
        within: seconds that the others have for it.

    Raises:
        RunError: they had not ended by then, or not as those that follow another one's failure.
    """
    while all(run.process.poll() is None for run in runs):
        time.sleep(0.01)
    began, late = time.monotonic(), False
    for run in runs:
        try:
            run.process.wait(max(within - (time.monotonic() - began), 0.0))
        except subprocess.TimeoutExpired:
            run.process.kill()
            late = True
    told = [run.process.communicate()[1] for run in runs]
    _require(not late, f"one process failed, and another had not ended {within:.0f} s later")
    codes = [run.process.returncode for run in runs]
    _require(codes == len(runs) * [RunError.exit_code], f"of processes that fail together the exit codes are {codes}")
    named = [re.search(r"process \d+ (failed|died)", text) is not None for text in told]
    _require(any(named), "no process names the one that has failed")


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    """Of the newest checkpoint."""
    found = load_newest(folder)
    if found is None:
        raise RunError(f"{folder} holds no checkpoint")
    weights: dict[str, torch.Tensor] = found[0]["state_dict"]
    return weights


def _write_images(folder: Path) -> None:
    """Noise in two class folders, too large to lie in memory: processes decode what they need. One file is cut off."""
    random = np.random.default_rng(0)
    for number in range(32):
        for part in ("train", "val"):
            path = folder / part / str(number % 2) / f"{number}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(random.integers(0, 256, (70, 70, 3), dtype=np.uint8)).save(path)
    path = folder / "train" / "1" / "31.jpg"
    path.write_bytes(path.read_bytes()[:1000])


# ---- the command -----------------------------------------------------------------------------------------------------


def build_parser() -> argparse.ArgumentParser:
    """The flags."""
    parser = OneLineParser(prog="python -m benchmarks.gpu_check", description=__doc__)
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1 … or cpu (default cuda)")
    parser.add_argument("--tiny", action="store_true", help="at the smallest size")
    parser.add_argument("--only", help=f"comma list of {', '.join(CHECKS)} (default: all)")
    return parser


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code: 0 all hold, or there is no GPU; 1 one does not; 2 the user's mistake."""
    fit_streams()
    parser = build_parser()
    options = parser.parse_args(argv)
    names = list(CHECKS) if options.only is None else options.only.split(",")
    if unknown := [name for name in names if name not in CHECKS]:
        print(f"{parser.prog}: --only {unknown[0]}: expected {', '.join(CHECKS)}.", file=sys.stderr)
        return UserError.exit_code
    if options.device != "cpu" and not torch.cuda.is_available():
        print(unused_gpu() or "no GPU here: nothing to check, and training runs on the CPU.")
        return RunError.exit_code if unused_gpu() else 0
    try:
        device = torch.device("cpu") if options.device == "cpu" else one_gpu("--device", options.device)
    except UserError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return error.exit_code
    place = Place(device, options.tiny)
    logging.getLogger().setLevel(logging.ERROR)
    failed = 0
    for name in names:
        began = time.perf_counter()
        try:
            verdict, text = "ok", CHECKS[name](place)
        except Exception as error:  # of whatever library: the next check may say more
            verdict, text, failed = "FAILED", f"{reason(error)[:300]}", failed + 1
        print(f"{name:<12}{verdict:<8}{text} ({time.perf_counter() - began:.0f} s)", flush=True)
    return RunError.exit_code if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())

"""What runs produce, held fast: `python -m tests.frozen write FILE`, then, after a change, `... check FILE`.

For changes that must move no number. Two dozen tiny runs through the command line; kept of each are the hash of its
weights, the contents of its last checkpoint (hashed tensor by tensor), metrics.jsonl, results and the origins of its
flags, without times. Beside FILE a folder keeps checkpoints of stopped runs, which the changed code must go on from.
The numbers are those of one machine and one set of packages: FILE is written and read on the same one.
"""

import contextlib
import functools
import gc
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from PIL import Image
from torch.utils import _pytree as pytree

import eval as evaluation_program
import parser_params
import train_split
from training import replay

ROOT = Path(__file__).parent.parent
TIMES = {"images_per_second", "data_wait", "seconds", "clock", "model_dir", "results_dir", "checkpoint", "log"}
TIMES |= {"predictions", "logits", "threads"}

DIGITS = ["--dataset", "digits", "--arch", "resnet20", "--batch_size", "96", "--amp_dtype", "fp32", "--seed", "3"]
DIGITS += ["--val_fraction", "0.7", "--epochs", "2", "--print_freq", "2"]
CIFAR_NET = [*DIGITS, "--arch", "resnet20_cifar"]
MANY = ["--is_mixup", "1", "--ema_decay", "0.9", "--clip_grad", "1", "--iters_to_accumulate", "2"]
MANY += ["--split_factor", "2", "--is_cutout", "1", "--erase_p", "1", "--save_steps", "2"]
SYNTHETIC = ["--dataset", "synthetic", "--num_classes", "6", "--batch_size", "128", "--seed", "5", "--max_steps", "5"]
SYNTHETIC += ["--print_freq", "2", "--epochs", "1", "--crop_size", "32"]
FOLDER = ["--dataset", "folder", "--data", "{images}", "--arch", "torchvision/resnet18", "--batch_size", "8"]
FOLDER += ["--seed", "2", "--epochs", "1", "--workers", "1", "--crop_size", "66", "--eval_batch_size", "5"]

RUNS: Mapping[str, list[str]] = {
    "s1": [*DIGITS],
    "s2_mixup": [*DIGITS, "--split_factor", "2", "--is_mixup", "1"],
    "s4": [*DIGITS, "--split_factor", "4", "--max_steps", "4"],
    "everything": [*DIGITS, *MANY, "--on_nonfinite", "skip", "--amp_dtype", "bf16", "--is_ensembled_loss", "1"],
    "independent": [*DIGITS, "--method", "independent", "--split_factor", "2", "--max_steps", "4"],
    "dml": [*DIGITS, "--method", "dml", "--split_factor", "2"],
    "dml_two": [*DIGITS, "--method", "dml", "--arch", "resnet20,wide_resnet16_8", "--max_steps", "2"],
    "dks": [*CIFAR_NET, "--method", "dks", "--max_steps", "4"],
    "l_mcl": [*CIFAR_NET, "--method", "l_mcl", "--arch", "lmcl_resnet20_cifar", "--meta_freq", "2", "--max_steps", "4"],
    "l_mcl_bank": [
        *CIFAR_NET,
        *("--method", "l_mcl", "--arch", "lmcl_resnet20_cifar", "--contrast", "bank", "--neg_k", "16"),
        *("--meta_freq", "2", "--max_steps", "3"),
    ],
    "cream": ["--config", "script/cream/tiny.yaml", "--epochs", "3", "--meta_sta_epoch", "1", "--seed", "4"],
    "folder": [*FOLDER, "--split_factor", "2"],
    "stacked": [*SYNTHETIC, "--split_factor", "2", "--execution", "stacked"],
    "parallel": [*SYNTHETIC, "--split_factor", "2", "--execution", "parallel"],
    "rmsprop": [*SYNTHETIC, "--optimizer", "RMSpropTF", "--is_linear_lr", "1", "--color_jitter", "0.4"],
    "randaa": [*SYNTHETIC, "--randaa", "rand-m9-mstd0.5", "--erase_mode", "pixel", "--optimizer", "AdamW"],
    "compiled": [*SYNTHETIC, "--split_factor", "2", "--compile", "aot_eager", "--deterministic", "1"],
    "shake": [*SYNTHETIC, "--arch", "shake_resnet26_2x96d", "--split_factor", "2", "--max_steps", "1"],
    "large": [*SYNTHETIC, "--arch", "efficientnetb0", "--crop_size", "96", "--batch_size", "8", "--max_steps", "2"],
    "replayed": [*DIGITS, "--split_factor", "2", "--cuda_graph", "1"],
}
STOPPED: Mapping[str, tuple[list[str], list[str]]] = {
    "resumed": ([*DIGITS, *MANY], ["--max_steps", "3"]),
    "resumed_l_mcl": (RUNS["l_mcl_bank"], ["--max_steps", "2"]),
    "resumed_cream": (RUNS["cream"], ["--max_steps", "20"]),
    "resumed_dks": (RUNS["dks"], ["--max_steps", "2"]),
}
CONFIGS = {
    f"{dataset} {' '.join(flags)}".strip(): ["--dataset", dataset, *flags]
    for dataset in ("digits", "cifar10", "cifar100", "svhn", "imagenet")
    for flags in (
        [],
        ["--arch", "wide_resnet28_10", "--split_factor", "2"],
        ["--arch", "efficientnetb3", "--epochs", "100"],
        ["--method", "dks", "--epochs", "50"],
        ["--method", "l_mcl", "--arch", "lmcl_resnet56_cifar"],
        ["--lr", "0.01", "--weight_decay", "1e-3", "--is_div_wd", "1", "--split_factor", "4"],
        ["--is_linear_lr", "1", "--batch_size", "64", "--optimizer", "AdamW"],
        ["--arch", "cream_14", "--epochs", "50"],
        ["--method", "cream", "--flops_maximum", "100"],
        ["--randaa", "rand-m9-mstd0.5", "--lr_mode", "step"],
    )
}


def plain(value: Any) -> Any:
    """A value as JSON can hold it: tensors as their hashes, mappings without what depends on the clock."""
    if isinstance(value, torch.Tensor):
        raw = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        return f"{value.dtype} {list(value.shape)} {hashlib.sha256(raw).hexdigest()[:16]}"
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items() if key not in TIMES}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value


def kept_of(folder: Path) -> dict[str, Any]:
    """What a run directory says, without times."""
    found: dict[str, Any] = {"files": sorted(p.name for p in folder.iterdir() if p.is_file())}
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    found["metrics"] = [plain(json.loads(line)) for line in lines]
    found["results"] = plain(json.loads((folder / "results.json").read_text()))
    hparams = json.loads((folder / "hparams_train.json").read_text())
    for name in ("model_dir", "data", "resume", "cuda_graph", "no_cuda"):
        hparams.pop(name, None)
    found["hparams"] = plain(hparams)
    for path in sorted(folder.glob("*.pth.tar")):
        content = torch.load(path, weights_only=True)
        content["config"] = {k: v for k, v in content["config"].items() if k not in ("model_dir", "data", "resume")}
        found[path.name] = plain(content)
    return found


class Rerun:
    """A recorder for CPUs: what was recorded is the call, done again at every replay."""

    def __init__(self, device: torch.device) -> None:
        pass

    def warm_up(self, function: Callable[[], Any]) -> Any:
        """As it is."""
        return function()

    def record(self, function: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
        """The call, undone: every tensor that was there before gets its value back."""
        there = [value for value in gc.get_objects() if isinstance(value, torch.Tensor) and not value.is_inference()]
        before = [(value, value.detach().clone()) for value in there]
        result = function()
        for tensor, value in before:
            tensor.detach().copy_(value)

        def replay() -> None:
            with mock.patch("method.co_training.CoTraining.before_step", return_value=None):
                again = function()
            for old, new in zip(pytree.tree_leaves(result), pytree.tree_leaves(again), strict=True):
                old.copy_(new)

        return result, replay


def replaying_on_a_cpu() -> contextlib.ExitStack:
    """Within the block --cuda_graph 1 replays steps on a CPU."""
    stack = contextlib.ExitStack()
    stack.enter_context(mock.patch.object(replay, "CudaRecorder", Rerun))
    stack.enter_context(mock.patch.object(replay, "check_replayable", return_value=None))
    return stack


def _forked(function: Callable[[], int | None], output: Path) -> int:
    """Exit code of a function called in a fork of this process, its output kept in a file."""
    pid = os.fork()
    if pid == 0:
        fd = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(fd, 1)
        os.dup2(fd, 2)
        code = 1
        try:
            code = function() or 0
        except SystemExit as error:
            code = int(error.code or 0)
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def make_images(folder: Path) -> None:
    """An image folder of 3 classes, files of 80 x 100 pixels."""
    generator = np.random.default_rng(0)
    for split, number in (("train", 12), ("val", 5)):
        for name in ("a", "b", "c"):
            (folder / split / name).mkdir(parents=True)
            for i in range(number):
                pixels = generator.integers(0, 256, (5, 6, 3), dtype=np.uint8)
                image = Image.fromarray(pixels).resize((100, 80), Image.Resampling.BICUBIC)
                image.save(folder / split / name / f"{i}.png")


class Campaign:
    """All runs, below one folder."""

    def __init__(self, work: Path, kept: Path) -> None:
        self.work, self.kept = work, kept
        self.images = work / "images"
        make_images(self.images)
        self.found: dict[str, Any] = {}

    def argv(self, flags: list[str], folder: Path) -> list[str]:
        """A command line with the folders filled in; on the CPU."""
        filled = [flag.replace("{images}", str(self.images)) for flag in flags]
        return [*filled, "--no_cuda", "--model_dir", str(folder)]

    def train(self, name: str, flags: list[str], folder: Path, *, more: tuple[str, ...] = ()) -> None:
        """A run to its end."""

        def go() -> int:
            torch.set_num_threads(1)
            return train_split.main([*self.argv(flags, folder), *more])

        log = self.work / f"{name}.log"
        code = _forked(go, log)
        if code:
            raise SystemExit(f"{name}: exit code {code}\n{log.read_text()[-3000:]}")

    def run(self, name: str, flags: list[str]) -> None:
        """A run, its evaluation and, for images, its predictions."""
        folder = self.work / name
        if name == "replayed":
            self._replayed(folder, flags)
        else:
            self.train(name, flags, folder)
        self.found[name] = kept_of(folder)
        self.evaluate(name, folder)

    def evaluate(self, name: str, folder: Path, *more: str) -> None:
        """eval.py on the best checkpoint."""
        out = self.work / f"{name}_eval"
        argv = ["--resume", str(folder / "model_best.pth.tar"), "--no_cuda", "--model_dir", str(out), *more]
        argv += ["--data", str(self.images)]

        def go() -> int:
            torch.set_num_threads(1)
            return evaluation_program.main(argv)

        log = self.work / f"{name}_eval.log"
        code = _forked(go, log)
        if code:
            raise SystemExit(f"{name}, eval.py: exit code {code}\n{log.read_text()[-3000:]}")
        text = {p.name: p.read_text() for p in out.iterdir() if p.suffix in (".md", ".csv")}
        self.found[f"{name} evaluated"] = {"results": plain(json.loads((out / "results.json").read_text())), **text}
        if name == "folder":
            shutil.rmtree(out)
            argv += ["--predict", str(self.images / "val" / "a")]
            if _forked(go, log):
                raise SystemExit(log.read_text()[-3000:])
            (csv,) = out.rglob("predictions.csv")
            logits = {k: plain(torch.from_numpy(v)) for k, v in np.load(csv.parent / "logits.npz").items()}
            self.found["folder predicted"] = {"logits": logits, "csv": csv.read_text()}

    def _replayed(self, folder: Path, flags: list[str]) -> None:
        """With --cuda_graph on a recorder of the tests."""

        def go() -> int:
            torch.set_num_threads(1)
            with replaying_on_a_cpu():
                return train_split.main(self.argv(flags, folder))

        log = self.work / "replayed.log"
        if _forked(go, log):
            raise SystemExit(log.read_text()[-3000:])

    def resumed(self, name: str, flags: list[str], stop: list[str], *, first: bool) -> None:
        """A run that was stopped before, by the code that wrote FILE, and goes on now."""
        start = self.kept / name
        if first:
            self.train(name, flags, start, more=tuple(stop))
            for left in ("results.json",):
                (start / left).unlink()
        folder = self.work / name
        shutil.copytree(start, folder)
        self.train(name, flags, folder, more=("--resume", "auto"))
        self.found[name] = kept_of(folder)

    def two_processes(self) -> None:
        """Under torchrun, with synchronised batch norm and mixup."""
        folder = self.work / "two"
        flags = [*DIGITS, "--split_factor", "2", "--is_mixup", "1", "--is_syncbn", "1", "--ema_decay", "0.9"]
        argv = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        argv += ["train_split.py", *self.argv(flags, folder)]
        done = subprocess.run(
            argv, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
        if done.returncode:
            raise SystemExit(done.stderr[-3000:])
        self.found["two processes"] = kept_of(folder)

    def configurations(self) -> None:
        """What flags and recipes make of command lines, and how long networks are."""
        for name, argv in CONFIGS.items():
            config = parser_params.parse_config(argv)
            config = parser_params.resolve_config(config, data_recipe=config.dataset)
            described = config.described()
            self.found[f"config {name}"] = plain({k: [v["value"], v["origin"]] for k, v in described.items()})
        for arch in ("resnet110", "torchvision/resnet50", "timm/convnext_tiny", "cream_14"):
            log = self.work / "summary.log"
            argv = ["--is_summary", "1", "--arch", arch, "--dataset", "imagenet", "--split_factor", "1"]
            argv += ["--num_classes", "1000"]
            go = functools.partial(train_split.main, argv)
            code = _forked(go, log)
            self.found[f"summary {arch}"] = [code, log.read_text().splitlines()[-1]]


def collect(kept: Path, *, first: bool, only: list[str]) -> dict[str, Any]:
    """Everything, by name of the run."""
    with tempfile.TemporaryDirectory() as folder:
        campaign = Campaign(Path(folder), kept)
        for name, flags in RUNS.items():
            if not only or name in only:
                campaign.run(name, list(flags))
        for name, (flags, stop) in STOPPED.items():
            if not only or name in only:
                campaign.resumed(name, list(flags), stop, first=first)
        if not only or "two" in only:
            campaign.two_processes()
        if not only or "configurations" in only:
            campaign.configurations()
        return json.loads(json.dumps(campaign.found))


def differences(before: Any, now: Any, place: str = "") -> list[str]:
    """Where two values differ, one line each."""
    if isinstance(before, dict) and isinstance(now, dict):
        lines = [f"{place}.{k}: gone" for k in before if k not in now] + [
            f"{place}.{k}: new" for k in now if k not in before
        ]
        for key in before.keys() & now.keys():
            lines += differences(before[key], now[key], f"{place}.{key}")
        return lines
    if isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        return [
            line
            for i, (a, b) in enumerate(zip(before, now, strict=True))
            for line in differences(a, b, f"{place}[{i}]")
        ]
    return [] if before == now or (before != before and now != now) else [f"{place}: {before!r} -> {now!r}"[:300]]


def main() -> int:
    """`write FILE`, or `check FILE [RUN ...]`; 1 where something differs."""
    verb, path, only = sys.argv[1], Path(sys.argv[2]), sys.argv[3:]
    kept = path.with_suffix(".kept")
    torch.set_num_threads(1)
    if verb == "write":
        shutil.rmtree(kept, ignore_errors=True)
        kept.mkdir(parents=True)
        path.write_text(json.dumps(collect(kept, first=True, only=only), indent=1))
        return 0
    before = json.loads(path.read_text())
    now = collect(kept, first=False, only=only)
    lines = [line for name in now for line in differences(before.get(name), now[name], name)]
    missing = [] if only else [f"{name}: not run" for name in before if name not in now]
    print("\n".join([*lines, *missing][:200]) or f"{len(now)} results, all equal")
    return 1 if lines or missing else 0


if __name__ == "__main__":
    raise SystemExit(main())

"""One short real training run per backbone family: `python -m benchmarks.families --data DIR --runs DIR`.

DIR holds `train/<class>/*` and `test/<class>/*` (or `val/`). Every family's smallest practical member trains through
train_split.py, S = 2, on a fixed part of the images; the table and the picture tell whether its loss falls. A run that
ended is not repeated and one that was stopped goes on, so the same command continues. No speed is claimed.
"""

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.report import describe
from dataset.class_folders import iterate_images
from record.checkpoint import write_file
from record.plots import COLOURS
from record.run_folder import read_results
from utils.command_line import OneLineParser
from utils.errors import RunError, UserError
from utils.text import fit_streams

ROOT = Path(__file__).resolve().parent.parent
INTERVALS = 10  # progress lines of a run
COMMON = "--dataset folder --epochs 1 --seed 1 --workers 0 --is_mixup 0 --is_autoaugment 0 --is_cutout 0 --no_cuda"


@dataclass(frozen=True)
class Plan:
    """How a family is trained.

    Attributes:
        flags: backbone and division; families that are not divided learn together as two full networks.
        steps: how many.
        batch_size: images per step.
        crop_size: pixels; networks that exist for large images only take the 32-pixel images enlarged.
        lr: learning rate; the large networks' losses first rise where it is larger.
    """

    flags: str
    steps: int
    batch_size: int = 32
    crop_size: int = 32
    lr: float = 0.02


# smaller pixels where only heavy members are registered
PLANS: Mapping[str, Plan] = {
    "resnet": Plan("--arch resnet20 --split_factor 2", 200),
    "cifar_resnet": Plan("--method dml --arch resnet20_cifar,resnet20_cifar", 200),
    "wrn": Plan("--method dml --arch wrn_16_1,wrn_16_1", 200),
    "shufflenetv2": Plan("--method dml --arch ShuffleNetV2_05x_cifar,ShuffleNetV2_05x_cifar", 200),
    "cream": Plan("--arch cream_14 --split_factor 2", 300, 16),
    "hcgnet": Plan("--method dml --arch hcgnet_A1_cifar,hcgnet_A1_cifar", 200, 16),
    "efficientnet": Plan("--arch efficientnetb0 --split_factor 2", 300, 16),
    "shake_resnet": Plan("--arch shake_resnet26_2x96d --split_factor 2", 200, 16, 16),
    "pyramidnet": Plan("--arch pyramidnet164 --split_factor 2", 200, 16, 16),
    "imagenet_resnet": Plan("--method dml --arch resnet18_imagenet,resnet18_imagenet", 200, 16, 72, 0.002),
    "resnexst": Plan("--arch resnexst50_4x16d --split_factor 2", 200, 16, 72, 0.002),
    "resnext": Plan("--arch resnext50_32x4d --split_factor 2", 200, 16, 72, 0.002),
    "senet": Plan("--arch se_resnet50 --split_factor 2", 200, 16, 72, 0.002),
    "wide_resnet": Plan("--arch wide_resnet16_8 --split_factor 2", 150, 16),
    "resnest": Plan("--arch resnest101 --split_factor 1", 150, 16, 72, 0.002),
    "densenet": Plan("--arch densenet190 --split_factor 2", 200, 8, 16),
}


@dataclass(frozen=True)
class Outcome:
    """What a run recorded.

    Attributes:
        command: that trained it.
        steps: of the ends of the intervals.
        losses: cross-entropy of one network, mean over the networks and the interval's steps, in nats.
        results: results.json of the run.
    """

    command: str
    steps: tuple[int, ...]
    losses: tuple[float, ...]
    results: Mapping[str, Any]


def take_part(data: Path, part: Path, *, train: int, test: int) -> None:
    """Fill `part` with links to the first `train` and `test` images of every class of `data`.

    Raises:
        UserError: `data` is no folder of classes, or too few images are there.
    """
    test_split = "test" if (data / "test").is_dir() else "val"
    for split, count in (("train", train), (test_split, test)):
        classes = sorted(entry for entry in (data / split).glob("*") if entry.is_dir())
        if not classes:
            raise UserError(f"--data {data}: expected images in {split}/<class>/.")
        for folder in classes:
            files = list(iterate_images(folder))[:count]
            if len(files) < count:
                raise UserError(f"--data {data}: {split}/{folder.name} has {len(files)} images, {count} are needed.")
            target = part / split / folder.name
            target.mkdir(parents=True, exist_ok=True)
            for file in files:
                link = target / file.name
                if not link.exists():
                    link.symlink_to(file.resolve())


def flags_of(plan: Plan, data: str, run: str) -> list[str]:
    """The command line of a family's run."""
    return [
        *plan.flags.split(),
        *COMMON.split(),
        *("--data", data),
        *("--max_steps", str(plan.steps)),
        *("--batch_size", str(plan.batch_size)),
        *("--crop_size", str(plan.crop_size)),
        *("--lr", str(plan.lr)),
        *("--print_freq", str(max(1, plan.steps // INTERVALS))),
        *("--model_dir", run),
    ]


def train_family(plan: Plan, data: Path, run: Path) -> Outcome:
    """Train, or go on, or read what is there.

    Raises:
        RunError: train_split.py failed or was stopped.
    """
    results = read_results(run)
    if results is None:
        command = [sys.executable, "train_split.py", *flags_of(plan, str(data), str(run)), "--resume", "auto"]
        code = subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL).returncode
        results = read_results(run)
        if code != 0 or results is None:
            raise RunError(f"{shlex.join(command)}: exit code {code}.")
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    train = [record for record in records if record["kind"] == "train"]
    networks = len(results["acc1"])
    shown = shlex.join(["python", "train_split.py", *flags_of(plan, "images", run.name)])
    return Outcome(
        shown,
        tuple(record["step"] + 1 for record in train),
        tuple(record["loss_ce"] / networks for record in train),
        results,
    )


def format_table(outcomes: Mapping[str, Outcome]) -> str:
    """One row per family, as Markdown."""
    lines = [
        "| family | network | S | batch, pixels | steps | first loss | last loss | networks top-1 % | ensemble % |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for family, outcome in outcomes.items():
        plan, results = PLANS[family], outcome.results
        cells = (
            family,
            "`" + results["arch"].split(",")[0] + "`",
            f"{results['split_factor']}" if results["method"] == "co_training" else f"{len(results['acc1'])} full",
            f"{plan.batch_size}, {plan.crop_size}",
            str(results["steps"]),
            f"{outcome.losses[0]:.3f}",
            f"{outcome.losses[-1]:.3f}",
            ", ".join(f"{accuracy:.1f}" for accuracy in results["acc1"]),
            f"{results['ensemble_acc1']:.1f}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def plot_losses(outcomes: Mapping[str, Outcome], path: Path) -> None:
    """One panel per family: cross-entropy of a network over the steps."""
    from matplotlib.figure import Figure

    columns = 4
    rows = -(-len(outcomes) // columns)
    figure = Figure(figsize=(13, 2.5 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False, sharey=True).flat
    for (family, outcome), panel in zip(outcomes.items(), panels, strict=False):
        panel.plot(outcome.steps, outcome.losses, color=COLOURS[0], linewidth=1.6, marker="o", markersize=3)
        panel.axhline(outcome.losses[0], color="#999999", linewidth=0.8, linestyle=":")
        panel.set_title(f"{family}: {outcome.results['arch'].split(',')[0]}", fontsize=9)
        panel.grid(color="#dddddd", linewidth=0.6)
        panel.set_axisbelow(True)
        panel.spines[["top", "right"]].set_visible(False)
    for panel in list(panels):
        panel.set_visible(False)
    figure.supxlabel("step", fontsize=9)
    figure.supylabel("cross-entropy of a network", fontsize=9)
    figure.savefig(path, dpi=110)


def report(outcomes: Mapping[str, Outcome]) -> str:
    """Table, what fell, and the commands."""
    falling = [family for family, outcome in outcomes.items() if outcome.losses[-1] < outcome.losses[0]]
    text = [
        format_table(outcomes),
        "",
        f"The loss falls in {len(falling)} of {len(outcomes)} families: its last value is below the first.",
    ]
    missing = [family for family in PLANS if family not in outcomes]
    if missing:
        text.append(f"Not trained: {', '.join(missing)}.")
    text += ["", "```bash", *(outcome.command for outcome in outcomes.values()), "```"]
    return "\n".join(text)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code: 0 done, 1 a run failed or a loss did not fall, 2 the user's mistake."""
    fit_streams()
    parser = OneLineParser(prog="benchmarks.families", description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder of train/<class>/* and test/<class>/*")
    parser.add_argument("--runs", type=Path, required=True, help="folder for the runs, families.md and families.png")
    parser.add_argument("--family", nargs="+", choices=PLANS, default=list(PLANS), help="which [default: all]")
    parser.add_argument("--train_per_class", type=int, default=700, help="training images per class [default: 700]")
    parser.add_argument("--test_per_class", type=int, default=20, help="test images per class [default: 20]")
    arguments = parser.parse_args(argv)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    outcomes: dict[str, Outcome] = {}
    runs = arguments.runs.resolve()
    words = ["python", "-m", "benchmarks.families", *(sys.argv[1:] if argv is None else argv)]
    facts = describe(torch.device("cpu"), shlex.join(words))
    try:
        take_part(arguments.data, runs / "images", train=arguments.train_per_class, test=arguments.test_per_class)
        for family in arguments.family:
            outcomes[family] = train_family(PLANS[family], runs / "images", runs / family)
            print(f"{family}: {outcomes[family].losses[0]:.3f} -> {outcomes[family].losses[-1]:.3f}", flush=True)
            # after every family, for those who stop it
            write_file(runs / "families.md", f"# One short run per family\n\n{facts}\n\n{report(outcomes)}\n")
            plot_losses(outcomes, runs / "families.png")
    except (UserError, RunError) as error:
        print(f"benchmarks.families: {error}", file=sys.stderr)
        return error.exit_code
    print(report(outcomes))
    return 0 if all(outcome.losses[-1] < outcome.losses[0] for outcome in outcomes.values()) else 1


if __name__ == "__main__":
    raise SystemExit(main())

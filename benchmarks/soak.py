"""Does a long run stay flat? `python -m benchmarks.soak --minutes 30 --output benchmarks/soak_cpu_2026-11-20`

Trains two co-trained networks on a folder of generated JPEG files with two decoding workers, many short epochs with an
evaluation and a checkpoint each, stopped by SIGTERM and SIGKILL in turn and resumed. Meanwhile it samples, over all
processes of the run, memory, open files and threads, and the files that the run writes. Writes OUTPUT.json, OUTPUT.md
and OUTPUT.png; exit code 1 where something grows that should not. Needs Linux (/proc). Measures growth, never speed.
"""

import csv
import itertools
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from benchmarks.report import hardware, versions
from record.checkpoint import PARTIAL, list_checkpoints, run_position
from utils.command_line import OneLineParser
from utils.text import fit_streams

ROOT = Path(__file__).parent.parent
KEPT = 3  # checkpoints
INTERVAL = 2.0  # seconds between samples
START = 1800.0  # seconds within which a part must have trained its first epoch; they do not count
WARM_UP = 0.25  # share of each part, from its start, in which memory may still grow: allocators and workers fill up
LOGS = ("metrics.jsonl", "summary.csv", "train.log", "tensorboard")

# Largest allowed growth. Within a part: of a straight line fitted to its samples after the warm-up, from first to last.
MEMORY_GROWTH = 3.0  # % of the median
COUNT_GROWTH = 1.0  # open files, threads, processes, temporary files
LOG_GROWTH = 5.0  # % by which an epoch's lines may be longer in the second half (its numbers get more digits)
SIZE_GROWTH = 1.0  # % by which a checkpoint may be larger than the first one


@dataclass(frozen=True)
class Sample:
    """What one look at the run found, over all of its processes.

    Attributes:
        seconds: since the start of the soak. part: number of the resumed part, from 0.
        epoch: epochs done, by the newest checkpoint.
        memory_mib: resident memory of all processes; shared pages count in each of them.
        processes, threads, open_files: how many.
        temporary: entries of the run's TMPDIR.
        checkpoints: how many there are. checkpoint_bytes: size of the newest.
        log_bytes: by the names of LOGS.
    """

    seconds: float
    part: int
    epoch: int
    memory_mib: float
    processes: int
    threads: int
    open_files: int
    temporary: int
    checkpoints: int
    checkpoint_bytes: int
    log_bytes: dict[str, int]


@dataclass(frozen=True)
class Finding:
    """One measured quantity and its limit; `flat` says whether it kept to it."""

    name: str
    value: float
    limit: float
    unit: str

    @property
    def flat(self) -> bool:
        return self.value <= self.limit


# ---- the run ---------------------------------------------------------------------------------------------------------


def make_images(folder: Path) -> None:
    """JPEG files of four classes, too large to be kept decoded in memory."""
    chance = np.random.default_rng(0)
    for split, count in (("train", 8), ("val", 3)):
        for label in range(4):
            (folder / split / f"class{label}").mkdir(parents=True)
            for i in range(count):
                pixels = chance.normal(60 + 40 * label, 30, (72, 80, 3)).clip(0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / split / f"class{label}" / f"{i}.jpg", quality=80)


def command(data: str, run: str) -> list[str]:
    """The arguments of train_split.py."""
    flags = (
        f"--dataset folder --data {data} --arch resnet20 --crop_size 16 --split_factor 2 --workers 2 --batch_size 16 "
        "--epochs 1000000 --lr 0.01 --ema_decay 0.9 --print_freq 1 --seed 1 --no_cuda "
        f"--max_ckpt_nums {KEPT} --model_dir {run} --resume auto"
    )
    return ["train_split.py", *flags.split()]


def members(session: int) -> list[int]:
    """Processes of a session: those that the run started, and theirs."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:  # it has just ended
                continue
            if int(fields[3]) == session and fields[0] != "Z":
                found.append(int(entry.name))
    return found


def look(session: int, run: Path, temporary: Path, seconds: float, part: int) -> Sample:
    """One sample."""
    memory = threads = files = processes = 0
    for pid in members(session):
        try:
            status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
            files += len(os.listdir(f"/proc/{pid}/fd"))
            memory += int(status["VmRSS"].split()[0])
            threads += int(status["Threads"])
            processes += 1
        except (OSError, KeyError):
            continue
    checkpoints = list_checkpoints(run)
    position = run_position(checkpoints[0]) if checkpoints else None
    return Sample(
        seconds=round(seconds, 1),
        part=part,
        epoch=position[0] if position else 0,
        memory_mib=round(memory / 1024, 1),
        processes=processes,
        threads=threads,
        open_files=files,
        temporary=len(list(temporary.iterdir())),
        checkpoints=len(checkpoints),
        checkpoint_bytes=size(checkpoints[:1]),
        log_bytes={name: size(run.glob("*/events*") if name == "tensorboard" else [run / name]) for name in LOGS},
    )


def size(paths: Iterable[Path]) -> int:
    """Bytes of the files together; those that are not there count nothing."""
    total = 0
    for path in paths:
        try:
            total += path.stat().st_size
        except OSError:
            continue
    return total


def soak(minutes: float, resumes: int, folder: Path) -> tuple[list[Sample], list[Finding]]:
    """Run, interrupt, resume and sample; the findings here are about how the parts ended."""
    run, temporary = folder / "run", folder / "tmp"
    temporary.mkdir(parents=True)
    make_images(folder / "data")
    began = time.monotonic()
    samples: list[Sample] = []
    wrong_endings = left_over = 0
    for part in range(resumes + 1):
        with (folder / "output.txt").open("ab") as output:
            process = subprocess.Popen(
                [sys.executable, *command(str(folder / "data"), str(run))],
                cwd=ROOT,
                env={**os.environ, "TMPDIR": str(temporary), "OMP_NUM_THREADS": "1"},
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        end = time.monotonic() + START
        started = look(process.pid, run, temporary, 0.0, part).epoch
        going = False
        while time.monotonic() < end and process.poll() is None:
            time.sleep(INTERVAL)
            sample = look(process.pid, run, temporary, time.monotonic() - began, part)
            if going:
                samples.append(sample)
            elif sample.epoch > started:
                going, end = True, time.monotonic() + 60 * minutes / (resumes + 1)
        number = signal.SIGKILL if part % 2 else signal.SIGTERM
        process.send_signal(number)
        code = process.wait(300)
        wrong_endings += not going or code != (-number if part % 2 else 0)
        deadline = time.monotonic() + 60
        while members(process.pid) and time.monotonic() < deadline:
            time.sleep(0.2)
        left_over += len(members(process.pid))
        if wrong_endings:
            print((folder / "output.txt").read_text(errors="replace")[-3000:], file=sys.stderr)
            break
    with (run / "summary.csv").open(newline="") as file:
        epochs = [int(row["epoch"]) for row in csv.DictReader(file)]
    odd_epochs = sum(epoch != i for i, epoch in enumerate(epochs, start=1))
    partials = len(list(run.glob(f"*{PARTIAL}"))) if (resumes % 2 == 0) else 0  # SIGKILL may leave the last one's
    return samples, [
        Finding("parts that trained no epoch, or ended otherwise than by their signal", wrong_endings, 0, ""),
        Finding("processes left 60 s after a part's end", left_over, 0, ""),
        Finding("epochs missing or doubled in summary.csv", odd_epochs, 0, ""),
        Finding("half-written files left", partials, 0, ""),
    ]


# ---- the judgement ---------------------------------------------------------------------------------------------------


def settled(samples: Sequence[Sample]) -> list[list[Sample]]:
    """The samples of each part after its warm-up."""
    parts = []
    for number in sorted({sample.part for sample in samples}):
        of_part = [sample for sample in samples if sample.part == number]
        first, last = of_part[0].seconds, of_part[-1].seconds
        parts.append([s for s in of_part if s.seconds >= first + WARM_UP * (last - first)])
    return parts


def largest_growth(parts: Sequence[Sequence[Sample]], name: str) -> float:
    """The largest growth of a quantity within a part: that of a straight line fitted to it."""
    growths = []
    for part in parts:
        seconds = np.array([sample.seconds for sample in part])
        values = np.array([getattr(sample, name) for sample in part], dtype=float)
        slope = np.polyfit(seconds - seconds[0], values, 1)[0]
        growths.append(slope * (seconds[-1] - seconds[0]))
    return float(max(growths))


def judge(samples: Sequence[Sample]) -> list[Finding]:
    """Whether what a run holds stays as it is, and what it writes grows by the same amount every epoch."""
    parts = settled(samples)
    medians = [float(np.median([sample.memory_mib for sample in part])) for part in parts]
    findings = [
        Finding(
            "memory, growth within a part", 100 * largest_growth(parts, "memory_mib") / medians[0], MEMORY_GROWTH, "%"
        ),
        Finding("memory, last part against the first", 100 * (medians[-1] / medians[0] - 1), MEMORY_GROWTH, "%"),
    ]
    for name in ("open_files", "threads", "processes", "temporary"):
        label = "temporary files" if name == "temporary" else name.replace("_", " ")
        findings.append(Finding(f"{label}, growth within a part", largest_growth(parts, name), COUNT_GROWTH, ""))
    whole = [sample for sample in samples if sample.epoch]
    first, last = whole[0], whole[-1]
    middle = min(whole, key=lambda sample: abs(sample.epoch - (first.epoch + last.epoch) / 2))
    for name in LOGS:
        early = (middle.log_bytes[name] - first.log_bytes[name]) / (middle.epoch - first.epoch)
        late = (last.log_bytes[name] - middle.log_bytes[name]) / (last.epoch - middle.epoch)
        findings.append(
            Finding(f"{name}, bytes an epoch, second half against the first", 100 * (late / early - 1), LOG_GROWTH, "%")
        )
    sizes = [sample.checkpoint_bytes for sample in whole if sample.checkpoint_bytes]
    findings.append(
        Finding("checkpoint size, largest against the first", 100 * (max(sizes) / sizes[0] - 1), SIZE_GROWTH, "%")
    )
    # a new one is written before the oldest is dropped
    findings.append(
        Finding("checkpoints kept", max(s.checkpoints for s in whole), KEPT + 1, f"(--max_ckpt_nums {KEPT})")
    )
    return findings


# ---- the report ------------------------------------------------------------------------------------------------------


def table(samples: Sequence[Sample], findings: Sequence[Finding], header: dict[str, str]) -> str:
    """The report in Markdown."""
    lines = ["# Soak: does a long run stay flat?", "", *(f"- {name}: {value}" for name, value in header.items())]
    lines += ["", "It says what grows, not how fast anything is: other work may have run on the machine."]
    lines += ["", "| quantity | found | limit | |", "| --- | ---: | ---: | --- |"]
    for item in findings:
        verdict = "flat" if item.flat else "**NOT FLAT**"
        lines.append(f"| {item.name} | {item.value:.2f} {item.unit} | {item.limit:g} | {verdict} |")
    lines += ["", "After the warm-up of each part:", ""]
    lines += ["| part | epochs | memory MiB: median | least | most | open files | threads | processes |"]
    lines += ["| ---: | --- | ---: | ---: | ---: | --- | --- | --- |"]
    for part in settled(samples):
        memory = [sample.memory_mib for sample in part]
        ranges = [
            f"{min(values)}–{max(values)}"
            for values in ([getattr(s, name) for s in part] for name in ("open_files", "threads", "processes"))
        ]
        lines.append(
            f"| {part[0].part + 1} | {part[0].epoch}–{part[-1].epoch} | {np.median(memory):.0f} | {min(memory):.0f} | "
            f"{max(memory):.0f} | {' | '.join(ranges)} |"
        )
    return "\n".join(lines) + "\n"


def picture(samples: Sequence[Sample], path: Path) -> None:
    """Memory, counts, log sizes and checkpoints over the soak."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    minutes = [sample.seconds / 60 for sample in samples]
    starts = [s.seconds / 60 for before, s in itertools.pairwise(samples) if s.part != before.part]
    figure, axes = plt.subplots(2, 2, figsize=(11, 7), constrained_layout=True)
    axes[0, 0].plot(minutes, [sample.memory_mib for sample in samples], linewidth=1)
    axes[0, 0].set(title="memory of all processes", ylabel="MiB")
    for name in ("open_files", "threads", "processes", "temporary"):
        axes[0, 1].plot(
            minutes, [getattr(sample, name) for sample in samples], linewidth=1, label=name.replace("_", " ")
        )
    axes[0, 1].set(title="how many")
    axes[0, 1].legend()
    for name in LOGS:
        axes[1, 0].plot(
            [s.epoch for s in samples], [s.log_bytes[name] / 1024 for s in samples], linewidth=1, label=name
        )
    axes[1, 0].set(title="logs", xlabel="epoch", ylabel="KiB")
    axes[1, 0].legend()
    axes[1, 1].plot(minutes, [sample.checkpoints for sample in samples], linewidth=1, label="checkpoints")
    axes[1, 1].plot(
        minutes, [s.checkpoint_bytes / 2**20 for s in samples], linewidth=1, label="size of the newest, MiB"
    )
    axes[1, 1].set(title="checkpoints", xlabel="minutes")
    axes[1, 1].legend()
    for axis in axes.flat:
        axis.set_ylim(0, 1.15 * axis.get_ylim()[1])
    for axis in (axes[0, 0], axes[0, 1], axes[1, 1]):
        axis.set_xlabel("minutes")
        for start in starts:
            axis.axvline(start, color="0.7", linewidth=0.8, linestyle="--")
    figure.savefig(path, dpi=100)
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; 0: flat, 1: something grows."""
    fit_streams()
    parser = OneLineParser(prog="python -m benchmarks.soak", description="Does a long run stay flat?")
    parser.add_argument("--minutes", type=float, default=30.0, help="length (default: 30)")
    parser.add_argument("--resumes", type=int, default=2, help="how often it is stopped and resumed (default: 2)")
    parser.add_argument("--output", type=Path, default=Path("soak"), help="stem of the reports (default: soak)")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        samples, findings = soak(options.minutes, options.resumes, Path(folder))
    if findings[0].flat:
        findings = judge(samples) + findings
    facts = hardware(torch.device("cpu"))
    header = {
        "date": time.strftime("%Y-%m-%d"),
        "command": f"`python -m benchmarks.soak --minutes {options.minutes:g} --resumes {options.resumes}`",
        "the run": f"`{' '.join(command('DATA', 'RUN'))}`, one thread, two decoding workers",
        "machine": f"{facts['cores']} cores of {facts['device']}, 1-minute load {facts['load_1_min']} at the end",
        "versions": ", ".join(f"{name} {number}" for name, number in versions().items()),
        "length": f"{samples[-1].seconds / 60:.1f} minutes, {samples[-1].epoch} epochs, {len(samples)} samples, "
        f"{options.resumes} resumes (after SIGTERM, SIGKILL in turn)",
        "warm-up": f"the first {100 * WARM_UP:.0f} % of each part",
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    report = table(samples, findings, header)
    content = {
        **header,
        "findings": [{**asdict(f), "flat": f.flat} for f in findings],
        "samples": list(map(asdict, samples)),
    }
    options.output.with_suffix(".json").write_text(json.dumps(content) + "\n")
    options.output.with_suffix(".md").write_text(report)
    picture(samples, options.output.with_suffix(".png"))
    print(report, flush=True)
    return 0 if all(finding.flat for finding in findings) else 1


if __name__ == "__main__":
    raise SystemExit(main())

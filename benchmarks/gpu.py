"""Everything that a GPU has to tell, in parts, as far as the minutes reach: `python -m benchmarks.gpu`, script/gpu.sh.

Each part runs in processes of its own, one at a time. What it finds is in the folder --out as soon as it is found. The
same command again skips the parts that are done and begins with the next one, so that short turns on a GPU add up.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch

from record.checkpoint import write_file
from record.run_folder import as_json, read_results
from utils.command_line import OneLineParser, above_zero
from utils.cpus import allowed_cpus
from utils.errors import Interrupted, RunError, UserError, reason
from utils.launch import one_gpu, unused_gpu
from utils.text import fit_streams

ROOT = Path(__file__).resolve().parent.parent
GRACE = 20.0  # seconds between the signal that asks a process to end and the one that ends it
JPEGS = ROOT / "data_dir" / "cifar10-jpeg"  # class folders of CIFAR-10, used where --data is not given
PROMISES = {
    "G1": "≥ 5×",
    "G2": "≥ 1.6×",
    "G3": "50 % and 35 % of the matrix product",
    "G4": "≤ 1.40 times the time",
    "G5": "≥ 8× a core (a CPU's)",
    "G6": "≥ 50×, ≤ 3 % of the step",
    "G7": "2.5×, 5×, 1.7×",
    "G8": "0 waits",
    "G9": "≥ 5×, 1.8×, 1.3×, and ≥ 0.85×",
    "G10": "≥ 1.9×, 1.15×, 1.4× (a CPU's)",
    "G11": "≥ 2.4× (a CPU's)",
    "G12": "≤ 30 minutes",
    "G13": "≤ 1/1000 of the bytes (benchmarks placement)",
    "G14": "≥ 2× (benchmarks placement)",
    "G15": "≤ 0.30 of the memory: ≥ 3.3× (benchmarks placement)",
}


@dataclass(frozen=True)
class Part:
    """What runs together, and how long it may.

    Attributes:
        name: also of its files.
        settles: what it is for.
        limit: seconds after which it is ended; 0: what is left.
        usual: seconds that it takes; without so many it is not begun.
        commands: see `arguments_of`.
        tiny: the same at the smallest size.
        judges: whether a failure of it means that results are wrong, not that they are missing.
        needs: "data", "two GPUs", or a package, without which it is left out.
    """

    name: str
    settles: str
    limit: float
    usual: float
    commands: Sequence[str]
    tiny: Sequence[str]
    judges: bool = False
    needs: str = ""


FAST = "bf16+loop,bf16+loop+graph,bf16+parallel+graph,bf16+stacked+graph,bf16+stacked+nchw+graph"
EXACT = "fp64+loop+graph,fp64+parallel+graph,fp64+stacked+graph"  # with rates in float32, as every graph has them
COMPILED = "bf16+loop+compile,bf16+loop+compile+graph,bf16+parallel+compile+graph"
STEP = "bench step --calls 5 --rounds 30 --seconds 15"
EPOCH = "bench epoch IMAGES --workers WORKERS --rounds 1 --cases bf16+parallel+graph --arch"
TINY = "--arch resnet20 --batch_size 4 --rounds 1 --split_factor 2"
PARTS = (
    Part(
        "machine",
        "can anything be trusted here",
        40,
        20,
        ("check machine,kernel,precisions",),
        ("check machine",),
        judges=True,
    ),
    Part("tests", "correctness, G8", 150, 90, ("tests all",), ("tests one",), judges=True, needs="pytest"),
    Part(
        "numerics",
        "is any fast path wrong",
        60,
        40,
        (
            f"bench numerics --steps 60 --most_drift 0.1 --cases fp32+loop,{FAST}",
            f"bench numerics --steps 60 --most 1e-9 --cases {EXACT}",
        ),
        (
            f"bench numerics --steps 2 --most_drift 0.1 --cases fp32+loop,fp32+stacked {TINY}",
            f"bench numerics --steps 2 --most 1e-9 --cases fp64+loop,fp64+parallel {TINY}",
        ),
        judges=True,
    ),
    Part("resume", "is a resumed run the same", 90, 50, ("check graphs,resume",), ("check resume",), judges=True),
    Part(
        "ddp",
        "do two GPUs train as one",
        60,
        40,
        ("check processes",),
        ("check processes",),
        judges=True,
        needs="two GPUs",
    ),
    Part(
        "g1",
        "G1, and what the device can do at most",
        90,
        60,
        ("bench ceilings --seconds 10", f"{STEP} --arch resnet110 --cases {FAST}"),
        ("bench ceilings --side 16 --copy_mib 1 --rounds 1", f"bench step --cases fp32+loop {TINY}"),
    ),
    Part(
        "g2_g3_g4",
        "G2, G3, G4",
        100,
        70,
        (
            f"{STEP} --arch wide_resnet28_10 --cases {FAST}",
            "bench division --calls 5 --rounds 20 --seconds 15 --case bf16+parallel+graph",
        ),
        (f"bench division --side 16 --case fp32+loop {TINY}",),
    ),
    Part(
        "g6",
        "G6",
        45,
        30,
        ("bench views --workers WORKERS --seconds 15",),
        ("bench views --workers 1 --rounds 1 --image_size 8",),
    ),
    Part(
        "g9",
        "G9",
        60,
        40,
        ("bench inference --batch_sizes 1,8,32,128 --calls 5 --seconds 20",),
        ("bench inference --arch resnet20 --batch_sizes 1 --rounds 1 --precision fp32",),
    ),
    Part(
        "g7_resnet110",
        "G7, one of three",
        80,
        50,
        (f"{EPOCH} resnet110",),
        (f"bench epoch --images 16 --workers 0 --cases fp32+loop {TINY}",),
    ),
    Part(
        "compile",
        "what torch.compile adds to G1 to G4",
        300,
        180,
        tuple(f"{STEP} --arch {arch} --cases {COMPILED}" for arch in ("resnet110", "wide_resnet28_10")),
        (f"bench step --cases bf16+loop {TINY}",),
    ),
    Part(
        "convolutions",
        "NHWC or NCHW, streams or groups",
        150,
        120,
        ("bench convolutions --widths 16,80,160 --sides 32,16,8 --batches 128 --seconds 90",),
        ("bench convolutions --widths 8 --sides 4 --batches 2 --rounds 1",),
    ),
    Part(
        "g7_rest",
        "G7, the other two",
        180,
        120,
        tuple(f"{EPOCH} {arch}" for arch in ("wide_resnet16_8", "wide_resnet28_10")),
        (f"bench epoch --evaluation_only --images 16 --workers 0 --cases fp32+loop {TINY}",),
    ),
    Part(
        "g12",
        "G12; goes on in every turn",
        0,
        60,
        (
            "train --dataset folder --data DATA --arch wide_resnet28_10 --split_factor 4 --epochs 200 --cuda_graph 1 "
            "--execution parallel",
        ),
        ("train --dataset digits --arch resnet20 --split_factor 2 --max_steps 2 --no_cuda",),
        needs="data",
    ),
)


ALL = [part.name for part in PARTS]


def gpu_tests() -> list[str]:
    """The files that hold tests for a GPU: collecting all others takes longer than these take to run."""
    files = sorted((ROOT / "tests").glob("test_*.py"))
    return [
        f"tests/{path.name}" for path in files if re.search(r"@(pytest\.mark|needs|requires).gpu", path.read_text())
    ]


def arguments_of(command: str, *, device: str, tiny: bool, out: Path, rows: Path, data: Path | None) -> list[str]:
    """What Python is called with for a command of `Part`.

    Args:
        command: "bench SUBJECT …" with IMAGES and WORKERS in it, "check NAMES", "tests all", "tests one", or "train …"
            with DATA in it.
        rows: the JSON file of a benchmark.
    """
    kind, *words = shlex.split(command)
    if kind == "check":
        return ["-m", "benchmarks.gpu_check", "--device", device, *["--tiny"] * tiny, "--only", *words]
    if kind == "tests":
        files = gpu_tests()[: 1 if words == ["one"] else None]
        report = ["--junitxml", str(out / "tests.xml")]
        return ["-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider", "-v", "--maxfail", "20", *report, *files]
    meaning = {
        "IMAGES": ["--images", "50000"] if data is None else ["--data", str(data)],
        "DATA": [str(data)],
        "WORKERS": [str(allowed_cpus())],
    }
    filled = [word for short in words for word in meaning.get(short, [short])]
    if kind == "train":
        folder = ["--model_dir", str(out / "g12")]
        return ["train_split.py", *filled, "--workers", "0", "--seed", "1", "--resume", "auto", *folder]
    return ["-m", "benchmarks", *filled, "--device", device, "--json", str(rows)]


# ---- running ---------------------------------------------------------------------------------------------------------


@dataclass
class Turn:
    """One use of the runner: what was done before, what is done now, and when it ends.

    Attributes:
        out: where everything goes.
        data: class folders of images, or None.
        device: as a flag.
        tiny: at the smallest size.
        place: name of the device, and size; parts of two places do not mix.
        deadline: on the clock, in seconds.
        done: by name of a part: seconds, exit codes, and whether it ended by itself.
    """

    out: Path
    data: Path | None
    device: str
    tiny: bool
    place: str
    deadline: float
    done: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def left(self) -> float:
        """Seconds until the end."""
        return self.deadline - time.monotonic()

    def load(self) -> None:
        """Read what earlier turns have done.

        Raises:
            UserError: they were on another device.
        """
        try:
            before = json.loads((self.out / "state.json").read_text(encoding="utf-8"))
            place, done = before["place"], before["done"]
        except (OSError, ValueError, KeyError, TypeError):
            return
        if place != self.place:
            raise UserError(
                f"--out {self.out} holds parts that ran on {place}, and this is {self.place}: give another folder."
            )
        self.done = done

    def run(self, parts: Sequence[Part], wanted: Sequence[str]) -> list[str]:
        """Run what is wanted, not done and fits; names of the parts that were not reached."""
        missed = []
        for number, part in enumerate(parts):
            if part.name not in wanted or self._has_ended(part, again=wanted is not ALL):
                continue
            if lacking := self._lacking(part):
                print(f"{number:02} {part.name:<14} left out: needs {lacking}", flush=True)
                continue
            if self.left < part.usual:
                missed.append(part.name)
                continue
            self._run(number, part)
            self.save(parts)
            print(f"{number:02} {part.name:<14} {self.describe(part)}", flush=True)
        return missed

    def _has_ended(self, part: Part, *, again: bool) -> bool:
        """Whether there is nothing left to do; what failed is done `again` where it is asked for by name."""
        found = self.done.get(part.name, {"ended": False})
        return bool(found["ended"] and not (again and not found["ok"]))

    def _lacking(self, part: Part) -> str:
        """What the part needs and is not there; "" where nothing is."""
        if part.needs == "data":
            return "" if self.tiny or self.data is not None else "--data, the images of CIFAR-10"
        if part.needs == "two GPUs":
            return "" if self.device == "cpu" or torch.cuda.device_count() > 1 else part.needs
        return part.needs if part.needs and importlib.util.find_spec(part.needs) is None else ""

    def describe(self, part: Part) -> str:
        """What has become of a part, in a few words."""
        found = self.done[part.name]
        if not found["ended"]:
            return f"not done after {found['seconds']:.0f} s: goes on in the next turn"
        return f"{'done' if found['ok'] else 'FAILED'} in {found['seconds']:.0f} s"

    def _run(self, number: int, part: Part) -> None:
        began = time.monotonic()
        limit = 0 if self.tiny else part.limit  # which are a GPU's
        seconds = min(limit or self.left, self.left)
        codes: list[int | None] = []
        for which, command in enumerate(part.tiny if self.tiny else part.commands, 1):
            stem = f"{number:02}_{part.name}" + (f"_{which}" if which > 1 else "")
            words = arguments_of(
                command,
                device=self.device,
                tiny=self.tiny,
                out=self.out,
                rows=self.out / f"{stem}.json",
                data=self.data,
            )
            left = seconds - (time.monotonic() - began)
            codes.append(run_limited(words, self.out / f"{stem}.log", left, self.cache()))
            if codes[-1] is None:
                break
        ended = None not in codes
        rows = self.rows(f"{number:02}_{part.name}*.json")
        right = not part.judges or not any("error" in row or row.get("met") is False for row in rows)
        ok = ended and right and not any(codes)
        self.done[part.name] = {"ended": ended, "ok": ok, "codes": codes, "seconds": round(time.monotonic() - began, 1)}

    def cache(self) -> dict[str, str]:
        """Where compilers keep what they have made, so that the next turn has it."""
        return {
            "TORCHINDUCTOR_CACHE_DIR": str(self.out / "cache" / "inductor"),
            "TRITON_CACHE_DIR": str(self.out / "cache" / "triton"),
        }

    def rows(self, pattern: str) -> list[dict[str, Any]]:
        """The rows of the files of this pattern, each with its file."""
        return rows_of(self.out, pattern)

    # ---- what was found ----------------------------------------------------------------------------------------------

    def save(self, parts: Sequence[Part]) -> None:
        """Write state.json, goals.json and summary.md anew."""
        write_file(self.out / "state.json", as_json({"place": self.place, "done": self.done}))
        found = goals_of(committed_rows()) | goals_of(self.rows("*.json")) | self._other_goals()
        open_goal = {"value": None, "met": None, "file": None, "on": None}
        goals = {name: {"promise": text, **found.get(name, open_goal)} for name, text in PROMISES.items()}
        write_file(self.out / "goals.json", as_json(goals))
        write_file(self.out / "summary.md", self._summary(parts, goals))

    def _other_goals(self) -> dict[str, dict[str, Any]]:
        """Those that no row holds: waits by the tests, and hours of the run of G12."""
        found: dict[str, dict[str, Any]] = {}
        report = self.out / "tests.xml"
        if report.exists():
            waits = [case for case in ElementTree.parse(report).iter("testcase") if "wait" in case.get("name", "")]
            ran = [case for case in waits if case.find("skipped") is None]
            bad = [case for case in ran if case.find("failure") is not None or case.find("error") is not None]
            if ran:
                found["G8"] = {"value": len(bad), "met": not bad, "file": report.name, "on": self.place}
        results = read_results(self.out / "g12")
        if results is not None and results["epochs"] >= 200:
            minutes = results["seconds"] / 60
            rounded, file = round(minutes, 2), "g12/results.json"
            found["G12"] = {"value": rounded, "met": minutes <= 30, "file": file, "on": self.place}
        return found

    def _summary(self, parts: Sequence[Part], goals: Mapping[str, Mapping[str, Any]]) -> str:
        lines = [f"# Parts, on {self.place}", "", "| part | settles | what became of it |", "| --- | --- | --- |"]
        for part in parts:
            what = self.describe(part) if part.name in self.done else "open"
            lines.append(f"| {part.name} | {part.settles} | {what} |")
        lines += ["", "# Goals", "", "| goal | promised | measured | met | on | file |"]
        lines += ["| --- | --- | --- | --- | --- | --- |"]
        for name, goal in goals.items():
            verdict = {True: "yes", False: "no", None: "–"}[goal["met"]]
            value = "open" if goal["value"] is None else goal["value"]
            where = f"{goal['on'] or ''} | {goal['file'] or ''}"
            lines.append(f"| {name} | {PROMISES[name]} | {value} | {verdict} | {where} |")
        for table in sorted(self.out.glob("[0-9][0-9]_*.md")):
            lines += ["", f"# {table.stem}", "", table.read_text(encoding="utf-8").rstrip()]
        return "\n".join(lines) + "\n"


def rows_of(folder: Path, pattern: str) -> list[dict[str, Any]]:
    """The rows of the files of this pattern, each with its file."""
    found = []
    for path in sorted(folder.glob(pattern)):
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            continue
        if isinstance(content, list):
            found += [{**row, "file": path.name} for row in content]
    return found


def committed_rows() -> list[dict[str, Any]]:
    """What `python -m benchmarks placement` has found: rows of the project, because no one GPU has them."""
    return rows_of(ROOT / "benchmarks", "placement_*.json")


def goals_of(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """The best ratio for every promise of every goal; a goal is met where all its measured promises are.

    A promise is that of one subject, as "training step of resnet110 S=4, batch 128", beside one baseline.
    """
    best: dict[tuple[str, str, str, float], Mapping[str, Any]] = {}
    for row in rows:
        if row.get("goal") is None or row.get("ratio") is None or row.get("commit") is None:
            continue
        key = (row["goal"], row["subject"], str(row["baseline"]), row["commit"])
        if key not in best or row["ratio"] > best[key]["ratio"]:
            best[key] = row
    found: dict[str, dict[str, Any]] = {}
    for (goal, *_), row in best.items():
        entry = found.setdefault(goal, {"value": [], "promises": [], "met": [], "file": [], "on": []})
        entry["value"].append(round(row["ratio"], 3))
        entry["promises"].append(row["commit"])
        entry["met"].append(row["met"])
        entry["file"].append(row["file"])
        entry["on"].append(row["hardware"]["device"])
    for entry in found.values():
        entry["met"] = None if None in entry["met"] else all(entry["met"])
        for name in ("file", "on"):
            entry[name] = ", ".join(dict.fromkeys(entry[name]))
    return found


def run_limited(command: Sequence[str], log: Path, seconds: float, environment: Mapping[str, str]) -> int | None:
    """Run Python with these arguments; its exit code, or None where it had to be ended after so many seconds.

    What it says goes to `log` as it comes. It is asked to end (SIGTERM), and ended with all that it started after that.
    """
    with log.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, *command],
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            env={**os.environ, **environment},
            start_new_session=True,
        )
        try:
            return process.wait(timeout=max(seconds, 0.0))
        except subprocess.TimeoutExpired:
            return None
        finally:
            _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ask it to end, so that a training saves what it has, and end it with all that it has left behind."""
    try:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=GRACE)
    finally:  # whoever is in a hurry interrupts twice
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


# ---- the command -----------------------------------------------------------------------------------------------------


def build_parser() -> argparse.ArgumentParser:
    """The flags."""
    parser = OneLineParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--minutes", type=above_zero, default=10, help="of this turn (default 10)")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"), help="folder of results (default runs/gpu)")
    parser.add_argument(
        "--data", type=Path, help="class folders of CIFAR-10 (default: data_dir/cifar10-jpeg, or noise)"
    )
    parser.add_argument("--only", help="comma list of parts, done again where they failed (default: all)")
    parser.add_argument("--list", action="store_true", help="show the parts and end")
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1 … or cpu (default cuda)")
    parser.add_argument("--tiny", action="store_true", help="the smallest form of every part, to try the runner")
    return parser


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code: 0, also where parts are left; 1 results are wrong; 2 a mistake."""
    fit_streams()
    options = build_parser().parse_args(argv)
    program = build_parser().prog
    try:
        return _main(options)
    except (UserError, RunError) as error:
        print(f"{program}: {error}", file=sys.stderr)
        return error.exit_code
    except OSError as error:
        print(f"{program}: --out {options.out}: cannot be written: {reason(error)}.", file=sys.stderr)
        return RunError.exit_code
    except Interrupted as error:
        print(f"{program}: interrupted. What was found is in {options.out}; the same command goes on.", file=sys.stderr)
        return error.exit_code


def _main(options: argparse.Namespace) -> int:
    data = options.data or (JPEGS if JPEGS.is_dir() else None)
    if options.list:
        for number, part in enumerate(PARTS):
            limit = f"{part.limit:.0f} s" if part.limit else "the rest"
            print(f"{number:02} {part.name:<14} {limit:>8}  {part.settles}")
        return 0
    wanted = ALL if options.only is None else options.only.split(",")
    if unknown := [name for name in wanted if name not in {part.name for part in PARTS}]:
        raise UserError(f"--only {unknown[0]}: there is no such part; --list shows them.")
    name = "cpu"
    if options.device != "cpu":
        if not torch.cuda.is_available():
            raise UserError(unused_gpu() or "there is no GPU here; --device cpu --tiny tries the runner.")
        name = torch.cuda.get_device_name(one_gpu("--device", options.device))
    if data is not None and not data.is_dir():
        raise UserError(f"--data {data}: there is no such folder; leave the flag out to time noise.")
    options.out.mkdir(parents=True, exist_ok=True)
    turn = Turn(
        out=options.out.resolve(),
        data=None if data is None else data.resolve(),
        device=options.device,
        tiny=options.tiny,
        place=f"{name}{', tiny' * options.tiny}",
        deadline=time.monotonic() + 60 * options.minutes,
    )
    turn.load()
    missed = turn.run(PARTS, wanted)
    turn.save(PARTS)
    if missed:
        print(f"not reached: {', '.join(missed)}. The same command goes on.")
    found = {part.name: turn.done.get(part.name, {}) for part in PARTS if part.judges}
    wrong = [name for name, one in found.items() if one.get("ended") and not one["ok"]]
    if wrong:
        print(f"WRONG RESULTS: {', '.join(wrong)}. Nothing else in {options.out} is to be believed before that.")
    return RunError.exit_code if wrong else 0


def _interrupt(number: int, _: object) -> None:
    raise Interrupted(number)


if __name__ == "__main__":
    for wanted in (signal.SIGINT, signal.SIGTERM):  # so that what it has started ends with it
        signal.signal(wanted, _interrupt)
    raise SystemExit(main())

"""What script/compare_methods.sh --budget equal needs: entries as command lines whose networks cost the same.

Prints lines of fields between tabs: `plan TEXT` for reading; `run ENTRY FOLDER FLAGS` for every entry and seed, in the
order in which they are to be made; `time ENTRY FOLDER CHECKPOINT` for a run of every entry; `compare FLAGS`.
"""

import hashlib
import json
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from dataset import open_source
from method import Method, method_options, methods
from method.costs import training_macs
from model import BackboneRequest, backbones, build_splitnet
from model.budget import budget_widths
from model.division.resizing import undivided_request
from model.splitnet import SplitNet
from opening.data import source_request
from parser_params import Config, parse_config, resolve_config
from recipe.datasets import ROWS
from record.equal_budget import BUDGETS, TRAININGS, is_within
from record.run_folder import RESULTS
from record.runs import NOT_COMPARED
from utils.command_line import OneLineParser
from utils.errors import RunError, UserError
from utils.macs import count_macs, count_params
from utils.options import OF_CALL, flags_of
from utils.text import fit_streams

DEFAULT = (
    "independent:1 independent:4@both co_training:4@both packed:4 mimo batch_ensemble:4@macs batch_ensemble:4@params "
    "mc_dropout:10@params snapshot:4@both one kd"
)
RULES = (*BUDGETS, "asis")
# what remains of a method's recipe where all rows train alike: the views that define it, and the cycles of snapshots
OWN_RECIPE = {"is_diff_data_train"}
CYCLES = {"lr_mode", "lr_cycles", "slow_start_epochs", "end_lr"}
_ENTRY = re.compile(r"([a-z]\w*)(?::(\d+))?(?:@(\w+))?((?:\+\w+=[^+\s]+)*)")


@dataclass(frozen=True)
class Entry:
    """One row: METHOD[:N][@RULE][+flag=value…].

    Attributes:
        asked: as it was written.
        method: its name.
        count: members or networks; None: the method's own number, or 1.
        rule: what of the undivided network is met, or "asis": nothing is solved.
        flags: of the method, by name.
    """

    asked: str
    method: str
    count: int | None
    rule: str
    flags: Mapping[str, str]

    @classmethod
    def read(cls, text: str, rule: str) -> "Entry":
        """An entry as it is written; `rule`: where it says none.

        Raises:
            UserError: it is none, or sets what is the same for all rows.
        """
        match = _ENTRY.fullmatch(text)
        if match is None:
            raise UserError(f"--methods {text}: expected METHOD[:N][@RULE][+flag=value].")
        method, count, own_rule, flags = match.groups()
        if method not in method_options:
            raise method_options.unknown(method)
        if own_rule is not None and own_rule not in RULES:
            raise UserError(f"--methods {text}: @{own_rule} is no rule; expected {', '.join(RULES)}.")
        if count is not None and int(count) < 1:
            raise UserError(f"--methods {text}: expected 1 or more members or networks.")
        pairs = [part.split("=", 1) for part in flags.split("+") if part]
        entry = cls(text, method, None if count is None else int(count), own_rule or rule, dict(pairs))
        known = entry.options - {"num_members", "teacher"}
        for name in entry.flags:
            if name not in known:
                raise UserError(
                    f"--methods {text}: --{name} is none of the flags that rows of --method {method} may differ in "
                    f"({', '.join(sorted(known)) or 'there are none'}); what holds for all rows stands behind --."
                )
        if entry.flags.get("packed_alpha", "auto") != "auto" and entry.rule != "asis":
            raise UserError(
                f"--methods {text}: --packed_alpha says the widths, and @{entry.rule} solves them: write @asis."
            )
        return entry

    @cached_property
    def options(self) -> set[str]:
        """Names of the method's own flags."""
        return {flag.name for flag in flags_of(method_options.get(self.method))}

    @property
    def has_members(self) -> bool:
        """Whether --num_members counts, in place of networks."""
        return "num_members" in self.options

    @property
    def has_teacher(self) -> bool:
        """Whether the method needs a trained network, which the undivided one's run is."""
        return "teacher" in self.options

    @property
    def text(self) -> str:
        """The entry in one form, for folders."""
        count = "" if self.count is None else f":{self.count}"
        rule = "" if self.rule == "both" else f"@{self.rule}"
        return f"{self.method}{count}{rule}" + "".join(f"+{name}={value}" for name, value in self.flags.items())


@dataclass(frozen=True)
class Row:
    """An entry with the flags of its runs.

    Attributes:
        entry: what was asked for.
        words: flags of the run but for seed and folders.
        config: what they say.
        widths: solved stage widths; None: those that the networks have anyway.
        params, macs: of what is deployed, counted from the built networks.
        training: multiply-adds of one training image; None where they are not known.
        note: what to say of it.
    """

    entry: Entry
    words: list[str]
    config: Config
    widths: tuple[float, ...] | None
    params: int
    macs: int
    training: float | None
    note: str = ""

    @property
    def name(self) -> str:
        """What the table calls it."""
        return self.entry.asked

    @cached_property
    def digest(self) -> str:
        """Of the settings that decide what comes out, so that equal runs share a folder."""
        choices = self.config.resume_choices()
        given = {
            name: value
            for name, value in self.config.given.items()
            if name not in NOT_COMPARED and (name == "data" or choices[name] != OF_CALL)
        }
        text = json.dumps(given, sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:8]


class Planner:
    """The rows of a comparison.

    Args:
        arch: the undivided network.
        common: flags of all runs.
        more: flags of all runs that come last, as the user gave them.
        budget_of: what rows have in common with the undivided network, where they do not say it.
    """

    def __init__(self, arch: str, common: Sequence[str], more: Sequence[str], budget_of: str, cache: Path) -> None:
        self.arch, self.common, self.more, self.budget_of = arch, [*common], [*more], budget_of
        self.cache = cache
        config = self._parsed(["--method", "independent", "--arch", arch])
        if "," in arch or config.split_factor != 1 or config.stage_widths:
            flag = "arch" if "," in arch else "split_factor" if config.split_factor != 1 else "stage_widths"
            raise UserError(f"--{flag}: a comparison at equal budget has one undivided --arch, and solves the rest.")
        for flag in ("method", "arch", "seed", "model_dir", "resume", "num_members", "teacher"):
            if any(word.replace("-", "_").partition("=")[0] == f"__{flag}" for word in more):
                raise UserError(f"--{flag} cannot go with --budget equal: the comparison sets it.")
        self.num_classes, self.data_recipe, self.crop_size = self._data(config)
        self.base = self._resolved(config)
        self.undivided = undivided_request(self.base.backbone_request(self.num_classes))
        with torch.device("meta"):
            network = build_splitnet(self.undivided, seed=0)
        self.budgets = count_params(network), count_macs(network, self._image)

    @property
    def _image(self) -> tuple[int, int, int]:
        return 3, self.base.crop_size, self.base.crop_size

    def _data(self, config: Config) -> tuple[int, str, int | None]:
        """(classes, row of the recipes, side in pixels where the data says it)."""
        row = ROWS.get(config.dataset)
        if row is not None and row.num_classes is not None:
            return row.num_classes, config.dataset, None
        source = open_source(source_request(config, self.cache))
        return len(source.classes), source.recipe, source.crop_size

    def _words(self, entry: Entry, own: Sequence[str]) -> list[str]:
        """Flags of a row: its own, the common ones, the user's."""
        common = self.common
        if entry.method == "snapshot" and entry.flags.get("snapshot_lr") != "as_given" and "--lr_mode" in common:
            at = common.index("--lr_mode")  # it has cycles of its own
            common = [*common[:at], *common[at + 2 :]]
        return [*own, *common, *self.more]

    def _parsed(self, words: Sequence[str]) -> Config:
        return parse_config([*words, *self.common, *self.more], program="compare_methods.sh")

    def _resolved(self, config: Config) -> Config:
        crop = self.crop_size or config.crop_size
        return resolve_config(config, data_recipe=self.data_recipe, crop_size=crop)

    def row(self, entry: Entry) -> Row:
        """An entry with its solved widths.

        Raises:
            UserError: flags that the method does not take, or networks that cannot be given other widths.
        """
        count = entry.count or 1
        own = ["--method", entry.method]
        if entry.has_members:
            own += ["--arch", self.arch] + ([] if entry.count is None else ["--num_members", str(count)])
        elif entry.rule == "asis":
            own += ["--arch", ",".join([self.arch] * count)]
        else:
            own += ["--arch", self.arch] + (["--split_factor", str(count)] if count > 1 else [])
        own += [word for name, value in entry.flags.items() for word in (f"--{name}", value)]
        if "member_loss" in entry.options and "member_loss" not in entry.flags:
            own += ["--member_loss", "sum"]
        own += self._without_recipe(entry, own)
        if entry.rule == "asis":
            return self._counted(entry, own, None)
        config = self._resolved(parse_config(self._words(entry, own), program="compare_methods.sh"))
        widths, note = None, ""
        try:
            widths = budget_widths(*self._deployed(config), entry.rule, self.budgets)
            solved = [] if widths is None else ["--stage_widths", ",".join(f"{width:g}" for width in widths)]
            row = self._counted(entry, [*own, *solved], widths)
        except UserError as error:
            if entry.has_members or count == 1:
                raise
            note = f"; divided as {self.arch} usually is, because {str(error)[:160]}"
            solved = (
                [] if entry.rule == "both" or backbones.get(self.arch).plan is None else ["--divide_by", entry.rule]
            )
            row = self._counted(entry, [*own, *solved], None)
        return replace(row, note=note)

    def _without_recipe(self, entry: Entry, own: Sequence[str]) -> list[str]:
        """Flags that put the comparison's values in the places of those that the method's recipe has."""
        words = self._words(entry, own)
        given = parse_config(words, program="compare_methods.sh").given
        kept = entry.options | OWN_RECIPE | (CYCLES if entry.method == "snapshot" else set())
        recipe = methods.get(entry.method).recipe(self.data_recipe, given.get("epochs"), given)
        values = self.base.values()
        names = [name for name in recipe if name not in kept and name not in given and values.get(name) is not None]
        return [word for name in names for word in (f"--{name}", *_flag_words(values[name]))]

    def _deployed(self, config: Config) -> tuple[BackboneRequest, int]:
        """(the undivided network's request with the form of the members, networks that are deployed)."""
        kind, options = methods.get(config.method), config.method_options
        request = replace(self.undivided, form=kind.member_form(options, self.undivided, 0))
        count = len(kind.backbone_names(config.arch, options)) if config.split_factor == 1 else config.split_factor
        if request.form is not None:
            return request, 1
        return request, 1 if _leader_alone(options) else count

    def _counted(self, entry: Entry, own: list[str], widths: tuple[float, ...] | None) -> Row:
        """The row with sizes counted from its networks."""
        words = self._words(entry, own)
        config = self._resolved(parse_config(words, program="compare_methods.sh"))
        kind, options = methods.get(config.method), config.method_options
        request = config.backbone_request(self.num_classes)
        names = kind.backbone_names(config.arch, options)
        request = replace(request, arch=names[0], form=kind.member_form(options, request, 0))
        with torch.device("meta"):
            network = build_splitnet(request, seed=0, archs=names if len(names) > 1 else None)
        deployed: Any = network
        training: float | None
        if entry.has_teacher:
            training = self._taught(network, config)
        else:
            method: Method[Any] = kind(network, options)
            deployed, training = method.deployed(), training_macs(method, config.crop_size)
        params, macs = count_params(deployed), count_macs(deployed, self._image)
        return Row(entry, words, config, widths, params, macs, training)

    def _taught(self, network: SplitNet, config: Config) -> float:
        """Multiply-adds of a training image with a teacher, which is the undivided network and sees every view."""
        views = len(network.models) if config.is_diff_data_train else 1
        return count_macs(network, self._image) + views * self.budgets[1]


def _leader_alone(options: Any) -> bool:
    return getattr(options, "okddip_share", "") == "networks" and getattr(options, "okddip_deploy", "") == "leader"


def _flag_words(value: Any) -> list[str]:
    values = value if isinstance(value, list | tuple) else [value]
    return [str(int(item)) if isinstance(item, bool) else str(item) for item in values]


def scaled_epochs(rows: Sequence[Row], epochs: int) -> list[int]:
    """Epochs by which every row trains with the multiply-adds of the first, to whole epochs.

    Raises:
        UserError: what a row's training costs is not known.
    """
    first = rows[0].training
    for row in rows:
        if row.training is None or first is None:
            raise UserError(
                f"--equal_training macs: what a step of {row.name} costs is not known. Leave one of it out."
            )
    assert first is not None
    return [max(1, round(epochs * first / row.training)) for row in rows if row.training is not None]


def plan(arguments: Any) -> list[tuple[str, ...]]:
    """The lines of a comparison."""
    out = Path(arguments.out)
    planner = Planner(arguments.arch, arguments.common, arguments.more, arguments.budget_of, out)
    entries = [Entry.read(text, arguments.budget_of) for text in arguments.methods.replace(",", " ").split()]
    rows: list[Row] = []
    for entry in entries:
        row = planner.row(entry)
        if any(row.digest == other.digest and row.entry.method == other.entry.method for other in rows):
            raise UserError(f"--methods {row.name}: makes the same runs as an entry before it. Leave it out.")
        rows.append(row)
    if not rows:
        raise UserError("--methods: there is no entry to compare.")
    undivided = planner.row(Entry.read("independent:1", "asis"))
    reference = next((row for row in rows if row.digest == undivided.digest), undivided)
    epochs = planner.base.epochs
    lengths = dict.fromkeys((row.name for row in (*rows, reference)), epochs)
    if arguments.equal_training == "macs":
        lengths |= dict(zip((row.name for row in rows), scaled_epochs(rows, epochs), strict=True))
    lines: list[tuple[str, ...]] = [("plan", _sentence(planner))]
    lines += [("plan", _described(row, planner, lengths[row.name], rows[0])) for row in rows]
    folders: list[Path] = []
    teachers: dict[str, Path] = {}

    def make(row: Row, seed: str) -> Path:
        own = ["--epochs", str(lengths[row.name])] if arguments.equal_training == "macs" else []
        digest = row.digest + (f"-{lengths[row.name]}e" if own else "")
        if row.entry.has_teacher:
            if seed not in teachers:
                teachers[seed] = make(reference, seed)
            digest += "-" + teachers[seed].name.split("_")[-2]
            own += ["--teacher", str(teachers[seed] / f"checkpoint_{lengths[reference.name]}.pth.tar")]
        folder = _folder(out, planner, row.entry.text, digest, seed)
        words = [*row.words[: len(row.words) - len(planner.more)], *own, "--seed", seed, "--model_dir", str(folder)]
        lines.append(("run", row.name, str(folder), shlex.join([*words, *planner.more])))
        if row is reference:
            teachers[seed] = folder
        return folder

    for seed in arguments.seeds.replace(",", " ").split():
        if not seed.isdecimal():
            raise UserError(f"--seeds {seed}: expected numbers.")
        for row in rows:
            if row is reference and seed in teachers:
                folders.append(teachers[seed])
                continue
            folders.append(make(row, seed))
    for row, folder in zip(rows, folders, strict=False):  # the first seed's
        lines.append(("time", row.name, str(folder), str(folder / f"checkpoint_{lengths[row.name]}.pth.tar")))
    given = ["--budget", "equal", "--budget_of", arguments.budget_of, "--equal_training", arguments.equal_training]
    given += ["--reference", ",".join(map(str, planner.budgets)), "--entries", " ".join(row.name for row in rows)]
    lines.append(("compare", shlex.join([*given, "--out", str(out / "compare"), *map(str, folders)])))
    return lines


def _folder(out: Path, planner: Planner, entry: str, digest: str, seed: str) -> Path:
    """Where a run lies: where one of the same settings and seed is already, else under the entry's name."""
    known = sorted(path.parent for path in out.glob(f"*_{digest}_seed{seed}/{RESULTS}"))
    if known:
        return known[0]
    name = re.sub(r"[^\w.:@+=-]", "-", f"{planner.base.dataset}_{planner.arch}_{entry}")
    return out / f"{name}_{digest}_seed{seed}"


def _sentence(planner: Planner) -> str:
    params, macs = planner.budgets
    return f"the budget: {planner.arch}, {params:,} parameters, {macs:,} MACs"


def _described(row: Row, planner: Planner, epochs: int, first: Row) -> str:
    ratios = row.params / planner.budgets[0], row.macs / planner.budgets[1]
    widths = "as it is" if row.widths is None else "widths " + " ".join(f"{width:g}" for width in row.widths)
    cost = ""
    if row.training is not None and first.training is not None:
        cost = f", a training image {row.training / first.training:.3f} of the first row's MACs"
    return (
        f"{row.name}: {widths}; {row.params:,} parameters ({ratios[0]:.3f}), {row.macs:,} MACs ({ratios[1]:.3f}), "
        f"{'equal' if is_within(ratios, planner.budget_of) else 'not equal'}; {epochs} epochs{cost}{row.note}"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    fit_streams()
    words = [*(sys.argv[1:] if argv is None else argv)]
    parser = OneLineParser(prog="compare_methods.sh", description=__doc__)
    parser.add_argument("--methods", default=DEFAULT)
    parser.add_argument("--arch", required=True)
    parser.add_argument("--seeds", required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("--budget_of", choices=BUDGETS, default="both")
    parser.add_argument("--equal_training", choices=TRAININGS, default="epochs")
    at = [i for i, word in enumerate(words) if word == "--"]
    first, second = (at[0], at[1]) if len(at) > 1 else (len(words), len(words))
    try:
        arguments = parser.parse_args(words[:first])
        arguments.common, arguments.more = words[first + 1 : second], words[second + 1 :]
        lines = plan(arguments)
    except (UserError, RunError) as error:
        sys.stderr.write(f"compare_methods.sh: {error}\n")
        return error.exit_code
    for line in lines:
        sys.stdout.write("\t".join(line) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

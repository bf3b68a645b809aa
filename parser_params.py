"""The configuration: one frozen dataclass whose fields are the command-line flags and the keys of a YAML file.

`python parser_params.py --help` prints every flag; `--method NAME --help` adds those of a method. A value comes from,
in this order: an override `KEY VALUE` at the end of the line, a flag, `--config FILE.yaml`, the published recipe of
the data set, backbone and method, the default written here. `Config.origins` keeps where each value came from.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from dataset import sources
from dataset.options import DataOptions
from method import method_options, options_of
from model.options import EXECUTIONS, FAMILIES, ModelOptions, check_freeze
from model.registry import Backbone, archs_matching, backbones, names_user_code, split_list
from recipe.cream_yaml import is_published, is_published_key, read_published
from recipe.datasets import ROWS, row_for
from recipe.fine_tuning import IMAGES_NAME, REPLACED, TRAINING_NAME, fine_tuning
from recipe.own_images import KINDS, SMALL_DEFAULTS, TABLES
from recipe.published import recipe_defaults
from recipe.scaling import scaled_rate
from recipe.transformers import NAME as TRANSFORMERS_NAME
from recipe.transformers import transformers
from training.options import COMPILE_MODES, MachineOptions, OptimizerOptions
from utils.command_line import (
    FlagParser,
    add_flags,
    early_value,
    fenced,
    last_pairs,
    read_yaml,
    with_underscores,
)
from utils.errors import UserError
from utils.options import OF_CALL, SAME, SWITCH, TAKES, Flag, Options, flags_of, option
from utils.packages import SINK_PACKAGES, check_sink
from utils.program import read_flags, show
from utils.registry import nearest_name

if TYPE_CHECKING:  # torch is imported behind the flags, so that --help and a typo are answered at once
    from model.registry import BackboneRequest


@dataclass(frozen=True, kw_only=True)
class RunOptions(Options):
    """Run and files"""

    data: str = option(
        "./data_dir",
        "the data set: its folder, or a file (a table as .csv, .parquet, .tar shards as x-{000..003}.tar)",
        metavar="PATH",
        resume=OF_CALL,
    )
    model_dir: str = option(
        "./model_dir",
        "run directory: checkpoints, logs, pictures",
        aliases=("checkpoint_dir",),
        metavar="DIR",
        resume=OF_CALL,
    )
    resume: str | None = option(
        None,
        "continue from this checkpoint; 'auto', or bare: from the newest in --model_dir",
        aliases=("resume_checkpoint", "evaluate_checkpoint"),
        metavar="PATH|auto",
        bare="auto",
        resume=OF_CALL,
    )
    evaluate: bool = option(False, "evaluate --resume and stop, as eval.py does", bare="1", resume=OF_CALL)
    pretrained: str | None = option(
        None,
        "weights to start from: a checkpoint for all networks, 'library' for those that torchvision or timm publish, "
        "or a comma list with one for each network. Brings its own recipe; a head of another size is made anew",
        metavar="PATH|library",
        bare="library",
        resume="the checkpoint's weights take its place",
    )
    pretrained_dir: str | None = option(None, "published name of --pretrained PATH", metavar="PATH", resume=OF_CALL)
    seed: int | None = option(
        None,
        "seed of everything random",
        aliases=("manual_seed",),
        default_text="drawn, printed and recorded",
        least=0,
        most=2**63 - 1,
        resume=SAME,
    )
    deterministic: bool = option(False, "ask torch for deterministic kernels (slower)", resume=TAKES)
    print_freq: int = option(20, "interval between progress lines", unit="steps", least=1, resume=TAKES)
    max_ckpt_nums: int = option(5, "how many of the newest checkpoints are kept", least=1, resume=TAKES)
    save_steps: int = option(
        0, "also save a checkpoint every so many steps; 0: only after epochs", unit="steps", least=0, resume=TAKES
    )
    is_summary: bool = option(
        False, "print parameters and MACs of the networks and stop; needs no data", resume=OF_CALL
    )
    print_config: bool = option(
        False, "print every value and where it comes from, and stop; needs no data", bare="1", resume=OF_CALL
    )
    dry_run: bool = option(
        False,
        "make one training step and evaluate one batch (and one more of each, timed), say what the run would cost in "
        "time, memory and disk, and stop; leaves nothing behind",
        bare="1",
        resume=OF_CALL,
    )
    list_archs: str | None = option(
        None,
        "print the names that --arch takes and a pattern fits, such as 'resnet5*' or 'timm/*', and stop; bare: all",
        metavar="PATTERN",
        bare="*",
        resume=OF_CALL,
    )
    sink: str | None = option(
        None,
        "send the figures of a training there too; an optional package, which says by its own settings where to",
        choices=tuple(SINK_PACKAGES),
        resume=OF_CALL,
    )
    on_save_error: str = option(
        "warn", "a checkpoint that cannot be written: warn and go on, or stop", choices=("warn", "stop"), resume=TAKES
    )
    on_nonfinite: str = option(
        "stop",
        "a non-finite loss or gradient: stop, or skip the step and count",
        choices=("stop", "skip"),
        resume=TAKES,
    )
    nonfinite_limit: int = option(
        100, "how many steps 'skip' may skip before the run stops", unit="steps", least=1, resume=TAKES
    )
    json: bool = option(
        False, "end with the line of JSON at a terminal too, which shows tables else", bare="1", resume=OF_CALL
    )
    proc_name: str = option("splitnet", "process title (where setproctitle is installed)", resume=OF_CALL)
    config: str | None = option(
        None, "YAML file of flag names and values, or of Cream's published keys", metavar="FILE", resume=OF_CALL
    )


@dataclass(frozen=True, kw_only=True)
class EvaluationOptions(Options):
    """Ensemble and evaluation"""

    is_ensembled_after_softmax: bool = option(False, "average probabilities instead of logits", resume=TAKES)
    is_max_ensemble: bool = option(False, "take the maximum over the networks instead of the mean", resume=TAKES)
    is_test_on_multigpus: bool = option(False, "eval.py: one network per GPU", resume=OF_CALL)
    is_test_with_multistreams: bool = option(False, "eval.py: one CUDA stream per network", resume=OF_CALL)


@dataclass(frozen=True, kw_only=True)
class DeviceOptions(Options):
    """Device, precision and processes"""

    is_amp: bool = option(True, "automatic mixed precision", resume=TAKES)
    amp_dtype: str = option(
        "auto",
        "precision: auto is bf16 where the hardware has it, fp16 with a scaler on older GPUs, else fp32",
        choices=("auto", "bf16", "fp16", "fp32", "fp64"),
        resume=TAKES,
    )
    layout: str = option(
        "auto",
        "memory layout of images and convolution weights; auto: nhwc (channels_last), but nchw in fp64 on a CPU",
        choices=("auto", "nhwc", "nchw"),
        resume=TAKES,
    )
    execution: str = option(
        "loop",
        "how the S networks run: one after another; at the same time (a CUDA stream or CPU thread each); stacked into "
        "one network of S times the channels and groups; or the fastest of these on the first batch. Same results",
        choices=EXECUTIONS,
        resume=TAKES,
    )
    compile: str | None = option(
        None,
        "compile every network for training; bare: default. aot_eager traces without generating code",
        choices=COMPILE_MODES,
        metavar="MODE",
        bare="default",
        resume=TAKES,
    )
    cuda_graph: str = option(
        "0",
        "replay forward, backward and update as one CUDA graph (one GPU), and the passes of long evaluations; auto: "
        "where a step can be, and as before in a run that goes on",
        choices=SWITCH,
        resume=TAKES,
    )
    is_apex_amp: bool = option(False, "refused: apex is gone, use --is_amp", resume=OF_CALL)
    amp_opt_level: str = option("O1", "apex's level; accepted", resume=OF_CALL)
    gpu: int | None = option(None, "the one GPU to use", resume=OF_CALL)
    gpu_ids: str | None = option(
        None, "GPUs to use, as '0,1'", aliases=("gpu_id",), default_text="all visible", resume=OF_CALL
    )
    threads: int | None = option(
        None,
        "threads of the CPU for each process; S networks in parallel share them",
        default_text="OMP_NUM_THREADS, else as a container and the affinity allow; a resumed run keeps its own",
        least=1,
        resume=OF_CALL,
    )
    no_cuda: bool = option(False, "run on the CPU", bare="1", resume=OF_CALL)
    multiprocessing_distributed: bool = option(
        False, "start one process per GPU (or --nproc_per_node on a CPU)", bare="1", resume=OF_CALL
    )
    nproc_per_node: int | None = option(
        None, "processes per node of that launcher", default_text="one per GPU", least=1, resume=OF_CALL
    )
    world_size: int = option(1, "number of nodes (torchrun's environment wins)", least=1, resume=OF_CALL)
    rank: int = option(0, "number of this node", least=0, resume=OF_CALL)
    local_rank: int | None = option(
        None, "what launchers pass; accepted, their LOCAL_RANK decides", default_text="none", resume=OF_CALL
    )
    dist_url: str = option("env://", "where the processes meet, as tcp://HOST:PORT", resume=OF_CALL)
    dist_backend: str = option(
        "auto", "auto is nccl on GPUs and gloo on CPUs", choices=("auto", "nccl", "gloo"), resume=OF_CALL
    )


GPU_EVAL_BATCH = 1000  # images

SECTIONS: tuple[type, ...] = (
    RunOptions,
    DataOptions,
    ModelOptions,
    OptimizerOptions,
    EvaluationOptions,
    DeviceOptions,
    MachineOptions,
)


@dataclass(frozen=True, kw_only=True)
class Config(MachineOptions, DeviceOptions, EvaluationOptions, OptimizerOptions, ModelOptions, DataOptions, RunOptions):
    """Everything that decides a run.

    Attributes:
        method_options: instance of the method's own `Options`.
        extra_options: instance of the options that one entry point adds (eval.py's), or None.
        backbone_options: flags that belong to single families of backbones, by name.
        given: what the user set, by flag name; nothing else may be replaced by a recipe.
        origins: flag name -> flag, override, yaml, recipe, data (what --data holds) or default.
        warnings: what to tell the user of --config, one line each.
    """

    method_options: Any = None
    extra_options: Any = None
    backbone_options: Mapping[str, Any] = field(default_factory=dict)
    given: Mapping[str, Any] = field(default_factory=dict)
    origins: Mapping[str, str] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()

    PRIVATE: ClassVar[frozenset[str]] = frozenset(
        {"method_options", "extra_options", "backbone_options", "given", "origins", "warnings"}
    )

    def values(self) -> dict[str, Any]:
        """Every flag's value by name, as plain data (tuples become lists)."""
        own = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in self.PRIVATE}
        own.update(self.backbone_options)
        for options in (self.method_options, self.extra_options):
            if options is not None:
                own.update(dataclasses.asdict(options))
        return {name: list(value) if isinstance(value, tuple) else value for name, value in own.items()}

    def described(self) -> dict[str, dict[str, Any]]:
        """Value and origin of every flag, for hparams_train.json."""
        return {
            name: {"value": value, "origin": self.origins.get(name, "default")} for name, value in self.values().items()
        }

    def resume_choices(self) -> dict[str, str | None]:
        """What a resumed run does with another value of each flag."""
        return {flag.name: flag.resume for _, flags in _sections(self.method, self.extra) for flag in flags}

    @property
    def extra(self) -> type | None:
        """The class of `extra_options`."""
        return None if self.extra_options is None else type(self.extra_options)

    def backbone_request(self, num_classes: int) -> BackboneRequest:
        """What the flags say of the networks, for K classes."""
        from model.build import backbone_request

        return backbone_request(
            self,
            dataset=self.dataset,
            crop_size=self.crop_size,
            num_classes=num_classes,
            of_families=self.backbone_options,
        )

    def gpus(self) -> list[int]:
        """Numbers of the GPUs that the run may use; empty means the CPU.

        Raises:
            UserError: an id that is no number or does not exist.
        """
        from utils import launch

        return launch.visible_gpus(no_cuda=self.no_cuda, gpu=self.gpu, gpu_ids=self.gpu_ids)

    def evaluation_batch(self, *, in_memory: bool, on_gpu: bool) -> int:
        """Images of a batch in evaluation: --eval_batch_size, but a GPU takes images in memory by GPU_EVAL_BATCH where
        nobody has said a number. It is busy with a hundred small images for a shorter time than they take to hand over.
        """
        is_free = self.origins.get("eval_batch_size", "default") == "default"
        return GPU_EVAL_BATCH if is_free and in_memory and on_gpu else self.eval_batch_size

    def start_processes(self, target: Callable[..., None], arguments: tuple[Any, ...]) -> None:
        """The published launcher: call `target(*arguments)` in this node's processes, and wait for them.

        Raises:
            UserError: several nodes without a meeting point.
            SystemExit: a process failed and has said why.
        """
        from utils import launch

        launch.spawn(
            target,
            arguments,
            processes=self.nproc_per_node or len(self.gpus()) or 1,
            nodes=self.world_size,
            node=self.rank,
            url=self.dist_url,
        )

    def archs(self) -> list[str]:
        """The backbones named by --arch, one entry unless it is a comma list."""
        return split_list(self.arch)


# ---- the parser ------------------------------------------------------------------------------------------------------


def _title(options: type) -> str:
    return (options.__doc__ or options.__name__).strip().splitlines()[0].rstrip(".")


def _sections(method: str, extra: type | None = None) -> list[tuple[str, Sequence[Flag]]]:
    """(title, flags) of every group: the entry point's own first, the method's and the backbone families' last."""
    sections: list[tuple[str, Sequence[Flag]]] = [(_title(extra), flags_of(extra))] if extra else []
    sections += [(_title(section), flags_of(section)) for section in SECTIONS]
    sections.append((f"Method: {method}", flags_of(options_of(method))))
    sections += [(_title(options), flags_of(options)) for options in FAMILIES]
    return sections


def build_parser(method: str, program: str | None = None, extra: type | None = None) -> argparse.ArgumentParser:
    """The parser of all flags, with those of one method and of one entry point."""
    parser = FlagParser(
        prog=program,
        usage=getattr(extra, "usage", "%(prog)s [--flag VALUE ...] [KEY VALUE ...]"),
        description=getattr(extra, "about", "Divide a backbone into S small networks and train them together."),
        epilog=(
            f"Data sets: {', '.join(sources.names())}. Methods: {', '.join(method_options.names())}. "
            f"Backbones: {', '.join(backbones.names())}. Accuracies are in percent. "
            "Exit codes: 2 wrong input, 1 failed run."
        ),
        allow_abbrev=False,
    )
    for title, flags in _sections(method, extra):
        add_flags(parser, title, flags)
    parser.add_argument(
        "overrides", nargs="*", metavar="KEY VALUE", help="flag names and values, winning over all else"
    )
    return parser


def _published_part(pairs: Sequence[str]) -> list[str]:
    """Of KEY VALUE pairs, those whose key is in capitals."""
    return [text for i in range(0, len(pairs) - 1, 2) if is_published_key(pairs[i]) for text in pairs[i : i + 2]]


def _method_name(argv: Sequence[str], overrides: Sequence[str], from_yaml: Mapping[str, Any]) -> str:
    """The method, which decides what flags exist: an override, a flag, the YAML file, the default."""
    named = dict(zip(overrides[::2], overrides[1::2], strict=False))
    return named.get("method") or early_value(argv, "method") or str(from_yaml.get("method", ModelOptions.method))


def _known_flags(method: str, extra: type | None = None) -> dict[str, Flag]:
    """Flag by name and by alias."""
    return {
        name: flag for _, flags in _sections(method, extra) for flag in flags for name in (flag.name, *flag.aliases)
    }


def _lookup(known: Mapping[str, Flag], name: str, where: str) -> Flag:
    plain = name.lstrip("-").replace("-", "_")
    if plain not in known:
        raise UserError(f"{where} is not a known flag.{nearest_name(plain, known)} See --help.")
    return known[plain]


def parse_config(argv: Sequence[str] | None = None, program: str | None = None, extra: type | None = None) -> Config:
    """Command line -> Config. Values that a recipe may supply still hold their defaults: see `resolve_config`.

    Args:
        argv: the arguments without the program's name; None takes those of the process.
        program: name shown in the help.
        extra: options dataclass of the entry point's own flags.

    Raises:
        UserError: an unknown flag, key or name, a value that cannot be used, or flags that contradict each other.
    """
    arguments = [with_underscores(argument) for argument in (sys.argv[1:] if argv is None else argv)]
    yaml_path = early_value(arguments, "config")
    from_yaml = read_yaml(yaml_path) if yaml_path else {}
    early = last_pairs(arguments)
    published = None
    if is_published(from_yaml):
        from utils import launch

        published = read_published(
            from_yaml,
            where=f"--config {yaml_path}",
            overrides=_published_part(early),
            processes=launch.processes_on_this_machine(),
        )
        from_yaml = published.flags
    method = _method_name(arguments, early, from_yaml)
    parser = build_parser(method, program, extra)
    known = _known_flags(method, extra)

    def is_key(text: str) -> bool:
        return text.replace("-", "_") in known or (published is not None and is_published_key(text))

    namespace, unknown = parser.parse_known_args(fenced(arguments, early, is_key))
    for token in unknown:
        _lookup(known, token.split("=", 1)[0], token.split("=", 1)[0])
        raise UserError(f"{token}: unexpected here. Write '--flag value', and overrides 'KEY VALUE' last.")

    given: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for key, value in from_yaml.items():
        flag = _lookup(known, key, f"--config {yaml_path}: {key!r}")
        if flag.name in given:
            raise UserError(f"--config {yaml_path}: {key!r} is another name of a flag that stands there too; keep one.")
        given[flag.name] = flag.parse(value, f"--config {yaml_path}: {key}", key.replace("-", "_"))
        origins[flag.name] = "yaml"
    raw = vars(namespace)
    overrides = raw.pop("overrides")
    for name, (spelling, value) in raw.items():
        parsed = known[name].parse(value, f"--{spelling}", spelling)
        if published is None or name not in published.overridden:
            given[name], origins[name] = parsed, "flag"
    if len(overrides) % 2:
        raise UserError(f"{overrides[-1]!r}: overrides at the end of the line are KEY VALUE pairs; one has no value.")
    if published is not None and _published_part(overrides) != _published_part(early):
        raise UserError(f"{_published_part(overrides)[0]}: write the KEY VALUE pairs of --config behind all flags.")
    for key, value in zip(overrides[::2], overrides[1::2], strict=True):
        if published is not None and is_published_key(key):
            continue  # in from_yaml already
        flag = _lookup(known, key, f"override {key!r}")
        given[flag.name] = flag.parse(value, f"override {key}", key.replace("-", "_"))
        origins[flag.name] = "override"
    if "pretrained" not in given and given.get("pretrained_dir"):
        given["pretrained"] = given["pretrained_dir"]
        origins["pretrained"] = origins["pretrained_dir"]
    if published is not None:
        origins |= dict.fromkeys(published.overridden, "override")
    _check(_assemble(method, given, origins, extra=extra))
    from method import methods  # imports torch, and with it takes seconds: behind all that is refused without

    implied = methods.get(method).implied_flags(given)
    given |= implied
    origins |= dict.fromkeys(implied, "method")
    config = _assemble(method, given, origins, extra=extra)
    _check(config)
    counts_only = config.is_summary and "data" not in given  # needs no data, and shall not depend on what lies there
    if "dataset" not in given and not (counts_only or config.list_archs):
        from dataset.detect import kind_of

        found = kind_of(config.data, is_chosen="data" in given)
        if found is not None:
            config = dataclasses.replace(config, dataset=found, origins={**origins, "dataset": "data"})
    _check_data_and_method(config)
    return config if published is None else dataclasses.replace(config, warnings=tuple(published.warnings))


def _fill(options: type, values: Mapping[str, Any]) -> Any:
    """An options dataclass from those of the values that are its fields."""
    names = {f.name for f in dataclasses.fields(options)}
    return options(**{name: value for name, value in values.items() if name in names})


def _assemble(
    method: str,
    values: Mapping[str, Any],
    origins: Mapping[str, str],
    *,
    extra: type | None = None,
    given: Mapping[str, Any] | None = None,
) -> Config:
    """A Config from values by flag name, each put into the section that it belongs to."""
    own = {f.name for f in dataclasses.fields(Config)}
    backbone_flags = [flag for options in FAMILIES for flag in flags_of(options)]
    backbone_options = {flag.name: values.get(flag.name, flag.default) for flag in backbone_flags}
    for flag in backbone_flags:
        flag.check(backbone_options[flag.name], f"--{flag.name}")
    return Config(
        **{name: value for name, value in values.items() if name in own},
        method_options=_fill(options_of(method), values),
        extra_options=_fill(extra, values) if extra else None,
        backbone_options=backbone_options,
        given=dict(values) if given is None else dict(given),
        origins=dict(origins),
    )


def resolve_config(
    config: Config,
    *,
    data_recipe: str,
    crop_size: int | None = None,
    is_drawn: bool = False,
    nodes: int = 1,
    start: Mapping[str, Any] | None = None,
    by_network: bool = True,
    began_at: int | None = None,
) -> Config:
    """Fill in what the user left open: the method's recipe, then the data set's, then the data's own crop size.

    Images of a user's own take the small default (`recipe.own_images`) where nobody names an --arch. (Not under
    --dataset folder with a split of its own, which trained before there was that default, and trains as it did.)

    Args:
        config: from `parse_config`.
        data_recipe: row of the published recipes that the data takes (`DataSource.recipe`).
        crop_size: the data's own input size, where the recipe does not know it (folder, synthetic).
        is_drawn: the data came without a split.
        nodes: whose images an update takes.
        start: for a run that fine-tunes pretrained weights, `recipe.fine_tuning.image_flags` of these, as far as
            somebody says them; None: another run.
        by_network: transformers of libraries have a recipe of their own (`recipe.transformers`); not so for a run that
            began before there was one.
        began_at: side of the images of the run that goes on, if one does.
    """
    from method import methods

    given = dict(config.given)
    from_method = dict(methods.get(config.method).recipe(data_recipe, given.get("epochs"), given))
    if config.dataset not in ROWS:  # open data sets know their own statistics
        from_method = {name: value for name, value in from_method.items() if name not in ("mean", "std")}
    if start is not None:
        from_method = {name: value for name, value in from_method.items() if name not in REPLACED}
    mixer_flags: dict[str, Any] = {}
    if start is None and by_network:
        mixer_flags = _of_transformers(config, data_recipe, crop_size, {**from_method, **given})
        replaced = {*mixer_flags, *_OF_SGD} if "optimizer" in mixer_flags else {*mixer_flags}
        from_method = {name: v for name, v in from_method.items() if name not in replaced or name == "batch_size"}
    supplied = {**from_method, **given}
    small, line = None, ""
    instead: dict[str, Any] = {}
    if config.dataset in KINDS and "arch" not in supplied and not (given.get("dataset") == "folder" and not is_drawn):
        small = SMALL_DEFAULTS[data_recipe]
        config = dataclasses.replace(config, arch=small.training["arch"])
        if start is None:
            instead, line = _scaled(small.training, supplied, nodes)
        else:
            instead = {"arch": config.arch}
    if mixer_flags:
        flags, line = _scaled(mixer_flags, supplied, nodes) if "lr" in mixer_flags else (mixer_flags, line)
        instead |= flags
    images = {} if start is None else _images(start, data_recipe)
    if start is not None:
        size = given.get("crop_size") or images.get("crop_size") or crop_size
        tuned = fine_tuning(layer_norm=_has_layer_norm(config, size), optimizer=given.get("optimizer"))
        flags, line = _scaled(tuned, supplied, nodes)
        instead |= flags
    arch = split_list(supplied.get("arch", config.arch))[0]
    backbone = None
    if config.dataset == "imagenet":
        backbone = _with_own_size(arch, is_mixer=bool(mixer_flags), by_network=by_network, began_at=began_at)
    defaults, adjusted = recipe_defaults(
        data_recipe=data_recipe,
        dataset=config.dataset,
        arch=arch,
        split_factor=config.split_factor if len(config.archs()) == 1 else 1,
        epochs=supplied.get("epochs"),
        batch_size=supplied.get("batch_size"),
        given=supplied,
        own_size=None if backbone is None else backbone.crop_size,
        instead=instead,
    )
    if backbone is not None:
        defaults["crop_pct"] = backbone.crop_pct
    if crop_size is not None:
        defaults.setdefault("crop_size", crop_size)  # open data sets know their size, the recipe does not
    defaults |= images
    # settled before the data was opened
    values = {**defaults, **from_method, **given, **adjusted, "seed": config.seed, "dataset": config.dataset}
    origins = dict.fromkeys((*defaults, *from_method), "recipe") | dict(config.origins)
    if small is not None and start is None:
        origins |= {name: f"recipe: {small.name}" for name in small.training if name not in supplied}
    origins |= {name: f"recipe: {TRANSFORMERS_NAME}" for name in mixer_flags if name not in supplied}
    if start is not None:
        origins |= {name: f"recipe: {TRAINING_NAME}" for name in tuned if name not in supplied}
        origins |= {name: f"recipe: {IMAGES_NAME}" for name in images if name not in supplied}
    origins |= {name: f"{origins.get(name, 'default')}, adjusted" for name in adjusted if name in given}
    known = _known_flags(config.method, config.extra)
    values = {name: value for name, value in values.items() if name in known}
    origins = {name: origin for name, origin in origins.items() if name in known}
    resolved = _assemble(config.method, values, origins, extra=config.extra, given=given)
    resolved = dataclasses.replace(resolved, warnings=(*config.warnings, *filter(None, [line])))
    _check(resolved)
    _check_data_and_method(resolved)
    return resolved


def _with_own_size(arch: str, *, is_mixer: bool, by_network: bool, began_at: int | None) -> Backbone | None:
    """The network whose own size of images is imagenet's: any of ours, of libraries' transformers and what else is
    built for one size, unless a run goes on that began with another.
    """
    if arch in backbones:
        return backbones.get(arch)
    if not by_network or "/" not in arch or names_user_code(arch):
        return None
    entry = backbones.get(arch)
    has_size = is_mixer or (entry.takes_size is not None and entry.takes_size(arch))
    return entry if has_size and began_at in (None, entry.crop_size) else None


def _images(start: Mapping[str, Any], data_recipe: str) -> dict[str, Any]:
    """Of the flags under which pretrained weights see what they were trained on, those that the data can obey.

    Small images are in memory at their own size. Where nobody says what weights for large images want, it is what
    ImageNet's networks are trained on.
    """
    if not ROWS[data_recipe].is_large:
        return {name: value for name, value in start.items() if name in ("mean", "std")}
    if start:
        return dict(start)
    mean, std = ROWS["imagenet"].published_statistics
    return {"mean": mean, "std": std}


# of methods' published recipes for ConvNets: what goes with their optimiser
_OF_SGD = ("momentum", "is_nesterov", "is_wd_all", "lr_milestones", "lr_step_multiplier", "dks_fresh_optimizer")


def _of_transformers(
    config: Config, data_recipe: str, crop_size: int | None, supplied: Mapping[str, Any]
) -> dict[str, Any]:
    """The recipe of the first network, where that is a transformer or token mixer of a library; {} elsewhere."""
    from method import methods

    names = methods.get(config.method).backbone_names(config.arch, config.method_options)
    if not names or names_user_code(names[0]) or (entry := backbones.get(names[0])).token_mixer is None:
        return {}
    request = dataclasses.replace(config, crop_size=crop_size or config.crop_size).backbone_request(2)
    kind = entry.token_mixer(dataclasses.replace(request, arch=names[0]))
    if kind is None:
        return {}
    return transformers(
        ROWS[data_recipe],
        kind,
        epochs=supplied.get("epochs"),
        optimizer=config.given.get("optimizer"),
        alone=len(names) == 1,
    )


def _has_layer_norm(config: Config, crop_size: int | None) -> bool:
    """Whether the first network normalises by layers, which decides the optimiser that fine-tunes it."""
    from model.pretrained import has_layer_norm

    request = dataclasses.replace(config, crop_size=crop_size or config.crop_size).backbone_request(2)
    return has_layer_norm(dataclasses.replace(request, arch=config.archs()[0]))


def _scaled(recipe: Mapping[str, Any], supplied: Mapping[str, Any], nodes: int) -> tuple[dict[str, Any], str]:
    """The recipe's flags, its rate scaled to the images of an update unless somebody chose the rate; and a line."""
    flags = dict(recipe)
    is_another = supplied.get("optimizer") not in (None, flags.get("optimizer"))
    if is_another or supplied.keys() & {"lr", "is_linear_lr"}:
        return flags, ""
    images = supplied.get("batch_size", flags["batch_size"]) * supplied.get("iters_to_accumulate", 1) * nodes
    flags["lr"], line = scaled_rate(flags["lr"], batch_size=flags["batch_size"], images_per_update=images)
    return flags, line


def _check(config: Config) -> None:
    """Refuse values and combinations that cannot work, each in one line that names the flags."""

    def need(condition: bool, message: str) -> None:
        if not condition:
            raise UserError(message)

    need(not config.is_apex_amp, "--is_apex_amp 1: apex is gone; use --is_amp 1 (and --amp_dtype).")
    if config.dataset not in sources:
        raise sources.unknown(config.dataset)
    names = config.archs()
    need(bool(names), "--arch needs the name of a backbone.")
    if config.freeze is not None:
        check_freeze(config.freeze)
    if config.sink is not None:
        check_sink(config.sink)
    need(
        not (config.dry_run and config.exchange is not None),
        "--dry_run meets no peers, and --exchange learns from them: leave one of them away.",
    )
    need(
        len(names) == 1 or config.split_factor in (1, len(names)),
        f"--arch names {len(names)} networks and --split_factor is {config.split_factor}: leave --split_factor away.",
    )
    need(
        not (config.no_cuda and (config.gpu is not None or config.gpu_ids is not None)),
        "--no_cuda contradicts --gpu and --gpu_ids: give one of them.",
    )
    need(
        config.is_amp or config.amp_dtype not in ("bf16", "fp16") or "is_amp" not in config.given,
        f"--is_amp 0 contradicts --amp_dtype {config.amp_dtype}: leave one of them out.",
    )
    need(
        config.start_epoch is None or config.start_epoch <= config.given.get("epochs", math.inf),
        f"--start_epoch {config.start_epoch} is not within the run: give 0 to --epochs.",
    )
    need(
        config.rank < config.world_size or not config.multiprocessing_distributed,
        f"--rank {config.rank} is not one of the --world_size {config.world_size} nodes, which count from 0.",
    )
    need(
        config.nproc_per_node is None or config.multiprocessing_distributed,
        "--nproc_per_node needs --multiprocessing_distributed; under torchrun it is torchrun's flag.",
    )
    need(
        config.exchange is None or config.placement == "data",
        "--exchange cannot go with --placement networks: one spreads the networks over jobs, the other over the "
        "processes of a job. Leave one of them away.",
    )
    need(
        config.network_groups is None or config.placement == "networks",
        f"--network_groups {config.network_groups} is for --placement networks: add that, or leave it away.",
    )
    need(
        config.class_weights is None or config.class_loss == "ce",
        f"--class_weights is for the cross-entropy, and --class_loss is {config.class_loss}: leave one of them away.",
    )
    need(
        not (config.evaluate and config.resume is None),
        "--evaluate needs the checkpoint to evaluate: add --resume PATH.",
    )
    _check_exchange(config, need)


def _check_exchange(config: Config, need: Callable[[bool, str], None]) -> None:
    """Refuse flags of an exchange that cannot work."""
    if config.exchange is None:
        names = ["network", *(flag.name for flag in flags_of(MachineOptions) if flag.name.startswith("exchange_"))]
        alone = next((name for name in names if config.given.get(name) is not None), "")
        need(not alone, f"--{alone} is for jobs that exchange their networks: add --exchange DIR, or leave it away.")
        return
    factor = config.split_factor
    need(
        len(config.archs()) == 1,
        f"--exchange is for the networks of one division, and --arch names {len(config.archs())}: name one.",
    )
    need(factor > 1, f"--exchange needs several networks, and --split_factor is {factor}: give the number of all jobs.")
    need(
        config.network is not None,
        f"--exchange needs --network, which of the {factor} networks this job trains: 0 to {factor - 1}.",
    )
    assert config.network is not None
    need(
        config.network < factor,
        f"--network {config.network}: the {factor} networks of --split_factor count from 0 to {factor - 1}.",
    )
    need(
        not config.is_train_sep,
        "--is_train_sep 1 trains a network alone, and --exchange among others: leave one of them away.",
    )
    need(
        config.cuda_graph != "1",
        "--cuda_graph 1 replays one and the same step, and peers come and go in an --exchange: leave one of them away.",
    )


def _check_data_and_method(config: Config) -> None:
    """Refuse flags that the data set, as it was found, or the method cannot go with; the latter imports torch."""
    from method import methods

    kind = methods.get(config.method)
    if config.placement == "networks" and not kind.may_be_spread():
        raise UserError(
            f"--placement networks: the networks of --method {config.method} have more in common than logits: "
            f"{kind.exchanges}. Use --placement data."
        )
    for name in ("image_column", "label_column", "split_column"):
        if name in config.given and config.dataset not in TABLES:
            tables = ", ".join(TABLES)
            raise UserError(f"--{name} is for tables ({tables}), and --dataset is {config.dataset}: leave it away.")
    if config.exchange is not None and not kind.learns_from_copies:
        able = ", ".join(name for name in methods.names() if methods.get(name).learns_from_copies)
        raise UserError(
            f"--exchange: --method {config.method} needs more of the other networks than what old copies of them "
            f"predict; the methods that do not are {able}."
        )
    for name, why in kind.incompatible.items():
        if getattr(config, name) not in (None, False, "0", "auto"):
            raise UserError(f"--{name} cannot go with --method {config.method}: {why}. Leave it away.")


def answer_at_once(config: Config) -> str | None:
    """What --print_config or --list_archs ask for, as lines of text; None where there is a run to be made.

    Raises:
        UserError: no name matches; as `resolve_config`.
    """
    if config.list_archs is not None:
        return "\n".join(archs_matching(config.list_archs))
    return config_text(config) if config.print_config else None


def config_text(config: Config) -> str:
    """Every value, one `name = value (origin)` a line, with what recipes supply; what was not opened is said by `#`.

    Raises:
        UserError: as `resolve_config`.
    """
    lines = []
    if config.extra is not None:
        lines.append("# flags alone: backbone, classes and preprocessing are those of the checkpoint")
    else:
        config, lines = _resolved_without_data(config)
    lines += [f"# {line}" for line in config.warnings]
    return "\n".join(
        lines + [f"{name} = {item['value']} ({item['origin']})" for name, item in config.described().items()]
    )


def _resolved_without_data(config: Config) -> tuple[Config, list[str]]:
    """The configuration with what recipes supply as far as flags tell it, and remarks on the rest."""
    from method import methods

    remarks = []
    crop_size = None
    if config.dataset not in ROWS:
        crop_size = config.given.get("crop_size", config.crop_size)
        if "crop_size" not in config.given:
            remarks.append(f"# for images of {crop_size} pixels: those of --data decide, or --crop_size says it")
    start: Mapping[str, Any] | None = None
    if config.pretrained is not None and methods.get(config.method).fine_tunes:
        start = {}
        remarks.append(
            "# mean, std and sizes as on ImageNet: those that the weights of --pretrained know take their place"
        )
    resolved = resolve_config(
        config,
        data_recipe=row_for(config.dataset, crop_size or config.crop_size),
        crop_size=crop_size,
        nodes=config.world_size if config.multiprocessing_distributed else 1,
        start=start,
    )
    return resolved, remarks


def main() -> None:
    """Print the configuration that a command line stands for, see `config_text`."""
    name = "parser_params.py"
    show(read_flags(name, lambda: config_text(parse_config(program=name))))


if __name__ == "__main__":
    main()

"""The command line: every flag documented, precedence kept, every mistake one line that names it."""

import importlib
import json
import pkgutil
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dataset import sources
from loss import distillation
from loss.agreement import AGREEMENT_LOSSES
from method import method_options, methods
from method.options import co_training as method_choices
from method.options import dks as dks_choices
from model import backbones
from model.options import FAMILIES, POOLS
from model.search import blocks
from parser_params import Config, build_parser, parse_config, resolve_config
from recipe.datasets import ROWS
from utils.errors import UserError
from utils.options import flags_of
from utils.registry import Registry

ROOT = Path(__file__).parent.parent

# specs: every published flag and ours
NAMES = """data model_dir dataset num_classes arch method split_factor norm_mode is_syncbn output_stride workers epochs
start_epoch max_steps eval_per_epoch batch_size eval_batch_size iters_to_accumulate crop_size padding lr_mode lr
learning_rate slow_start_lr slow_start_epochs end_lr lr_milestones lr_step_multiplier lr_multiplier decay_factor
decay_epochs is_linear_lr optimizer momentum is_nesterov weight_decay is_wd_test is_div_wd div_wd_den is_wd_all no_decay
clip_grad ema_decay is_cutout erase_p is_autoaugment randaa is_mixup mix_alpha is_label_smoothing is_identical_init
is_diff_data_train is_train_sep is_cot_loss cot_loss_choose cot_weight kl_weight is_cot_weight_warm_up
is_kl_weight_warm_up cot_weight_warm_up_epochs kl_weight_warm_up_epochs is_ensembled_loss ensembled_loss_weight
is_ensembled_after_softmax is_max_ensemble is_amp amp_dtype is_apex_amp amp_opt_level seed deterministic resume evaluate
pretrained pretrained_dir print_freq max_ckpt_nums save_steps is_summary proc_name gpu gpu_ids no_cuda
multiprocessing_distributed nproc_per_node world_size rank dist_url dist_backend is_test_on_multigpus
is_test_with_multistreams is_efficient_densenet is_official_densenet densenet_p_shakedrop is_efficientnet_user_crop
is_lukemelas_efficientnet is_memory_efficient_swish gn_num_groups config val_fraction on_bad_image
color_jitter crop_area crop_interpolation
eval_interpolation crop_pct erase_mode erase_area erase_ratio padding_mode mean std optimizer_eps
local_rank"""
FLAGS = NAMES.split()

DIGITS = ["--dataset", "digits", "--arch", "resnet20"]


@pytest.mark.parametrize(
    ("text", "value"), [("0", "0"), ("1", "1"), ("true", "1"), ("No", "0"), ("auto", "auto"), ("2", None), ("", None)]
)
def test_a_switch_that_may_decide_by_itself_takes_what_switches_take(text: str, value: str | None) -> None:
    if value is None:
        with pytest.raises(UserError, match=r"--cuda_graph: .* is not one of 0, 1, auto"):
            parse_config([*DIGITS, "--cuda_graph", text])
    else:
        assert parse_config([*DIGITS, "--cuda_graph", text]).cuda_graph == value


@pytest.mark.parametrize(
    "spelling", [["--local-rank=1"], ["--local_rank=1"], ["--local-rank", "1"], ["--local_rank", "1"]]
)
def test_what_launchers_pass_is_accepted(spelling: list[str]) -> None:
    """In front of everything, as python -m torch.distributed.launch does."""
    assert parse_config([*spelling, *DIGITS]).arch == "resnet20"


@pytest.mark.parametrize("program", ["parser_params.py", "train_split.py"])
def test_help_prints_every_flag_with_default_and_group(program: str) -> None:
    result = subprocess.run(
        [sys.executable, program, "--help"], cwd=ROOT, capture_output=True, text=True, check=True, timeout=120
    )
    for flag in FLAGS:
        assert re.search(rf"--{flag}\b", result.stdout), flag
    for title in (
        "Run and files",
        "Data and augmentation",
        "Networks",
        "Optimiser and schedule",
        "Several machines",
        "Method: co_training",
    ):
        assert f"{title}:" in result.stdout
    assert " ".join(result.stdout.split()).count("[default: ") >= len(set(FLAGS)) - 6  # aliases share one


def test_every_flag_has_a_meaning() -> None:
    for section in Config.__mro__[1:-1]:
        for flag in flags_of(section):
            assert len(flag.help) > 5, flag.name


def test_method_help_adds_its_own_flags() -> None:
    assert "--kd_T" in build_parser("l_mcl").format_help()
    assert "--kd_T" not in build_parser("co_training").format_help()
    assert "--cot_weight" not in build_parser("l_mcl").format_help()


@pytest.mark.parametrize("flags", [["--no_cuda"], ["--lr_milestones", "30", "60"], ["--resume"]])
def test_a_flag_with_any_number_of_values_takes_no_override(tmp_path: Path, flags: list[str]) -> None:
    alone, config = parse_config([*DIGITS, *flags]), parse_config([*DIGITS, *flags, "epochs", "5", "momentum", "0.7"])
    assert (config.epochs, config.momentum) == (5, 0.7)
    for name in ("no_cuda", "lr_milestones", "resume"):
        assert getattr(config, name) == getattr(alone, name)
    file = tmp_path / "c.yaml"
    file.write_text("EPOCHS: 7\n")
    assert parse_config(["--config", str(file), *flags, "EPOCHS", "5", "SUPERNET.SLICE", "8"]).epochs == 5


def test_precedence_flag_over_yaml_over_recipe_over_default(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("lr: 0.3\nepochs: 7\nmomentum: 0.8\ncot_weight: 0.25\n")
    argv = [*DIGITS, "--config", str(file), "--lr", "0.2", "momentum", "0.7"]
    config = resolve_config(parse_config(argv), data_recipe="digits")
    assert (config.lr, config.origins["lr"]) == (0.2, "flag")
    assert (config.momentum, config.origins["momentum"]) == (0.7, "override")
    assert (config.epochs, config.origins["epochs"]) == (7, "yaml")
    assert (config.batch_size, config.origins["batch_size"]) == (64, "recipe")
    assert config.method_options.cot_weight == 0.25
    assert config.described()["lr_step_multiplier"] == {"value": 0.1, "origin": "default"}


@pytest.mark.parametrize("method", methods.names())
@pytest.mark.parametrize("data_recipe", ROWS)
def test_what_a_method_recommends_are_flags(method: str, data_recipe: str) -> None:
    """A key that no flag has would be dropped without a word."""
    arch = "resnet20" if "num_members" in methods.get(method).Options.__dataclass_fields__ else "resnet20,resnet20"
    config = parse_config(["--method", method, "--dataset", data_recipe, "--arch", arch])
    recipe = methods.get(method).recipe(data_recipe, None)
    values = resolve_config(config, data_recipe=data_recipe).values()
    assert not recipe.keys() - values.keys()


def test_open_data_sets_keep_their_own_statistics() -> None:
    argv = ["--method", "dks", "--arch", "wrn_16_1", "--data", "x", "--dataset"]
    assert resolve_config(parse_config([*argv, "cifar10"]), data_recipe="cifar10").mean != ()
    own = resolve_config(parse_config([*argv, "folder"]), data_recipe="cifar10", crop_size=20)
    assert (own.mean, own.std, own.padding_mode) == ((), (), "reflect")
    given = parse_config([*argv, "folder", "--mean", "0.5", "0.4", "0.3"])
    assert resolve_config(given, data_recipe="cifar10").mean == (0.5, 0.4, 0.3)


def test_recipe_never_replaces_what_was_given() -> None:
    argv = ["--arch", "wide_resnet28_10", "--split_factor", "2", "--weight_decay", "0.003", "--lr", "0.07"]
    config = resolve_config(parse_config([*argv, "--epochs", "11", "--crop_size", "40"]), data_recipe="cifar10")
    assert (config.weight_decay, config.lr, config.epochs, config.crop_size) == (0.003, 0.07, 11, 40)


def test_divided_weight_decay() -> None:
    config = resolve_config(parse_config(["--arch", "wide_resnet28_10", "--split_factor", "4"]), data_recipe="cifar10")
    assert config.weight_decay == pytest.approx(5e-4 * 2.718281828459045 ** (1 / 4 - 1))


def test_aliases_and_spellings() -> None:
    config = parse_config(
        ["--learning_rate", "0.3", "--kl_weight", "0.1", "--is_mixup", "false", "--lr_milestones", "3,5", "7"]
    )
    assert config.lr == 0.3
    assert config.method_options.cot_weight == 0.1
    assert config.is_mixup is False
    assert config.lr_milestones == (3, 5, 7)
    assert parse_config(["--evaluate", "--resume", "x"]).evaluate is True
    assert parse_config(["--pretrained"]).pretrained == "library"
    assert parse_config(["--pretrained_dir", "p"]).pretrained == "p"
    assert parse_config(["--learning-rate=0.3", "--lr", "0.2", "--init-lr", "0.1"]).lr == 0.1  # the last one
    assert parse_config(["--lr-type", "multistep"]).lr_mode == "step"
    assert parse_config(["lr-type", "cosine"]).lr_mode == "epoch_cos"
    assert parse_config(["--resume"]).resume == "auto"
    assert parse_config(["--resume-checkpoint", "x", "--resume"]).resume == "x"
    assert parse_config(["--evaluate", "0", "--evaluate", "1", "--resume", "x"]).evaluate is True
    assert parse_config(["--data", "a-b"]).data == "a-b"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--lerning_rate", "1"], r"--lerning_rate is not a known flag\. Did you mean 'learning_rate'"),
        (["--lr", "fast"], r"--lr: 'fast' is not usable: expected a number"),
        (["--epochs", "2.5"], r"--epochs: '2.5' is not usable: expected a whole number"),
        (["--epochs"], r"--epochs"),
        (["--epochs", "0"], r"--epochs must be 1 or more, got 0"),
        (["--lr", "inf"], r"--lr must be 0 or more, got inf"),
        (["--momentum", "9"], r"--momentum must be between 0 and 1, got 9"),
        (["--is_amp", "0", "--amp_dtype", "bf16"], r"--is_amp 0 contradicts --amp_dtype bf16"),
        (["--start_epoch", "9", "--epochs", "5"], r"--start_epoch 9 is not within the run"),
        (["--rank", "2", "--world_size", "2", "--multiprocessing_distributed"], r"--rank 2 is not one of the"),
        (["--nproc_per_node", "2"], r"--nproc_per_node needs --multiprocessing_distributed"),
        (["--is_amp", "2"], r"--is_amp: '2' is not usable: expected 0 or 1"),
        (["--lr_mode", "cosine"], r"--lr_mode: 'cosine' is not one of .*Did you mean 'cos'"),
        (["--dataset", "cifar"], r"--dataset 'cifar' is not a known data set\. Did you mean 'cifar10'"),
        (["--method", "co_trainin"], r"--method 'co_trainin' is not a known method\. Did you mean 'co_training'"),
        (["--cot_loss_choose", "js"], r"--cot_loss_choose"),
        (["--wrn_dropout", "1"], r"--wrn_dropout must be 0 or more and below 1"),
        (["--cot_weight", "-1"], r"--cot_weight must be 0 or more"),
        (["batch_size", "0"], r"override batch_size must be 1 or more, got 0"),
        (["--no_cuda", "--gpu", "0"], r"--no_cuda contradicts"),
        (["--evaluate"], r"--evaluate needs the checkpoint"),
        (["--is_apex_amp", "1"], r"--is_apex_amp 1: apex is gone; use --is_amp"),
        (["--arch", "resnet20,resnet20", "--split_factor", "3"], r"--arch names 2 networks and --split_factor is 3"),
        (["--norm_mode", "group"], r"--norm_mode: 'group' is not one of batch"),
        (["lr"], r"KEY VALUE pairs; one has no value"),
        (["lrr", "0.1"], r"override 'lrr' is not a known flag\. Did you mean 'lr'"),
        (["--config", "/nowhere.yaml"], r"--config /nowhere.yaml: cannot be read"),
        (["--lr-type", "cos"], r"--lr_type: 'cos' is not one of cosine, multistep\. Did you mean 'cosine'"),
        (["--lerning-rate", "1"], r"Did you mean 'learning_rate'"),
        (["--mean", "0.5"], r"--mean must be three numbers"),
        (["--std", "0", "1", "1"], r"--std must be three numbers, each above 0, got 0.0 1.0 1.0"),
        (["--padding_mode", "mirror"], r"--padding_mode: 'mirror' is not one of zero, reflect"),
        (["--method", "l_mcl", "--is_syncbn", "1"], r"--is_syncbn cannot go with --method l_mcl: its virtual steps"),
        (["--val_fraction", "1"], r"--val_fraction must be 0 or more and below 1"),
        (["--crop_area", "0.5"], r"--crop_area must be two numbers, each above 0 and at most 1, the smaller first"),
        (["--crop_area", "0.5", "1.5"], r"--crop_area must be two numbers"),
        (["--erase_area", "0.5", "0.1"], r"--erase_area must be two numbers"),
        (["--erase_ratio", "0", "3"], r"--erase_ratio must be two numbers, each above 0, the smaller first"),
        (["--crop_pct", "0"], r"--crop_pct must be above 0"),
        (["--color_jitter", "2"], r"--color_jitter must be between 0 and 1"),
        (["--erase_mode", "noise"], r"--erase_mode: 'noise' is not one of const, pixel"),
    ],
)
def test_mistakes_are_one_line(argv: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        parse_config(argv)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lr: fast", r"c.yaml: lr: 'fast' is not usable"),
        ("lrr: 1", r"'lrr' is not a known flag\. Did you mean 'lr'"),
        ("- 1", r"expected 'flag: value' lines, found list"),
        ("lr: [", r"is not valid YAML"),
        ("lr: [1, 2]", r"c.yaml: lr: "),
        ("lr:", r"c.yaml: lr: a value is missing"),
        ("erase_p: 2", r"c.yaml: erase_p must be between 0 and 1, got 2"),
        ("crop_area: []", r"c.yaml: crop_area must be two numbers"),
        ("!!python/object/apply:os.system ['true']", r"is not valid YAML"),
        ("1: 2", r"expected 'flag: value' lines"),
        ("lr: 1\nepochs: 2\nlr: 3", r"c.yaml: 'lr' stands there 2 times"),
        ("lr: 1\nlearning_rate: 2", r"c.yaml: 'learning_rate' is another name of a flag that stands there too"),
        ("lr: [&a [1, 2, 3], &b [*a, *a], &c [*b, *b], [*c, *c]]", r"c.yaml: YAML's aliases"),
    ],
)
def test_bad_yaml_is_one_line(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        parse_config(["--config", str(tmp_path / "c.yaml")])
    assert "\n" not in str(caught.value)


ANSWERED = """
import contextlib, io, json, runpy, sys

program, lines = sys.argv[1], json.loads(sys.argv[2])
for line in lines:
    sys.argv = [program, *line]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            runpy.run_path(program, run_name="__main__")
        except SystemExit as end:
            code = end.code
    sys.stdout.write(json.dumps([line, code, sorted({"torch", "numpy", "torchvision"} & set(sys.modules))]) + "\\n")
"""


def answered(program: str, lines: list[list[str]]) -> list[Any]:
    """For each of the command lines: itself, the exit code, and what was imported of what takes seconds."""
    result = subprocess.run(
        [sys.executable, "-c", ANSWERED, program, json.dumps(lines)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    return [json.loads(line) for line in result.stdout.splitlines()]


@pytest.mark.parametrize("program", ["train_split.py", "eval.py"])
def test_help_and_a_typo_are_answered_without_importing_torch(program: str) -> None:
    """Importing torch takes seconds; a method's and a family's flags lie where they are read without it."""
    helps = [["--help"], *(["--method", name, "--help"] for name in method_options.names())]
    typos = [
        ["--lerning_rate", "1"],
        ["--epochs", "x"],
        ["--wrn_dropout", "1"],
        ["--dataset", "cifr"],
        ["--method", "dm"],
        ["--no_cuda", "--gpu", "0"],
        ["lrr", "1"],
    ]
    assert answered(program, helps + typos) == [[line, 0, []] for line in helps] + [[line, 2, []] for line in typos]


def test_the_flags_of_an_export_are_read_without_importing_torch() -> None:
    wrong = [["a.pth.tar", "--otu", "b.pt2"], ["a.pth.tar", "--input", "int8"]]
    expected = [[["--help"], 0, []], *([line, 2, []] for line in wrong)]
    assert answered("script/export.py", [["--help"], *wrong]) == expected


def test_the_parser_knows_what_the_methods_and_backbones_have() -> None:
    for name in methods.names():
        assert name not in method_options or methods.get(name).Options is method_options.get(name), name
    of_libraries = backbones.get("torchvision/resnet18").options
    assert {of_libraries, *(entry.options for _, entry in backbones.items())} - {None} == set(FAMILIES)


@pytest.mark.parametrize("registry", [sources, backbones], ids=lambda registry: registry.kind)
def test_every_name_is_in_the_index_that_saves_importing(registry: Registry[Any]) -> None:
    package = importlib.import_module(registry.package)
    assert sorted(registry.index) == sorted(info.name for info in pkgutil.iter_modules(package.__path__))
    listed = [name for names in registry.index.values() for name in names]
    assert sorted(listed) == [name for name, _ in registry.items()]


def test_choices_that_stand_in_two_places_are_the_same() -> None:
    assert tuple(AGREEMENT_LOSSES) == method_choices.AGREEMENTS
    assert dks_choices.MATCHINGS == distillation.MATCHINGS
    assert tuple(blocks.POOLS) == POOLS


def test_user_mistake_exits_2_without_a_traceback() -> None:
    result = subprocess.run(
        [sys.executable, "train_split.py", "--epochs", "none"], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 2
    assert result.stderr.strip().count("\n") == 0
    assert "Traceback" not in result.stderr
    assert result.stdout == ""


ALL_FLAGS = {flag.name: flag for section in Config.__mro__[1:-1] for flag in flags_of(section)}
VALUES = st.one_of(
    st.text(max_size=8), st.integers().map(str), st.floats().map(str), st.sampled_from(["0", "1", "auto"])
)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(sorted(ALL_FLAGS)), VALUES), max_size=4))
def test_any_value_is_parsed_or_refused_in_one_line(pairs: list[tuple[str, str]]) -> None:
    argv = [part for name, value in pairs if name != "config" for part in (f"--{name}={value}",)]
    try:
        config = parse_config(argv)
    except UserError as error:
        one_line = "\n" not in str(error).strip()
        assert one_line, error  # noqa: PT017 - either outcome is right, so pytest.raises does not fit
        return
    for name, _ in pairs:
        if name != "config":
            assert name in config.given or name == "pretrained_dir"


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 10**6), st.floats(1e-6, 10), st.booleans())
def test_values_survive_the_round_trip(epochs: int, lr: float, flag: bool) -> None:
    config = parse_config(["--epochs", str(epochs), "--lr", repr(lr), "--is_mixup", str(int(flag))])
    assert (config.epochs, config.lr, config.is_mixup) == (epochs, lr, flag)

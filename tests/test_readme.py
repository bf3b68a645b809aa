"""What the README shows works: its example runs, its commands parse, its links point somewhere."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from eval import EvalOptions
from method import methods
from parser_params import parse_config, resolve_config

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", TEXT, flags=re.DOTALL)
COMMANDS = [
    line.split("  #")[0].strip()
    for language, block in BLOCKS
    if language == "bash"
    for line in block.replace("\\\n", " ").splitlines()
    if re.search(r"\b(train_split|eval)\.py\b", line)
]


def test_the_example_runs() -> None:
    (code,) = [block for language, block in BLOCKS if language == "python"]
    names: dict[str, object] = {}
    exec(compile(code, "README.md", "exec"), names)
    assert tuple(names["prediction_B"].shape) == (8,)  # type: ignore[attr-defined]


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_parse(command: str) -> None:
    words = [word for word in shlex.split(command) if word != "..."]
    place = next(i for i, word in enumerate(words) if word.endswith(("train_split.py", "eval.py")))
    extra = EvalOptions if words[place].endswith("eval.py") else None
    parse_config(words[place + 1 :], extra=extra)


def test_there_are_commands() -> None:
    assert len(COMMANDS) > 5


METHODS = (ROOT / "miscs" / "methods.md").read_text(encoding="utf-8")
ROWS = [
    (method, [re.findall(r"`(--[^`]+)`", cell) for cell in line.strip("|").split("|")])
    for method in ("l_mcl", "dks")
    for line in METHODS.split(f"start with `python train_split.py --method {method}`")[1].split("\n## ")[0].splitlines()
    if line.startswith("|") and "--arch" in line
]


def resolved(method: str, command: str, dataset: str) -> dict[str, Any]:
    argv = ["--method", method, "--dataset", dataset, *shlex.split(command)]
    config = resolve_config(parse_config(argv), data_recipe=dataset)
    names = methods.get(method).backbone_names(config.arch, config.method_options)
    return config.values() | {"arch": names, "data": None}


@pytest.mark.parametrize(("method", "cells"), ROWS)
def test_published_commands_of_methods_are_ours(method: str, cells: list[list[str]]) -> None:
    """What a table says of them is so: both sides are parsed, and stand for the same configuration."""
    published, ours = cells
    assert ours
    for command in ours:
        dataset = parse_config(["--method", method, *shlex.split(command)]).dataset
        values = resolved(method, command, dataset)
        for other in published:
            assert resolved(method, other, dataset) == values


@pytest.mark.parametrize("command", re.findall(r"^python train_split.py (.*)$", METHODS, flags=re.M))
def test_commands_of_methods_parse(command: str) -> None:
    parse_config(shlex.split(command))


PUBLISHED = """--times 2 --meta-freq 50 --kd_T 3 --tau 0.1 --alpha 0.1 --beta 0.1 --gamma 1 --lam 1 --feat-dim 128
--number-net 2 --init-lr 0.1 --lr-type cosine --milestones 30 60 --epochs 300 --batch-size 128 --weight-decay 5e-4
--pos_k 1 --neg_k 8192 --nce_m 0.5 --manual_seed 0 --resume --resume-checkpoint a --evaluate --evaluate-checkpoint b
--checkpoint-dir c --gpu-id 0"""


def test_every_method_and_every_published_spelling_is_in_the_page() -> None:
    assert len(ROWS) == 5 + 5
    assert all(f"| `{name}`" in METHODS for name in methods.names())
    config = parse_config(["--method", "l_mcl", *PUBLISHED.split()])
    assert (config.lr_mode, config.lr_milestones, config.seed, config.gpu_ids) == ("epoch_cos", (30, 60), 0, "0")
    assert (config.evaluate, config.resume, config.model_dir) == (True, "b", "c")
    flags = [word for word in PUBLISHED.split() if word.startswith("--")]
    assert len(config.given) - 1 == len(flags) - 2  # with --method; --resume and the two checkpoints are one flag
    assert not [flag for flag in flags if not re.search(rf"{flag}\b", METHODS)]


@pytest.mark.parametrize("target", sorted(set(re.findall(r"\]\(([^)#]+)\)", TEXT))))
def test_links_point_somewhere(target: str) -> None:
    assert target.startswith("https://") or (ROOT / target).exists(), target


def test_scripts_named_exist() -> None:
    for name in set(re.findall(r"\bscript/[\w.]+", TEXT)):
        assert (ROOT / name).exists(), name


def test_every_goal_of_the_benchmarks_has_one_row() -> None:
    text = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
    rows = [line.split("|") for line in text.splitlines() if re.match(r"\| G\d+ \|", line)]
    assert [row[1].strip() for row in rows] == [f"G{number}" for number in range(1, 13)]
    assert {len(row) for row in rows} == {6}  # four cells between the outer bars

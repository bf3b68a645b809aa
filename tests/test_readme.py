"""What the README shows works: its example runs, its commands parse, its links point somewhere."""

import re
import shlex
from pathlib import Path

import pytest

from eval import EvalOptions
from parser_params import parse_config

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


@pytest.mark.parametrize("target", sorted(set(re.findall(r"\]\(([^)#]+)\)", TEXT))))
def test_links_point_somewhere(target: str) -> None:
    assert target.startswith("https://") or (ROOT / target).exists(), target


def test_scripts_named_exist() -> None:
    for name in set(re.findall(r"\bscript/[\w.]+", TEXT)):
        assert (ROOT / name).exists(), name

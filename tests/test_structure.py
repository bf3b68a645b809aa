"""The layout's promises: imports go one way, library code neither prints nor decides the device."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ALLOWED = {
    "utils": {"utils"},
    "loss": {"loss", "utils"},
    "model": {"model", "utils"},
    "dataset": {"dataset", "utils"},
    "method": {"method", "model", "loss", "utils"},
    "parser_params": {"dataset", "method", "model", "utils"},
}
OURS = {"utils", "loss", "model", "dataset", "method", "parser_params", "train_split", "eval", "benchmarks"}


def source_files(part: str) -> list[Path]:
    single = ROOT / f"{part}.py"
    return [single] if single.exists() else sorted((ROOT / part).rglob("*.py"))


def imported_parts(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.split(".")[0])
    return names & OURS


@pytest.mark.parametrize("part", sorted(ALLOWED))
def test_imports_go_one_way(part: str) -> None:
    files = source_files(part)
    assert files
    for path in files:
        steps_back = imported_parts(path) - ALLOWED[part]
        assert not steps_back, f"{path.relative_to(ROOT)} imports {', '.join(sorted(steps_back))}"


def forbidden_calls(path: Path) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call):
            continue
        if isinstance(node.func, ast.Name) and node.func.id == "print":
            found.append(f"print() in line {node.lineno}")
        if isinstance(node.func, ast.Attribute) and node.func.attr == "cuda":
            found.append(f".cuda() in line {node.lineno}")
    return found


@pytest.mark.parametrize("part", ["utils", "loss", "model", "dataset", "method"])
def test_library_code_neither_prints_nor_moves_to_a_gpu(part: str) -> None:
    found = {path.name: calls for path in source_files(part) if (calls := forbidden_calls(path))}
    found.pop("__main__.py", None)
    assert not found


@pytest.mark.parametrize("program", ["train_split.py", "eval.py"])
def test_the_entry_points_know_no_method_by_name(program: str) -> None:
    from method import methods

    text = (ROOT / program).read_text(encoding="utf-8")
    found = [name for name in methods.names() if re.search(rf"(?<![\w-]){name}(?!\w)", text, flags=re.IGNORECASE)]
    assert not found
    assert not re.search(r"from method\.|import method\.", text)

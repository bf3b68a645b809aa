"""The layout's promises: imports go one way, library code neither prints nor decides the device."""

import ast
import re
from pathlib import Path

import pytest

from tests import kills

ROOT = Path(__file__).parent.parent
BELOW_METHOD = {"model", "loss", "utils", "recipe"}
ALLOWED = {
    "utils": {"utils"},
    "loss": {"loss", "utils"},
    "recipe": {"recipe", "utils"},
    "record": {"record", "utils"},
    "model": {"model", "recipe", "utils"},
    "dataset": {"dataset", "recipe", "utils"},
    "method": {"method", "record", *BELOW_METHOD},
    "training": {"training", "method", "dataset", "record", *BELOW_METHOD},
    "opening": {"opening", "parser_params", "training", "method", "dataset", "record", *BELOW_METHOD},
    "parser_params": {"training", "method", "dataset", *BELOW_METHOD},
    "evaluation": {"evaluation", "parser_params", "training", "method", "dataset", "record", *BELOW_METHOD},
}
OURS = {*ALLOWED, "train_split", "eval", "benchmarks", "cotrain"}
# test files named by what they watch, which no single room does
BEHAVIOURS = {"train", "resume", "scripts", "fuzz", "readme", "structure"}
# the one program in a library folder, kept for its promised name
PROGRAMS = {ROOT / "utils" / "compare" / "__main__.py"}
# model/ from its ground to its face: a room imports itself and those before it
FLOORS_OF_MODEL = (
    "registry",
    "staged",
    "layers",
    "division",
    "options",
    "search",
    "mixing",
    "serial",
    "library",
    "backbone",
    "heads",
    "execution",
    "splitnet",
    "members",
    "packed",
    "budget",
    "depth",
    "build",
    "divide",
    "casting",
    "fold",
    "cascade",
    "summary",
    "kept_channels",
    "argument_slices",
    "slices",
    "restore",
    "pretrained",
)


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
        if path in PROGRAMS:
            continue
        steps_back = imported_parts(path) - ALLOWED[part]
        assert not steps_back, f"{path.relative_to(ROOT)} imports {', '.join(sorted(steps_back))}"


def module_name(path: Path) -> str:
    """`model/search/costs.py` as `model.search.costs`, a package's `__init__.py` as the package."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imported_modules(path: Path, known: set[str]) -> set[str]:
    """Modules of ours that a file imports anywhere, `from package import module` included."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= (names & known) or {node.module}
    return found & known


def test_no_import_climbs_inside_model() -> None:
    files = {module_name(path): path for path in source_files("model")}
    rooms = {name: name.split(".")[1] for name in files if name != "model"}
    assert set(rooms.values()) == set(FLOORS_OF_MODEL)
    for name, room in rooms.items():
        allowed = FLOORS_OF_MODEL[: FLOORS_OF_MODEL.index(room) + 1]
        for other in imported_modules(files[name], set(files)):
            assert other != "model", f"{name} imports the face of model/"
            assert rooms[other] in allowed, f"{name} imports {other}, which lies above it"


def test_no_modules_import_each_other_in_a_circle() -> None:
    files = {module_name(path): path for part in OURS for path in source_files(part)}
    waiting = {name: imported_modules(path, set(files)) - {name} for name, path in files.items()}
    while free := {name for name, others in waiting.items() if not others}:
        waiting = {name: others - free for name, others in waiting.items() if name not in free}
    assert not waiting


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


@pytest.mark.parametrize("part", sorted(ALLOWED.keys() - {"parser_params"}))
def test_library_code_neither_prints_nor_moves_to_a_gpu(part: str) -> None:
    found = {path.name: calls for path in source_files(part) if (calls := forbidden_calls(path))}
    found.pop("__main__.py", None)
    assert not found


@pytest.mark.parametrize("program", ["train_split.py", "eval.py"])
def test_the_entry_points_know_no_method_by_name(program: str) -> None:
    from method import methods

    text = (ROOT / program).read_text(encoding="utf-8")
    # a name that is also a word of the language is one only where it stands in quotes
    patterns = {name: rf"(?<![\w-]){name}(?!\w)" for name in methods.names()} | {"one": r"""["']one["']"""}
    found = [name for name, pattern in patterns.items() if re.search(pattern, text, flags=re.IGNORECASE)]
    assert not found
    assert not re.search(r"from method\.(?!costs )|import method\.", text)


def test_every_test_file_is_named_after_a_room_that_exists() -> None:
    rooms = {room for room in (*OURS, "script") if (ROOT / room).is_dir() or (ROOT / f"{room}.py").exists()}
    for path in (ROOT / "tests").glob("test_*.py"):
        name = path.stem.removeprefix("test_") + "_"
        assert any(name.startswith(f"{room}_") for room in rooms | BEHAVIOURS), f"{path.name} is named after no room"


@pytest.mark.parametrize("place", kills.PLACES)
def test_every_place_where_runs_are_killed_exists(place: str) -> None:
    owner, name = kills.found(place)
    assert callable(getattr(owner, name))

"""Builds the wheel: the whole project under the one name `cotrain`, its imports rewritten on the way. Ours.

A build backend (PEP 517) that needs no package, so `pip install .` works without a package index. In the repository the
rooms lie at the root (`from model import SplitNet`); in the wheel they lie in `cotrain/` (`from cotrain.model import
SplitNet`), so that nothing of ours meets a user's own `utils.py` or `model/`. Only the text of import statements
changes, at the places that the parser names. What cannot be rewritten so fails the build by file and line: a dotted
import without a name of its own, and a module that is named in a string (write `f"{__name__}.part"`).
"""

import ast
import base64
import gzip
import hashlib
import io
import re
import tarfile
import tomllib
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
NAME = "cotrain"
PROGRAMS = frozenset({"eval", "parser_params", "train_split"})  # a user may keep files of his own beside them
AT_HOME = frozenset({"benchmarks", "examples", "hubconf", "script", "tests"})  # what no wheel holds
BESIDE = ("pyproject.toml", "requirements.txt", "README.md", "LICENSE", "script/wheel_backend.py")  # of an sdist
KIND = "Wheel-Version: 1.0\nGenerator: wheel_backend\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
EPOCH = (1980, 1, 1, 0, 0, 0)  # the time of every file, so that one state of the project gives one wheel


def parts_of(root: Path = ROOT) -> tuple[set[str], set[str]]:
    """(top-level names that go into the wheel, those that stay at home)."""
    packages = {path.parent.name for path in root.glob("*/__init__.py")}
    return (packages | PROGRAMS) - AT_HOME, set(AT_HOME)


def source_files(root: Path = ROOT) -> Iterator[Path]:
    """Every file of the wheel, in a fixed order."""
    for name in sorted(parts_of(root)[0]):
        single = root / f"{name}.py"
        found = [single] if single.is_file() else (root / name).rglob("*")
        yield from sorted(path for path in found if path.is_file() and "__pycache__" not in path.parts)


def place_in_wheel(path: Path, root: Path = ROOT) -> str:
    """Where a file of the project lies in the wheel: the face at the top, everything else below it."""
    place = path.relative_to(root).as_posix()
    return place if place.startswith(f"{NAME}/") else f"{NAME}/{place}"


class _Rewriter(ast.NodeVisitor):
    """Collects where text goes in: (line from 0, byte in the line, text)."""

    def __init__(self, lines: list[bytes], where: str, root: Path) -> None:
        self.lines, self.where, self.root = lines, where, root
        self.ours, self.at_home = parts_of(root)
        self.insertions: list[tuple[int, int, bytes]] = []

    def _is_ours(self, module: str, node: ast.AST) -> bool:
        first = module.split(".")[0]
        if first in self.at_home:
            raise self._refusal(node, f"imports {module}, which stays at home")
        return first in self.ours and first != NAME

    def _refusal(self, node: Any, what: str) -> SyntaxError:
        return SyntaxError(f"{self.where}:{node.lineno}: {what}: {NAME} cannot be built.")

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        if node.level or node.module is None or not self._is_ours(node.module, node):
            return
        match = re.compile(rb"from[ \t]+").match(self.lines[node.lineno - 1], node.col_offset)
        if match is None:
            raise self._refusal(node, "goes over a line's end before the module's name")
        self.insertions.append((node.lineno - 1, match.end(), f"{NAME}.".encode()))

    def visit_Import(self, node: ast.Import) -> None:
        ours = [alias for alias in node.names if self._is_ours(alias.name, node)]
        for alias in ours:
            if alias.asname is not None:
                self.insertions.append((alias.lineno - 1, alias.col_offset, f"{NAME}.".encode()))
            elif "." in alias.name or len(node.names) > 1:
                raise self._refusal(node, f"import {alias.name}: write it as `from … import …`")
            else:
                self.insertions.append((node.lineno - 1, node.col_offset, f"from {NAME} ".encode()))

    def visit_Constant(self, node: ast.Constant) -> None:
        if isinstance(node.value, str) and re.fullmatch(r"\w+(\.\w+)+", node.value):
            first = node.value.split(".")[0]
            path = self.root.joinpath(*node.value.split("."))
            if first in self.ours and (path.is_dir() or path.with_suffix(".py").is_file()):
                raise self._refusal(node, f"names the module {node.value} in a string: make it from __name__")

    def visit_Call(self, node: ast.Call) -> None:
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        if name in ("import_module", "__import__") and node.args and isinstance(node.args[0], ast.Constant):
            self._is_ours(str(node.args[0].value), node)
            if str(node.args[0].value).split(".")[0] in self.ours:
                raise self._refusal(node, f"{name} of a module of ours: import it by a statement")
        self.generic_visit(node)


def rewritten(source: bytes, where: str, root: Path = ROOT) -> bytes:
    """A module's text with every import of ours from inside `cotrain`; all other bytes stay.

    Args:
        where: the file, for error messages.

    Raises:
        SyntaxError: it does not parse, or names a module of ours in a way that cannot be rewritten.
    """
    lines = source.splitlines(keepends=True)
    rewriter = _Rewriter(lines, where, root)
    rewriter.visit(ast.parse(source, where))
    for line, column, text in sorted(rewriter.insertions, reverse=True):
        lines[line] = lines[line][:column] + text + lines[line][column:]
    return b"".join(lines)


def wheel_files(root: Path = ROOT) -> dict[str, bytes]:
    """Everything below `cotrain/` in the wheel."""
    files = {}
    for path in source_files(root):
        content = path.read_bytes()
        place = path.relative_to(root).as_posix()
        files[place_in_wheel(path, root)] = rewritten(content, place, root) if path.suffix == ".py" else content
    return files


# ---- metadata --------------------------------------------------------------------------------------------------------


def _project(root: Path) -> Mapping[str, Any]:
    project: Mapping[str, Any] = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return project


def _stem(root: Path) -> str:
    project = _project(root)
    return f"{project['name'].replace('-', '_')}-{project['version']}"


def requirements(root: Path = ROOT) -> list[str]:
    """The lines of requirements.txt without their comments."""
    lines = (root / "requirements.txt").read_text(encoding="utf-8").splitlines()
    return [line for line in (line.split("#")[0].strip() for line in lines) if line]


def metadata(root: Path = ROOT) -> str:
    """The wheel's METADATA, with what pyproject.toml, requirements.txt and README.md say."""
    project = _project(root)
    lines = [
        "Metadata-Version: 2.1",
        f"Name: {project['name']}",
        f"Version: {project['version']}",
        f"Summary: {project['description']}",
        "License: Apache-2.0",
        "License-File: LICENSE",
        f"Requires-Python: {project['requires-python']}",
        *(f"Requires-Dist: {line}" for line in requirements(root)),
    ]
    for extra, packages in project.get("optional-dependencies", {}).items():
        lines.append(f"Provides-Extra: {extra}")
        lines += [f"Requires-Dist: {package}; extra == '{extra}'" for package in packages]
    lines.append("Description-Content-Type: text/markdown")
    return "\n".join([*lines, "", (root / "README.md").read_text(encoding="utf-8")])


def entry_points(root: Path = ROOT) -> str:
    """The wheel's entry_points.txt, from [project.scripts]."""
    scripts = _project(root).get("scripts", {})
    return "\n".join(["[console_scripts]", *(f"{name} = {target}" for name, target in scripts.items()), ""])


def _record(files: Mapping[str, bytes], own: str) -> str:
    rows = []
    for place, content in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
        rows.append(f"{place},sha256={digest},{len(content)}")
    return "\n".join([*rows, f"{own},,", ""])


# ---- the hooks of PEP 517 --------------------------------------------------------------------------------------------


def build_wheel(
    wheel_directory: str, config_settings: Mapping[str, Any] | None = None, metadata_directory: str | None = None
) -> str:
    """Write the wheel; returns its file name."""
    stem = _stem(ROOT)
    about = f"{stem}.dist-info"
    files = wheel_files()
    files[f"{about}/METADATA"] = metadata().encode()
    files[f"{about}/WHEEL"] = KIND.encode()
    files[f"{about}/entry_points.txt"] = entry_points().encode()
    files[f"{about}/licenses/LICENSE"] = (ROOT / "LICENSE").read_bytes()
    files[f"{about}/top_level.txt"] = f"{NAME}\n".encode()
    files[f"{about}/RECORD"] = _record(files, f"{about}/RECORD").encode()
    name = f"{stem}-py3-none-any.whl"
    with zipfile.ZipFile(Path(wheel_directory) / name, "w", zipfile.ZIP_DEFLATED) as wheel:
        for place, content in files.items():
            entry = zipfile.ZipInfo(place, EPOCH)
            entry.compress_type, entry.external_attr = zipfile.ZIP_DEFLATED, 0o644 << 16
            wheel.writestr(entry, content)
    return name


def _add(archive: tarfile.TarFile, place: str, content: bytes) -> None:
    entry = tarfile.TarInfo(place)
    entry.size = len(content)
    archive.addfile(entry, io.BytesIO(content))


def build_sdist(sdist_directory: str, config_settings: Mapping[str, Any] | None = None) -> str:
    """Write the source archive, of which the same wheel can be built; returns its file name."""
    stem = _stem(ROOT)
    name = f"{stem}.tar.gz"
    with (
        gzip.GzipFile(Path(sdist_directory) / name, "wb", mtime=0) as packed,
        tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as archive,
    ):
        _add(archive, f"{stem}/PKG-INFO", metadata().encode())
        for path in [*(ROOT / place for place in BESIDE), *source_files()]:
            _add(archive, f"{stem}/{path.relative_to(ROOT).as_posix()}", path.read_bytes())
    return name

"""`torch.hub.load(REPOSITORY, "load", PATH, source="local")`, and "divide": `cotrain` without installing it.

What is loaded lives below the name `cotrain`, as in an installed wheel, so a project that has its own `utils.py` or
`model/` can use it: the files are read where they lie, with their imports rewritten as in the wheel.
"""

import importlib.abc
import importlib.util
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, SourceFileLoader
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

dependencies = ["torch", "torchvision", "numpy", "PIL", "yaml"]

_ROOT = Path(__file__).resolve().parent


def _rewriter() -> ModuleType:
    """script/wheel_backend.py, by its place: a user may have a `script` of his own."""
    spec = importlib.util.spec_from_file_location("_cotrain_wheel_backend", _ROOT / "script" / "wheel_backend.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


_BACKEND = _rewriter()


class _Loader(SourceFileLoader):
    """Reads a file of the repository as the wheel has it; no bytecode is kept, that would be of the other form."""

    def get_code(self, fullname: str) -> CodeType:
        path = self.get_filename(fullname)
        code: CodeType = compile(_BACKEND.rewritten(self.get_data(path), path), path, "exec", dont_inherit=True)
        return code


class _Finder(importlib.abc.MetaPathFinder):
    """Finds `cotrain` and what is below it in the repository."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        first, *below = fullname.split(".")
        if first != _BACKEND.NAME:
            return None
        for start in (_ROOT / first, _ROOT):
            place = start.joinpath(*below)
            if (place / "__init__.py").is_file() and (below or start != _ROOT):
                file = place / "__init__.py"
                return importlib.util.spec_from_file_location(
                    fullname, file, loader=_Loader(fullname, str(file)), submodule_search_locations=[str(place)]
                )
            file = place.with_suffix(".py")
            if below and file.is_file():
                return importlib.util.spec_from_file_location(fullname, file, loader=_Loader(fullname, str(file)))
        return None


def _cotrain() -> Any:
    if not any(type(finder).__name__ == "_Finder" for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
    return importlib.import_module("cotrain")


def load(path: str, **flags: Any) -> Any:
    """A model from a run directory, a checkpoint or an exported file: see `cotrain.load`."""
    return _cotrain().load(path, **flags)


def divide(module_or_name: Any, split_factor: int, **arguments: Any) -> Any:
    """(SplitNet, plan) of a module or a name such as "torchvision/resnet50": see `cotrain.divide`."""
    return _cotrain().divide(module_or_name, split_factor, **arguments)

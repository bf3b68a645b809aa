"""Packages whose names come from modules that are imported when the first of them is asked for.

Importing torch takes seconds. The flags, which lie beside what obeys them, are read without it: `--help` and a typo are
answered at once.
"""

import importlib
from collections.abc import Callable
from typing import Any


def lazily(package: str, *modules: str) -> Callable[[str], Any]:
    """The `__getattr__` of a package (PEP 562) that looks a name up in these modules of it, in this order.

    Raises:
        AttributeError: by what is returned, for a name that none of them has.
    """

    def look_up(name: str) -> Any:
        if not name.startswith("_"):
            for module in modules:
                found = vars(importlib.import_module(f"{package}.{module}"))
                if name in found:
                    return found[name]
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    return look_up

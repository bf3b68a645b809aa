"""Ways of learning together: one file a method, their contract with the trainer, and their flags."""

import pkgutil
import sys
from typing import TYPE_CHECKING

from method.options import NoOptions, method_options
from utils.lazy import lazily

if TYPE_CHECKING:
    from method.contract import Method, Peers, Progress, StepOutput, Targets, TrainingData, methods

__all__ = [
    "Method",
    "NoOptions",
    "Peers",
    "Progress",
    "StepOutput",
    "Targets",
    "TrainingData",
    "method_options",
    "methods",
    "options_of",
]
__getattr__ = lazily(__name__, "contract")


def options_of(name: str) -> type:
    """The option dataclass of a method; torch is imported for one whose flags stand in its own file only.

    Raises:
        UserError: no such method.
    """
    files = {info.name for info in pkgutil.iter_modules(__path__)}
    if name not in method_options and (name in files or f"{__name__}.contract" in sys.modules):
        from method.contract import methods

        if name in methods:
            return methods.get(name).Options
    return method_options.get(name)

"""The flags of every method, one file a method: the parser reads them before torch is imported."""

from dataclasses import dataclass

from utils.options import Options
from utils.registry import Registry

# a method that is not here has its options in its own file, and its --help waits for torch
method_options: Registry[type] = Registry("method", "--method", __name__)


@dataclass(frozen=True, kw_only=True)
class NoOptions(Options):
    """For a method without flags of its own."""

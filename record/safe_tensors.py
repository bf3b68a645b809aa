"""Checkpoints as safetensors files: tensors, and everything else as JSON in the file's header. An optional package."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from utils.errors import UserError, reason

SUFFIX = ".safetensors"
MODEL = "model.safetensors"  # in a folder of the Hugging Face hub's layout
HEADER = "divide_and_co_training"  # the header's entry that is ours; files of others have none
AVERAGE = "ema."  # in front of the names of the moving average's tensors


def pack(content: Mapping[str, Any], path: Path) -> bytes:
    """A checkpoint as the bytes of a safetensors file.

    Args:
        content: `state_dict`, perhaps `ema`, both tensors by name; the rest plain values that JSON knows.
        path: where the bytes go, for error messages.

    Raises:
        UserError: the package is missing.
    """
    package = _package(path)
    tensors = dict(content["state_dict"])
    tensors |= {AVERAGE + name: value for name, value in (content.get("ema") or {}).items()}
    rest = {key: value for key, value in content.items() if key not in ("state_dict", "ema")}
    # the format knows no tensors that share memory
    apart = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
    data: bytes = package.torch.save(apart, metadata={"format": "pt", HEADER: json.dumps(rest)})
    return data


def read(path: Path, flag: str) -> dict[str, Any]:
    """Inverse of `pack`; a file of another origin gives its tensors as `state_dict`, and nothing else.

    Raises:
        UserError: the package is missing, or the file is damaged.
    """
    package = _package(path)
    try:
        with package.safe_open(path, framework="pt", device="cpu") as file:
            tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  no dict
            rest = json.loads((file.metadata() or {}).get(HEADER, "{}"))
    except (package.SafetensorError, OSError, ValueError, RecursionError, RuntimeError) as error:
        raise UserError(
            f"{flag} {path}: is truncated, damaged or no safetensors file: {reason(error)[:150]}."
        ) from None
    if not isinstance(rest, dict):
        raise UserError(f"{flag} {path}: its header is damaged.")
    if not rest:
        return {"state_dict": tensors}
    average = {name.removeprefix(AVERAGE): value for name, value in tensors.items() if name.startswith(AVERAGE)}
    raw = {name: value for name, value in tensors.items() if not name.startswith(AVERAGE)}
    return {**rest, "state_dict": raw, **({"ema": average} if average else {})}


def _package(path: Path) -> Any:
    try:
        import safetensors
        import safetensors.torch
    except ImportError as error:
        raise UserError(
            f"{path} needs the package safetensors, which is not installed ({reason(error)}): pip install safetensors."
        ) from None
    return safetensors

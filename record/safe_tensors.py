"""Checkpoints as safetensors files: tensors, and everything else as JSON in the file's header."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from utils.errors import UserError, reason

SUFFIX = ".safetensors"
MODEL = "model.safetensors"  # in a folder of the Hugging Face hub's layout
HEADER = "divide_and_co_training"  # the header's entry that is ours; files of others have none
AVERAGE = "ema."  # in front of the names of the moving average's tensors


def pack(content: Mapping[str, Any]) -> bytes:
    """A checkpoint as the bytes of a safetensors file; the same bytes for the same content.

    Args:
        content: `state_dict`, perhaps `ema`, both tensors by name; the rest plain values that JSON knows.
    """
    tensors = dict(content["state_dict"])
    tensors |= {AVERAGE + name: value for name, value in (content.get("ema") or {}).items()}
    rest = {key: value for key, value in content.items() if key not in ("state_dict", "ema")}
    # the format knows no tensors that share memory
    apart = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
    return _ordered(safetensors.torch.save(apart, metadata={"format": "pt", HEADER: json.dumps(rest)}))


def _ordered(data: bytes) -> bytes:
    """A file whose header names its metadata in order: the library writes these in another order every time."""
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # the tensors begin at a multiple of 8 bytes
    return b"".join((len(text).to_bytes(8, "little"), text, memoryview(data)[end:]))


def read(path: Path, flag: str) -> dict[str, Any]:
    """Inverse of `pack`; a file of another origin gives its tensors as `state_dict`, and nothing else.

    Raises:
        UserError: the file is damaged.
    """
    try:
        with safetensors.safe_open(path, framework="pt", device="cpu") as file:
            tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  no dict
            rest = json.loads((file.metadata() or {}).get(HEADER, "{}"))
    except (safetensors.SafetensorError, OSError, ValueError, RecursionError, RuntimeError) as error:
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


def unpack(data: bytes) -> dict[str, Tensor]:
    """The tensors of a safetensors file that is in memory, by name; what its header says beside them is passed over.

    Raises:
        ValueError: the bytes are damaged or no such file.
    """
    try:
        tensors: dict[str, Tensor] = safetensors.torch.load(data)
    except (safetensors.SafetensorError, ValueError, KeyError, TypeError, RuntimeError, RecursionError) as error:
        raise ValueError(reason(error)[:150]) from None
    return tensors

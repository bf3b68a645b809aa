"""The images of tests/golden/answers.json, made by the generator that it describes."""

import functools
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

GOLDEN: dict[str, Any] = json.loads((Path(__file__).parent / "golden" / "answers.json").read_text(encoding="utf-8"))
CASES = tuple(GOLDEN["cases"])


def hash32(x: np.ndarray) -> np.ndarray:
    x = x.astype(np.uint64)
    mask = np.uint64(0xFFFFFFFF)
    x = x ^ (x >> np.uint64(16))
    x = (x * np.uint64(0x7FEB352D)) & mask
    x = x ^ (x >> np.uint64(15))
    x = (x * np.uint64(0x846CA68B)) & mask
    return x ^ (x >> np.uint64(16))


def uniform(n: int, stream: int) -> np.ndarray:
    counter = (np.arange(n, dtype=np.uint64) + np.uint64(stream * 1_000_000)) & np.uint64(0xFFFFFFFF)
    return (hash32(counter).astype(np.float64) + 0.5) / 2**32


def gauss(n: int, stream: int) -> np.ndarray:
    return (sum(uniform(n, stream + i) for i in range(4)) - 2) * np.sqrt(3)


class Case(NamedTuple):
    """z_held [S, N, K], y_held [N], z_test [S, N_test, K], y_test, z_ood [S, N_ood, K]; u of both; the parameters."""

    held: Tensor
    held_labels: Tensor
    test: Tensor
    test_labels: Tensor
    ood: Tensor
    held_uniform: Tensor
    test_uniform: Tensor
    numbers: dict[str, Any]


@functools.cache
def make(name: str) -> Case:
    c = GOLDEN["cases"][name]["case"]
    networks, classes, images, foreign, stream = c["S"], c["K"], c["N"] + c["N_test"], c["N_ood"], c["stream"]
    labels = np.minimum(np.floor(uniform(images, stream) * classes), classes - 1).astype(np.int64)
    signal = np.zeros((images, classes))
    signal[np.arange(images), labels] = c["signal"] * uniform(images, stream + 1)

    def noisy(count: int, first: int, added: np.ndarray | float) -> Tensor:
        shared = c["shared"] * gauss(count * classes, first + 2).reshape(count, classes)
        own = [
            c["own"][s] * gauss(count * classes, first + 10 + 10 * s).reshape(count, classes) for s in range(networks)
        ]
        return torch.from_numpy(np.stack([np.round(c["scale"] * (shared + one + added), 4) for one in own]))

    logits, y, held = noisy(images, stream, signal), torch.from_numpy(labels), c["N"]
    return Case(
        held=logits[:, :held],
        held_labels=y[:held],
        test=logits[:, held:],
        test_labels=y[held:],
        ood=noisy(foreign, stream + 500, 0.0),
        held_uniform=torch.from_numpy(uniform(held, stream + 900)),
        test_uniform=torch.from_numpy(uniform(images - held, stream + 901)),
        numbers=c,
    )

"""Answers images by the cascade beside this file, which needs no other file of the project that wrote it.

    python run_cascade.py IMAGES.npy ANSWERS.npz [BATCH]

Needs NumPy, and onnxruntime for networks in .onnx or torch for those in .pt2. IMAGES: float32 [N, 3, H, W], prepared as
`preprocessing` in manifest.json says; BATCH of them go through the first network at once (128), and those that it is
not sure of through the next. ANSWERS: `ensemble` [N, K], scores of the stage that answered; `probabilities` [N, K];
`networks` [N], how many ran. S networks, N images, B of a batch, K classes; all arithmetic on logits in float64.
"""

import hashlib
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

MANIFEST = "manifest.json"
BATCH = 128

Array = NDArray[Any]
Network = Callable[[Array], Array]  # images [B, 3, H, W] -> logits [B, K]


def log_softmax(scores: Array) -> Array:
    """Log-probabilities over the last dimension."""
    shifted = scores - scores.max(axis=-1, keepdims=True)
    log_probs: Array = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return log_probs


def joined(logits_SBK: Array, rule: str) -> Array:
    """Scores of networks together: [B, K]."""
    scores_BK: Array
    values_SBK = logits_SBK if rule.endswith("logits") else log_softmax(logits_SBK)
    if rule == "mean_softmax":
        highest_BK = values_SBK.max(axis=0)
        scores_BK = highest_BK + np.log(np.exp(values_SBK - highest_BK).sum(axis=0))
    else:
        scores_BK = values_SBK.max(axis=0) if rule.startswith("max") else values_SBK.mean(axis=0)
    return scores_BK


def confidence_of(log_probs_BK: Array, kind: str) -> Array:
    """How sure an answer is: [B]."""
    found_B: Array
    probs_BK = np.exp(log_probs_BK)
    num_classes = probs_BK.shape[-1]
    if kind == "max_prob":
        found_B = probs_BK.max(axis=-1)
    elif num_classes == 1:
        found_B = np.where(np.isnan(probs_BK[:, 0]), np.nan, 1.0)
    elif kind == "margin":
        ordered_BK = np.sort(probs_BK, axis=-1)
        found_B = ordered_BK[:, -1] - ordered_BK[:, -2]
    else:
        surprise_BK = np.where(probs_BK == 0, 0.0, probs_BK * log_probs_BK)
        found_B = np.clip(1 + surprise_BK.sum(axis=-1) / np.log(num_classes), 0, 1)
    return found_B


def leaves(confidence_B: Array, bounds: Sequence[float]) -> Array:
    """Which images leave: at a threshold those at least so sure, of a window those outside of it; NaN never."""
    left_B: Array
    if len(bounds) == 1:
        left_B = confidence_B >= bounds[0]
    else:
        left_B = (confidence_B < bounds[0]) | (confidence_B > bounds[1])
    return left_B


def load_network(path: Path) -> Network:
    """A network of the folder."""
    if path.suffix == ".onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(path.read_bytes(), providers=["CPUExecutionProvider"])

        def run(images_BCHW: Array) -> Array:
            logits_BK: Array = session.run(["logits"], {"images": images_BCHW})[0]
            return logits_BK

        return run
    import torch

    module = torch.export.load(str(path)).module()

    def run_program(images_BCHW: Array) -> Array:
        with torch.no_grad():
            logits_BK: Array = module(torch.from_numpy(images_BCHW)).numpy()
        return logits_BK

    return run_program


class FolderCascade:
    """The cascade of a folder: images -> (scores [B, K], probabilities [B, K], how many networks ran [B]).

    Raises:
        ValueError: a file is not the one that was written.
    """

    def __init__(self, folder: Path) -> None:
        self.manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        for name, sha256 in self.manifest["files"].items():
            if hashlib.sha256((folder / name).read_bytes()).hexdigest() != sha256:
                raise ValueError(f"{folder / name} is not the file that {MANIFEST} names: export the cascade again.")
        walk = self.manifest["walk"]
        self._rule, self._confidence = str(walk["rule"]), str(walk["confidence"])
        self._temperatures, self._stage_temperatures = walk["temperatures"], walk["stage_temperatures"]
        self._bounds = walk["bounds"]
        self._networks = [load_network(folder / name) for name in walk["networks"]]

    def __call__(self, images_BCHW: Array) -> tuple[Array, Array, Array]:
        going_B = np.arange(len(images_BCHW))
        answers: tuple[Array, Array, Array] | None = None
        so_far: list[Array] = []  # logits of the networks that ran, of the images that are still there
        for k, network in enumerate(self._networks):
            so_far.append(network(images_BCHW[going_B]).astype(np.float64) / self._temperatures[k])
            scores_BK = joined(np.stack(so_far), self._rule)
            log_probs_BK = log_softmax(scores_BK / self._stage_temperatures[k])
            if answers is None:
                answers = (scores_BK.copy(), np.exp(log_probs_BK), np.ones(len(going_B), dtype=np.int64))
            for kept, found in zip(answers, (scores_BK, np.exp(log_probs_BK), k + 1), strict=True):
                kept[going_B] = found
            if k == len(self._bounds):
                break
            goes_on_B = ~leaves(confidence_of(log_probs_BK, self._confidence), self._bounds[k])
            if not goes_on_B.any():
                break
            going_B, so_far = going_B[goes_on_B], [logits_BK[goes_on_B] for logits_BK in so_far]
        assert answers is not None
        return answers


def main(argv: Sequence[str]) -> int:
    """The command line; returns the exit code: 0 done, 2 a mistake."""
    try:
        if len(argv) not in (2, 3):
            raise ValueError("expected IMAGES.npy ANSWERS.npz [BATCH]")
        batch = int(argv[2]) if len(argv) == 3 else BATCH
        images = np.load(argv[0], allow_pickle=False)
        if images.ndim != 4 or images.dtype != np.float32 or not len(images) or batch < 1:
            raise ValueError(f"{argv[0]}: expected float32 images [N, 3, H, W], in batches of 1 or more")
        cascade = FolderCascade(Path(__file__).resolve().parent)
        parts = [cascade(images[start : start + batch]) for start in range(0, len(images), batch)]
        scores, probabilities, networks = (np.concatenate(part) for part in zip(*parts, strict=True))
        out = Path(argv[1])
        partial = out.with_name(out.name + ".partial.npz")
        np.savez(partial, ensemble=scores, probabilities=probabilities, networks=networks)
        os.replace(partial, out)
    except (OSError, ValueError, ImportError) as error:
        sys.stderr.write(f"run_cascade: {error}\n")
        return 2
    sys.stdout.write(f"{len(images)} images, {networks.mean():.3f} networks on average: {out}\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))

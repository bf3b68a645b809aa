"""A trained model in one line of somebody else's program: `load(PATH)`. S networks, B images, K classes.

Checkpoints of ours and released ones go through the session of eval.py, so that both give the same numbers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike, fspath
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from dataset.cut import pixels
from dataset.decode import as_rgb, read_rgb, resize_crop
from evaluation.ensemble import ensemble_log_probs
from evaluation.export import Exported, Normalise, load_exported
from evaluation.ood import pair_disagreement
from evaluation.options import EvalOptions
from evaluation.session import class_names_and_statistics, open_session, preprocessing
from parser_params import parse_config
from recipe.datasets import ROWS, open_row
from recipe.preprocessing import Preprocessing, eval_resize
from record.run_folder import EXPORTED, checkpoint_of
from utils.errors import UserError
from utils.launch import World

CHUNK = 64  # images that go through the networks at a time
Picture = str | PathLike[str] | Image.Image | np.ndarray


class Predicted(NamedTuple):
    """What an ensemble says of B images.

    Attributes:
        probabilities_BK: of the ensemble, float32 [B, K].
        disagreement_B: the part of all pairs of networks that choose different classes, float64 [B]; 0 for one network.
    """

    probabilities_BK: Tensor
    disagreement_B: Tensor


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """An ensemble, ready for images.

    Attributes:
        network: images as `preprocess` gives them, [B, 3, crop, crop], -> logits [S, B, K]; in evaluation mode.
        classes: K names.
        rule: how the S predictions become one, of `evaluation.ensemble.RULES`.
        steps: what becomes of an image first; `preprocessing` is the same as a plain dict.
        takes_pixels: the file normalises inside: `preprocess` gives uint8.
        device: where the networks are.
    """

    network: nn.Module
    classes: tuple[str, ...]
    rule: str
    steps: Preprocessing
    takes_pixels: bool = False
    device: torch.device

    @property
    def preprocessing(self) -> dict[str, Any]:
        """What becomes of an image before the networks see it, as every file of the model says it."""
        return self.steps.as_dict()

    def preprocess(self, image: Picture) -> Tensor:
        """One image as the networks take it, float32 [3, crop, crop] on the CPU, prepared as eval.py prepares files.

        Args:
            image: the path of a file, a PIL image, or a uint8 array [H, W, 3] or [H, W].

        Raises:
            UserError: an array of another kind.
            BadImage: a file that gives no image.
        """
        cut = resize_crop(_as_rgb(image), self.steps.resize, self.steps.crop, self.steps.interpolation)
        image_CHW = pixels(cut)
        return image_CHW if self.takes_pixels else Normalise(self.steps.mean, self.steps.std)(image_CHW)

    @torch.inference_mode()
    def predict(self, images: Picture | Sequence[Picture] | Tensor) -> Predicted:
        """Classify one image, several, or a batch of prepared ones [B, 3, H, W].

        Raises:
            UserError, BadImage: as `preprocess`; or there is no image.
        """
        if isinstance(images, str | PathLike | Image.Image) or (isinstance(images, np.ndarray) and images.ndim < 4):
            images = [images]
        count = len(images)
        if not count:
            raise UserError("predict: expected at least one image.")
        logits = []
        for start in range(0, count, CHUNK):
            part = images[start : start + CHUNK]
            batch_BCHW = part if isinstance(part, Tensor) else torch.stack([self.preprocess(one) for one in part])
            logits.append(self.network(batch_BCHW.to(self.device)).cpu())
        logits_SBK = torch.cat(logits, dim=1)
        return Predicted(ensemble_log_probs(logits_SBK, self.rule).exp(), pair_disagreement(logits_SBK))


def load(path: str | PathLike[str], *, device: str | torch.device = "cpu", **flags: Any) -> Loaded:
    """A model from a run directory, a checkpoint, a released file, or an exported .pt2 or .onnx file.

    Args:
        path: the file; of a run directory its best checkpoint, else its newest.
        device: where the networks go; exported files stay on the CPU.
        flags: any flag of eval.py by its name, such as `weights="raw"`, `is_ensembled_after_softmax=True`, or, for
            released files, which do not say it, `dataset="cifar100"`.

    Raises:
        UserError: no such file, not one of these, or flags that do not fit it.
    """
    device = torch.device(device)
    if Path(path).suffix in EXPORTED:
        return _load_exported(Path(path), device, flags)
    words = [word for name, value in flags.items() for word in (f"--{name}", _as_word(value))]
    words += ["--resume", str(checkpoint_of(path, or_newest=True)), "--no_cuda"]
    config = parse_config(words, program="load", extra=EvalOptions)
    session = open_session(config, World(0, 1, 0, 1, device), [])
    if session.info.mean is None and "dataset" not in flags:
        raise UserError(f'{path}: does not say what its networks were trained on: add dataset="cifar100", or whatever.')
    classes, _, _ = class_names_and_statistics(session)
    return Loaded(
        network=session.network,
        classes=tuple(classes),
        rule=session.rule,
        steps=preprocessing(session),
        device=device,
    )


def _as_word(value: Any) -> str:
    return str(int(value)) if isinstance(value, bool) else str(value)


def _as_rgb(image: Picture) -> Image.Image:
    if isinstance(image, Image.Image):
        return as_rgb(image, "the given image")
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim not in (2, 3) or (image.ndim == 3 and image.shape[2] != 3):
            raise UserError(f"an image as an array: expected uint8 [H, W, 3], found {image.dtype} {list(image.shape)}.")
        return Image.fromarray(image).convert("RGB")
    return read_rgb(fspath(image))


# ---- exported files --------------------------------------------------------------------------------------------------


class _Exported(nn.Module):
    """The logits of an exported program."""

    def __init__(self, run: Exported) -> None:
        super().__init__()
        self.run = run

    def forward(self, images_BCHW: Tensor) -> Tensor:
        return self.run(images_BCHW)[1]


def _load_exported(path: Path, device: torch.device, flags: Mapping[str, Any]) -> Loaded:
    if flags:
        raise UserError(f"{path}: weights and rule are fixed in an exported file: leave {', '.join(flags)} away.")
    if device.type != "cpu":
        raise UserError(f"{path}: exported files run on the CPU here; load the checkpoint for device {device}.")
    if not path.is_file():
        raise UserError(f"{path}: does not exist.")
    try:
        run, metadata = load_exported(path)
        steps = metadata.get("preprocessing") or _derived(metadata)
        return Loaded(
            network=_Exported(run),
            classes=tuple(metadata["classes"]),
            rule=metadata["rule"],
            steps=Preprocessing.from_dict(steps, str(path)),
            takes_pixels=metadata.get("input_dtype") == "uint8",
            device=device,
        )
    except UserError:
        raise
    except Exception as error:  # torch and onnxruntime fail in every way there is on a file that is none of theirs
        raise UserError(f"{path}: is damaged, or not written by script/export.py ({type(error).__name__}).") from None


def _derived(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """What files from before the entry mean: the rule for the size of their images."""
    crop = metadata["crop_size"]
    resize = eval_resize(crop) if ROWS[open_row(crop)].is_large else crop
    mean, std = metadata["mean"], metadata["std"]
    return Preprocessing(resize=resize, interpolation="bicubic", crop=crop, mean=mean, std=std).as_dict()

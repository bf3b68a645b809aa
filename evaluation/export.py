"""An ensemble as one file that runs without this project: a torch.export program (.pt2) or ONNX (.onnx).

B images, S networks, K classes.
"""

import contextlib
import importlib.util
import io
import json
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from evaluation.ensemble import ensemble_scores
from model.fold import fold_batch_norm
from model.splitnet import SplitNet
from utils.errors import UserError
from utils.plain_json import plain_json
from utils.precision import lay_out

METADATA = "metadata.json"  # beside the program inside a .pt2 file, and the property "metadata" of an ONNX model
ONNX_PACKAGES = ("onnx", "onnxscript")
OUTPUTS = ("ensemble", "logits")
CALIBRATED = (*OUTPUTS, "probabilities")  # where temperatures were fitted

LogProbs = Callable[[Tensor], Tensor]  # logits [S, B, K] -> log-probabilities [B, K]
Exported = Callable[[Tensor], tuple[Tensor, ...]]


class Normalise(nn.Module):
    """uint8 images [B, 3, H, W] -> what the networks take, as `dataset.views.ViewMaker.evaluate` does it.

    Args:
        mean, std: per channel, on the scale [0, 1].
    """

    mean_C11: Tensor
    std_C11: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("mean_C11", torch.tensor(mean)[:, None, None])
        self.register_buffer("std_C11", torch.tensor(std)[:, None, None])

    def forward(self, images_BCHW: Tensor) -> Tensor:
        return (images_BCHW.to(self.mean_C11.dtype) / 255 - self.mean_C11) / self.std_C11


class Ensemble(nn.Module):
    """The networks and the rule that joins them: images [B, 3, H, W] -> (ensemble scores [B, K], logits [S, B, K]).

    With temperatures, the calibrated probabilities [B, K] come third, in the type of the logits.

    Args:
        network: its networks all see the same images.
        rule: of `evaluation.ensemble.RULES`.
        prepare: what comes before the networks; None: nothing.
        log_probs: calibrated, of the logits; None where nothing was fitted.
    """

    def __init__(
        self, network: nn.Module, rule: str, prepare: nn.Module | None = None, log_probs: LogProbs | None = None
    ) -> None:
        super().__init__()
        self.network = network
        self.rule = rule
        self.prepare = prepare or nn.Identity()
        self.log_probs = log_probs

    def forward(self, images_BCHW: Tensor) -> tuple[Tensor, ...]:
        logits_SBK = self.network(self.prepare(images_BCHW))
        found = ensemble_scores(logits_SBK, self.rule), logits_SBK
        return found if self.log_probs is None else (*found, self.log_probs(logits_SBK).exp().to(logits_SBK.dtype))


def export_ensemble(
    network: SplitNet,
    rule: str,
    image_shape: Sequence[int],
    prepare: Normalise | None = None,
    log_probs: LogProbs | None = None,
) -> ExportedProgram:
    """The networks and their rule as one graph for any batch size, in evaluation mode, batch norm folded.

    Args:
        network: on the CPU; it is left as it was.
        rule: of `evaluation.ensemble.RULES`.
        image_shape: [C, H, W] of an image.
        prepare: makes the networks' floats of uint8 images inside the program; None: it takes the floats.
        log_probs: calibrated, of the logits; None where nothing was fitted.

    Returns:
        a program: images [B, C, H, W] -> (scores [B, K] that order the classes as the ensemble does, logits [S, B, K]),
        and with `log_probs` the probabilities [B, K].
    """
    folded = folded_for_export(network, image_shape)
    dtype = next(folded.parameters()).dtype if prepare is None else torch.uint8
    return for_any_batch(Ensemble(folded, rule, prepare, log_probs), image_shape, dtype)


def folded_for_export(network: SplitNet, image_shape: Sequence[int]) -> SplitNet:
    """A copy with batch norm folded, in the layout of every exported program."""
    folded = fold_batch_norm(network, image_shape)
    assert isinstance(folded, SplitNet)
    return lay_out(folded, torch.contiguous_format)


def for_any_batch(module: nn.Module, image_shape: Sequence[int], dtype: torch.dtype) -> ExportedProgram:
    """A module in evaluation mode as a program for images [B, C, H, W] of any B."""
    example_BCHW = torch.zeros(2, *image_shape, dtype=dtype)
    with torch.no_grad():
        module.eval()(example_BCHW)  # networks that keep what depends on their weights alone, as LeViT, keep it now
        return torch.export.export(module, (example_BCHW,), dynamic_shapes=({0: Dim("batch", min=1)},))


def program_bytes(program: ExportedProgram, metadata: Mapping[str, Any]) -> bytes:
    """Contents of a .pt2 file with the metadata as JSON in its extra file METADATA."""
    buffer = io.BytesIO()
    torch.export.save(program, buffer, extra_files={METADATA: json.dumps(plain_json(metadata))})
    return buffer.getvalue()


def file_bytes(
    program: ExportedProgram, suffix: str, metadata: Mapping[str, Any], outputs: Sequence[str] = OUTPUTS
) -> bytes:
    """Contents of a file whose name ends in `suffix`, .onnx or .pt2, which names no outputs.

    Raises:
        UserError: a package for .onnx is missing.
    """
    return onnx_bytes(program, metadata, outputs) if suffix == ".onnx" else program_bytes(program, metadata)


def onnx_bytes(program: ExportedProgram, metadata: Mapping[str, Any], outputs: Sequence[str] = OUTPUTS) -> bytes:
    """Contents of an .onnx file; input `images`, outputs by name, the metadata as JSON in a property.

    Raises:
        UserError: a package is missing.
    """
    require(ONNX_PACKAGES)
    # the exporter tells its steps to the root logger's level
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with own_warnings_ignored():
        converted = torch.onnx.export(
            program, input_names=["images"], output_names=list(outputs), dynamo=True, verbose=False, external_data=False
        )
    assert converted is not None
    converted.model.metadata_props["metadata"] = json.dumps(plain_json(metadata))
    contents: bytes = converted.model_proto.SerializeToString()
    return contents


@contextlib.contextmanager
def own_warnings_ignored() -> Iterator[None]:
    """Without what torch 2.11 says of its own insides while it reads a program or converts one."""
    with warnings.catch_warnings():
        # it makes tensors over the bytes that it read, to which nobody writes
        warnings.filterwarnings("ignore", message="The given buffer is not writable", category=UserWarning)
        warnings.filterwarnings("ignore", message=r"`isinstance\(treespec, LeafSpec\)`", category=FutureWarning)
        yield


def require(packages: Sequence[str]) -> None:
    """Check that optional packages are there.

    Raises:
        UserError: one is not, by its name.
    """
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"ONNX needs the package {missing[0]}: pip install {' '.join(missing)}, or write a .pt2 file.")


def load_exported(path: Path) -> tuple[Exported, dict[str, Any]]:
    """An exported file as (images [B, C, H, W] -> (ensemble [B, K], logits [S, B, K]), its metadata).

    Of calibrated networks the probabilities [B, K] come third.

    Raises:
        UserError: a package for .onnx is missing.
    """
    if path.suffix == ".onnx":
        require(("onnxruntime",))
        import onnxruntime

        session = onnxruntime.InferenceSession(path.read_bytes(), providers=["CPUExecutionProvider"])
        metadata = session.get_modelmeta().custom_metadata_map["metadata"]

        def run(images_BCHW: Tensor) -> tuple[Tensor, ...]:
            found = session.run(None, {"images": images_BCHW.contiguous().numpy()})
            return tuple(map(torch.from_numpy, found))

        return run, json.loads(metadata)
    files = {METADATA: ""}
    with own_warnings_ignored():
        module = torch.export.load(io.BytesIO(path.read_bytes()), extra_files=files).module()
    return lambda images_BCHW: module(images_BCHW), json.loads(files[METADATA])

"""A tuned cascade that runs without this project: one file for one image at a time, or a folder for batches.

The file (.pt2, .onnx) is written flat: scores and their number are carried through, and each further network is one
`torch.cond` (in ONNX one `If`). Nested conditions would store the weights of the tail again and again. The folder holds
a file for each network, and `evaluation.run_cascade`, which gathers the images that go on. S networks, K classes.
"""

import hashlib
import io
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from evaluation import run_cascade
from evaluation.answers import Answers
from evaluation.export import file_bytes, folded_for_export, for_any_batch, own_warnings_ignored, require
from evaluation.selective import plogp
from model.splitnet import SplitNet
from utils.plain_json import plain_json

CASCADE_OUTPUTS = ("ensemble", "networks")
RUNNER = "run_cascade.py"

# images [B, C, H, W] -> (scores [B, K] of the stage that answered, how many networks ran, int64 [B])
ExportedCascade = Callable[[Tensor], tuple[Tensor, Tensor]]


class FlatCascade(nn.Module):
    """One image [1, 3, H, W] -> (scores of the stage that answered [1, K], how many networks ran, int64 [1]).

    Args:
        networks: in the order in which they run.
        answers: with a cascade.
    """

    def __init__(self, networks: Sequence[nn.Module], answers: Answers) -> None:
        super().__init__()
        cascade = answers.cascade
        assert cascade is not None
        self.models = nn.ModuleList(networks)
        self.rule, self.confidence = answers.rule, cascade.confidence
        own, of_stages = answers.network_temperatures(), answers.stage_temperatures()
        order, size = cascade.order, len(networks)
        self.temperatures: Tensor
        self.stage_temperatures: Tensor
        self.bounds: Tensor
        self.register_buffer("temperatures", torch.tensor([1.0] * size if own is None else [own[s] for s in order]))
        self.register_buffer("stage_temperatures", torch.tensor([1.0] * size if of_stages is None else [*of_stages]))
        # an image goes on where low <= c <= high; of a threshold t where not c >= t, so that low is out of reach
        self.is_window = cascade.kind == "window"
        self.register_buffer("bounds", torch.tensor([[*bounds] for bounds in cascade.bounds]))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        carried = self._own(images, 0)
        count = torch.ones(1, dtype=torch.int64)
        for k in range(1, len(self.models)):
            goes_on = self._goes_on(self._scores(carried, count), k - 1) & (count == k)

            def add(images: Tensor, carried: Tensor, count: Tensor, k: int = k) -> tuple[Tensor, Tensor]:
                return self._joined(carried, self._own(images, k)), count + 1

            def keep(images: Tensor, carried: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
                return carried * 1.0, count * 1  # branches must give new tensors

            carried, count = torch.cond(goes_on, add, keep, (images, carried, count))
        return self._scores(carried, count), count

    def _own(self, images: Tensor, k: int) -> Tensor:
        """What one network adds."""
        logits_BK = self.models[k](images) / self.temperatures[k]
        return logits_BK if self.rule.endswith("logits") else logits_BK.log_softmax(dim=-1)

    def _joined(self, carried: Tensor, own: Tensor) -> Tensor:
        if self.rule == "mean_softmax":
            return torch.stack([carried, own]).logsumexp(dim=0)
        return torch.maximum(carried, own) if self.rule.startswith("max") else carried + own

    def _scores(self, carried: Tensor, count: Tensor) -> Tensor:
        return carried / count if self.rule in ("mean_logits", "geometric_mean") else carried * 1.0

    def _goes_on(self, scores_BK: Tensor, stage: int) -> Tensor:
        log_probs_BK = (scores_BK / self.stage_temperatures[stage]).log_softmax(dim=-1)
        if self.confidence == "max_prob":
            confidence_B = log_probs_BK.amax(dim=-1).exp()
        elif self.confidence == "margin":
            best_B2 = log_probs_BK.topk(2, dim=-1).values.exp()
            confidence_B = best_B2[:, 0] - best_B2[:, 1]
        else:
            classes = torch.tensor(float(scores_BK.shape[-1]))
            confidence_B = 1 + plogp(log_probs_BK).sum(dim=-1) / classes.log()
        if self.is_window:
            return ~((confidence_B < self.bounds[stage, 0]) | (confidence_B > self.bounds[stage, 1]))
        return ~(confidence_B >= self.bounds[stage, 0])


def export_cascade(network: SplitNet, answers: Answers, image_shape: Sequence[int]) -> ExportedProgram:
    """The cascade as one graph for one image, in evaluation mode, batch norm folded; `network` is left as it was.

    Args:
        image_shape: [C, H, W] of the image.
    """
    cascade = answers.cascade
    assert cascade is not None
    folded = folded_for_export(network, image_shape)
    flat = FlatCascade([folded.models[s] for s in cascade.order], answers).eval()
    example_1CHW = torch.zeros(1, *image_shape)
    with torch.no_grad():
        for one in flat.models:
            one(example_1CHW)  # as in `for_any_batch`, also by those that this image would not reach
        return torch.export.export(flat, (example_1CHW,))


def cascade_files(
    network: SplitNet, answers: Answers, image_shape: Sequence[int], metadata: Mapping[str, Any], suffix: str
) -> dict[str, bytes]:
    """The folder of a cascade for batches, by the names of its files: networks, RUNNER and its manifest.

    Args:
        network: left as it was.
        image_shape: [C, H, W] of an image.
        metadata: what a user needs to know.
        suffix: of the networks' files, .onnx or .pt2.

    Raises:
        UserError: a package for .onnx is missing.
    """
    cascade = answers.cascade
    assert cascade is not None
    folded = folded_for_export(network, image_shape)
    dtype = next(folded.parameters()).dtype
    files = {}
    for s, one in enumerate(folded.models):
        program, about = for_any_batch(one, image_shape, dtype), {**metadata, "network": s + 1}
        files[f"network_{s + 1}{suffix}"] = file_bytes(program, suffix, about, ("logits",))
    order = cascade.order
    own, of_stages = answers.network_temperatures(), answers.stage_temperatures()
    manifest = {
        **metadata,
        "answers": answers.as_dict(),
        "walk": {
            "networks": [f"network_{s + 1}{suffix}" for s in order],
            "rule": answers.rule,
            "confidence": cascade.confidence,
            "bounds": [list(bounds) for bounds in cascade.bounds],
            "temperatures": [1.0 if own is None else own[s] for s in order],
            "stage_temperatures": [1.0] * len(order) if of_stages is None else list(of_stages),
        },
        "files": {name: hashlib.sha256(contents).hexdigest() for name, contents in files.items()},
    }
    files[RUNNER] = Path(run_cascade.__file__).read_bytes()
    files[run_cascade.MANIFEST] = (json.dumps(plain_json(manifest), indent=2) + "\n").encode()
    return files


def load_cascade_folder(folder: Path) -> ExportedCascade:
    """The written cascade of a folder, run by its own code."""
    with own_warnings_ignored():
        cascade = run_cascade.FolderCascade(folder)

    def run(images_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        scores_BK, _, networks_B = cascade(images_BCHW.contiguous().numpy())
        return torch.from_numpy(scores_BK), torch.from_numpy(networks_B)

    return run


def load_cascade(path: Path) -> ExportedCascade:
    """An exported cascade, run for one image after another.

    Raises:
        UserError: a package for .onnx is missing.
    """
    if path.suffix == ".onnx":
        require(("onnxruntime",))
        import onnxruntime

        session = onnxruntime.InferenceSession(path.read_bytes(), providers=["CPUExecutionProvider"])

        def answer(image_1CHW: Tensor) -> tuple[Tensor, Tensor]:
            scores, count = session.run(list(CASCADE_OUTPUTS), {"images": image_1CHW.contiguous().numpy()})
            return torch.from_numpy(scores), torch.from_numpy(count)
    else:
        with own_warnings_ignored():
            answer = torch.export.load(io.BytesIO(path.read_bytes())).module()

    def run(images_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        scores, counts = zip(*(answer(image_CHW[None]) for image_CHW in images_BCHW), strict=True)
        return torch.cat(scores), torch.cat(counts)

    return run
